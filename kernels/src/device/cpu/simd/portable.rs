//! Plain code on arrays of sixteen.

use half::{bf16, f16};

use super::{Simd, Task};

/// Needs nothing of the CPU.
#[derive(Clone, Copy)]
pub(super) struct Portable;

impl Portable {
    #[inline(always)]
    fn map2<T: Copy>(a: [T; 16], b: [T; 16], f: impl Fn(T, T) -> T) -> [T; 16] {
        std::array::from_fn(|lane| f(a[lane], b[lane]))
    }
}

/// Adds halves onto each other: 16, 8, 4, 2 lanes. The order that all instruction sets use.
#[inline(always)]
fn fold(mut a: [f32; 16], f: impl Fn(f32, f32) -> f32) -> f32 {
    for half in [8, 4, 2, 1] {
        for lane in 0..half {
            a[lane] = f(a[lane], a[lane + half]);
        }
    }
    a[0]
}

impl Simd for Portable {
    type Floats = [f32; 16];
    type Words = [u32; 16];
    const PRODUCT_ROWS: usize = 2;
    const ZERO_EXPONENT: f32 = -127.0;

    #[inline(always)]
    fn enter<T: Task>(self, task: T) -> T::Output {
        task.run(self)
    }

    #[inline(always)]
    fn splat(self, x: f32) -> [f32; 16] {
        [x; 16]
    }

    #[inline(always)]
    unsafe fn load(self, from: *const f32) -> [f32; 16] {
        // SAFETY: the caller's promise; the address need not be aligned to 64 bytes.
        unsafe { from.cast::<[f32; 16]>().read_unaligned() }
    }

    #[inline(always)]
    unsafe fn store(self, to: *mut f32, value: [f32; 16]) {
        // SAFETY: the caller's promise.
        unsafe { to.cast::<[f32; 16]>().write_unaligned(value) }
    }

    #[inline(always)]
    unsafe fn load_f16(self, from: *const u8) -> [f32; 16] {
        // SAFETY: the caller's promise.
        let bits = unsafe { from.cast::<[u16; 16]>().read_unaligned() };
        bits.map(|bits| f16::from_bits(bits).to_f32())
    }

    #[inline(always)]
    unsafe fn load_bf16(self, from: *const u8) -> [f32; 16] {
        // SAFETY: the caller's promise.
        let bits = unsafe { from.cast::<[u16; 16]>().read_unaligned() };
        bits.map(|bits| bf16::from_bits(bits).to_f32())
    }

    #[inline(always)]
    unsafe fn load_e4m3(self, from: *const u8) -> [f32; 16] {
        // SAFETY: the caller's promise.
        let codes = unsafe { from.cast::<[u8; 16]>().read_unaligned() };
        codes.map(|code| f16::from_bits(u16::from(code & 0x80) << 8 | u16::from(code & 0x7F) << 7).to_f32())
    }

    #[inline(always)]
    fn to_f16(self, value: [f32; 16]) -> [u16; 16] {
        value.map(|x| f16::from_f32(x).to_bits())
    }

    #[inline(always)]
    fn add(self, a: [f32; 16], b: [f32; 16]) -> [f32; 16] {
        Self::map2(a, b, |a, b| a + b)
    }

    #[inline(always)]
    fn sub(self, a: [f32; 16], b: [f32; 16]) -> [f32; 16] {
        Self::map2(a, b, |a, b| a - b)
    }

    #[inline(always)]
    fn mul(self, a: [f32; 16], b: [f32; 16]) -> [f32; 16] {
        Self::map2(a, b, |a, b| a * b)
    }

    #[inline(always)]
    fn mul_add(self, a: [f32; 16], b: [f32; 16], c: [f32; 16]) -> [f32; 16] {
        std::array::from_fn(|lane| a[lane] * b[lane] + c[lane])
    }

    #[inline(always)]
    fn max(self, a: [f32; 16], b: [f32; 16]) -> [f32; 16] {
        Self::map2(a, b, |a, b| if a > b { a } else { b })
    }

    #[inline(always)]
    fn min(self, a: [f32; 16], b: [f32; 16]) -> [f32; 16] {
        Self::map2(a, b, |a, b| if a < b { a } else { b })
    }

    #[inline(always)]
    fn floor(self, a: [f32; 16]) -> [f32; 16] {
        a.map(f32::floor)
    }

    #[inline(always)]
    fn scale(self, a: [f32; 16], n: [f32; 16]) -> [f32; 16] {
        Self::map2(a, n, |a, n| a * f32::from_bits(((n as i32 + 127) as u32) << 23))
    }

    #[inline(always)]
    fn sum(self, a: [f32; 16]) -> f32 {
        fold(a, |a, b| a + b)
    }

    #[inline(always)]
    fn largest(self, a: [f32; 16]) -> f32 {
        fold(a, |a, b| if a > b { a } else { b })
    }

    #[inline(always)]
    fn sums(self, a: [[f32; 16]; 16]) -> [f32; 16] {
        a.map(|lanes| self.sum(lanes))
    }

    #[inline(always)]
    fn words(self, x: u32) -> [u32; 16] {
        [x; 16]
    }

    #[inline(always)]
    unsafe fn load_words(self, from: *const u8) -> [u32; 16] {
        // SAFETY: the caller's promise.
        unsafe { from.cast::<[u32; 16]>().read_unaligned() }
    }

    #[inline(always)]
    unsafe fn store_words(self, to: *mut u8, value: [u32; 16]) {
        // SAFETY: the caller's promise.
        unsafe { to.cast::<[u32; 16]>().write_unaligned(value) }
    }

    #[inline(always)]
    unsafe fn load_u16(self, from: *const u16) -> [u32; 16] {
        // SAFETY: the caller's promise.
        unsafe { from.cast::<[u16; 16]>().read_unaligned() }.map(u32::from)
    }

    #[inline(always)]
    unsafe fn store_u16(self, to: *mut u16, value: [u32; 16]) {
        // SAFETY: the caller's promise.
        unsafe { to.cast::<[u16; 16]>().write_unaligned(value.map(|word| word as u16)) }
    }

    #[inline(always)]
    fn and(self, a: [u32; 16], b: [u32; 16]) -> [u32; 16] {
        Self::map2(a, b, |a, b| a & b)
    }

    #[inline(always)]
    fn or(self, a: [u32; 16], b: [u32; 16]) -> [u32; 16] {
        Self::map2(a, b, |a, b| a | b)
    }

    #[inline(always)]
    fn shl<const N: u32>(self, a: [u32; 16]) -> [u32; 16] {
        a.map(|a| a << N)
    }

    #[inline(always)]
    fn shr<const N: u32>(self, a: [u32; 16]) -> [u32; 16] {
        a.map(|a| a >> N)
    }

    #[inline(always)]
    fn add_words(self, a: [u32; 16], b: [u32; 16]) -> [u32; 16] {
        Self::map2(a, b, u32::wrapping_add)
    }

    #[inline(always)]
    fn bits(self, a: [f32; 16]) -> [u32; 16] {
        a.map(f32::to_bits)
    }

    #[inline(always)]
    fn floats_of(self, a: [u32; 16]) -> [f32; 16] {
        a.map(f32::from_bits)
    }

    #[inline(always)]
    fn to_floats(self, a: [u32; 16]) -> [f32; 16] {
        a.map(|a| a as i32 as f32)
    }

    #[inline(always)]
    fn to_words(self, a: [f32; 16]) -> [u32; 16] {
        a.map(|a| a as u32)
    }

    #[inline(always)]
    fn dot<const BITS: u32>(self, sum: [u32; 16], codes: [u32; 16], weights: u32) -> [u32; 16] {
        let weights = weights.to_le_bytes().map(|byte| i32::from(byte as i8));
        std::array::from_fn(|lane| {
            let bytes = codes[lane].to_le_bytes();
            let product: i32 = (0..4).map(|byte| i32::from(bytes[byte]) * weights[byte]).sum();
            sum[lane].wrapping_add(product as u32)
        })
    }

    #[inline(always)]
    unsafe fn at_least(self, keys: *const u16, least: u16) -> u32 {
        // SAFETY: the caller's promise.
        let keys = unsafe { keys.cast::<[u16; 32]>().read_unaligned() };
        keys.iter().enumerate().fold(0, |mask, (lane, &key)| mask | u32::from(key >= least) << lane)
    }

    #[inline(always)]
    fn prefetch(self, _address: *const u8) {}

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
