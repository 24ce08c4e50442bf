//! The engine thread: commands and job results in, one at a time; a round of its own when one is due.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Instant;

use crossbeam::channel::{Receiver, Sender, bounded, select};
use tokio::sync::{oneshot, watch};

use sluice_kernels::device::DeviceKind;

use crate::engine::command::{Command, RegisterModel, Registered, Reply};
use crate::engine::config::EngineConfig;
use crate::engine::counters::Counters;
use crate::engine::error::EngineError;
use crate::engine::handle::{EngineHandle, EngineState, Keeper};
use crate::engine::spare;
use crate::engine::state::{Engine, Outcome, Queues, Until};
use crate::journal::JournalError;
use crate::seal::{Job, JobResult, Worker, serve};

/// Jobs and results that may be under way.
const JOB_QUEUE: usize = 1 << 12;
/// Commands carried out before waiting ones are looked at again.
const COMMANDS_A_TURN: usize = 64;

/// Why the engine thread ended.
enum End {
    Stopped(Reply<()>),
    Abandoned,
}

/// Something that no command can cause.
#[derive(Debug, thiserror::Error)]
enum Fault {
    #[error(transparent)]
    Journal(#[from] JournalError),
    #[error("a thread of the seal pool panicked")]
    Pool,
}

/// Opens the arena folder, takes up what is there and starts the engine's threads. Blocks while files are mapped.
///
/// # Errors
/// A configuration that cannot work, an arena folder in use, too little room, a damaged journal.
pub(super) fn start(config: EngineConfig, counters: Arc<Counters>) -> Result<EngineHandle, EngineError> {
    let (job_sender, job_receiver) = bounded(JOB_QUEUE);
    let (maker_sender, maker_receiver) = bounded(JOB_QUEUE);
    let (result_sender, result_receiver) = bounded(JOB_QUEUE);
    let (spare_sender, spare_receiver) = bounded(JOB_QUEUE);
    let queues = Queues { jobs: job_sender, makers: maker_sender, spares: spare_sender };
    let engine = Engine::recover(config, Arc::clone(&counters), queues)?;
    let config = Arc::clone(&engine.config);
    let mut pool = Vec::new();
    for index in 0..config.seal_threads {
        pool.push(start_worker(&format!("sluice-seal-{index}"), &config, &counters, &job_receiver, &result_sender)?);
    }
    pool.push(start_worker("sluice-maker", &config, &counters, &maker_receiver, &result_sender)?);
    pool.push(start_worker(spare::THREAD, &config, &counters, &spare_receiver, &result_sender)?);
    let (commands, command_receiver) = bounded(config.command_queue);
    let (state_sender, state) = watch::channel(EngineState::Ready);
    let boot_epoch = engine.boot_epoch;
    let run = move || {
        supervise(engine, &command_receiver, &result_receiver, pool, &state_sender);
        // Commands that were sent while it ended are let go of, so that their callers learn of it; a channel keeps them otherwise.
        command_receiver.iter().for_each(drop);
    };
    spawn("sluice-engine", run)?;
    let inner = EngineHandle { commands, state, boot_epoch, counters, config, decoder: None, keeper: None };
    let keeper = Some(Arc::new(Keeper(inner.commands.clone())));
    let decoder = Some(crate::decode::start(inner.clone())?);
    crate::attach::start(inner.clone())?;
    Ok(EngineHandle { decoder, keeper, ..inner })
}

fn start_worker(
    name: &str,
    config: &EngineConfig,
    counters: &Arc<Counters>,
    jobs: &Receiver<Job>,
    results: &Sender<JobResult>,
) -> Result<JoinHandle<()>, EngineError> {
    // Labels have the same bits on every device; chunks lie in host memory, so a GPU's are made by the processor too.
    let kind = match config.device {
        DeviceKind::Reference => DeviceKind::Reference,
        DeviceKind::Cpu | DeviceKind::Cuda { .. } => DeviceKind::Cpu,
    };
    let device = sluice_kernels::device::open(kind, 1).map_err(|error| EngineError::Internal(error.to_string()))?;
    let worker = Worker { device, counters: Arc::clone(counters), scratch: Vec::new() };
    let (jobs, results) = (jobs.clone(), results.clone());
    let is_spare = name == spare::THREAD;
    spawn(name, move || {
        if is_spare {
            spare::step_back();
        }
        serve(worker, &jobs, &results);
    })
}

fn spawn(name: &str, run: impl FnOnce() + Send + 'static) -> Result<JoinHandle<()>, EngineError> {
    let thread = std::thread::Builder::new().name(name.to_owned()).spawn(run);
    thread.map_err(|error| EngineError::Internal(format!("start thread {name}: {error}")))
}

fn supervise(
    engine: Engine,
    commands: &Receiver<Command>,
    results: &Receiver<JobResult>,
    pool: Vec<JoinHandle<()>>,
    state: &watch::Sender<EngineState>,
) {
    let mut engine = engine;
    let ended = catch_unwind(AssertUnwindSafe(|| run(&mut engine, commands, results)));
    let (reply, end) = match ended {
        Ok(Ok(End::Stopped(reply))) => (Some(reply), EngineState::Stopped),
        Ok(Ok(End::Abandoned)) => (None, EngineState::Stopped),
        Ok(Err(fault)) => {
            tracing::error!(%fault, "the engine has failed");
            (None, EngineState::Poisoned)
        }
        Err(_) => {
            tracing::error!("the engine has panicked");
            (None, EngineState::Poisoned)
        }
    };
    // The pool ends when the engine has dropped its job channel; jobs under way only touch slots that the journal does not name.
    let folder = engine.folder.clone();
    drop(engine);
    for thread in pool {
        let _ = thread.join();
    }
    if end == EngineState::Stopped {
        spare::delete_all(&folder);
    }
    let _ = state.send(end);
    if let Some(reply) = reply {
        let _ = reply.send(Ok(()));
    }
}

fn run(engine: &mut Engine, commands: &Receiver<Command>, results: &Receiver<JobResult>) -> Result<End, Fault> {
    let mut next_tick = Instant::now();
    loop {
        let wait = next_tick.saturating_duration_since(Instant::now());
        select! {
            recv(results) -> result => match result {
                Ok(result) => engine.job_done(result)?,
                Err(_) => return Err(Fault::Pool),
            },
            recv(commands) -> command => match command {
                Ok(command) => {
                    if let Some(end) = engine.commands(command, commands)? {
                        engine.delete_doomed();
                        return Ok(end);
                    }
                }
                Err(_) => return Ok(End::Abandoned),
            },
            default(wait) => {}
        }
        let now = Instant::now();
        if next_tick <= now {
            engine.tick(now);
            engine.settle()?;
        }
        engine.retry_waiting()?;
        engine.delete_doomed();
        next_tick = now + engine.next_tick(now);
    }
}

impl Engine {
    /// Carries out a command and those that wait behind it.
    fn commands(&mut self, first: Command, more: &Receiver<Command>) -> Result<Option<End>, Fault> {
        let mut next = Some(first);
        for _ in 0..COMMANDS_A_TURN {
            let Some(command) = next else { break };
            if let Command::Stop(reply) = command {
                return Ok(Some(End::Stopped(reply)));
            }
            self.command(command)?;
            next = more.try_recv().ok();
        }
        if let Some(command) = next {
            if let Command::Stop(reply) = command {
                return Ok(Some(End::Stopped(reply)));
            }
            self.command(command)?;
        }
        Ok(None)
    }

    fn command(&mut self, command: Command) -> Result<(), Fault> {
        match command {
            Command::RegisterModel(request, reply) => {
                let registered = self.register_model(&request);
                self.finish_registration(request, registered, reply)
            }
            Command::UnregisterModel(id, reply) => {
                let result = self.unregister_model(id);
                self.finish(result, reply)
            }
            Command::SetCalibration(id, json, reply) => {
                self.set_calibration(id, json, reply);
                Ok(self.settle()?)
            }
            Command::Open(request, reply) => {
                let result = self.open(&request);
                self.finish_or_wait(result, reply, |reply| Command::Open(request, reply))
            }
            Command::Fork(request, reply) => {
                let result = self.fork(&request);
                self.finish_or_wait(result, reply, |reply| Command::Fork(request, reply))
            }
            Command::Truncate(lease, position, reply) => {
                let result = self.truncate(lease, position);
                self.finish(result, reply)
            }
            Command::Close(lease, reply) => {
                let result = self.close(lease);
                self.finish_or_wait(result, reply, |reply| Command::Close(lease, reply))
            }
            Command::List(model, reply) => {
                let result = self.list(model);
                self.finish(result, reply)
            }
            Command::Stats(reply) => {
                self.set_levels();
                let stats = self.stats();
                self.finish(Ok(stats), reply)
            }
            other => self.holder_command(other),
        }
    }

    fn holder_command(&mut self, command: Command) -> Result<(), Fault> {
        match command {
            Command::Attach(request, reply) => {
                let result = self.attach(&request);
                self.finish(result, reply)
            }
            Command::Redeem(ticket, peer, reply) => {
                let result = self.redeem(&ticket, peer);
                self.finish(result, reply)
            }
            Command::Host(lease, reply) => {
                let result = self.host(lease);
                self.finish(result, reply)
            }
            Command::Segment(lease, segment, reply) => {
                let result = self.holder_segment(lease, segment);
                self.finish(result, reply)
            }
            Command::StoreOpaque(lease, state, reply) => {
                let result = self.store_opaque(lease, &state);
                self.finish(result, reply)
            }
            Command::CalibrationOf(lease, reply) => {
                let result = self.calibration_of(lease);
                self.finish(result, reply)
            }
            Command::Touch(lease) => {
                let _ = self.leased(lease);
                Ok(())
            }
            Command::Panic => panic!("asked to panic by a test"),
            other => unreachable!("{other:?} is carried out by its caller"),
        }
    }

    /// Journals what a command has changed, then answers.
    fn finish<T>(&mut self, result: Result<T, EngineError>, reply: Reply<T>) -> Result<(), Fault> {
        self.settle()?;
        let _ = reply.send(result);
        Ok(())
    }

    fn finish_or_wait<T>(
        &mut self,
        result: Result<Outcome<T>, EngineError>,
        reply: Reply<T>,
        again: impl FnOnce(Reply<T>) -> Command,
    ) -> Result<(), Fault> {
        match result {
            Ok(Outcome::Done(value)) => self.finish(Ok(value), reply),
            Err(error) => self.finish(Err(error), reply),
            Ok(Outcome::Later(until)) => {
                self.settle()?;
                self.waiting.push_back((until, again(reply)));
                Ok(())
            }
        }
    }

    /// A registration may bring a calibration: the answer then waits for its labels.
    fn finish_registration(
        &mut self,
        request: RegisterModel,
        registered: Result<Registered, EngineError>,
        reply: Reply<Registered>,
    ) -> Result<(), Fault> {
        let Ok(Registered { model, calibrated: false }) = registered else { return self.finish(registered, reply) };
        if request.calibration_json.is_empty() {
            return self.finish(registered, reply);
        }
        let (sender, mut refused) = oneshot::channel();
        self.set_calibration(model, request.calibration_json.clone(), sender);
        if self.relabeling.contains_key(&model) {
            self.settle()?;
            self.waiting.push_back((Until::Calibrated(model), Command::RegisterModel(request, reply)));
            return Ok(());
        }
        self.settle()?;
        let outcome = refused.try_recv().unwrap_or(Err(EngineError::Unavailable("the calibration was lost")));
        self.finish(outcome.map(|_| Registered { model, calibrated: true }), reply)
    }

    /// Takes up commands whose time has come, and drops those that nobody waits for any more.
    fn retry_waiting(&mut self) -> Result<(), Fault> {
        for _ in 0..self.waiting.len() {
            let Some((until, command)) = self.waiting.pop_front() else { break };
            let abandoned = match &command {
                Command::Open(_, reply) => reply.is_closed(),
                Command::Fork(_, reply) => reply.is_closed(),
                _ => false,
            };
            if abandoned {
                continue;
            }
            if self.is_over(&until) {
                self.command(command)?;
            } else {
                self.waiting.push_back((until, command));
            }
        }
        Ok(())
    }

    fn job_done(&mut self, result: JobResult) -> Result<(), Fault> {
        match result {
            JobResult::Seal(job, result) => self.sealed(job, result),
            JobResult::Verify { chunk, intact } => self.verified(chunk, intact),
            JobResult::Relabel { model, chunk } => self.relabelled(model, chunk),
            JobResult::Segment(job, made) => self.segment_made(&job, made),
            JobResult::Spare(job, made) => self.spare_made(job, made),
            JobResult::Panicked => return Err(Fault::Pool),
        }
        Ok(self.settle()?)
    }
}
