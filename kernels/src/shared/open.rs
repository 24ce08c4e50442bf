//! Open slots: one file per sequence, where its chunks grow until they are sealed. Chunk c grows in slot `c % slots`.
//!
//! ```text
//! page 0      words: magic, version, slots, -; committed, started, completed of up to 8 writers (8 words each)
//! records     eight of 64 bytes per slot, one a writer: chunk index + 1, fidelity (32 bytes)
//! tokens      256 token ids (u32) per slot
//! opaque      two buffers of a page: length, sequence number, XXH3, bytes
//! planes      slots in layer-major order: selected class, then window class
//! ```
//! Writers are the workers of one sequence (lane ranges). Each writes the rows of its lanes, its records and its words; writer 0 writes tokens
//! and opaque state.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::Ordering::{Acquire, Relaxed, Release, SeqCst};
use std::sync::atomic::fence;

use xxhash_rust::xxh3::xxh3_64;

use crate::bound::Bound;
use crate::layout::{ClassLayout, Plane};
use crate::shape::ModelShape;
use crate::shared::mapping::{Mapping, PAGE_BYTES, page_align};
use crate::shared::record::RECORD_BYTES;
use crate::shared::{LAYOUT_VERSION, SharedError};
use crate::slot::{CHUNK_TOKENS, SlotClass};

pub use crate::shared::record::{Fidelity, SlotRecord};

/// Most workers that share one sequence.
pub const MAX_WRITERS: usize = 8;
/// Most open slots of a sequence.
pub const MAX_OPEN_SLOTS: u32 = 4096;
/// Most bytes of opaque state.
pub const MAX_OPAQUE_BYTES: usize = PAGE_BYTES as usize - 24;

const MAGIC: u64 = 0x736c_7569_6365_4f31;
const WORD_MAGIC: usize = 0;
const WORD_VERSION: usize = 1;
const WORD_SLOTS: usize = 2;
const WORD_COMMITTED: usize = 8;
const WORD_STARTED: usize = 16;
const WORD_COMPLETED: usize = 24;
const HEADER_WORDS: usize = 32;
const TOKENS_BYTES: u64 = (CHUNK_TOKENS * 4) as u64;

/// Where everything lies in a file of open slots.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OpenLayout {
    /// Slots of each class.
    pub slots: u32,
    selected: Arc<ClassLayout>,
    window: Arc<ClassLayout>,
    tokens_at: u64,
    opaque_at: u64,
    selected_at: u64,
    window_at: u64,
    file_bytes: u64,
}

impl OpenLayout {
    /// The layout of `slots` open slots for a model.
    ///
    /// # Errors
    /// `slots` outside 2 to [`MAX_OPEN_SLOTS`].
    pub fn new(shape: &ModelShape, slots: u32) -> Result<Self, SharedError> {
        if !(2..=MAX_OPEN_SLOTS).contains(&slots) {
            return Err(Bound { field: "open_slots", value: slots.into(), low: 2, high: MAX_OPEN_SLOTS.into() }.into());
        }
        let selected = Arc::new(ClassLayout::new(shape, SlotClass::Selected));
        let window = Arc::new(ClassLayout::new(shape, SlotClass::Window));
        let count = u64::from(slots);
        let tokens_at = page_align(PAGE_BYTES + count * (MAX_WRITERS * RECORD_BYTES) as u64);
        let opaque_at = page_align(tokens_at + count * TOKENS_BYTES);
        let selected_at = opaque_at + 2 * PAGE_BYTES;
        let window_at = page_align(selected_at + selected.segment_bytes(slots));
        let file_bytes = page_align(window_at + window.segment_bytes(slots));
        Ok(Self { slots, selected, window, tokens_at, opaque_at, selected_at, window_at, file_bytes })
    }

    /// Bytes of the file.
    #[must_use]
    pub fn file_bytes(&self) -> u64 {
        self.file_bytes
    }

    /// The planes of a class.
    #[must_use]
    pub fn class(&self, class: SlotClass) -> &Arc<ClassLayout> {
        match class {
            SlotClass::Selected => &self.selected,
            SlotClass::Window => &self.window,
        }
    }

    /// The slot in which a chunk grows.
    #[must_use]
    pub fn slot_of(&self, chunk: usize) -> u32 {
        (chunk % self.slots as usize) as u32
    }

    /// Where row `token` of `lane` of (plane, slot) lies in the file.
    fn row_at(&self, class: SlotClass, plane: &Plane, slot: u32, lane: usize, token: usize) -> u64 {
        let row = (lane * CHUNK_TOKENS + token) as u64 * u64::from(plane.row_bytes);
        self.page_at(class, plane, slot) + row
    }

    /// Where the page of (plane, slot) lies in the file.
    pub(crate) fn page_at(&self, class: SlotClass, plane: &Plane, slot: u32) -> u64 {
        let first = match class {
            SlotClass::Selected => self.selected_at,
            SlotClass::Window => self.window_at,
        };
        first + ClassLayout::page_offset(plane, self.slots, slot)
    }

    fn record_at(&self, slot: u32, writer: usize) -> u64 {
        PAGE_BYTES + (u64::from(slot) * MAX_WRITERS as u64 + writer as u64) * RECORD_BYTES as u64
    }

    fn tokens_at(&self, slot: u32) -> u64 {
        self.tokens_at + u64::from(slot) * TOKENS_BYTES
    }
}

/// The words of the header as the daemon read them in one `pread`: never trusted, only compared and bounded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OpenWords {
    /// Tokens committed in all layers, by writer.
    pub committed: [u64; MAX_WRITERS],
    /// Steps begun, by writer.
    pub started: [u64; MAX_WRITERS],
    /// Steps finished, by writer.
    pub completed: [u64; MAX_WRITERS],
}

/// A holder's open slots, mapped writable.
#[derive(Debug)]
pub struct OpenSlots {
    mapping: Mapping,
    layout: OpenLayout,
    writer: usize,
}

impl OpenSlots {
    /// Maps the file of open slots as writer `writer`.
    ///
    /// # Errors
    /// Another version's file, a file too short, or a writer index out of bounds.
    pub fn map(file: &File, layout: OpenLayout, writer: usize) -> Result<Self, SharedError> {
        if writer >= MAX_WRITERS {
            return Err(Bound { field: "writer", value: writer as u64, low: 0, high: MAX_WRITERS as u64 - 1 }.into());
        }
        let mapping = Mapping::writable("open slots", file, layout.file_bytes())?;
        let (magic, version) = (mapping.word(WORD_MAGIC).load(Acquire), mapping.word(WORD_VERSION).load(Relaxed));
        if magic != MAGIC || version != u64::from(LAYOUT_VERSION) {
            let (expected_magic, expected_version) = (MAGIC, u64::from(LAYOUT_VERSION));
            return Err(SharedError::Layout { what: "open slots", magic, version, expected_magic, expected_version });
        }
        Ok(Self { mapping, layout, writer })
    }

    /// Where things lie.
    #[must_use]
    pub fn layout(&self) -> &OpenLayout {
        &self.layout
    }

    /// First byte and length of the mapping, to register with a device.
    pub(crate) fn memory(&self) -> (*const u8, usize) {
        (self.mapping.address(), self.mapping.len())
    }

    /// Tokens this writer has committed.
    #[must_use]
    pub fn committed(&self) -> u64 {
        self.mapping.word(WORD_COMMITTED + self.writer).load(Acquire)
    }

    /// Publishes committed tokens, after their rows and token ids.
    pub fn set_committed(&self, tokens: u64) {
        self.mapping.word(WORD_COMMITTED + self.writer).store(tokens, Release);
    }

    /// Marks the begin of a step: slots that it reads are not reused before [`OpenSlots::complete_step`].
    pub fn start_step(&self) {
        let word = self.mapping.word(WORD_STARTED + self.writer);
        word.store(word.load(Relaxed) + 1, Release);
        // The daemon clears a table word and then reads the started word; this side stores it and then reads the table. Without the fence
        // both could miss the other, and a slot in use would be given away.
        fence(SeqCst);
    }

    /// Marks the end of the step begun last.
    pub fn complete_step(&self) {
        let started = self.mapping.word(WORD_STARTED + self.writer).load(Relaxed);
        self.mapping.word(WORD_COMPLETED + self.writer).store(started, Release);
    }

    /// Writes rows of consecutive tokens of one lane.
    pub fn write_rows(&self, class: SlotClass, plane: &Plane, slot: u32, lane: usize, token: usize, rows: &[u8]) {
        let row_bytes = plane.row_bytes as usize;
        assert!(rows.len().is_multiple_of(row_bytes) && token + rows.len() / row_bytes <= CHUNK_TOKENS && lane < usize::from(plane.lanes));
        self.mapping.write(self.layout.row_at(class, plane, slot, lane, token) as usize, rows);
    }

    /// The page of (plane, slot): rows that this holder wrote itself.
    #[must_use]
    #[inline]
    pub fn page(&self, class: SlotClass, plane: &Plane, slot: u32) -> &[u8] {
        assert!(slot < self.layout.slots, "open slot {slot} of {}", self.layout.slots);
        let first = self.layout.page_at(class, plane, slot) as usize;
        self.mapping.bytes(first..first + plane.page_bytes as usize)
    }

    /// Writes token ids of consecutive tokens.
    pub fn write_tokens(&self, slot: u32, token: usize, ids: &[u32]) {
        assert!(slot < self.layout.slots && token + ids.len() <= CHUNK_TOKENS, "{} token ids at {token} of slot {slot}", ids.len());
        self.mapping.write(self.layout.tokens_at(slot) as usize + token * 4, bytemuck::cast_slice(ids));
    }

    /// This writer's index.
    #[must_use]
    pub fn writer(&self) -> usize {
        self.writer
    }

    /// Writes this writer's record of a slot.
    pub fn write_record(&self, slot: u32, record: SlotRecord) {
        assert!(slot < self.layout.slots, "open slot {slot} of {}", self.layout.slots);
        self.mapping.write(self.layout.record_at(slot, self.writer) as usize, &record.to_bytes());
    }

    /// This writer's record of a slot.
    #[must_use]
    pub fn record(&self, slot: u32) -> SlotRecord {
        assert!(slot < self.layout.slots, "open slot {slot} of {}", self.layout.slots);
        let first = self.layout.record_at(slot, self.writer) as usize;
        SlotRecord::from_bytes(self.mapping.bytes(first..first + RECORD_BYTES))
    }

    /// Stores state for whoever resumes the sequence; the older of the two buffers is overwritten, so a kill leaves one whole.
    ///
    /// # Errors
    /// More than [`MAX_OPAQUE_BYTES`].
    pub fn store_opaque(&self, state: &[u8]) -> Result<(), SharedError> {
        if state.len() > MAX_OPAQUE_BYTES {
            return Err(Bound { field: "opaque_state", value: state.len() as u64, low: 0, high: MAX_OPAQUE_BYTES as u64 }.into());
        }
        let buffer_at = |which: u64| (self.layout.opaque_at + which * PAGE_BYTES) as usize;
        let number = |which: u64| self.mapping.word(buffer_at(which) / 8 + 1).load(Acquire);
        let newest = number(0).max(number(1));
        let target = if number(0) <= number(1) { 0 } else { 1 };
        let first = buffer_at(target);
        self.mapping.word(first / 8 + 1).store(0, Release);
        self.mapping.write(first + 24, state);
        self.mapping.word(first / 8).store(state.len() as u64, Relaxed);
        self.mapping.word(first / 8 + 2).store(xxh3_64(state), Relaxed);
        self.mapping.word(first / 8 + 1).store(newest + 1, Release);
        Ok(())
    }
}

/// The daemon's side of a file of open slots: `pread` and `pwrite` only.
#[derive(Debug)]
pub struct OpenFile {
    file: File,
    layout: OpenLayout,
}

impl OpenFile {
    /// Initialises a new, zeroed file.
    ///
    /// # Errors
    /// It cannot be written.
    pub fn create(file: File, layout: OpenLayout) -> Result<Self, SharedError> {
        let open = Self { file, layout };
        let words = [MAGIC, u64::from(LAYOUT_VERSION), u64::from(open.layout.slots)];
        debug_assert_eq!((WORD_MAGIC, WORD_VERSION, WORD_SLOTS), (0, 1, 2));
        open.write(0, bytemuck::cast_slice(&words))?;
        Ok(open)
    }

    /// Takes up an existing file after a restart.
    #[must_use]
    pub fn reopen(file: File, layout: OpenLayout) -> Self {
        Self { file, layout }
    }

    /// The file, to hand to a holder or to map for a stream sequence.
    #[must_use]
    pub fn file(&self) -> &File {
        &self.file
    }

    /// Where things lie.
    #[must_use]
    pub fn layout(&self) -> &OpenLayout {
        &self.layout
    }

    /// Reads the words of all writers.
    ///
    /// # Errors
    /// The holder has cut the file short, or it cannot be read.
    pub fn words(&self) -> Result<OpenWords, SharedError> {
        let mut words = [0u64; HEADER_WORDS];
        self.read(0, bytemuck::cast_slice_mut(&mut words))?;
        let eight = |first: usize| std::array::from_fn(|index| words[first + index]);
        Ok(OpenWords { committed: eight(WORD_COMMITTED), started: eight(WORD_STARTED), completed: eight(WORD_COMPLETED) })
    }

    /// Sets the committed tokens of every writer: after a fork, a truncation or a recovery, while no worker is attached or it waits.
    ///
    /// # Errors
    /// It cannot be written.
    pub fn set_committed(&self, tokens: u64) -> Result<(), SharedError> {
        self.write(WORD_COMMITTED as u64 * 8, bytemuck::cast_slice(&[tokens; MAX_WRITERS]))
    }

    /// The record of a slot, of its first `writers` writers together.
    ///
    /// # Errors
    /// The file was cut short or cannot be read.
    pub fn record(&self, slot: u32, writers: usize) -> Result<SlotRecord, SharedError> {
        let mut bytes = [0; MAX_WRITERS * RECORD_BYTES];
        self.read(self.layout.record_at(self.checked(slot)?, 0), &mut bytes)?;
        let records: Vec<SlotRecord> = bytes.chunks_exact(RECORD_BYTES).take(writers.max(1)).map(SlotRecord::from_bytes).collect();
        Ok(SlotRecord::of_writers(&records))
    }

    /// Writes the records of a slot for every writer there may be.
    ///
    /// # Errors
    /// It cannot be written.
    pub fn write_record(&self, slot: u32, record: SlotRecord) -> Result<(), SharedError> {
        self.write(self.layout.record_at(self.checked(slot)?, 0), &record.to_bytes().repeat(MAX_WRITERS))
    }

    /// The first `count` token ids of a slot.
    ///
    /// # Errors
    /// The file was cut short or cannot be read.
    pub fn tokens(&self, slot: u32, count: usize) -> Result<Vec<u32>, SharedError> {
        let mut ids = vec![0u32; count.min(CHUNK_TOKENS)];
        self.read(self.layout.tokens_at(self.checked(slot)?), bytemuck::cast_slice_mut(&mut ids))?;
        Ok(ids)
    }

    /// Writes the first token ids of a slot.
    ///
    /// # Errors
    /// It cannot be written.
    pub fn write_tokens(&self, slot: u32, ids: &[u32]) -> Result<(), SharedError> {
        debug_assert!(ids.len() <= CHUNK_TOKENS);
        self.write(self.layout.tokens_at(self.checked(slot)?), bytemuck::cast_slice(ids))
    }

    /// Reads the whole page of (plane, slot).
    ///
    /// # Errors
    /// The file was cut short or cannot be read.
    pub fn read_page(&self, class: SlotClass, plane: &Plane, slot: u32, page: &mut [u8]) -> Result<(), SharedError> {
        debug_assert_eq!(page.len() as u64, plane.page_bytes);
        self.read(self.layout.page_at(class, plane, self.checked(slot)?), page)
    }

    /// Writes the first rows of one lane of (plane, slot): the part of a chunk that a fork or a truncation copies.
    ///
    /// # Errors
    /// It cannot be written.
    pub fn write_rows(&self, class: SlotClass, plane: &Plane, slot: u32, lane: usize, rows: &[u8]) -> Result<(), SharedError> {
        debug_assert!(rows.len() <= CHUNK_TOKENS * plane.row_bytes as usize && lane < usize::from(plane.lanes));
        self.write(self.layout.row_at(class, plane, self.checked(slot)?, lane, 0), rows)
    }

    /// Stores opaque state for a sequence that no worker has mapped, as [`OpenSlots::store_opaque`] does for one.
    ///
    /// # Errors
    /// More than [`MAX_OPAQUE_BYTES`], or the file cannot be written.
    pub fn store_opaque(&self, state: &[u8]) -> Result<(), SharedError> {
        if state.len() > MAX_OPAQUE_BYTES {
            return Err(Bound { field: "opaque_state", value: state.len() as u64, low: 0, high: MAX_OPAQUE_BYTES as u64 }.into());
        }
        let buffer_at = |which: usize| self.layout.opaque_at + which as u64 * PAGE_BYTES;
        let mut numbers = [0u64; 2];
        for (which, number) in numbers.iter_mut().enumerate() {
            self.read(buffer_at(which) + 8, bytemuck::bytes_of_mut(number))?;
        }
        let first = buffer_at(usize::from(numbers[0] > numbers[1]));
        self.write(first + 8, &0u64.to_le_bytes())?;
        self.write(first + 24, state)?;
        self.write(first, &(state.len() as u64).to_le_bytes())?;
        self.write(first + 16, &xxh3_64(state).to_le_bytes())?;
        self.write(first + 8, &(numbers[0].max(numbers[1]) + 1).to_le_bytes())
    }

    /// The opaque state stored last, if a whole one exists.
    ///
    /// # Errors
    /// The file was cut short or cannot be read.
    pub fn opaque(&self) -> Result<Option<Vec<u8>>, SharedError> {
        let mut newest: Option<(u64, Vec<u8>)> = None;
        for which in 0..2 {
            let mut page = vec![0u8; PAGE_BYTES as usize];
            self.read(self.layout.opaque_at + which * PAGE_BYTES, &mut page)?;
            let word = |index: usize| u64::from_le_bytes(std::array::from_fn(|byte| page[index * 8 + byte]));
            let (length, number, checksum) = (word(0) as usize, word(1), word(2));
            let whole = number > 0 && length <= MAX_OPAQUE_BYTES && xxh3_64(&page[24..24 + length]) == checksum;
            if whole && newest.as_ref().is_none_or(|(best, _)| number > *best) {
                newest = Some((number, page[24..24 + length].to_vec()));
            }
        }
        Ok(newest.map(|(_, state)| state))
    }

    fn checked(&self, slot: u32) -> Result<u32, SharedError> {
        if slot < self.layout.slots {
            return Ok(slot);
        }
        Err(Bound { field: "open slot", value: slot.into(), low: 0, high: u64::from(self.layout.slots) - 1 }.into())
    }

    fn read(&self, offset: u64, bytes: &mut [u8]) -> Result<(), SharedError> {
        let read = self.file.read_exact_at(bytes, offset);
        read.map_err(|source| SharedError::Io { action: "read", path: "open slots".to_owned(), source })
    }

    fn write(&self, offset: u64, bytes: &[u8]) -> Result<(), SharedError> {
        let written = self.file.write_all_at(bytes, offset);
        written.map_err(|source| SharedError::Io { action: "write", path: "open slots".to_owned(), source })
    }
}
