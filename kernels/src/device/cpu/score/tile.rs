//! Scores of some blocks by some heads: integer dot products of packed codes with weights of 8 bits, times a factor a group.

use super::{BLOCK_TOKENS, LaneQuery};
use crate::device::cpu::simd::Simd;
use crate::label::LabelPlan;

/// Some heads of a lane, from `first` on.
pub(super) struct Heads<'a> {
    pub(super) plan: &'a LabelPlan,
    pub(super) query: &'a LaneQuery,
    pub(super) first: usize,
}

/// `T` blocks of 16 rows of one lane, and as many that will be wanted soon: what lies at the same place in these is asked for, vector by
/// vector. Asked for in a burst they would fill the processor's miss buffers and hold up the loads of the work itself.
pub(super) struct Tile<'a, const T: usize> {
    pub(super) blocks: [&'a [u8]; T],
    pub(super) next: [&'a [u8]; T],
}

impl<'a, const T: usize> Tile<'a, T> {
    /// Blocks that lie one after the other.
    #[inline(always)]
    pub(super) fn of_neighbours(blocks: &'a [u8], next: &'a [u8]) -> Self {
        let bytes = blocks.len() / T;
        Self {
            blocks: std::array::from_fn(|block| &blocks[block * bytes..(block + 1) * bytes]),
            next: std::array::from_fn(|block| &next[block * bytes..(block + 1) * bytes]),
        }
    }

    /// The 64 bytes from `at` on of every block.
    #[inline(always)]
    fn vectors<S: Simd>(&self, simd: S, at: usize) -> [S::Words; T] {
        let mut vectors = [simd.words(0); T];
        for block in 0..T {
            let bytes = &self.blocks[block][at..at + 64];
            // SAFETY: 64 bytes.
            vectors[block] = unsafe { simd.load_words(bytes.as_ptr()) };
            simd.prefetch(self.next[block].as_ptr().wrapping_add(at));
        }
        vectors
    }
}

/// Adds the scores of `16 * T` rows by `G` heads, in steps: group after group. `T * G` sums fill half of the registers.
#[inline(always)]
pub(super) fn add_scores<S: Simd, const G: usize, const T: usize>(
    simd: S,
    heads: &Heads,
    tile: &Tile<T>,
    scores: &mut [[S::Floats; G]; T],
) {
    let (mut offset, mut quad) = (0, 0);
    for (index, group) in heads.plan.groups().iter().enumerate() {
        let channels = usize::from(group.channels);
        let mut factors = [0.0; G];
        factors.copy_from_slice(&heads.query.factors[index * heads.query.heads + heads.first..][..G]);
        let pass = Pass { offset, quad, quads: channels / 4, stride: 64, factors };
        match group.bits {
            2 => add_group::<S, G, T, 2>(simd, heads, &pass, tile, scores),
            4 => add_group::<S, G, T, 4>(simd, heads, &pass, tile, scores),
            8 => add_group::<S, G, T, 8>(simd, heads, &pass, tile, scores),
            _ => {
                // Low bytes, then high bytes, which count 256 times as much.
                add_group::<S, G, T, 8>(simd, heads, &Pass { stride: 128, ..pass }, tile, scores);
                let high = Pass { offset: offset + 64, stride: 128, factors: factors.map(|factor| factor * 256.0), ..pass };
                add_group::<S, G, T, 8>(simd, heads, &high, tile, scores);
            }
        }
        offset += BLOCK_TOKENS * channels * usize::from(group.bits) / 8;
        quad += channels / 4;
    }
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
}

#[inline(always)]
fn add_group<S: Simd, const G: usize, const T: usize, const BITS: u32>(
    simd: S,
    heads: &Heads,
    pass: &Pass<G>,
    tile: &Tile<T>,
    scores: &mut [[S::Floats; G]; T],
) {
    let planes = 8 / BITS as usize;
    let weights = |quad: usize| -> [u32; G] {
        let mut weights = [0; G];
        weights.copy_from_slice(&heads.query.quads[(pass.quad + quad) * heads.query.heads + heads.first..][..G]);
        weights
    };
    let mut sums = [[simd.words(0); G]; T];
    for vector in 0..pass.quads / planes {
        let codes = tile.vectors(simd, pass.offset + vector * pass.stride);
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
        let codes = tile.blocks.map(|block| half_vector(simd, &block[pass.offset + quad * 16..][..32]));
        plane::<S, G, T, BITS, 0>(simd, &mut sums, &codes, weights(quad));
        plane::<S, G, T, BITS, 2>(simd, &mut sums, &codes, weights(quad + 1));
    }
    for (scores, sums) in scores.iter_mut().zip(sums) {
        for ((score, sum), factor) in scores.iter_mut().zip(sums).zip(pass.factors) {
            *score = simd.mul_add(simd.to_floats(sum), simd.splat(factor), *score);
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
