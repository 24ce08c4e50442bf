//! Label scores in integers, and importance keys.
//!
//! First pass, per chunk: integer dot products of packed codes, f32 scores in units of log2, their maximum by head, and
//! `2^(score - maximum)` rounded to 16 bits (7 of exponent, 9 of mantissa: rounding costs at most half a step of a key).
//! Between the passes the chunks' maxima and sums give each head's log-sum-exp. Second pass: the weighted sum over heads, as keys.

use std::ops::Range;

use super::simd::{Simd, Task, exp2, exp2_coarse};
use crate::device::ScoreJob;
use crate::label::packing::BLOCK_TOKENS;
use crate::label::{HeadWeights, LabelPlan};
use crate::select::{KEY_SHIFT, SMALLEST_KEYED};
use crate::slot::CHUNK_TOKENS;

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
                4.. => score_heads::<S, 4, 4>(simd, &heads, weights, totals),
                2.. => score_heads::<S, 2, 8>(simd, &heads, weights, totals),
                _ => score_heads::<S, 1, 16>(simd, &heads, weights, totals),
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

/// Keeps vectors from lying across cache lines.
#[repr(align(64))]
struct Aligned<T>(T);

#[inline(always)]
fn score_heads<S: Simd, const G: usize, const T: usize>(simd: S, heads: &Heads, weights: &mut [u16], totals: &mut [(f32, f32)]) {
    let mut scores = Aligned([[0.0f32; CHUNK_TOKENS]; G]);
    let scores = &mut scores.0;
    raw_scores::<S, G, T>(simd, heads, scores);
    // Heads side by side: the chains of one head's maximum and sum alone would leave the processor waiting.
    let mut maxima = [simd.splat(f32::MIN); G];
    for vector in 0..BLOCKS {
        ask_ahead(simd, heads.next, 2 * BLOCKS + vector..2 * BLOCKS + vector + 1);
        for head in 0..G {
            // SAFETY: 16 elements.
            maxima[head] = simd.max(maxima[head], unsafe { simd.load(scores[head].as_chunks::<16>().0[vector].as_ptr()) });
        }
    }
    let (mut largest, mut sums) = ([0.0; G], [simd.splat(0.0); G]);
    for head in 0..G {
        largest[head] = simd.largest(maxima[head]);
        maxima[head] = simd.splat(largest[head]);
    }
    let half = simd.words(1 << (KEY_SHIFT - 1));
    let to = weights[..G * CHUNK_TOKENS].as_chunks_mut::<16>().0;
    for vector in 0..BLOCKS {
        ask_ahead(simd, heads.next, 3 * BLOCKS + vector..3 * BLOCKS + vector + 1);
        for head in 0..G {
            let to = to[head * BLOCKS + vector].as_mut_ptr();
            // SAFETY: both have 16 elements.
            unsafe {
                let score = simd.load(scores[head].as_chunks::<16>().0[vector].as_ptr());
                let weight = exp2_coarse(simd, simd.sub(score, maxima[head]));
                sums[head] = simd.add(sums[head], weight);
                simd.store_u16(to, simd.shr::<KEY_SHIFT>(simd.add_words(simd.bits(weight), half)));
            }
        }
    }
    for head in 0..G {
        totals[head] = (largest[head], simd.sum(sums[head]));
    }
}

/// Adds the scores of 256 rows by `G` heads, in log2, to zeros: group after group.
#[inline(always)]
fn raw_scores<S: Simd, const G: usize, const T: usize>(simd: S, heads: &Heads, scores: &mut [[f32; CHUNK_TOKENS]; G]) {
    let groups = heads.plan.groups();
    let (mut offset, mut quad) = (0, 0);
    for (index, group) in groups.iter().enumerate() {
        let channels = usize::from(group.channels);
        let mut factors = [0.0; G];
        for (head, factor) in factors.iter_mut().enumerate() {
            *factor = heads.query.factors[(heads.first + head) * groups.len() + index];
        }
        let ahead = 2 * BLOCKS * index / groups.len()..2 * BLOCKS * (index + 1) / groups.len();
        let pass = Pass { offset, quad, quads: channels / 4, stride: 64, factors, ahead };
        match group.bits {
            2 => add_group::<S, G, T, 2>(simd, heads, &pass, scores),
            4 => add_group::<S, G, T, 4>(simd, heads, &pass, scores),
            8 => add_group::<S, G, T, 8>(simd, heads, &pass, scores),
            _ => {
                // Low bytes, then high bytes, which count 256 times as much.
                let low = Pass { stride: 128, ..pass.clone() };
                add_group::<S, G, T, 8>(simd, heads, &low, scores);
                let mut high = Pass { offset: offset + 64, ahead: 0..0, ..low };
                for factor in &mut high.factors {
                    *factor *= 256.0;
                }
                add_group::<S, G, T, 8>(simd, heads, &high, scores);
            }
        }
        offset += BLOCK_TOKENS * channels * usize::from(group.bits) / 8;
        quad += channels / 4;
    }
}

/// One group of channels, or one byte plane of it, over all blocks of a chunk.
#[derive(Clone)]
struct Pass<const G: usize> {
    /// Where it begins in each block, in bytes.
    offset: usize,
    /// Its first quad, and how many.
    quad: usize,
    quads: usize,
    /// From one vector to the next, in bytes.
    stride: usize,
    /// What a product counts, by head.
    factors: [f32; G],
    /// Its share of what is asked for ahead, see [`ask_ahead`].
    ahead: Range<usize>,
}

/// Asks for some of the 64 equal parts of the next chunk's labels. They are spread over all of a chunk's work: asked for at once they would
/// fill the processor's miss buffers and hold up the loads of the work itself.
#[inline(always)]
fn ask_ahead<S: Simd>(simd: S, next: &[u8], parts: Range<usize>) {
    let lines = next.len() / 64;
    for line in lines * parts.start / (4 * BLOCKS)..lines * parts.end / (4 * BLOCKS) {
        simd.prefetch(next.as_ptr().wrapping_add(64 * line));
    }
}

/// Scores of `T` blocks at a time, so that each weight is loaded once for all of them; `T * G` sums fill half of the registers.
#[inline(always)]
fn add_group<S: Simd, const G: usize, const T: usize, const BITS: u32>(
    simd: S,
    heads: &Heads,
    pass: &Pass<G>,
    scores: &mut [[f32; CHUNK_TOKENS]; G],
) {
    let block_bytes = heads.labels.len() / BLOCKS;
    let planes = 8 / BITS as usize;
    let mut quads = [&heads.query.quads[..0]; G];
    for (head, quads) in quads.iter_mut().enumerate() {
        *quads = &heads.query.quads[(heads.first + head) * heads.query.quads_a_head + pass.quad..][..pass.quads];
    }
    for first in (0..BLOCKS).step_by(T) {
        let share = |blocks: usize| pass.ahead.start + pass.ahead.len() * blocks / BLOCKS;
        ask_ahead(simd, heads.next, share(first)..share(first + T));
        let mut sums = [[simd.words(0); G]; T];
        for vector in 0..pass.quads / planes {
            let at = first * block_bytes + pass.offset + vector * pass.stride;
            let vectors = &heads.labels[at..at + (T - 1) * block_bytes + 64];
            let mut codes = [simd.words(0); T];
            for (block, codes) in codes.iter_mut().enumerate() {
                // SAFETY: `vectors` ends 64 bytes after the beginning of the last block's vector.
                *codes = unsafe { simd.load_words(vectors.as_ptr().add(block * block_bytes)) };
            }
            plane::<S, G, T, BITS, 0>(simd, &mut sums, &codes, &quads, vector * planes);
            if BITS == 4 {
                plane::<S, G, T, BITS, 4>(simd, &mut sums, &codes, &quads, vector * planes + 1);
            }
            if BITS == 2 {
                plane::<S, G, T, BITS, 2>(simd, &mut sums, &codes, &quads, vector * planes + 1);
                plane::<S, G, T, BITS, 4>(simd, &mut sums, &codes, &quads, vector * planes + 2);
                plane::<S, G, T, BITS, 6>(simd, &mut sums, &codes, &quads, vector * planes + 3);
            }
        }
        if BITS == 2 && !pass.quads.is_multiple_of(planes) {
            let quad = pass.quads / planes * planes;
            let mut codes = [simd.words(0); T];
            for (block, codes) in codes.iter_mut().enumerate() {
                *codes = half_vector(simd, &heads.labels[(first + block) * block_bytes + pass.offset + quad * 16..][..32]);
            }
            plane::<S, G, T, BITS, 0>(simd, &mut sums, &codes, &quads, quad);
            plane::<S, G, T, BITS, 2>(simd, &mut sums, &codes, &quads, quad + 1);
        }
        for (block, sums) in sums.into_iter().enumerate() {
            for (head, sum) in sums.into_iter().enumerate() {
                let to = scores[head].as_chunks_mut::<16>().0[first + block].as_mut_ptr();
                // SAFETY: 16 elements from `to` on.
                unsafe { simd.store(to, simd.mul_add(simd.to_floats(sum), simd.splat(pass.factors[head]), simd.load(to))) };
            }
        }
    }
}

/// Adds the products of one plane of `BITS`-bit codes, `SHIFT` bits up, with quad `quad` of each head.
#[inline(always)]
fn plane<S: Simd, const G: usize, const T: usize, const BITS: u32, const SHIFT: u32>(
    simd: S,
    sums: &mut [[S::Words; G]; T],
    codes: &[S::Words; T],
    quads: &[&[u32]; G],
    quad: usize,
) {
    let mask = simd.words(0x0101_0101 * ((1u32 << BITS) - 1));
    let mut weights = [0; G];
    for (weight, quads) in weights.iter_mut().zip(quads) {
        *weight = quads[quad];
    }
    for (sums, &codes) in sums.iter_mut().zip(codes) {
        let shifted = if SHIFT == 0 { codes } else { simd.shr::<SHIFT>(codes) };
        let codes = if BITS == 8 { shifted } else { simd.and(shifted, mask) };
        for (sum, weight) in sums.iter_mut().zip(weights) {
            *sum = simd.dot::<BITS>(*sum, codes, weight);
        }
    }
}

/// The last 32 bytes of a 2-bit group whose channels do not fill a vector: nibbles of 16-bit words spread to bytes of 32-bit words.
#[inline(always)]
fn half_vector<S: Simd>(simd: S, tail: &[u8]) -> S::Words {
    assert_eq!(tail.len(), 32);
    // SAFETY: the tail has 16 u16, and loads need no alignment.
    let words = unsafe { simd.load_u16(tail.as_ptr().cast()) };
    let bytes = simd.and(simd.or(words, simd.shl::<8>(words)), simd.words(0x00FF_00FF));
    simd.and(simd.or(bytes, simd.shl::<4>(bytes)), simd.words(0x0F0F_0F0F))
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
                    *sum = simd.mul_add(simd.floats_of(simd.shl::<KEY_SHIFT>(weight)), factor, *sum);
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
