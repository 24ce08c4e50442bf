//! Double Sparsity's selection: importance keys (arXiv:2408.07092, section 3.2) and the order of rows that they define.
//!
//! A lane selects its sinks first, then rows by descending key, equal keys by ascending position; the list comes out in position order.

/// The order-preserving 16-bit key of an importance.
///
/// The bits of the f32 without the low 14 of its mantissa, counted from 2^-121: nine bits of mantissa over 128 binades, so that a step of
/// the key is between 1/1024 and 1/512 of the importance. Smaller importances have key 0, those of 128 and more the largest key.
#[must_use]
pub fn importance_key(importance: f32) -> u16 {
    let smallest = SMALLEST_KEYED.to_bits();
    ((importance.clamp(SMALLEST_KEYED, LARGEST_KEYED).to_bits() - smallest) >> KEY_SHIFT) as u16
}

/// 2^-121, the importance of key 0.
pub const SMALLEST_KEYED: f32 = f32::from_bits((127 - 121) << 23);

/// The largest f32 below 128, which has the largest key.
pub const LARGEST_KEYED: f32 = f32::from_bits(((127 + 7) << 23) - 1);

/// Bits of the f32 that a key leaves out.
pub const KEY_SHIFT: u32 = 14;
