//! Which devices there are, and opening one by name.

use std::fmt;
use std::str::FromStr;

use thiserror::Error;

use super::Device;
use super::cpu::Cpu;
use super::reference::Reference;

/// A device that can be asked for. There is no fallback from one to another.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DeviceKind {
    /// The plain reference: one thread, double precision, slow. The oracle of the others.
    Reference,
    /// All cores, with the widest instructions that this CPU has.
    Cpu,
}

impl DeviceKind {
    /// Every kind.
    pub const ALL: [Self; 2] = [Self::Reference, Self::Cpu];
}

impl fmt::Display for DeviceKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Reference => "reference",
            Self::Cpu => "cpu",
        })
    }
}

/// A name that is no device of this build.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum ParseDeviceError {
    /// CUDA devices are known by name, but this build has no driver for them.
    #[error("device {text:?}: looked for the CUDA device, which this build does not contain; served: reference, cpu")]
    Cuda {
        /// What was given.
        text: String,
    },
    /// Not the name of a device.
    #[error("device {text:?}: not one of reference, cpu")]
    Unknown {
        /// What was given.
        text: String,
    },
}

impl FromStr for DeviceKind {
    type Err = ParseDeviceError;

    fn from_str(text: &str) -> Result<Self, ParseDeviceError> {
        match text {
            "reference" => Ok(Self::Reference),
            "cpu" => Ok(Self::Cpu),
            _ if text == "cuda" || text.starts_with("cuda:") => Err(ParseDeviceError::Cuda { text: text.to_owned() }),
            _ => Err(ParseDeviceError::Unknown { text: text.to_owned() }),
        }
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
}

/// Most threads of one device.
pub const MAX_THREADS: usize = 256;

/// Opens a device with `threads` compute threads, the caller's own included. The reference uses one whatever is asked for.
///
/// # Errors
/// A thread count that is out of bounds, or a thread that could not be started.
pub fn open(kind: DeviceKind, threads: usize) -> Result<Box<dyn Device>, DeviceError> {
    if threads == 0 || threads > MAX_THREADS {
        return Err(DeviceError::Threads { threads, max: MAX_THREADS });
    }
    Ok(match kind {
        DeviceKind::Reference => Box::new(Reference),
        DeviceKind::Cpu => Box::new(Cpu::open(threads)?),
    })
}
