//! `sluice-bench trace`: from a recording of a real model to a key trace.

use std::collections::{HashMap, VecDeque};
use std::fs::File;
use std::io::BufReader;
use std::path::PathBuf;

use anyhow::{Context, Result, bail, ensure};
use clap::Args;
use serde_json::json;
use sluice_kernels::budget::Settings;
use sluice_kernels::device::{Device, DeviceKind, LabelJob, LayerGeometry, ScoreJob, SelectJob, open};
use sluice_kernels::label::{Calibration, LabelCoder};
use sluice_kernels::recording::{Block, RecordingHeader, RecordingReader};
use sluice_kernels::rows::{PackJob, pack_rows};
use sluice_kernels::shape::{LaneKind, ModelShape};
use sluice_kernels::slot::CHUNK_TOKENS;

use super::trace::{KeyTrace, MAX_STEPS, SourceLane, TraceOrigin};
use crate::report::{Format, show_progress};
use crate::workload::within;

/// Scores the last tokens of a recording as decode steps do, with labels of the recorded keys, and writes the importance keys of all rows
/// before the first step's horizon (docs/formats.md).
///
/// JSON keys: `out`, `model`, `rows`, `steps`, `layers`, `first_position`, `plan`, `selections` (recorded selections over the same rows),
/// `selections_equal` (those that the trace's keys lead to as well).
#[derive(Args, Debug)]
pub struct TraceArguments {
    /// Recording made by `sluice-bench record`; its last tokens are the steps.
    #[arg(long, value_name = "FILE")]
    recording: PathBuf,
    /// Calibration made by `sluice calibrate`, of another text; it names the label plan.
    #[arg(long, value_name = "FILE")]
    calibration: PathBuf,
    /// Steps of the trace.
    #[arg(long, default_value_t = 160)]
    steps: usize,
    /// Newest tokens that are not selected from: with the length of the first step they fix the rows of the trace.
    #[arg(long, default_value_t = 256, value_name = "TOKENS")]
    exact_tokens: u32,
    /// Trace to write.
    #[arg(long, value_name = "FILE")]
    out: PathBuf,
    /// Table or JSON on standard output.
    #[arg(long, value_enum, default_value_t = Format::Table)]
    format: Format,
}

/// What is kept of one full-attention layer of a recording.
#[derive(Default)]
struct RecordedLayer {
    layer: usize,
    /// Tokens seen so far.
    tokens: usize,
    /// `[token][lane][head_dim]`
    keys: Vec<f32>,
    /// `[query_head][head_dim]` of each of the last tokens.
    queries: VecDeque<Vec<f32>>,
    /// By position and lane.
    selected: HashMap<usize, Vec<Vec<u32>>>,
}

/// How many of the selections that a recording holds follow from the keys that were made of it.
#[derive(Clone, Copy, Debug, Default)]
struct Agreement {
    compared: usize,
    equal: usize,
}

/// Carries out the command.
///
/// # Errors
/// Files that cannot be read or written, or that do not fit one another.
pub fn run(arguments: &TraceArguments) -> Result<()> {
    within("steps", arguments.steps, 2, MAX_STEPS)?;
    let shown = arguments.recording.display();
    let (header, layers) = read(arguments).with_context(|| format!("--recording {shown}"))?;
    let text = std::fs::read(&arguments.calibration).with_context(|| format!("--calibration {}", arguments.calibration.display()))?;
    let calibration: Calibration = serde_json::from_slice(&text).context("--calibration")?;
    calibration.check(&header.shape)?;
    let tokens = layers.first().map_or(0, |layer| layer.tokens);
    ensure!(layers.iter().all(|layer| layer.tokens == tokens), "--recording {shown}: layers of different lengths");
    within("steps", arguments.steps, 2, tokens)?;
    let first = tokens - arguments.steps;
    let horizon = Settings { exact_tokens: arguments.exact_tokens, ..Settings::default() }.horizon(first + 1);
    ensure!(horizon > 0, "--recording {shown}: {tokens} tokens leave no chunk before the horizon of step {first}");
    let rows = 1 << horizon.ilog2();
    let (trace, agreement) = score(&header, &layers, &calibration, &Size { rows, horizon, first, steps: arguments.steps })?;
    trace.write(&arguments.out).with_context(|| format!("--out {}", arguments.out.display()))?;
    report(arguments, &trace, agreement);
    Ok(())
}

/// Which rows and which tokens make the trace.
struct Size {
    rows: usize,
    horizon: usize,
    first: usize,
    steps: usize,
}

fn read(arguments: &TraceArguments) -> Result<(RecordingHeader, Vec<RecordedLayer>)> {
    let mut reader = RecordingReader::new(BufReader::with_capacity(1 << 20, File::open(&arguments.recording)?))?;
    let header = reader.header().clone();
    let selected = header.shape.layers.iter().enumerate().filter(|(_, layer)| layer.kind == LaneKind::Selected);
    let mut layers: Vec<RecordedLayer> = selected.map(|(layer, _)| RecordedLayer { layer, ..RecordedLayer::default() }).collect();
    ensure!(!layers.is_empty(), "the model has no full-attention layer");
    while let Some(block) = reader.next_block()? {
        let (Block::Attention { layer, .. } | Block::Selection { layer, .. }) = &block;
        let Some(recorded) = layers.iter_mut().find(|recorded| recorded.layer == usize::from(*layer)) else { continue };
        match block {
            Block::Attention { first_position, queries, keys, .. } => {
                ensure!(
                    first_position == recorded.tokens as u64,
                    "layer {}: position {first_position} follows {} tokens",
                    recorded.layer,
                    recorded.tokens
                );
                recorded.add(&header.shape, &queries, &keys, arguments.steps);
            }
            Block::Selection { position, lanes, .. } => {
                recorded.selected.insert(usize::try_from(position)?, lanes);
            }
        }
    }
    Ok((header, layers))
}

impl RecordedLayer {
    fn add(&mut self, shape: &ModelShape, queries: &[f32], keys: &[f32], steps: usize) {
        let shape = &shape.layers[self.layer];
        let width = usize::from(shape.query_heads) * usize::from(shape.head_dim);
        self.tokens += queries.len() / width;
        self.keys.extend_from_slice(keys);
        self.queries.extend(queries.chunks_exact(width).map(<[f32]>::to_vec));
        self.queries.drain(..self.queries.len().saturating_sub(steps));
    }

    /// Label pages of the first `rows` keys, made of rows as they are stored.
    fn labels(&self, job: &Scoring<'_>, device: &mut dyn Device) -> Vec<Vec<u8>> {
        let geometry = job.geometry;
        let lanes = geometry.heads.lanes();
        let chunk_keys = CHUNK_TOKENS * lanes * geometry.head_dim;
        // Labels are made of keys alone.
        let values = vec![0.0; chunk_keys];
        let mut page = vec![0; geometry.page_bytes()];
        let chunks = self.keys.chunks_exact(chunk_keys).take(job.rows / CHUNK_TOKENS);
        let labels = chunks.map(|keys| {
            let LayerGeometry { head_dim, row_type, ref scales, .. } = *geometry;
            pack_rows(&PackJob { keys, values: &values, lanes, head_dim, row_type, scales }, &mut page);
            let mut label = vec![0; lanes * CHUNK_TOKENS * job.coder.plan.label_bytes()];
            device.label(&LabelJob { geometry, page: &page, coder: job.coder }, &mut label);
            label
        });
        labels.collect()
    }
}

/// How a layer is scored.
struct Scoring<'a> {
    geometry: &'a LayerGeometry,
    coder: &'a LabelCoder,
    rows: usize,
}

/// Scores every step of every layer: the trace, and how well it agrees with what was recorded.
fn score(header: &RecordingHeader, layers: &[RecordedLayer], calibration: &Calibration, size: &Size) -> Result<(KeyTrace, Agreement)> {
    let sources: Vec<SourceLane> = layers.iter().flat_map(|recorded| sources(&header.shape, recorded.layer)).collect();
    let mut keys = vec![0_u16; size.steps * sources.len() * size.rows];
    let threads = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    let mut device = open(DeviceKind::Cpu, threads)?;
    let (mut first_source, mut agreement) = (0, Agreement::default());
    for recorded in layers {
        let shape = &header.shape.layers[recorded.layer];
        let Some(layer) = calibration.layer(recorded.layer) else { bail!("--calibration: layer {} is missing", recorded.layer) };
        let coder = LabelCoder::new(&calibration.plan, layer);
        let geometry = &LayerGeometry::of(&header.shape, recorded.layer);
        let scoring = Scoring { geometry, coder: &coder, rows: size.rows };
        let labels = recorded.labels(&scoring, device.as_mut());
        let labels: Vec<&[u8]> = labels.iter().map(Vec::as_slice).collect();
        for (step, query) in recorded.queries.iter().enumerate() {
            show_progress(&format!("layer {}", recorded.layer), step, size.steps);
            let out = &mut keys[(step * sources.len() + first_source) * size.rows..][..shape.lanes() * size.rows];
            device.score(&ScoreJob { geometry, query, labels: &labels, coder: &coder }, out);
            if size.rows == size.horizon {
                agreement.compare(recorded, size.first + step, out, device.as_mut());
            }
        }
        first_source += shape.lanes();
    }
    let origin = TraceOrigin {
        model: header.model.clone(),
        layers: sources,
        first_position: size.first as u64,
        plan: calibration.plan.clone(),
        text_hash: header.text_hash.clone(),
        calibration_hash: calibration.text_hash.clone(),
        command: std::env::args().skip(1).fold("sluice-bench".to_owned(), |line, word| line + " " + &word),
    };
    Ok((KeyTrace::new(origin, size.rows, size.steps, keys)?, agreement))
}

fn sources(shape: &ModelShape, layer: usize) -> impl Iterator<Item = SourceLane> + use<> {
    let lanes = shape.layers[layer].kv_heads;
    (0..lanes).map(move |lane| SourceLane { layer: layer as u16, lane })
}

impl Agreement {
    /// Selects as many rows as the recording did, from `[lane][row]` keys.
    fn compare(&mut self, recorded: &RecordedLayer, position: usize, keys: &[u16], device: &mut dyn Device) {
        let Some(lanes) = recorded.selected.get(&position) else { return };
        let rows = keys.len() / lanes.len();
        for (lane, keys) in lanes.iter().zip(keys.chunks_exact(rows)) {
            let sinks = Settings::default().sink_tokens as usize;
            if lane.len() < sinks || lane.len() > rows || lane.iter().any(|&row| row as usize >= rows) {
                continue;
            }
            let mut positions = vec![0; lane.len()];
            device.select(&SelectJob { keys, lanes: 1, rows, count: lane.len(), sinks }, &mut positions);
            self.compared += 1;
            self.equal += usize::from(positions == *lane);
        }
    }
}

fn report(arguments: &TraceArguments, trace: &KeyTrace, agreement: Agreement) {
    let KeyTrace { rows, steps, origin, .. } = trace;
    let layers: Vec<String> = origin.layers.iter().map(ToString::to_string).collect();
    match arguments.format {
        Format::Json => println!(
            "{}",
            json!({
                "out": arguments.out, "model": origin.model, "rows": rows, "steps": steps, "layers": layers,
                "first_position": origin.first_position, "plan": origin.plan.to_string(),
                "selections": agreement.compared, "selections_equal": agreement.equal,
            })
        ),
        Format::Table => {
            println!("written      {}", arguments.out.display());
            println!("model        {}, lanes {}", origin.model, layers.join(" "));
            println!("steps        {steps}, the first at position {}", origin.first_position);
            println!("rows         {rows}, labels {}", origin.plan);
            println!("selections   {} of the recording's {} follow from the keys", agreement.equal, agreement.compared);
        }
    }
}
