//! `sluice-bench look-ahead`: what fetching rows ahead, by queries that the layer before predicts, buys beyond a pool of hot rows.

mod gathered;
mod replayed;
mod report;

use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use clap::Args;
use indicatif::{ProgressBar, ProgressStyle};
use sluice_kernels::budget::Settings;
use sluice_kernels::device::DeviceKind;
use sluice_kernels::label::Calibration;
use sluice_kernels::shape::RowType;

use self::gathered::Gatherer;
use self::replayed::{Replay, agreement, replay};
use crate::model::input::{ModelArguments, TokenArguments, first_tokens};
use crate::model::{PREFILL_TOKENS, Phase, Pieces};
use crate::report::Format;
use crate::units::{Ratio, TokenCount};

/// Runs a text through a real model with dense attention, and replays its last tokens as decode steps of the full-attention layers through
/// Sluice's decoder, with and without looking ahead: the query of a layer is predicted by the hidden state one layer before, through the
/// layer's own norms, query projection and rotary embedding.
#[derive(Args, Debug)]
pub struct LookAheadArguments {
    #[command(flatten)]
    model: ModelArguments,
    #[command(flatten)]
    text: TokenArguments,
    /// Tokens of the text, the begin-of-text token included.
    #[arg(long, value_name = "TOKENS", default_value = "16Ki")]
    tokens: TokenCount,
    /// How many of them, the last ones, are decode steps.
    #[arg(long, value_name = "STEPS", default_value_t = 128)]
    steps: usize,
    /// Steps that are not counted.
    #[arg(long, value_name = "STEPS", default_value_t = 32)]
    warm_up: usize,
    /// Calibration made by `sluice calibrate`, of another text; it names the label plan.
    #[arg(long, value_name = "FILE")]
    calibration: PathBuf,
    /// Rows that a lane selects, as a part of all.
    #[arg(long, default_value = "1/16")]
    ratio: Ratio,
    /// Rows of a lane's pool, in selected rows; may be repeated.
    #[arg(long, default_values_t = [1, 2, 3])]
    pool: Vec<usize>,
    /// Device of the decoder: cpu or reference.
    #[arg(long, default_value = "cpu")]
    device: DeviceKind,
    /// Table or JSON on standard output.
    #[arg(long, value_enum, default_value_t = Format::Table)]
    format: Format,
}

/// Carries out the command.
///
/// # Errors
/// Flags out of bounds, or files that cannot be read or do not fit one another.
pub fn run(arguments: &LookAheadArguments) -> Result<()> {
    let (tokens, steps) = (arguments.tokens.0, arguments.steps);
    ensure!(
        arguments.warm_up < steps && steps < tokens,
        "--warm-up, --steps, --tokens: {}, {steps}, {tokens} do not ascend",
        arguments.warm_up
    );
    let text = std::fs::read(&arguments.calibration).with_context(|| format!("--calibration {}", arguments.calibration.display()))?;
    let calibration: Calibration = serde_json::from_slice(&text).context("--calibration")?;
    let model = arguments.model.load()?;
    let shape = model.shape(RowType::F16)?;
    calibration.check(&shape)?;
    let ids = first_tokens(arguments.text.read(model.tokenizer())?, tokens)?;
    let mut gatherer = Gatherer::new(arguments.model.dense(&model, RowType::F16)?, &shape, tokens - steps);
    let bar = ProgressBar::new(tokens as u64).with_style(ProgressStyle::with_template("{bar:40} {pos}/{len} tokens, {eta} left")?);
    model.forward_pieces(&ids, Pieces { tokens: PREFILL_TOKENS, phase: Phase::Prefill }, &mut gatherer, &mut |hidden| {
        bar.inc(hidden.tokens() as u64);
        Ok(())
    })?;
    bar.finish_and_clear();
    let gathered = gatherer.finish(&calibration)?;
    let settings = Settings { budget: arguments.ratio.budget(256), ..Settings::default() };
    let selected = settings.selected_tokens(tokens);
    let job = |hot_rows, looks_ahead| Replay { settings, device: arguments.device, warm_up: arguments.warm_up, hot_rows, looks_ahead };
    let agreement = agreement(&gathered, &job(0, false))?;
    let mut outcomes = Vec::new();
    for &pool in &arguments.pool {
        ensure!(pool > 0, "--pool: 0, at least 1 needed");
        let alone = replay(&gathered, &job(pool * selected, false))?;
        let ahead = replay(&gathered, &job(pool * selected, true))?;
        ensure!(alone.digest == ahead.digest, "looking ahead has changed a result");
        outcomes.push(report::Outcome::new(pool, &alone, &ahead));
    }
    let found = report::Found {
        tokens,
        steps: steps - arguments.warm_up,
        selected,
        layers: gathered.layers.iter().map(|layer| layer.layer).collect(),
        plan: calibration.plan.to_string(),
        agreement,
        outcomes,
    };
    found.show(arguments.format)
}
