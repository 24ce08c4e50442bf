//! The Sluice client.
//!
//! A [`Client`] is one connection to a daemon; a [`Session`] is one held sequence. A session is the same to its caller whichever way it is
//! attached ([`Attach`]): by gRPC streams, or directly to the daemon's shared memory. All calls block; a small tokio runtime lives inside,
//! so they must not be made from inside another tokio runtime.
//!
//! The path of a call: `client` opens a `session`, whose `run` keeps account of the rows being given; `stream` sends them over the
//! `decode_stream`, `direct` puts them into shared memory whose descriptors came over the `side_socket`.

mod batch;
mod calibrate;
mod client;
mod config;
mod connection;
mod convert;
mod decode_stream;
mod direct;
mod error;
mod history;
mod local;
mod options;
mod rows;
mod run;
mod session;
mod side_socket;
mod step;
mod stream;

pub use client::{CalibrationInForce, Client};
pub use config::{ClientConfig, Endpoint};
pub use convert::{Model, ModelRegistration, RotaryLayout};
pub use error::ClientError;
pub use history::Truncation;
pub use options::{Attach, OnlineCalibration, OpenOptions};
pub use rows::encode_rows;
pub use session::Session;
/// A held or parked sequence, as the daemon lists it.
pub use sluice_proto::v1::SequenceInfo;
/// What the daemon holds, in numbers.
pub use sluice_proto::v1::StatsResponse as Stats;
pub use step::{AttendMode, BatchStep, LaneSelection, MAX_STEP_QUERIES, RowsWanted, Step, StepOut, StepReport};
