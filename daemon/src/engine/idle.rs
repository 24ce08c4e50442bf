//! Which chunks nobody holds: counted, and their leaves in the order of their last use.

use std::collections::{BTreeSet, HashMap};

/// What the index depends on, of a chunk that nobody holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Idleness {
    /// No chunk's parent.
    pub(super) is_leaf: bool,
    /// When it was last held.
    pub(super) last_used: u64,
}

/// Chunks that nobody holds, by model.
#[derive(Debug, Default)]
pub(super) struct IdleChunks {
    models: HashMap<u64, OfModel>,
}

#[derive(Debug, Default)]
struct OfModel {
    count: usize,
    /// Last use and id.
    leaves: BTreeSet<(u64, u64)>,
}

impl IdleChunks {
    /// Follows a chunk from what it was to what it is; `None`: held, or not in the store.
    pub(super) fn change(&mut self, model: u64, id: u64, before: Option<Idleness>, after: Option<Idleness>) {
        if before == after {
            return;
        }
        let of_model = self.models.entry(model).or_default();
        if let Some(Idleness { is_leaf, last_used }) = before {
            of_model.count -= 1;
            if is_leaf {
                of_model.leaves.remove(&(last_used, id));
            }
        }
        if let Some(Idleness { is_leaf, last_used }) = after {
            of_model.count += 1;
            if is_leaf {
                of_model.leaves.insert((last_used, id));
            }
        }
    }

    /// Chunks of a model that nobody holds.
    pub(super) fn count(&self, model: u64) -> usize {
        self.models.get(&model).map_or(0, |of_model| of_model.count)
    }

    /// Of these the leaf that was used least recently.
    pub(super) fn least_recent_leaf(&self, model: u64) -> Option<u64> {
        self.models.get(&model)?.leaves.first().map(|&(_, id)| id)
    }

    /// The model's chunks have left the store.
    pub(super) fn forget_model(&mut self, model: u64) {
        self.models.remove(&model);
    }
}
