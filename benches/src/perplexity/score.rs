//! Losses of the last tokens of a text, teacher-forced.

use std::time::Instant;

use anyhow::{Context, Result};

use crate::model::{AttentionLayers, Hidden, Model, PREFILL_TOKENS, Phase, Pieces};

/// Which tokens are scored, and how they are fed.
#[derive(Clone, Copy, Debug)]
pub struct Scoring {
    /// The last so many tokens of the text.
    pub scored: usize,
    /// Tokens that go through the model at once.
    pub block: usize,
}

impl Scoring {
    /// Tokens that are prefilled: all before the one from which the first scored token is predicted.
    #[must_use]
    pub fn prefill_tokens(self, ids: &[u32]) -> usize {
        ids.len() - 1 - self.scored
    }
}

/// Losses and times.
#[derive(Clone, Debug)]
pub struct Scored {
    /// Negative log-likelihood of every scored token, in nats.
    pub losses: Vec<f64>,
    /// Prefilled tokens a second; 0 where nothing was prefilled.
    pub prefill_tokens_per_s: f64,
    /// Scored tokens a second through all layers; the output head, which runs once for all of them, not counted.
    pub decode_tokens_per_s: f64,
}

impl Scored {
    /// Mean loss in nats a token.
    #[must_use]
    pub fn mean(&self) -> f64 {
        self.losses.iter().sum::<f64>() / self.losses.len() as f64
    }
}

/// Prefills all but the last tokens, feeds those as decode steps and scores them. Goes on from the position of `layers`.
///
/// # Errors
/// Whatever the attention layers report.
pub fn score(
    model: &Model,
    ids: &[u32],
    scoring: Scoring,
    layers: &mut dyn AttentionLayers,
    each: &mut dyn FnMut(usize),
) -> Result<Scored> {
    let cut = scoring.prefill_tokens(ids);
    let prefill = &ids[layers.position().min(cut)..cut];
    let begin = Instant::now();
    model.forward_pieces(prefill, Pieces { tokens: PREFILL_TOKENS, phase: Phase::Prefill }, layers, &mut |hidden| {
        each(hidden.tokens());
        Ok(())
    })?;
    let prefill_s = begin.elapsed().as_secs_f64();
    let mut states: Option<Hidden> = None;
    let begin = Instant::now();
    let pieces = Pieces { tokens: scoring.block, phase: Phase::Decode };
    model.forward_pieces(&ids[cut..ids.len() - 1], pieces, layers, &mut |hidden| {
        each(hidden.tokens());
        match &mut states {
            Some(states) => states.extend(&hidden),
            None => states = Some(hidden),
        }
        Ok(())
    })?;
    let decode_s = begin.elapsed().as_secs_f64();
    let losses = model.losses(&states.context("scored tokens: none")?, &ids[cut + 1..])?;
    Ok(Scored {
        losses,
        prefill_tokens_per_s: if prefill.is_empty() { 0.0 } else { prefill.len() as f64 / prefill_s },
        decode_tokens_per_s: scoring.scored as f64 / decode_s,
    })
}
