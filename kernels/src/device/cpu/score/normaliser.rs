//! A head's normaliser: the log-sum-exp of a sample of its scores, by the definition in [`ScoreJob`].
//!
//! The sample is cut in pieces of fixed length, each summed by itself and put together in order, so that sums do not depend on threads.

use super::raw::{Heads, Labels, raw_scores};
use super::{BLOCKS, LaneQuery, STEPS, ScoreRoom};
use crate::device::ScoreJob;
use crate::device::cpu::simd::{Simd, Task, exp2_coarse};
use crate::label::packing::BLOCK_TOKENS;

/// Blocks of a piece: as many as a chunk has.
pub(in crate::device::cpu) const SAMPLE_PIECE: usize = BLOCKS;

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
    pub(in crate::device::cpu) room: &'a mut ScoreRoom,
    /// `[head]`: maximum in log2, and sum of `2^(score - maximum)`.
    pub(in crate::device::cpu) totals: &'a mut [(f32, f32)],
}

impl Task for SamplePiece<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(mut self, simd: S) {
        assert_eq!(self.totals.len(), self.query.heads);
        let weights = self.collect(simd);
        let mut first = 0;
        while first < self.query.heads {
            let heads = Heads { plan: &self.job.coder.plan, query: self.query, first };
            let totals = &mut self.totals[first..];
            first += match totals.len() {
                4.. => sum_heads::<S, 4, 4>(simd, &heads, self.room, &weights, totals),
                2.. => sum_heads::<S, 2, 8>(simd, &heads, self.room, &weights, totals),
                _ => sum_heads::<S, 1, 16>(simd, &heads, self.room, &weights, totals),
            };
        }
    }
}

impl SamplePiece<'_> {
    /// Puts the piece's labels together and asks for the next piece's; returns the blocks' weights. What lies beyond the sample's end counts
    /// nothing.
    #[inline(always)]
    fn collect<S: Simd>(&mut self, simd: S) -> [f32; BLOCKS] {
        let bytes = BLOCK_TOKENS * self.job.coder.plan.label_bytes();
        let block = |sampled: &Sampled| &self.job.labels[sampled.chunk][(self.lane * BLOCKS + sampled.block) * bytes..][..bytes];
        self.room.labels.resize(BLOCKS * bytes, 0);
        let mut weights = [f32::MIN / 4.0; BLOCKS];
        let rest = &self.sample[self.piece * SAMPLE_PIECE..];
        for ((sampled, to), weight) in rest.iter().zip(self.room.labels.chunks_exact_mut(bytes)).zip(&mut weights) {
            to.copy_from_slice(block(sampled));
            *weight = sampled.weight;
        }
        for sampled in rest.iter().skip(SAMPLE_PIECE).take(SAMPLE_PIECE) {
            let next = block(sampled);
            for line in (0..bytes).step_by(64) {
                simd.prefetch(next.as_ptr().wrapping_add(line));
            }
        }
        weights
    }
}

/// Maxima and sums of `G` heads, whose number it returns.
#[inline(always)]
fn sum_heads<S: Simd, const G: usize, const T: usize>(
    simd: S,
    heads: &Heads,
    room: &mut ScoreRoom,
    weights: &[f32; BLOCKS],
    totals: &mut [(f32, f32)],
) -> usize {
    let labels = std::mem::take(&mut room.labels);
    raw_scores::<S, G, T>(simd, heads, Labels { these: &labels, next: &labels }, [0.0; G], room.scores());
    room.labels = labels;
    // SAFETY: 16 elements.
    let load = |head: usize, block: usize| unsafe { simd.load(room.scores[head].as_chunks::<16>().0[block].as_ptr()) };
    // Heads side by side: the chains of one head's maximum and sum alone would leave the processor waiting.
    let mut maxima = [simd.splat(f32::MIN); G];
    for (block, &weight) in weights.iter().enumerate() {
        for (head, largest) in maxima.iter_mut().enumerate() {
            *largest = simd.max(*largest, simd.add(load(head, block), simd.splat(weight)));
        }
    }
    let largest = maxima.map(|largest| simd.largest(largest));
    let mut sums = [simd.splat(0.0); G];
    for (block, &weight) in weights.iter().enumerate() {
        for (head, sum) in sums.iter_mut().enumerate() {
            let above = simd.add(load(head, block), simd.splat(weight - largest[head]));
            *sum = simd.add(*sum, exp2_coarse(simd, simd.mul(above, simd.splat(1.0 / STEPS))));
        }
    }
    for head in 0..G {
        totals[head] = (largest[head] / STEPS, simd.sum(sums[head]));
    }
    G
}
