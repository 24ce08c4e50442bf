//! `sluice-bench record`: queries, keys and selections of a real model, to calibrate from and as a trace for benches.

use std::fs::File;
use std::io::BufWriter;
use std::path::PathBuf;

use anyhow::{Context, Result, bail, ensure};
use clap::Args;
use indicatif::{ProgressBar, ProgressStyle};
use sluice_kernels::budget::Settings;
use sluice_kernels::recording::{FORMAT, RecordingHeader, RecordingWriter, VERSION};
use sluice_kernels::shape::{LaneKind, LayerShape, RowType};

use crate::model::input::{ModelArguments, TokenArguments, first_tokens, hash_tokens};
use crate::model::serving::{Served, ServingArguments};
use crate::model::{AttentionLayers, CALIBRATION_SEED, DenseLayers, PREFILL_TOKENS, Phase, Piece, Pieces};
use crate::units::TokenCount;

/// Runs a text through a real model and records queries and keys of its full-attention layers (docs/formats.md), for `sluice calibrate` and
/// for benches. Attention is dense, but with --decode the last tokens are decode steps through Sluice, and what they selected is recorded.
#[derive(Args, Debug)]
pub struct RecordArguments {
    #[command(flatten)]
    model: ModelArguments,
    #[command(flatten)]
    text: TokenArguments,
    /// Tokens of the text, the begin-of-text token included.
    #[arg(long, value_name = "TOKENS", default_value = "6000")]
    tokens: TokenCount,
    /// How many of them, the last ones, are decode steps.
    #[arg(long, value_name = "TOKENS", default_value = "0")]
    decode: TokenCount,
    #[command(flatten)]
    serving: ServingArguments,
    /// File to write.
    #[arg(long, value_name = "FILE")]
    out: PathBuf,
}

/// Who attends while a recording is made.
enum Attending {
    Dense(DenseLayers),
    Served(Box<Served>),
}

impl Attending {
    fn layers(&mut self) -> &mut dyn AttentionLayers {
        match self {
            Self::Dense(layers) => layers,
            Self::Served(served) => &mut served.layers,
        }
    }

    fn position(&self) -> usize {
        match self {
            Self::Dense(layers) => layers.position(),
            Self::Served(served) => served.layers.position(),
        }
    }
}

/// Attention layers that write down what they are asked.
struct Recorder {
    attending: Attending,
    layers: Vec<LayerShape>,
    settings: Settings,
    writer: RecordingWriter<BufWriter<File>>,
}

impl Recorder {
    /// Writes down what the step of one token selected: positions before the horizon. Later ones are always attended.
    fn record_selection(&mut self, piece: &Piece<'_>, token: usize) -> Result<()> {
        let Attending::Served(served) = &mut self.attending else { return Ok(()) };
        let position = piece.first_position + token;
        let width = piece.queries.len() / piece.tokens;
        let mut lanes = served.layers.steps().selected(piece.layer, position, &piece.queries[token * width..(token + 1) * width])?;
        let horizon = self.settings.horizon(position + 1);
        lanes.iter_mut().for_each(|lane| lane.retain(|&position| (position as usize) < horizon));
        Ok(self.writer.selection(u16::try_from(piece.layer)?, position as u64, &lanes)?)
    }
}

impl AttentionLayers for Recorder {
    fn position(&self) -> usize {
        self.attending.position()
    }

    fn begin(&mut self, token_ids: &[u32], phase: Phase) -> Result<()> {
        self.attending.layers().begin(token_ids, phase)
    }

    fn attend(&mut self, piece: &Piece<'_>, out: &mut [f32]) -> Result<()> {
        self.attending.layers().attend(piece, out)?;
        if self.layers[piece.layer].kind != LaneKind::Selected {
            return Ok(());
        }
        let layer = u16::try_from(piece.layer)?;
        self.writer.attention(layer, piece.first_position as u64, piece.tokens as u64, piece.queries, piece.keys)?;
        if piece.phase == Phase::Decode {
            (0..piece.tokens).try_for_each(|token| self.record_selection(piece, token))?;
        }
        Ok(())
    }

    fn commit(&mut self) -> Result<()> {
        self.attending.layers().commit()
    }
}

/// Runs the command.
///
/// # Errors
/// Flags out of bounds, files that cannot be read or written, a daemon that refuses or that holds rows of the text already.
pub fn run(arguments: &RecordArguments) -> Result<()> {
    let (tokens, decode) = (arguments.tokens.0, arguments.decode.0);
    ensure!(decode < tokens, "--decode: {decode} is outside 0 to {}, the tokens but one", tokens.saturating_sub(1));
    let model = arguments.model.load()?;
    let ids = first_tokens(arguments.text.read(model.tokenizer())?, tokens)?;
    let row_type = RowType::from(arguments.model.row_type);
    let (prompt, steps) = ids.split_at(tokens - decode);
    let attending = if decode == 0 {
        Attending::Dense(arguments.model.dense(&model, RowType::F32)?)
    } else {
        Attending::Served(Box::new(arguments.serving.open(&model, row_type, prompt, tokens)?))
    };
    if attending.position() > 0 {
        bail!("--endpoint: the daemon holds {} tokens of the text already, whose keys cannot be recorded", attending.position());
    }
    let shape = match &attending {
        // Queries and keys alone are recorded, as the model made them: nothing of a row type is in them.
        Attending::Dense(_) if row_type == RowType::Fp8 => model.shape(RowType::F32)?,
        Attending::Dense(_) => model.shape(row_type)?,
        Attending::Served(served) => served.layers.shape().clone(),
    };
    let out = &arguments.out;
    let file = File::create(out).with_context(|| format!("--out {}", out.display()))?;
    let name = arguments.model.gguf.file_stem().unwrap_or_default().to_string_lossy().into_owned();
    let (format, text_hash) = (FORMAT.to_owned(), hash_tokens(&ids));
    let header = RecordingHeader { format, version: VERSION, model: name, text_hash, seed: CALIBRATION_SEED, shape: shape.clone() };
    let writer = RecordingWriter::new(BufWriter::with_capacity(1 << 20, file), &header)?;
    let mut recorder = Recorder { attending, layers: shape.layers, settings: arguments.serving.settings(), writer };
    let style = ProgressStyle::with_template("recording {bar:40} {pos}/{len} tokens, {eta} left")?;
    let bar = ProgressBar::new(tokens as u64).with_style(style);
    for (ids, tokens, phase) in [(prompt, PREFILL_TOKENS, Phase::Prefill), (steps, 1, Phase::Decode)] {
        model.forward_pieces(ids, Pieces { tokens, phase }, &mut recorder, &mut |hidden| {
            bar.inc(hidden.tokens() as u64);
            Ok(())
        })?;
    }
    bar.finish_and_clear();
    recorder.writer.finish()?;
    println!("{}", out.display());
    Ok(())
}
