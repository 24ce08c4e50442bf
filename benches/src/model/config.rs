//! What a GGUF says about a model: its family, sizes, windows and rotation.

use anyhow::{Context, Result, anyhow, bail};
use sluice_kernels::shape::{LaneKind, LayerShape, ModelShape, RowType};

use super::gguf::Gguf;

/// A model family whose forward pass is written here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Family {
    /// Gemma 3, text part.
    Gemma3,
    /// Llama 1 to 3 and what shares their graph.
    Llama,
    /// Qwen 2 and 2.5.
    Qwen2,
    /// Qwen 3, dense.
    Qwen3,
}

/// Which channels of a head turn together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RotaryLayout {
    /// Channel i with channel i + d/2 (NeoX). Gemma and Qwen.
    Halves,
    /// Channel 2i with channel 2i + 1. Llama: its converter permutes the rows of q and k to this layout.
    Pairs,
}

/// How fast positions turn.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct RotaryBase {
    /// The base of the geometric series of frequencies.
    pub base: f32,
    /// Positions are divided by it; 1 unless the model was stretched linearly.
    pub divisor: f32,
}

/// The sizes of a model.
#[derive(Clone, Debug)]
pub struct Config {
    /// Family.
    pub family: Family,
    /// Channels of the residual stream.
    pub hidden: usize,
    /// Channels inside a feed-forward block.
    pub feed_forward: usize,
    /// Tokens of the vocabulary.
    pub vocabulary: usize,
    /// Added to the mean square before its root is taken.
    pub norm_epsilon: f32,
    /// Attention layers: kinds, heads, head dimension, scale.
    pub layers: Vec<LayerShape>,
    /// Rotation of full-attention layers.
    pub rotary_global: RotaryBase,
    /// Rotation of sliding-window layers.
    pub rotary_window: RotaryBase,
}

impl Config {
    /// Reads the sizes of a model.
    ///
    /// # Errors
    /// A family without a forward pass here, a missing key, or a value out of bounds.
    pub fn read(gguf: &Gguf) -> Result<Self> {
        let family = match gguf.architecture() {
            "gemma3" => Family::Gemma3,
            "llama" => Family::Llama,
            "qwen2" => Family::Qwen2,
            "qwen3" => Family::Qwen3,
            other => bail!("gguf: general.architecture is {other:?}; gemma3, llama, qwen2 and qwen3 have a forward pass here"),
        };
        let keys = Keys { gguf };
        let hidden = keys.number("embedding_length")?;
        let query_heads = keys.number("attention.head_count")?;
        let kv_heads = keys.optional("attention.head_count_kv")?.unwrap_or(query_heads);
        if query_heads == 0 {
            bail!("gguf: attention.head_count is 0");
        }
        let head_dim = keys.optional("attention.key_length")?.unwrap_or(hidden / query_heads);
        let value_dim = keys.optional("attention.value_length")?.unwrap_or(head_dim);
        let turned = keys.optional("rope.dimension_count")?.unwrap_or(head_dim);
        if value_dim != head_dim || turned != head_dim {
            bail!("gguf: key_length {head_dim}, value_length {value_dim}, rope.dimension_count {turned}; equal ones are served");
        }
        let blocks = keys.number("block_count")?;
        let softmax_scale = softmax_scale(family, blocks, hidden / query_heads, head_dim);
        let layer = |index| -> Result<LayerShape> {
            Ok(LayerShape {
                kind: keys.kind(family, index)?,
                query_heads: u16::try_from(query_heads)?,
                kv_heads: u16::try_from(kv_heads)?,
                head_dim: u16::try_from(head_dim)?,
                softmax_scale,
            })
        };
        let layers = (0..blocks).map(layer).collect::<Result<Vec<_>>>()?;
        let (rotary_global, rotary_window) = keys.rotary(family)?;
        Ok(Self {
            family,
            hidden,
            feed_forward: keys.number("feed_forward_length")?,
            vocabulary: gguf.array("tokenizer.ggml.tokens")?.len(),
            norm_epsilon: gguf.real(&keys.key("attention.layer_norm_rms_epsilon"))?.context("gguf: layer_norm_rms_epsilon is missing")?,
            layers,
            rotary_global,
            rotary_window,
        })
    }

    /// Which channels turn together.
    #[must_use]
    pub fn rotary_layout(&self) -> RotaryLayout {
        if self.family == Family::Llama { RotaryLayout::Pairs } else { RotaryLayout::Halves }
    }

    /// The shape of the attention layers, with rows of `row_type` (without scales), checked against the bounds of Sluice.
    ///
    /// # Errors
    /// The first field out of bounds.
    pub fn shape(&self, row_type: RowType) -> Result<ModelShape> {
        let shape = ModelShape::unscaled(row_type, self.layers.clone());
        shape.check()?;
        Ok(shape)
    }
}

/// Gemma 3 27B alone scales by the width of a head in the residual stream; the GGUF does not say so, its 62 blocks do.
fn softmax_scale(family: Family, blocks: usize, head_share: usize, head_dim: usize) -> f32 {
    let channels = if family == Family::Gemma3 && blocks == 62 { head_share } else { head_dim };
    1.0 / (channels as f32).sqrt()
}

/// The keys of one architecture.
struct Keys<'a> {
    gguf: &'a Gguf,
}

impl Keys<'_> {
    fn key(&self, name: &str) -> String {
        format!("{}.{name}", self.gguf.architecture())
    }

    fn optional(&self, name: &str) -> Result<Option<usize>> {
        self.gguf.number(&self.key(name))
    }

    fn number(&self, name: &str) -> Result<usize> {
        self.optional(name)?.ok_or_else(|| anyhow!("gguf: {} is missing", self.key(name)))
    }

    /// Gemma 3: five sliding-window layers, then one of full attention, unless the file gives another period.
    fn kind(&self, family: Family, layer: usize) -> Result<LaneKind> {
        let window = self.optional("attention.sliding_window")?.unwrap_or(0);
        if family != Family::Gemma3 || window == 0 {
            return Ok(LaneKind::Selected);
        }
        let period = self.optional("attention.sliding_window_pattern")?.unwrap_or(6);
        let full = period > 0 && (layer + 1).is_multiple_of(period);
        Ok(if full { LaneKind::Selected } else { LaneKind::Window { tokens: u32::try_from(window)? } })
    }

    /// Rotation of full-attention and of sliding-window layers.
    fn rotary(&self, family: Family) -> Result<(RotaryBase, RotaryBase)> {
        let base = self.gguf.real(&self.key("rope.freq_base"))?.unwrap_or(10_000.0);
        let scaling = self.gguf.text(&self.key("rope.scaling.type"))?.unwrap_or("none");
        let factor = self.gguf.real(&self.key("rope.scaling.factor"))?.unwrap_or(1.0);
        let divisor = match scaling {
            "none" => 1.0,
            "linear" => factor,
            other => bail!("gguf: rope.scaling.type is {other:?}; none and linear are served"),
        };
        let global = RotaryBase { base, divisor };
        if family != Family::Gemma3 {
            return Ok((global, global));
        }
        // The first converters of Gemma 3 did not write the base of its window layers.
        let window_base = self.gguf.real(&self.key("rope.freq_base_swa"))?.unwrap_or(10_000.0);
        Ok((global, RotaryBase { base: window_base, divisor: 1.0 }))
    }
}
