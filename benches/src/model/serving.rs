//! Opening a sequence for a model: flags, calibration, and the daemon of a run.

use std::path::PathBuf;

use anyhow::{Context, Result, bail, ensure};
use clap::Args;
use indicatif::{ProgressBar, ProgressStyle};
use rustix::process::{Pid, Signal, kill_process};
use sluice_client::{Attach, Client, ClientConfig, ModelRegistration, OnlineCalibration, OpenOptions, RotaryLayout as WireRotary};
use sluice_kernels::budget::Settings;
use sluice_kernels::device::DeviceKind;
use sluice_kernels::label::{Calibration, LabelPlan};
use sluice_kernels::shape::{LaneKind, ModelShape, RowType};
use sluice_kernels::slot::CHUNK_TOKENS;

use super::calibrating::{Calibrated, calibrate};
use super::config::RotaryLayout;
use super::input::read_tokens;
use super::local::{LocalOptions, LocalSteps};
use super::mass::MassMeter;
use super::served::{ServedLayers, Steps};
use super::session::SessionSteps;
use super::{Model, PREFILL_TOKENS};
use crate::daemon::{DaemonSpec, LocalDaemon};
use crate::units::{Ratio, TokenCount};
use crate::workload::LabelChoice;

/// How the worker reaches its rows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum AttachName {
    /// Over shared memory; the worker decodes.
    Direct,
    /// Over gRPC; the daemon decodes.
    Stream,
    /// No daemon: the same sequence and decoder in this process. Must give the same bits as the other two.
    Process,
}

/// Sluice's part of a run.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Sluice")]
pub struct ServingArguments {
    /// How the worker reaches its rows.
    #[arg(long, value_enum, default_value = "direct")]
    pub attach: AttachName,
    /// Socket of a running daemon [default: a daemon is started for the run].
    #[arg(long, value_name = "SOCKET")]
    pub endpoint: Option<String>,
    /// Text (or, ending in .json, token ids) whose queries and keys calibrate the labels; a different one from the text that is scored.
    /// Without it a session calibrates on its own first tokens, as many as --calibrate-tokens, and attends densely until then. The scales of
    /// fp8 rows come from it as well.
    #[arg(long, value_name = "PATH")]
    pub calibrate_on: Option<PathBuf>,
    /// At most so many tokens of it.
    #[arg(long, value_name = "TOKENS", default_value = "6000")]
    pub calibrate_tokens: TokenCount,
    /// Label plan: small, large, or groups of channels such as 32@4+64@2.
    #[arg(long, value_name = "PLAN", default_value = "small")]
    pub label: LabelChoice,
    /// Tokens that a lane selects in a step, as a part of the length; 1 selects all.
    #[arg(long, default_value = "1/16")]
    pub ratio: Ratio,
    /// Tokens that a lane selects at least.
    #[arg(long, value_name = "TOKENS", default_value_t = 256)]
    pub floor_tokens: u32,
    /// Newest tokens that are always attended exactly.
    #[arg(long, value_name = "TOKENS", default_value_t = 256)]
    pub exact_tokens: u32,
    /// Fetched rows that a lane keeps between steps (direct only).
    #[arg(long, value_name = "ROWS", default_value_t = 0)]
    pub hot_rows: usize,
    /// Device of the decoder: cpu or reference.
    #[arg(long, default_value = "cpu")]
    pub device: DeviceKind,
    /// Threads of the decoder; 0: all cores.
    #[arg(long, default_value_t = 0)]
    pub threads: usize,
    /// Stop the daemon of the run (SIGSTOP) once the sequence is open: the worker must not notice (direct only). Open slots for the whole
    /// text are asked for.
    #[arg(long)]
    pub stop_daemon: bool,
    /// The daemon's binary [default: sluice beside this binary].
    #[arg(long, env = "SLUICE_BIN", value_name = "PATH")]
    pub sluice_bin: Option<PathBuf>,
    /// Folder in which a private arena folder is made; a tmpfs.
    #[arg(long, default_value = "/dev/shm", value_name = "FOLDER")]
    pub arena_parent: PathBuf,
}

/// A sequence that Sluice serves. The daemon of the run, if there is one, ends after it.
pub struct Served {
    /// Its attention layers.
    pub layers: ServedLayers,
    /// The label plan in force.
    pub plan: LabelPlan,
    /// Part of the tokens that a lane selects.
    pub ratio: Ratio,
    /// The way it is attached.
    pub attach: &'static str,
    /// Tokens whose rows were held already when it was opened.
    pub matched_tokens: usize,
    /// Whether fetched rows are kept.
    pub hot: bool,
    daemon: Option<LocalDaemon>,
    stopped: bool,
}

impl Served {
    /// Stops the daemon of the run until the sequence is dropped.
    fn stop_daemon(&mut self) -> Result<()> {
        let daemon = self.daemon.as_ref().context("--stop-daemon: only the daemon of the run can be stopped, not that of --endpoint")?;
        signal(daemon.pid(), Signal::STOP)?;
        self.stopped = true;
        Ok(())
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        if let Some(daemon) = self.daemon.as_ref().filter(|_| self.stopped) {
            // The session is closed after this, and somebody must answer; a daemon that is gone needs no signal.
            let _ = signal(daemon.pid(), Signal::CONT);
        }
    }
}

fn signal(process: u32, signal: Signal) -> Result<()> {
    let process = i32::try_from(process).ok().and_then(Pid::from_raw).context("the daemon has no process id")?;
    kill_process(process, signal).with_context(|| format!("{signal:?} to the daemon"))
}

impl ServingArguments {
    /// Calibrates, and opens a sequence over `prompt` with room for `tokens` tokens in all. The mass that decode steps keep is measured,
    /// unless rows of a prefix are held already, whose keys the worker does not see.
    ///
    /// # Errors
    /// A calibration text that cannot be read, no daemon, or a refusal.
    pub fn open(&self, model: &Model, row_type: RowType, prompt: &[u32], tokens: usize) -> Result<Served> {
        let layers = &model.config().layers;
        let head_dim = layers.iter().find(|layer| layer.kind == LaneKind::Selected).map(|layer| layer.head_dim);
        let plan = self.label.plan(head_dim.context("the model has no full-attention layer to select from")?);
        let calibrated = self.calibrated(model, &plan)?;
        let shape = match (&calibrated, row_type) {
            (Some(calibrated), RowType::Fp8) => model.scaled_shape(calibrated.scales.clone())?,
            (None, RowType::Fp8) => bail!("--calibrate-on: missing; fp8 rows take their scales from it"),
            _ => model.shape(row_type)?,
        };
        let labels = Labels { calibration: calibrated.map(|calibrated| calibrated.labels), plan };
        let (steps, daemon) = match self.attach {
            AttachName::Process => (self.process(&shape, labels.calibration.clone(), tokens)?, None),
            AttachName::Direct | AttachName::Stream => self.session(model, &shape, &labels, prompt, tokens)?,
        };
        let matched_tokens = steps.length();
        let mass = if matched_tokens == 0 { Some(MassMeter::new(&shape)?) } else { None };
        let attach = match self.attach {
            AttachName::Direct => "direct",
            AttachName::Stream => "stream",
            AttachName::Process => "process",
        };
        let layers = ServedLayers::new(shape, steps, mass);
        let hot = self.hot_rows > 0 && self.attach == AttachName::Direct;
        let mut served = Served { layers, plan: labels.plan, ratio: self.ratio, attach, matched_tokens, hot, daemon, stopped: false };
        if self.stop_daemon {
            ensure!(self.attach == AttachName::Direct, "--stop-daemon: a daemon can only be missed with --attach direct");
            served.stop_daemon()?;
        }
        Ok(served)
    }

    /// Settings of decode steps.
    #[must_use]
    pub fn settings(&self) -> Settings {
        Settings { budget: self.ratio.budget(self.floor_tokens), exact_tokens: self.exact_tokens, ..Settings::default() }
    }

    fn threads(&self) -> usize {
        if self.threads == 0 { std::thread::available_parallelism().map_or(1, std::num::NonZero::get) } else { self.threads }
    }

    fn calibrated(&self, model: &Model, plan: &LabelPlan) -> Result<Option<Calibrated>> {
        let Some(path) = &self.calibrate_on else { return Ok(None) };
        let mut ids = read_tokens(path, model.tokenizer())?;
        ids.truncate(self.calibrate_tokens.0);
        ensure!(!ids.is_empty(), "--calibrate-on {}: no tokens", path.display());
        let style = ProgressStyle::with_template("calibrating {bar:40} {pos}/{len} tokens, {eta} left")?;
        let bar = ProgressBar::new(ids.len() as u64).with_style(style);
        let calibrated = calibrate(model, plan, &ids, &mut |tokens| bar.inc(tokens as u64));
        bar.finish_and_clear();
        calibrated.map(Some)
    }

    fn process(&self, shape: &ModelShape, calibration: Option<Calibration>, tokens: usize) -> Result<Box<dyn Steps>> {
        ensure!(calibration.is_some(), "--calibrate-on: missing; --attach process cannot calibrate on the prompt");
        let options = LocalOptions {
            shape: shape.clone(),
            calibration,
            settings: self.settings(),
            tokens,
            device: self.device,
            threads: self.threads(),
        };
        Ok(Box::new(LocalSteps::new(&options)?))
    }

    fn session(&self, model: &Model, shape: &ModelShape, labels: &Labels, prompt: &[u32], tokens: usize) -> Result<SessionAndDaemon> {
        let daemon = if self.endpoint.is_none() { Some(LocalDaemon::start(&self.spec(shape, &labels.plan, tokens))?) } else { None };
        let endpoint = match (&self.endpoint, &daemon) {
            (Some(endpoint), _) => endpoint.clone(),
            (None, Some(daemon)) => daemon.socket().to_string_lossy().into_owned(),
            (None, None) => bail!("--endpoint: missing"),
        };
        let client = Client::connect(&endpoint, ClientConfig::default())?;
        let registered = client.register_model(&registration(model, shape), None)?;
        if let Some(calibration) = &labels.calibration {
            let in_force = client.set_calibration(&registered, calibration)?;
            let same = in_force.calibration == *calibration;
            ensure!(same, "--calibrate-on: the daemon has another calibration of this model, which stays in force");
        }
        let session = client.open(&registered, prompt, &self.open_options(labels, tokens))?;
        ensure!(session.run_tokens_max() >= PREFILL_TOKENS, "open slots: runs of {} tokens", session.run_tokens_max());
        Ok((Box::new(SessionSteps::new(session)), daemon))
    }

    fn open_options(&self, labels: &Labels, tokens: usize) -> OpenOptions {
        let attach = match self.attach {
            AttachName::Stream => Attach::Stream,
            AttachName::Direct | AttachName::Process => Attach::Direct { device: self.device, threads: self.threads() },
        };
        let online = OnlineCalibration { plan: labels.plan.clone(), tokens: self.calibrate_tokens.0 };
        OpenOptions {
            attach,
            settings: Some(self.settings()),
            open_slots: self.open_slots(tokens),
            hot_rows: if self.attach == AttachName::Direct { self.hot_rows } else { 0 },
            calibrate: labels.calibration.is_none().then_some(online),
            ..OpenOptions::default()
        }
    }

    /// Growing chunks of the sequence; for a daemon that is stopped, all of its chunks.
    fn open_slots(&self, tokens: usize) -> u32 {
        let all = tokens.div_ceil(CHUNK_TOKENS) as u32 + 1;
        if self.stop_daemon { all.max(OPEN_SLOTS) } else { OPEN_SLOTS }
    }

    fn spec(&self, shape: &ModelShape, plan: &LabelPlan, tokens: usize) -> DaemonSpec {
        let token_bytes: u64 = shape.layers.iter().map(|layer| (layer.lanes() * layer.row_bytes(shape.row_type)) as u64).sum();
        let lanes: u64 = shape.layers.iter().map(|layer| layer.lanes() as u64).sum();
        let chunk_bytes = CHUNK_TOKENS as u64 * token_bytes;
        // Twice the sequence: segments come in large pieces, one kind for full attention and one for windows.
        let arena_bytes = (2 * tokens as u64 * token_bytes + 16 * chunk_bytes).max(1 << 30);
        DaemonSpec {
            binary: self.sluice_bin.clone(),
            arena_parent: self.arena_parent.clone(),
            arena_bytes,
            label_bytes: arena_bytes / token_bytes * lanes * plan.label_bytes() as u64,
            open_bytes: 4 * u64::from(self.open_slots(tokens)) * chunk_bytes + (64 << 20),
            sequence_tokens: (tokens as u64).max(1 << 15),
            message_bytes: 1 << 26,
            device: self.device,
            threads: self.threads(),
        }
    }
}

/// Growing chunks of a sequence whose daemon seals.
const OPEN_SLOTS: u32 = 8;

/// The label plan of a run, and its calibration where there is a text for it.
struct Labels {
    plan: LabelPlan,
    calibration: Option<Calibration>,
}

type SessionAndDaemon = (Box<dyn Steps>, Option<LocalDaemon>);

fn registration(model: &Model, shape: &ModelShape) -> ModelRegistration {
    let rotary = match model.config().rotary_layout() {
        RotaryLayout::Halves => WireRotary::HalfSplit,
        RotaryLayout::Pairs => WireRotary::Interleaved,
    };
    ModelRegistration {
        name: "sluice-bench".to_owned(),
        weights_digest: model.digest().to_vec(),
        shape: shape.clone(),
        rotary,
        namespace: String::new(),
    }
}
