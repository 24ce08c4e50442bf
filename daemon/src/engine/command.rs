//! Commands to the engine and their answers: plain data.

use std::fs::File;
use std::ops::Range;
use std::sync::Arc;

use sluice_kernels::budget::Settings;
use sluice_kernels::label::Calibration;
use sluice_kernels::shape::ModelShape;
use sluice_kernels::slot::SlotClass;
use tokio::sync::oneshot;

use crate::engine::error::EngineError;

/// Where the answer of a command goes. A dropped receiver means that nobody waits any more.
pub type Reply<T> = oneshot::Sender<Result<T, EngineError>>;

/// Who asks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Peer {
    /// A process of this machine, proven by the socket.
    Local {
        /// Process id.
        pid: i32,
        /// User id.
        uid: u32,
    },
    /// Somebody without a process here.
    Remote,
}

/// Proof that the caller holds a sequence.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct LeaseKey {
    /// Sequence.
    pub sequence: u64,
    /// Generation.
    pub generation: u64,
}

/// Registers a model.
#[derive(Clone, Debug)]
pub struct RegisterModel {
    /// Name for people, 1 to 256 bytes.
    pub name: String,
    /// Namespace, 1 to 128 bytes.
    pub namespace: String,
    /// Digest of the weights, 1 to 64 bytes.
    pub weights_digest: Vec<u8>,
    /// Rotary layout as on the wire.
    pub rotary_layout: i32,
    /// Shape.
    pub shape: ModelShape,
    /// Calibration as JSON; empty: none.
    pub calibration_json: Vec<u8>,
}

/// A registered model.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Registered {
    /// Id.
    pub model: u64,
    /// Whether a calibration is in force.
    pub calibrated: bool,
}

/// Opens a sequence.
#[derive(Clone, Debug)]
pub struct Open {
    /// Model.
    pub model: u64,
    /// Prompt.
    pub tokens: Vec<u32>,
    /// Further key parts.
    pub extra_keys: Vec<Vec<u8>>,
    /// Settings of steps; `None`: the default.
    pub settings: Option<Settings>,
    /// Parked sequence to take up; `None`: open by tokens.
    pub resume: Option<u64>,
    /// Open slots; 0: the default.
    pub open_slots: u32,
    /// Process that will hold the lease; 0: the peer.
    pub holder_pid: u32,
    /// Who asks.
    pub peer: Peer,
}

/// An opened sequence.
#[derive(Clone, Debug, PartialEq)]
pub struct Opened {
    /// The lease.
    pub lease: LeaseKey,
    /// Tokens that are there.
    pub matched_tokens: u64,
    /// Settings in force.
    pub settings: Settings,
    /// What the last holder stored (resume only).
    pub opaque_state: Vec<u8>,
    /// Ids of the matched tokens (resume and fork only).
    pub token_ids: Vec<u32>,
    /// Tokens that fit before a chunk must be sealed.
    pub tokens_until_full: u64,
}

/// Forks a sequence.
#[derive(Clone, Copy, Debug)]
pub struct Fork {
    /// Lease of the parent.
    pub lease: LeaseKey,
    /// Tokens that are shared.
    pub position: u64,
    /// Open slots; 0: the default.
    pub open_slots: u32,
    /// Process that will hold the lease; 0: the peer.
    pub holder_pid: u32,
    /// Who asks.
    pub peer: Peer,
}

/// Prepares direct access.
#[derive(Clone, Debug)]
pub struct Attach {
    /// Lease.
    pub lease: LeaseKey,
    /// Lanes of this worker; `None`: all.
    pub lanes: Option<Range<u32>>,
}

/// How to attach.
#[derive(Clone, Debug)]
pub struct Attached {
    /// Ticket for the side socket.
    pub ticket: [u8; 16],
    /// Writer index.
    pub writer: u32,
    /// Label set and calibration in force.
    pub calibration: Option<(u64, Arc<Calibration>)>,
    /// Settings of the sequence's steps.
    pub settings: Settings,
}

/// Files of a sequence for its holder.
#[derive(Debug)]
pub struct HolderFiles {
    /// Lease that they belong to.
    pub lease: LeaseKey,
    /// Read-only.
    pub board: File,
    /// Writable.
    pub open: File,
    /// Shape of the model.
    pub shape: Arc<ModelShape>,
    /// Calibration in force.
    pub calibration: Option<Arc<Calibration>>,
    /// Settings of the sequence.
    pub settings: Settings,
    /// Slots of the open file.
    pub open_slots: u32,
    /// Entries of the board's tables.
    pub table_chunks: u32,
    /// Tokens committed.
    pub committed: u64,
    /// Writer index.
    pub writer: u32,
}

/// Files of a segment for a holder, read-only.
#[derive(Debug)]
pub struct HolderSegment {
    /// Number.
    pub id: u32,
    /// Slots.
    pub slots: u32,
    /// Class.
    pub class: SlotClass,
    /// Rows.
    pub rows: File,
    /// Label set and labels.
    pub labels: Option<(u64, File)>,
}

/// Calibration in force after `SetCalibration`.
#[derive(Clone, Debug)]
pub struct CalibrationInForce {
    /// As JSON.
    pub json: Vec<u8>,
    /// Whether it is the one given.
    pub accepted: bool,
}

/// State of a sequence.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SequenceStatus {
    /// A live lease holds it.
    Held,
    /// Its holder died.
    Parked,
    /// Only Close is accepted.
    Poisoned,
}

/// One line of `List`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SequenceInfo {
    /// Sequence and generation.
    pub lease: LeaseKey,
    /// Model.
    pub model: u64,
    /// Namespace.
    pub namespace: String,
    /// State.
    pub status: SequenceStatus,
    /// Tokens committed.
    pub committed_tokens: u64,
    /// Tokens in the arena.
    pub sealed_tokens: u64,
    /// First process of the lease; 0: none.
    pub holder_pid: u32,
    /// Whether the holder attached directly.
    pub direct: bool,
}

/// What the engine holds, beside the counters.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct EngineStats {
    /// Registered models.
    pub models: u64,
    /// Held sequences.
    pub sequences_held: u64,
    /// Parked sequences.
    pub sequences_parked: u64,
    /// Sealed chunks.
    pub chunks: u64,
    /// Sealed chunks that somebody holds.
    pub chunks_held: u64,
    /// Capacity for rows.
    pub arena_capacity_bytes: u64,
    /// Bytes of slots that are not free.
    pub arena_used_bytes: u64,
    /// Bytes of row files.
    pub arena_file_bytes: u64,
    /// Bytes of label files.
    pub label_bytes: u64,
    /// Bytes of open slot files of sequences.
    pub open_slot_bytes: u64,
    /// Bytes of open slot files that were made ahead.
    pub spare_slot_bytes: u64,
    /// Slots in limbo.
    pub limbo_slots: u64,
    /// Slots of all segments.
    pub slots: u64,
    /// Slots that are free.
    pub free_slots: u64,
    /// Slots of chunks.
    pub chunk_slots: u64,
}

/// What the engine can be asked to do.
#[derive(Debug)]
pub enum Command {
    /// Registers a model.
    RegisterModel(RegisterModel, Reply<Registered>),
    /// Removes a model; answers with the bytes that were freed.
    UnregisterModel(u64, Reply<u64>),
    /// Sets the calibration of a model that has none.
    SetCalibration(u64, Vec<u8>, Reply<CalibrationInForce>),
    /// Opens or resumes a sequence.
    Open(Open, Reply<Opened>),
    /// Forks a sequence.
    Fork(Fork, Reply<Opened>),
    /// Truncates a sequence; answers with the committed tokens.
    Truncate(LeaseKey, u64, Reply<u64>),
    /// Closes a sequence.
    Close(LeaseKey, Reply<()>),
    /// Stores opaque state of a sequence that the daemon decodes for.
    StoreOpaque(LeaseKey, Vec<u8>, Reply<()>),
    /// Lists sequences of a model, or of all.
    List(Option<u64>, Reply<Vec<SequenceInfo>>),
    /// Counts what there is.
    Stats(Reply<EngineStats>),
    /// Makes a ticket for direct access.
    Attach(Attach, Reply<Attached>),
    /// Redeems a ticket.
    Redeem([u8; 16], Peer, Reply<HolderFiles>),
    /// Files for the daemon's own decoder.
    Host(LeaseKey, Reply<HolderFiles>),
    /// A segment for a holder.
    Segment(LeaseKey, u32, Reply<HolderSegment>),
    /// Calibration in force of a sequence's model.
    CalibrationOf(LeaseKey, Reply<Option<Arc<Calibration>>>),
    /// A lease without a process was used.
    Touch(LeaseKey),
    /// Stop after this command.
    Stop(Reply<()>),
    /// Fail on purpose, as a bug would: the supervision is tested with it.
    #[doc(hidden)]
    Panic,
}
