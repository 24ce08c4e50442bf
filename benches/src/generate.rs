//! `sluice-bench generate`: greedy continuation of a prompt.

use std::io::Write;
use std::time::Instant;

use anyhow::{Result, ensure};
use clap::Args;
use serde::Serialize;
use sluice_kernels::shape::RowType;

use crate::model::input::ModelArguments;
use crate::model::serving::ServingArguments;
use crate::model::{AttentionLayers, Hidden, Model, PREFILL_TOKENS, Phase, Pieces};
use crate::report::Format;

/// Arguments of `sluice-bench generate`.
#[derive(Args, Debug)]
pub struct GenerateArguments {
    #[command(flatten)]
    model: ModelArguments,
    /// Text to go on from.
    #[arg(long)]
    prompt: String,
    /// Tokens to generate; the end-of-text token ends earlier.
    #[arg(long, value_name = "TOKENS", default_value_t = 64)]
    count: usize,
    /// Dense attention of the worker's own, none of Sluice's code involved.
    #[arg(long)]
    dense: bool,
    #[command(flatten)]
    serving: ServingArguments,
    /// Text as it comes, or one JSON object.
    #[arg(long, value_enum, default_value = "table")]
    format: Format,
}

/// A continuation.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Continuation {
    /// Tokens of the prompt.
    pub prompt_tokens: usize,
    /// Generated tokens, the end-of-text token included.
    pub token_ids: Vec<u32>,
    /// Prompt tokens a second; those of a prefix hit are not counted.
    pub prefill_tokens_per_s: f64,
    /// Generated tokens a second.
    pub decode_tokens_per_s: f64,
}

/// Continues `prompt` by `count` tokens, each the most likely one, and hands each out as it comes.
/// Starts at the attention layers' position: rows before it are there already.
///
/// # Errors
/// The layers hold the whole prompt already (its last token must be run), or whatever they report.
pub fn greedy(
    model: &Model,
    prompt: &[u32],
    count: usize,
    layers: &mut dyn AttentionLayers,
    each: &mut dyn FnMut(u32) -> Result<()>,
) -> Result<Continuation> {
    let held = layers.position();
    ensure!(held < prompt.len(), "prompt: {} tokens, the cache holds {held}; at least its last token must be run", prompt.len());
    let start = Instant::now();
    let mut last: Option<Hidden> = None;
    let pieces = Pieces { tokens: PREFILL_TOKENS, phase: Phase::Prefill };
    model.forward_pieces(&prompt[held..], pieces, layers, &mut |hidden| {
        last = Some(hidden.last());
        Ok(())
    })?;
    let prefill_s = start.elapsed().as_secs_f64();
    let start = Instant::now();
    let mut token_ids = Vec::with_capacity(count);
    while let Some(hidden) = last.take().filter(|_| token_ids.len() < count) {
        let token = model.greedy(&hidden)?;
        token_ids.push(token);
        each(token)?;
        if Some(token) != model.tokenizer().end() && token_ids.len() < count {
            last = Some(model.forward(&[token], Phase::Decode, layers)?);
        }
    }
    Ok(Continuation {
        prompt_tokens: prompt.len(),
        prefill_tokens_per_s: (prompt.len() - held) as f64 / prefill_s,
        decode_tokens_per_s: token_ids.len() as f64 / start.elapsed().as_secs_f64(),
        token_ids,
    })
}

/// Runs the command.
///
/// # Errors
/// The model cannot be read, or attention fails.
pub fn run(arguments: &GenerateArguments) -> Result<()> {
    let model = arguments.model.load()?;
    let prompt = model.tokenizer().encode(&arguments.prompt)?;
    let row_type = RowType::from(arguments.model.row_type);
    let mut shown = Shown { model: &model, ids: Vec::new(), bytes: 0, live: arguments.format == Format::Table };
    let mut each = |token| shown.push(token);
    let continuation = if arguments.dense {
        ensure!(row_type != RowType::Fp8, "--row-type: fp8, which takes its scales from --calibrate-on, but --dense calibrates nothing");
        let mut layers = arguments.model.dense(&model, row_type)?;
        greedy(&model, &prompt, arguments.count, &mut layers, &mut each)?
    } else {
        // The last token of the prompt is always run, so a prefix hit must end before it.
        let prefix = &prompt[..prompt.len().saturating_sub(1)];
        let mut served = arguments.serving.open(&model, row_type, prefix, prompt.len() + arguments.count)?;
        greedy(&model, &prompt, arguments.count, &mut served.layers, &mut each)?
    };
    if arguments.format == Format::Json {
        let text = model.tokenizer().decode(&continuation.token_ids)?;
        println!("{}", serde_json::json!({ "text": text, "result": continuation }));
    } else {
        println!();
        eprintln!("prefill {:.1}, decode {:.1} tokens/s", continuation.prefill_tokens_per_s, continuation.decode_tokens_per_s);
    }
    Ok(())
}

/// Text on standard output as far as it is whole characters.
struct Shown<'a> {
    model: &'a Model,
    ids: Vec<u32>,
    bytes: usize,
    live: bool,
}

impl Shown<'_> {
    fn push(&mut self, token: u32) -> Result<()> {
        self.ids.push(token);
        let text = self.model.tokenizer().decode(&self.ids)?;
        // A character that is still missing bytes shows as U+FFFD: it waits for the next token.
        if self.live && !text.ends_with('\u{fffd}') {
            print!("{}", &text[self.bytes..]);
            std::io::stdout().flush()?;
            self.bytes = text.len();
        }
        Ok(())
    }
}
