//! Calibration: which channels of a key matter, and over which range each is quantised.
//!
//! Statistic: mean |RoPE(q)_c RoPE(k)_c| over tokens, summed over the query heads of a lane and accumulated over **all** blocks
//! (Double Sparsity, section 3.1; the public calibrator keeps the last block only). Ranges: the 0.5 and 99.5 % quantiles of each key channel.

use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::label::LabelPlan;
use crate::shape::{LaneKind, ModelShape};

/// One lane's channels.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LaneCalibration {
    /// All channels of the key, most important first: a permutation of `0..head_dim`.
    pub order: Vec<u16>,
    /// The statistic of each channel, by channel (not by rank).
    pub magnitude: Vec<f32>,
    /// 0.5 % quantile of each key channel, by channel.
    pub low: Vec<f32>,
    /// 99.5 % quantile of each key channel, by channel; greater than `low`.
    pub high: Vec<f32>,
}

/// One layer's lanes.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LayerCalibration {
    /// Layer of the model.
    pub layer: u16,
    /// Its lanes.
    pub lanes: Vec<LaneCalibration>,
}

/// A calibration file (JSON).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Calibration {
    /// Format version: 1.
    pub version: u32,
    /// The label plan it is meant for.
    pub plan: LabelPlan,
    /// BLAKE3 of the calibration text's token ids, hex; empty when unknown.
    pub text_hash: String,
    /// Seed of whatever sampling made it.
    pub seed: u64,
    /// Tokens that were accumulated.
    pub tokens: u64,
    /// Selected layers only, in order.
    pub layers: Vec<LayerCalibration>,
}

/// A calibration that does not fit the model.
#[derive(Clone, Debug, PartialEq, Error)]
pub enum CalibrationError {
    /// Written by another version.
    #[error("calibration.version: {version}, this build reads 1")]
    Version {
        /// Value given.
        version: u32,
    },
    /// The plan does not fit.
    #[error("calibration.plan: {0}")]
    Plan(#[from] crate::label::PlanError),
    /// Layers differ from the model's selected layers.
    #[error("calibration.layers: {given:?}, the model's full-attention layers are {expected:?}")]
    Layers {
        /// Layers given.
        given: Vec<u16>,
        /// Layers of the model.
        expected: Vec<u16>,
    },
    /// A wrong count.
    #[error("calibration.layers[{layer}].{field}: {given} given, {expected} expected")]
    Count {
        /// Layer of the model.
        layer: u16,
        /// Which list.
        field: &'static str,
        /// Entries given.
        given: usize,
        /// Entries expected.
        expected: usize,
    },
    /// The order is not a permutation.
    #[error("calibration.layers[{layer}].lanes[{lane}].order: not a permutation of 0..{head_dim}")]
    Order {
        /// Layer of the model.
        layer: u16,
        /// Lane.
        lane: usize,
        /// Channels of a key.
        head_dim: u16,
    },
    /// A range that is empty or not finite.
    #[error("calibration.layers[{layer}].lanes[{lane}]: channel {channel} has range {low} to {high}; low must be below high, both finite")]
    Range {
        /// Layer of the model.
        layer: u16,
        /// Lane.
        lane: usize,
        /// Channel.
        channel: usize,
        /// Lower end.
        low: f32,
        /// Upper end.
        high: f32,
    },
}

impl Calibration {
    /// Checks the calibration against a model, field by field.
    ///
    /// # Errors
    /// The first field that does not fit.
    pub fn check(&self, shape: &ModelShape) -> Result<(), CalibrationError> {
        if self.version != 1 {
            return Err(CalibrationError::Version { version: self.version });
        }
        let selected = shape.layers.iter().enumerate().filter(|(_, layer)| layer.kind == LaneKind::Selected);
        let expected: Vec<u16> = selected.map(|(index, _)| index as u16).collect();
        let given: Vec<u16> = self.layers.iter().map(|layer| layer.layer).collect();
        if given != expected {
            return Err(CalibrationError::Layers { given, expected });
        }
        for layer in &self.layers {
            let layer_shape = &shape.layers[usize::from(layer.layer)];
            self.plan.check(layer_shape.head_dim)?;
            check_layer(layer, layer_shape.lanes(), layer_shape.head_dim)?;
        }
        Ok(())
    }

    /// The calibration of one layer, if it is a selected one.
    #[must_use]
    pub fn layer(&self, layer: usize) -> Option<&LayerCalibration> {
        self.layers.iter().find(|entry| usize::from(entry.layer) == layer)
    }
}

fn check_layer(layer: &LayerCalibration, lanes: usize, head_dim: u16) -> Result<(), CalibrationError> {
    let count = |field, given, expected| {
        if given == expected { Ok(()) } else { Err(CalibrationError::Count { layer: layer.layer, field, given, expected }) }
    };
    count("lanes", layer.lanes.len(), lanes)?;
    for (lane, entry) in layer.lanes.iter().enumerate() {
        let channels = usize::from(head_dim);
        count("order", entry.order.len(), channels)?;
        count("magnitude", entry.magnitude.len(), channels)?;
        count("low", entry.low.len(), channels)?;
        count("high", entry.high.len(), channels)?;
        let mut sorted = entry.order.clone();
        sorted.sort_unstable();
        if !sorted.iter().copied().eq(0..head_dim) {
            return Err(CalibrationError::Order { layer: layer.layer, lane, head_dim });
        }
        for (channel, (&low, &high)) in entry.low.iter().zip(&entry.high).enumerate() {
            if !(low.is_finite() && high.is_finite() && low < high) {
                return Err(CalibrationError::Range { layer: layer.layer, lane, channel, low, high });
            }
        }
    }
    Ok(())
}
