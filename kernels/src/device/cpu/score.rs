//! Label scores in integers, and importance keys.
//!
//! First pass, per chunk: integer dot products of packed codes, f32 scores in units of log2, their maximum by head, and
//! `2^(score - maximum)` rounded to 16 bits (7 of exponent, 9 of mantissa: rounding costs at most half a step of a key).
//! Between the passes the chunks' maxima and sums give each head's log-sum-exp. Second pass: the weighted sum over heads, as keys.

use super::simd::{Simd, Task, exp2, exp2_coarse};
use crate::device::ScoreJob;
use crate::label::packing::BLOCK_TOKENS;
use crate::label::{HeadWeights, LabelGroup, LabelPlan};
use crate::select::{KEY_SHIFT, SMALLEST_KEYED};
use crate::slot::CHUNK_TOKENS;

/// Blocks that are scored together, so that a weight is loaded once for all of them.
const TOGETHER: usize = 2;
const BLOCKS: usize = CHUNK_TOKENS / BLOCK_TOKENS;

/// The query heads of one lane, ready to meet labels.
#[derive(Default)]
pub(super) struct LaneQuery {
    /// `[head][quad]`: four signed bytes each.
    quads: Vec<u32>,
    /// `[head][group]`: unit times softmax scale, in log2.
    factors: Vec<f32>,
    heads: usize,
    quads_a_head: usize,
    one: HeadWeights,
}

impl LaneQuery {
    /// Prepares the heads of `lane`.
    pub(super) fn set(&mut self, job: &ScoreJob, lane: usize) {
        self.quads.clear();
        self.factors.clear();
        self.heads = job.geometry.heads.group();
        self.quads_a_head = job.coder.plan.channels() / 4;
        let scale = job.geometry.softmax_scale * std::f32::consts::LOG2_E;
        for head in job.geometry.heads.heads_of(lane) {
            let query = &job.query[head * job.geometry.head_dim..(head + 1) * job.geometry.head_dim];
            self.one.set(&job.coder.plan, &job.coder.lanes[lane], query);
            let (quads, _) = self.one.weights.as_chunks::<4>();
            self.quads.extend(quads.iter().map(|quad| u32::from_le_bytes(quad.map(|weight| weight as u8))));
            self.factors.extend(self.one.units.iter().map(|unit| unit * scale));
        }
    }
}

/// What the first pass leaves behind for one lane.
#[derive(Default)]
pub(super) struct LaneScores {
    /// `[chunk][head][row of the chunk]`.
    pub(super) weights: Vec<u16>,
    /// `[head][chunk]`, padded to a multiple of 16 chunks: maximum of the scores, in log2.
    pub(super) maxima: Vec<f32>,
    /// `[head][chunk]`, padded: sum of `2^(score - maximum)`; afterwards the factor of the chunk's weights.
    pub(super) sums: Vec<f32>,
}

impl LaneScores {
    /// Makes room for `chunks` chunks of `heads` heads.
    pub(super) fn resize(&mut self, heads: usize, chunks: usize) {
        let padded = chunks.next_multiple_of(16);
        self.weights.resize(heads * chunks * CHUNK_TOKENS, 0);
        self.maxima.clear();
        self.maxima.resize(heads * padded, f32::NEG_INFINITY);
        self.sums.clear();
        self.sums.resize(heads * padded, 0.0);
    }
}

/// First pass over one chunk of one lane.
pub(super) struct ScoreChunk<'a> {
    pub(super) plan: &'a LabelPlan,
    pub(super) query: &'a LaneQuery,
    /// The lane's `256 x label_bytes`.
    pub(super) labels: &'a [u8],
    /// The lane's labels in the next chunk, to be asked for ahead; may be empty.
    pub(super) next: &'a [u8],
    /// `[head][row]`.
    pub(super) weights: &'a mut [u16],
    /// `[head]`: maximum and sum.
    pub(super) totals: &'a mut [(f32, f32)],
}

impl Task for ScoreChunk<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        assert_eq!(self.labels.len(), CHUNK_TOKENS * self.plan.label_bytes());
        assert!(self.weights.len() == self.query.heads * CHUNK_TOKENS && self.totals.len() == self.query.heads);
        assert!(self.next.is_empty() || self.next.len() == self.labels.len());
        let mut head = 0;
        while head < self.query.heads {
            let rest = self.query.heads - head;
            let weights = &mut self.weights[head * CHUNK_TOKENS..];
            let totals = &mut self.totals[head..];
            // Labels of the next chunk are asked for once, with the first heads.
            let next = if head == 0 { self.next } else { &[] };
            let heads = Heads { plan: self.plan, query: self.query, first: head, labels: self.labels, next };
            match rest {
                4.. => score_heads::<S, 4>(simd, &heads, weights, totals),
                2.. => score_heads::<S, 2>(simd, &heads, weights, totals),
                _ => score_heads::<S, 1>(simd, &heads, weights, totals),
            }
            head += match rest {
                4.. => 4,
                2.. => 2,
                _ => 1,
            };
        }
    }
}

/// Some heads of a lane and the labels of a chunk.
struct Heads<'a> {
    plan: &'a LabelPlan,
    query: &'a LaneQuery,
    first: usize,
    labels: &'a [u8],
    next: &'a [u8],
}

#[inline(always)]
fn score_heads<S: Simd, const G: usize>(simd: S, heads: &Heads, weights: &mut [u16], totals: &mut [(f32, f32)]) {
    let mut scores = [[0.0f32; CHUNK_TOKENS]; G];
    let maxima = raw_scores::<S, G>(simd, heads, &mut scores);
    for (head, scores) in scores.iter().enumerate() {
        let largest = simd.largest(maxima[head]);
        let lanes_largest = simd.splat(largest);
        let (half, mut sum) = (simd.words(1 << (KEY_SHIFT - 1)), simd.splat(0.0));
        let to = &mut weights[head * CHUNK_TOKENS..(head + 1) * CHUNK_TOKENS];
        for (from, to) in scores.as_chunks::<16>().0.iter().zip(to.as_chunks_mut::<16>().0) {
            // SAFETY: both chunks have 16 elements.
            unsafe {
                let weight = exp2_coarse(simd, simd.sub(simd.load(from.as_ptr()), lanes_largest));
                sum = simd.add(sum, weight);
                simd.store_u16(to.as_mut_ptr(), simd.shr::<KEY_SHIFT>(simd.add_words(simd.bits(weight), half)));
            }
        }
        totals[head] = (largest, simd.sum(sum));
    }
}

/// Scores of 256 rows by `G` heads, in log2, and their maxima.
#[inline(always)]
fn raw_scores<S: Simd, const G: usize>(simd: S, heads: &Heads, scores: &mut [[f32; CHUNK_TOKENS]; G]) -> [S::Floats; G] {
    let block_bytes = BLOCK_TOKENS * heads.plan.label_bytes();
    let groups = heads.plan.groups();
    let mut maxima = [simd.splat(f32::MIN); G];
    for pair in 0..BLOCKS / TOGETHER {
        let labels = &heads.labels[pair * TOGETHER * block_bytes..(pair + 1) * TOGETHER * block_bytes];
        if !heads.next.is_empty() {
            let ahead = heads.next[pair * TOGETHER * block_bytes..].as_ptr();
            for line in (0..TOGETHER * block_bytes).step_by(64) {
                simd.prefetch(ahead.wrapping_add(line));
            }
        }
        let mut totals = [[simd.splat(0.0); G]; TOGETHER];
        let (mut offset, mut quad) = (0, 0);
        for (index, group) in groups.iter().enumerate() {
            let place = Place { offset, block_bytes, quad };
            let sums = group_dots::<S, G>(simd, heads, group, labels, place);
            for (totals, sums) in totals.iter_mut().zip(sums) {
                for head in 0..G {
                    let factor = simd.splat(heads.query.factors[(heads.first + head) * groups.len() + index]);
                    totals[head] = simd.mul_add(simd.to_floats(sums[head]), factor, totals[head]);
                }
            }
            offset += BLOCK_TOKENS * usize::from(group.channels) * usize::from(group.bits) / 8;
            quad += usize::from(group.channels) / 4;
        }
        for (block, totals) in totals.into_iter().enumerate() {
            for head in 0..G {
                maxima[head] = simd.max(maxima[head], totals[head]);
                let to = &mut scores[head].as_chunks_mut::<16>().0[pair * TOGETHER + block];
                // SAFETY: `to` has 16 elements.
                unsafe { simd.store(to.as_mut_ptr(), totals[head]) };
            }
        }
    }
    maxima
}

/// Where a group begins: bytes into each block, bytes between blocks, and its first quad.
#[derive(Clone, Copy)]
struct Place {
    offset: usize,
    block_bytes: usize,
    quad: usize,
}

type Sums<S, const G: usize> = [[<S as Simd>::Words; G]; TOGETHER];

/// Integer dot products of one group.
#[inline(always)]
fn group_dots<S: Simd, const G: usize>(simd: S, heads: &Heads, group: &LabelGroup, labels: &[u8], place: Place) -> Sums<S, G> {
    let mut sums = [[simd.words(0); G]; TOGETHER];
    let channels = usize::from(group.channels);
    let quads: [&[u32]; G] = std::array::from_fn(|head| {
        let first = (heads.first + head) * heads.query.quads_a_head + place.quad;
        &heads.query.quads[first..first + channels / 4]
    });
    let blocks: [&[u8]; TOGETHER] = std::array::from_fn(|block| {
        let first = block * place.block_bytes + place.offset;
        &labels[first..first + BLOCK_TOKENS * channels * usize::from(group.bits) / 8]
    });
    match group.bits {
        2 => {
            for vector in 0..channels / 16 {
                // SAFETY: a 2-bit group has a whole vector for every 16 channels.
                let codes = blocks.map(|block| unsafe { simd.load_words(block.as_ptr().add(vector * 64)) });
                planes::<S, G, 2, 4>(simd, &mut sums, codes, &quads, vector * 4);
            }
            if !channels.is_multiple_of(16) {
                let codes = blocks.map(|block| half_vector(simd, block));
                planes::<S, G, 2, 2>(simd, &mut sums, codes, &quads, channels / 16 * 4);
            }
        }
        4 => {
            for vector in 0..channels / 8 {
                // SAFETY: a 4-bit group has a whole vector for every 8 channels.
                let codes = blocks.map(|block| unsafe { simd.load_words(block.as_ptr().add(vector * 64)) });
                planes::<S, G, 4, 2>(simd, &mut sums, codes, &quads, vector * 2);
            }
        }
        8 => {
            for vector in 0..channels / 4 {
                // SAFETY: an 8-bit group has a whole vector for every 4 channels.
                let codes = blocks.map(|block| unsafe { simd.load_words(block.as_ptr().add(vector * 64)) });
                planes::<S, G, 8, 1>(simd, &mut sums, codes, &quads, vector);
            }
        }
        _ => sixteen_bits(simd, &mut sums, blocks, &quads),
    }
    sums
}

/// Adds the products of `PLANES` planes of `BITS`-bit codes, quad after quad.
#[inline(always)]
fn planes<S: Simd, const G: usize, const BITS: u32, const PLANES: usize>(
    simd: S,
    sums: &mut Sums<S, G>,
    codes: [S::Words; TOGETHER],
    quads: &[&[u32]; G],
    first: usize,
) {
    let mask = simd.words(0x0101_0101 * ((1u32 << BITS) - 1));
    let plane = |codes: S::Words, plane: usize| {
        let shifted = match plane * BITS as usize {
            0 => codes,
            2 => simd.shr::<2>(codes),
            4 => simd.shr::<4>(codes),
            _ => simd.shr::<6>(codes),
        };
        if BITS == 8 { shifted } else { simd.and(shifted, mask) }
    };
    for index in 0..PLANES {
        for block in 0..TOGETHER {
            let codes = plane(codes[block], index);
            for head in 0..G {
                sums[block][head] = simd.dot::<BITS>(sums[block][head], codes, quads[head][first + index]);
            }
        }
    }
}

/// The last 32 bytes of a 2-bit group whose channels do not fill a vector: nibbles of 16-bit words spread to bytes of 32-bit words.
#[inline(always)]
fn half_vector<S: Simd>(simd: S, block: &[u8]) -> S::Words {
    let tail = &block[block.len() - 32..];
    // SAFETY: the tail has 16 u16, and loads need no alignment.
    let words = unsafe { simd.load_u16(tail.as_ptr().cast()) };
    let bytes = simd.and(simd.or(words, simd.shl::<8>(words)), simd.words(0x00FF_00FF));
    simd.and(simd.or(bytes, simd.shl::<4>(bytes)), simd.words(0x0F0F_0F0F))
}

/// Low bytes, then high bytes, which count 256 times as much.
#[inline(always)]
fn sixteen_bits<S: Simd, const G: usize>(simd: S, sums: &mut Sums<S, G>, blocks: [&[u8]; TOGETHER], quads: &[&[u32]; G]) {
    let mut high = [[simd.words(0); G]; TOGETHER];
    for quad in 0..quads[0].len() {
        for block in 0..TOGETHER {
            // SAFETY: a 16-bit group has two whole vectors for every 4 channels.
            let codes: [S::Words; 2] =
                std::array::from_fn(|plane| unsafe { simd.load_words(blocks[block].as_ptr().add((quad * 2 + plane) * 64)) });
            for head in 0..G {
                sums[block][head] = simd.dot::<8>(sums[block][head], codes[0], quads[head][quad]);
                high[block][head] = simd.dot::<8>(high[block][head], codes[1], quads[head][quad]);
            }
        }
    }
    for block in 0..TOGETHER {
        for head in 0..G {
            sums[block][head] = simd.add_words(sums[block][head], simd.shl::<8>(high[block][head]));
        }
    }
}

/// Between the passes: turns a head's sums by chunk into the factors of its weights, `2^(maximum of chunk - log-sum-exp)`.
pub(super) struct HeadFactors<'a> {
    /// By chunk, padded with `-inf` to a multiple of 16.
    pub(super) maxima: &'a [f32],
    /// By chunk, padded with 0.
    pub(super) sums: &'a mut [f32],
}

impl Task for HeadFactors<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let (maxima, sums) = (self.maxima.as_chunks::<16>().0, self.sums.as_chunks_mut::<16>().0);
        let mut largest = simd.splat(f32::MIN);
        for maxima in maxima {
            // SAFETY: 16 elements.
            largest = simd.max(largest, unsafe { simd.load(maxima.as_ptr()) });
        }
        let largest = simd.splat(simd.largest(largest));
        let mut total = simd.splat(0.0);
        for (maxima, sums) in maxima.iter().zip(sums.iter_mut()) {
            // SAFETY: 16 elements each.
            unsafe {
                let power = exp2(simd, simd.sub(simd.load(maxima.as_ptr()), largest));
                total = simd.mul_add(power, simd.load(sums.as_ptr()), total);
                simd.store(sums.as_mut_ptr(), power);
            }
        }
        let share = simd.splat(1.0 / simd.sum(total));
        for sums in sums {
            // SAFETY: 16 elements.
            unsafe { simd.store(sums.as_mut_ptr(), simd.mul(simd.load(sums.as_ptr()), share)) };
        }
    }
}

/// Second pass over one chunk of one lane: importance keys.
pub(super) struct KeysOfChunk<'a> {
    /// `[head][row]`.
    pub(super) weights: &'a [u16],
    /// `[head][chunk]`, padded.
    pub(super) factors: &'a [f32],
    pub(super) chunk: usize,
    pub(super) heads: usize,
    /// `[row]`.
    pub(super) keys: &'a mut [u16],
}

impl Task for KeysOfChunk<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        const AT_ONCE: usize = 4;
        assert!(self.weights.len() == self.heads * CHUNK_TOKENS && self.keys.len() == CHUNK_TOKENS);
        let stride = self.factors.len() / self.heads;
        let smallest = simd.splat(SMALLEST_KEYED);
        let base = simd.words(SMALLEST_KEYED.to_bits().wrapping_neg());
        for part in 0..CHUNK_TOKENS / (16 * AT_ONCE) {
            let mut sums = [simd.splat(0.0); AT_ONCE];
            for head in 0..self.heads {
                let factor = simd.splat(self.factors[head * stride + self.chunk]);
                let weights = &self.weights[head * CHUNK_TOKENS + part * 16 * AT_ONCE..][..16 * AT_ONCE];
                for (sum, weights) in sums.iter_mut().zip(weights.as_chunks::<16>().0) {
                    // SAFETY: 16 elements.
                    let weight = unsafe { simd.load_u16(weights.as_ptr()) };
                    *sum = simd.mul_add(simd.from_bits(simd.shl::<KEY_SHIFT>(weight)), factor, *sum);
                }
            }
            let keys = &mut self.keys[part * 16 * AT_ONCE..(part + 1) * 16 * AT_ONCE];
            for (sum, keys) in sums.into_iter().zip(keys.as_chunks_mut::<16>().0) {
                let key = simd.shr::<KEY_SHIFT>(simd.add_words(simd.bits(simd.max(sum, smallest)), base));
                // SAFETY: 16 elements.
                unsafe { simd.store_u16(keys.as_mut_ptr(), key) };
            }
        }
    }
}
