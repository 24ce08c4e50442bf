//! Configuration: defaults < TOML file < environment `SLUICE__SECTION__KEY` < flags. Unknown keys are refused.
//!
//! Two types: [`ConfigFile`] is what may be written, [`Config`] is what the daemon uses, with every bound checked. Nothing below
//! `main` reads the environment; [`load`] does it once.

mod effective;
mod file;
mod units;

use std::path::{Path, PathBuf};

use figment::Figment;
use figment::providers::{Env, Format, Serialized, Toml};
use figment::value::Value;
use thiserror::Error;

pub use effective::{Config, GrpcLimits, Listen};
pub use file::{ArenaSection, ConfigFile, DecodeSection, LimitsSection, ListenSection, LogFormat, LogSection, SealSection};
pub use units::{ByteCount, RatioText};

/// Read when no file is named and this one exists.
pub const SYSTEM_FILE: &str = "/etc/sluice/sluice.toml";

/// Prefix of environment variables; sections and keys follow, separated by two underscores.
pub const ENV_PREFIX: &str = "SLUICE__";

/// Where configuration is read from, beside the environment.
#[derive(Clone, Debug, Default)]
pub struct Sources {
    /// The TOML file; without one [`SYSTEM_FILE`] when it exists.
    pub file: Option<PathBuf>,
    /// Keys (`section.key`) and values given by flags, the last one wins.
    pub flags: Vec<(String, String)>,
}

/// A configuration that cannot be used.
#[derive(Debug, Error)]
pub enum ConfigError {
    /// The named file is not there.
    #[error("configuration file {}: {source}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// Unknown keys, wrong types or malformed TOML.
    #[error("configuration: {0}")]
    Parse(String),
    /// A value out of bounds.
    #[error("configuration: {field}: {value} is outside {bound}")]
    Bound {
        /// `section.key`
        field: &'static str,
        /// Value given.
        value: String,
        /// What is accepted.
        bound: &'static str,
    },
    /// An address that everyone could reach.
    #[error(
        "configuration: {field}: {address} is not a loopback address; without TLS, which does not exist yet, only 127.0.0.0/8 and ::1 are served"
    )]
    NotLoopback {
        /// `section.key`
        field: &'static str,
        /// Address given.
        address: String,
    },
}

/// Reads all sources and checks them.
///
/// # Errors
/// The first source that cannot be read, key that is unknown or value that is out of bounds.
pub fn load(sources: &Sources) -> Result<Config, ConfigError> {
    let mut figment = Figment::from(Serialized::defaults(ConfigFile::default()));
    if let Some(path) = file_of(sources)? {
        figment = figment.merge(Toml::file_exact(path));
    }
    figment = figment.merge(Env::prefixed(ENV_PREFIX).split("__"));
    for (key, value) in &sources.flags {
        // Parsing text into a figment value cannot fail: what is neither number, boolean nor list is a string.
        let value: Value = value.parse().unwrap_or_else(|never: std::convert::Infallible| match never {});
        figment = figment.merge((key, value));
    }
    let file: ConfigFile = figment.extract().map_err(|error| ConfigError::Parse(describe(error)))?;
    file.check()
}

fn file_of(sources: &Sources) -> Result<Option<PathBuf>, ConfigError> {
    let path = match &sources.file {
        Some(path) => path.clone(),
        None if Path::new(SYSTEM_FILE).exists() => PathBuf::from(SYSTEM_FILE),
        None => return Ok(None),
    };
    std::fs::metadata(&path).map_err(|source| ConfigError::File { path: path.clone(), source })?;
    Ok(Some(path))
}

fn describe(error: figment::Error) -> String {
    let one = |error: figment::Error| {
        let key = error.path.join(".");
        let source = match &error.metadata {
            Some(metadata) => match &metadata.source {
                Some(source) => format!(" in {source}"),
                None => format!(" in {}", metadata.name),
            },
            None => String::new(),
        };
        let place = if key.is_empty() { source } else { format!(" at {key}{source}") };
        format!("{}{place}", error.kind)
    };
    error.into_iter().map(one).collect::<Vec<_>>().join("; ")
}
