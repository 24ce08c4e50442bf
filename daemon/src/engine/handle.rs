//! The engine's door: typed async calls through a bounded channel.

use std::sync::Arc;

use crossbeam::channel::{Sender, TrySendError};
use sluice_kernels::label::Calibration;
use tokio::sync::{oneshot, watch};

use crate::decode::DecodeHandle;
use crate::engine::command::{
    Attach, Attached, CalibrationInForce, Command, EngineStats, Fork, HolderFiles, HolderSegment, LeaseKey, Open, Opened, Peer,
    RegisterModel, Registered, Reply, SequenceInfo,
};
use crate::engine::config::EngineConfig;
use crate::engine::counters::Counters;
use crate::engine::error::EngineError;

/// Whether the engine can be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EngineState {
    /// It serves.
    Ready,
    /// A thread of it panicked or the journal failed: restart the daemon.
    Poisoned,
    /// It was stopped.
    Stopped,
}

/// A handle to the engine; cheap to clone.
#[derive(Clone, Debug)]
pub struct EngineHandle {
    pub(crate) commands: Sender<Command>,
    pub(crate) state: watch::Receiver<EngineState>,
    pub(crate) boot_epoch: u64,
    pub(crate) counters: Arc<Counters>,
    pub(crate) config: Arc<EngineConfig>,
    /// The decode thread; `None` in the handle that the daemon's own threads use.
    pub(crate) decoder: Option<DecodeHandle>,
    /// Stops the engine when the last handle outside the daemon's own threads is gone.
    #[expect(dead_code, reason = "it is there to be dropped")]
    pub(crate) keeper: Option<Arc<Keeper>>,
}

/// Stops the engine when it is dropped.
#[derive(Debug)]
pub(crate) struct Keeper(pub(crate) Sender<Command>);

impl Drop for Keeper {
    fn drop(&mut self) {
        let (reply, _) = oneshot::channel();
        // A full queue belongs to callers that are gone as well: waiting for room is short.
        let _ = self.0.send_timeout(Command::Stop(reply), std::time::Duration::from_secs(1));
    }
}

impl EngineHandle {
    /// Random number of this start of the daemon.
    #[must_use]
    pub fn boot_epoch(&self) -> u64 {
        self.boot_epoch
    }

    /// The daemon's counters.
    #[must_use]
    pub fn counters(&self) -> &Arc<Counters> {
        &self.counters
    }

    /// The configuration in force.
    #[must_use]
    pub fn config(&self) -> &Arc<EngineConfig> {
        &self.config
    }

    /// The decode thread, for Stream clients.
    ///
    /// # Errors
    /// Asked on a handle of the daemon's own threads.
    pub fn decoder(&self) -> Result<&DecodeHandle, EngineError> {
        self.decoder.as_ref().ok_or(EngineError::Unavailable("has no decoder"))
    }

    /// Changes of the engine's state, for health.
    #[must_use]
    pub fn state(&self) -> watch::Receiver<EngineState> {
        self.state.clone()
    }

    /// Registers a model.
    ///
    /// # Errors
    /// A shape or calibration that does not fit, another shape under the same name, too many models.
    pub async fn register_model(&self, request: RegisterModel) -> Result<Registered, EngineError> {
        self.call(|reply| Command::RegisterModel(request, reply)).await
    }

    /// Removes a model and its chunks; answers with the bytes that were freed.
    ///
    /// # Errors
    /// Unknown, or sequences of it are held.
    pub async fn unregister_model(&self, model: u64) -> Result<u64, EngineError> {
        self.call(|reply| Command::UnregisterModel(model, reply)).await
    }

    /// Sets the calibration of a model that has none, and waits until every sealed chunk is labelled.
    ///
    /// # Errors
    /// Unknown model, a calibration that does not fit.
    pub async fn set_calibration(&self, model: u64, json: Vec<u8>) -> Result<CalibrationInForce, EngineError> {
        self.call(|reply| Command::SetCalibration(model, json, reply)).await
    }

    /// Opens or resumes a sequence.
    ///
    /// # Errors
    /// A field out of bounds, unknown model or sequence, limits reached.
    pub async fn open(&self, request: Open) -> Result<Opened, EngineError> {
        self.call(|reply| Command::Open(request, reply)).await
    }

    /// Forks a sequence.
    ///
    /// # Errors
    /// Stale lease, position out of bounds or without window rows, limits reached.
    pub async fn fork(&self, request: Fork) -> Result<Opened, EngineError> {
        self.call(|reply| Command::Fork(request, reply)).await
    }

    /// Drops the tokens from `position` on; the holder has lowered its committed word. Answers with the committed tokens.
    ///
    /// # Errors
    /// Stale lease, position above what is committed or without window rows.
    pub async fn truncate(&self, lease: LeaseKey, position: u64) -> Result<u64, EngineError> {
        self.call(|reply| Command::Truncate(lease, position, reply)).await
    }

    /// Ends a lease.
    ///
    /// # Errors
    /// Stale lease.
    pub async fn close(&self, lease: LeaseKey) -> Result<(), EngineError> {
        self.call(|reply| Command::Close(lease, reply)).await
    }

    /// Stores opaque state for whoever resumes a sequence that the daemon decodes for.
    ///
    /// # Errors
    /// Stale lease, too many bytes, a sequence that was attached directly.
    pub async fn store_opaque(&self, lease: LeaseKey, state: Vec<u8>) -> Result<(), EngineError> {
        self.call(|reply| Command::StoreOpaque(lease, state, reply)).await
    }

    /// Held and parked sequences.
    ///
    /// # Errors
    /// The engine is not available.
    pub async fn list(&self, model: Option<u64>) -> Result<Vec<SequenceInfo>, EngineError> {
        self.call(|reply| Command::List(model, reply)).await
    }

    /// What the engine holds.
    ///
    /// # Errors
    /// The engine is not available.
    pub async fn stats(&self) -> Result<EngineStats, EngineError> {
        self.call(Command::Stats).await
    }

    /// Makes a ticket for direct access.
    ///
    /// # Errors
    /// Stale lease, lanes out of bounds or taken, a sequence that the daemon decodes for.
    pub async fn attach(&self, request: Attach) -> Result<Attached, EngineError> {
        self.call(|reply| Command::Attach(request, reply)).await
    }

    /// Calibration in force for a sequence.
    ///
    /// # Errors
    /// Stale lease.
    pub async fn calibration_of(&self, lease: LeaseKey) -> Result<Option<Arc<Calibration>>, EngineError> {
        self.call(|reply| Command::CalibrationOf(lease, reply)).await
    }

    /// Tells that a lease was used. Best effort: a full queue loses it, and the next use tells again.
    pub fn touch(&self, lease: LeaseKey) {
        let _ = self.commands.try_send(Command::Touch(lease));
    }

    /// Redeems an attach ticket. Blocks: for threads outside the runtime.
    ///
    /// # Errors
    /// Unknown or expired ticket, another user's process.
    pub fn redeem_blocking(&self, ticket: [u8; 16], peer: Peer) -> Result<HolderFiles, EngineError> {
        self.call_blocking(|reply| Command::Redeem(ticket, peer, reply))
    }

    /// Files of a sequence for the daemon's own decoder. Blocks.
    ///
    /// # Errors
    /// Stale lease, a sequence that was attached directly.
    pub fn host_blocking(&self, lease: LeaseKey) -> Result<HolderFiles, EngineError> {
        self.call_blocking(|reply| Command::Host(lease, reply))
    }

    /// A segment for a holder. Blocks.
    ///
    /// # Errors
    /// Stale lease, a segment that is not the sequence's model's.
    pub fn segment_blocking(&self, lease: LeaseKey, segment: u32) -> Result<HolderSegment, EngineError> {
        self.call_blocking(|reply| Command::Segment(lease, segment, reply))
    }

    /// As [`EngineHandle::truncate`]. Blocks.
    ///
    /// # Errors
    /// As [`EngineHandle::truncate`].
    pub fn truncate_blocking(&self, lease: LeaseKey, position: u64) -> Result<u64, EngineError> {
        self.call_blocking(|reply| Command::Truncate(lease, position, reply))
    }

    /// Calibration in force for a sequence. Blocks.
    ///
    /// # Errors
    /// Stale lease.
    pub fn calibration_blocking(&self, lease: LeaseKey) -> Result<Option<Arc<Calibration>>, EngineError> {
        self.call_blocking(|reply| Command::CalibrationOf(lease, reply))
    }

    /// Stops the engine: files and journal stay, for the next start to take up.
    ///
    /// # Errors
    /// It has stopped already or is poisoned.
    pub async fn shutdown(&self) -> Result<(), EngineError> {
        let stopped = self.call(Command::Stop).await;
        if let Some(decoder) = &self.decoder {
            decoder.ended().await;
        }
        stopped
    }

    /// Makes the engine panic, to test its supervision.
    #[doc(hidden)]
    pub fn panic_for_test(&self) {
        let _ = self.commands.try_send(Command::Panic);
    }

    async fn call<T>(&self, command: impl FnOnce(Reply<T>) -> Command) -> Result<T, EngineError> {
        let (reply, answer) = oneshot::channel();
        let result = match self.submit(command(reply)) {
            Ok(()) => answer.await.unwrap_or_else(|_| Err(self.unavailable())),
            Err(error) => Err(error),
        };
        self.counted(result)
    }

    fn call_blocking<T>(&self, command: impl FnOnce(Reply<T>) -> Command) -> Result<T, EngineError> {
        let (reply, answer) = oneshot::channel();
        let result = match self.submit(command(reply)) {
            Ok(()) => answer.blocking_recv().unwrap_or_else(|_| Err(self.unavailable())),
            Err(error) => Err(error),
        };
        self.counted(result)
    }

    fn submit(&self, command: Command) -> Result<(), EngineError> {
        self.commands.try_send(command).map_err(|error| match error {
            TrySendError::Full(_) => {
                let fix = "retry later, or raise command_queue";
                EngineError::Exhausted { limit: "command_queue", wanted: 1, available: 0, fix }
            }
            TrySendError::Disconnected(_) => self.unavailable(),
        })
    }

    fn unavailable(&self) -> EngineError {
        match *self.state.borrow() {
            EngineState::Stopped => EngineError::Unavailable("shutting down"),
            EngineState::Ready | EngineState::Poisoned => EngineError::Unavailable("failed and must be restarted; decoding leases go on"),
        }
    }

    fn counted<T>(&self, result: Result<T, EngineError>) -> Result<T, EngineError> {
        if let Err(error) = &result {
            self.counters.refused(error.refusal()).add(1);
        }
        result
    }
}
