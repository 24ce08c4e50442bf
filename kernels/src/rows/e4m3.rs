//! Eight-bit floating point, e4m3 of the "fn" kind (Micikevicius et al., "FP8 formats for deep learning", 2022, section 3): a sign, four bits
//! of exponent with bias 7, three of mantissa. Subnormal codes count 2^-9; the largest number is 448; there is no infinity, and a code
//! whose seven low bits are all set is not a number.
//!
//! **Conversion.** Whoever appends converts, and the bits are the same everywhere, because only operations with one possible result take
//! part: `x / scale` in f32, rounded to nearest even as IEEE 754 has it; then that quotient to the nearest code, of two equally near ones
//! to the one with an even mantissa; what lies beyond 448 becomes 448. An `x` that is infinite or not a number becomes the code that is not
//! a number, so that it is found and refused as in rows of other types.

/// Largest number of a code.
pub const LARGEST: f32 = 448.0;

/// The code, less its sign, that is not a number.
pub const NAN: u8 = 0x7F;

/// Smallest number whose mantissa has its hidden bit.
const SMALLEST_NORMAL: f32 = 1.0 / 64.0;

/// The code of `x` at a scale.
#[inline(always)]
#[must_use]
pub fn code_of(x: f32, scale: f32) -> u8 {
    // Adding this rounds a subnormal to a whole number of 2^-9, which then stands in the low bits.
    const SUBNORMAL_MAGIC: f32 = 16384.0;
    let quotient = (x / scale).to_bits();
    let magnitude = f32::from_bits(quotient & 0x7FFF_FFFF).min(LARGEST);
    let subnormal = (magnitude + SUBNORMAL_MAGIC).to_bits() - SUBNORMAL_MAGIC.to_bits();
    // Half of what is cut off, less the smallest bit unless the code would be odd; a carry goes on into the exponent as it should.
    let bits = magnitude.to_bits();
    let normal = ((bits + 0x7_FFFF + (bits >> 20 & 1)) >> 20).wrapping_sub((127 - 7) << 3);
    let number = if magnitude < SMALLEST_NORMAL { subnormal } else { normal };
    let code = if x.is_finite() { number } else { u32::from(NAN) };
    (code | quotient >> 24 & 0x80) as u8
}

/// The number that a code stands for at a scale: exact in f32 but for one multiplication.
#[inline(always)]
#[must_use]
pub fn value_of(code: u8, scale: f32) -> f32 {
    let (exponent, mantissa) = (u32::from(code >> 3 & 0xF), u32::from(code & 7));
    let magnitude = match exponent {
        _ if code & NAN == NAN => f32::NAN,
        0 => mantissa as f32 / 512.0,
        _ => f32::from_bits((exponent + 127 - 7) << 23 | mantissa << 20),
    };
    (if code & 0x80 == 0 { magnitude } else { -magnitude }) * scale
}
