//! `sluice-bench perplexity`: a text, teacher-forced, with dense attention and with sparse attention through Sluice, side by side.

mod report;
mod score;

use std::path::PathBuf;

use anyhow::{Result, ensure};
use clap::Args;
use indicatif::{ProgressBar, ProgressStyle};
use sluice_kernels::shape::RowType;

use crate::model::input::{ModelArguments, TokenArguments, first_tokens};
use crate::model::serving::ServingArguments;
use crate::model::{AttentionLayers, Model};
use crate::report::Format;
use crate::units::TokenCount;

pub use report::PerplexityReport;
pub use score::{Scored, Scoring, score};

/// Prefills the text exactly, then feeds its last tokens as decode steps and scores each of them. First with dense attention of the
/// worker's own (f32 rows, none of Sluice's code involved), then with all attention layers served by Sluice.
///
/// JSON keys: `tokens`, `scored_tokens`, `dense_nll`, `sparse_nll` (nats a token), `mass_kept` (by layer, share of the softmax over all rows
/// that the selection saw), `label_bytes_per_row`, `budget_ratio`, `attach`, `tokens_per_s` (scored tokens a second, of the sparse part
/// where there is one), and more beside them.
#[derive(Args, Debug)]
pub struct PerplexityArguments {
    #[command(flatten)]
    model: ModelArguments,
    #[command(flatten)]
    text: TokenArguments,
    /// Tokens of the text, the begin-of-text token included.
    #[arg(long, value_name = "TOKENS", default_value = "16Ki")]
    tokens: TokenCount,
    /// How many of them, the last ones, are scored.
    #[arg(long, value_name = "TOKENS", default_value = "1024")]
    scored: TokenCount,
    /// Scored tokens that go through the model at once, each attending at its own length. The result is that of single steps up to rounding.
    #[arg(long, value_name = "TOKENS", default_value_t = 8)]
    block: usize,
    /// Dense attention only.
    #[arg(long)]
    dense: bool,
    #[command(flatten)]
    serving: ServingArguments,
    /// What goes to standard output.
    #[arg(long, value_enum, default_value = "table")]
    format: Format,
    /// Also write a plot of the loss along the scored tokens to this SVG file.
    #[arg(long, value_name = "FILE")]
    plot: Option<PathBuf>,
}

/// Runs the command.
///
/// # Errors
/// Flags out of bounds, files that cannot be read, or a daemon that refuses.
pub fn run(arguments: &PerplexityArguments) -> Result<()> {
    let (tokens, scored) = (arguments.tokens.0, arguments.scored.0);
    ensure!(scored >= 1 && scored < tokens, "--scored: {scored} is outside 1 to {}, the tokens but one", tokens.saturating_sub(1));
    ensure!(arguments.block >= 1, "--block: 0, at least 1 needed");
    let model = arguments.model.load()?;
    let ids = first_tokens(arguments.text.read(model.tokenizer())?, tokens)?;
    let scoring = Scoring { scored, block: arguments.block };
    let mut dense_layers = arguments.model.dense(&model, RowType::F32)?;
    let dense = with_bar("dense", &model, &ids, scoring, &mut dense_layers)?;
    drop(dense_layers);
    let mut report = PerplexityReport::dense(&model, &ids, &dense);
    if !arguments.dense {
        let row_type = RowType::from(arguments.model.row_type);
        let prefix = &ids[..scoring.prefill_tokens(&ids)];
        let mut served = arguments.serving.open(&model, row_type, prefix, tokens)?;
        let sparse = with_bar("sparse", &model, &ids, scoring, &mut served.layers)?;
        report.add_sparse(&served, &sparse);
    }
    if let Some(path) = &arguments.plot {
        report.plot().write_svg(path)?;
    }
    match arguments.format {
        Format::Table => print!("{}", report.table()),
        Format::Json => println!("{}", serde_json::to_string(&report)?),
    }
    Ok(())
}

fn with_bar(name: &'static str, model: &Model, ids: &[u32], scoring: Scoring, layers: &mut dyn AttentionLayers) -> Result<Scored> {
    let style = ProgressStyle::with_template("{prefix} {bar:40} {pos}/{len} tokens, {per_sec}, {eta} left")?;
    let bar = ProgressBar::new(ids.len() as u64).with_style(style).with_prefix(name);
    bar.set_position(layers.position() as u64);
    let scored = score(model, ids, scoring, layers, &mut |tokens| bar.inc(tokens as u64));
    bar.finish_and_clear();
    scored
}
