//! Watches a forward pass to calibrate: queries and keys for labels, the largest keys and values for the scales of fp8 rows.

use anyhow::{Context, Result};
use sluice_kernels::label::{Calibration, Calibrator, LabelPlan};
use sluice_kernels::rows::e4m3;
use sluice_kernels::scales::{LaneScales, RowScale};
use sluice_kernels::shape::{ModelShape, RowType};

use super::attention::{AttentionLayers, Phase, Piece};
use super::dense::DenseLayers;
use super::input::hash_tokens;
use super::{Model, PREFILL_TOKENS, Pieces};

/// Seed of the sample that quantiles are taken of.
pub const CALIBRATION_SEED: u64 = 1;

/// How much larger than the largest element of the calibration text one may be before it is cut off. Precision is the same at every
/// magnitude from 2^-6 to 448, so that room costs next to nothing.
pub(super) const SCALE_ROOM: f32 = 2.0;

/// What a calibration text gives.
pub struct Calibrated {
    /// Of the labels.
    pub labels: Calibration,
    /// By layer, scales for fp8 rows.
    pub scales: Vec<LaneScales>,
}

/// A dense cache that shows every piece to a calibrator.
struct Calibrating {
    layers: DenseLayers,
    calibrator: Calibrator,
    /// `[layer][lane]`: largest magnitudes.
    largest: Vec<Vec<RowScale>>,
}

impl Calibrating {
    fn new(shape: ModelShape, plan: &LabelPlan, token_ids: &[u32]) -> Result<Self> {
        let calibrator = Calibrator::new(&shape, plan, &hash_tokens(token_ids), CALIBRATION_SEED);
        let largest = shape.layers.iter().map(|layer| vec![RowScale { key: 0.0, value: 0.0 }; layer.lanes()]).collect();
        Ok(Self { layers: DenseLayers::new(shape)?, calibrator, largest })
    }

    fn watch(&mut self, piece: &Piece<'_>) {
        let lanes = &mut self.largest[piece.layer];
        let count = lanes.len();
        let head_dim = piece.keys.len() / (piece.tokens * count);
        let magnitude = |row: &[f32]| row.iter().fold(0.0f32, |largest, x| largest.max(x.abs()));
        for (index, (key, value)) in piece.keys.chunks_exact(head_dim).zip(piece.values.chunks_exact(head_dim)).enumerate() {
            let lane = &mut lanes[index % count];
            lane.key = lane.key.max(magnitude(key));
            lane.value = lane.value.max(magnitude(value));
        }
    }

    fn finish(self) -> Result<Calibrated> {
        let scale = |largest: f32| (largest * SCALE_ROOM / e4m3::LARGEST).clamp(RowScale::LOWEST, RowScale::HIGHEST);
        let of_lane = |largest: &RowScale| RowScale { key: scale(largest.key), value: scale(largest.value) };
        let scales = self.largest.iter().map(|lanes| lanes.iter().map(of_lane).collect::<Vec<_>>().into()).collect();
        Ok(Calibrated { labels: self.calibrator.finish().context("calibration text: no tokens")?, scales })
    }
}

impl AttentionLayers for Calibrating {
    fn position(&self) -> usize {
        self.layers.position()
    }

    fn begin(&mut self, token_ids: &[u32], phase: Phase) -> Result<()> {
        self.layers.begin(token_ids, phase)
    }

    fn attend(&mut self, piece: &Piece<'_>, out: &mut [f32]) -> Result<()> {
        self.calibrator.add(piece.layer, piece.keys, Some(piece.queries));
        self.watch(piece);
        self.layers.attend(piece, out)
    }

    fn commit(&mut self) -> Result<()> {
        self.layers.commit()
    }
}

/// Calibrates `plan`, and scales of fp8 rows, on what a dense pass over `token_ids` makes. `each` is told the tokens of every piece.
///
/// # Errors
/// No tokens, or a token outside the vocabulary.
pub fn calibrate(model: &Model, plan: &LabelPlan, token_ids: &[u32], each: &mut dyn FnMut(usize)) -> Result<Calibrated> {
    let mut layers = Calibrating::new(model.shape(RowType::F32)?, plan, token_ids)?;
    let pieces = Pieces { tokens: PREFILL_TOKENS, phase: Phase::Prefill };
    model.forward_pieces(token_ids, pieces, &mut layers, &mut |hidden| {
        each(hidden.tokens());
        Ok(())
    })?;
    layers.finish()
}
