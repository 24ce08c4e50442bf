//! The element types of rows, as the kernels load them.

use super::simd::Simd;

/// An element type.
pub(super) trait Element {
    /// Bytes of one element.
    const BYTES: usize;
    /// What a loaded element lacks as a factor, beside the scale of its lane.
    const FACTOR: f32 = 1.0;
    /// # Safety
    /// 16 elements are readable at `from`.
    unsafe fn load<S: Simd>(simd: S, from: *const u8) -> S::Floats;
}

/// binary32.
pub(super) struct F32;
/// binary16.
pub(super) struct F16;
/// bfloat16.
pub(super) struct Bf16;
/// e4m3.
pub(super) struct Fp8;

impl Element for F32 {
    const BYTES: usize = 4;
    #[inline(always)]
    unsafe fn load<S: Simd>(simd: S, from: *const u8) -> S::Floats {
        // SAFETY: the caller's promise.
        unsafe { simd.load(from.cast()) }
    }
}

impl Element for F16 {
    const BYTES: usize = 2;
    #[inline(always)]
    unsafe fn load<S: Simd>(simd: S, from: *const u8) -> S::Floats {
        // SAFETY: the caller's promise.
        unsafe { simd.load_f16(from) }
    }
}

impl Element for Bf16 {
    const BYTES: usize = 2;
    #[inline(always)]
    unsafe fn load<S: Simd>(simd: S, from: *const u8) -> S::Floats {
        // SAFETY: the caller's promise.
        unsafe { simd.load_bf16(from) }
    }
}

impl Element for Fp8 {
    const BYTES: usize = 1;
    const FACTOR: f32 = 256.0;
    #[inline(always)]
    unsafe fn load<S: Simd>(simd: S, from: *const u8) -> S::Floats {
        // SAFETY: the caller's promise.
        unsafe { simd.load_e4m3(from) }
    }
}

/// Runs `$body` with `$element` standing for the type of `$row_type`.
macro_rules! with_element {
    ($row_type:expr, $element:ident => $body:expr) => {
        match $row_type {
            crate::shape::RowType::F32 => {
                type $element = crate::device::cpu::element::F32;
                $body
            }
            crate::shape::RowType::F16 => {
                type $element = crate::device::cpu::element::F16;
                $body
            }
            crate::shape::RowType::Bf16 => {
                type $element = crate::device::cpu::element::Bf16;
                $body
            }
            crate::shape::RowType::Fp8 => {
                type $element = crate::device::cpu::element::Fp8;
                $body
            }
        }
    };
}
pub(super) use with_element;
