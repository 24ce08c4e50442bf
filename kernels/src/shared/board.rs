//! The board of a sequence: what the daemon tells its holder, one page of words and two slot tables.
//!
//! Order of publication: table words first, then `sealed_chunks` with release; a holder loads `sealed_chunks` with acquire and then
//! reads the words below it.

use std::fs::File;
use std::sync::atomic::Ordering::{Acquire, Relaxed, Release};

use crate::bound::Bound;
use crate::shared::mapping::{Mapping, PAGE_BYTES, page_align};
use crate::shared::{LAYOUT_VERSION, SharedError};
use crate::slot::{SlotClass, SlotId};

const MAGIC: u64 = 0x736c_7569_6365_4231;
const WORD_MAGIC: usize = 0;
const WORD_VERSION: usize = 1;
const WORD_BOOT_EPOCH: usize = 2;
const WORD_GENERATION: usize = 3;
const WORD_STATE: usize = 4;
const WORD_SEALED_CHUNKS: usize = 5;
const WORD_LABEL_SET: usize = 6;
const WORD_TABLE_CHUNKS: usize = 7;
const WORD_TRUNCATIONS: usize = 8;
const TABLE_FIRST_WORD: usize = PAGE_BYTES as usize / 8;

/// What the daemon says about the lease.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BoardState {
    /// The lease is good.
    Live,
    /// Rows were found that cannot be stored; the sequence can only be closed.
    Poisoned,
    /// The lease has ended.
    Closed,
}

/// The board of one sequence, mapped.
#[derive(Debug)]
pub struct Board {
    words: Mapping,
    table_chunks: u32,
}

impl Board {
    /// Bytes of a board file for sequences of at most `table_chunks` chunks.
    #[must_use]
    pub fn file_bytes(table_chunks: u32) -> u64 {
        PAGE_BYTES + page_align(2 * 8 * u64::from(table_chunks))
    }

    /// Initialises a new, zeroed board file. Daemon only.
    ///
    /// # Errors
    /// The file cannot be mapped.
    pub fn create(file: &File, table_chunks: u32) -> Result<Self, SharedError> {
        let words = Mapping::writable("board", file, Self::file_bytes(table_chunks))?;
        words.word(WORD_TABLE_CHUNKS).store(u64::from(table_chunks), Relaxed);
        words.word(WORD_VERSION).store(u64::from(LAYOUT_VERSION), Relaxed);
        words.word(WORD_MAGIC).store(MAGIC, Release);
        Ok(Self { words, table_chunks })
    }

    /// Maps an existing board: the daemon after a restart (`writable`), or a holder.
    ///
    /// # Errors
    /// Another version's board, or a file too short for its table.
    pub fn map(file: &File, access: crate::shared::segment::Access) -> Result<Self, SharedError> {
        let header = Mapping::read_only("board", file, PAGE_BYTES)?;
        let (magic, version) = (header.word(WORD_MAGIC).load(Acquire), header.word(WORD_VERSION).load(Relaxed));
        if magic != MAGIC || version != u64::from(LAYOUT_VERSION) {
            let (expected_magic, expected_version) = (MAGIC, u64::from(LAYOUT_VERSION));
            return Err(SharedError::Layout { what: "board", magic, version, expected_magic, expected_version });
        }
        let chunks = header.word(WORD_TABLE_CHUNKS).load(Relaxed);
        let table_chunks = u32::try_from(chunks).ok().filter(|&count| count > 0 && count <= 1 << 24);
        let table_chunks = table_chunks.ok_or(Bound { field: "board.table_chunks", value: chunks, low: 1, high: 1 << 24 })?;
        let words = match access {
            crate::shared::segment::Access::ReadOnly => Mapping::read_only("board", file, Self::file_bytes(table_chunks))?,
            crate::shared::segment::Access::Writable => Mapping::writable("board", file, Self::file_bytes(table_chunks))?,
        };
        Ok(Self { words, table_chunks })
    }

    /// Entries of each slot table.
    #[must_use]
    pub fn table_chunks(&self) -> u32 {
        self.table_chunks
    }

    /// Boot epoch of the daemon that wrote last.
    #[must_use]
    pub fn boot_epoch(&self) -> u64 {
        self.words.word(WORD_BOOT_EPOCH).load(Acquire)
    }

    /// Generation of the lease in force.
    #[must_use]
    pub fn generation(&self) -> u64 {
        self.words.word(WORD_GENERATION).load(Acquire)
    }

    /// State of the lease.
    #[must_use]
    pub fn state(&self) -> BoardState {
        match self.words.word(WORD_STATE).load(Acquire) {
            0 => BoardState::Live,
            1 => BoardState::Poisoned,
            _ => BoardState::Closed,
        }
    }

    /// Chunks whose rows are in the arena.
    #[must_use]
    pub fn sealed_chunks(&self) -> usize {
        (self.words.word(WORD_SEALED_CHUNKS).load(Acquire) as usize).min(self.table_chunks as usize)
    }

    /// How often the sequence has been truncated: workers that share it see by it that a truncation was carried out.
    #[must_use]
    pub fn truncations(&self) -> u64 {
        self.words.word(WORD_TRUNCATIONS).load(Acquire)
    }

    /// Label set of all sealed chunks; `None` until a calibration is set.
    #[must_use]
    pub fn label_set(&self) -> Option<u64> {
        Some(self.words.word(WORD_LABEL_SET).load(Acquire)).filter(|&set| set != 0)
    }

    /// The slot of a chunk below [`Board::sealed_chunks`]; `None` when the class has none (any more).
    #[must_use]
    pub fn slot(&self, class: SlotClass, chunk: usize) -> Option<SlotId> {
        SlotId::from_word(self.words.word(self.table_word(class, chunk)).load(Acquire))
    }

    /// Writes the slot of a chunk. Daemon only.
    pub fn set_slot(&self, class: SlotClass, chunk: usize, slot: Option<SlotId>) {
        self.words.word(self.table_word(class, chunk)).store(slot.map_or(0, SlotId::to_word), Release);
    }

    /// Publishes the number of sealed chunks, after their table words. Daemon only.
    pub fn set_sealed_chunks(&self, chunks: usize) {
        assert!(chunks <= self.table_chunks as usize, "{chunks} chunks on a board of {}", self.table_chunks);
        self.words.word(WORD_SEALED_CHUNKS).store(chunks as u64, Release);
    }

    /// Publishes the number of truncations, after what they have changed. Daemon only.
    pub fn set_truncations(&self, truncations: u64) {
        self.words.word(WORD_TRUNCATIONS).store(truncations, Release);
    }

    /// Publishes the label set, after the labels of every sealed chunk. Daemon only.
    pub fn set_label_set(&self, label_set: Option<u64>) {
        self.words.word(WORD_LABEL_SET).store(label_set.unwrap_or(0), Release);
    }

    /// Publishes epoch, generation and state. Daemon only.
    pub fn set_lease(&self, boot_epoch: u64, generation: u64, state: BoardState) {
        self.words.word(WORD_BOOT_EPOCH).store(boot_epoch, Release);
        self.words.word(WORD_GENERATION).store(generation, Release);
        let state = match state {
            BoardState::Live => 0,
            BoardState::Poisoned => 1,
            BoardState::Closed => 2,
        };
        self.words.word(WORD_STATE).store(state, Release);
    }

    fn table_word(&self, class: SlotClass, chunk: usize) -> usize {
        assert!(chunk < self.table_chunks as usize, "chunk {chunk} on a board of {}", self.table_chunks);
        let table = match class {
            SlotClass::Selected => 0,
            SlotClass::Window => self.table_chunks as usize,
        };
        TABLE_FIRST_WORD + table + chunk
    }
}
