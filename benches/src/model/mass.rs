//! How much attention mass a selection keeps, measured against all keys.
//!
//! A step reports the log-sum-exp of the scores that it attended. The meter holds its own copy of every key and computes the
//! log-sum-exp over all of them; the exponential of the difference is the share of the softmax that the step saw.

use std::collections::BTreeMap;

use anyhow::Result;
use candle_core::{Device, Tensor};
use half::{bf16, f16};
use rayon::prelude::*;
use sluice_kernels::rows::e4m3;
use sluice_kernels::scales::LaneScales;
use sluice_kernels::shape::{LaneKind, LayerShape, ModelShape, RowType};

use super::attention::{Phase, Piece};
use super::grown::Grown;

/// Measures the full-attention layers of one sequence.
pub struct MassMeter {
    row_type: RowType,
    layers: BTreeMap<usize, LayerMass>,
}

struct LayerMass {
    shape: LayerShape,
    scales: LaneScales,
    /// One for each kv head: `[row][d]`.
    keys: Vec<Grown>,
    sum: f64,
    count: u64,
}

impl MassMeter {
    /// A meter that has seen no token.
    ///
    /// # Errors
    /// Out of memory, as candle reports it.
    pub fn new(shape: &ModelShape) -> Result<Self> {
        let selected = shape.layers.iter().enumerate().filter(|(_, layer)| layer.kind == LaneKind::Selected);
        let layer = |(index, layer): (usize, &LayerShape)| {
            let keys = (0..layer.kv_heads).map(|_| Grown::new(usize::from(layer.head_dim))).collect::<Result<_>>()?;
            Ok((index, LayerMass { shape: *layer, scales: shape.scales_of(index), keys, sum: 0.0, count: 0 }))
        };
        Ok(Self { row_type: shape.row_type, layers: selected.map(layer).collect::<Result<_>>()? })
    }

    /// Keeps the keys of a piece and, in decode steps, measures `lse` (`[token][query_head]`) of each of its queries.
    pub(super) fn add(&mut self, piece: &Piece<'_>, lse: &[f32]) -> Result<()> {
        let row_type = self.row_type;
        let Some(layer) = self.layers.get_mut(&piece.layer) else { return Ok(()) };
        let (head_dim, kv_heads, query_heads) =
            (usize::from(layer.shape.head_dim), usize::from(layer.shape.kv_heads), usize::from(layer.shape.query_heads));
        let group = query_heads / kv_heads;
        for (lane, keys) in layer.keys.iter_mut().enumerate() {
            let stored = columns(piece.keys, kv_heads * head_dim, lane * head_dim, head_dim);
            let scale = layer.scales.of(lane).key;
            keys.push(stored.map(|value| rounded(value, row_type, scale)).collect())?;
            if piece.phase == Phase::Prefill {
                continue;
            }
            let queries: Vec<f32> =
                columns(piece.queries, query_heads * head_dim, lane * group * head_dim, group * head_dim).copied().collect();
            let queries = Tensor::from_vec(queries, (piece.tokens * group, head_dim), &Device::Cpu)?;
            let scores: Vec<f32> = queries.matmul(&keys.rows(0..keys.count())?.t()?)?.flatten_all()?.to_vec1()?;
            let shares = scores.par_chunks_exact(keys.count()).enumerate().map(|(row, scores)| {
                let (token, head) = (row / group, lane * group + row % group);
                let all = log_sum_exp(&scores[..piece.first_position + token + 1], layer.shape.softmax_scale);
                (f64::from(lse[token * query_heads + head]) - all).exp()
            });
            layer.sum += shares.sum::<f64>();
            layer.count += (piece.tokens * group) as u64;
        }
        Ok(())
    }

    /// Mean share of the mass that was kept, by layer, over all decode tokens and query heads. Layers without a decode token are left out.
    #[must_use]
    pub fn kept(&self) -> BTreeMap<usize, f64> {
        let measured = self.layers.iter().filter(|(_, layer)| layer.count > 0);
        measured.map(|(index, layer)| (*index, layer.sum / layer.count as f64)).collect()
    }
}

/// Columns `first .. first + width` of a matrix with rows of `stride` values.
fn columns(source: &[f32], stride: usize, first: usize, width: usize) -> impl Iterator<Item = &f32> {
    source.chunks_exact(stride).flat_map(move |row| &row[first..first + width])
}

/// A key as the cache keeps it.
fn rounded(value: &f32, row_type: RowType, scale: f32) -> f32 {
    match row_type {
        RowType::F32 => *value,
        RowType::F16 => f16::from_f32(*value).to_f32(),
        RowType::Bf16 => bf16::from_f32(*value).to_f32(),
        RowType::Fp8 => e4m3::value_of(e4m3::code_of(*value, scale), scale),
    }
}

fn log_sum_exp(scores: &[f32], scale: f32) -> f64 {
    let largest = f64::from(scores.iter().copied().fold(f32::NEG_INFINITY, f32::max));
    let scale = f64::from(scale);
    let sum: f64 = scores.iter().map(|&score| ((f64::from(score) - largest) * scale).exp()).sum();
    largest * scale + sum.ln()
}
