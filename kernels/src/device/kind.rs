//! Which devices there are, and opening one by name.

use std::fmt;
use std::str::FromStr;

use thiserror::Error;

use super::Device;
use super::cpu::Cpu;
use super::cuda::{Cuda, CudaError};
use super::reference::Reference;

/// A device that can be asked for. There is no fallback from one to another. In files it is its name: `reference`, `cpu`, `cuda:0`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum DeviceKind {
    /// The plain reference: one thread, double precision, slow. The oracle of the others.
    Reference,
    /// All cores, with the widest instructions that this CPU has.
    Cpu,
    /// A GPU, by its number among those that the driver shows.
    Cuda {
        /// The number.
        ordinal: u32,
    },
}

impl DeviceKind {
    /// The kinds that every machine has.
    pub const EVERYWHERE: [Self; 2] = [Self::Reference, Self::Cpu];
}

impl fmt::Display for DeviceKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Reference => f.write_str("reference"),
            Self::Cpu => f.write_str("cpu"),
            Self::Cuda { ordinal } => write!(f, "cuda:{ordinal}"),
        }
    }
}

impl From<DeviceKind> for String {
    fn from(kind: DeviceKind) -> Self {
        kind.to_string()
    }
}

/// A name that is no device.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error("device {text:?}: not one of reference, cpu, cuda, cuda:N (N from 0 on)")]
pub struct ParseDeviceError {
    /// What was given.
    pub text: String,
}

impl FromStr for DeviceKind {
    type Err = ParseDeviceError;

    fn from_str(text: &str) -> Result<Self, ParseDeviceError> {
        let unknown = || ParseDeviceError { text: text.to_owned() };
        match text {
            "reference" => Ok(Self::Reference),
            "cpu" => Ok(Self::Cpu),
            "cuda" => Ok(Self::Cuda { ordinal: 0 }),
            _ => {
                let digits = text.strip_prefix("cuda:").filter(|digits| digits.bytes().all(|byte| byte.is_ascii_digit()));
                let ordinal = digits.and_then(|digits| digits.parse().ok()).ok_or_else(unknown)?;
                Ok(Self::Cuda { ordinal })
            }
        }
    }
}

impl TryFrom<String> for DeviceKind {
    type Error = ParseDeviceError;

    fn try_from(text: String) -> Result<Self, ParseDeviceError> {
        text.parse()
    }
}

/// A device that could not be opened.
#[derive(Debug, Error)]
pub enum DeviceError {
    /// No thread, or more than the bound.
    #[error("device threads: {threads} is outside 1 to {max}")]
    Threads {
        /// Value given.
        threads: usize,
        /// The bound.
        max: usize,
    },
    /// The operating system refused a thread.
    #[error("device threads: starting thread {index} of {threads}: {source}")]
    Spawn {
        /// The thread that could not be started.
        index: usize,
        /// Threads wanted.
        threads: usize,
        /// What the operating system said.
        source: std::io::Error,
    },
    /// A GPU that is not here, or cannot be used.
    #[error("device {kind}: {source}")]
    Cuda {
        /// The device asked for.
        kind: DeviceKind,
        /// What is missing, and what was looked for.
        source: Box<CudaError>,
    },
}

/// Most threads of one device.
pub const MAX_THREADS: usize = 256;

/// Opens a device with `threads` compute threads, the caller's own included. The reference and a GPU use one whatever is asked for.
///
/// # Errors
/// A thread count that is out of bounds, a thread that could not be started, or a GPU that is not here.
pub fn open(kind: DeviceKind, threads: usize) -> Result<Box<dyn Device>, DeviceError> {
    if threads == 0 || threads > MAX_THREADS {
        return Err(DeviceError::Threads { threads, max: MAX_THREADS });
    }
    Ok(match kind {
        DeviceKind::Reference => Box::new(Reference),
        DeviceKind::Cpu => Box::new(Cpu::open(threads)?),
        DeviceKind::Cuda { ordinal } => Box::new(Cuda::open(ordinal).map_err(|error| DeviceError::Cuda { kind, source: Box::new(error) })?),
    })
}
