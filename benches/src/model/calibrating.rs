//! Watches queries and keys of a forward pass to calibrate labels.

use anyhow::{Context, Result};
use sluice_kernels::label::{Calibration, Calibrator, LabelPlan};
use sluice_kernels::shape::RowType;

use super::attention::{AttentionLayers, Phase, Piece};
use super::dense::DenseLayers;
use super::input::hash_tokens;
use super::{Model, PREFILL_TOKENS, Pieces};

/// Seed of the sample that quantiles are taken of.
pub const CALIBRATION_SEED: u64 = 1;

/// A dense cache that shows every piece to a calibrator.
struct Calibrating {
    layers: DenseLayers,
    calibrator: Calibrator,
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
        self.layers.attend(piece, out)
    }

    fn commit(&mut self) -> Result<()> {
        self.layers.commit()
    }
}

/// Calibrates `plan` on the queries and keys that a dense pass over `token_ids` makes. `each` is told the tokens of every piece.
///
/// # Errors
/// No tokens, or a token outside the vocabulary.
pub fn calibrate(model: &Model, plan: &LabelPlan, token_ids: &[u32], each: &mut dyn FnMut(usize)) -> Result<Calibration> {
    let shape = model.shape(RowType::F32)?;
    let calibrator = Calibrator::new(&shape, plan, &hash_tokens(token_ids), CALIBRATION_SEED);
    let mut layers = Calibrating { layers: DenseLayers::new(shape)?, calibrator };
    let pieces = Pieces { tokens: PREFILL_TOKENS, phase: Phase::Prefill };
    model.forward_pieces(token_ids, pieces, &mut layers, &mut |hidden| {
        each(hidden.tokens());
        Ok(())
    })?;
    layers.calibrator.finish().context("calibration text: no tokens")
}
