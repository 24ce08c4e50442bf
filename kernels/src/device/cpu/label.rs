//! The quantiser and the packing of labels, sixteen tokens at a time.

use std::marker::PhantomData;

use super::element::Element;
use super::simd::{Simd, Task};
use crate::device::LabelJob;
use crate::label::packing::BLOCK_TOKENS;
use crate::slot::CHUNK_TOKENS;

/// All labels of one lane of a page.
pub(super) struct LabelLane<'a, E> {
    pub(super) job: &'a LabelJob<'a>,
    pub(super) lane: usize,
    /// The lane's `256 x label_bytes`.
    pub(super) out: &'a mut [u8],
    pub(super) element: PhantomData<E>,
}

/// Largest head_dim.
const MAX_DIM: usize = 256;

impl<E: Element> Task for LabelLane<'_, E> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let (geometry, plan) = (self.job.geometry, &self.job.coder.plan);
        let (dim, row_bytes, block_bytes) = (geometry.head_dim, geometry.row_bytes(), BLOCK_TOKENS * plan.label_bytes());
        assert!(dim <= MAX_DIM && self.out.len() == CHUNK_TOKENS * plan.label_bytes());
        let rows = &self.job.page[self.lane * CHUNK_TOKENS * row_bytes..(self.lane + 1) * CHUNK_TOKENS * row_bytes];
        // The product of the loaded element with the first factor is exact, so that the key is rounded once, as its definition has it.
        let (factor, scale) = (simd.splat(E::FACTOR), simd.splat(geometry.scales.of(self.lane).key));
        let mut keys = [[0.0f32; MAX_DIM]; BLOCK_TOKENS];
        let mut codes = [[0u32; BLOCK_TOKENS]; MAX_DIM];
        for (rows, out) in rows.chunks_exact(BLOCK_TOKENS * row_bytes).zip(self.out.chunks_exact_mut(block_bytes)) {
            for (row, key) in rows.chunks_exact(row_bytes).zip(&mut keys) {
                for channel in (0..dim).step_by(16) {
                    // SAFETY: a row has `2 * dim` elements, and `dim`, a multiple of 16, is at most MAX_DIM.
                    unsafe {
                        let loaded = E::load(simd, row.as_ptr().add(channel * E::BYTES));
                        simd.store(key.as_mut_ptr().add(channel), simd.mul(simd.mul(loaded, factor), scale));
                    }
                }
            }
            quantise(simd, self.job, self.lane, &keys, &mut codes);
            pack_block(simd, self.job, &codes, out);
        }
    }
}

/// `[kept channel][token]` codes.
#[inline(always)]
fn quantise<S: Simd>(
    simd: S,
    job: &LabelJob,
    lane: usize,
    keys: &[[f32; MAX_DIM]; BLOCK_TOKENS],
    codes: &mut [[u32; BLOCK_TOKENS]; MAX_DIM],
) {
    let coder = &job.coder.lanes[lane];
    let mut kept = 0;
    for group in job.coder.plan.groups() {
        let top = simd.splat(((1u32 << group.bits) - 1) as f32);
        for _ in 0..group.channels {
            let channel = usize::from(coder.channels[kept]);
            let values: [f32; BLOCK_TOKENS] = std::array::from_fn(|token| keys[token][channel]);
            // SAFETY: `values` and a row of `codes` have 16 elements.
            unsafe {
                let offset = simd.sub(simd.load(values.as_ptr()), simd.splat(coder.low[kept]));
                let scaled = simd.mul(offset, simd.splat(1.0 / coder.step[kept]));
                let code = simd.floor(simd.add(scaled, simd.splat(0.5)));
                let code = simd.min(simd.max(code, simd.splat(0.0)), top);
                simd.store_words(codes[kept].as_mut_ptr().cast(), simd.to_words(code));
            }
            kept += 1;
        }
    }
}

/// Packs the codes of a block's 16 tokens, group after group.
#[inline(always)]
fn pack_block<S: Simd>(simd: S, job: &LabelJob, codes: &[[u32; BLOCK_TOKENS]; MAX_DIM], out: &mut [u8]) {
    let (mut first, mut offset) = (0, 0);
    for group in job.coder.plan.groups() {
        let channels = usize::from(group.channels);
        let codes = &codes[first..first + channels];
        let bytes = BLOCK_TOKENS * channels * usize::from(group.bits) / 8;
        let out = &mut out[offset..offset + bytes];
        match group.bits {
            2 => pack_two_bits(simd, codes, out),
            4 => pack_vectors::<S, 4>(simd, codes, out),
            8 => pack_vectors::<S, 8>(simd, codes, out),
            _ => pack_sixteen_bits(simd, codes, out),
        }
        first += channels;
        offset += bytes;
    }
}

/// The words of one vector: channel n in byte `n % 4` at bit `BITS * (n / 4)`.
#[inline(always)]
fn pack_vector<S: Simd, const BITS: u32>(simd: S, codes: &[[u32; BLOCK_TOKENS]]) -> S::Words {
    let mut words = simd.words(0);
    for plane in codes.chunks_exact(4).rev() {
        // SAFETY: each channel has the codes of 16 tokens.
        let bytes: [S::Words; 4] = std::array::from_fn(|byte| unsafe { simd.load_words(plane[byte].as_ptr().cast()) });
        let shifted = match BITS {
            2 => simd.shl::<2>(words),
            4 => simd.shl::<4>(words),
            _ => words,
        };
        words = simd.or(shifted, quad(simd, bytes));
    }
    words
}

#[inline(always)]
fn pack_vectors<S: Simd, const BITS: u32>(simd: S, codes: &[[u32; BLOCK_TOKENS]], out: &mut [u8]) {
    for (codes, out) in codes.chunks_exact(32 / BITS as usize).zip(out.as_chunks_mut::<64>().0) {
        // SAFETY: `out` has 64 bytes.
        unsafe { simd.store_words(out.as_mut_ptr(), pack_vector::<S, BITS>(simd, codes)) };
    }
}

#[inline(always)]
fn pack_two_bits<S: Simd>(simd: S, codes: &[[u32; BLOCK_TOKENS]], out: &mut [u8]) {
    pack_vectors::<S, 2>(simd, codes, out);
    let rest = codes.len() % 16;
    if rest == 0 {
        return;
    }
    let nibbles = pack_vector::<S, 2>(simd, &codes[codes.len() - rest..]);
    // Four nibbles, one in each byte, move together into the low 16 bits.
    let pairs = simd.and(simd.or(nibbles, simd.shr::<4>(nibbles)), simd.words(0x00FF_00FF));
    let words = simd.or(pairs, simd.shr::<8>(pairs));
    let tail = &mut out[codes.len() / 16 * 64..];
    assert_eq!(tail.len(), 32);
    // SAFETY: the tail has 16 u16, and stores need no alignment.
    unsafe { simd.store_u16(tail.as_mut_ptr().cast(), simd.and(words, simd.words(0xFFFF))) };
}

/// Low bytes, then high bytes, of four channels at a time.
#[inline(always)]
fn pack_sixteen_bits<S: Simd>(simd: S, codes: &[[u32; BLOCK_TOKENS]], out: &mut [u8]) {
    for (codes, out) in codes.chunks_exact(4).zip(out.as_chunks_mut::<128>().0) {
        // SAFETY: each channel has the codes of 16 tokens, and `out` has 128 bytes.
        unsafe {
            let codes: [S::Words; 4] = std::array::from_fn(|channel| simd.load_words(codes[channel].as_ptr().cast()));
            let mask = simd.words(0xFF);
            let low = codes.map(|code| simd.and(code, mask));
            let high = codes.map(|code| simd.shr::<8>(code));
            simd.store_words(out.as_mut_ptr(), quad(simd, low));
            simd.store_words(out.as_mut_ptr().add(64), quad(simd, high));
        }
    }
}

/// Four bytes side by side.
#[inline(always)]
fn quad<S: Simd>(simd: S, bytes: [S::Words; 4]) -> S::Words {
    let low = simd.or(bytes[0], simd.shl::<8>(bytes[1]));
    simd.or(low, simd.or(simd.shl::<16>(bytes[2]), simd.shl::<24>(bytes[3])))
}
