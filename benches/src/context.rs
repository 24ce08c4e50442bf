//! A long context: a model registered with a daemon, and the generator that fills sequences of it.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};
use serde::{Deserialize, Serialize};
use sluice_client::{Attach, Client, ClientConfig, Model, ModelRegistration, OpenOptions, RotaryLayout, Session};
use sluice_kernels::budget::Settings;
use sluice_kernels::label::{Calibration, Calibrator};
use sluice_kernels::slot::CHUNK_TOKENS;

use crate::generator::{GENERATOR_NAME, Generator};
use crate::workload::Workload;

/// Longest wait for sealing to catch up.
const SEAL_PATIENCE: Duration = Duration::from_secs(120);
/// Tokens from which labels are calibrated.
const CALIBRATION_TOKENS: usize = 512;

/// Told how much of a stage is done: stage, units done, units in all.
pub type Progress = fn(&str, usize, usize) -> Result<()>;

/// Filling the context without attention.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct FillOutcome {
    /// Tokens appended.
    pub tokens: usize,
    /// Bytes of their rows.
    pub bytes: u64,
    /// Seconds from the first row to the last, generation (on another thread) and waits for open slots included.
    pub seconds: f64,
    /// Of these, seconds inside begin and append.
    pub append_seconds: f64,
}

/// A model, its context and the way to a daemon.
pub struct LongContext {
    /// What it is.
    pub workload: Workload,
    /// The daemon.
    pub client: Client,
    /// The model there.
    pub model: Model,
    /// Its calibration.
    pub calibration: Calibration,
    /// Source of rows and queries.
    pub generator: Generator,
    /// Token ids of the context.
    pub ids: Vec<u32>,
    /// Who wants to know.
    pub progress: Progress,
}

impl LongContext {
    /// Connects to the daemon at `socket` and registers the model with a calibration from a sample of the context.
    ///
    /// # Errors
    /// No daemon there, or one that refuses.
    pub fn start(workload: Workload, socket: &Path, progress: Progress) -> Result<Self> {
        let generator = Generator::new(&workload.shape(), workload.seed);
        let endpoint = socket.to_str().ok_or_else(|| anyhow!("{}: not UTF-8", socket.display()))?;
        let config = ClientConfig { message_bytes_max: workload.message_bytes(), ..ClientConfig::default() };
        let client = Client::connect(endpoint, config).context("connect")?;
        let registration = ModelRegistration {
            name: GENERATOR_NAME.to_owned(),
            weights_digest: workload.seed.to_le_bytes().to_vec(),
            shape: workload.shape(),
            rotary: RotaryLayout::None,
            namespace: String::new(),
        };
        progress("calibrate", 0, 1)?;
        let calibration = calibrate(&workload, &generator)?;
        let model = client.register_model(&registration, Some(&calibration)).context("register the model")?;
        let ids = generator.token_ids(0..workload.context.0);
        Ok(Self { workload, client, model, calibration, generator, ids, progress })
    }

    /// Layers of the model.
    #[must_use]
    pub fn layers(&self) -> usize {
        usize::from(self.workload.layers)
    }

    /// Attaching directly, on the device of the workload.
    #[must_use]
    pub fn direct(&self) -> Attach {
        Attach::Direct { device: self.workload.device, threads: self.workload.threads() }
    }

    /// Opens a new sequence to fill with `ids`.
    ///
    /// # Errors
    /// The daemon refuses, or knows some of it.
    pub fn open_new(&self, settings: Settings, attach: Attach) -> Result<Session> {
        let session = self.open(&self.ids, settings, attach, Workload::OPEN_SLOTS)?;
        ensure!(session.matched_tokens() == 0, "{} tokens are known to a fresh daemon", session.matched_tokens());
        Ok(session)
    }

    /// Opens a sequence over `ids` with so many open slots; 0: the daemon's default.
    ///
    /// # Errors
    /// The daemon refuses.
    pub fn open(&self, ids: &[u32], settings: Settings, attach: Attach, open_slots: u32) -> Result<Session> {
        let open = OpenOptions { attach, settings: Some(settings), open_slots, ..OpenOptions::default() };
        self.client.open(&self.model, ids, &open).context("open")
    }

    /// Opens a sequence over the whole context, which must be known.
    ///
    /// # Errors
    /// The daemon refuses, or does not know all of it.
    pub fn open_known(&self, settings: Settings, attach: Attach) -> Result<Session> {
        let session = self.open(&self.ids, settings, attach, 0)?;
        let (matched, context) = (session.matched_tokens(), self.ids.len());
        ensure!(matched == context, "{matched} of {context} sealed tokens are found again");
        Ok(session)
    }

    /// Waits until the whole context is sealed; answers how many seconds that took.
    ///
    /// # Errors
    /// It is not sealed in two minutes.
    pub fn wait_sealed(&self, session: &mut Session) -> Result<f64> {
        let begin = Instant::now();
        let sealed = session.wait_sealed(self.ids.len(), SEAL_PATIENCE).context("wait for seals")?;
        ensure!(sealed >= self.ids.len(), "{sealed} of {} tokens are sealed", self.ids.len());
        Ok(begin.elapsed().as_secs_f64())
    }

    /// Appends the context up to `end` without attention. Rows are generated on another thread, a few pieces ahead, and never kept.
    ///
    /// # Errors
    /// The daemon refuses, or does not seal in time.
    pub fn fill(&self, session: &mut Session, end: usize) -> Result<FillOutcome> {
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
                (self.progress)("fill", first, end)?;
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
        Ok(FillOutcome { tokens: end, bytes, seconds, append_seconds: append.as_secs_f64() })
    }
}

/// A calibration from a spread-out sample of the context.
fn calibrate(workload: &Workload, generator: &Generator) -> Result<Calibration> {
    let shape = workload.shape();
    let mut calibrator = Calibrator::new(&shape, &workload.plan(), "", workload.seed);
    let channels = usize::from(workload.head_dim);
    for (layer, layer_shape) in shape.layers.iter().enumerate() {
        for sample in 0..CALIBRATION_TOKENS {
            let position = (sample + 1) * workload.context.0 / (CALIBRATION_TOKENS + 1);
            let mut keys = vec![0.0; layer_shape.lanes() * channels];
            for (lane, key) in keys.chunks_exact_mut(channels).enumerate() {
                generator.fill_keys(layer, lane, position..position + 1, key);
            }
            calibrator.add(layer, &keys, Some(&generator.query(layer, position, u64::MAX)));
        }
    }
    calibrator.finish().ok_or_else(|| anyhow!("nothing to calibrate on"))
}
