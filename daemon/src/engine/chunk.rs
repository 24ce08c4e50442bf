//! Sealed chunks: counted, named, and shed leaf-first when nobody holds them.
//!
//! The names form a hash chain, so the map from names to chunks is the prefix tree: walking a prompt's names walks down the tree.

use std::collections::HashMap;

use sluice_kernels::slot::SlotId;

use crate::engine::name::Name;
use crate::journal::ChunkRecord;

/// A sealed chunk and who needs it.
#[derive(Debug)]
pub struct Chunk {
    /// What is journaled.
    pub record: ChunkRecord,
    /// Sequences that hold it, and slots of dropped paths that wait for a step to complete.
    pub holders: u32,
    /// Chunks whose parent it is.
    pub children: u32,
    /// Ends (growing or reusable) whose window reaches it.
    pub window_needs: u32,
    /// Whether its rows were checked since the daemon started.
    pub verified: bool,
    /// Its rows are not what they were: never matched again.
    pub quarantined: bool,
    /// When it was last held, in the store's own time.
    last_used: u64,
}

impl Chunk {
    /// Whether an Open may find it.
    #[must_use]
    pub fn is_shareable(&self) -> bool {
        self.record.name.is_some() && self.record.dense && !self.quarantined
    }
}

/// All chunks.
#[derive(Debug, Default)]
pub struct ChunkStore {
    chunks: HashMap<u64, Chunk>,
    names: HashMap<(u64, Name), u64>,
    now: u64,
    held: usize,
}

/// A chunk that has left the store.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Removed {
    /// Its id.
    pub id: u64,
    /// Slots that are free now.
    pub slots: [Option<SlotId>; 2],
}

impl ChunkStore {
    /// Takes up a chunk that nobody holds yet.
    pub fn add(&mut self, record: ChunkRecord, verified: bool) {
        if let Some(name) = record.name {
            self.names.insert((record.model, name), record.id);
        }
        if let Some(parent) = record.parent.and_then(|parent| self.chunks.get_mut(&parent)) {
            parent.children += 1;
        }
        self.now += 1;
        let chunk = Chunk { record, holders: 0, children: 0, window_needs: 0, verified, quarantined: false, last_used: self.now };
        self.chunks.insert(record.id, chunk);
    }

    /// A chunk.
    #[must_use]
    pub fn get(&self, id: u64) -> Option<&Chunk> {
        self.chunks.get(&id)
    }

    /// A chunk.
    pub fn get_mut(&mut self, id: u64) -> Option<&mut Chunk> {
        self.chunks.get_mut(&id)
    }

    /// All chunks, in no order.
    pub fn iter(&self) -> impl Iterator<Item = &Chunk> {
        self.chunks.values()
    }

    /// Chunks in all.
    #[must_use]
    pub fn len(&self) -> usize {
        self.chunks.len()
    }

    /// Whether there is no chunk.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.chunks.is_empty()
    }

    /// Chunks that somebody holds.
    #[must_use]
    pub fn held(&self) -> usize {
        self.held
    }

    /// The chunk of a name.
    #[must_use]
    pub fn named(&self, model: u64, name: Name) -> Option<&Chunk> {
        self.chunks.get(self.names.get(&(model, name))?)
    }

    /// One more holder.
    pub fn hold(&mut self, id: u64) {
        self.now += 1;
        if let Some(chunk) = self.chunks.get_mut(&id) {
            chunk.holders += 1;
            chunk.last_used = self.now;
            self.held += usize::from(chunk.holders == 1);
        }
    }

    /// One holder less. Chunks that nobody can find again leave the store at once, with their parents of the same kind.
    pub fn release(&mut self, id: u64) -> Vec<Removed> {
        self.now += 1;
        let Some(chunk) = self.chunks.get_mut(&id) else { return Vec::new() };
        assert!(chunk.holders > 0, "chunk {id} is released more often than held");
        chunk.holders -= 1;
        chunk.last_used = self.now;
        self.held -= usize::from(chunk.holders == 0);
        self.remove_unreachable(id)
    }

    /// Takes a chunk's name away: no Open finds it any more.
    pub fn quarantine(&mut self, id: u64) -> Vec<Removed> {
        let Some(chunk) = self.chunks.get_mut(&id) else { return Vec::new() };
        chunk.quarantined = true;
        if let Some(name) = chunk.record.name
            && self.names.get(&(chunk.record.model, name)) == Some(&id)
        {
            self.names.remove(&(chunk.record.model, name));
        }
        self.remove_unreachable(id)
    }

    /// Gives a chunk's name to somebody else, or takes it away.
    pub fn rename(&mut self, id: u64, name: Option<Name>) {
        let Some(chunk) = self.chunks.get_mut(&id) else { return };
        let model = chunk.record.model;
        let old = std::mem::replace(&mut chunk.record.name, name);
        if let Some(old) = old
            && self.names.get(&(model, old)) == Some(&id)
        {
            self.names.remove(&(model, old));
        }
        if let Some(name) = name {
            self.names.insert((model, name), id);
        }
    }

    fn remove_unreachable(&mut self, id: u64) -> Vec<Removed> {
        let mut removed = Vec::new();
        let mut next = Some(id);
        while let Some(id) = next {
            let Some(chunk) = self.chunks.get(&id) else { break };
            if chunk.holders > 0 || chunk.children > 0 || chunk.is_shareable() {
                break;
            }
            next = chunk.record.parent;
            removed.extend(self.remove(id));
        }
        removed
    }

    /// The unheld leaf of a model that was used least recently: the one to shed.
    #[must_use]
    pub fn least_recent_leaf(&self, model: u64) -> Option<u64> {
        let idle = |chunk: &&Chunk| chunk.record.model == model && chunk.holders == 0 && chunk.children == 0;
        self.chunks.values().filter(idle).min_by_key(|chunk| chunk.last_used).map(|chunk| chunk.record.id)
    }

    /// The reusable end of a model that was used least recently, unheld ones first.
    #[must_use]
    pub fn least_recent_end(&self, model: u64) -> Option<u64> {
        let ends = self.chunks.values().filter(|chunk| chunk.record.model == model && chunk.record.reusable_end);
        ends.min_by_key(|chunk| (chunk.holders > 0, chunk.last_used)).map(|chunk| chunk.record.id)
    }

    /// Removes every chunk of a model, whoever holds it; answers with their ids.
    pub fn remove_model(&mut self, model: u64) -> Vec<u64> {
        let of_model = self.chunks.values().filter(|chunk| chunk.record.model == model);
        let ids: Vec<u64> = of_model.map(|chunk| chunk.record.id).collect();
        for id in &ids {
            let chunk = self.chunks.remove(id);
            self.held -= usize::from(chunk.is_some_and(|chunk| chunk.holders > 0));
        }
        self.names.retain(|&(of, _), _| of != model);
        ids
    }

    /// Removes a leaf that nobody holds.
    pub fn remove(&mut self, id: u64) -> Option<Removed> {
        let chunk = self.chunks.get(&id)?;
        assert!(chunk.holders == 0 && chunk.children == 0, "chunk {id} is removed while it is needed");
        let chunk = self.chunks.remove(&id)?;
        let record = chunk.record;
        if let Some(name) = record.name
            && self.names.get(&(record.model, name)) == Some(&id)
        {
            self.names.remove(&(record.model, name));
        }
        if let Some(parent) = record.parent.and_then(|parent| self.chunks.get_mut(&parent)) {
            parent.children -= 1;
        }
        Some(Removed { id, slots: [record.selected, record.window] })
    }
}
