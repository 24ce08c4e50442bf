//! Sealed chunks: counted, named, and shed leaf-first when nobody holds them.
//!
//! The names form a hash chain, so the map from names to chunks is the prefix tree: walking a prompt's names walks down the tree.

use std::collections::HashMap;

use sluice_kernels::slot::SlotId;

use crate::engine::ends::{EndUse, Ends};
use crate::engine::idle::{IdleChunks, Idleness};
use crate::engine::name::Name;
use crate::journal::ChunkRecord;

/// A sealed chunk and who needs it.
#[derive(Debug)]
pub struct Chunk {
    /// What is journaled.
    pub record: ChunkRecord,
    /// Sequences that hold it, and slots of dropped paths that wait for a step to complete.
    holders: u32,
    /// Chunks whose parent it is.
    children: u32,
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
    /// Whether anybody holds it.
    #[must_use]
    pub fn is_held(&self) -> bool {
        self.holders > 0
    }

    fn idleness(&self) -> Option<Idleness> {
        (self.holders == 0).then_some(Idleness { is_leaf: self.children == 0, last_used: self.last_used })
    }

    fn end_use(&self) -> Option<EndUse> {
        self.record.reusable_end.then_some(EndUse { is_held: self.holders > 0, last_used: self.last_used })
    }

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
    idle: IdleChunks,
    ends: Ends,
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
        if let Some(parent) = record.parent {
            self.change(parent, |parent| parent.children += 1);
        }
        self.now += 1;
        let chunk = Chunk { record, holders: 0, children: 0, window_needs: 0, verified, quarantined: false, last_used: self.now };
        self.idle.change(record.model, record.id, None, chunk.idleness());
        self.ends.change(record.model, record.id, None, chunk.end_use());
        self.chunks.insert(record.id, chunk);
    }

    /// Changes what the indices of idle chunks and of reusable ends depend on.
    fn change<T>(&mut self, id: u64, change: impl FnOnce(&mut Chunk) -> T) -> Option<T> {
        let chunk = self.chunks.get_mut(&id)?;
        let (idleness, end_use) = (chunk.idleness(), chunk.end_use());
        let result = change(chunk);
        self.idle.change(chunk.record.model, id, idleness, chunk.idleness());
        self.ends.change(chunk.record.model, id, end_use, chunk.end_use());
        Some(result)
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
        let now = self.now;
        let first = self.change(id, |chunk| {
            chunk.holders += 1;
            chunk.last_used = now;
            chunk.holders == 1
        });
        self.held += usize::from(first == Some(true));
    }

    /// One holder less. Chunks that nobody can find again leave the store at once, with their parents of the same kind.
    pub fn release(&mut self, id: u64) -> Vec<Removed> {
        self.now += 1;
        let now = self.now;
        let last = self.change(id, |chunk| {
            assert!(chunk.holders > 0, "chunk {id} is released more often than held");
            chunk.holders -= 1;
            chunk.last_used = now;
            chunk.holders == 0
        });
        let Some(last) = last else { return Vec::new() };
        self.held -= usize::from(last);
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
        self.idle.least_recent_leaf(model)
    }

    /// Chunks of a model that nobody holds.
    #[must_use]
    pub fn idle(&self, model: u64) -> usize {
        self.idle.count(model)
    }

    /// The reusable end of a model that was used least recently, unheld ones first.
    #[must_use]
    pub fn least_recent_end(&self, model: u64) -> Option<u64> {
        self.ends.first(model)
    }

    /// Every reusable end, in no order.
    pub fn ends(&self) -> impl Iterator<Item = u64> {
        self.ends.iter()
    }

    /// Marks a chunk as a reusable end, or takes the mark away; answers with what to journal.
    pub fn set_end(&mut self, id: u64, reusable_end: bool) -> Option<ChunkRecord> {
        self.change(id, |chunk| {
            chunk.record.reusable_end = reusable_end;
            chunk.record
        })
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
        self.idle.forget_model(model);
        self.ends.forget_model(model);
        ids
    }

    /// Removes a leaf that nobody holds.
    pub fn remove(&mut self, id: u64) -> Option<Removed> {
        let chunk = self.chunks.get(&id)?;
        assert!(chunk.holders == 0 && chunk.children == 0, "chunk {id} is removed while it is needed");
        let chunk = self.chunks.remove(&id)?;
        let record = chunk.record;
        self.idle.change(record.model, id, chunk.idleness(), None);
        self.ends.change(record.model, id, chunk.end_use(), None);
        if let Some(name) = record.name
            && self.names.get(&(record.model, name)) == Some(&id)
        {
            self.names.remove(&(record.model, name));
        }
        if let Some(parent) = record.parent {
            self.change(parent, |parent| parent.children -= 1);
        }
        Some(Removed { id, slots: [record.selected, record.window] })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::engine::name::RootParts;

    fn record(id: u64, model: u64, parent: Option<u64>) -> ChunkRecord {
        let parts = RootParts { salt: &id.to_le_bytes(), namespace: "", model_digest: &[0; 32], extra_keys: &[] };
        let (name, selected, digest) = (Some(Name::root(&parts)), None, [0; 32]);
        ChunkRecord { id, model, index: 0, name, parent, fidelity: None, dense: true, selected, window: None, digest, reusable_end: false }
    }

    fn scanned_leaf(store: &ChunkStore, model: u64) -> Option<u64> {
        let leaves = store.iter().filter(|chunk| chunk.record.model == model && chunk.holders == 0 && chunk.children == 0);
        leaves.min_by_key(|chunk| chunk.last_used).map(|chunk| chunk.record.id)
    }

    fn scanned_end(store: &ChunkStore, model: u64) -> Option<u64> {
        let ends = store.iter().filter(|chunk| chunk.record.model == model && chunk.record.reusable_end);
        ends.min_by_key(|chunk| (chunk.holders > 0, chunk.last_used)).map(|chunk| chunk.record.id)
    }

    proptest! {
        #[test]
        fn idle_chunks_and_ends_are_those_that_a_scan_finds(steps in prop::collection::vec((0u8..8, any::<prop::sample::Index>()), 1..200)) {
            let mut store = ChunkStore::default();
            for (id, (step, pick)) in steps.into_iter().enumerate() {
                let id = id as u64;
                let mut known: Vec<u64> = store.iter().map(|chunk| chunk.record.id).collect();
                known.sort_unstable();
                let picked = (!known.is_empty()).then(|| known[pick.index(known.len())]);
                let chunk = picked.and_then(|id| store.get(id));
                let (model, held) = (chunk.map_or(id % 2, |chunk| chunk.record.model), chunk.is_some_and(Chunk::is_held));
                match (step, picked) {
                    (0, parent) => store.add(ChunkRecord { reusable_end: id.is_multiple_of(3), ..record(id, model, parent) }, true),
                    (1, _) => store.add(record(id, id % 2, None), true),
                    (2, Some(picked)) => store.hold(picked),
                    (3, Some(picked)) if held => {
                        store.release(picked);
                    }
                    (4, Some(picked)) => {
                        store.quarantine(picked);
                    }
                    (5, _) => {
                        if let Some(leaf) = store.least_recent_leaf(id % 2) {
                            store.remove(leaf);
                        } else {
                            store.remove_model(id % 2);
                        }
                    }
                    (6 | 7, Some(picked)) => {
                        let marked = store.set_end(picked, step == 6).expect("a chunk of the store");
                        prop_assert_eq!((marked.id, marked.reusable_end), (picked, step == 6));
                    }
                    _ => {}
                }
                let mut ends: Vec<u64> = store.ends().collect();
                ends.sort_unstable();
                let mut scanned: Vec<u64> = store.iter().filter(|chunk| chunk.record.reusable_end).map(|chunk| chunk.record.id).collect();
                scanned.sort_unstable();
                prop_assert_eq!(ends, scanned);
                for model in 0..2 {
                    prop_assert_eq!(store.least_recent_end(model), scanned_end(&store, model));
                    prop_assert_eq!(store.least_recent_leaf(model), scanned_leaf(&store, model));
                    let idle = store.iter().filter(|chunk| chunk.record.model == model && !chunk.is_held()).count();
                    prop_assert_eq!(store.idle(model), idle);
                }
            }
        }
    }
}
