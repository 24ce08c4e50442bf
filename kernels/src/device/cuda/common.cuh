// What every kernel uses: the options of the specialisation, elements of rows, and conversions. NVRTC finds no toolkit headers, so
// conversions are PTX.
#pragma once

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

constexpr u32 CHUNK_TOKENS = 256;

#define ROW_F32 0
#define ROW_F16 1
#define ROW_BF16 2
#define ROW_FP8 3

// Elements of rows as they lie in memory: binary32, or the bits of binary16, bfloat16 or e4m3.
#if ROW_TYPE == ROW_F32
typedef float element;
#elif ROW_TYPE == ROW_FP8
typedef u8 element;
#else
typedef u16 element;
#endif

constexpr u32 ELEMENT_BYTES = sizeof(element);
// A row is a key and then a value.
constexpr u32 ROW_BYTES = 2 * HEAD_DIM * ELEMENT_BYTES;

__device__ __forceinline__ float f16_to_f32(u16 bits) {
    float x;
    asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(bits));
    return x;
}

__device__ __forceinline__ float bf16_to_f32(u16 bits) {
    return __uint_as_float(static_cast<u32>(bits) << 16);
}

// What tensor cores multiply rows by, and rows themselves there: binary16 for e4m3 as well.
__device__ __forceinline__ float half_to_f32(u16 bits) {
#if ROW_TYPE == ROW_BF16
    return bf16_to_f32(bits);
#else
    return f16_to_f32(bits);
#endif
}

// e4m3 codes in the upper bytes of two halves as binary16 of the same sign, exponent and mantissa: their numbers, CODE_FACTOR times too small.
// The lower bytes may hold anything.
__device__ __forceinline__ u32 expanded(u32 codes) {
    return (codes & 0x80008000u) | (codes >> 1 & 0x3F803F80u);
}
constexpr float CODE_FACTOR = 256.0f;

// What is multiplied with the elements of a lane, as in scales.rs.
struct RowScale {
    float key, value;
};

// What a lane's scores lack as a factor, and its outputs. `scales` is RowScale[lane].
__device__ __forceinline__ float key_factor(u64 scales, u32 lane) {
#if ROW_TYPE == ROW_FP8
    return CODE_FACTOR * reinterpret_cast<const RowScale *>(scales)[lane].key;
#else
    return 1.0f;
#endif
}

__device__ __forceinline__ float value_factor(u64 scales, u32 lane) {
#if ROW_TYPE == ROW_FP8
    return CODE_FACTOR * reinterpret_cast<const RowScale *>(scales)[lane].value;
#else
    return 1.0f;
#endif
}

// One element as f32, exactly; of e4m3 the number of the code.
__device__ __forceinline__ float to_f32(element x) {
#if ROW_TYPE == ROW_F32
    return x;
#elif ROW_TYPE == ROW_FP8
    return f16_to_f32(static_cast<u16>(expanded(static_cast<u32>(x) << 8))) * CODE_FACTOR;
#else
    return half_to_f32(x);
#endif
}

#if ROW_TYPE != ROW_F32
// Two halves in a word, `low` in its low one, rounded to nearest even.
__device__ __forceinline__ u32 pack_pair(float low, float high) {
    u32 pair;
#if ROW_TYPE == ROW_BF16
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
#else
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
#endif
    return pair;
}

__device__ __forceinline__ float low_of_pair(u32 pair) {
    return half_to_f32(static_cast<u16>(pair & 0xFFFF));
}

__device__ __forceinline__ float high_of_pair(u32 pair) {
    return half_to_f32(static_cast<u16>(pair >> 16));
}
#endif

// 2^x, within two units in the last place; 0 for -inf.
__device__ __forceinline__ float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

__device__ __forceinline__ float minus_infinity() {
    return __uint_as_float(0xFF800000u);
}

// Sixteen bytes past the caches of this multiprocessor: what is read once.
__device__ __forceinline__ uint4 load_16_once(const void *from) {
    uint4 x;
    asm("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w) : "l"(from));
    return x;
}

// Eight bytes likewise.
__device__ __forceinline__ uint2 load_8_once(const void *from) {
    uint2 x;
    asm("ld.global.nc.L1::no_allocate.v2.u32 {%0, %1}, [%2];" : "=r"(x.x), "=r"(x.y) : "l"(from));
    return x;
}

// The sum of a warp's values up to and with the thread's own.
template <typename Word>
__device__ __forceinline__ Word warp_prefix(Word x) {
    const u32 lane = threadIdx.x % 32;
#pragma unroll
    for (u32 step = 1; step < 32; step *= 2) {
        const Word before = __shfl_up_sync(0xFFFFFFFFu, x, step);
        if (lane >= step) x += before;
    }
    return x;
}

__device__ __forceinline__ u32 shared_address(const void *pointer) {
    return static_cast<u32>(__cvta_generic_to_shared(pointer));
}

// Starts a copy of 16 bytes to shared memory; zeros where `valid` is false, and then nothing is read.
__device__ __forceinline__ void copy_16_async(u32 to, const void *from, bool valid) {
    u32 bytes = valid ? 16 : 0;
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes) : "memory");
}

// Ends the group of the copies started since the last group.
__device__ __forceinline__ void end_copy_group() {
    asm volatile("cp.async.commit_group;" ::: "memory");
}

// Waits until at most `PENDING` groups of this thread's copies are under way.
template <int PENDING>
__device__ __forceinline__ void wait_copy_groups() {
    asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

// Waits for the kernels before this one, then lets the next kernel of the stream take its place while this one runs. Every thread passes here
// once. Nothing that a kernel of the same step writes may be read earlier. Launches that do not overlap pass without a pause.
__device__ __forceinline__ void enter_stream() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
