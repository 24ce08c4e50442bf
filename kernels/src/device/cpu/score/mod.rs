//! Importance keys: the sample first, which gives every head's normaliser, then one pass over all labels that writes keys.

mod normaliser;
mod raw;

use self::raw::{Heads, Labels, raw_scores};
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
    pub(super) room: &'a mut ScoreRoom,
    /// `[row]`.
    pub(super) keys: &'a mut [u16],
}

/// Working room of a thread; aligned so that no vector lies across cache lines.
#[repr(align(64))]
pub(super) struct ScoreRoom {
    /// `[head of a few][row]`.
    scores: [[f32; CHUNK_TOKENS]; 4],
    /// `[row]`.
    sums: [f32; CHUNK_TOKENS],
    /// Labels of a piece of the sample, one block after the other.
    labels: Vec<u8>,
}

impl Default for ScoreRoom {
    fn default() -> Self {
        Self { scores: [[0.0; CHUNK_TOKENS]; 4], sums: [0.0; CHUNK_TOKENS], labels: Vec::new() }
    }
}

impl ScoreRoom {
    /// Room for the scores of `G` heads, at most 4.
    #[inline(always)]
    fn scores<const G: usize>(&mut self) -> &mut [[f32; CHUNK_TOKENS]; G] {
        self.scores.first_chunk_mut().expect("at most 4 heads at a time")
    }
}

impl Task for KeysOfChunk<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(mut self, simd: S) {
        let mut first = 0;
        while first < self.query.heads {
            let heads = Heads { plan: self.plan, query: self.query, first };
            first += match self.query.heads - first {
                4.. => self.add_heads::<S, 4, 4>(simd, &heads),
                2.. => self.add_heads::<S, 2, 8>(simd, &heads),
                _ => self.add_heads::<S, 1, 16>(simd, &heads),
            };
        }
        let (smallest, largest) = (simd.splat(SMALLEST_KEYED), simd.splat(LARGEST_KEYED));
        let base = simd.words(SMALLEST_KEYED.to_bits().wrapping_neg());
        assert_eq!(self.keys.len(), CHUNK_TOKENS);
        for (sums, keys) in self.room.sums.as_chunks::<16>().0.iter().zip(self.keys.as_chunks_mut::<16>().0) {
            // SAFETY: 16 elements each.
            unsafe {
                let sum = simd.min(simd.max(simd.load(sums.as_ptr()), smallest), largest);
                simd.store_u16(keys.as_mut_ptr(), simd.shr::<KEY_SHIFT>(simd.add_words(simd.bits(sum), base)));
            }
        }
    }
}

impl KeysOfChunk<'_> {
    /// Adds the exponentials of `G` heads, whose number it returns; those of the first heads begin the sums.
    #[inline(always)]
    fn add_heads<S: Simd, const G: usize, const T: usize>(&mut self, simd: S, heads: &Heads) -> usize {
        let mut biases = [0.0; G];
        biases.copy_from_slice(&self.query.biases[heads.first..heads.first + G]);
        // Labels of the next chunk are asked for once, with the first heads.
        let next = if heads.first == 0 { self.next } else { self.labels };
        raw_scores::<S, G, T>(simd, heads, Labels { these: self.labels, next }, biases, self.room.scores());
        for block in 0..BLOCKS {
            let sums = self.room.sums.as_chunks_mut::<16>().0[block].as_mut_ptr();
            // SAFETY: 16 elements.
            let mut sum = if heads.first == 0 { simd.splat(0.0) } else { unsafe { simd.load(sums) } };
            for scores in &self.room.scores[..G] {
                // SAFETY: 16 elements.
                sum = simd.add(sum, exp2_linear(simd, unsafe { simd.load(scores.as_chunks::<16>().0[block].as_ptr()) }));
            }
            // SAFETY: as above.
            unsafe { simd.store(sums, sum) };
        }
        G
    }
}
