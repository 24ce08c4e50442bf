//! Everything that bounds the engine: plain data, checked once at start.

use std::path::PathBuf;
use std::time::Duration;

use sluice_kernels::budget::Settings;
use sluice_kernels::device::DeviceKind;
use thiserror::Error;

/// What the engine may use. Every queue, pool and wait of the engine has its bound here.
#[derive(Clone, Debug)]
pub struct EngineConfig {
    /// Folder of the arena on a tmpfs, created with mode 0700: segments, open slots, boards and the journal.
    pub arena_dir: PathBuf,
    /// Bytes of rows (both slot classes) that sealed chunks may take in all, at least 1 MiB. Labels and open slots come on top.
    pub arena_bytes: u64,
    /// Bytes of a row segment, about; at least one slot.
    pub segment_bytes: u64,
    /// Bytes that the open slots of all sequences may take in all.
    pub open_bytes_max: u64,
    /// Files of open slots made ahead, so that an Open does not wait for zeroed memory; they count as open slots. At most 64; 0: none.
    pub spare_files: usize,
    /// Open slots of a sequence whose Open names none, 2 to 4096.
    pub open_slots_default: u32,
    /// Most tokens of a sequence.
    pub max_tokens: u64,
    /// Most sequences, held and parked.
    pub max_sequences: usize,
    /// Most parked sequences; the oldest is dropped when one more is parked.
    pub parked_sequences_max: usize,
    /// Most registered models, over all namespaces.
    pub max_models: usize,
    /// Threads that seal, at least 1.
    pub seal_threads: usize,
    /// How often the headers of growing sequences are read.
    pub seal_poll: Duration,
    /// Longest wait of an Append message for a chunk to be sealed; the client's own deadline comes on top.
    pub seal_wait: Duration,
    /// How often the processes of leases are looked at, beside the notice that a pidfd gives.
    pub lease_poll: Duration,
    /// Commands that may wait for the engine; a full queue is refused with RESOURCE_EXHAUSTED.
    pub command_queue: usize,
    /// Decode and append messages that may wait for the decode thread.
    pub decode_queue: usize,
    /// Most sequences of one Decode message, 1 to 256.
    pub decode_batch_max: usize,
    /// Bytes that one Decode or Append message may carry.
    pub message_bytes_max: usize,
    /// Device of the daemon's own decoder.
    pub device: DeviceKind,
    /// Compute threads of the cpu device; 0: all cores.
    pub device_threads: usize,
    /// Bytes of a GPU's memory that the daemon's own decoder may take; 0: nine tenths of what is free at the first step.
    pub device_bytes: u64,
    /// Bytes of hot rows a sequence may have in the daemon's own decoder; 0: no pool on the CPU, where every selected row is read where it
    /// lies, and three times the rows of a step on a GPU.
    pub hot_bytes: u64,
    /// Settings of a sequence whose Open names none.
    pub settings_default: Settings,
    /// Idle time after which a lease without a local process (a TCP client's) is ended and its sequence parked.
    pub stream_idle: Duration,
    /// Secret part of every chunk name, so that names of two installations differ. At most 64 bytes.
    pub namespace_salt: Vec<u8>,
    /// Path of the side socket (Unix, `SOCK_SEQPACKET`).
    pub side_socket: PathBuf,
    /// Side socket connections served at a time.
    pub side_connections_max: usize,
    /// How long an attach ticket is valid.
    pub ticket_lifetime: Duration,
}

/// A configuration that the engine cannot start with.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error("{field}: {value} is outside {bound}")]
pub struct ConfigError {
    /// Field of [`EngineConfig`].
    pub field: &'static str,
    /// Value given.
    pub value: String,
    /// What is accepted.
    pub bound: &'static str,
}

impl Default for EngineConfig {
    fn default() -> Self {
        Self {
            arena_dir: PathBuf::from("/dev/shm/sluice"),
            arena_bytes: 8 << 30,
            segment_bytes: 1 << 30,
            open_bytes_max: 2 << 30,
            spare_files: 2,
            open_slots_default: 4,
            max_tokens: 1 << 20,
            max_sequences: 1024,
            parked_sequences_max: 64,
            max_models: 64,
            seal_threads: 1,
            seal_poll: Duration::from_millis(1),
            seal_wait: Duration::from_secs(30),
            lease_poll: Duration::from_secs(1),
            command_queue: 1024,
            decode_queue: 64,
            decode_batch_max: 256,
            message_bytes_max: 64 << 20,
            device: DeviceKind::Cpu,
            device_threads: 0,
            device_bytes: 0,
            hot_bytes: 0,
            settings_default: Settings::default(),
            stream_idle: Duration::from_secs(300),
            namespace_salt: Vec::new(),
            side_socket: PathBuf::from("/tmp/sluice-side.sock"),
            side_connections_max: 256,
            ticket_lifetime: Duration::from_secs(30),
        }
    }
}

impl EngineConfig {
    /// Checks every bound.
    ///
    /// # Errors
    /// The first field that is out of bounds.
    pub fn check(&self) -> Result<(), ConfigError> {
        let bytes = |field, value: u64, least: u64, bound| check(field, value, value >= least, bound);
        bytes("arena_bytes", self.arena_bytes, 1 << 20, "1 MiB and more")?;
        bytes("segment_bytes", self.segment_bytes, 1 << 16, "64 KiB and more")?;
        bytes("open_bytes_max", self.open_bytes_max, 1 << 20, "1 MiB and more")?;
        check("open_slots_default", self.open_slots_default, (2..=4096).contains(&self.open_slots_default), "2 to 4096")?;
        check("spare_files", self.spare_files, self.spare_files <= 64, "0 to 64")?;
        check("max_tokens", self.max_tokens, (1024..=1 << 24).contains(&self.max_tokens), "1024 to 16777216")?;
        let count = |field, value: usize, bound| check(field, value, value > 0 && value <= 1 << 20, bound);
        count("max_sequences", self.max_sequences, "1 to 1048576")?;
        count("max_models", self.max_models, "1 to 1048576")?;
        count("command_queue", self.command_queue, "1 to 1048576")?;
        count("decode_queue", self.decode_queue, "1 to 1048576")?;
        count("side_connections_max", self.side_connections_max, "1 to 1048576")?;
        check("seal_threads", self.seal_threads, (1..=64).contains(&self.seal_threads), "1 to 64")?;
        check("decode_batch_max", self.decode_batch_max, (1..=256).contains(&self.decode_batch_max), "1 to 256")?;
        let poll = self.seal_poll.as_micros();
        check("seal_poll", format!("{poll} us"), (50..=1_000_000).contains(&poll), "50 us to 1 s")?;
        check("namespace_salt", self.namespace_salt.len(), self.namespace_salt.len() <= 64, "0 to 64 bytes")?;
        let exact = self.settings_default.exact_tokens;
        check("settings_default.exact_tokens", exact, (64..=65_536).contains(&exact), "64 to 65536")
    }
}

fn check(field: &'static str, value: impl ToString, fits: bool, bound: &'static str) -> Result<(), ConfigError> {
    if fits { Ok(()) } else { Err(ConfigError { field, value: value.to_string(), bound }) }
}
