//! Calibration from the first prompt: the session sees q and k of its steps, whichever way it is attached.

use half::{bf16, f16};
use sluice_kernels::label::Calibrator;
use sluice_kernels::shape::{LaneKind, ModelShape, RowType};

use crate::error::ClientError;
use crate::options::OnlineCalibration;
use crate::session::{Session, Way};
use crate::step::Step;

/// Accumulates q and k until it has seen enough tokens in every full-attention layer.
pub(crate) struct OnlineCalibrator {
    calibrator: Calibrator,
    wanted: u64,
}

impl OnlineCalibrator {
    pub(crate) fn new(shape: &ModelShape, options: &OnlineCalibration) -> Self {
        // The text is the caller's own prompt, so no hash of it is stored; the seed decides nothing but which keys are sampled.
        Self { calibrator: Calibrator::new(shape, &options.plan, "", 0), wanted: options.tokens.max(1) as u64 }
    }
}

impl Session {
    /// Adds a step with rows to the calibration, and sets the calibration when it is complete.
    pub(crate) fn calibrate(&mut self, step: &Step<'_>, rows: &[u8]) -> Result<(), ClientError> {
        let Some(online) = &mut self.calibrator else { return Ok(()) };
        let shape = &self.core.model.shape;
        let layer = &shape.layers[step.layer];
        if layer.kind == LaneKind::Selected {
            let keys = keys_of(rows, shape.row_type, layer.lanes(), usize::from(layer.head_dim));
            online.calibrator.add(step.layer, &keys, Some(step.queries));
        }
        // Set between runs only, so that one token's layers are all attended by the same rule.
        if online.calibrator.tokens() < online.wanted || self.core.run.is_some() {
            return Ok(());
        }
        let Some(calibration) = online.calibrator.finish() else { return Ok(()) };
        let in_force = self.core.client.set_calibration(&self.core.model, &calibration)?;
        self.calibrator = None;
        match &mut self.way {
            Way::Stream(_) => Ok(()),
            Way::Direct(way) => way.take_calibration(&self.core, &in_force.calibration),
        }
    }
}

/// Keys `[token][lane][head_dim]` out of rows `[lane][token][key value]`.
fn keys_of(rows: &[u8], row_type: RowType, lanes: usize, channels: usize) -> Vec<f32> {
    let (element, row_bytes) = (row_type.element_bytes(), 2 * channels * row_type.element_bytes());
    let tokens = rows.len() / (lanes * row_bytes);
    let mut keys = Vec::with_capacity(tokens * lanes * channels);
    for token in 0..tokens {
        for lane in 0..lanes {
            let first = (lane * tokens + token) * row_bytes;
            let key = rows[first..first + channels * element].chunks_exact(element);
            keys.extend(key.map(|bytes| match row_type {
                RowType::F32 => f32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]),
                RowType::F16 => f16::from_le_bytes([bytes[0], bytes[1]]).to_f32(),
                RowType::Bf16 => bf16::from_le_bytes([bytes[0], bytes[1]]).to_f32(),
            }));
        }
    }
    keys
}

#[cfg(test)]
mod tests {
    use sluice_kernels::shape::LayerShape;

    use super::*;

    #[test]
    fn keys_come_back_in_the_order_of_queries() {
        let layer = LayerShape { kind: LaneKind::Selected, query_heads: 2, kv_heads: 2, head_dim: 64, softmax_scale: 0.125 };
        let keys: Vec<f32> = (0..3 * 128).map(|index| index as f32).collect();
        let values = vec![-1.0; keys.len()];
        for row_type in [RowType::F32, RowType::F16] {
            let mut rows = Vec::new();
            crate::rows::encode_rows(&layer, row_type, &keys, &values, &mut rows);
            assert_eq!(keys_of(&rows, row_type, 2, 64), keys);
        }
    }
}
