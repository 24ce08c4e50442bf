//! Dense attention over a KV cache in f32, in this process and without any of Sluice's code: what everything else is compared with.
//!
//! Queries go in blocks. Scores of a block are one matrix product, a softmax in place, and a second product with the values, all through
//! candle: no code is shared with the kernels under test, but for the conversion of fp8 rows, which is tested on its own.

use anyhow::{Context, Result, bail};
use candle_core::{CpuStorage, Device, InplaceOp1, Layout, Tensor};
use half::{bf16, f16};
use rayon::prelude::*;
use sluice_kernels::rows::e4m3;
use sluice_kernels::scales::RowScale;
use sluice_kernels::shape::{LaneKind, LayerShape, ModelShape, RowType};

use super::attention::{AttentionLayers, Phase, Piece};
use super::grown::Grown;

/// Scores held at once: 16 MiB.
const SCORES_AT_ONCE: usize = 4 << 20;
/// Most tokens of a block: more would waste work on masked scores, in window layers most of all.
const TOKENS_AT_ONCE: usize = 128;

/// A dense KV cache of one sequence.
pub struct DenseLayers {
    shape: ModelShape,
    /// `[layer][kv_head]`.
    rows: Vec<Vec<Rows>>,
    position: usize,
    /// Tokens of the piece that has begun.
    begun: usize,
}

impl DenseLayers {
    /// An empty cache. Rows are rounded to the shape's row type before they are kept; `RowType::F32` keeps them as they are.
    ///
    /// # Errors
    /// A shape out of bounds.
    pub fn new(shape: ModelShape) -> Result<Self> {
        shape.check()?;
        let lanes = |layer: &LayerShape| -> Result<Vec<Rows>> { (0..layer.kv_heads).map(|_| Rows::new(layer)).collect() };
        let rows = shape.layers.iter().map(lanes).collect::<Result<_>>()?;
        Ok(Self { shape, rows, position: 0, begun: 0 })
    }
}

impl AttentionLayers for DenseLayers {
    fn position(&self) -> usize {
        self.position
    }

    fn begin(&mut self, token_ids: &[u32], _phase: Phase) -> Result<()> {
        self.begun = token_ids.len();
        Ok(())
    }

    fn attend(&mut self, piece: &Piece<'_>, out: &mut [f32]) -> Result<()> {
        let layer =
            self.shape.layers.get(piece.layer).with_context(|| format!("layer: {}, the model has {}", piece.layer, self.rows.len()))?;
        if piece.first_position != self.position {
            bail!("first_position: {}, the sequence has {} tokens", piece.first_position, self.position);
        }
        let (query_heads, kv_heads) = (usize::from(layer.query_heads), usize::from(layer.kv_heads));
        let head_dim = usize::from(layer.head_dim);
        let group = query_heads / kv_heads;
        for (lane, rows) in self.rows[piece.layer].iter_mut().enumerate() {
            let round = |source: &[f32], scale: f32| {
                rounded(&heads(source, kv_heads * head_dim, lane * head_dim, head_dim), self.shape.row_type, scale)
            };
            let RowScale { key, value } = self.shape.scales_of(piece.layer).of(lane);
            rows.append(piece.first_position, round(piece.keys, key), round(piece.values, value))?;
            let first_channel = lane * group * head_dim;
            let queries = heads(piece.queries, query_heads * head_dim, first_channel, group * head_dim);
            let attended = rows.attend(layer, piece.first_position, &queries)?;
            for (token, row) in attended.chunks_exact(group * head_dim).enumerate() {
                out[token * query_heads * head_dim + first_channel..][..group * head_dim].copy_from_slice(row);
            }
        }
        Ok(())
    }

    fn commit(&mut self) -> Result<()> {
        let end = self.position + std::mem::take(&mut self.begun);
        if let Some(layer) = self.rows.iter().flatten().position(|rows| rows.end() != end) {
            bail!("commit: lane {layer} of the model has not been given the rows up to {end}");
        }
        self.position = end;
        Ok(())
    }
}

/// Columns `first .. first + width` of a matrix with rows of `stride` values.
fn heads(source: &[f32], stride: usize, first: usize, width: usize) -> Vec<f32> {
    source.chunks_exact(stride).flat_map(|row| &row[first..first + width]).copied().collect()
}

fn rounded(values: &[f32], row_type: RowType, scale: f32) -> Vec<f32> {
    let round = |value: &f32| match row_type {
        RowType::F32 => *value,
        RowType::F16 => f16::from_f32(*value).to_f32(),
        RowType::Bf16 => bf16::from_f32(*value).to_f32(),
        RowType::Fp8 => e4m3::value_of(e4m3::code_of(*value, scale), scale),
    };
    values.iter().map(round).collect()
}

/// Keys and values of one head, `[row][d]` each.
struct Rows {
    keys: Grown,
    values: Grown,
    head_dim: usize,
    /// Rows a later query can still see; all when `None`.
    window: Option<usize>,
    /// Position of the first row that is kept.
    first: usize,
}

impl Rows {
    fn new(layer: &LayerShape) -> Result<Self> {
        let window = match layer.kind {
            LaneKind::Selected => None,
            LaneKind::Window { tokens } => Some(tokens as usize),
        };
        let head_dim = usize::from(layer.head_dim);
        Ok(Self { keys: Grown::new(head_dim)?, values: Grown::new(head_dim)?, head_dim, window, first: 0 })
    }

    /// Position behind the last row.
    fn end(&self) -> usize {
        self.first + self.keys.count()
    }

    fn append(&mut self, first_position: usize, keys: Vec<f32>, values: Vec<f32>) -> Result<()> {
        let tokens = keys.len() / self.head_dim;
        if self.end() != first_position {
            bail!("first_position: {first_position}, the layer has rows up to {}", self.end());
        }
        if !self.keys.has_room(tokens)? {
            // The next query sees its own row and `window - 1` rows before it: those before them are dropped.
            let count = self.keys.count();
            let kept = self.window.map_or(count, |window| count.min(window - 1));
            self.keys.make_room(tokens, kept)?;
            self.values.make_room(tokens, kept)?;
            self.first += count - kept;
        }
        self.keys.push(keys)?;
        self.values.push(values)
    }

    /// Attends with `queries` (`[token][head of the lane][d]`), the first token at `first_position`; gives the same layout.
    fn attend(&self, layer: &LayerShape, first_position: usize, queries: &[f32]) -> Result<Vec<f32>> {
        let group = usize::from(layer.query_heads / layer.kv_heads);
        let token_width = group * self.head_dim;
        let tokens_at_once = (SCORES_AT_ONCE / (group * self.keys.count())).clamp(1, TOKENS_AT_ONCE);
        let mut out = Vec::with_capacity(queries.len());
        for (block, queries) in queries.chunks(tokens_at_once * token_width).enumerate() {
            let position = first_position + block * tokens_at_once;
            let tokens = queries.len() / token_width;
            let first_row = self.window.map_or(0, |window| (position + 1).saturating_sub(window)).max(self.first);
            let row_count = position + tokens - first_row;
            let start = first_row - self.first;
            let queries = Tensor::from_slice(queries, (tokens * group, self.head_dim), &Device::Cpu)?;
            let scores = queries.matmul(&self.keys.rows(start..start + row_count)?.t()?)?;
            scores.inplace_op1(&CausalSoftmax { first_row, position, group, window: self.window, scale: layer.softmax_scale })?;
            let block_out: Vec<f32> = scores.matmul(&self.values.rows(start..start + row_count)?)?.flatten_all()?.to_vec1()?;
            out.extend_from_slice(&block_out);
        }
        Ok(out)
    }
}

/// Turns scores (`[token][head of the lane][row]`) into weights: scaled, masked to what each token sees, normalised.
struct CausalSoftmax {
    /// Position of the first column.
    first_row: usize,
    /// Position of the first token.
    position: usize,
    /// Rows of scores a token.
    group: usize,
    window: Option<usize>,
    scale: f32,
}

impl InplaceOp1 for CausalSoftmax {
    fn name(&self) -> &'static str {
        "causal-softmax"
    }

    fn cpu_fwd(&self, storage: &mut CpuStorage, layout: &Layout) -> candle_core::Result<()> {
        let (CpuStorage::F32(scores), Some((start, end))) = (storage, layout.contiguous_offsets()) else {
            candle_core::bail!("causal-softmax takes contiguous f32 scores");
        };
        let columns = layout.dims()[1];
        scores[start..end].par_chunks_exact_mut(columns).enumerate().for_each(|(row, scores)| {
            let position = self.position + row / self.group;
            let seen_from = self.window.map_or(0, |window| (position + 1).saturating_sub(window)).max(self.first_row);
            softmax(scores, seen_from - self.first_row..position + 1 - self.first_row, self.scale);
        });
        Ok(())
    }
}

fn softmax(scores: &mut [f32], seen: std::ops::Range<usize>, scale: f32) {
    let (start, end) = (seen.start, seen.end);
    scores[..start].fill(0.0);
    scores[end..].fill(0.0);
    let seen = &mut scores[seen];
    let largest = seen.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let mut sum = 0f64;
    for score in seen.iter_mut() {
        *score = ((*score - largest) * scale).exp();
        sum += f64::from(*score);
    }
    let factor = (1.0 / sum) as f32;
    seen.iter_mut().for_each(|weight| *weight *= factor);
}
