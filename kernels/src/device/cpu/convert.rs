//! f32 to narrower elements.

use half::f16;

use super::simd::{Simd, Task};
use crate::rows::e4m3;

/// Rounds to little-endian binary16.
pub(super) struct ToF16<'a> {
    pub(super) from: &'a [f32],
    /// Two bytes an element.
    pub(super) to: &'a mut [u8],
}

impl Task for ToF16<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        assert_eq!(self.to.len(), 2 * self.from.len());
        let (vectors, tail) = self.from.as_chunks::<16>();
        let (to_vectors, to_tail) = self.to.split_at_mut(vectors.len() * 32);
        for (from, to) in vectors.iter().zip(to_vectors.as_chunks_mut::<32>().0) {
            // SAFETY: 16 elements.
            let halves = simd.to_f16(unsafe { simd.load(from.as_ptr()) });
            for (to, half) in to.as_chunks_mut::<2>().0.iter_mut().zip(halves) {
                *to = half.to_le_bytes();
            }
        }
        for (from, to) in tail.iter().zip(to_tail.as_chunks_mut::<2>().0) {
            *to = f16::from_f32(*from).to_le_bytes();
        }
    }
}

/// Converts to e4m3 at one scale.
pub(super) struct ToE4m3<'a> {
    pub(super) from: &'a [f32],
    pub(super) scale: f32,
    /// One byte an element.
    pub(super) to: &'a mut [u8],
}

impl Task for ToE4m3<'_> {
    type Output = ();

    /// Plain code without branches, which the compiler vectorises for the instruction set.
    #[inline(always)]
    fn run<S: Simd>(self, _simd: S) {
        assert_eq!(self.to.len(), self.from.len());
        for (to, &from) in self.to.iter_mut().zip(self.from) {
            *to = e4m3::code_of(from, self.scale);
        }
    }
}
