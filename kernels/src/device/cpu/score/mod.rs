//! Importance keys: the sample first, which gives every head's normaliser, then one pass over all labels that writes keys.

mod normaliser;
mod tile;

use self::tile::{Heads, Tile, add_scores};
use super::simd::{Simd, Task, exp2_linear};
use crate::device::ScoreJob;
use crate::label::packing::BLOCK_TOKENS;
use crate::label::{HeadWeights, LabelPlan};
use crate::select::{KEY_SHIFT, LARGEST_KEYED, SMALLEST_KEYED};
use crate::slot::CHUNK_TOKENS;

pub(super) use self::normaliser::{SAMPLE_PIECE, SamplePiece, Sampled, sampled_blocks};

const BLOCKS: usize = CHUNK_TOKENS / BLOCK_TOKENS;

/// Scores are counted in steps of 2^-23 of a power of two, so that an f32's bits are its exponential's logarithm and nothing is multiplied again.
const STEPS: f32 = (1 << 23) as f32;

/// The query heads of one lane, ready to meet labels.
#[derive(Default)]
pub(super) struct LaneQuery {
    /// `[quad][head]`: four signed bytes each.
    quads: Vec<u32>,
    /// `[group][head]`: unit times softmax scale, in steps.
    factors: Vec<f32>,
    /// `[head]`: what is added to a score in steps, so that it becomes the bits of its linear exponential.
    biases: Vec<f32>,
    heads: usize,
    one: HeadWeights,
}

impl LaneQuery {
    /// Prepares the heads of `lane`, all but their normalisers.
    pub(super) fn set(&mut self, job: &ScoreJob, lane: usize) {
        let (plan, dim) = (&job.coder.plan, job.geometry.head_dim);
        self.heads = job.geometry.heads.group();
        self.quads.resize(plan.channels() / 4 * self.heads, 0);
        self.factors.resize(plan.groups().len() * self.heads, 0.0);
        let scale = job.geometry.softmax_scale * std::f32::consts::LOG2_E * STEPS;
        for (index, head) in job.geometry.heads.heads_of(lane).enumerate() {
            self.one.set(plan, &job.coder.lanes[lane], &job.query[head * dim..(head + 1) * dim]);
            let (quads, _) = self.one.weights.as_chunks::<4>();
            for (to, quad) in self.quads.iter_mut().skip(index).step_by(self.heads).zip(quads) {
                *to = u32::from_le_bytes(quad.map(|weight| weight as u8));
            }
            for (to, unit) in self.factors.iter_mut().skip(index).step_by(self.heads).zip(&self.one.units) {
                *to = unit * scale;
            }
        }
    }

    /// Sets the normalisers from what the sample's pieces left, `[piece][head]`: maximum in log2, and sum of `2^(score - maximum)`.
    pub(super) fn normalise(&mut self, pieces: &[(f32, f32)]) {
        self.biases.clear();
        for head in 0..self.heads {
            let pieces = || pieces.iter().skip(head).step_by(self.heads).map(|&(largest, sum)| (f64::from(largest), f64::from(sum)));
            let largest = pieces().fold(f64::NEG_INFINITY, |all, (largest, _)| all.max(largest));
            let sum: f64 = pieces().map(|(own, sum)| sum * (own - largest).exp2()).sum();
            self.biases.push(((127.0 - (largest + sum.log2())) * f64::from(STEPS)) as f32);
        }
    }
}

/// Importance keys of one chunk of one lane.
pub(super) struct KeysOfChunk<'a> {
    pub(super) plan: &'a LabelPlan,
    pub(super) query: &'a LaneQuery,
    /// The lane's `256 x label_bytes`.
    pub(super) labels: &'a [u8],
    /// The lane's labels in the next chunk, asked for ahead; in the last one its own again.
    pub(super) next: &'a [u8],
    /// `[row]`.
    pub(super) keys: &'a mut [u16],
}

/// Keeps vectors from lying across cache lines.
#[repr(align(64))]
struct Aligned<T>(T);

impl Task for KeysOfChunk<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        assert!(self.labels.len() == CHUNK_TOKENS * self.plan.label_bytes() && self.next.len() == self.labels.len());
        assert_eq!(self.keys.len(), CHUNK_TOKENS);
        let mut sums = Aligned([0.0; CHUNK_TOKENS]);
        let mut first = 0;
        while first < self.query.heads {
            let heads = Heads { plan: self.plan, query: self.query, first };
            first += match self.query.heads - first {
                4.. => self.add_heads::<S, 4, 4>(simd, &heads, &mut sums.0),
                2.. => self.add_heads::<S, 2, 8>(simd, &heads, &mut sums.0),
                _ => self.add_heads::<S, 1, 16>(simd, &heads, &mut sums.0),
            };
        }
        let (smallest, largest) = (simd.splat(SMALLEST_KEYED), simd.splat(LARGEST_KEYED));
        let base = simd.words(SMALLEST_KEYED.to_bits().wrapping_neg());
        for (sums, keys) in sums.0.as_chunks::<16>().0.iter().zip(self.keys.as_chunks_mut::<16>().0) {
            // SAFETY: 16 elements each.
            unsafe {
                let sum = simd.min(simd.max(simd.load(sums.as_ptr()), smallest), largest);
                simd.store_u16(keys.as_mut_ptr(), simd.shr::<KEY_SHIFT>(simd.add_words(simd.bits(sum), base)));
            }
        }
    }
}

impl KeysOfChunk<'_> {
    /// Adds the exponentials of `G` heads, whose number it returns, `T` blocks at a time.
    #[inline(always)]
    fn add_heads<S: Simd, const G: usize, const T: usize>(&self, simd: S, heads: &Heads, sums: &mut [f32; CHUNK_TOKENS]) -> usize {
        let block_bytes = self.labels.len() / BLOCKS;
        let mut biases = [0.0; G];
        biases.copy_from_slice(&self.query.biases[heads.first..heads.first + G]);
        for first in (0..BLOCKS).step_by(T) {
            let part = first * block_bytes..(first + T) * block_bytes;
            let tile = Tile::<T>::of_neighbours(&self.labels[part.clone()], &self.next[part]);
            let mut scores = [biases.map(|bias| simd.splat(bias)); T];
            add_scores::<S, G, T>(simd, heads, &tile, &mut scores);
            for (scores, sums) in scores.into_iter().zip(&mut sums.as_chunks_mut::<16>().0[first..first + T]) {
                // SAFETY: 16 elements.
                let mut sum = unsafe { simd.load(sums.as_ptr()) };
                for score in scores {
                    sum = simd.add(sum, exp2_linear(simd, score));
                }
                // SAFETY: as above.
                unsafe { simd.store(sums.as_mut_ptr(), sum) };
            }
        }
        G
    }
}
