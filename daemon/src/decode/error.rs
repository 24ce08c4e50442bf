//! What the decode thread refuses.

use sluice_kernels::decoder::StepError;
use sluice_kernels::sequence::SequenceError;
use thiserror::Error;

use crate::engine::EngineError;
use crate::engine::counters::Refusal;

/// A step that was refused; nothing of it was stored.
#[derive(Debug, Error)]
pub enum DecodeError {
    /// The engine refuses.
    #[error(transparent)]
    Engine(#[from] EngineError),
    /// The sequence refuses.
    #[error(transparent)]
    Sequence(#[from] SequenceError),
    /// The decoder refuses.
    #[error(transparent)]
    Step(#[from] StepError),
    /// A field out of its bound.
    #[error("{field}: {value} is outside {bound}")]
    Invalid {
        /// Field of the request.
        field: &'static str,
        /// Value given.
        value: String,
        /// What is accepted.
        bound: String,
    },
}

impl DecodeError {
    /// A field out of its bound.
    pub(crate) fn invalid(field: &'static str, value: impl ToString, bound: impl ToString) -> Self {
        Self::Invalid { field, value: value.to_string(), bound: bound.to_string() }
    }

    /// The counter that a refusal belongs to.
    #[must_use]
    pub fn refusal(&self) -> Refusal {
        match self {
            Self::Engine(error) => error.refusal(),
            Self::Sequence(error) | Self::Step(StepError::Sequence(error)) => of_sequence(error),
            Self::Step(StepError::Device(error)) if error.is_exhausted() => Refusal::ResourceExhausted,
            Self::Step(StepError::Device(_)) => Refusal::Internal,
            Self::Step(_) | Self::Invalid { .. } => Refusal::InvalidArgument,
        }
    }

    /// Whether the open slots are full, which passes once the daemon has sealed a chunk.
    #[must_use]
    pub fn is_full(&self) -> bool {
        matches!(self, Self::Sequence(SequenceError::OpenSlotsFull { .. }))
    }
}

fn of_sequence(error: &SequenceError) -> Refusal {
    match error {
        SequenceError::OpenSlotsFull { .. } => Refusal::ResourceExhausted,
        SequenceError::WindowGone { .. } | SequenceError::Lease(_) => Refusal::FailedPrecondition,
        SequenceError::SegmentMissing { .. } | SequenceError::Shared(_) | SequenceError::Calibration(_) => Refusal::Internal,
        _ => Refusal::InvalidArgument,
    }
}
