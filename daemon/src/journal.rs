//! The journal: what must be known again after the daemon was killed, in an embedded database in the arena folder.
//!
//! Order of a change: bytes in the arena first, the journal second, boards last. So everything the journal names exists, and a board never
//! names what the journal does not. Free slots and counts are derived at start, not stored.

use std::path::Path;

use redb::{Database, ReadableDatabase, ReadableTable, TableDefinition};
use serde::{Deserialize, Serialize};
use sluice_kernels::budget::Settings;
use sluice_kernels::shape::ModelShape;
use sluice_kernels::shared::open::Fidelity;
use sluice_kernels::slot::{SlotClass, SlotId};
use thiserror::Error;

use crate::engine::lease::ProcessId;
use crate::engine::name::Name;

const META: TableDefinition<&str, &str> = TableDefinition::new("meta");
const MODELS: TableDefinition<u64, &[u8]> = TableDefinition::new("models");
const SEGMENTS: TableDefinition<u64, &[u8]> = TableDefinition::new("segments");
const CHUNKS: TableDefinition<u64, &[u8]> = TableDefinition::new("chunks");
const CHUNK_TOKENS: TableDefinition<u64, &[u8]> = TableDefinition::new("chunk_tokens");
const CHUNK_SUMS: TableDefinition<u64, &[u8]> = TableDefinition::new("chunk_sums");
const SEQUENCES: TableDefinition<u64, &[u8]> = TableDefinition::new("sequences");
const PATHS: TableDefinition<(u64, u32), u64> = TableDefinition::new("paths");

/// Version of the tables.
const JOURNAL_VERSION: &str = "1";
/// Memory that the database may use for pages.
const CACHE_BYTES: usize = 4 << 20;

/// The journal cannot be read or written.
#[derive(Debug, Error)]
pub enum JournalError {
    /// The database refused.
    #[error("journal: {0}")]
    Database(String),
    /// Another daemon has it open.
    #[error("journal: another daemon uses this arena folder")]
    InUse,
    /// A record that this build cannot read.
    #[error("journal: {table} {key} cannot be read: {reason}")]
    Record {
        /// Table.
        table: &'static str,
        /// Key.
        key: u64,
        /// Why.
        reason: String,
    },
    /// Another version's journal.
    #[error("journal: version {found}, this build reads {JOURNAL_VERSION}; move the arena folder away")]
    Version {
        /// Version found.
        found: String,
    },
}

impl JournalError {
    fn database(error: impl std::fmt::Display) -> Self {
        Self::Database(error.to_string())
    }
}

/// A registered model.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ModelRecord {
    /// Id.
    pub id: u64,
    /// Name for people.
    pub name: String,
    /// Namespace.
    pub namespace: String,
    /// Digest of the weights.
    pub weights_digest: Vec<u8>,
    /// Rotary layout as on the wire.
    pub rotary_layout: i32,
    /// Shape.
    pub shape: ModelShape,
    /// Label set of its calibration.
    pub label_set: Option<u64>,
    /// Calibration as JSON.
    pub calibration_json: Option<String>,
}

/// A segment file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SegmentRecord {
    /// Number.
    pub id: u32,
    /// Model.
    pub model: u64,
    /// Class of its slots.
    pub class: SlotClass,
    /// Slots.
    pub slots: u32,
}

/// A sealed chunk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ChunkRecord {
    /// Id.
    pub id: u64,
    /// Model.
    pub model: u64,
    /// Place in its sequence: tokens `index * 256 ..`.
    pub index: u32,
    /// Name; `None` when it may not be shared.
    pub name: Option<Name>,
    /// Chunk before it.
    pub parent: Option<u64>,
    /// How its own rows were made.
    pub fidelity: Fidelity,
    /// Whether it and all before it were made by dense attention.
    pub dense: bool,
    /// Rows of full-attention layers.
    pub selected: Option<SlotId>,
    /// Rows of sliding-window layers, while they are kept.
    pub window: Option<SlotId>,
    /// BLAKE3 of its page checksums.
    pub digest: [u8; 32],
    /// Whether a sequence may be opened behind it with all window rows.
    pub reusable_end: bool,
}

/// A held or parked sequence.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SequenceRecord {
    /// Id.
    pub id: u64,
    /// Model.
    pub model: u64,
    /// Root of its names.
    pub root: Name,
    /// Settings of its steps.
    pub settings: Settings,
    /// Generation of the lease given last.
    pub generation: u64,
    /// Whether its lease has ended by the death of its holder; `None`: it is held.
    pub parked_at: Option<u64>,
    /// Rows were found that cannot be stored.
    pub poisoned: bool,
    /// Processes of the lease; empty for a lease without a local process.
    pub processes: Vec<ProcessId>,
    /// User of those processes.
    pub uid: u32,
    /// Whether the holder attached directly.
    pub direct: bool,
    /// Lanes by writer; empty: writer 0 writes all lanes.
    pub writers: Vec<(u32, u32)>,
    /// Slots of its open file.
    pub open_slots: u32,
    /// Full chunks of the prompt it was opened with.
    pub prompt_chunks: u32,
}

/// One change. Changes are collected while a command is carried out and committed together.
#[derive(Clone, Debug)]
pub enum Edit {
    /// Writes a model.
    Model(ModelRecord),
    /// Removes a model.
    DropModel(u64),
    /// Writes a segment.
    Segment(SegmentRecord),
    /// Removes a segment.
    DropSegment(u32),
    /// Writes a chunk.
    Chunk(ChunkRecord),
    /// Writes what is only read when a chunk is verified or a sequence resumed.
    ChunkContent {
        /// Chunk.
        id: u64,
        /// Its token ids.
        tokens: Vec<u32>,
        /// Its page checksums, selected planes then window planes, lane after lane.
        sums: Vec<u64>,
    },
    /// Removes a chunk.
    DropChunk(u64),
    /// Writes a sequence.
    Sequence(SequenceRecord),
    /// Removes a sequence with its path.
    DropSequence(u64),
    /// Sets chunks of a path.
    Path {
        /// Sequence.
        sequence: u64,
        /// Index of the first of them.
        first: u32,
        /// Chunks.
        chunks: Vec<u64>,
    },
    /// Cuts a path.
    CutPath {
        /// Sequence.
        sequence: u64,
        /// Chunks that stay.
        keep: u32,
    },
    /// Reserves ids below this one.
    NextId(u64),
    /// Reserves segment numbers below this one.
    NextSegment(u32),
}

/// Everything but chunk contents, read at start.
#[derive(Clone, Debug, Default)]
pub struct Snapshot {
    /// Models by id.
    pub models: Vec<ModelRecord>,
    /// Segments by number.
    pub segments: Vec<SegmentRecord>,
    /// Chunks by id: a parent before its children.
    pub chunks: Vec<ChunkRecord>,
    /// Sequences by id, with their paths.
    pub sequences: Vec<(SequenceRecord, Vec<u64>)>,
    /// First id that was never given.
    pub next_id: u64,
    /// First segment number that was never given.
    pub next_segment: u32,
}

/// The journal, open.
#[derive(Debug)]
pub struct Journal {
    database: Database,
}

impl Journal {
    /// Opens or creates the journal at `path`. A journal of another boot is emptied: shared memory does not survive a reboot.
    ///
    /// # Errors
    /// Another daemon has it open, it is damaged, or of another version.
    pub fn open(path: &Path, boot_id: &str) -> Result<Self, JournalError> {
        let database = Database::builder().set_cache_size(CACHE_BYTES).create(path).map_err(|error| match error {
            redb::DatabaseError::DatabaseAlreadyOpen => JournalError::InUse,
            other => JournalError::database(other),
        })?;
        let journal = Self { database };
        journal.create_tables()?;
        if let Some(found) = journal.meta("version")?
            && found != JOURNAL_VERSION
        {
            return Err(JournalError::Version { found });
        }
        if journal.meta("boot_id")?.is_none_or(|found| found != boot_id) {
            journal.clear(boot_id)?;
        }
        Ok(journal)
    }

    fn create_tables(&self) -> Result<(), JournalError> {
        let write = self.database.begin_write().map_err(JournalError::database)?;
        {
            write.open_table(META).map_err(JournalError::database)?;
            for table in [MODELS, SEGMENTS, CHUNKS, CHUNK_TOKENS, CHUNK_SUMS, SEQUENCES] {
                write.open_table(table).map_err(JournalError::database)?;
            }
            write.open_table(PATHS).map_err(JournalError::database)?;
        }
        write.commit().map_err(JournalError::database)
    }

    fn clear(&self, boot_id: &str) -> Result<(), JournalError> {
        let write = self.database.begin_write().map_err(JournalError::database)?;
        {
            for table in [MODELS, SEGMENTS, CHUNKS, CHUNK_TOKENS, CHUNK_SUMS, SEQUENCES] {
                write.delete_table(table).map_err(JournalError::database)?;
                write.open_table(table).map_err(JournalError::database)?;
            }
            write.delete_table(PATHS).map_err(JournalError::database)?;
            write.open_table(PATHS).map_err(JournalError::database)?;
            let mut meta = write.open_table(META).map_err(JournalError::database)?;
            for (key, value) in [("version", JOURNAL_VERSION), ("boot_id", boot_id), ("next_id", "1"), ("next_segment", "0")] {
                meta.insert(key, value).map_err(JournalError::database)?;
            }
        }
        write.commit().map_err(JournalError::database)
    }

    fn meta(&self, key: &str) -> Result<Option<String>, JournalError> {
        let read = self.database.begin_read().map_err(JournalError::database)?;
        let table = read.open_table(META).map_err(JournalError::database)?;
        let value = table.get(key).map_err(JournalError::database)?;
        Ok(value.map(|value| value.value().to_owned()))
    }

    fn meta_number(&self, key: &'static str) -> Result<u64, JournalError> {
        let text = self.meta(key)?.unwrap_or_default();
        text.parse().map_err(|_| JournalError::Database(format!("meta {key}: {text:?} is not a number")))
    }

    /// Reads everything but chunk contents.
    ///
    /// # Errors
    /// The database or a record cannot be read.
    pub fn snapshot(&self) -> Result<Snapshot, JournalError> {
        let read = self.database.begin_read().map_err(JournalError::database)?;
        let paths = read.open_table(PATHS).map_err(JournalError::database)?;
        let mut sequences = Vec::new();
        for record in records::<SequenceRecord>(&read, "sequences", SEQUENCES)? {
            let path = paths.range((record.id, 0)..=(record.id, u32::MAX)).map_err(JournalError::database)?;
            let path: Result<Vec<u64>, _> = path.map(|entry| entry.map(|(_, chunk)| chunk.value())).collect();
            sequences.push((record, path.map_err(JournalError::database)?));
        }
        Ok(Snapshot {
            models: records(&read, "models", MODELS)?,
            segments: records(&read, "segments", SEGMENTS)?,
            chunks: records(&read, "chunks", CHUNKS)?,
            sequences,
            next_id: self.meta_number("next_id")?,
            next_segment: self.meta_number("next_segment")? as u32,
        })
    }

    /// Token ids of a chunk.
    ///
    /// # Errors
    /// The database cannot be read or has no such chunk.
    pub fn tokens(&self, chunk: u64) -> Result<Vec<u32>, JournalError> {
        let bytes = self.content("chunk_tokens", CHUNK_TOKENS, chunk)?;
        Ok(bytes.chunks_exact(4).map(|word| u32::from_le_bytes([word[0], word[1], word[2], word[3]])).collect())
    }

    /// Page checksums of a chunk, selected planes then window planes, lane after lane.
    ///
    /// # Errors
    /// The database cannot be read or has no such chunk.
    pub fn sums(&self, chunk: u64) -> Result<Vec<u64>, JournalError> {
        let bytes = self.content("chunk_sums", CHUNK_SUMS, chunk)?;
        Ok(bytes.chunks_exact(8).map(|word| u64::from_le_bytes(std::array::from_fn(|byte| word[byte]))).collect())
    }

    fn content(&self, name: &'static str, table: TableDefinition<u64, &[u8]>, key: u64) -> Result<Vec<u8>, JournalError> {
        let read = self.database.begin_read().map_err(JournalError::database)?;
        let table = read.open_table(table).map_err(JournalError::database)?;
        let value = table.get(key).map_err(JournalError::database)?;
        let value = value.ok_or(JournalError::Record { table: name, key, reason: "missing".to_owned() })?;
        Ok(value.value().to_vec())
    }

    /// Commits changes together: after a kill either all or none of them are found.
    ///
    /// # Errors
    /// The database cannot be written.
    pub fn commit(&self, edits: &[Edit]) -> Result<(), JournalError> {
        let write = self.database.begin_write().map_err(JournalError::database)?;
        for edit in edits {
            apply(&write, edit)?;
        }
        write.commit().map_err(JournalError::database)
    }
}

fn records<T: for<'de> Deserialize<'de>>(
    read: &redb::ReadTransaction,
    name: &'static str,
    table: TableDefinition<u64, &[u8]>,
) -> Result<Vec<T>, JournalError> {
    let table = read.open_table(table).map_err(JournalError::database)?;
    let mut records = Vec::new();
    for entry in table.iter().map_err(JournalError::database)? {
        let (key, value) = entry.map_err(JournalError::database)?;
        let record = serde_json::from_slice(value.value());
        records.push(record.map_err(|error| JournalError::Record { table: name, key: key.value(), reason: error.to_string() })?);
    }
    Ok(records)
}

fn apply(write: &redb::WriteTransaction, edit: &Edit) -> Result<(), JournalError> {
    match edit {
        Edit::Model(record) => put(write, MODELS, record.id, record),
        Edit::DropModel(id) => remove(write, MODELS, *id),
        Edit::Segment(record) => put(write, SEGMENTS, record.id.into(), record),
        Edit::DropSegment(id) => remove(write, SEGMENTS, (*id).into()),
        Edit::Chunk(record) => put(write, CHUNKS, record.id, record),
        Edit::ChunkContent { id, tokens, sums } => {
            put_bytes(write, CHUNK_TOKENS, *id, &tokens.iter().flat_map(|token| token.to_le_bytes()).collect::<Vec<u8>>())?;
            put_bytes(write, CHUNK_SUMS, *id, &sums.iter().flat_map(|sum| sum.to_le_bytes()).collect::<Vec<u8>>())
        }
        Edit::DropChunk(id) => {
            for table in [CHUNKS, CHUNK_TOKENS, CHUNK_SUMS] {
                remove(write, table, *id)?;
            }
            Ok(())
        }
        Edit::Sequence(record) => put(write, SEQUENCES, record.id, record),
        Edit::DropSequence(id) => {
            remove(write, SEQUENCES, *id)?;
            cut_path(write, *id, 0)
        }
        Edit::Path { sequence, first, chunks } => {
            let mut paths = write.open_table(PATHS).map_err(JournalError::database)?;
            for (index, chunk) in (*first..).zip(chunks) {
                paths.insert((*sequence, index), chunk).map_err(JournalError::database)?;
            }
            Ok(())
        }
        Edit::CutPath { sequence, keep } => cut_path(write, *sequence, *keep),
        Edit::NextId(next) => put_meta(write, "next_id", u64::to_string(next)),
        Edit::NextSegment(next) => put_meta(write, "next_segment", u32::to_string(next)),
    }
}

fn put<T: Serialize>(write: &redb::WriteTransaction, table: TableDefinition<u64, &[u8]>, key: u64, record: &T) -> Result<(), JournalError> {
    put_bytes(write, table, key, &serde_json::to_vec(record).map_err(JournalError::database)?)
}

fn put_bytes(write: &redb::WriteTransaction, table: TableDefinition<u64, &[u8]>, key: u64, bytes: &[u8]) -> Result<(), JournalError> {
    let mut table = write.open_table(table).map_err(JournalError::database)?;
    table.insert(key, bytes).map_err(JournalError::database)?;
    Ok(())
}

fn remove(write: &redb::WriteTransaction, table: TableDefinition<u64, &[u8]>, key: u64) -> Result<(), JournalError> {
    let mut table = write.open_table(table).map_err(JournalError::database)?;
    table.remove(key).map_err(JournalError::database)?;
    Ok(())
}

fn put_meta(write: &redb::WriteTransaction, key: &str, value: String) -> Result<(), JournalError> {
    let mut table = write.open_table(META).map_err(JournalError::database)?;
    table.insert(key, value.as_str()).map_err(JournalError::database)?;
    Ok(())
}

fn cut_path(write: &redb::WriteTransaction, sequence: u64, keep: u32) -> Result<(), JournalError> {
    let mut paths = write.open_table(PATHS).map_err(JournalError::database)?;
    paths.retain_in((sequence, keep)..=(sequence, u32::MAX), |_, _| false).map_err(JournalError::database)
}
