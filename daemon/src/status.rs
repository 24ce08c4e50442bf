//! The one mapping of refusals to gRPC codes.

use sluice_proto::v1;
use tonic::{Code, Status};

use crate::decode::DecodeError;
use crate::engine::EngineError;
use crate::engine::counters::Refusal;

/// The gRPC code of a refusal.
#[must_use]
pub fn code(refusal: Refusal) -> Code {
    match refusal {
        Refusal::InvalidArgument => Code::InvalidArgument,
        Refusal::NotFound => Code::NotFound,
        Refusal::FailedPrecondition => Code::FailedPrecondition,
        Refusal::AlreadyExists => Code::AlreadyExists,
        Refusal::ResourceExhausted => Code::ResourceExhausted,
        Refusal::PermissionDenied => Code::PermissionDenied,
        Refusal::Unimplemented => Code::Unimplemented,
        Refusal::DeadlineExceeded => Code::DeadlineExceeded,
        Refusal::Unavailable => Code::Unavailable,
        Refusal::Internal => Code::Internal,
    }
}

impl From<EngineError> for Status {
    fn from(error: EngineError) -> Self {
        Self::new(code(error.refusal()), error.to_string())
    }
}

impl From<DecodeError> for Status {
    fn from(error: DecodeError) -> Self {
        Self::new(code(error.refusal()), error.to_string())
    }
}

/// A refusal as it travels inside a stream or over the side socket.
#[must_use]
pub fn wire(refusal: Refusal, message: String) -> v1::Error {
    v1::Error { code: code(refusal) as i32, message }
}
