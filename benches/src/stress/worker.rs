//! The worker process of a stress run: it holds the sequences and measures; the parent holds the daemon.

use std::io::{BufReader, Write, stdin, stdout};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};
use sluice_client::{Attach, Client, ClientConfig, Model, ModelRegistration, OpenOptions, RotaryLayout, Session};
use sluice_kernels::budget::Settings;
use sluice_kernels::label::{Calibration, Calibrator};
use sluice_kernels::slot::CHUNK_TOKENS;

use crate::generator::{GENERATOR_NAME, Generator};
use crate::stress::messages::{Event, FillOutcome, Order, PrefillOutcome, ReopenOutcome, WorkerOutcome, receive, send};
use crate::stress::options::{AttachKind, StressOptions};
use crate::stress::steps::{self, StepInput};

/// Reads an order from standard input, carries it out, and writes events to standard output.
///
/// # Errors
/// No order, or nobody who reads the result.
pub fn run() -> Result<()> {
    let order: Order = receive(&mut BufReader::new(stdin()))?;
    match Bench::start(order).and_then(Bench::work) {
        Ok(outcome) => send(&mut stdout(), &Event::Done(Box::new(outcome))),
        Err(error) => send(&mut stdout(), &Event::Failed(format!("{error:#}"))),
    }
}

/// Longest wait for sealing to catch up.
const SEAL_PATIENCE: Duration = Duration::from_secs(120);
/// Tokens from which labels are calibrated.
const CALIBRATION_TOKENS: usize = 512;

/// What every stage of a run needs.
pub(super) struct Bench {
    pub(super) order: Order,
    pub(super) client: Client,
    pub(super) model: Model,
    pub(super) generator: Generator,
    /// Ids of the context.
    pub(super) ids: Vec<u32>,
}

impl Bench {
    fn start(order: Order) -> Result<Self> {
        let options = &order.options;
        let generator = Generator::new(&options.shape(), options.seed);
        let endpoint = order.socket.to_str().ok_or_else(|| anyhow!("socket path is not UTF-8"))?;
        let client = Client::connect(endpoint, ClientConfig::default()).context("connect")?;
        let registration = ModelRegistration {
            name: GENERATOR_NAME.to_owned(),
            weights_digest: options.seed.to_le_bytes().to_vec(),
            shape: options.shape(),
            rotary: RotaryLayout::None,
            namespace: String::new(),
        };
        progress("calibrate", 0, 1)?;
        let calibration = calibrate(options, &generator)?;
        let model = client.register_model(&registration, Some(&calibration)).context("register the model")?;
        let ids = generator.token_ids(0..options.context.0);
        Ok(Self { order, client, model, generator, ids })
    }

    fn work(self) -> Result<WorkerOutcome> {
        let last_piece = self.options().context.0 - self.options().prefill_tokens;
        let mut filled = self.open(&self.ids, Settings::default())?;
        ensure!(filled.matched_tokens() == 0, "{} tokens are known to a fresh daemon", filled.matched_tokens());
        let mut fill = self.fill(&mut filled, last_piece)?;
        let prefill = self.prefill(&mut filled, last_piece)?;
        let begin = Instant::now();
        let sealed = filled.wait_sealed(self.ids.len(), SEAL_PATIENCE).context("wait for seals")?;
        ensure!(sealed >= self.ids.len(), "{sealed} of {} tokens are sealed", self.ids.len());
        fill.seal_seconds = begin.elapsed().as_secs_f64();
        let reopen = self.reopen()?;
        let view = steps::view(&self, filled.sequence_id())?;
        let mut groups = steps::Groups::open(&self)?;
        let (dense, sparse) = groups.measure(&self, &view)?;
        let fork_ms = self.fork(groups.any_sparse())?;
        progress("close", 0, 1)?;
        let begin = Instant::now();
        let mut closed = 1;
        filled.close()?;
        for session in groups.into_sessions() {
            session.close()?;
            closed += 1;
        }
        let close_ms = begin.elapsed().as_secs_f64() * 1e3 / f64::from(closed);
        Ok(WorkerOutcome { fill, prefill, reopen, dense, sparse, fork_ms, close_ms })
    }

    pub(super) fn options(&self) -> &StressOptions {
        &self.order.options
    }

    pub(super) fn layers(&self) -> usize {
        usize::from(self.options().layers)
    }

    /// Opens a sequence over `ids` and appends what is not known of it.
    pub(super) fn open(&self, ids: &[u32], settings: Settings) -> Result<Session> {
        let options = self.options();
        let attach = match options.attach {
            AttachKind::Stream => Attach::Stream,
            AttachKind::Direct => Attach::Direct { device: options.device, threads: options.threads() },
        };
        let open = OpenOptions { attach, settings: Some(settings), open_slots: StressOptions::OPEN_SLOTS, ..OpenOptions::default() };
        self.client.open(&self.model, ids, &open).context("open")
    }

    /// Appends the context up to `end` without attention. Rows are generated on another thread, a few pieces ahead, and never kept.
    fn fill(&self, session: &mut Session, end: usize) -> Result<FillOutcome> {
        let run_tokens = session.run_tokens_max().min(2 * CHUNK_TOKENS);
        let (rows_out, rows_in) = std::sync::mpsc::sync_channel::<Vec<u8>>(2);
        let (spent_out, spent_in) = std::sync::mpsc::channel::<Vec<u8>>();
        let (begin, mut append, mut bytes) = (Instant::now(), Duration::ZERO, 0);
        std::thread::scope(|scope| {
            scope.spawn(move || {
                for first in (0..end).step_by(run_tokens) {
                    for layer in 0..self.layers() {
                        let run = first..end.min(first + run_tokens);
                        let mut rows = spent_in.try_recv().unwrap_or_default();
                        rows.resize(self.generator.rows_bytes(layer, run.len()), 0);
                        self.generator.fill_rows(layer, run, &mut rows);
                        if rows_out.send(rows).is_err() {
                            return;
                        }
                    }
                }
            });
            for first in (0..end).step_by(run_tokens) {
                progress("fill", first, end)?;
                for layer in 0..self.layers() {
                    let rows = rows_in.recv().map_err(|_| anyhow!("the generator ended early"))?;
                    let begin = Instant::now();
                    if layer == 0 {
                        session.begin(&self.ids[first..end.min(first + run_tokens)])?;
                    }
                    session.append(layer, first, &rows)?;
                    append += begin.elapsed();
                    bytes += rows.len() as u64;
                    // Only the generator's next buffer depends on it, and that thread may be done.
                    let _ = spent_out.send(rows);
                }
            }
            anyhow::Ok(())
        })?;
        ensure!(session.length() == end, "{} tokens are committed, {end} appended", session.length());
        let seconds = begin.elapsed().as_secs_f64();
        Ok(FillOutcome { tokens: end, bytes, seconds, append_seconds: append.as_secs_f64(), seal_seconds: 0.0 })
    }

    /// Appends the rest of the context with dense attention of all its queries.
    fn prefill(&self, session: &mut Session, first: usize) -> Result<PrefillOutcome> {
        let run = first..self.ids.len();
        let inputs: Vec<StepInput> = (0..self.layers()).map(|layer| StepInput::of_run(self, layer, run.clone())).collect();
        progress("prefill", 0, self.layers())?;
        let begin = Instant::now();
        session.begin(&self.ids[run.clone()])?;
        for (layer, input) in inputs.iter().enumerate() {
            steps::prefill_layer(session, layer, first, input)?;
            progress("prefill", layer + 1, self.layers())?;
        }
        Ok(PrefillOutcome { tokens: run.len(), seconds: begin.elapsed().as_secs_f64() })
    }

    /// Opens a long known prompt again and again.
    fn reopen(&self) -> Result<ReopenOutcome> {
        let tokens = self.options().reopen_tokens();
        let mut outcome = ReopenOutcome { tokens, appended_tokens: 0, open_ms: Vec::new() };
        for round in 0..StressOptions::REOPENS {
            progress("second open", round, StressOptions::REOPENS)?;
            let begin = Instant::now();
            let session = self.open(&self.ids[..tokens], Settings::default())?;
            outcome.open_ms.push(begin.elapsed().as_secs_f64() * 1e3);
            outcome.appended_tokens = outcome.appended_tokens.max(tokens - session.matched_tokens());
            session.close()?;
        }
        Ok(outcome)
    }

    /// Forks in the middle of a chunk, appends the parent's own tokens again, and checks that both answer alike.
    fn fork(&self, parent: &mut Session) -> Result<f64> {
        progress("fork", 0, 1)?;
        let length = parent.length();
        let position = self.ids.len() - CHUNK_TOKENS / 3;
        let begin = Instant::now();
        let mut fork = parent.fork(position).context("fork")?;
        let fork_ms = begin.elapsed().as_secs_f64() * 1e3;
        ensure!(fork.length() == position, "a fork at {position} has {} tokens", fork.length());
        fork.begin(&self.generator.token_ids(position..length))?;
        for layer in 0..self.layers() {
            let mut rows = vec![0; self.generator.rows_bytes(layer, length - position)];
            self.generator.fill_rows(layer, position..length, &mut rows);
            fork.append(layer, position, &rows)?;
        }
        for layer in 0..self.layers() {
            let query = self.generator.query(layer, length - 1, 0);
            let [of_parent, of_fork] = [&mut *parent, &mut fork].map(|session| steps::answer(session, layer, length - 1, &query));
            ensure!(of_parent? == of_fork?, "layer {layer}: a fork with the same rows answers differently");
        }
        fork.close()?;
        Ok(fork_ms)
    }
}

/// A calibration from a spread-out sample of the context.
fn calibrate(options: &StressOptions, generator: &Generator) -> Result<Calibration> {
    let shape = options.shape();
    let mut calibrator = Calibrator::new(&shape, &options.plan(), "", options.seed);
    let channels = usize::from(options.head_dim);
    for (layer, layer_shape) in shape.layers.iter().enumerate() {
        for sample in 0..CALIBRATION_TOKENS {
            let position = (sample + 1) * options.context.0 / (CALIBRATION_TOKENS + 1);
            let mut keys = vec![0.0; layer_shape.lanes() * channels];
            for (lane, key) in keys.chunks_exact_mut(channels).enumerate() {
                generator.fill_keys(layer, lane, position..position + 1, key);
            }
            calibrator.add(layer, &keys, Some(&generator.query(layer, position, u64::MAX)));
        }
    }
    calibrator.finish().ok_or_else(|| anyhow!("nothing to calibrate on"))
}

/// Tells the parent how far a stage is.
pub(super) fn progress(stage: &str, done: usize, total: usize) -> Result<()> {
    let mut out = stdout().lock();
    send(&mut out, &Event::Progress { stage: stage.to_owned(), done, total })?;
    out.flush().context("write to the parent")
}
