//! What can go wrong between a session and its daemon.

use std::time::Duration;

use sluice_kernels::decoder::StepError;
use sluice_kernels::device::DeviceError;
use sluice_kernels::sequence::SequenceError;
use sluice_kernels::shared::SharedError;
use thiserror::Error;
use tonic::Code;

/// A call that did not succeed. Nothing of a refused call has been stored.
#[derive(Debug, Error)]
pub enum ClientError {
    /// The endpoint is no address.
    #[error("endpoint {text:?}: expected /path, unix:/path or http://host:port")]
    Endpoint {
        /// What was given.
        text: String,
    },
    /// The daemon cannot be reached, after all retries.
    #[error("{call}: daemon unreachable after {attempts} attempts: {message}")]
    Unreachable {
        /// What was attempted.
        call: &'static str,
        /// Attempts made.
        attempts: u32,
        /// The last answer of the transport.
        message: String,
    },
    /// No answer in time.
    #[error("{call}: no answer within {limit:?}")]
    Deadline {
        /// What was attempted.
        call: &'static str,
        /// The bound.
        limit: Duration,
    },
    /// The daemon refused; the message names field, value and bound.
    #[error("{call}: {code:?}: {message}")]
    Refused {
        /// What was attempted.
        call: &'static str,
        /// gRPC status code.
        code: Code,
        /// The daemon's words.
        message: String,
    },
    /// Somebody else holds the sequence now, or nobody: this session cannot go on.
    #[error("sequence {sequence_id}: the lease of generation {generation} has ended ({reason})")]
    LeaseLost {
        /// The sequence.
        sequence_id: u64,
        /// Generation that this session held.
        generation: u64,
        /// How that is known.
        reason: String,
    },
    /// The connection broke while rows of a run were in flight. The session has dropped the run: begin it again.
    #[error("connection lost during a run; the sequence stands at {committed} committed tokens")]
    RunInterrupted {
        /// Committed tokens, [`crate::Session::length`] from now on.
        committed: usize,
    },
    /// The open slots are full and were not sealed in time.
    #[error("open slots: {needed} tokens to append, room for {free} after waiting {waited:?} for the daemon to seal")]
    SlotsFull {
        /// Tokens of the run.
        needed: usize,
        /// Tokens that fit.
        free: usize,
        /// How long was waited.
        waited: Duration,
    },
    /// An argument that cannot be sent.
    #[error("{field}: {value} is outside {bound}")]
    Input {
        /// The argument.
        field: &'static str,
        /// What was given.
        value: String,
        /// What is served.
        bound: String,
    },
    /// This way to attach cannot do it.
    #[error("{what}: only with {needed}")]
    Unsupported {
        /// What was asked for.
        what: &'static str,
        /// The way to attach that it needs.
        needed: &'static str,
    },
    /// The side socket failed.
    #[error("side socket {action}: {source}")]
    SideSocket {
        /// What was attempted.
        action: &'static str,
        /// The answer of the operating system.
        source: std::io::Error,
    },
    /// Daemon and client are of versions that do not understand each other.
    #[error("{what}: {message}")]
    Protocol {
        /// Which message.
        what: &'static str,
        /// What does not fit.
        message: String,
    },
    /// A shared file cannot be used.
    #[error("shared memory: {0}")]
    Shared(#[from] SharedError),
    /// Direct: the sequence refuses; nothing has changed.
    #[error(transparent)]
    Sequence(#[from] SequenceError),
    /// Direct: the step is refused; nothing was computed.
    #[error(transparent)]
    Step(#[from] StepError),
    /// Direct: the device of this process cannot be opened.
    #[error(transparent)]
    Device(#[from] DeviceError),
}

impl ClientError {
    /// The status code of a refusal by the daemon.
    #[must_use]
    pub fn code(&self) -> Option<Code> {
        match self {
            Self::Refused { code, .. } => Some(*code),
            _ => None,
        }
    }

    pub(crate) fn protocol(what: &'static str, message: impl Into<String>) -> Self {
        Self::Protocol { what, message: message.into() }
    }
}

/// Checks that a count is what it has to be.
pub(crate) fn expect_count(field: &'static str, given: usize, expected: usize) -> Result<(), ClientError> {
    if given == expected {
        Ok(())
    } else {
        Err(ClientError::Input { field, value: given.to_string(), bound: format!("{expected}, the count that fits") })
    }
}
