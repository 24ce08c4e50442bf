//! A real decode worker: GGUF weights and tokenizer, with a forward pass whose attention layers are somebody else's.
//!
//! The forward pass is written here and not taken from candle's ready-made models, because those hide their caches and mishandle
//! prefill in pieces and steps of one token in window layers. Matrices and their products are candle's.

mod attention;
mod block;
mod calibrating;
mod config;
mod dense;
mod gguf;
mod grown;
mod head;
pub mod input;
mod linear;
mod local;
mod mass;
mod norm;
mod rotary;
mod served;
pub mod serving;
mod session;
mod tokenizer;

use std::ops::Range;
use std::path::Path;

use anyhow::{Context, Result, bail};
use sluice_kernels::scales::LaneScales;
use sluice_kernels::shape::{LaneKind, ModelShape, RowType};

pub use attention::{AttentionLayers, Phase, Piece};
pub use calibrating::{CALIBRATION_SEED, Calibrated, calibrate};
pub use config::{Config, Family, RotaryBase, RotaryLayout};
pub use dense::DenseLayers;
pub use gguf::Gguf;
pub use linear::Weights;
pub use local::{LocalOptions, LocalSteps};
pub use mass::MassMeter;
pub use served::{LayerStep, ServedLayers, Steps};
pub use session::SessionSteps;
pub use tokenizer::Tokenizer;

use block::{Block, Place};
use head::Head;
use norm::Norm;
use rotary::{Angles, Rotary};

/// Tokens of a prefill piece.
pub const PREFILL_TOKENS: usize = 512;

/// A model, ready to run.
pub struct Model {
    config: Config,
    tokenizer: Tokenizer,
    digest: [u8; 32],
    head: Head,
    blocks: Vec<Block>,
    final_norm: Norm,
    rotary_global: Rotary,
    rotary_window: Rotary,
}

/// Final hidden states of a piece: normalised, before the output head.
pub struct Hidden {
    /// `[token][hidden]`.
    rows: Vec<f32>,
    width: usize,
}

impl Hidden {
    /// Tokens in it.
    #[must_use]
    pub fn tokens(&self) -> usize {
        self.rows.len() / self.width
    }

    /// The states of the last token alone.
    #[must_use]
    pub fn last(&self) -> Self {
        let start = self.rows.len().saturating_sub(self.width);
        Self { rows: self.rows[start..].to_vec(), width: self.width }
    }

    /// The states of some of its tokens.
    #[must_use]
    pub fn range(&self, tokens: Range<usize>) -> Self {
        Self { rows: self.rows[tokens.start * self.width..tokens.end * self.width].to_vec(), width: self.width }
    }

    /// Puts the states of a later piece behind these.
    pub fn extend(&mut self, later: &Self) {
        self.rows.extend_from_slice(&later.rows);
    }
}

impl Model {
    /// Reads a model.
    ///
    /// # Errors
    /// The file cannot be read, its family has no forward pass here, a tensor is missing or has other dimensions than the metadata give,
    /// or its tokenizer is of a kind that is not known exactly.
    pub fn load(path: &Path, weights: Weights) -> Result<Self> {
        let mut gguf = Gguf::open(path)?;
        let config = Config::read(&gguf)?;
        config.shape(RowType::F32)?;
        let tokenizer = Tokenizer::read(&gguf)?;
        let digest = gguf.digest()?;
        let head = Head::load(&mut gguf, &config, weights)?;
        let blocks = (0..config.layers.len()).map(|layer| Block::load(&mut gguf, &config, layer, weights)).collect::<Result<_>>()?;
        let final_norm = Norm::load(&mut gguf, "output_norm.weight", config.hidden, config.norm_epsilon)?;
        let head_dim = config.layers.first().map_or(0, |layer| usize::from(layer.head_dim));
        // Llama 3.1 and later stretch single frequencies; the converter writes their divisors as a tensor.
        let divisors = if gguf.has_tensor("rope_freqs.weight") { gguf.vector("rope_freqs.weight", head_dim / 2)? } else { Vec::new() };
        let layout = config.rotary_layout();
        let rotary_global = Rotary::new(layout, config.rotary_global, head_dim, &divisors);
        let rotary_window = Rotary::new(layout, config.rotary_window, head_dim, &divisors);
        Ok(Self { config, tokenizer, digest, head, blocks, final_norm, rotary_global, rotary_window })
    }

    /// The sizes of the model.
    #[must_use]
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// Its tokenizer.
    #[must_use]
    pub fn tokenizer(&self) -> &Tokenizer {
        &self.tokenizer
    }

    /// BLAKE3 of the GGUF file.
    #[must_use]
    pub fn digest(&self) -> [u8; 32] {
        self.digest
    }

    /// The shape of its attention layers with rows of `row_type`, which has no scales.
    ///
    /// # Errors
    /// A field that Sluice does not serve.
    pub fn shape(&self, row_type: RowType) -> Result<ModelShape> {
        self.config.shape(row_type)
    }

    /// The shape of its attention layers with fp8 rows of these scales, by layer.
    ///
    /// # Errors
    /// A field that Sluice does not serve.
    pub fn scaled_shape(&self, scales: Vec<LaneScales>) -> Result<ModelShape> {
        let shape = ModelShape { row_type: RowType::Fp8, layers: self.config.layers.clone(), scales };
        shape.check()?;
        Ok(shape)
    }

    /// Runs one piece of tokens through all layers and commits it.
    ///
    /// # Errors
    /// A token outside the vocabulary, or whatever the attention layers report.
    pub fn forward(&self, token_ids: &[u32], phase: Phase, attention: &mut dyn AttentionLayers) -> Result<Hidden> {
        if token_ids.is_empty() {
            bail!("token_ids: none given");
        }
        let first_position = attention.position();
        let tokens = token_ids.len();
        let global = self.rotary_global.angles(first_position, tokens);
        let window = self.rotary_window.angles(first_position, tokens);
        let mut stream = self.head.embed(token_ids)?;
        attention.begin(token_ids, phase)?;
        for (layer, block) in self.blocks.iter().enumerate() {
            self.predict(layer + 1, &stream, &global, first_position, attention)?;
            let angles = if self.config.layers[layer].kind == LaneKind::Selected { &global } else { &window };
            let place = Place { first_position, tokens, phase, angles };
            block.forward(&mut stream, place, attention).with_context(|| format!("layer {layer}"))?;
        }
        attention.commit()?;
        self.final_norm.apply(&mut stream);
        Ok(Hidden { rows: stream, width: self.config.hidden })
    }

    /// Tells the attention layers what a full-attention layer would be asked if `stream` came to it.
    fn predict(
        &self,
        layer: usize,
        stream: &[f32],
        angles: &Angles,
        first_position: usize,
        attention: &mut dyn AttentionLayers,
    ) -> Result<()> {
        let Some(of_layer) = self.config.layers.get(layer) else { return Ok(()) };
        if of_layer.kind != LaneKind::Selected || !attention.wants_predictions() {
            return Ok(());
        }
        let queries = self.blocks[layer].queries(stream, angles)?;
        attention.predicted(layer, first_position, stream.len() / self.config.hidden, &queries)
    }

    /// Runs tokens in pieces and hands out the hidden states of each, in order.
    ///
    /// # Errors
    /// As for [`Model::forward`]; pieces of no tokens; whatever `each` reports.
    pub fn forward_pieces(
        &self,
        token_ids: &[u32],
        pieces: Pieces,
        attention: &mut dyn AttentionLayers,
        each: &mut dyn FnMut(Hidden) -> Result<()>,
    ) -> Result<()> {
        if pieces.tokens == 0 {
            bail!("pieces.tokens: 0, at least 1 needed");
        }
        token_ids.chunks(pieces.tokens).try_for_each(|piece| each(self.forward(piece, pieces.phase, attention)?))
    }

    /// Logits of every hidden state: `[token][vocabulary]`.
    ///
    /// # Errors
    /// Out of memory, as candle reports it.
    pub fn logits(&self, hidden: &Hidden) -> Result<Vec<f32>> {
        self.head.logits(&hidden.rows)
    }

    /// Negative log-likelihood in nats of the token that followed each hidden state.
    ///
    /// # Errors
    /// Not one target for each hidden state, or one outside the vocabulary.
    pub fn losses(&self, hidden: &Hidden, targets: &[u32]) -> Result<Vec<f64>> {
        self.head.losses(&hidden.rows, targets)
    }

    /// The most likely next token of the last hidden state; the lowest id among equals.
    ///
    /// # Errors
    /// As for [`Model::logits`].
    pub fn greedy(&self, hidden: &Hidden) -> Result<u32> {
        let logits = self.logits(&hidden.last())?;
        let mut best = 0;
        for (id, logit) in logits.iter().enumerate() {
            if *logit > logits[best] {
                best = id;
            }
        }
        Ok(best as u32)
    }
}

/// How tokens are cut into pieces.
#[derive(Clone, Copy, Debug)]
pub struct Pieces {
    /// Tokens of a piece; the last may be shorter.
    pub tokens: usize,
    /// What they are for.
    pub phase: Phase,
}
