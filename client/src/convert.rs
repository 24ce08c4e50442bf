//! Between the wire's types and the domain's.

use std::sync::Arc;

use sluice_kernels::budget::{Budget, Settings};
use sluice_kernels::shape::{LaneKind, ModelShape, RowType};
use sluice_proto::v1;

use crate::error::ClientError;

/// How rotary embedding pairs channels; recorded with the model, never applied by Sluice.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum RotaryLayout {
    /// Channel c pairs with c + d/2 (transformers, Gemma, Qwen).
    HalfSplit,
    /// Channel 2c pairs with 2c + 1 (GGUF Llama).
    Interleaved,
    /// No rotary embedding.
    None,
}

/// What a model is registered by.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelRegistration {
    /// Name for people, 1 to 256 bytes.
    pub name: String,
    /// Digest of the weights, 1 to 64 bytes: part of every chunk's name.
    pub weights_digest: Vec<u8>,
    /// Attention layers and row type.
    pub shape: ModelShape,
    /// Rotary layout of q and k.
    pub rotary: RotaryLayout,
    /// Namespace; empty: the daemon's default one.
    pub namespace: String,
}

/// A registered model. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Model {
    pub(crate) id: u64,
    pub(crate) shape: Arc<ModelShape>,
    pub(crate) calibrated: bool,
}

impl Model {
    /// Id in the daemon; survives its restart.
    #[must_use]
    pub fn id(&self) -> u64 {
        self.id
    }

    /// The shape that was registered.
    #[must_use]
    pub fn shape(&self) -> &Arc<ModelShape> {
        &self.shape
    }

    /// Whether a calibration was in force when the model was registered.
    #[must_use]
    pub fn calibrated(&self) -> bool {
        self.calibrated
    }
}

/// The wire's model.
pub(crate) fn model_spec(model: &ModelRegistration) -> v1::ModelSpec {
    let rotary_layout = match model.rotary {
        RotaryLayout::HalfSplit => v1::RotaryLayout::HalfSplit,
        RotaryLayout::Interleaved => v1::RotaryLayout::Interleaved,
        RotaryLayout::None => v1::RotaryLayout::None,
    };
    let row_type = match model.shape.row_type {
        RowType::F32 => v1::RowType::F32,
        RowType::F16 => v1::RowType::F16,
        RowType::Bf16 => v1::RowType::Bf16,
        RowType::Fp8 => v1::RowType::F8E4m3,
    };
    v1::ModelSpec {
        name: model.name.clone(),
        weights_digest: model.weights_digest.clone().into(),
        row_type: row_type.into(),
        rotary_layout: rotary_layout.into(),
        layers: (0..model.shape.layers.len()).map(|layer| layer_spec(&model.shape, layer)).collect(),
    }
}

fn layer_spec(shape: &ModelShape, layer: usize) -> v1::LayerSpec {
    let scales = shape.scales_of(layer);
    let layer = &shape.layers[layer];
    let window_tokens = match layer.kind {
        LaneKind::Selected => 0,
        LaneKind::Window { tokens } => tokens,
    };
    v1::LayerSpec {
        attention: v1::AttentionKind::MhaGqa.into(),
        query_heads: layer.query_heads.into(),
        kv_heads: layer.kv_heads.into(),
        head_dim: layer.head_dim.into(),
        window_tokens,
        softmax_scale: layer.softmax_scale,
        key_scales: scales.as_slice().iter().map(|scale| scale.key).collect(),
        value_scales: scales.as_slice().iter().map(|scale| scale.value).collect(),
    }
}

/// The wire's settings.
pub(crate) fn wire_settings(settings: &Settings) -> v1::StepSettings {
    let budget = match settings.budget {
        Budget::Dense => v1::Budget { dense: true, ..v1::Budget::default() },
        Budget::Ratio { numerator, denominator, floor_tokens, cap_tokens } => {
            v1::Budget { dense: false, numerator, denominator, floor_tokens, cap_tokens }
        }
    };
    v1::StepSettings { budget: Some(budget), exact_tokens: settings.exact_tokens, sink_tokens: settings.sink_tokens }
}

/// The settings in force, as an Open or an Attach answered them.
pub(crate) fn settings_in_force(wire: Option<v1::StepSettings>) -> Result<Settings, ClientError> {
    let missing = |field: &str| ClientError::protocol("the reply", format!("{field} is missing"));
    let wire = wire.ok_or_else(|| missing("settings"))?;
    let budget = wire.budget.ok_or_else(|| missing("settings.budget"))?;
    let budget = if budget.dense {
        Budget::Dense
    } else if budget.numerator == 0 || budget.denominator < budget.numerator {
        return Err(missing("settings.budget.numerator"));
    } else {
        let v1::Budget { numerator, denominator, floor_tokens, cap_tokens, .. } = budget;
        Budget::Ratio { numerator, denominator, floor_tokens, cap_tokens }
    };
    Ok(Settings { budget, exact_tokens: wire.exact_tokens, sink_tokens: wire.sink_tokens })
}
