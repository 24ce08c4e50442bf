//! `sluice calibrate`: from recorded queries and keys to a calibration file.

use std::fs::File;
use std::io::{BufReader, Write as _};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use clap::Args;
use serde::Serialize;
use sluice_kernels::label::{Calibration, Calibrator, LabelPlan};
use sluice_kernels::recording::{Block, RecordingReader};
use sluice_kernels::shape::{LaneKind, ModelShape};

use super::Format;

/// Time between lines of progress.
const PROGRESS: Duration = Duration::from_secs(1);

/// Arguments of `sluice calibrate`.
#[derive(Args, Debug)]
pub(super) struct CalibrateArguments {
    /// Recording of queries and keys, made by `sluice-bench record` (docs/formats.md).
    #[arg(value_name = "RECORDING")]
    recording: PathBuf,
    /// Calibration file to write.
    #[arg(long, short, value_name = "PATH")]
    output: PathBuf,
    /// Bits of a label: small (1/32 of a 16-bit row), large (1/16), or groups of channels@bits such as 16@4+32@2.
    #[arg(long, default_value = "small")]
    plan: String,
    /// Seed of the sample of tokens that the quantiles come from [default: the recording's].
    #[arg(long)]
    seed: Option<u64>,
    /// How the summary is printed.
    #[arg(long, value_enum, default_value = "table")]
    format: Format,
}

/// The summary; the keys of its JSON form.
#[derive(Serialize)]
struct Summary {
    output: PathBuf,
    model: String,
    plan: String,
    label_bytes_per_row: usize,
    layers: usize,
    lanes: usize,
    tokens: u64,
    text_hash: String,
    seed: u64,
}

/// Reads the recording and writes the calibration.
pub(super) fn run(arguments: &CalibrateArguments) -> Result<()> {
    let shown = arguments.recording.display();
    let file = File::open(&arguments.recording).with_context(|| format!("{shown}"))?;
    let bytes = file.metadata().with_context(|| format!("{shown}"))?.len();
    let reader = RecordingReader::new(BufReader::with_capacity(1 << 20, file)).with_context(|| format!("{shown}"))?;
    let header = reader.header().clone();
    let plan = plan_for(&arguments.plan, &header.shape)?;
    let mut calibrator = Calibrator::new(&header.shape, &plan, &header.text_hash, arguments.seed.unwrap_or(header.seed));
    accumulate(reader, &mut calibrator, bytes).with_context(|| format!("{shown}"))?;
    let Some(calibration) = calibrator.finish() else {
        bail!("{shown}: some full-attention layer has no tokens");
    };
    calibration.check(&header.shape)?;
    write(&arguments.output, &calibration)?;
    let summary = Summary {
        output: arguments.output.clone(),
        model: header.model,
        plan: plan.to_string(),
        label_bytes_per_row: plan.label_bytes(),
        layers: calibration.layers.len(),
        lanes: calibration.layers.iter().map(|layer| layer.lanes.len()).sum(),
        tokens: calibration.tokens,
        text_hash: calibration.text_hash,
        seed: calibration.seed,
    };
    match arguments.format {
        Format::Json => println!("{}", serde_json::to_string_pretty(&summary)?),
        Format::Table => print_table(&summary),
    }
    Ok(())
}

/// Presets follow the smallest key of the full-attention layers, since one plan serves all of them.
fn plan_for(text: &str, shape: &ModelShape) -> Result<LabelPlan> {
    let selected = shape.layers.iter().filter(|layer| layer.kind == LaneKind::Selected);
    let Some(head_dim) = selected.map(|layer| layer.head_dim).min() else {
        bail!("the recorded model has no full-attention layer: there is nothing to calibrate");
    };
    let plan = match text {
        "small" => LabelPlan::small(head_dim),
        "large" => LabelPlan::large(head_dim),
        groups => groups.parse()?,
    };
    plan.check(head_dim)?;
    Ok(plan)
}

fn accumulate(mut reader: RecordingReader<BufReader<File>>, calibrator: &mut Calibrator, bytes: u64) -> Result<()> {
    let (mut read, mut shown) = (0_u64, Instant::now());
    while let Some(block) = reader.next_block()? {
        let Block::Attention { layer, queries, keys, .. } = block else { continue };
        calibrator.add(usize::from(layer), &keys, Some(&queries));
        read += 4 * (queries.len() + keys.len()) as u64;
        if shown.elapsed() >= PROGRESS {
            shown = Instant::now();
            eprintln!("calibrate: {} tokens, {} % of the recording", calibrator.tokens(), 100 * read / bytes.max(1));
        }
    }
    eprintln!("calibrate: {} tokens, done", calibrator.tokens());
    Ok(())
}

/// Whole or not at all: written beside the target, then renamed.
fn write(path: &Path, calibration: &Calibration) -> Result<()> {
    let mut name = path.as_os_str().to_owned();
    name.push(format!(".{}.new", std::process::id()));
    let unfinished = PathBuf::from(name);
    let save = || -> Result<()> {
        let mut file = File::create(&unfinished)?;
        file.write_all(&serde_json::to_vec(calibration)?)?;
        file.sync_all()?;
        Ok(std::fs::rename(&unfinished, path)?)
    };
    save().with_context(|| format!("writing {}", path.display()))
}

fn print_table(summary: &Summary) {
    let hash = if summary.text_hash.is_empty() { "unknown" } else { &summary.text_hash };
    println!("written      {}", summary.output.display());
    println!("model        {}", summary.model);
    println!("plan         {}, {} bytes a row", summary.plan, summary.label_bytes_per_row);
    println!("calibrated   {} lanes of {} layers on {} tokens, seed {}", summary.lanes, summary.layers, summary.tokens, summary.seed);
    println!("text         {hash}");
}
