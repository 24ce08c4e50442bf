//! Checksums of chunks are compared once after a restart, before a chunk is served to anybody new.

use crate::engine::error::EngineError;
use crate::engine::state::Engine;
use crate::seal::{Job, VerifyJob};

impl Engine {
    /// Chunks of a path that were not checked since the daemon started.
    pub(crate) fn unverified(&self, path: &[u64]) -> Vec<u64> {
        path.iter().copied().filter(|&id| self.chunks.get(id).is_some_and(|chunk| !chunk.verified)).collect()
    }

    /// Has chunks checked; answers with the chunks to wait for.
    pub(crate) fn verify(&mut self, chunks: Vec<u64>) -> Result<Vec<u64>, EngineError> {
        for &id in &chunks {
            if self.verifying.contains(&id) {
                continue;
            }
            let Some(record) = self.chunks.get(id).map(|chunk| chunk.record) else { continue };
            let sums = self.journal.sums(id)?;
            let place = |slot: Option<_>| slot.and_then(|slot| self.arena.place(slot));
            let job = VerifyJob { chunk: id, selected: place(record.selected), window: place(record.window), sums };
            // Held while it is read, so that its slots are not given away under the reader.
            self.chunks.hold(id);
            self.need_window(id);
            self.verifying.insert(id);
            self.planned.push_back(Job::Verify(job));
        }
        Ok(chunks)
    }

    /// A chunk was checked.
    pub(crate) fn verified(&mut self, id: u64, intact: bool) {
        self.verifying.remove(&id);
        let Some(chunk) = self.chunks.get_mut(id) else { return };
        chunk.verified = true;
        let index = chunk.record.index as usize;
        if !intact {
            tracing::error!(chunk = id, "rows do not match their checksums: quarantined");
            self.counters.quarantined_chunks.add(1);
            self.clear_end(id);
            self.cut_paths_at(id, index);
            let removed = self.chunks.quarantine(id);
            self.removed(removed);
        }
        self.unneed_window(id);
        self.release_chunk(id);
    }

    /// Ends every path before a chunk whose rows are damaged: parked sequences fall back, held ones must not go on.
    fn cut_paths_at(&mut self, chunk: u64, index: usize) {
        for (sequence, _) in self.holders_of(chunk, index) {
            if self.sequences.get(&sequence).is_some_and(|sequence| sequence.is_held()) {
                self.poison(sequence, "a chunk of its path does not match its checksums");
                continue;
            }
            let Some(state) = self.sequences.get(&sequence) else { continue };
            let end = self.usable_end(state.record.model, &state.path[..index]);
            self.cut_parked(sequence, end);
        }
    }
}
