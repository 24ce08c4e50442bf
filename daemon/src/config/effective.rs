//! What the daemon uses: every bound checked, every default resolved.

use std::fmt::Display;
use std::net::SocketAddr;
use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};
use std::time::Duration;

use sluice_kernels::budget::Settings;

use super::file::{ConfigFile, LogSection};
use super::{ByteCount, ConfigError};
use crate::engine::EngineConfig;

/// A checked configuration.
#[derive(Clone, Debug)]
pub struct Config {
    /// The same values as they may be written, with all defaults; what `sluice config` prints.
    pub written: ConfigFile,
    /// Where the daemon listens.
    pub listen: Listen,
    /// Bounds of the gRPC server.
    pub grpc: GrpcLimits,
    /// How long streams may take to finish after SIGTERM.
    pub drain: Duration,
    /// What the engine may use.
    pub engine: EngineConfig,
    /// Logs.
    pub log: LogSection,
}

/// Where the daemon listens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Listen {
    /// Unix socket of the gRPC service.
    pub socket: PathBuf,
    /// gRPC over TCP, on loopback.
    pub tcp: Option<SocketAddr>,
    /// Metrics and health over HTTP, on loopback.
    pub http: Option<SocketAddr>,
}

/// Bounds of the gRPC server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GrpcLimits {
    /// Bytes of one message.
    pub message_bytes: usize,
    /// Connections at a time.
    pub connections: usize,
    /// Requests at work on one connection.
    pub requests_per_connection: u32,
    /// Longest time until the reply begins.
    pub request_timeout: Duration,
    /// Time between pings.
    pub keepalive_interval: Duration,
    /// Time for the answer to a ping.
    pub keepalive_timeout: Duration,
}

/// Room for the path of a Unix socket, without its end mark.
const SOCKET_PATH_BYTES: usize = 107;

impl ConfigFile {
    /// Checks every bound.
    ///
    /// # Errors
    /// The first key whose value is out of bounds.
    pub fn check(mut self) -> Result<Config, ConfigError> {
        if self.listen.side_socket.as_os_str().is_empty() {
            self.listen.side_socket = self.listen.socket.with_file_name("side.sock");
        }
        socket_path("listen.socket", &self.listen.socket)?;
        socket_path("listen.side_socket", &self.listen.side_socket)?;
        let engine = self.engine()?;
        let listen = Listen {
            socket: self.listen.socket.clone(),
            tcp: loopback("listen.tcp", &self.listen.tcp)?,
            http: loopback("listen.http", &self.listen.http)?,
        };
        let (grpc, drain) = (self.grpc()?, seconds("limits.drain_seconds", self.limits.drain_seconds, 0..=3600, "0 to 3600")?);
        Ok(Config { listen, grpc, drain, engine, log: self.log.clone(), written: self })
    }

    fn grpc(&self) -> Result<GrpcLimits, ConfigError> {
        let limits = &self.limits;
        within("limits.message_bytes", limits.message_bytes.0, 64 << 10..=1 << 30, "64 KiB to 1 GiB")?;
        within("limits.connections", limits.connections, 1..=65536, "1 to 65536")?;
        within("limits.requests_per_connection", limits.requests_per_connection, 1..=65536, "1 to 65536")?;
        let hour = "1 to 3600";
        Ok(GrpcLimits {
            message_bytes: limits.message_bytes.0 as usize,
            connections: limits.connections as usize,
            requests_per_connection: limits.requests_per_connection,
            request_timeout: seconds("limits.request_seconds", limits.request_seconds, 1..=86400, "1 to 86400")?,
            keepalive_interval: seconds("limits.keepalive_seconds", limits.keepalive_seconds, 1..=3600, hour)?,
            keepalive_timeout: seconds("limits.keepalive_timeout_seconds", limits.keepalive_timeout_seconds, 1..=3600, hour)?,
        })
    }

    fn engine(&self) -> Result<EngineConfig, ConfigError> {
        let Self { listen, arena, limits, seal, decode, .. } = self;
        let count = |field, value: usize| within(field, value, 1..=1 << 20, "1 to 1048576");
        let least = |field, value: ByteCount, least, bound| within(field, value.0, least..=1 << 50, bound);
        least("arena.capacity_bytes", arena.capacity_bytes, 1 << 20, "1 MiB to 1 PiB")?;
        least("arena.segment_bytes", arena.segment_bytes, 64 << 10, "64 KiB to 1 PiB")?;
        least("arena.open_bytes", arena.open_bytes, 1 << 20, "1 MiB to 1 PiB")?;
        within("arena.spare_files", arena.spare_files, 0..=64, "0 to 64")?;
        least("decode.hot_bytes", decode.hot_bytes, 0, "0 to 1 PiB")?;
        least("decode.device_bytes", decode.device_bytes, 0, "0 to 1 PiB")?;
        within("limits.sequence_tokens", limits.sequence_tokens, 1024..=1 << 24, "1024 to 16777216")?;
        within("limits.parked_sequences", limits.parked_sequences, 0..=1 << 20, "0 to 1048576")?;
        count("limits.sequences", limits.sequences)?;
        count("limits.models", limits.models)?;
        count("limits.command_queue", limits.command_queue)?;
        count("limits.decode_queue", limits.decode_queue)?;
        count("limits.side_connections", limits.side_connections)?;
        within("limits.decode_batch", limits.decode_batch, 1..=256, "1 to 256")?;
        within("limits.open_slots", limits.open_slots, 2..=4096, "2 to 4096")?;
        within("seal.threads", seal.threads, 1..=64, "1 to 64")?;
        within("seal.poll_microseconds", seal.poll_microseconds, 50..=1_000_000, "50 to 1000000")?;
        within("seal.lease_poll_milliseconds", seal.lease_poll_milliseconds, 10..=60_000, "10 to 60000")?;
        within("decode.threads", decode.threads, 0..=1024, "0 to 1024")?;
        within("decode.exact_tokens", decode.exact_tokens, 64..=65536, "64 to 65536")?;
        within("decode.sink_tokens", decode.sink_tokens, 0..=64, "0 to 64")?;
        if decode.cap_tokens != 0 {
            within("decode.cap_tokens", decode.cap_tokens, decode.floor_tokens..=u32::MAX, "0, or floor_tokens and more")?;
        }
        Ok(EngineConfig {
            arena_dir: arena.folder.clone(),
            arena_bytes: arena.capacity_bytes.0,
            segment_bytes: arena.segment_bytes.0,
            open_bytes_max: arena.open_bytes.0,
            spare_files: arena.spare_files,
            open_slots_default: limits.open_slots,
            max_tokens: limits.sequence_tokens,
            max_sequences: limits.sequences,
            parked_sequences_max: limits.parked_sequences,
            max_models: limits.models,
            seal_threads: seal.threads,
            seal_poll: Duration::from_micros(seal.poll_microseconds),
            seal_wait: seconds("seal.wait_seconds", seal.wait_seconds, 0..=3600, "0 to 3600")?,
            lease_poll: Duration::from_millis(seal.lease_poll_milliseconds),
            command_queue: limits.command_queue,
            decode_queue: limits.decode_queue,
            decode_batch_max: limits.decode_batch,
            message_bytes_max: limits.message_bytes.0 as usize,
            device: decode.device,
            device_threads: decode.threads,
            device_bytes: decode.device_bytes.0,
            hot_bytes: decode.hot_bytes.0,
            settings_default: Settings {
                budget: decode.ratio.budget(decode.floor_tokens, decode.cap_tokens),
                exact_tokens: decode.exact_tokens,
                sink_tokens: decode.sink_tokens,
            },
            stream_idle: seconds("limits.stream_idle_seconds", limits.stream_idle_seconds, 1..=86400, "1 to 86400")?,
            namespace_salt: read_salt(&arena.name_salt_file)?,
            side_socket: listen.side_socket.clone(),
            side_connections_max: limits.side_connections,
            ticket_lifetime: seconds("limits.ticket_seconds", limits.ticket_seconds, 1..=3600, "1 to 3600")?,
        })
    }
}

fn within<T: PartialOrd + Display>(
    field: &'static str,
    value: T,
    range: RangeInclusive<T>,
    bound: &'static str,
) -> Result<(), ConfigError> {
    if range.contains(&value) { Ok(()) } else { Err(ConfigError::Bound { field, value: value.to_string(), bound }) }
}

fn seconds(field: &'static str, value: u64, range: RangeInclusive<u64>, bound: &'static str) -> Result<Duration, ConfigError> {
    within(field, value, range, bound)?;
    Ok(Duration::from_secs(value))
}

fn socket_path(field: &'static str, path: &Path) -> Result<(), ConfigError> {
    let bytes = path.as_os_str().len();
    if path.is_absolute() && bytes <= SOCKET_PATH_BYTES {
        return Ok(());
    }
    Err(ConfigError::Bound { field, value: path.display().to_string(), bound: "absolute paths of at most 107 bytes" })
}

fn loopback(field: &'static str, text: &str) -> Result<Option<SocketAddr>, ConfigError> {
    if text.is_empty() || text == "off" {
        return Ok(None);
    }
    let bad = || ConfigError::Bound { field, value: format!("{text:?}"), bound: "`off` and ADDRESS:PORT such as 127.0.0.1:9464" };
    let address: SocketAddr = text.parse().map_err(|_| bad())?;
    if address.ip().is_loopback() { Ok(Some(address)) } else { Err(ConfigError::NotLoopback { field, address: text.to_owned() }) }
}

fn read_salt(path: &Path) -> Result<Vec<u8>, ConfigError> {
    if path.as_os_str().is_empty() {
        return Ok(Vec::new());
    }
    let salt = std::fs::read(path).map_err(|source| ConfigError::File { path: path.to_owned(), source })?;
    within("arena.name_salt_file", salt.len(), 0..=64, "0 to 64 bytes of content")?;
    Ok(salt)
}
