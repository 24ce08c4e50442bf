//! What the engine refuses, with field, value and bound.

use thiserror::Error;

use crate::engine::config::ConfigError;
use crate::engine::counters::Refusal;

/// A command that was refused. Nothing has changed, except with [`EngineError::Internal`], after which the engine is poisoned.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum EngineError {
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
    /// A field that does not fit the model; the text names it.
    #[error("{0}")]
    Misfit(String),
    /// Nothing of this id.
    #[error("{field}: {value} is not known")]
    NotFound {
        /// Field of the request.
        field: &'static str,
        /// Value given.
        value: u64,
    },
    /// A lease that is not in force any more.
    #[error("generation: {given} of sequence {sequence} is stale, {current} is in force")]
    StaleLease {
        /// Sequence.
        sequence: u64,
        /// Generation given.
        given: u64,
        /// Generation in force.
        current: u64,
    },
    /// The sequence or model is in a state that does not allow this.
    #[error("{what} {id}: {state}; {needed}")]
    State {
        /// `sequence` or `model`.
        what: &'static str,
        /// Its id.
        id: u64,
        /// Its state.
        state: String,
        /// What would be needed.
        needed: &'static str,
    },
    /// Window rows before a position are no longer kept.
    #[error(
        "position: rows before {position} are no longer kept for the sliding window; the nearest positions that work are {below} and {above}"
    )]
    WindowGone {
        /// Position given.
        position: u64,
        /// Nearest position below.
        below: u64,
        /// Nearest position above.
        above: u64,
    },
    /// Registered already, differently.
    #[error("{field}: {value} is registered with another shape")]
    Exists {
        /// Field of the request.
        field: &'static str,
        /// Value given.
        value: String,
    },
    /// A limit of the configuration is reached.
    #[error("{limit}: {wanted} wanted, {available} left; {fix}")]
    Exhausted {
        /// Limit.
        limit: &'static str,
        /// What the command needs.
        wanted: u64,
        /// What is left.
        available: u64,
        /// What to do.
        fix: &'static str,
    },
    /// Somebody else's process.
    #[error("{field}: process {pid} {reason}")]
    Permission {
        /// Field of the request.
        field: &'static str,
        /// Process.
        pid: i64,
        /// Why it is refused.
        reason: &'static str,
    },
    /// Known, but not built.
    #[error("{0}")]
    Unimplemented(String),
    /// The engine is shutting down, or has failed.
    #[error("engine: {0}")]
    Unavailable(&'static str),
    /// A fault of the daemon or its machine.
    #[error("internal: {0}")]
    Internal(String),
}

impl EngineError {
    /// A field out of its bound.
    pub(crate) fn invalid(field: &'static str, value: impl ToString, bound: impl ToString) -> Self {
        Self::Invalid { field, value: value.to_string(), bound: bound.to_string() }
    }

    /// The counter that a refusal belongs to.
    #[must_use]
    pub fn refusal(&self) -> Refusal {
        match self {
            Self::Invalid { .. } | Self::Misfit(_) => Refusal::InvalidArgument,
            Self::NotFound { .. } => Refusal::NotFound,
            Self::StaleLease { .. } | Self::State { .. } | Self::WindowGone { .. } => Refusal::FailedPrecondition,
            Self::Exists { .. } => Refusal::AlreadyExists,
            Self::Exhausted { .. } => Refusal::ResourceExhausted,
            Self::Permission { .. } => Refusal::PermissionDenied,
            Self::Unimplemented(_) => Refusal::Unimplemented,
            Self::Unavailable(_) => Refusal::Unavailable,
            Self::Internal(_) => Refusal::Internal,
        }
    }
}

impl From<sluice_kernels::shared::SharedError> for EngineError {
    fn from(error: sluice_kernels::shared::SharedError) -> Self {
        Self::Internal(error.to_string())
    }
}

impl From<crate::journal::JournalError> for EngineError {
    fn from(error: crate::journal::JournalError) -> Self {
        Self::Internal(error.to_string())
    }
}

impl From<ConfigError> for EngineError {
    fn from(error: ConfigError) -> Self {
        Self::Invalid { field: error.field, value: error.value, bound: error.bound.to_owned() }
    }
}
