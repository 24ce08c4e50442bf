//! `drifting-clusters`: rows and queries of a long sequence, made on the fly from a seed.
//!
//! What real keys look like, as far as selection cares: a few channels with large values and a constant offset (outliers), tokens that fall
//! into clusters whose members come in runs, cluster centres that drift slowly along the sequence, and noise. A key is
//! `offset + scale * (centre(cluster, position) + noise)`; values are random. A query looks for the cluster of an earlier token, as it was
//! at that token, so that its attention concentrates on rows that a selector has to find.
//!
//! Every row is a function of (seed, layer, lane, position): any part can be made again, which is how recall is checked without keeping or
//! reading back what was stored.

use std::f32::consts::TAU;
use std::ops::Range;

use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};
use sluice_kernels::rows::{e4m3, read_elements};
use sluice_kernels::scales::RowScale;
use sluice_kernels::shape::{LayerShape, ModelShape, RowType};
use sluice_kernels::slot::CHUNK_TOKENS;

/// Name of the generator, printed with every result.
pub const GENERATOR_NAME: &str = "drifting-clusters";

/// Clusters of a lane.
const CLUSTERS: usize = 128;
/// Tokens of a run that mostly share a cluster.
const RUN_TOKENS: usize = 64;
/// Numbers in the pool of noise from which every row takes a window.
const POOL: usize = 1 << 16;
/// Noise of a key around its centre, in units of the channel's scale.
const KEY_NOISE: f32 = 0.9;
/// Noise of a query, in the same units.
const QUERY_NOISE: f32 = 0.4;
/// What a query gains from a key of its own cluster over one of another, in nats after the softmax scale.
const QUERY_GAIN: f32 = 9.0;

/// Scales of fp8 rows of these numbers, in every lane: the largest of a long sequence lie well inside.
pub const ROW_SCALE: RowScale = RowScale { key: 0.5, value: 1.0 / 64.0 };

/// The shape of a model whose rows this generator makes, with its scales where they are fp8.
#[must_use]
pub fn generated_shape(row_type: RowType, layers: Vec<LayerShape>) -> ModelShape {
    let mut shape = ModelShape::unscaled(row_type, layers);
    if row_type == RowType::Fp8 {
        shape.scales = shape.layers.iter().map(|layer| vec![ROW_SCALE; layer.lanes()].into()).collect();
    }
    shape
}

/// A deterministic source of rows and queries for a model shape.
pub struct Generator {
    seed: u64,
    row_type: RowType,
    layers: Vec<Layer>,
    noise: Vec<f32>,
    values: Vec<u8>,
}

struct Layer {
    shape: LayerShape,
    lanes: Vec<Lane>,
}

/// What is fixed about a lane.
struct Lane {
    /// Spread of each channel.
    scale: Vec<f32>,
    /// Offset of each channel.
    offset: Vec<f32>,
    /// `[cluster][channel]`, already scaled: the centre at angle 0.
    start: Vec<f32>,
    /// `[cluster][channel]`, already scaled: the centre at a quarter turn.
    turned: Vec<f32>,
    /// Turn of each cluster per chunk, in radians.
    rate: Vec<f32>,
    /// Query per unit of whitened centre, so that a matching key gains `QUERY_GAIN`.
    query_gain: f32,
}

impl Generator {
    /// A generator for a checked shape; of fp8 rows, one of [`generated_shape`].
    #[must_use]
    pub fn new(shape: &ModelShape, seed: u64) -> Self {
        let widest = shape.layers.iter().map(|layer| usize::from(layer.head_dim)).max().unwrap_or(0);
        let mut random = Random::new(&[seed, 0]);
        let noise: Vec<f32> = (0..POOL + widest).map(|_| random.normal()).collect();
        let mut values = vec![0; (POOL + widest) * shape.row_type.element_bytes()];
        encode(shape.row_type, ROW_SCALE.value, &(0..POOL + widest).map(|_| random.normal()).collect::<Vec<_>>(), &mut values);
        let layers = shape.layers.iter().enumerate().map(|(index, layer)| Layer {
            shape: *layer,
            lanes: (0..layer.lanes()).map(|lane| Lane::new(layer, Random::new(&[seed, 1, index as u64, lane as u64]))).collect(),
        });
        Self { seed, row_type: shape.row_type, layers: layers.collect(), noise, values }
    }

    /// Token ids of a range of positions: random, the same for every layer.
    #[must_use]
    pub fn token_ids(&self, positions: Range<usize>) -> Vec<u32> {
        positions.map(|position| (mix(&[self.seed, 2, position as u64]) >> 47) as u32).collect()
    }

    /// Bytes of the rows of `tokens` positions of a layer.
    #[must_use]
    pub fn rows_bytes(&self, layer: usize, tokens: usize) -> usize {
        let shape = &self.layers[layer].shape;
        shape.lanes() * tokens * shape.row_bytes(self.row_type)
    }

    /// Writes the rows of `positions` of a layer, `[lane][token][row bytes]`, a row being key then value.
    ///
    /// # Panics
    /// When `out` is not `rows_bytes` long.
    pub fn fill_rows(&self, layer: usize, positions: Range<usize>, out: &mut [u8]) {
        let shape = &self.layers[layer].shape;
        let (row_bytes, channels) = (shape.row_bytes(self.row_type), usize::from(shape.head_dim));
        assert_eq!(out.len(), self.rows_bytes(layer, positions.len()), "rows of {} tokens", positions.len());
        let mut key = vec![0.0; channels];
        for (lane, out) in out.chunks_exact_mut(positions.len() * row_bytes).enumerate() {
            for (position, row) in positions.clone().zip(out.chunks_exact_mut(row_bytes)) {
                self.exact_key(layer, lane, position, &mut key);
                let (key_bytes, value_bytes) = row.split_at_mut(row_bytes / 2);
                encode(self.row_type, ROW_SCALE.key, &key, key_bytes);
                let window =
                    (mix(&[self.seed, 3, layer as u64, lane as u64, position as u64]) >> 48) as usize * self.row_type.element_bytes();
                value_bytes.copy_from_slice(&self.values[window..window + value_bytes.len()]);
            }
        }
    }

    /// Writes the keys of `positions` of one lane as they are stored, that is rounded to the row type: `[token][channel]`.
    pub fn fill_keys(&self, layer: usize, lane: usize, positions: Range<usize>, out: &mut [f32]) {
        let channels = usize::from(self.layers[layer].shape.head_dim);
        let mut stored = vec![0; channels * self.row_type.element_bytes()];
        for (position, key) in positions.zip(out.chunks_exact_mut(channels)) {
            self.exact_key(layer, lane, position, key);
            encode(self.row_type, ROW_SCALE.key, key, &mut stored);
            read_elements(self.row_type, &stored, ROW_SCALE.key, key);
        }
    }

    /// The query of the token at `position`, `[query_head][channel]`. The heads of a lane look for the cluster of one earlier token;
    /// every other head has a target of its own. Variants are other queries at the same place.
    #[must_use]
    pub fn query(&self, layer: usize, position: usize, variant: u64) -> Vec<f32> {
        let Layer { shape, lanes } = &self.layers[layer];
        let heads = shape.heads();
        let channels = usize::from(shape.head_dim);
        let mut query = vec![0.0; heads.query_heads() * channels];
        for (lane, model) in lanes.iter().enumerate() {
            let shared = Random::new(&[self.seed, 4, layer as u64, lane as u64, position as u64, variant]).below(position.max(1));
            for head in heads.heads_of(lane) {
                let mut random = Random::new(&[self.seed, 5, layer as u64, head as u64, position as u64, variant]);
                let own = random.below(position.max(1));
                let target = if head % 2 == 0 { shared } else { own };
                let cluster = self.cluster(layer, lane, target);
                model.query(cluster, target, &mut random, &mut query[head * channels..(head + 1) * channels]);
            }
        }
        query
    }

    /// The cluster of a token: that of its run, or for one token in four any.
    fn cluster(&self, layer: usize, lane: usize, position: usize) -> usize {
        let own = mix(&[self.seed, 6, layer as u64, lane as u64, position as u64]);
        if own & 3 == 0 {
            return skewed(own >> 8);
        }
        skewed(mix(&[self.seed, 7, layer as u64, lane as u64, (position / RUN_TOKENS) as u64]))
    }

    fn exact_key(&self, layer: usize, lane: usize, position: usize, key: &mut [f32]) {
        let cluster = self.cluster(layer, lane, position);
        let window = (mix(&[self.seed, 8, layer as u64, lane as u64, position as u64]) >> 48) as usize;
        self.layers[layer].lanes[lane].key(cluster, position, &self.noise[window..window + key.len()], key);
    }
}

impl Lane {
    fn new(shape: &LayerShape, mut random: Random) -> Self {
        let channels = usize::from(shape.head_dim);
        let mut scale = vec![0.0; channels];
        for scale in &mut scale {
            *scale = 0.4 + 0.6 * random.unit();
        }
        let mut offset: Vec<f32> = (0..channels).map(|_| 0.3 * random.normal()).collect();
        for rank in 0..channels * 3 / 16 {
            let channel = random.below(channels);
            scale[channel] = if rank < channels / 16 { 3.0 + 2.0 * random.unit() } else { 1.5 + random.unit() };
            offset[channel] = 3.0 * scale[channel] * random.normal();
        }
        let centres =
            |random: &mut Random| -> Vec<f32> { (0..CLUSTERS * channels).map(|index| scale[index % channels] * random.normal()).collect() };
        let (start, turned) = (centres(&mut random), centres(&mut random));
        let rate = (0..CLUSTERS).map(|_| TAU / 1024.0 * (0.2 + 0.8 * random.unit())).collect();
        // A whitened centre meets its own key with the sum of scales on average.
        let query_gain = QUERY_GAIN / (shape.softmax_scale * scale.iter().sum::<f32>());
        Self { scale, offset, start, turned, rate, query_gain }
    }

    fn turn(&self, cluster: usize, position: usize) -> (f32, f32) {
        (self.rate[cluster] * (position / CHUNK_TOKENS) as f32).sin_cos()
    }

    fn centre(&self, cluster: usize) -> (&[f32], &[f32]) {
        let channels = self.scale.len();
        let range = cluster * channels..(cluster + 1) * channels;
        (&self.start[range.clone()], &self.turned[range])
    }

    fn key(&self, cluster: usize, position: usize, noise: &[f32], key: &mut [f32]) {
        let (sin, cos) = self.turn(cluster, position);
        let (start, turned) = self.centre(cluster);
        let centres = start.iter().zip(turned);
        let spread = self.scale.iter().zip(&self.offset).zip(noise);
        for (key, ((start, turned), ((scale, offset), noise))) in key.iter_mut().zip(centres.zip(spread)) {
            *key = offset + cos * start + sin * turned + KEY_NOISE * scale * noise;
        }
    }

    fn query(&self, cluster: usize, target: usize, random: &mut Random, query: &mut [f32]) {
        let (sin, cos) = self.turn(cluster, target);
        let (start, turned) = self.centre(cluster);
        for (channel, query) in query.iter_mut().enumerate() {
            let whitened = (cos * start[channel] + sin * turned[channel]) / self.scale[channel];
            *query = self.query_gain * (whitened + QUERY_NOISE * random.normal());
        }
    }
}

/// A cluster from random bits: the square of a uniform number, so that some clusters are many times larger than others.
fn skewed(bits: u64) -> usize {
    let unit = (bits >> 16 & 0xff_ffff) as f32 / (1 << 24) as f32;
    ((unit * unit * CLUSTERS as f32) as usize).min(CLUSTERS - 1)
}

/// Rounds to the row type, little-endian; `scale` is that of fp8 rows.
fn encode(row_type: RowType, scale: f32, values: &[f32], out: &mut [u8]) {
    const PIECE: usize = 256;
    match row_type {
        RowType::F32 => out.copy_from_slice(bytemuck::cast_slice(values)),
        RowType::F16 => {
            let mut rounded = [f16::ZERO; PIECE];
            for (values, out) in values.chunks(PIECE).zip(out.chunks_mut(2 * PIECE)) {
                rounded[..values.len()].convert_from_f32_slice(values);
                out.copy_from_slice(bytemuck::cast_slice(&rounded[..values.len()]));
            }
        }
        RowType::Bf16 => {
            let mut rounded = [bf16::ZERO; PIECE];
            for (values, out) in values.chunks(PIECE).zip(out.chunks_mut(2 * PIECE)) {
                rounded[..values.len()].convert_from_f32_slice(values);
                out.copy_from_slice(bytemuck::cast_slice(&rounded[..values.len()]));
            }
        }
        RowType::Fp8 => {
            for (out, &value) in out.iter_mut().zip(values) {
                *out = e4m3::code_of(value, scale);
            }
        }
    }
}

/// Hash of a few words (splitmix64 over a running state): stable over platforms and versions, unlike a library's generator.
fn mix(words: &[u64]) -> u64 {
    words.iter().fold(0x51_7c_c1_b7_27_22_0a_95, |state, &word| {
        let mut z = (state ^ word).wrapping_add(0x9e37_79b9_7f4a_7c15);
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    })
}

/// A stream of random numbers that starts at a hash.
pub struct Random {
    state: u64,
}

impl Random {
    /// A stream for these words.
    #[must_use]
    pub fn new(words: &[u64]) -> Self {
        Self { state: mix(words) }
    }

    /// The next 64 bits.
    pub fn bits(&mut self) -> u64 {
        self.state = self.state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        mix(&[self.state])
    }

    /// Uniform in [0, 1).
    pub fn unit(&mut self) -> f32 {
        (self.bits() >> 40) as f32 / (1_u64 << 24) as f32
    }

    /// Uniform in 0..bound; `bound` is at least 1.
    pub fn below(&mut self, bound: usize) -> usize {
        ((u128::from(self.bits()) * bound as u128) >> 64) as usize
    }

    /// Standard normal (Box and Muller).
    pub fn normal(&mut self) -> f32 {
        let radius = (-2.0 * (1.0 - self.unit()).ln()).sqrt();
        radius * (TAU * self.unit()).cos()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use sluice_kernels::shape::LaneKind;

    fn shape(row_type: RowType) -> ModelShape {
        let layer = LayerShape { kind: LaneKind::Selected, query_heads: 4, kv_heads: 2, head_dim: 64, softmax_scale: 0.125 };
        generated_shape(row_type, vec![layer, LayerShape { head_dim: 128, softmax_scale: 128_f32.sqrt().recip(), ..layer }])
    }

    #[test]
    fn any_part_can_be_made_again() {
        let shape = shape(RowType::F16);
        let (one, two) = (Generator::new(&shape, 7), Generator::new(&shape, 7));
        let mut all = vec![0; one.rows_bytes(1, 600)];
        one.fill_rows(1, 0..600, &mut all);
        let mut part = vec![0; two.rows_bytes(1, 30)];
        two.fill_rows(1, 500..530, &mut part);
        let row = 512;
        for lane in 0..2 {
            assert_eq!(part[lane * 30 * row..(lane + 1) * 30 * row], all[(lane * 600 + 500) * row..(lane * 600 + 530) * row]);
        }
        let mut other = vec![0; one.rows_bytes(1, 30)];
        Generator::new(&shape, 8).fill_rows(1, 500..530, &mut other);
        assert_ne!(part, other);
        assert_eq!(one.token_ids(0..64)[32..], two.token_ids(32..64));
        assert_eq!(one.query(0, 599, 0), two.query(0, 599, 0));
        assert_ne!(one.query(0, 599, 0), one.query(0, 598, 0));
        assert_ne!(one.query(0, 599, 0), one.query(0, 599, 1));
    }

    /// The number of an e4m3 code, by its definition.
    fn e4m3_number(code: u8) -> f32 {
        let (exponent, mantissa) = (i32::from(code >> 3 & 15), f32::from(code & 7) / 8.0);
        let magnitude = if exponent == 0 { mantissa * 2f32.powi(-6) } else { (1.0 + mantissa) * 2f32.powi(exponent - 7) };
        if code < 128 { magnitude } else { -magnitude }
    }

    #[test]
    fn keys_are_the_first_half_of_the_stored_rows() {
        for row_type in [RowType::F32, RowType::F16, RowType::Bf16, RowType::Fp8] {
            let generator = Generator::new(&shape(row_type), 3);
            let mut rows = vec![0; generator.rows_bytes(0, 9)];
            generator.fill_rows(0, 100..109, &mut rows);
            let mut keys = vec![0.0; 9 * 64];
            generator.fill_keys(0, 1, 100..109, &mut keys);
            let element = row_type.element_bytes();
            for (token, key) in keys.chunks(64).enumerate() {
                let start = (9 + token) * 128 * element;
                for (channel, &value) in key.iter().enumerate() {
                    let bytes = &rows[start + channel * element..start + (channel + 1) * element];
                    let stored = match row_type {
                        RowType::F32 => f32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]),
                        RowType::F16 => f16::from_le_bytes([bytes[0], bytes[1]]).to_f32(),
                        RowType::Bf16 => f32::from_bits(u32::from(u16::from_le_bytes([bytes[0], bytes[1]])) << 16),
                        RowType::Fp8 => e4m3_number(bytes[0]) * ROW_SCALE.key,
                    };
                    assert_eq!(value, stored);
                }
            }
            assert!(rows.chunks(element * 64).skip(1).step_by(2).any(|value| value.iter().any(|&byte| byte != 0)), "values are not zero");
        }
    }

    /// The point of the clusters: a sixteenth of the rows holds most of a query's attention, and few rows hold little of it.
    #[test]
    fn attention_concentrates_on_earlier_clusters() {
        let shape = shape(RowType::F16);
        let generator = Generator::new(&shape, 11);
        let length = 8192;
        let mut keys = vec![0.0; length * 128];
        generator.fill_keys(1, 0, 0..length, &mut keys);
        let mut kept = Vec::new();
        for position in length..length + 40 {
            let query = &generator.query(1, position, 0)[..128];
            let mut weights: Vec<f64> = keys
                .chunks(128)
                .map(|key| (f64::from(key.iter().zip(query).map(|(k, q)| k * q).sum::<f32>()) / 128_f64.sqrt()).exp())
                .collect();
            weights.sort_by(|a, b| b.total_cmp(a));
            let total: f64 = weights.iter().sum();
            kept.push(weights[..length / 16].iter().sum::<f64>() / total);
            assert!(weights[0] / total < 0.9, "one row holds {}", weights[0] / total);
        }
        let mean = kept.iter().sum::<f64>() / kept.len() as f64;
        assert!((0.7..0.999).contains(&mean), "a sixteenth of the rows keeps {mean} of the attention");
    }
}
