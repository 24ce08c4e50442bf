//! The worker process of a stress run: it holds the sequences and measures; the parent holds the daemon.

use std::io::{BufReader, stdin, stdout};
use std::path::PathBuf;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use sluice_client::{Attach, Session};
use sluice_kernels::budget::Settings;
use sluice_kernels::slot::CHUNK_TOKENS;

use crate::context::LongContext;
use crate::stress::messages::{Event, Order, PrefillOutcome, ReopenOutcome, WorkerOutcome, receive, send};
use crate::stress::options::{AttachKind, StressOptions};
use crate::stress::steps::{self, StepInput};

/// Reads an order from standard input, carries it out, and writes events to standard output.
///
/// # Errors
/// No order, or nobody who reads the result.
pub fn run() -> Result<()> {
    let order: Order = receive(&mut BufReader::new(stdin()))?;
    match Bench::start(order).and_then(|bench| bench.work()) {
        Ok(outcome) => send(&mut stdout(), &Event::Done(Box::new(outcome))),
        Err(error) => send(&mut stdout(), &Event::Failed(format!("{error:#}"))),
    }
}

/// Tells the parent how far a stage is.
fn progress(stage: &str, done: usize, total: usize) -> Result<()> {
    send(&mut stdout(), &Event::Progress { stage: stage.to_owned(), done, total })
}

/// What every stage of a run needs.
pub(super) struct Bench {
    pub(super) options: StressOptions,
    pub(super) arena: PathBuf,
    pub(super) context: LongContext,
}

impl Bench {
    fn start(order: Order) -> Result<Self> {
        let Order { options, socket, arena } = order;
        let context = LongContext::start(options.workload.clone(), &socket, progress)?;
        Ok(Self { options, arena, context })
    }

    fn work(&self) -> Result<WorkerOutcome> {
        let context = &self.context;
        let last_piece = context.ids.len() - self.options.prefill_tokens;
        let mut filled = context.open_new(Settings::default(), self.attach())?;
        let fill = context.fill(&mut filled, last_piece)?;
        let prefill = self.prefill(&mut filled, last_piece)?;
        let seal_seconds = context.wait_sealed(&mut filled)?;
        let reopen = self.reopen()?;
        let view = steps::view(self, filled.sequence_id())?;
        let mut groups = steps::Groups::open(self)?;
        let (dense, sparse) = groups.measure(self, &view)?;
        let fork_ms = self.fork(groups.any_sparse())?;
        progress("close", 0, 1)?;
        let sessions: Vec<Session> = groups.into_sessions().chain([filled]).collect();
        let (begin, closed) = (Instant::now(), sessions.len());
        for session in sessions {
            session.close()?;
        }
        let close_ms = begin.elapsed().as_secs_f64() * 1e3 / closed as f64;
        Ok(WorkerOutcome { fill, prefill, seal_seconds, reopen, dense, sparse, fork_ms, close_ms })
    }

    pub(super) fn attach(&self) -> Attach {
        match self.options.attach {
            AttachKind::Stream => Attach::Stream,
            AttachKind::Direct => self.context.direct(),
        }
    }

    /// Appends the rest of the context with dense attention of all its queries.
    fn prefill(&self, session: &mut Session, first: usize) -> Result<PrefillOutcome> {
        let run = first..self.context.ids.len();
        let layers = self.context.layers();
        let inputs: Vec<StepInput> = (0..layers).map(|layer| StepInput::of_run(&self.context, layer, run.clone())).collect();
        progress("prefill", 0, layers)?;
        let begin = Instant::now();
        session.begin(&self.context.ids[run.clone()])?;
        for (layer, input) in inputs.iter().enumerate() {
            steps::prefill_layer(session, layer, first, input)?;
            progress("prefill", layer + 1, layers)?;
        }
        Ok(PrefillOutcome { tokens: run.len(), seconds: begin.elapsed().as_secs_f64() })
    }

    /// Opens a long known prompt again and again.
    fn reopen(&self) -> Result<ReopenOutcome> {
        let tokens = self.options.reopen_tokens();
        let mut outcome = ReopenOutcome { tokens, appended_tokens: 0, open_ms: Vec::new() };
        for round in 0..StressOptions::REOPENS {
            progress("second open", round, StressOptions::REOPENS)?;
            let begin = Instant::now();
            let session = self.context.open(&self.context.ids[..tokens], Settings::default(), self.attach(), 0)?;
            outcome.open_ms.push(begin.elapsed().as_secs_f64() * 1e3);
            outcome.appended_tokens = outcome.appended_tokens.max(tokens - session.matched_tokens());
            session.close()?;
        }
        Ok(outcome)
    }

    /// Forks in the middle of a chunk, appends the parent's own tokens again, and checks that both answer alike.
    fn fork(&self, parent: &mut Session) -> Result<f64> {
        progress("fork", 0, 1)?;
        let (context, length) = (&self.context, parent.length());
        let position = context.ids.len() - CHUNK_TOKENS / 3;
        let begin = Instant::now();
        let mut fork = parent.fork(position).context("fork")?;
        let fork_ms = begin.elapsed().as_secs_f64() * 1e3;
        ensure!(fork.length() == position, "a fork at {position} has {} tokens", fork.length());
        fork.begin(&context.generator.token_ids(position..length))?;
        for layer in 0..context.layers() {
            let mut rows = vec![0; context.generator.rows_bytes(layer, length - position)];
            context.generator.fill_rows(layer, position..length, &mut rows);
            fork.append(layer, position, &rows)?;
        }
        for layer in 0..context.layers() {
            let query = context.generator.query(layer, length - 1, 0);
            let [of_parent, of_fork] = [&mut *parent, &mut fork].map(|session| steps::answer(session, layer, length - 1, &query));
            ensure!(of_parent? == of_fork?, "layer {layer}: a fork with the same rows answers differently");
        }
        fork.close()?;
        Ok(fork_ms)
    }
}
