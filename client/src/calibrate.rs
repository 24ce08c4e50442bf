//! Calibration from the first prompt: the session sees q and k of its steps, whichever way it is attached.

use sluice_kernels::label::Calibrator;
use sluice_kernels::rows::read_elements;
use sluice_kernels::shape::{LaneKind, ModelShape};

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
        if shape.layers[step.layer].kind == LaneKind::Selected {
            online.calibrator.add(step.layer, &keys_of(rows, shape, step.layer), Some(step.queries));
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
fn keys_of(rows: &[u8], shape: &ModelShape, layer: usize) -> Vec<f32> {
    let (of_layer, scales) = (&shape.layers[layer], shape.scales_of(layer));
    let (lanes, channels) = (of_layer.lanes(), usize::from(of_layer.head_dim));
    let (key_bytes, row_bytes) = (channels * shape.row_type.element_bytes(), of_layer.row_bytes(shape.row_type));
    let tokens = rows.len() / (lanes * row_bytes);
    let mut keys = vec![0.0; tokens * lanes * channels];
    for (index, key) in keys.chunks_exact_mut(channels).enumerate() {
        let (token, lane) = (index / lanes, index % lanes);
        let first = (lane * tokens + token) * row_bytes;
        read_elements(shape.row_type, &rows[first..first + key_bytes], scales.of(lane).key, key);
    }
    keys
}

#[cfg(test)]
mod tests {
    use sluice_kernels::scales::RowScale;
    use sluice_kernels::shape::{LayerShape, RowType};

    use super::*;

    #[test]
    fn keys_come_back_in_the_order_of_queries() {
        let layer = LayerShape { kind: LaneKind::Selected, query_heads: 2, kv_heads: 2, head_dim: 64, softmax_scale: 0.125 };
        // Small whole numbers, times two in the second lane: exact in every type, with these scales in eight bits as well.
        let keys: Vec<f32> = (0..3 * 128).map(|index| (index % 15 * (1 + index / 64 % 2)) as f32).collect();
        let values = vec![-1.0; keys.len()];
        for row_type in [RowType::F32, RowType::F16, RowType::Bf16, RowType::Fp8] {
            let mut shape = ModelShape::unscaled(row_type, vec![layer]);
            if row_type == RowType::Fp8 {
                shape.scales = vec![vec![RowScale { key: 0.5, value: 1.0 }, RowScale { key: 2.0, value: 1.0 }].into()];
            }
            let mut rows = Vec::new();
            crate::rows::encode_rows(&shape, 0, 0..2, &keys, &values, &mut rows);
            assert_eq!(keys_of(&rows, &shape, 0), keys, "{row_type:?}");
        }
    }
}
