//! Accumulates a calibration from recorded or live queries and keys.

use crate::label::{Calibration, LabelPlan, LaneCalibration, LayerCalibration};
use crate::shape::{LaneKind, ModelShape};

/// Collects the statistics of a [`Calibration`] block by block: the result depends on the tokens and their order, not on how they were
/// cut into blocks.
pub struct Calibrator {
    plan: LabelPlan,
    seed: u64,
    text_hash: String,
    layers: Vec<LayerStatistics>,
}

/// Tokens of a layer whose keys are kept for quantiles: a uniform sample of all tokens seen.
pub const SAMPLE_TOKENS: usize = 2048;

struct LayerStatistics {
    layer: u16,
    lanes: usize,
    head_dim: usize,
    group: usize,
    tokens: u64,
    random: u64,
    /// `[lane][channel]` sums of |q_c k_c|, or of |k_c| without queries.
    sums: Vec<f64>,
    /// `[sampled token][lane][channel]`.
    sample: Vec<f32>,
}

impl Calibrator {
    /// A calibrator of the model's full-attention layers. `seed` decides which tokens are sampled for quantiles; `text_hash` is stored.
    #[must_use]
    pub fn new(shape: &ModelShape, plan: &LabelPlan, text_hash: &str, seed: u64) -> Self {
        let selected = shape.layers.iter().enumerate().filter(|(_, layer)| layer.kind == LaneKind::Selected);
        let layers = selected.map(|(index, layer)| LayerStatistics {
            layer: index as u16,
            lanes: layer.lanes(),
            head_dim: usize::from(layer.head_dim),
            group: layer.heads().group(),
            tokens: 0,
            random: seed ^ (index as u64) << 32,
            sums: vec![0.0; layer.lanes() * usize::from(layer.head_dim)],
            sample: Vec::new(),
        });
        Self { plan: plan.clone(), seed, text_hash: text_hash.to_owned(), layers: layers.collect() }
    }

    /// Adds tokens of one layer: keys `[token][lane][head_dim]` and, where known, queries `[token][query_head][head_dim]`, both after
    /// RoPE. Without queries the statistic is the key's magnitude alone. Layers that are not selected from are ignored.
    pub fn add(&mut self, layer: usize, keys: &[f32], queries: Option<&[f32]>) {
        let Some(statistics) = self.layers.iter_mut().find(|entry| usize::from(entry.layer) == layer) else { return };
        let (row, query_row) = (statistics.sums.len(), statistics.sums.len() * statistics.group);
        assert!(keys.len().is_multiple_of(row), "{} key elements, rows of {row}", keys.len());
        let tokens = keys.len() / row;
        if let Some(queries) = queries {
            assert_eq!(queries.len(), tokens * query_row, "query elements of {tokens} tokens");
        }
        for token in 0..tokens {
            let query = queries.map(|queries| &queries[token * query_row..(token + 1) * query_row]);
            statistics.add_token(&keys[token * row..(token + 1) * row], query);
        }
    }

    /// Tokens added to the layer that has seen fewest.
    #[must_use]
    pub fn tokens(&self) -> u64 {
        self.layers.iter().map(|layer| layer.tokens).min().unwrap_or(0)
    }

    /// The calibration of everything added; `None` while some layer has seen no token.
    #[must_use]
    pub fn finish(&self) -> Option<Calibration> {
        if self.layers.iter().any(|layer| layer.tokens == 0) {
            return None;
        }
        Some(Calibration {
            version: 1,
            plan: self.plan.clone(),
            text_hash: self.text_hash.clone(),
            seed: self.seed,
            tokens: self.tokens(),
            layers: self.layers.iter().map(LayerStatistics::finish).collect(),
        })
    }
}

impl LayerStatistics {
    fn add_token(&mut self, key: &[f32], query: Option<&[f32]>) {
        for lane in 0..self.lanes {
            for channel in 0..self.head_dim {
                let at = lane * self.head_dim + channel;
                let head = |member: usize| (lane * self.group + member) * self.head_dim + channel;
                let weight: f64 = query.map_or(1.0, |query| (0..self.group).map(|member| f64::from(query[head(member)].abs())).sum());
                self.sums[at] += f64::from(key[at].abs()) * weight;
            }
        }
        self.keep_in_sample(key);
        self.tokens += 1;
    }

    /// Algorithm R (Vitter, 1985): every token seen so far is in the sample with equal probability.
    fn keep_in_sample(&mut self, key: &[f32]) {
        if self.tokens < SAMPLE_TOKENS as u64 {
            self.sample.extend_from_slice(key);
            return;
        }
        let place = (split_mix(&mut self.random) % (self.tokens + 1)) as usize;
        if place < SAMPLE_TOKENS {
            self.sample[place * key.len()..(place + 1) * key.len()].copy_from_slice(key);
        }
    }

    fn finish(&self) -> LayerCalibration {
        LayerCalibration { layer: self.layer, lanes: (0..self.lanes).map(|lane| self.finish_lane(lane)).collect() }
    }

    fn finish_lane(&self, lane: usize) -> LaneCalibration {
        let first = lane * self.head_dim;
        let mean = |channel: usize| (self.sums[first + channel] / self.tokens as f64) as f32;
        let magnitude: Vec<f32> = (0..self.head_dim).map(mean).collect();
        let mut order: Vec<u16> = (0..self.head_dim as u16).collect();
        order.sort_by(|&a, &b| magnitude[usize::from(b)].total_cmp(&magnitude[usize::from(a)]).then(a.cmp(&b)));
        let ranges =
            (first..first + self.head_dim).map(|at| range(self.sample.iter().skip(at).step_by(self.sums.len()).copied().collect()));
        let (low, high) = ranges.unzip();
        LaneCalibration { order, magnitude, low, high }
    }
}

/// The 0.5 and 99.5 % quantiles (nearest rank, rounded outwards), widened when they are equal.
fn range(mut values: Vec<f32>) -> (f32, f32) {
    values.sort_by(f32::total_cmp);
    let outside = values.len() / 200;
    let (low, high) = (values[outside], values[values.len() - 1 - outside]);
    let least = (low.abs() * 1e-3).max(1e-6);
    if high - low >= least { (low, high) } else { (low - least, high + least) }
}

/// SplitMix64 (Steele, Lea, Flood, 2014).
fn split_mix(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9E37_79B9_7F4A_7C15);
    let mut z = *state;
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}
