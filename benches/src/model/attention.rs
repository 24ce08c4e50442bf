//! The seam between a model and whoever keeps its KV cache.

use anyhow::Result;

/// What a piece of tokens is for, which decides how it may be attended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// Prompt: every row before a token is attended exactly.
    Prefill,
    /// Decode steps, one or several of a sequence at once (each at its own length): rows may be selected.
    Decode,
}

/// Queries, keys and values of consecutive tokens in one layer, after normalisation and rotation, queries not scaled.
#[derive(Clone, Copy, Debug)]
pub struct Piece<'a> {
    /// Layer of the model.
    pub layer: usize,
    /// Position of the first token: the tokens committed so far.
    pub first_position: usize,
    /// Tokens of the piece.
    pub tokens: usize,
    /// What the tokens are for.
    pub phase: Phase,
    /// `[token][query_head][d]`.
    pub queries: &'a [f32],
    /// `[token][kv_head][d]`.
    pub keys: &'a [f32],
    /// `[token][kv_head][d]`.
    pub values: &'a [f32],
}

/// Keeps the rows of all attention layers of one sequence, and attends them.
pub trait AttentionLayers {
    /// Tokens committed so far: the position of the next token.
    fn position(&self) -> usize;

    /// Begins a piece of consecutive tokens at [`AttentionLayers::position`].
    ///
    /// # Errors
    /// There is no room for their rows.
    fn begin(&mut self, token_ids: &[u32], phase: Phase) -> Result<()>;

    /// Appends the rows of the piece to its layer, then attends with each of its queries to the rows up to and including its own.
    /// Writes `out` (`[token][query_head][d]`). Layers come in order, each once a piece.
    ///
    /// # Errors
    /// The rows cannot be kept or attended.
    fn attend(&mut self, piece: &Piece<'_>, out: &mut [f32]) -> Result<()>;

    /// Whether [`AttentionLayers::predicted`] is to be called.
    fn wants_predictions(&self) -> bool {
        false
    }

    /// Gives the queries (`[token][query_head][d]`) of a full-attention layer that comes after the next one, as the hidden state before the
    /// next one predicts them: through the layer's own norms, query projection and rotation (Double Sparsity, section 3.4).
    ///
    /// # Errors
    /// They cannot be used.
    fn predicted(&mut self, _layer: usize, _first_position: usize, _tokens: usize, _queries: &[f32]) -> Result<()> {
        Ok(())
    }

    /// Ends the piece: all layers have been attended, its tokens count.
    ///
    /// # Errors
    /// A layer is missing.
    fn commit(&mut self) -> Result<()>;
}
