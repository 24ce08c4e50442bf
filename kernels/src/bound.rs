//! An argument out of its bound.

use thiserror::Error;

/// Which argument, what it was, and what it may be.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[error("{field}: {value} is outside {low} to {high}")]
pub struct Bound {
    /// Field.
    pub field: &'static str,
    /// Value given.
    pub value: u64,
    /// Least value.
    pub low: u64,
    /// Greatest value.
    pub high: u64,
}
