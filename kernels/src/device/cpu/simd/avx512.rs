//! AVX-512 with VNNI.

use std::arch::x86_64::*;

use super::{Simd, Task};

/// Proof that the CPU has AVX-512 F, BW, DQ, VL and VNNI.
#[derive(Clone, Copy)]
pub(super) struct Avx512(());

impl Avx512 {
    #[inline]
    pub(super) fn detect() -> Option<Self> {
        let has = is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512dq")
            && is_x86_feature_detected!("avx512vl")
            && is_x86_feature_detected!("avx512vnni");
        has.then_some(Self(()))
    }
}

#[inline(never)]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c,bmi1,bmi2,popcnt,lzcnt")]
fn enter<T: Task>(simd: Avx512, task: T) -> T::Output {
    task.run(simd)
}

/// An expression of intrinsics that `Avx512` proves to be there.
macro_rules! proven {
    ($body:expr) => {
        // SAFETY: a value of `Avx512` exists only where `detect` found the instructions; pointers are as the method's caller promised.
        unsafe { $body }
    };
}

/// The sums of the four 128-bit quarters' lanes: lane i of each quarter becomes the sum of that quarter of `a[i]`.
#[inline(always)]
fn sums_in_quarters(a: __m512, b: __m512, c: __m512, d: __m512) -> __m512 {
    proven!({
        let ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
        let cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
        let low = _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd)));
        let high = _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd)));
        _mm512_add_ps(low, high)
    })
}

impl Simd for Avx512 {
    type Floats = __m512;
    type Words = __m512i;
    const PRODUCT_ROWS: usize = 8;
    const ZERO_EXPONENT: f32 = -160.0;

    #[inline(always)]
    fn enter<T: Task>(self, task: T) -> T::Output {
        proven!(enter(self, task))
    }

    #[inline(always)]
    fn splat(self, x: f32) -> __m512 {
        proven!(_mm512_set1_ps(x))
    }

    #[inline(always)]
    unsafe fn load(self, from: *const f32) -> __m512 {
        proven!(_mm512_loadu_ps(from))
    }

    #[inline(always)]
    unsafe fn store(self, to: *mut f32, value: __m512) {
        proven!(_mm512_storeu_ps(to, value));
    }

    #[inline(always)]
    unsafe fn load_f16(self, from: *const u8) -> __m512 {
        proven!(_mm512_cvtph_ps(_mm256_loadu_si256(from.cast())))
    }

    #[inline(always)]
    unsafe fn load_bf16(self, from: *const u8) -> __m512 {
        proven!(_mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(_mm256_loadu_si256(from.cast())))))
    }

    #[inline(always)]
    unsafe fn load_e4m3(self, from: *const u8) -> __m512 {
        proven!({
            // The sign is extended, so that a shift leaves it on top of the magnitude and once below, where it is cut away.
            let shifted = _mm256_slli_epi16::<7>(_mm256_cvtepi8_epi16(_mm_loadu_si128(from.cast())));
            _mm512_cvtph_ps(_mm256_and_si256(shifted, _mm256_set1_epi16(0xBF80_u16 as i16)))
        })
    }

    #[inline(always)]
    fn to_f16(self, value: __m512) -> [u16; 16] {
        let mut halves = [0; 16];
        proven!(_mm256_storeu_si256(halves.as_mut_ptr().cast(), _mm512_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(value)));
        halves
    }

    #[inline(always)]
    fn add(self, a: __m512, b: __m512) -> __m512 {
        proven!(_mm512_add_ps(a, b))
    }

    #[inline(always)]
    fn sub(self, a: __m512, b: __m512) -> __m512 {
        proven!(_mm512_sub_ps(a, b))
    }

    #[inline(always)]
    fn mul(self, a: __m512, b: __m512) -> __m512 {
        proven!(_mm512_mul_ps(a, b))
    }

    #[inline(always)]
    fn mul_add(self, a: __m512, b: __m512, c: __m512) -> __m512 {
        proven!(_mm512_fmadd_ps(a, b, c))
    }

    #[inline(always)]
    fn max(self, a: __m512, b: __m512) -> __m512 {
        proven!(_mm512_max_ps(a, b))
    }

    #[inline(always)]
    fn min(self, a: __m512, b: __m512) -> __m512 {
        proven!(_mm512_min_ps(a, b))
    }

    #[inline(always)]
    fn floor(self, a: __m512) -> __m512 {
        proven!(_mm512_roundscale_ps::<_MM_FROUND_TO_NEG_INF>(a))
    }

    #[inline(always)]
    fn scale(self, a: __m512, n: __m512) -> __m512 {
        proven!(_mm512_scalef_ps(a, n))
    }

    #[inline(always)]
    fn sum(self, a: __m512) -> f32 {
        proven!(_mm512_reduce_add_ps(a))
    }

    #[inline(always)]
    fn largest(self, a: __m512) -> f32 {
        proven!(_mm512_reduce_max_ps(a))
    }

    #[inline(always)]
    fn sums(self, a: [__m512; 16]) -> __m512 {
        let [q0, q1, q2, q3] = [
            sums_in_quarters(a[0], a[1], a[2], a[3]),
            sums_in_quarters(a[4], a[5], a[6], a[7]),
            sums_in_quarters(a[8], a[9], a[10], a[11]),
            sums_in_quarters(a[12], a[13], a[14], a[15]),
        ];
        proven!({
            // Each q holds four partial sums in each of its four quarters: add quarters crosswise.
            let even01 = _mm512_shuffle_f32x4::<0b10_00_10_00>(q0, q1);
            let odd01 = _mm512_shuffle_f32x4::<0b11_01_11_01>(q0, q1);
            let even23 = _mm512_shuffle_f32x4::<0b10_00_10_00>(q2, q3);
            let odd23 = _mm512_shuffle_f32x4::<0b11_01_11_01>(q2, q3);
            let (s01, s23) = (_mm512_add_ps(even01, odd01), _mm512_add_ps(even23, odd23));
            let even = _mm512_shuffle_f32x4::<0b10_00_10_00>(s01, s23);
            let odd = _mm512_shuffle_f32x4::<0b11_01_11_01>(s01, s23);
            _mm512_add_ps(even, odd)
        })
    }

    #[inline(always)]
    fn words(self, x: u32) -> __m512i {
        proven!(_mm512_set1_epi32(x as i32))
    }

    #[inline(always)]
    unsafe fn load_words(self, from: *const u8) -> __m512i {
        proven!(_mm512_loadu_si512(from.cast()))
    }

    #[inline(always)]
    unsafe fn store_words(self, to: *mut u8, value: __m512i) {
        proven!(_mm512_storeu_si512(to.cast(), value));
    }

    #[inline(always)]
    unsafe fn load_u16(self, from: *const u16) -> __m512i {
        proven!(_mm512_cvtepu16_epi32(_mm256_loadu_si256(from.cast())))
    }

    #[inline(always)]
    unsafe fn store_u16(self, to: *mut u16, value: __m512i) {
        proven!(_mm256_storeu_si256(to.cast(), _mm512_cvtepi32_epi16(value)));
    }

    #[inline(always)]
    fn and(self, a: __m512i, b: __m512i) -> __m512i {
        proven!(_mm512_and_si512(a, b))
    }

    #[inline(always)]
    fn or(self, a: __m512i, b: __m512i) -> __m512i {
        proven!(_mm512_or_si512(a, b))
    }

    #[inline(always)]
    fn shl<const N: u32>(self, a: __m512i) -> __m512i {
        proven!(_mm512_slli_epi32::<N>(a))
    }

    #[inline(always)]
    fn shr<const N: u32>(self, a: __m512i) -> __m512i {
        proven!(_mm512_srli_epi32::<N>(a))
    }

    #[inline(always)]
    fn add_words(self, a: __m512i, b: __m512i) -> __m512i {
        proven!(_mm512_add_epi32(a, b))
    }

    #[inline(always)]
    fn bits(self, a: __m512) -> __m512i {
        proven!(_mm512_castps_si512(a))
    }

    #[inline(always)]
    fn floats_of(self, a: __m512i) -> __m512 {
        proven!(_mm512_castsi512_ps(a))
    }

    #[inline(always)]
    fn to_floats(self, a: __m512i) -> __m512 {
        proven!(_mm512_cvtepi32_ps(a))
    }

    #[inline(always)]
    fn to_words(self, a: __m512) -> __m512i {
        proven!(_mm512_cvttps_epi32(a))
    }

    #[inline(always)]
    fn dot<const BITS: u32>(self, sum: __m512i, codes: __m512i, weights: u32) -> __m512i {
        proven!(_mm512_dpbusd_epi32(sum, codes, _mm512_set1_epi32(weights as i32)))
    }

    #[inline(always)]
    unsafe fn at_least(self, keys: *const u16, least: u16) -> u32 {
        proven!(_mm512_cmpge_epu16_mask(_mm512_loadu_si512(keys.cast()), _mm512_set1_epi16(least as i16)))
    }

    #[inline(always)]
    fn prefetch(self, address: *const u8) {
        proven!(_mm_prefetch::<_MM_HINT_T0>(address.cast()));
    }

    #[inline(always)]
    unsafe fn compress(self, to: *mut u32, first: u32, mask: u32) -> usize {
        proven!({
            let lanes = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
            let positions = _mm512_add_epi32(lanes, _mm512_set1_epi32(first as i32));
            // Compressing in a register and storing it whole: a compressing store is microcoded on some CPUs.
            _mm512_storeu_si512(to.cast(), _mm512_maskz_compress_epi32(mask as u16, positions));
        });
        mask.count_ones() as usize
    }
}
