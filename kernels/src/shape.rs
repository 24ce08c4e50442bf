//! The shape of a model's attention: what is fixed when a model is registered.

use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::heads::HeadMap;
use crate::scales::{LaneScales, RowScale};

/// Element type of stored rows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RowType {
    /// IEEE binary32.
    F32,
    /// IEEE binary16.
    F16,
    /// bfloat16.
    Bf16,
    /// Eight bits, e4m3 ([`crate::rows::e4m3`]), times a static scale of the lane.
    #[serde(rename = "f8_e4m3")]
    Fp8,
}

impl RowType {
    /// Bytes of one element.
    #[must_use]
    pub fn element_bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::Bf16 => 2,
            Self::Fp8 => 1,
        }
    }
}

/// What a layer's lanes keep and how they are attended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LaneKind {
    /// Full attention: every row is kept and rows before the horizon are selected from.
    Selected,
    /// Sliding-window attention: a query at position p attends rows `p + 1 - tokens ..= p`. Never selected from.
    Window {
        /// Width of the window in tokens, the query's own token included.
        tokens: u32,
    },
}

/// One attention layer.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LayerShape {
    /// What the lanes keep.
    pub kind: LaneKind,
    /// Query heads; a multiple of `kv_heads`.
    pub query_heads: u16,
    /// Key/value heads: one lane each (MHA when equal to `query_heads`, otherwise GQA).
    pub kv_heads: u16,
    /// Channels of a key, and of a value: 64, 96, 128 or 256.
    pub head_dim: u16,
    /// Factor applied to q·k before the softmax, usually `1 / sqrt(head_dim)`.
    pub softmax_scale: f32,
}

impl LayerShape {
    /// Which query heads share a lane.
    #[must_use]
    pub fn heads(&self) -> HeadMap {
        HeadMap::new(self.query_heads, self.kv_heads)
    }

    /// Lanes of this layer.
    #[must_use]
    pub fn lanes(&self) -> usize {
        usize::from(self.kv_heads)
    }

    /// Bytes of one row: key then value.
    #[must_use]
    pub fn row_bytes(&self, row_type: RowType) -> usize {
        2 * usize::from(self.head_dim) * row_type.element_bytes()
    }
}

/// The attention layers of a model, in order, and how their rows are stored.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ModelShape {
    /// Element type of every row.
    pub row_type: RowType,
    /// Attention layers in the order of the forward pass.
    pub layers: Vec<LayerShape>,
    /// By layer, the static scales of its lanes: exactly with [`RowType::Fp8`], otherwise empty.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub scales: Vec<LaneScales>,
}

/// A shape that Sluice does not serve.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum ShapeError {
    /// There is nothing to store.
    #[error("layers: {count} given, 1 to {max} served")]
    LayerCount {
        /// Layers given.
        count: usize,
        /// The bound.
        max: usize,
    },
    /// The head dimension has no kernel.
    #[error("layers[{layer}].head_dim: {head_dim} is not one of 64, 96, 128, 256")]
    HeadDim {
        /// Layer index.
        layer: usize,
        /// Value given.
        head_dim: u16,
    },
    /// Query heads do not divide into lanes.
    #[error(
        "layers[{layer}]: {query_heads} query heads on {kv_heads} kv heads; query_heads must be a multiple of kv_heads, with 1 to {max_group} a lane and 1 to {max_heads} in all"
    )]
    Heads {
        /// Layer index.
        layer: usize,
        /// Query heads given.
        query_heads: u16,
        /// KV heads given.
        kv_heads: u16,
        /// Most query heads a lane.
        max_group: u16,
        /// Most query heads.
        max_heads: u16,
    },
    /// A window of no or too many tokens.
    #[error("layers[{layer}].window_tokens: {tokens} is outside 1 to {max}")]
    Window {
        /// Layer index.
        layer: usize,
        /// Value given.
        tokens: u32,
        /// The bound.
        max: u32,
    },
    /// A softmax scale that is not a positive number.
    #[error("layers[{layer}].softmax_scale: {value} is not a positive finite number")]
    Scale {
        /// Layer index.
        layer: usize,
        /// Value given, as text so that the error stays comparable.
        value: String,
    },
    /// Scales of rows of another type, or not of every layer.
    #[error("scales: of {count} layers, {expected} needed for {layers} layers of {row_type:?} rows")]
    ScaledLayers {
        /// Layers with scales.
        count: usize,
        /// Layers that need them.
        expected: usize,
        /// Layers of the model.
        layers: usize,
        /// Element type of rows.
        row_type: RowType,
    },
    /// Scales of more or fewer lanes than a layer has.
    #[error("layers[{layer}].scales: of {count} lanes, the layer has {lanes}")]
    ScaledLanes {
        /// Layer index.
        layer: usize,
        /// Lanes with scales.
        count: usize,
        /// Lanes of the layer.
        lanes: usize,
    },
    /// A scale that is too small, too large or no number.
    #[error("layers[{layer}].{field}[{lane}]: {value} is outside {low:e} to {high:e}", low = RowScale::LOWEST, high = RowScale::HIGHEST)]
    RowScale {
        /// Layer index.
        layer: usize,
        /// Scales of keys or of values.
        field: &'static str,
        /// Lane index.
        lane: usize,
        /// Value given, as text so that the error stays comparable.
        value: String,
    },
}

impl ModelShape {
    /// Most layers of a model.
    pub const MAX_LAYERS: usize = 1024;
    /// Most query heads of a layer.
    pub const MAX_QUERY_HEADS: u16 = 512;
    /// Most query heads that share a lane.
    pub const MAX_GROUP: u16 = 64;
    /// Widest sliding window.
    pub const MAX_WINDOW_TOKENS: u32 = 1 << 17;

    /// A model whose rows have no scales.
    #[must_use]
    pub fn unscaled(row_type: RowType, layers: Vec<LayerShape>) -> Self {
        Self { row_type, layers, scales: Vec::new() }
    }

    /// Checks every bound that the layout and the kernels rely on.
    ///
    /// # Errors
    /// The first field that is out of bounds.
    pub fn check(&self) -> Result<(), ShapeError> {
        if self.layers.is_empty() || self.layers.len() > Self::MAX_LAYERS {
            return Err(ShapeError::LayerCount { count: self.layers.len(), max: Self::MAX_LAYERS });
        }
        for (layer, shape) in self.layers.iter().enumerate() {
            check_layer(layer, shape)?;
        }
        self.check_scales()
    }

    fn check_scales(&self) -> Result<(), ShapeError> {
        let (layers, row_type) = (self.layers.len(), self.row_type);
        let expected = if row_type == RowType::Fp8 { layers } else { 0 };
        if self.scales.len() != expected {
            return Err(ShapeError::ScaledLayers { count: self.scales.len(), expected, layers, row_type });
        }
        for (layer, (shape, scales)) in self.layers.iter().zip(&self.scales).enumerate() {
            let (count, lanes) = (scales.as_slice().len(), shape.lanes());
            if count != lanes {
                return Err(ShapeError::ScaledLanes { layer, count, lanes });
            }
            for (lane, scale) in scales.as_slice().iter().enumerate() {
                for (field, scale) in [("key_scales", scale.key), ("value_scales", scale.value)] {
                    if !RowScale::is_served(scale) {
                        return Err(ShapeError::RowScale { layer, field, lane, value: scale.to_string() });
                    }
                }
            }
        }
        Ok(())
    }

    /// The scales of a layer's lanes; none where rows are not scaled.
    #[must_use]
    pub fn scales_of(&self, layer: usize) -> LaneScales {
        self.scales.get(layer).cloned().unwrap_or_default()
    }
}

fn check_layer(layer: usize, shape: &LayerShape) -> Result<(), ShapeError> {
    if ![64, 96, 128, 256].contains(&shape.head_dim) {
        return Err(ShapeError::HeadDim { layer, head_dim: shape.head_dim });
    }
    let (query_heads, kv_heads) = (shape.query_heads, shape.kv_heads);
    let fits = kv_heads > 0
        && query_heads > 0
        && query_heads <= ModelShape::MAX_QUERY_HEADS
        && query_heads.is_multiple_of(kv_heads)
        && query_heads / kv_heads <= ModelShape::MAX_GROUP;
    if !fits {
        let (max_group, max_heads) = (ModelShape::MAX_GROUP, ModelShape::MAX_QUERY_HEADS);
        return Err(ShapeError::Heads { layer, query_heads, kv_heads, max_group, max_heads });
    }
    if let LaneKind::Window { tokens } = shape.kind
        && (tokens == 0 || tokens > ModelShape::MAX_WINDOW_TOKENS)
    {
        return Err(ShapeError::Window { layer, tokens, max: ModelShape::MAX_WINDOW_TOKENS });
    }
    if !(shape.softmax_scale.is_finite() && shape.softmax_scale > 0.0) {
        return Err(ShapeError::Scale { layer, value: shape.softmax_scale.to_string() });
    }
    Ok(())
}
