// Words that blocks of a launch give each other: a value, and above it the launch that it is of, so that a word needs no other signal.
#pragma once
#include "common.cuh"

__device__ __forceinline__ void give_word(u64* to, u32 value, u32 launch) {
    asm volatile("st.relaxed.gpu.global.u64 [%0], %1;" ::"l"(to), "l"((u64)launch << 32 | value) : "memory");
}

// A word as it is now.
__device__ __forceinline__ u64 word_now(const u64* from) {
    u64 word;
    asm volatile("ld.relaxed.gpu.global.u64 %0, [%1];" : "=l"(word) : "l"(from) : "memory");
    return word;
}

// Two words as they are now. Says whether both are of the launch.
__device__ __forceinline__ bool take_pair(const u64* from, u32 launch, u64 (&pair)[2]) {
    asm volatile("ld.relaxed.gpu.global.v2.u64 {%0, %1}, [%2];" : "=l"(pair[0]), "=l"(pair[1]) : "l"(from) : "memory");
    return pair[0] >> 32 == launch && pair[1] >> 32 == launch;
}
