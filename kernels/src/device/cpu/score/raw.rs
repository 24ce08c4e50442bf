//! Scores of 256 rows by some heads: integer dot products of packed codes with weights of 8 bits, times a factor a group.

use super::{BLOCKS, LaneQuery};
use crate::device::cpu::simd::{Simd, Task};
use crate::label::LabelPlan;
use crate::label::packing::BLOCK_TOKENS;
use crate::slot::CHUNK_TOKENS;

/// Some heads of a lane, from `first` on.
pub(super) struct Heads<'a> {
    pub(super) plan: &'a LabelPlan,
    pub(super) query: &'a LaneQuery,
    pub(super) first: usize,
}

/// Scores of the 256 rows of `labels` (a chunk's of one lane, or as many blocks from elsewhere) by `G` heads, in steps, each beginning at
/// its head's start; `T` blocks at a time, so that each weight is loaded once for all of them: `T * G` sums fill half of the registers.
///
/// Labels at `next` are asked for along the way, vector by vector: asked for in a burst they would fill the processor's miss buffers and
/// hold up the loads of the work itself.
#[inline(always)]
pub(super) fn raw_scores<S: Simd, const G: usize, const T: usize>(
    simd: S,
    heads: &Heads,
    labels: Labels,
    starts: [f32; G],
    scores: &mut [[f32; CHUNK_TOKENS]; G],
) {
    let (mut offset, mut quad) = (0, 0);
    for (index, group) in heads.plan.groups().iter().enumerate() {
        let channels = usize::from(group.channels);
        let mut factors = [0.0; G];
        factors.copy_from_slice(&heads.query.factors[index * heads.query.heads + heads.first..][..G]);
        let starts = (index == 0).then_some(starts);
        let pass = Pass { offset, quad, quads: channels / 4, stride: 64, factors, starts };
        match group.bits {
            2 => simd.enter(Group::<G, T, 2> { heads, pass, labels, scores }),
            4 => simd.enter(Group::<G, T, 4> { heads, pass, labels, scores }),
            8 => simd.enter(Group::<G, T, 8> { heads, pass, labels, scores }),
            _ => {
                // Low bytes, then high bytes, which count 256 times as much.
                simd.enter(Group::<G, T, 8> { heads, pass: Pass { stride: 128, ..pass }, labels, scores });
                let factors = factors.map(|factor| factor * 256.0);
                let high = Pass { offset: offset + 64, stride: 128, factors, starts: None, ..pass };
                simd.enter(Group::<G, T, 8> { heads, pass: high, labels, scores });
            }
        }
        offset += BLOCK_TOKENS * channels * usize::from(group.bits) / 8;
        quad += channels / 4;
    }
}

/// Labels of 256 rows, and those that will be wanted next.
#[derive(Clone, Copy)]
pub(super) struct Labels<'a> {
    pub(super) these: &'a [u8],
    pub(super) next: &'a [u8],
}

/// One group of channels, or one byte plane of it.
#[derive(Clone, Copy)]
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
    /// Where scores begin; without it they are added to.
    starts: Option<[f32; G]>,
}

/// A pass over the group's labels of 256 rows. It is a task of its own because the compiler mixes up the passes of all widths otherwise.
struct Group<'a, const G: usize, const T: usize, const BITS: u32> {
    heads: &'a Heads<'a>,
    pass: Pass<G>,
    labels: Labels<'a>,
    scores: &'a mut [[f32; CHUNK_TOKENS]; G],
}

impl<const G: usize, const T: usize, const BITS: u32> Task for Group<'_, G, T, BITS> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let Self { heads, pass, labels, scores } = self;
        let block_bytes = labels.these.len() / BLOCKS;
        let planes = 8 / BITS as usize;
        let all_weights = &heads.query.quads[pass.quad * heads.query.heads + heads.first..];
        let weights = |quad: usize| -> [u32; G] {
            let mut weights = [0; G];
            weights.copy_from_slice(&all_weights[quad * heads.query.heads..][..G]);
            weights
        };
        for first in (0..BLOCKS).step_by(T) {
            let mut sums = [[simd.words(0); G]; T];
            for vector in 0..pass.quads / planes {
                let at = first * block_bytes + pass.offset + vector * pass.stride;
                let vectors = &labels.these[at..at + (T - 1) * block_bytes + 64];
                let mut codes = [simd.words(0); T];
                for (block, codes) in codes.iter_mut().enumerate() {
                    // SAFETY: `vectors` ends 64 bytes after the beginning of the last block's vector.
                    *codes = unsafe { simd.load_words(vectors.as_ptr().add(block * block_bytes)) };
                    simd.prefetch(labels.next.as_ptr().wrapping_add(at + block * block_bytes));
                }
                plane::<S, G, T, BITS, 0>(simd, &mut sums, &codes, weights(vector * planes));
                if BITS == 4 {
                    plane::<S, G, T, BITS, 4>(simd, &mut sums, &codes, weights(vector * planes + 1));
                }
                if BITS == 2 {
                    plane::<S, G, T, BITS, 2>(simd, &mut sums, &codes, weights(vector * planes + 1));
                    plane::<S, G, T, BITS, 4>(simd, &mut sums, &codes, weights(vector * planes + 2));
                    plane::<S, G, T, BITS, 6>(simd, &mut sums, &codes, weights(vector * planes + 3));
                }
            }
            if BITS == 2 && !pass.quads.is_multiple_of(planes) {
                let quad = pass.quads / planes * planes;
                let mut codes = [simd.words(0); T];
                for (block, codes) in codes.iter_mut().enumerate() {
                    *codes = half_vector(simd, &labels.these[(first + block) * block_bytes + pass.offset + quad * 16..][..32]);
                }
                plane::<S, G, T, BITS, 0>(simd, &mut sums, &codes, weights(quad));
                plane::<S, G, T, BITS, 2>(simd, &mut sums, &codes, weights(quad + 1));
            }
            for (block, sums) in sums.into_iter().enumerate() {
                for (head, sum) in sums.into_iter().enumerate() {
                    let to = scores[head].as_chunks_mut::<16>().0[first + block].as_mut_ptr();
                    // SAFETY: 16 elements from `to` on.
                    unsafe {
                        let before = match pass.starts {
                            Some(starts) => simd.splat(starts[head]),
                            None => simd.load(to),
                        };
                        simd.store(to, simd.mul_add(simd.to_floats(sum), simd.splat(pass.factors[head]), before));
                    }
                }
            }
        }
    }
}

/// Adds the products of one plane of `BITS`-bit codes, `SHIFT` bits up, with one quad of each head.
#[inline(always)]
fn plane<S: Simd, const G: usize, const T: usize, const BITS: u32, const SHIFT: u32>(
    simd: S,
    sums: &mut [[S::Words; G]; T],
    codes: &[S::Words; T],
    weights: [u32; G],
) {
    let mask = simd.words(0x0101_0101 * ((1u32 << BITS) - 1));
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
