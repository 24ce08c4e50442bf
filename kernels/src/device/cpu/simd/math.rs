//! Functions made of the primitive ones.

use super::Simd;

/// 2^x for x of at most 1, to about 2e-7 of its value; 0 below 2^-126. Polynomial of Cephes' exp2f.
#[inline(always)]
pub(crate) fn exp2<S: Simd>(simd: S, x: S::Floats) -> S::Floats {
    let coefficients = [1.535_336_2e-4, 1.339_887_4e-3, 9.618_437e-3, 5.550_332_5e-2, 2.402_264_8e-1, 6.931_472e-1, 1.0];
    exp2_by(simd, x, coefficients)
}

/// 2^x for x of at most 1, to 4e-6 of its value; at least 2^-127. Taylor series, and an exponent put in by integer arithmetic, which
/// costs fewer cycles than [`exp2`].
#[inline(always)]
pub(crate) fn exp2_coarse<S: Simd>(simd: S, x: S::Floats) -> S::Floats {
    // Adding this leaves the nearest whole number in the low bits of the sum.
    let magic = simd.splat(12_582_912.0);
    let x = simd.max(x, simd.splat(-126.0));
    let shifted = simd.add(x, magic);
    let part = simd.sub(x, simd.sub(shifted, magic));
    let sum = simd.mul_add(simd.splat(9.618_129e-3), part, simd.splat(5.550_411e-2));
    let sum = simd.mul_add(sum, part, simd.splat(2.402_265e-1));
    let sum = simd.mul_add(sum, part, simd.splat(6.931_472e-1));
    let sum = simd.mul_add(sum, part, simd.splat(1.0));
    simd.floats_of(simd.add_words(simd.bits(sum), simd.shl::<23>(simd.bits(shifted))))
}

/// The f32 whose bits are `steps`, clamped to [2^-126, 2^7] and cut to a whole number: 2^y as straight lines between powers of two, where
/// `steps` is 2^23 (y + 127).
#[inline(always)]
pub(crate) fn exp2_linear<S: Simd>(simd: S, steps: S::Floats) -> S::Floats {
    const LOWEST: f32 = (1 << 23) as f32;
    const HIGHEST: f32 = 134.0 * (1 << 23) as f32;
    simd.floats_of(simd.to_words(simd.min(simd.max(steps, simd.splat(LOWEST)), simd.splat(HIGHEST))))
}

/// `2^n` times a polynomial of x - n, where n is x rounded to nearest.
#[inline(always)]
fn exp2_by<S: Simd, const N: usize>(simd: S, x: S::Floats, coefficients: [f32; N]) -> S::Floats {
    let x = simd.max(x, simd.splat(S::ZERO_EXPONENT));
    let whole = simd.floor(simd.add(x, simd.splat(0.5)));
    let part = simd.sub(x, whole);
    let mut sum = simd.splat(coefficients[0]);
    let mut index = 1;
    while index < N {
        sum = simd.mul_add(sum, part, simd.splat(coefficients[index]));
        index += 1;
    }
    simd.scale(sum, whole)
}
