//! Which chunks are reusable ends, in the order in which they are given up.

use std::collections::{BTreeSet, HashMap};

/// What the index depends on, of a reusable end. Those that nobody holds go first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct EndUse {
    pub(super) is_held: bool,
    /// When it was last held.
    pub(super) last_used: u64,
}

/// Reusable ends by model.
#[derive(Debug, Default)]
pub(super) struct Ends {
    models: HashMap<u64, BTreeSet<(EndUse, u64)>>,
}

impl Ends {
    /// Follows a chunk from what it was to what it is; `None`: no reusable end, or not in the store.
    pub(super) fn change(&mut self, model: u64, id: u64, before: Option<EndUse>, after: Option<EndUse>) {
        if before == after {
            return;
        }
        let of_model = self.models.entry(model).or_default();
        if let Some(before) = before {
            of_model.remove(&(before, id));
        }
        if let Some(after) = after {
            of_model.insert((after, id));
        }
    }

    /// The one to give up.
    pub(super) fn first(&self, model: u64) -> Option<u64> {
        self.models.get(&model)?.first().map(|&(_, id)| id)
    }

    /// All of them.
    pub(super) fn iter(&self) -> impl Iterator<Item = u64> {
        self.models.values().flatten().map(|&(_, id)| id)
    }

    /// The model's chunks have left the store.
    pub(super) fn forget_model(&mut self, model: u64) {
        self.models.remove(&model);
    }
}
