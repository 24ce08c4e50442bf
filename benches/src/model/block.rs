//! One transformer block: attention, then feed-forward, each added to the residual stream.

use anyhow::Result;
use rayon::prelude::*;

use super::attention::{AttentionLayers, Phase, Piece};
use super::config::{Config, Family};
use super::gguf::Gguf;
use super::linear::{Linear, Weights};
use super::norm::Norm;
use super::rotary::Angles;

/// The weights of one block. Normalisations that only some families have are optional.
pub(crate) struct Block {
    layer: usize,
    family: Family,
    attention_norm: Norm,
    query: Linear,
    key: Linear,
    value: Linear,
    query_norm: Option<Norm>,
    key_norm: Option<Norm>,
    output: Linear,
    post_attention_norm: Option<Norm>,
    feed_forward_norm: Norm,
    gate: Linear,
    up: Linear,
    down: Linear,
    post_feed_forward_norm: Option<Norm>,
    query_heads: usize,
    kv_heads: usize,
}

/// Where a piece of tokens stands.
#[derive(Clone, Copy)]
pub(crate) struct Place<'a> {
    pub(crate) first_position: usize,
    pub(crate) tokens: usize,
    pub(crate) phase: Phase,
    pub(crate) angles: &'a Angles,
}

impl Block {
    pub(crate) fn load(gguf: &mut Gguf, config: &Config, layer: usize, weights: Weights) -> Result<Self> {
        let shape = &config.layers[layer];
        let (query_heads, kv_heads, head_dim) = (usize::from(shape.query_heads), usize::from(shape.kv_heads), usize::from(shape.head_dim));
        let (hidden, feed_forward, epsilon) = (config.hidden, config.feed_forward, config.norm_epsilon);
        let (query_width, kv_width) = (query_heads * head_dim, kv_heads * head_dim);
        let name = |part: &str| format!("blk.{layer}.{part}");
        let norm_name = |part: &str| format!("blk.{layer}.{part}.weight");
        Ok(Self {
            layer,
            family: config.family,
            attention_norm: Norm::load(gguf, &norm_name("attn_norm"), hidden, epsilon)?,
            query: Linear::load(gguf, &name("attn_q"), query_width, hidden, weights)?,
            key: Linear::load(gguf, &name("attn_k"), kv_width, hidden, weights)?,
            value: Linear::load(gguf, &name("attn_v"), kv_width, hidden, weights)?,
            query_norm: Norm::load_if_present(gguf, &norm_name("attn_q_norm"), head_dim, epsilon)?,
            key_norm: Norm::load_if_present(gguf, &norm_name("attn_k_norm"), head_dim, epsilon)?,
            output: Linear::load(gguf, &name("attn_output"), hidden, query_width, weights)?,
            post_attention_norm: Norm::load_if_present(gguf, &norm_name("post_attention_norm"), hidden, epsilon)?,
            feed_forward_norm: Norm::load(gguf, &norm_name("ffn_norm"), hidden, epsilon)?,
            gate: Linear::load(gguf, &name("ffn_gate"), feed_forward, hidden, weights)?,
            up: Linear::load(gguf, &name("ffn_up"), feed_forward, hidden, weights)?,
            down: Linear::load(gguf, &name("ffn_down"), hidden, feed_forward, weights)?,
            post_feed_forward_norm: Norm::load_if_present(gguf, &norm_name("post_ffw_norm"), hidden, epsilon)?,
            query_heads,
            kv_heads,
        })
    }

    /// Adds the block's two parts to `stream` (`[token][hidden]`).
    pub(crate) fn forward(&self, stream: &mut [f32], place: Place<'_>, attention: &mut dyn AttentionLayers) -> Result<()> {
        let attended = self.attend(&self.attention_norm.of(stream), place, attention)?;
        add(stream, attended, self.post_attention_norm.as_ref());
        let fed = self.feed_forward(&self.feed_forward_norm.of(stream))?;
        add(stream, fed, self.post_feed_forward_norm.as_ref());
        Ok(())
    }

    /// The queries that this block would ask if `stream` (`[token][hidden]`) were what comes to it.
    pub(crate) fn queries(&self, stream: &[f32], angles: &Angles) -> Result<Vec<f32>> {
        self.queries_of(&self.attention_norm.of(stream), angles)
    }

    fn queries_of(&self, input: &[f32], angles: &Angles) -> Result<Vec<f32>> {
        let mut queries = self.query.forward(input)?;
        if let Some(norm) = &self.query_norm {
            norm.apply(&mut queries);
        }
        angles.turn(&mut queries, self.query_heads);
        Ok(queries)
    }

    fn attend(&self, input: &[f32], place: Place<'_>, attention: &mut dyn AttentionLayers) -> Result<Vec<f32>> {
        let queries = self.queries_of(input, place.angles)?;
        let mut keys = self.key.forward(input)?;
        let values = self.value.forward(input)?;
        if let Some(norm) = &self.key_norm {
            norm.apply(&mut keys);
        }
        place.angles.turn(&mut keys, self.kv_heads);
        let mut out = vec![0f32; queries.len()];
        let piece = Piece {
            layer: self.layer,
            first_position: place.first_position,
            tokens: place.tokens,
            phase: place.phase,
            queries: &queries,
            keys: &keys,
            values: &values,
        };
        attention.attend(&piece, &mut out)?;
        self.output.forward(&out)
    }

    fn feed_forward(&self, input: &[f32]) -> Result<Vec<f32>> {
        let mut gate = self.gate.forward(input)?;
        let up = self.up.forward(input)?;
        let activation = if self.family == Family::Gemma3 { gelu_tanh } else { silu };
        gate.par_iter_mut().zip(&up).with_min_len(4096).for_each(|(gate, up)| *gate = activation(*gate) * up);
        self.down.forward(&gate)
    }
}

fn add(stream: &mut [f32], mut part: Vec<f32>, norm: Option<&Norm>) {
    if let Some(norm) = norm {
        norm.apply(&mut part);
    }
    stream.iter_mut().zip(&part).for_each(|(value, part)| *value += part);
}

/// Gaussian error linear unit in its tanh form (arXiv 1606.08415, section 2): `x (1 + tanh u) / 2` is x times the logistic function of 2u.
fn gelu_tanh(x: f32) -> f32 {
    let u = (2.0 / std::f32::consts::PI).sqrt() * (x + 0.044_715 * x * x * x);
    x / (1.0 + (-2.0 * u).exp())
}

/// x times the logistic function of x.
fn silu(x: f32) -> f32 {
    x / (1.0 + (-x).exp())
}
