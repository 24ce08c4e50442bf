//! Layers of made-up rows that look like real ones: keys in clusters with a few outlier channels, differing from lane to lane.

use half::{bf16, f16};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use sluice_kernels::device::LayerGeometry;
use sluice_kernels::heads::HeadMap;
use sluice_kernels::label::{LabelCoder, LabelPlan, LaneCalibration, LayerCalibration};
use sluice_kernels::scales::{LaneScales, RowScale};
use sluice_kernels::shape::RowType;

use crate::e4m3::{e4m3_code, e4m3_value};

/// Every type of rows.
pub(crate) const ROW_TYPES: [RowType; 4] = [RowType::F32, RowType::F16, RowType::Bf16, RowType::Fp8];

/// What a layer is made from.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Shape {
    pub(crate) lanes: usize,
    pub(crate) group: usize,
    pub(crate) dim: usize,
    pub(crate) tokens: usize,
    pub(crate) row_type: RowType,
}

/// A layer of rows and a query.
pub(crate) struct Layer {
    pub(crate) shape: Shape,
    pub(crate) geometry: LayerGeometry,
    /// `[token][lane][dim]`, already rounded to the row type.
    pub(crate) keys: Vec<f32>,
    pub(crate) values: Vec<f32>,
    /// By chunk.
    pub(crate) pages: Vec<Vec<u8>>,
    rng: StdRng,
}

/// About normally distributed.
fn normal(rng: &mut StdRng) -> f32 {
    (0..6).map(|_| rng.random_range(-1.0f32..1.0)).sum::<f32>() / 1.41
}

/// Bytes of an element, and the number that they stand for.
fn element(row_type: RowType, x: f32, scale: f32) -> (Vec<u8>, f32) {
    match row_type {
        RowType::F32 => (x.to_le_bytes().to_vec(), x),
        RowType::F16 => (f16::from_f32(x).to_le_bytes().to_vec(), f16::from_f32(x).to_f32()),
        RowType::Bf16 => (bf16::from_f32(x).to_le_bytes().to_vec(), bf16::from_f32(x).to_f32()),
        RowType::Fp8 => {
            let code = e4m3_code(x / scale);
            (vec![code], e4m3_value(code) as f32 * scale)
        }
    }
}

/// Scales that differ from lane to lane and between keys and values. Some of the largest keys are cut off at 448 times the scale.
fn scales(shape: &Shape) -> LaneScales {
    let scale = |lane: usize| RowScale { key: 0.021 * (1.0 + 0.37 * lane as f32), value: 0.0093 * (1.0 + 0.21 * lane as f32) };
    let lanes = if shape.row_type == RowType::Fp8 { shape.lanes } else { 0 };
    (0..lanes).map(scale).collect::<Vec<_>>().into()
}

impl Layer {
    pub(crate) fn new(shape: Shape, seed: u64) -> Self {
        let mut rng = StdRng::seed_from_u64(seed);
        let (lanes, dim) = (shape.lanes, shape.dim);
        // Per lane: eight cluster centres, and a spread by channel with outliers.
        let centres: Vec<f32> = (0..lanes * 8 * dim).map(|_| normal(&mut rng)).collect();
        let spread: Vec<f32> = (0..lanes * dim).map(|_| if rng.random_ratio(1, 12) { 4.0 } else { rng.random_range(0.2..1.0) }).collect();
        let scales = scales(&shape);
        let (mut keys, mut values) = (Vec::new(), Vec::new());
        for _ in 0..shape.tokens {
            for lane in 0..lanes {
                let cluster = rng.random_range(0..8);
                for channel in 0..dim {
                    let centre = centres[(lane * 8 + cluster) * dim + channel];
                    let key = (centre + 0.5 * normal(&mut rng)) * spread[lane * dim + channel];
                    keys.push(element(shape.row_type, key, scales.of(lane).key).1);
                    values.push(element(shape.row_type, normal(&mut rng), scales.of(lane).value).1);
                }
            }
        }
        let geometry = LayerGeometry {
            heads: HeadMap::new((lanes * shape.group) as u16, lanes as u16),
            head_dim: dim,
            row_type: shape.row_type,
            softmax_scale: 1.0 / (dim as f32).sqrt(),
            scales,
        };
        let pages = pages(&shape, &geometry.scales, &keys, &values);
        Self { shape, geometry, keys, values, pages, rng }
    }

    /// Queries of `tokens` tokens, `[token][query_head][dim]`, that resemble keys of their lane.
    pub(crate) fn queries(&mut self, tokens: usize) -> Vec<f32> {
        let mut queries = Vec::new();
        for _ in 0..tokens {
            for head in 0..self.shape.lanes * self.shape.group {
                let like = self.rng.random_range(0..self.shape.tokens);
                for channel in 0..self.shape.dim {
                    let key = self.key(like, head / self.shape.group)[channel];
                    queries.push(0.5 * key + 0.3 * normal(&mut self.rng));
                }
            }
        }
        queries
    }

    /// The scales of a model of this layer alone.
    pub(crate) fn model_scales(&self) -> Vec<LaneScales> {
        if self.shape.row_type == RowType::Fp8 { vec![self.geometry.scales.clone()] } else { Vec::new() }
    }

    pub(crate) fn key(&self, token: usize, lane: usize) -> &[f32] {
        &self.keys[(token * self.shape.lanes + lane) * self.shape.dim..][..self.shape.dim]
    }

    pub(crate) fn value(&self, token: usize, lane: usize) -> &[f32] {
        &self.values[(token * self.shape.lanes + lane) * self.shape.dim..][..self.shape.dim]
    }

    pub(crate) fn page_slices(&self) -> Vec<&[u8]> {
        self.pages.iter().map(Vec::as_slice).collect()
    }

    /// A coder with its own channels and ranges in every lane.
    pub(crate) fn coder(&mut self, plan: &LabelPlan) -> LabelCoder {
        let dim = self.shape.dim;
        let lanes = (0..self.shape.lanes).map(|lane| {
            let mut order: Vec<u16> = (0..dim as u16).collect();
            let magnitude: Vec<f32> =
                (0..dim).map(|channel| (0..self.shape.tokens).map(|token| self.key(token, lane)[channel].abs()).sum()).collect();
            order.sort_by(|&a, &b| magnitude[usize::from(b)].total_cmp(&magnitude[usize::from(a)]));
            // Ranges that leave some keys outside, as quantiles do.
            let most = |channel: usize, sign: f32| {
                (0..self.shape.tokens).map(|token| sign * self.key(token, lane)[channel]).fold(f32::MIN, f32::max)
            };
            let low: Vec<f32> = (0..dim).map(|channel| -0.9 * most(channel, -1.0) - 0.01).collect();
            let high = (0..dim).map(|channel| (0.9 * most(channel, 1.0)).max(low[channel] + 0.1)).collect();
            LaneCalibration { order, magnitude, low, high }
        });
        let calibration = LayerCalibration { layer: 0, lanes: lanes.collect() };
        LabelCoder::new(plan, &calibration)
    }

    /// Distinct ascending rows below `end` for every lane, `[lane][count]`.
    pub(crate) fn listed(&mut self, count: usize, end: usize) -> Vec<u32> {
        let mut listed = Vec::new();
        for _ in 0..self.shape.lanes {
            let mut rows = rand::seq::index::sample(&mut self.rng, end, count).into_vec();
            rows.sort_unstable();
            listed.extend(rows.into_iter().map(|row| row as u32));
        }
        listed
    }
}

fn pages(shape: &Shape, scales: &LaneScales, keys: &[f32], values: &[f32]) -> Vec<Vec<u8>> {
    let mut pages = Vec::new();
    for chunk in 0..shape.tokens.div_ceil(256) {
        let mut page = Vec::new();
        for lane in 0..shape.lanes {
            for token in chunk * 256..(chunk + 1) * 256 {
                for (part, scale) in [(keys, scales.of(lane).key), (values, scales.of(lane).value)] {
                    for channel in 0..shape.dim {
                        let x = part.get((token * shape.lanes + lane) * shape.dim + channel);
                        // Rows that were never written hold what must not be read.
                        page.extend(element(shape.row_type, x.copied().unwrap_or(f32::NAN), scale).0);
                    }
                }
            }
        }
        pages.push(page);
    }
    pages
}

/// Softmax attention in f64 of one query over rows of a lane: output, natural log-sum-exp, and each row's share.
pub(crate) fn naive(layer: &Layer, query: &[f32], lane: usize, rows: &[usize]) -> (Vec<f64>, f64, Vec<f64>) {
    let mut scores = Vec::new();
    for &row in rows {
        let mut dot = 0.0;
        for (q, k) in query.iter().zip(layer.key(row, lane)) {
            dot += f64::from(*q) * f64::from(*k);
        }
        scores.push(dot * f64::from(layer.geometry.softmax_scale));
    }
    let top = scores.iter().fold(f64::NEG_INFINITY, |top, &score| top.max(score));
    let sum: f64 = scores.iter().map(|score| (score - top).exp()).sum();
    let shares: Vec<f64> = scores.iter().map(|score| (score - top).exp() / sum).collect();
    let mut output = vec![0.0; layer.shape.dim];
    for (&row, share) in rows.iter().zip(&shares) {
        for (channel, &v) in layer.value(row, lane).iter().enumerate() {
            output[channel] += share * f64::from(v);
        }
    }
    (output, top + sum.ln(), shares)
}

/// Fails unless all numbers agree within `tolerance`.
pub(crate) fn assert_close(name: &str, got: &[f32], expected: &[f64], tolerance: f64) {
    assert_eq!(got.len(), expected.len(), "{name}");
    for (index, (&got, &expected)) in got.iter().zip(expected).enumerate() {
        assert!((f64::from(got) - expected).abs() <= tolerance, "{name}: element {index} is {got}, expected {expected}");
    }
}
