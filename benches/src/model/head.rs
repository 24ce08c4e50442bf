//! Both ends of the model: token embedding, and the output head that turns a hidden state into logits.

use anyhow::{Result, bail};
use candle_core::quantized::QMatMul;
use candle_core::{Device, Tensor};
use rayon::prelude::*;

use super::config::{Config, Family};
use super::gguf::Gguf;
use super::linear::{Weights, keep, product};

/// Hidden states that pass the head at once: at 262,144 tokens of vocabulary their logits take 64 MiB.
const TOKENS_AT_ONCE: usize = 64;

/// The embedding matrix and the output matrix, which are one and the same in tied models.
pub(crate) struct Head {
    embedding: QMatMul,
    /// `None` when tied.
    output: Option<QMatMul>,
    embedding_factor: f32,
    hidden: usize,
    vocabulary: usize,
}

impl Head {
    /// Reads `token_embd` and, where the file has it, `output`.
    pub(crate) fn load(gguf: &mut Gguf, config: &Config, weights: Weights) -> Result<Self> {
        let dims = [config.vocabulary, config.hidden];
        let embedding = keep(gguf.tensor("token_embd.weight", &dims)?, weights)?;
        let tied = !gguf.has_tensor("output.weight");
        let output = if tied { None } else { Some(keep(gguf.tensor("output.weight", &dims)?, weights)?) };
        // Gemma multiplies the embedding by sqrt(hidden); this is done in f32, like the reference figures.
        let embedding_factor = if config.family == Family::Gemma3 { (config.hidden as f32).sqrt() } else { 1.0 };
        Ok(Self { embedding, output, embedding_factor, hidden: config.hidden, vocabulary: config.vocabulary })
    }

    /// Embeds tokens: `[token][hidden]`.
    pub(crate) fn embed(&self, token_ids: &[u32]) -> Result<Vec<f32>> {
        if let Some(id) = token_ids.iter().find(|&&id| id as usize >= self.vocabulary) {
            bail!("token_ids: {id}, the vocabulary has {}", self.vocabulary);
        }
        let ids = Tensor::from_slice(token_ids, token_ids.len(), &Device::Cpu)?;
        let mut rows: Vec<f32> = self.embedding.embedding(&ids)?.flatten_all()?.to_vec1()?;
        rows.iter_mut().for_each(|value| *value *= self.embedding_factor);
        Ok(rows)
    }

    /// Logits of normalised hidden states (`[token][hidden]`): `[token][vocabulary]`.
    pub(crate) fn logits(&self, hidden: &[f32]) -> Result<Vec<f32>> {
        product(self.output.as_ref().unwrap_or(&self.embedding), hidden, self.hidden)
    }

    /// Negative log-likelihood in nats of `targets`, one for each row of `hidden`. Never holds more than 64 rows of logits.
    pub(crate) fn losses(&self, hidden: &[f32], targets: &[u32]) -> Result<Vec<f64>> {
        let rows = hidden.len() / self.hidden;
        if rows != targets.len() {
            bail!("targets: {} given for {rows} hidden states", targets.len());
        }
        if let Some(id) = targets.iter().find(|&&id| id as usize >= self.vocabulary) {
            bail!("targets: {id}, the vocabulary has {}", self.vocabulary);
        }
        let mut losses = Vec::with_capacity(rows);
        for (hidden, targets) in hidden.chunks(TOKENS_AT_ONCE * self.hidden).zip(targets.chunks(TOKENS_AT_ONCE)) {
            let logits = self.logits(hidden)?;
            let rows = logits.par_chunks_exact(self.vocabulary).zip(targets);
            losses.extend(rows.map(|(row, &target)| loss(row, target)).collect::<Vec<_>>());
        }
        Ok(losses)
    }
}

/// `log(sum(exp(logits))) - logits[target]`, summed in f64.
fn loss(logits: &[f32], target: u32) -> f64 {
    let largest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = logits.iter().map(|&logit| f64::from((logit - largest).exp())).sum();
    f64::from(largest) + sum.ln() - f64::from(logits[target as usize])
}
