//! What may be written: the TOML file, the environment and flags, all with these keys.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use sluice_kernels::budget::{Budget, Settings};
use sluice_kernels::device::DeviceKind;

use super::units::{ByteCount, RatioText};
use crate::engine::EngineConfig;

/// All sections. Every key has a default; unknown keys are refused.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ConfigFile {
    /// Where the daemon listens.
    pub listen: ListenSection,
    /// Host memory.
    pub arena: ArenaSection,
    /// Bounds of requests, queues and waits.
    pub limits: LimitsSection,
    /// Sealing of full chunks.
    pub seal: SealSection,
    /// The daemon's own decoder and the defaults of a sequence.
    pub decode: DecodeSection,
    /// Logs on stderr.
    pub log: LogSection,
}

/// Where the daemon listens.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ListenSection {
    /// Unix socket of the gRPC service, made with mode 0600. Default: `/tmp/sluice-UID/sluice.sock`. At most 107 bytes.
    pub socket: PathBuf,
    /// Side socket that hands descriptors to direct clients. Default: empty, which is `side.sock` beside the gRPC socket. At most 107 bytes.
    pub side_socket: PathBuf,
    /// gRPC over TCP: `ADDRESS:PORT` on loopback, or `off`. Default: `off`.
    pub tcp: String,
    /// HTTP with `/metrics` and `/health`: `ADDRESS:PORT` on loopback (port 0: any free one), or `off`. Default: `127.0.0.1:9464`.
    pub http: String,
}

/// Host memory.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ArenaSection {
    /// Folder of the arena on a tmpfs. Default: `/dev/shm/sluice-UID`.
    pub folder: PathBuf,
    /// Bytes of rows that sealed chunks may take in all. Default: 8 GiB. Minimum: 1 MiB.
    pub capacity_bytes: ByteCount,
    /// Bytes of one segment, about. Default: 1 GiB. Minimum: 64 KiB.
    pub segment_bytes: ByteCount,
    /// Bytes that growing chunks (open slots) of all sequences may take in all. Default: 2 GiB. Minimum: 1 MiB.
    pub open_bytes: ByteCount,
    /// Open-slot files made ahead, so that an Open need not wait for zeroed memory; they count into `open_bytes`. Default: 2. 0 to 64.
    pub spare_files: usize,
    /// File whose content (at most 64 bytes) is mixed into every chunk name, so that names of two installations differ. Default: empty: none.
    pub name_salt_file: PathBuf,
}

/// Bounds of requests, queues and waits. A full queue or pool is an answer (`RESOURCE_EXHAUSTED`), not a wait.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct LimitsSection {
    /// Bytes of one gRPC message, in either direction. Default: 64 MiB. 64 KiB to 1 GiB.
    pub message_bytes: ByteCount,
    /// gRPC connections at a time; one more is closed at once. Default: 256. 1 to 65536.
    pub connections: u32,
    /// Requests at work on one connection; one more is refused. Default: 64. 1 to 65536.
    pub requests_per_connection: u32,
    /// Seconds until a request without a reply is cancelled; a shorter deadline of the client counts. Default: 600. 1 to 86400.
    pub request_seconds: u64,
    /// Seconds between HTTP/2 pings on an idle connection. Default: 30. 1 to 3600.
    pub keepalive_seconds: u64,
    /// Seconds until an unanswered ping closes the connection. Default: 20. 1 to 3600.
    pub keepalive_timeout_seconds: u64,
    /// Seconds that streams may take to finish after SIGTERM. Default: 10. 0 to 3600.
    pub drain_seconds: u64,
    /// Tokens of one sequence. Default: 1048576. 1024 to 16777216.
    pub sequence_tokens: u64,
    /// Sequences, held and parked. Default: 1024. 1 to 1048576.
    pub sequences: usize,
    /// Parked sequences; the oldest is dropped when one more is parked. Default: 64. 0 to 1048576.
    pub parked_sequences: usize,
    /// Registered models. Default: 64. 1 to 1048576.
    pub models: usize,
    /// Commands that wait for the engine. Default: 1024. 1 to 1048576.
    pub command_queue: usize,
    /// Decode and append messages that wait for the decode thread. Default: 64. 1 to 1048576.
    pub decode_queue: usize,
    /// Sequences of one Decode message. Default: 256. 1 to 256.
    pub decode_batch: usize,
    /// Growing chunks a sequence may have unsealed when its Open names no number. Default: 4. 2 to 4096.
    pub open_slots: u32,
    /// Side socket connections at a time. Default: 256. 1 to 1048576.
    pub side_connections: usize,
    /// Seconds that an attach ticket is valid. Default: 30. 1 to 3600.
    pub ticket_seconds: u64,
    /// Idle seconds after which a TCP client's lease ends and its sequence is parked. Default: 300. 1 to 86400.
    pub stream_idle_seconds: u64,
}

/// Sealing of full chunks.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct SealSection {
    /// Threads that copy, checksum and label chunks. Default: 1. 1 to 64.
    pub threads: usize,
    /// Microseconds between looks at the headers of growing sequences. Default: 1000. 50 to 1000000.
    pub poll_microseconds: u64,
    /// Seconds that an Append waits at most for a chunk to be sealed when the open slots are full. Default: 30. 0 to 3600.
    pub wait_seconds: u64,
    /// Milliseconds between looks at the processes of leases, beside the notice a pidfd gives. Default: 1000. 10 to 60000.
    pub lease_poll_milliseconds: u64,
}

/// The daemon's own decoder (Stream clients, labels) and the settings of a sequence whose Open names none.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct DecodeSection {
    /// `cpu` (SIMD on several threads), `cuda:N` (GPU N of those that the driver shows) or `reference` (the plain oracle: slow, for tests).
    /// A GPU that is missing is an error at start. Default: `cpu`.
    pub device: DeviceKind,
    /// Threads of the cpu device; 0: all cores. Default: 0. At most 1024.
    pub threads: usize,
    /// Bytes of a GPU's memory that sequences may take (labels, hot rows, newest rows, working room), growth included; a sequence that does
    /// not fit is refused. 0: nine tenths of what is free at the first step. Default: 0.
    pub device_bytes: ByteCount,
    /// Bytes of hot rows a sequence may have. 0: none on the cpu device, where every selected row is read from its slot; on a GPU three
    /// times as many rows as a step selects. Default: 0.
    pub hot_bytes: ByteCount,
    /// Tokens that a lane selects in a step, as a part of the length (`1/16`), or `dense`. Default: `1/16`.
    pub ratio: RatioText,
    /// At least this many tokens. Default: 256. Minimum: 0.
    pub floor_tokens: u32,
    /// At most this many tokens; 0: no cap. Default: 0.
    pub cap_tokens: u32,
    /// Newest tokens that are attended exactly. Default: 256. 64 to 65536.
    pub exact_tokens: u32,
    /// First tokens that are always selected. Default: 4. 0 to 64.
    pub sink_tokens: u32,
}

/// Format of the log.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LogFormat {
    /// For people.
    Text,
    /// One JSON object a line.
    Json,
}

/// Logs on stderr.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct LogSection {
    /// `text` or `json`. Default: `text`.
    pub format: LogFormat,
    /// `tracing` filter, such as `info` or `warn,sluice_daemon=debug`. Default: `info`.
    pub filter: String,
}

impl Default for ListenSection {
    fn default() -> Self {
        let socket = format!("/tmp/sluice-{}/sluice.sock", user_id());
        Self { socket: socket.into(), side_socket: PathBuf::new(), tcp: "off".to_owned(), http: "127.0.0.1:9464".to_owned() }
    }
}

impl Default for ArenaSection {
    fn default() -> Self {
        let engine = EngineConfig::default();
        Self {
            folder: format!("/dev/shm/sluice-{}", user_id()).into(),
            capacity_bytes: ByteCount(engine.arena_bytes),
            segment_bytes: ByteCount(engine.segment_bytes),
            open_bytes: ByteCount(engine.open_bytes_max),
            spare_files: engine.spare_files,
            name_salt_file: PathBuf::new(),
        }
    }
}

impl Default for LimitsSection {
    fn default() -> Self {
        let engine = EngineConfig::default();
        Self {
            message_bytes: ByteCount(engine.message_bytes_max as u64),
            connections: 256,
            requests_per_connection: 64,
            request_seconds: 600,
            keepalive_seconds: 30,
            keepalive_timeout_seconds: 20,
            drain_seconds: 10,
            sequence_tokens: engine.max_tokens,
            sequences: engine.max_sequences,
            parked_sequences: engine.parked_sequences_max,
            models: engine.max_models,
            command_queue: engine.command_queue,
            decode_queue: engine.decode_queue,
            decode_batch: engine.decode_batch_max,
            open_slots: engine.open_slots_default,
            side_connections: engine.side_connections_max,
            ticket_seconds: engine.ticket_lifetime.as_secs(),
            stream_idle_seconds: engine.stream_idle.as_secs(),
        }
    }
}

impl Default for SealSection {
    fn default() -> Self {
        let engine = EngineConfig::default();
        let (poll, lease_poll) = (engine.seal_poll.as_micros() as u64, engine.lease_poll.as_millis() as u64);
        let wait_seconds = engine.seal_wait.as_secs();
        Self { threads: engine.seal_threads, poll_microseconds: poll, wait_seconds, lease_poll_milliseconds: lease_poll }
    }
}

impl Default for DecodeSection {
    fn default() -> Self {
        let engine = EngineConfig::default();
        let (device, threads, device_bytes) = (engine.device, engine.device_threads, ByteCount(engine.device_bytes));
        let Settings { budget, exact_tokens, sink_tokens } = engine.settings_default;
        let (ratio, floor_tokens, cap_tokens) = match budget {
            Budget::Dense => (RatioText::Dense, 0, 0),
            Budget::Ratio { numerator, denominator, floor_tokens, cap_tokens } => {
                (RatioText::Fraction { numerator, denominator }, floor_tokens, cap_tokens)
            }
        };
        let hot_bytes = ByteCount(engine.hot_bytes);
        Self { device, threads, device_bytes, hot_bytes, ratio, floor_tokens, cap_tokens, exact_tokens, sink_tokens }
    }
}

impl Default for LogSection {
    fn default() -> Self {
        Self { format: LogFormat::Text, filter: "info".to_owned() }
    }
}

fn user_id() -> u32 {
    rustix::process::geteuid().as_raw()
}
