//! What can fail on an opened GPU.

use cudarc::driver::DriverError;
use thiserror::Error;

use super::compile::CompileError;
use super::open::OpenError;

/// A GPU that could not be opened, a kernel that could not be compiled, or a call that the driver refused.
#[derive(Debug, Error)]
pub enum CudaError {
    /// No such device here.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// No compiler, or a kernel that it refused.
    #[error(transparent)]
    Compile(#[from] CompileError),
    /// An allocation or registration that the driver refused.
    #[error("cuda: {what} of {bytes} bytes ({free} of {total} bytes of the device are free): {source}")]
    Memory {
        /// What was allocated or registered.
        what: &'static str,
        /// How much.
        bytes: usize,
        /// Free memory of the device.
        free: usize,
        /// All memory of the device.
        total: usize,
        /// What the driver said.
        source: DriverError,
    },
    /// More device memory than this process may use.
    #[error("device memory: {wanted} bytes wanted, {used} of {limit} are in use; close sequences, or raise the limit of device bytes")]
    Budget {
        /// Bytes wanted.
        wanted: u64,
        /// Bytes in use.
        used: u64,
        /// The limit.
        limit: u64,
    },
    /// A shape or a number that there is no kernel or no room for.
    #[error("{field}: {value} is outside {low} to {high}")]
    Bound {
        /// What was given.
        field: &'static str,
        /// Value given.
        value: u64,
        /// Least value served.
        low: u64,
        /// Greatest value served.
        high: u64,
    },
    /// A plane that the device does not see in one piece.
    #[error(
        "cuda: layer {layer} of segment {segment} lies in pieces that the device does not see side by side; use segments of at most 1 GiB"
    )]
    Scattered {
        /// Segment.
        segment: u32,
        /// Layer.
        layer: u16,
    },
    /// Rows were asked for before the batch was told where they lie.
    #[error("cuda: the batch was not told where rows lie on the host")]
    NoHostRows,
    /// A capture without a launch.
    #[error("cuda: nothing was captured")]
    NothingCaptured,
    /// Any other call that the driver refused.
    #[error("cuda: {what}: {source}")]
    Driver {
        /// What was done.
        what: &'static str,
        /// What the driver said.
        source: DriverError,
    },
}

impl CudaError {
    /// Whether there was too little memory, so that the same call may succeed once sequences are closed.
    #[must_use]
    pub fn is_exhausted(&self) -> bool {
        matches!(self, Self::Memory { .. } | Self::Budget { .. })
    }
}

/// Says what was being done when the driver refused.
pub trait Doing<T> {
    /// Joins the driver's word with ours.
    ///
    /// # Errors
    /// The same failure.
    fn doing(self, what: &'static str) -> Result<T, CudaError>;
}

impl<T> Doing<T> for Result<T, DriverError> {
    fn doing(self, what: &'static str) -> Result<T, CudaError> {
        self.map_err(|source| CudaError::Driver { what, source })
    }
}
