//! Window rows: kept near growing and reusable ends only.
//!
//! Every end needs the window slots of the chunks that its window reaches; a chunk counts the ends that need it and gives its window slot
//! up when the count falls to zero. Ends are the growing end of each sequence and chunks marked as reusable ends: the last full chunk of
//! an Open's prompt, of a Close and of a fork.

use sluice_kernels::slot::{CHUNK_TOKENS, SlotClass};

use crate::engine::error::EngineError;
use crate::engine::state::Engine;
use crate::journal::Edit;

impl Engine {
    /// One more end needs a chunk's window rows.
    pub(crate) fn need_window(&mut self, chunk: u64) {
        if let Some(chunk) = self.chunks.get_mut(chunk) {
            chunk.window_needs += 1;
        }
    }

    /// One end less.
    pub(crate) fn unneed_window(&mut self, id: u64) {
        let Some(chunk) = self.chunks.get_mut(id) else { return };
        assert!(chunk.window_needs > 0, "window rows of chunk {id} are given up more often than needed");
        chunk.window_needs -= 1;
        if chunk.window_needs > 0 {
            return;
        }
        let Some(slot) = chunk.record.window.take() else { return };
        let record = chunk.record;
        self.edits.push(Edit::Chunk(record));
        let index = record.index as usize;
        let readers = self.holders_of(id, index);
        self.window_words.extend(readers.iter().map(|&(sequence, _)| (sequence, index)));
        self.retire_slot(slot, readers);
    }

    /// Chunks from `id` upwards that an end behind it needs, newest first.
    fn window_of_end(&self, id: u64) -> Vec<u64> {
        let Some(chunk) = self.chunks.get(id) else { return Vec::new() };
        let Some(model) = self.models.get(&chunk.record.model) else { return Vec::new() };
        let end = chunk.record.index as usize + 1;
        let count = end - model.window_floor(end * CHUNK_TOKENS);
        let mut chunks = vec![id];
        while chunks.len() < count {
            let parent = chunks.last().and_then(|&id| self.chunks.get(id)).and_then(|chunk| chunk.record.parent);
            match parent {
                Some(parent) => chunks.push(parent),
                None => break,
            }
        }
        chunks.truncate(count);
        chunks
    }

    /// Marks a chunk as a reusable end, if all window rows it needs are there.
    pub(crate) fn mark_end(&mut self, id: u64) {
        let Some(chunk) = self.chunks.get(id) else { return };
        let windowed = self.models.get(&chunk.record.model).is_some_and(|model| model.has(SlotClass::Window));
        if !windowed || chunk.record.reusable_end || !chunk.is_shareable() {
            return;
        }
        let needed = self.window_of_end(id);
        if needed.iter().any(|&id| self.chunks.get(id).is_none_or(|chunk| chunk.record.window.is_none())) {
            return;
        }
        self.set_end(id, true);
        for id in needed {
            self.need_window(id);
        }
    }

    /// Takes a mark away.
    pub(crate) fn clear_end(&mut self, id: u64) {
        if self.chunks.get(id).is_some_and(|chunk| chunk.record.reusable_end) {
            let needed = self.window_of_end(id);
            self.set_end(id, false);
            for id in needed {
                self.unneed_window(id);
            }
        }
    }

    fn set_end(&mut self, id: u64, reusable_end: bool) {
        self.edits.extend(self.chunks.set_end(id, reusable_end).map(Edit::Chunk));
    }

    /// Counts the needs of reusable ends after a restart.
    pub(crate) fn recount_ends(&mut self) {
        let ends: Vec<u64> = self.chunks.ends().collect();
        for end in ends {
            for id in self.window_of_end(end) {
                self.need_window(id);
            }
        }
    }

    /// Gives up window rows that a sequence's growing end has passed. Rows are kept for a whole run of open slots behind the committed
    /// tokens: a run that was just committed may still be attended from its first query on.
    pub(crate) fn advance_window(&mut self, id: u64) {
        let Some(sequence) = self.sequences.get_mut(&id) else { return };
        let Some(model) = self.models.get(&sequence.record.model) else { return };
        let run = sequence.record.open_slots as usize * CHUNK_TOKENS;
        let floor = model.window_floor((sequence.committed as usize).saturating_sub(run)).min(sequence.path.len());
        let passed = sequence.path[sequence.window_from.min(floor)..floor].to_vec();
        sequence.window_from = sequence.window_from.max(floor);
        for chunk in passed {
            self.unneed_window(chunk);
        }
    }

    /// Whether all window rows that a query at `position` and later needs are there; `path` are the chunks before and around it.
    fn window_ready(&self, model: u64, path: &[u64], position: usize) -> bool {
        let Some(model) = self.models.get(&model).filter(|model| model.has(SlotClass::Window)) else { return true };
        let needed = model.window_floor(position)..position.div_ceil(CHUNK_TOKENS).min(path.len());
        path.get(needed)
            .is_none_or(|chunks| chunks.iter().all(|&id| self.chunks.get(id).is_some_and(|chunk| chunk.record.window.is_some())))
    }

    /// The longest end of a matched path, in chunks, whose window rows are there.
    pub(crate) fn usable_end(&self, model: u64, path: &[u64]) -> usize {
        (0..=path.len()).rev().find(|&end| self.window_ready(model, &path[..end], end * CHUNK_TOKENS)).unwrap_or(0)
    }

    /// Checks that a sequence can go on at `position`.
    pub(crate) fn check_window(&self, model: u64, path: &[u64], position: u64, committed: u64) -> Result<(), EngineError> {
        let ready = |position: u64| self.window_ready(model, path, position as usize);
        if ready(position) {
            return Ok(());
        }
        let step = CHUNK_TOKENS as u64;
        let below = (0..position.div_ceil(step)).rev().map(|chunk| chunk * step).find(|&below| ready(below)).unwrap_or(0);
        let first_above = (position / step + 1) * step;
        let above = (first_above..committed).step_by(CHUNK_TOKENS).find(|&above| ready(above)).unwrap_or(committed);
        Err(EngineError::WindowGone { position, below, above })
    }

    /// Makes a sequence need the window rows of its path again, from what a query at `position` needs.
    pub(crate) fn need_windows_from(&mut self, id: u64, position: u64) {
        let Some(sequence) = self.sequences.get_mut(&id) else { return };
        let Some(model) = self.models.get(&sequence.record.model) else { return };
        sequence.window_from = model.window_floor(position as usize).min(sequence.path.len());
        let needed = sequence.path[sequence.window_from..].to_vec();
        for chunk in needed {
            self.need_window(chunk);
        }
    }

    /// Gives up the window needs of a sequence's growing end.
    pub(crate) fn unneed_windows(&mut self, id: u64) {
        let Some(sequence) = self.sequences.get_mut(&id) else { return };
        let needed = sequence.path[sequence.window_from.min(sequence.path.len())..].to_vec();
        sequence.window_from = sequence.path.len();
        for chunk in needed {
            self.unneed_window(chunk);
        }
    }
}
