//! Flags that name configuration, shared by the commands that read it.

use std::path::PathBuf;

use clap::Args;

use crate::config::{self, Config, ConfigError, Sources};

/// Flags that win over every other source of configuration.
#[derive(Args, Debug, Default)]
#[command(next_help_heading = "Configuration (defaults < file < environment SLUICE__SECTION__KEY < flags)")]
pub struct ConfigOptions {
    /// TOML file [default: /etc/sluice/sluice.toml when it exists].
    #[arg(long, value_name = "PATH", env = "SLUICE_CONFIG")]
    config: Option<PathBuf>,
    /// Any key; may be repeated. `sluice config` lists all keys.
    #[arg(long, value_name = "SECTION.KEY=VALUE", value_parser = key_and_value)]
    set: Vec<(String, String)>,
    /// Unix socket of the gRPC service (listen.socket).
    #[arg(long, value_name = "PATH")]
    socket: Option<String>,
    /// gRPC over TCP on loopback, or off (listen.tcp).
    #[arg(long, value_name = "ADDRESS:PORT|off")]
    tcp: Option<String>,
    /// Metrics and health over HTTP on loopback, or off (listen.http).
    #[arg(long, value_name = "ADDRESS:PORT|off")]
    http: Option<String>,
    /// Folder of the arena on a tmpfs (arena.folder).
    #[arg(long, value_name = "PATH")]
    arena: Option<String>,
    /// Bytes of rows that sealed chunks may take, such as 8GiB (arena.capacity_bytes).
    #[arg(long, value_name = "BYTES")]
    arena_bytes: Option<String>,
    /// Device of the daemon's own decoder: cpu, cuda:N or reference (decode.device).
    #[arg(long, value_name = "DEVICE")]
    device: Option<String>,
    /// Threads of the cpu device, 0 for all cores (decode.threads).
    #[arg(long, value_name = "COUNT")]
    threads: Option<String>,
    /// Log format on stderr: text or json (log.format).
    #[arg(long, value_name = "FORMAT")]
    log_format: Option<String>,
    /// Log filter such as info or warn,sluice_daemon=debug (log.filter).
    #[arg(long, value_name = "FILTER")]
    log: Option<String>,
}

impl ConfigOptions {
    /// The configuration from all sources.
    ///
    /// # Errors
    /// As [`config::load`].
    pub fn load(&self) -> Result<Config, ConfigError> {
        let named = [
            ("listen.socket", &self.socket),
            ("listen.tcp", &self.tcp),
            ("listen.http", &self.http),
            ("arena.folder", &self.arena),
            ("arena.capacity_bytes", &self.arena_bytes),
            ("decode.device", &self.device),
            ("decode.threads", &self.threads),
            ("log.format", &self.log_format),
            ("log.filter", &self.log),
        ];
        let named = named.into_iter().filter_map(|(key, value)| Some((key.to_owned(), value.clone()?)));
        config::load(&Sources { file: self.config.clone(), flags: self.set.iter().cloned().chain(named).collect() })
    }
}

fn key_and_value(text: &str) -> Result<(String, String), String> {
    let (key, value) = text.split_once('=').ok_or_else(|| format!("{text:?} has no `=`; write section.key=value"))?;
    if !key.contains('.') {
        return Err(format!("{key:?} names no section; write section.key=value"));
    }
    Ok((key.to_owned(), value.to_owned()))
}
