//! A sequence as the engine sees it: a path of chunks, open slots, a board and perhaps a lease.

use std::ops::Range;
use std::sync::Arc;
use std::time::Instant;

use sluice_kernels::shared::board::{Board, BoardState};
use sluice_kernels::shared::open::{MAX_WRITERS, OpenFile, OpenWords};
use sluice_kernels::slot::CHUNK_TOKENS;

use crate::engine::lease::Process;
use crate::journal::SequenceRecord;

/// Who writes a sequence.
#[derive(Debug)]
pub struct Lease {
    /// Processes; the lease ends when all of them are dead. Empty for a client without a local process.
    pub processes: Vec<Process>,
    /// When it was used last; decides over leases without a process only.
    pub last_used: Instant,
    /// Whether the daemon's decoder has it.
    pub streamed: bool,
}

/// Why a full chunk is not sealed, and will not be by waiting.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stall {
    /// No slot of the arena is free.
    Space,
    /// Some lanes have no worker.
    Writers,
}

/// A held or parked sequence.
#[derive(Debug)]
pub struct SequenceState {
    /// What is journaled.
    pub record: SequenceRecord,
    /// Sealed chunks.
    pub path: Vec<u64>,
    /// Where chunks grow.
    pub open: Arc<OpenFile>,
    /// Bytes of that file.
    pub open_bytes: u64,
    /// What the holder is told.
    pub board: Board,
    /// The lease; `None` while parked.
    pub lease: Option<Lease>,
    /// Committed tokens as last read, bounded by what the open slots can hold.
    pub committed: u64,
    /// Raised by every truncation.
    pub seal_epoch: u64,
    /// Whether a seal job is on its way.
    pub sealing: bool,
    /// Why the next full chunk is not sealed.
    pub stall: Option<Stall>,
    /// Lanes of each layer, where all layers have the same number.
    pub lanes: u32,
    /// First chunk whose window rows this sequence needs.
    pub window_from: usize,
    /// Entries of the path that the board shows.
    pub published: usize,
    /// When the header is read next.
    pub next_poll: Instant,
    /// How many polls in a row found nothing new.
    pub quiet_polls: u32,
}

impl SequenceState {
    /// Id.
    #[must_use]
    pub fn id(&self) -> u64 {
        self.record.id
    }

    /// Whether a live lease holds it.
    #[must_use]
    pub fn is_held(&self) -> bool {
        self.lease.is_some()
    }

    /// Tokens whose rows are in the arena.
    #[must_use]
    pub fn sealed_tokens(&self) -> u64 {
        (self.path.len() * CHUNK_TOKENS) as u64
    }

    /// Tokens for which there is room before a chunk must be sealed.
    #[must_use]
    pub fn capacity_tokens(&self) -> u64 {
        let chunks = (self.path.len() + self.record.open_slots as usize).min(self.board.table_chunks() as usize);
        (chunks * CHUNK_TOKENS) as u64
    }

    /// Writers that commit.
    #[must_use]
    pub fn writer_count(&self) -> usize {
        self.record.writers.len().max(1)
    }

    /// The first lanes that no worker has attached for; `None` when every lane has its writer.
    #[must_use]
    pub fn unwritten_lanes(&self) -> Option<Range<u32>> {
        if self.record.writers.is_empty() {
            return None;
        }
        let mut ranges = self.record.writers.clone();
        ranges.sort_unstable();
        let mut next = 0;
        for (first, count) in ranges {
            if first > next {
                return Some(next..first);
            }
            next = first + count;
        }
        (next < self.lanes).then_some(next..self.lanes)
    }

    /// Tokens that every writer has committed, out of untrusted words: `Err` with the word that cannot be true. A word that no writer has taken
    /// yet stands for the lanes without one: it holds what was whole when the lease began.
    pub fn committed_of(&self, words: &OpenWords) -> Result<u64, u64> {
        let missing = usize::from(self.unwritten_lanes().is_some());
        let counted = (self.writer_count() + missing).min(MAX_WRITERS);
        let committed = words.committed[..counted].iter().copied().min().unwrap_or(0);
        if committed > self.capacity_tokens() { Err(committed) } else { Ok(committed) }
    }

    /// What the board says about the lease.
    #[must_use]
    pub fn board_state(&self) -> BoardState {
        match (&self.lease, self.record.poisoned) {
            (_, true) => BoardState::Poisoned,
            (Some(_), false) => BoardState::Live,
            (None, false) => BoardState::Closed,
        }
    }
}
