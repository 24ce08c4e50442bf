//! The engine: one thread that owns models, sequences, leases, chunks and slots.

pub mod config;
pub mod counters;

pub use config::{DecoderDevice, EngineConfig};
pub use counters::Counters;
