//! AVX2 with FMA and F16C: two halves of eight.

use std::arch::x86_64::*;

use super::{Simd, Task};

/// Proof that the CPU has AVX2, FMA and F16C.
#[derive(Clone, Copy)]
pub(super) struct Avx2(());

impl Avx2 {
    #[inline]
    pub(super) fn detect() -> Option<Self> {
        (is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") && is_x86_feature_detected!("f16c")).then_some(Self(()))
    }
}

#[inline(never)]
#[target_feature(enable = "avx2,fma,f16c")]
fn enter<T: Task>(simd: Avx2, task: T) -> T::Output {
    task.run(simd)
}

/// An expression of intrinsics that `Avx2` proves to be there.
macro_rules! proven {
    ($body:expr) => {
        // SAFETY: a value of `Avx2` exists only where `detect` found the instructions; pointers are as the method's caller promised.
        unsafe { $body }
    };
}

/// The same operation on both halves.
macro_rules! both {
    ($operation:expr, $($a:ident),+) => {
        proven!([$operation($($a[0]),+), $operation($($a[1]),+)])
    };
}

/// Adds, or takes the larger of, halves onto each other: 16, 8, 4, 2 lanes.
#[inline(always)]
fn fold(a: [__m256; 2], f256: impl Fn(__m256, __m256) -> __m256, f: impl Fn(f32, f32) -> f32) -> f32 {
    let mut lanes = [0.0f32; 8];
    let eight = f256(a[0], a[1]);
    proven!(_mm256_storeu_ps(lanes.as_mut_ptr(), eight));
    for half in [4, 2, 1] {
        for lane in 0..half {
            lanes[lane] = f(lanes[lane], lanes[lane + half]);
        }
    }
    lanes[0]
}

impl Simd for Avx2 {
    type Floats = [__m256; 2];
    type Words = [__m256i; 2];
    const PRODUCT_ROWS: usize = 2;
    const ZERO_EXPONENT: f32 = -127.0;

    #[inline(always)]
    fn enter<T: Task>(self, task: T) -> T::Output {
        proven!(enter(self, task))
    }

    #[inline(always)]
    fn splat(self, x: f32) -> [__m256; 2] {
        proven!([_mm256_set1_ps(x); 2])
    }

    #[inline(always)]
    unsafe fn load(self, from: *const f32) -> [__m256; 2] {
        proven!([_mm256_loadu_ps(from), _mm256_loadu_ps(from.add(8))])
    }

    #[inline(always)]
    unsafe fn store(self, to: *mut f32, value: [__m256; 2]) {
        proven!({
            _mm256_storeu_ps(to, value[0]);
            _mm256_storeu_ps(to.add(8), value[1]);
        });
    }

    #[inline(always)]
    unsafe fn load_f16(self, from: *const u8) -> [__m256; 2] {
        proven!([_mm256_cvtph_ps(_mm_loadu_si128(from.cast())), _mm256_cvtph_ps(_mm_loadu_si128(from.add(16).cast()))])
    }

    #[inline(always)]
    unsafe fn load_bf16(self, from: *const u8) -> [__m256; 2] {
        proven!({
            let words = [_mm_loadu_si128(from.cast()), _mm_loadu_si128(from.add(16).cast())];
            words.map(|words| _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(words))))
        })
    }

    #[inline(always)]
    unsafe fn load_e4m3(self, from: *const u8) -> [__m256; 2] {
        proven!({
            // The sign is extended, so that a shift leaves it on top of the magnitude and once below, where it is cut away.
            let shifted = _mm256_slli_epi16::<7>(_mm256_cvtepi8_epi16(_mm_loadu_si128(from.cast())));
            let halves = _mm256_and_si256(shifted, _mm256_set1_epi16(0xBF80_u16 as i16));
            [_mm256_cvtph_ps(_mm256_castsi256_si128(halves)), _mm256_cvtph_ps(_mm256_extracti128_si256::<1>(halves))]
        })
    }

    #[inline(always)]
    fn to_f16(self, value: [__m256; 2]) -> [u16; 16] {
        let mut halves = [0u16; 16];
        let to = halves.as_mut_ptr();
        proven!({
            _mm_storeu_si128(to.cast(), _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(value[0]));
            _mm_storeu_si128(to.add(8).cast(), _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(value[1]));
        });
        halves
    }

    #[inline(always)]
    fn add(self, a: [__m256; 2], b: [__m256; 2]) -> [__m256; 2] {
        both!(_mm256_add_ps, a, b)
    }

    #[inline(always)]
    fn sub(self, a: [__m256; 2], b: [__m256; 2]) -> [__m256; 2] {
        both!(_mm256_sub_ps, a, b)
    }

    #[inline(always)]
    fn mul(self, a: [__m256; 2], b: [__m256; 2]) -> [__m256; 2] {
        both!(_mm256_mul_ps, a, b)
    }

    #[inline(always)]
    fn mul_add(self, a: [__m256; 2], b: [__m256; 2], c: [__m256; 2]) -> [__m256; 2] {
        both!(_mm256_fmadd_ps, a, b, c)
    }

    #[inline(always)]
    fn max(self, a: [__m256; 2], b: [__m256; 2]) -> [__m256; 2] {
        both!(_mm256_max_ps, a, b)
    }

    #[inline(always)]
    fn min(self, a: [__m256; 2], b: [__m256; 2]) -> [__m256; 2] {
        both!(_mm256_min_ps, a, b)
    }

    #[inline(always)]
    fn floor(self, a: [__m256; 2]) -> [__m256; 2] {
        both!(_mm256_floor_ps, a)
    }

    #[inline(always)]
    fn scale(self, a: [__m256; 2], n: [__m256; 2]) -> [__m256; 2] {
        proven!({
            let power = |n| _mm256_slli_epi32::<23>(_mm256_add_epi32(_mm256_cvttps_epi32(n), _mm256_set1_epi32(127)));
            [_mm256_mul_ps(a[0], _mm256_castsi256_ps(power(n[0]))), _mm256_mul_ps(a[1], _mm256_castsi256_ps(power(n[1])))]
        })
    }

    #[inline(always)]
    fn sum(self, a: [__m256; 2]) -> f32 {
        fold(a, |a, b| proven!(_mm256_add_ps(a, b)), |a, b| a + b)
    }

    #[inline(always)]
    fn largest(self, a: [__m256; 2]) -> f32 {
        fold(a, |a, b| proven!(_mm256_max_ps(a, b)), |a, b| if a > b { a } else { b })
    }

    #[inline(always)]
    fn sums(self, a: [[__m256; 2]; 16]) -> [__m256; 2] {
        let mut totals = [0.0f32; 16];
        for (total, lanes) in totals.iter_mut().zip(a) {
            *total = self.sum(lanes);
        }
        proven!(self.load(totals.as_ptr()))
    }

    #[inline(always)]
    fn words(self, x: u32) -> [__m256i; 2] {
        proven!([_mm256_set1_epi32(x as i32); 2])
    }

    #[inline(always)]
    unsafe fn load_words(self, from: *const u8) -> [__m256i; 2] {
        proven!([_mm256_loadu_si256(from.cast()), _mm256_loadu_si256(from.add(32).cast())])
    }

    #[inline(always)]
    unsafe fn store_words(self, to: *mut u8, value: [__m256i; 2]) {
        proven!({
            _mm256_storeu_si256(to.cast(), value[0]);
            _mm256_storeu_si256(to.add(32).cast(), value[1]);
        });
    }

    #[inline(always)]
    unsafe fn load_u16(self, from: *const u16) -> [__m256i; 2] {
        proven!([_mm256_cvtepu16_epi32(_mm_loadu_si128(from.cast())), _mm256_cvtepu16_epi32(_mm_loadu_si128(from.add(8).cast()))])
    }

    #[inline(always)]
    unsafe fn store_u16(self, to: *mut u16, value: [__m256i; 2]) {
        proven!({
            // Packing works within 128-bit halves, so the middle quarters change places afterwards.
            let low = _mm256_set1_epi32(0xFFFF);
            let packed = _mm256_packus_epi32(_mm256_and_si256(value[0], low), _mm256_and_si256(value[1], low));
            _mm256_storeu_si256(to.cast(), _mm256_permute4x64_epi64::<0b11_01_10_00>(packed));
        });
    }

    #[inline(always)]
    fn and(self, a: [__m256i; 2], b: [__m256i; 2]) -> [__m256i; 2] {
        both!(_mm256_and_si256, a, b)
    }

    #[inline(always)]
    fn or(self, a: [__m256i; 2], b: [__m256i; 2]) -> [__m256i; 2] {
        both!(_mm256_or_si256, a, b)
    }

    #[inline(always)]
    fn shl<const N: u32>(self, a: [__m256i; 2]) -> [__m256i; 2] {
        let count = proven!(_mm_cvtsi32_si128(N as i32));
        proven!([_mm256_sll_epi32(a[0], count), _mm256_sll_epi32(a[1], count)])
    }

    #[inline(always)]
    fn shr<const N: u32>(self, a: [__m256i; 2]) -> [__m256i; 2] {
        let count = proven!(_mm_cvtsi32_si128(N as i32));
        proven!([_mm256_srl_epi32(a[0], count), _mm256_srl_epi32(a[1], count)])
    }

    #[inline(always)]
    fn add_words(self, a: [__m256i; 2], b: [__m256i; 2]) -> [__m256i; 2] {
        both!(_mm256_add_epi32, a, b)
    }

    #[inline(always)]
    fn bits(self, a: [__m256; 2]) -> [__m256i; 2] {
        both!(_mm256_castps_si256, a)
    }

    #[inline(always)]
    fn floats_of(self, a: [__m256i; 2]) -> [__m256; 2] {
        both!(_mm256_castsi256_ps, a)
    }

    #[inline(always)]
    fn to_floats(self, a: [__m256i; 2]) -> [__m256; 2] {
        both!(_mm256_cvtepi32_ps, a)
    }

    #[inline(always)]
    fn to_words(self, a: [__m256; 2]) -> [__m256i; 2] {
        both!(_mm256_cvttps_epi32, a)
    }

    #[inline(always)]
    fn dot<const BITS: u32>(self, sum: [__m256i; 2], codes: [__m256i; 2], weights: u32) -> [__m256i; 2] {
        proven!({
            let (weights, ones) = (_mm256_set1_epi32(weights as i32), _mm256_set1_epi16(1));
            let product = |codes| _mm256_madd_epi16(_mm256_maddubs_epi16(codes, weights), ones);
            let low = _mm256_set1_epi8(15);
            let dot = |codes| {
                if BITS <= 4 {
                    return product(codes);
                }
                // Two products of a byte of 255 overflow 16 bits, those of a nibble do not.
                let high = product(_mm256_and_si256(_mm256_srli_epi32::<4>(codes), low));
                _mm256_add_epi32(product(_mm256_and_si256(codes, low)), _mm256_slli_epi32::<4>(high))
            };
            [_mm256_add_epi32(sum[0], dot(codes[0])), _mm256_add_epi32(sum[1], dot(codes[1]))]
        })
    }

    #[inline(always)]
    unsafe fn at_least(self, keys: *const u16, least: u16) -> u32 {
        proven!({
            let least = _mm256_set1_epi16(least as i16);
            let reaches = |keys| _mm256_cmpeq_epi16(_mm256_max_epu16(keys, least), keys);
            let (low, high) = (reaches(_mm256_loadu_si256(keys.cast())), reaches(_mm256_loadu_si256(keys.add(16).cast())));
            // Packing works within 128-bit halves, so the middle quarters change places afterwards.
            let bytes = _mm256_permute4x64_epi64::<0b11_01_10_00>(_mm256_packs_epi16(low, high));
            _mm256_movemask_epi8(bytes) as u32
        })
    }

    #[inline(always)]
    fn prefetch(self, address: *const u8) {
        proven!(_mm_prefetch::<_MM_HINT_T0>(address.cast()));
    }

    #[inline(always)]
    unsafe fn compress(self, to: *mut u32, first: u32, mask: u32) -> usize {
        let mut rest = mask;
        let mut count = 0;
        while rest != 0 {
            // SAFETY: a mask has at most 16 bits, so `count` is below 16, which the caller promised to be writable.
            unsafe { to.add(count).write(first + rest.trailing_zeros()) };
            rest &= rest - 1;
            count += 1;
        }
        count
    }
}
