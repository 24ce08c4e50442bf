//! The engine: one thread that owns models, sequences, leases, chunks and slots.
//!
//! A command is carried out by one of the files named after it; what it changes goes to the journal, then to boards and the seal pool
//! (`state`), then the answer is sent. Nothing here touches a row: rows are copied, checked and labelled by jobs of the pool.

mod allocate;
pub mod arena;
mod calibrate;
pub mod chunk;
pub mod command;
pub mod config;
mod copy;
pub mod counters;
mod direct;
mod ends;
pub mod error;
pub mod handle;
mod idle;
pub mod lease;
mod lifecycle;
pub mod limbo;
pub mod model;
pub mod name;
mod open;
mod recover;
mod run;
mod sealing;
pub mod sequence;
mod spare;
mod state;
mod stats;
mod tick;
mod verify;
mod window;

use std::sync::Arc;

pub use config::EngineConfig;
pub use counters::Counters;
pub use error::EngineError;
pub use handle::{EngineHandle, EngineState};

/// The engine's entry.
#[derive(Debug)]
pub struct Engine;

impl Engine {
    /// Opens the arena folder, takes up what is there and starts the engine's threads. Blocks while files are mapped.
    ///
    /// # Errors
    /// A configuration that cannot work, an arena folder in use, too little room, a damaged journal.
    pub fn start(config: EngineConfig, counters: Arc<Counters>) -> Result<EngineHandle, EngineError> {
        run::start(config, counters)
    }
}
