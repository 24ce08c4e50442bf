//! What a model's full-attention layers were asked, and what the layers before would have predicted.

use anyhow::{Result, ensure};
use sluice_kernels::label::{Calibration, LayerCalibration};
use sluice_kernels::rows::{PackJob, pack_rows};
use sluice_kernels::shape::{LaneKind, ModelShape};

use crate::model::{AttentionLayers, DenseLayers, Phase, Piece};

/// One full-attention layer.
#[derive(Clone, Debug, Default)]
pub(super) struct GatheredLayer {
    /// Layer of the model.
    pub(super) layer: usize,
    /// Rows by piece of consecutive tokens: the first position, and `[lane][token][row bytes]`.
    pub(super) rows: Vec<(usize, Vec<u8>)>,
    /// `[query_head][head_dim]` by step.
    pub(super) queries: Vec<Vec<f32>>,
    /// The same as predicted.
    pub(super) predicted: Vec<Vec<f32>>,
}

/// All of them.
pub(super) struct Gathered {
    /// Of the full-attention layers alone.
    pub(super) shape: ModelShape,
    /// The same layers'.
    pub(super) calibration: Calibration,
    /// Position of the first step.
    pub(super) first_step: usize,
    pub(super) layers: Vec<GatheredLayer>,
}

/// Dense attention layers that write down what they see.
pub(super) struct Gatherer {
    dense: DenseLayers,
    shape: ModelShape,
    first_step: usize,
    layers: Vec<GatheredLayer>,
}

impl Gatherer {
    /// Tokens from `first_step` on are steps.
    pub(super) fn new(dense: DenseLayers, shape: &ModelShape, first_step: usize) -> Self {
        let selected = |(layer, of): (usize, &sluice_kernels::shape::LayerShape)| (of.kind == LaneKind::Selected).then_some(layer);
        let layers = shape.layers.iter().enumerate().filter_map(selected);
        let layers = layers.map(|layer| GatheredLayer { layer, ..GatheredLayer::default() }).collect();
        Self { dense, shape: shape.clone(), first_step, layers }
    }

    fn layer(&mut self, layer: usize) -> Option<&mut GatheredLayer> {
        self.layers.iter_mut().find(|of| of.layer == layer)
    }

    /// Everything, as if the model had no other layers.
    pub(super) fn finish(self, calibration: &Calibration) -> Result<Gathered> {
        let mut calibration = calibration.clone();
        let renumbered = |(index, layer): (usize, &LayerCalibration)| LayerCalibration { layer: index as u16, lanes: layer.lanes.clone() };
        calibration.layers = calibration.layers.iter().enumerate().map(renumbered).collect();
        let layers = self.layers.iter().map(|layer| self.shape.layers[layer.layer]).collect();
        let shape = ModelShape { layers, ..self.shape };
        calibration.check(&shape)?;
        for layer in &self.layers {
            let (queries, predicted) = (layer.queries.len(), layer.predicted.len());
            ensure!(queries == predicted, "layer {}: {queries} queries, {predicted} predictions; a first layer has none", layer.layer);
        }
        Ok(Gathered { shape, calibration, first_step: self.first_step, layers: self.layers })
    }
}

/// The queries of steps among those of a piece.
fn steps(first_step: usize, first_position: usize, tokens: usize, queries: &[f32]) -> impl Iterator<Item = Vec<f32>> {
    let before = first_step.saturating_sub(first_position).min(tokens);
    let width = queries.len() / tokens;
    queries[before * width..].chunks_exact(width).map(<[f32]>::to_vec)
}

impl AttentionLayers for Gatherer {
    fn position(&self) -> usize {
        self.dense.position()
    }

    fn begin(&mut self, token_ids: &[u32], phase: Phase) -> Result<()> {
        self.dense.begin(token_ids, phase)
    }

    fn attend(&mut self, piece: &Piece<'_>, out: &mut [f32]) -> Result<()> {
        self.dense.attend(piece, out)?;
        let (first_step, row_type, scales) = (self.first_step, self.shape.row_type, self.shape.scales_of(piece.layer));
        let of_layer = self.shape.layers[piece.layer];
        let Some(layer) = self.layer(piece.layer) else { return Ok(()) };
        let (lanes, head_dim) = (of_layer.lanes(), usize::from(of_layer.head_dim));
        let mut rows = vec![0; piece.tokens * lanes * of_layer.row_bytes(row_type)];
        pack_rows(&PackJob { keys: piece.keys, values: piece.values, lanes, head_dim, row_type, scales: &scales }, &mut rows);
        layer.rows.push((piece.first_position, rows));
        layer.queries.extend(steps(first_step, piece.first_position, piece.tokens, piece.queries));
        Ok(())
    }

    fn wants_predictions(&self) -> bool {
        true
    }

    fn predicted(&mut self, layer: usize, first_position: usize, tokens: usize, queries: &[f32]) -> Result<()> {
        let first_step = self.first_step;
        if let Some(layer) = self.layer(layer) {
            layer.predicted.extend(steps(first_step, first_position, tokens, queries));
        }
        Ok(())
    }

    fn commit(&mut self) -> Result<()> {
        self.dense.commit()
    }
}
