//! A head's normaliser: the log-sum-exp of a sample of its scores, by the definition in [`ScoreJob`].
//!
//! The sample is cut in pieces of fixed length, each summed by itself and put together in order, so that sums do not depend on threads.

use std::ops::Range;

use super::tile::{Heads, Tile, add_scores};
use super::{BLOCKS, LaneQuery, STEPS};
use crate::device::ScoreJob;
use crate::device::cpu::simd::{Simd, Task, exp2_coarse};

/// Blocks of a piece: a multiple of every tile.
pub(in crate::device::cpu) const SAMPLE_PIECE: usize = 64;

/// One block of 16 rows of the sample.
pub(in crate::device::cpu) struct Sampled {
    chunk: usize,
    block: usize,
    /// Logarithm of its weight, in steps.
    weight: f32,
}

/// The sample of `chunks` chunks.
pub(in crate::device::cpu) fn sampled_blocks(chunks: usize, sample: &mut Vec<Sampled>) {
    const LEAST_CHUNKS: usize = 64;
    sample.clear();
    let stride = chunks.div_ceil(LEAST_CHUNKS).next_power_of_two().min(BLOCKS);
    for chunk in 0..chunks {
        let whole = chunk == 0 || chunk + 1 == chunks;
        let (first, stride) = if whole { (0, 1) } else { (5 * chunk % stride, stride) };
        let weight = stride.ilog2() as f32 * STEPS;
        sample.extend((first..BLOCKS).step_by(stride).map(|block| Sampled { chunk, block, weight }));
    }
}

/// One piece of the sample of one lane.
pub(in crate::device::cpu) struct SamplePiece<'a> {
    pub(in crate::device::cpu) job: &'a ScoreJob<'a>,
    pub(in crate::device::cpu) lane: usize,
    pub(in crate::device::cpu) query: &'a LaneQuery,
    pub(in crate::device::cpu) sample: &'a [Sampled],
    pub(in crate::device::cpu) piece: usize,
    /// `[head]`: maximum in log2, and sum of `2^(score - maximum)`.
    pub(in crate::device::cpu) totals: &'a mut [(f32, f32)],
}

impl Task for SamplePiece<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        assert_eq!(self.totals.len(), self.query.heads);
        let blocks = self.piece * SAMPLE_PIECE..self.sample.len().min((self.piece + 1) * SAMPLE_PIECE);
        let mut first = 0;
        while first < self.query.heads {
            let heads = Heads { plan: &self.job.coder.plan, query: self.query, first };
            let totals = &mut self.totals[first..];
            let blocks = blocks.clone();
            first += match totals.len() {
                4.. => sum_heads::<S, 4, 4>(simd, &heads, &Place { job: self.job, lane: self.lane, sample: self.sample }, blocks, totals),
                2.. => sum_heads::<S, 2, 8>(simd, &heads, &Place { job: self.job, lane: self.lane, sample: self.sample }, blocks, totals),
                _ => sum_heads::<S, 1, 16>(simd, &heads, &Place { job: self.job, lane: self.lane, sample: self.sample }, blocks, totals),
            };
        }
    }
}

/// Where the blocks of a lane's sample are.
struct Place<'a> {
    job: &'a ScoreJob<'a>,
    lane: usize,
    sample: &'a [Sampled],
}

impl<'a> Place<'a> {
    /// The labels of a block of the sample, or of its last one.
    #[inline(always)]
    fn block(&self, index: usize) -> &'a [u8] {
        let sampled = &self.sample[index.min(self.sample.len() - 1)];
        let page = self.job.labels[sampled.chunk];
        let bytes = page.len() / (self.job.geometry.heads.lanes() * BLOCKS);
        &page[(self.lane * BLOCKS + sampled.block) * bytes..][..bytes]
    }
}

/// Sums `G` heads, whose number it returns, over the `blocks` of the sample, `T` at a time; every lane of a vector keeps its own maximum.
#[inline(always)]
fn sum_heads<S: Simd, const G: usize, const T: usize>(
    simd: S,
    heads: &Heads,
    place: &Place,
    blocks: Range<usize>,
    totals: &mut [(f32, f32)],
) -> usize {
    /// Tiles that are asked for ahead: a page of labels for every block, none of which the processor foresees.
    const AHEAD: usize = 2;
    let unit = simd.splat(1.0 / STEPS);
    let (mut maxima, mut sums) = ([simd.splat(f32::MIN); G], [simd.splat(0.0); G]);
    for first in blocks.clone().step_by(T) {
        let tile = Tile::<T> {
            blocks: std::array::from_fn(|block| place.block(first + block)),
            next: std::array::from_fn(|block| place.block(first + AHEAD * T + block)),
        };
        // What lies beyond the end counts nothing.
        let weight = |index: usize| if index < blocks.end { place.sample[index].weight } else { f32::MIN / 4.0 };
        let mut scores: [[S::Floats; G]; T] = std::array::from_fn(|block| [simd.splat(weight(first + block)); G]);
        add_scores::<S, G, T>(simd, heads, &tile, &mut scores);
        for head in 0..G {
            let mut largest = maxima[head];
            for scores in &scores {
                largest = simd.max(largest, scores[head]);
            }
            sums[head] = simd.mul(sums[head], exp2_coarse(simd, simd.mul(simd.sub(maxima[head], largest), unit)));
            for scores in &scores {
                sums[head] = simd.add(sums[head], exp2_coarse(simd, simd.mul(simd.sub(scores[head], largest), unit)));
            }
            maxima[head] = largest;
        }
    }
    for head in 0..G {
        let largest = simd.largest(maxima[head]);
        let powers = exp2_coarse(simd, simd.mul(simd.sub(maxima[head], simd.splat(largest)), unit));
        totals[head] = (largest / STEPS, simd.sum(simd.mul(sums[head], powers)));
    }
    G
}
