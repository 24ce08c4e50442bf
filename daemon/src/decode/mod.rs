//! The decode thread: the daemon's own worker. It holds the sequences of Stream leases with the same types as a direct worker does.

mod error;
mod host;
mod work;

use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;
use std::time::{Duration, Instant};

use crossbeam::channel::{Receiver, RecvTimeoutError, Sender, TrySendError, bounded};
use prost::bytes::Bytes;
use sluice_kernels::decoder::{Decoder, DeviceLimits, LaneRows, StepReport};
use sluice_kernels::sequence::Sequence;
use sluice_kernels::shape::ModelShape;
use tokio::sync::{oneshot, watch};

use crate::engine::command::LeaseKey;
use crate::engine::config::EngineConfig;
use crate::engine::{EngineError, EngineHandle, EngineState};

pub use error::DecodeError;
use host::Hosts;
use work::{Attending, Stored};

/// How often sequences of ended leases are let go of.
const SWEEP: Duration = Duration::from_millis(250);

/// Longest wait for the thread to end: far more than a step takes.
const END_WAIT: Duration = Duration::from_secs(10);

/// How often the engine is told that a lease is used: it matters to leases without a local process only.
const TOUCH: Duration = Duration::from_secs(1);

/// What a step answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Answer {
    /// Output and log-sum-exp by the sequence's settings.
    Sparse,
    /// Output and log-sum-exp over all rows.
    Dense,
    /// Rows and positions of one query.
    Rows,
    /// Nothing.
    Nothing,
}

/// One sequence's part of a Decode message.
#[derive(Clone, Debug)]
pub struct StepWork {
    /// Lease.
    pub lease: LeaseKey,
    /// Layer.
    pub layer: usize,
    /// What to answer.
    pub answer: Answer,
    /// Position of the first token.
    pub first_position: u64,
    /// Tokens; `None`: as many as there are rows.
    pub count: Option<usize>,
    /// f32, `[query][query_head][head_dim]`.
    pub queries: Bytes,
    /// New rows, `[lane][token][row bytes]`; empty: none.
    pub rows: Bytes,
    /// Ids of the new rows' tokens, with layer 0.
    pub token_ids: Vec<u32>,
}

/// What a step did.
#[derive(Clone, Debug, Default)]
pub struct StepDone {
    /// f32, `[query][query_head][head_dim]`.
    pub output: Vec<u8>,
    /// f32, `[query][query_head]`.
    pub log_sum_exp: Vec<u8>,
    /// By lane.
    pub rows: Vec<LaneRows>,
    /// Costs.
    pub report: StepReport,
    /// Tokens committed after it.
    pub committed: u64,
}

/// What the thread can be asked to do.
pub(crate) enum Work {
    Steps(Vec<StepWork>, oneshot::Sender<Vec<Result<StepDone, DecodeError>>>),
    Truncate(LeaseKey, u64, oneshot::Sender<Result<u64, EngineError>>),
}

/// The way to the decode thread; cheap to clone.
#[derive(Clone, Debug)]
pub struct DecodeHandle {
    sender: Sender<Work>,
    device: Arc<str>,
    /// Closed when the thread has let go of the device.
    ended: watch::Receiver<()>,
}

impl DecodeHandle {
    /// Name of the decoder's device.
    #[must_use]
    pub fn device(&self) -> &str {
        &self.device
    }

    /// Waits until the thread, which follows the engine's end, has let go of the device: a GPU's driver must not be taken down before.
    pub(crate) async fn ended(&self) {
        let mut ended = self.ended.clone();
        if tokio::time::timeout(END_WAIT, ended.changed()).await.is_err() {
            tracing::warn!(seconds = END_WAIT.as_secs(), "the decode thread has not ended");
        }
    }

    /// Performs one layer of one step for a batch; each succeeds or is refused on its own.
    ///
    /// # Errors
    /// A full queue, or an engine that is not available.
    pub async fn steps(&self, batch: Vec<StepWork>) -> Result<Vec<Result<StepDone, DecodeError>>, EngineError> {
        let (reply, answer) = oneshot::channel();
        self.submit(Work::Steps(batch, reply))?;
        answer.await.map_err(|_| stopped())
    }

    /// Truncates a sequence, whoever holds it.
    ///
    /// # Errors
    /// As [`EngineHandle::truncate`], or a full queue.
    pub async fn truncate(&self, lease: LeaseKey, position: u64) -> Result<u64, EngineError> {
        let (reply, answer) = oneshot::channel();
        self.submit(Work::Truncate(lease, position, reply))?;
        answer.await.map_err(|_| stopped())?
    }

    fn submit(&self, work: Work) -> Result<(), EngineError> {
        self.sender.try_send(work).map_err(|error| match error {
            TrySendError::Full(_) => {
                let fix = "retry later, or raise decode_queue";
                EngineError::Exhausted { limit: "decode_queue", wanted: 1, available: 0, fix }
            }
            TrySendError::Disconnected(_) => stopped(),
        })
    }
}

fn stopped() -> EngineError {
    EngineError::Unavailable("its decoder has stopped; restart the daemon")
}

/// Starts the decode thread.
///
/// # Errors
/// The device cannot be opened.
pub fn start(engine: EngineHandle) -> Result<DecodeHandle, EngineError> {
    let config = Arc::clone(engine.config());
    let device = open_device(&config)?;
    let (sender, receiver) = bounded(config.decode_queue);
    let name = Arc::from(device.name());
    let mut thread = DecodeThread {
        decoder: Decoder::new(device).with_limits(DeviceLimits { device_bytes: config.device_bytes, hot_rows: 0 }),
        hosts: Hosts::new(engine.clone()),
        touched: HashMap::new(),
        cold: BTreeSet::new(),
        message_bytes_max: config.message_bytes_max,
        engine,
    };
    let (alive, ended) = watch::channel(());
    let spawned = std::thread::Builder::new().name("sluice-decode".to_owned()).spawn(move || {
        thread.run(&receiver);
        drop(thread);
        drop(alive);
        // Work that was sent while it ended is let go of, so that its callers learn of it; a channel keeps it otherwise.
        receiver.iter().for_each(drop);
    });
    spawned.map_err(|error| EngineError::Internal(format!("start the decode thread: {error}")))?;
    Ok(DecodeHandle { sender, device: name, ended })
}

fn open_device(config: &EngineConfig) -> Result<Box<dyn sluice_kernels::device::Device>, EngineError> {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let threads = if config.device_threads == 0 { cores } else { config.device_threads };
    sluice_kernels::device::open(config.device, threads)
        .map_err(|error| EngineError::invalid("decode.device", config.device, format!("the devices of this machine ({error})")))
}

/// State of the thread.
struct DecodeThread {
    engine: EngineHandle,
    message_bytes_max: usize,
    decoder: Decoder,
    hosts: Hosts,
    /// When the engine was last told that a lease is used.
    touched: HashMap<LeaseKey, Instant>,
    /// Layers that a prompt has grown and no step has selected from since: warmed up while nothing else is to be done.
    cold: BTreeSet<(LeaseKey, usize)>,
}

impl DecodeThread {
    fn run(&mut self, work: &Receiver<Work>) {
        let mut next_sweep = Instant::now() + SWEEP;
        loop {
            let wait = if self.cold.is_empty() { next_sweep.saturating_duration_since(Instant::now()) } else { Duration::ZERO };
            match work.recv_timeout(wait) {
                Ok(work) => self.perform(work),
                Err(RecvTimeoutError::Timeout) => self.warm_up(),
                Err(RecvTimeoutError::Disconnected) => return,
            }
            if next_sweep <= Instant::now() {
                next_sweep = Instant::now() + SWEEP;
                self.hosts.sweep();
                self.decoder.sweep();
                self.count_device_bytes();
                self.touched.retain(|_, at| at.elapsed() <= TOUCH);
                if *self.engine.state().borrow() != EngineState::Ready {
                    return;
                }
            }
        }
    }

    fn perform(&mut self, work: Work) {
        match work {
            Work::Steps(batch, reply) => {
                // Nobody waits for it any more (deadline, lost connection): nothing of it is stored.
                if reply.is_closed() {
                    return;
                }
                let _ = reply.send(self.steps(&batch));
            }
            Work::Truncate(lease, position, reply) => {
                let _ = reply.send(self.truncate(lease, position));
            }
        }
    }

    /// Performs the steps of a message: those of one layer together, but for those of one sequence, which follow one another.
    fn steps(&mut self, batch: &[StepWork]) -> Vec<Result<StepDone, DecodeError>> {
        let mut results = Vec::with_capacity(batch.len());
        let mut shape = None;
        while results.len() < batch.len() {
            let rest = &batch[results.len()..];
            let alike =
                |index: usize| rest[index].layer == rest[0].layer && rest[..index].iter().all(|before| before.lease != rest[index].lease);
            let together = (0..rest.len()).take_while(|&index| alike(index)).count();
            results.extend(self.steps_together(&rest[..together], &mut shape));
        }
        results
    }

    /// Performs steps of one layer of different sequences; `batch` is the shape of the first sequence of the message, which tells its model.
    fn steps_together(&mut self, steps: &[StepWork], batch: &mut Option<Arc<ModelShape>>) -> Vec<Result<StepDone, DecodeError>> {
        let (begin, together) = (Instant::now(), steps.len().max(1) as u32);
        let mut stored: Vec<Result<(Sequence, Stored), DecodeError>> = steps.iter().map(|step| self.store(step, batch)).collect();
        let mut attending: Vec<Attending<'_>> = Vec::new();
        for (step, stored) in steps.iter().zip(&mut stored) {
            if let Ok((sequence, stored)) = stored {
                attending.push(Attending { step, sequence, stored });
            }
        }
        let layer = steps.first().map_or(0, |step| step.layer);
        let mut attended = work::attend(&mut self.decoder, layer, &mut attending).into_iter();
        let finish = |(step, stored): (&StepWork, Result<(Sequence, Stored), DecodeError>)| {
            let (mut sequence, _) = stored?;
            match step.answer {
                Answer::Dense | Answer::Nothing => self.cold.insert((step.lease, step.layer)),
                Answer::Sparse | Answer::Rows => self.cold.remove(&(step.lease, step.layer)),
            };
            // Committed after the step, which has marked how the rows came to be: the engine may seal from here on.
            let committed = sequence.commit() as u64;
            self.hosts.put(step.lease, sequence);
            // There is an answer for each that was stored.
            let done = StepDone { committed, ..attended.next().unwrap_or_else(|| Ok(StepDone::default()))? };
            if step.answer != Answer::Nothing {
                // Those who step together have equal shares of the time.
                self.count(&done.report, begin.elapsed() / together);
            }
            Ok(done)
        };
        steps.iter().zip(stored).map(finish).collect()
    }

    /// Warms up a piece of one layer.
    fn warm_up(&mut self) {
        let Some((lease, layer)) = self.cold.pop_first() else { return };
        if self.hosts.hosted(lease).is_none() {
            return;
        }
        let warmed = self.hosts.sequence(lease).and_then(|sequence| Ok(self.decoder.warm_up(layer, sequence)?));
        match warmed {
            Ok(warmed) => {
                self.engine.counters().warmed_rows.add(warmed.fetched_rows);
                if !warmed.is_done {
                    self.cold.insert((lease, layer));
                }
            }
            // The step that comes says it to whoever asks.
            Err(error) => tracing::debug!(sequence = lease.sequence, layer, %error, "not warmed up"),
        }
    }

    /// Takes a step's sequence and stores the new rows.
    fn store(&mut self, step: &StepWork, batch: &mut Option<Arc<ModelShape>>) -> Result<(Sequence, Stored), DecodeError> {
        if self.touched.get(&step.lease).is_none_or(|at| at.elapsed() > TOUCH) {
            self.touched.insert(step.lease, Instant::now());
            self.engine.touch(step.lease);
        }
        let is_new = self.hosts.hosted(step.lease).is_none();
        let sequence = self.hosts.sequence(step.lease)?;
        if is_new {
            // What was stored before, a resumed sequence or a known prefix, comes to the device while the client works on other layers.
            self.cold.extend((0..sequence.shape().layers.len()).map(|layer| (step.lease, layer)));
        }
        // The engine has one shape for each model.
        if !Arc::ptr_eq(batch.get_or_insert_with(|| Arc::clone(sequence.shape())), sequence.shape()) {
            let bound = "sequences of one model";
            return Err(DecodeError::invalid("steps.lease.sequence_id", step.lease.sequence, bound));
        }
        let stored = work::store(sequence, step, self.message_bytes_max)?;
        let sequence = self.hosts.take(step.lease).ok_or(EngineError::Unavailable("the sequence is gone"))?;
        Ok((sequence, stored))
    }

    fn count(&self, report: &StepReport, elapsed: Duration) {
        let counters = self.engine.counters();
        counters.step.observe(elapsed);
        if report.fused.is_zero() {
            counters.step_score.observe(report.score);
            counters.step_select.observe(report.select);
            counters.step_gather.observe(report.gather);
            counters.step_attend.observe(report.attend);
        } else {
            counters.step_fused.observe(report.fused);
        }
        counters.selected_rows.add(report.selected_rows);
        counters.hot_hits.add(report.hot_rows);
        counters.hot_misses.add(report.selected_rows - report.hot_rows);
        counters.row_bytes_read.add(report.row_bytes);
        counters.label_bytes_read.add(report.label_bytes);
        counters.label_bytes_shared.add(report.shared_label_bytes);
    }

    fn count_device_bytes(&self) {
        let (counters, bytes) = (self.engine.counters(), self.decoder.device_bytes());
        counters.device_label_bytes.set(bytes.labels);
        counters.device_hot_bytes.set(bytes.hot_rows);
        counters.device_map_bytes.set(bytes.maps);
        counters.device_tail_bytes.set(bytes.tail);
        counters.device_workspace_bytes.set(bytes.workspace);
    }

    /// The holder of a Stream lease is this thread: it lowers the committed word first, as every holder must.
    fn truncate(&mut self, lease: LeaseKey, position: u64) -> Result<u64, EngineError> {
        let Some(sequence) = self.hosts.hosted(lease) else { return self.engine.truncate_blocking(lease, position) };
        if let Err(error) = sequence.begin_truncate(position as usize) {
            return Err(EngineError::Misfit(error.to_string()));
        }
        let result = self.engine.truncate_blocking(lease, position);
        let Some(sequence) = self.hosts.hosted(lease) else { return result };
        match result {
            Ok(committed) => sequence.truncated(committed as usize),
            Err(_) => sequence.abort_truncate(),
        }
        result
    }
}
