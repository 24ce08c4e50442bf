//! Sixteen lanes of SIMD under three instruction sets, chosen at run time.
//!
//! Kernels are written once, as [`Task`]s generic over [`Simd`]. A value of a `Simd` type is proof that the CPU has its instructions
//! (it can only be had through [`Level`]), so its methods are safe to call. Everything generic over `Simd` is `#[inline(always)]`:
//! the code is compiled inside [`Simd::enter`], where the instruction set is switched on.

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod math;
mod portable;

pub(super) use math::{exp2, exp2_coarse, exp2_linear};

/// Work that can run under any instruction set.
pub(super) trait Task {
    /// What it returns.
    type Output;
    /// Must be `#[inline(always)]`.
    fn run<S: Simd>(self, simd: S) -> Self::Output;
}

/// Sixteen f32 and sixteen 32-bit words at once.
pub(super) trait Simd: Copy {
    /// 16 f32.
    type Floats: Copy;
    /// 16 u32.
    type Words: Copy;
    /// Rows of the matrix product's register tile: as many as leave no register spilt.
    const PRODUCT_ROWS: usize;
    /// A whole power of two that [`Simd::scale`] turns into zero.
    const ZERO_EXPONENT: f32;

    /// Runs a task with this instruction set switched on.
    fn enter<T: Task>(self, task: T) -> T::Output;

    /// All lanes `x`.
    fn splat(self, x: f32) -> Self::Floats;
    /// # Safety
    /// 16 f32 are readable at `from`.
    unsafe fn load(self, from: *const f32) -> Self::Floats;
    /// # Safety
    /// 16 f32 are writable at `to`.
    unsafe fn store(self, to: *mut f32, value: Self::Floats);
    /// # Safety
    /// 16 binary16 are readable at `from`.
    unsafe fn load_f16(self, from: *const u8) -> Self::Floats;
    /// # Safety
    /// 16 bfloat16 are readable at `from`.
    unsafe fn load_bf16(self, from: *const u8) -> Self::Floats;
    /// The numbers of e4m3 codes, 256 times too small: what binary16 makes of the same sign, exponent and mantissa. Codes that are no number
    /// read as some number.
    ///
    /// # Safety
    /// 16 codes are readable at `from`.
    unsafe fn load_e4m3(self, from: *const u8) -> Self::Floats;
    /// Rounded to nearest even, as `half::f16::from_f32`.
    fn to_f16(self, value: Self::Floats) -> [u16; 16];
    /// `a + b`
    fn add(self, a: Self::Floats, b: Self::Floats) -> Self::Floats;
    /// `a - b`
    fn sub(self, a: Self::Floats, b: Self::Floats) -> Self::Floats;
    /// `a * b`
    fn mul(self, a: Self::Floats, b: Self::Floats) -> Self::Floats;
    /// `a * b + c`, rounded once where the instruction set can.
    fn mul_add(self, a: Self::Floats, b: Self::Floats, c: Self::Floats) -> Self::Floats;
    /// Lane-wise maximum of numbers.
    fn max(self, a: Self::Floats, b: Self::Floats) -> Self::Floats;
    /// Lane-wise minimum of numbers.
    fn min(self, a: Self::Floats, b: Self::Floats) -> Self::Floats;
    /// Rounded down.
    fn floor(self, a: Self::Floats) -> Self::Floats;
    /// `a * 2^n` for a whole `n` of at least `ZERO_EXPONENT` and `a` in [0.5, 2]; below the normal numbers it may be zero.
    fn scale(self, a: Self::Floats, n: Self::Floats) -> Self::Floats;
    /// Sum of the lanes, in a fixed order.
    fn sum(self, a: Self::Floats) -> f32;
    /// Largest lane.
    fn largest(self, a: Self::Floats) -> f32;
    /// Lane i of the result is the sum of the lanes of `a[i]`, in a fixed order.
    fn sums(self, a: [Self::Floats; 16]) -> Self::Floats;

    /// All words `x`.
    fn words(self, x: u32) -> Self::Words;
    /// # Safety
    /// 16 u32 are readable at `from`.
    unsafe fn load_words(self, from: *const u8) -> Self::Words;
    /// # Safety
    /// 16 u32 are writable at `to`.
    unsafe fn store_words(self, to: *mut u8, value: Self::Words);
    /// # Safety
    /// 16 u16 are readable at `from`; they are zero-extended.
    unsafe fn load_u16(self, from: *const u16) -> Self::Words;
    /// Stores the low halves.
    ///
    /// # Safety
    /// 16 u16 are writable at `to`.
    unsafe fn store_u16(self, to: *mut u16, value: Self::Words);
    /// `a & b`
    fn and(self, a: Self::Words, b: Self::Words) -> Self::Words;
    /// `a | b`
    fn or(self, a: Self::Words, b: Self::Words) -> Self::Words;
    /// `a << N`
    fn shl<const N: u32>(self, a: Self::Words) -> Self::Words;
    /// `a >> N`
    fn shr<const N: u32>(self, a: Self::Words) -> Self::Words;
    /// `a + b`, wrapping.
    fn add_words(self, a: Self::Words, b: Self::Words) -> Self::Words;
    /// The bits of each f32.
    fn bits(self, a: Self::Floats) -> Self::Words;
    /// The f32 of each word's bits.
    fn floats_of(self, a: Self::Words) -> Self::Floats;
    /// Each word, as a signed integer, in f32.
    fn to_floats(self, a: Self::Words) -> Self::Floats;
    /// Numbers between 0 and 2^31 - 1 as words, cut to whole ones.
    fn to_words(self, a: Self::Floats) -> Self::Words;
    /// Adds to each word the products of its four unsigned bytes with the four signed bytes of `weights`.
    /// The bytes of `codes` are below `2^BITS`; BITS is 2, 4 or 8.
    fn dot<const BITS: u32>(self, sum: Self::Words, codes: Self::Words, weights: u32) -> Self::Words;
    /// Bit i: whether key i of 32 is at least `least`.
    ///
    /// # Safety
    /// 32 u16 are readable at `keys`.
    unsafe fn at_least(self, keys: *const u16, least: u16) -> u32;
    /// Asks for the cache line of an address, which need not be readable.
    fn prefetch(self, address: *const u8);
    /// Writes `first + i` for every set bit i of `mask`, ascending, and returns their number. May write 16 words.
    ///
    /// # Safety
    /// 16 u32 are writable at `to`.
    unsafe fn compress(self, to: *mut u32, first: u32, mask: u32) -> usize;
}

/// An instruction set.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Level {
    /// AVX-512 F, BW, DQ, VL and VNNI.
    Avx512,
    /// AVX2, FMA and F16C.
    Avx2,
    /// Whatever the compiler makes of plain code.
    Portable,
}

impl Level {
    /// The instruction sets that this CPU has, best first.
    #[must_use]
    pub fn available() -> Vec<Self> {
        let mut levels = Vec::new();
        #[cfg(target_arch = "x86_64")]
        {
            if avx512::Avx512::detect().is_some() {
                levels.push(Self::Avx512);
            }
            if avx2::Avx2::detect().is_some() {
                levels.push(Self::Avx2);
            }
        }
        levels.push(Self::Portable);
        levels
    }

    /// Runs a task at this level, or at the portable one on a CPU without it.
    #[inline]
    pub(super) fn enter<T: Task>(self, task: T) -> T::Output {
        #[cfg(target_arch = "x86_64")]
        {
            if self == Self::Avx512
                && let Some(simd) = avx512::Avx512::detect()
            {
                return simd.enter(task);
            }
            if self == Self::Avx2
                && let Some(simd) = avx2::Avx2::detect()
            {
                return simd.enter(task);
            }
        }
        portable::Portable.enter(task)
    }
}
