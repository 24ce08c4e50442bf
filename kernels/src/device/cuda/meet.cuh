// Where blocks of one launch wait for each other. Blocks of a lane follow each other in the grid and start in that order, so that whoever
// waits waits for blocks that run.
#pragma once
#include "common.cuh"

// Words that other blocks of this launch, or another kernel, may be writing.
__device__ __forceinline__ u32 load_shared(const u32* from) {
    u32 x;
    asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(x) : "l"(from) : "memory");
    return x;
}

__device__ __forceinline__ uint4 load_4_shared(const u32* from) {
    uint4 x;
    asm volatile("ld.relaxed.gpu.global.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w) : "l"(from) : "memory");
    return x;
}

__device__ __forceinline__ float2 load_2_shared(const float* from) {
    float2 x;
    asm volatile("ld.relaxed.gpu.global.v2.f32 {%0, %1}, [%2];" : "=f"(x.x), "=f"(x.y) : "l"(from) : "memory");
    return x;
}

// Waits until all blocks of a lane have come here, each of which counts `own` of a launch's `all` arrivals; `arrivals` counts on from launch to
// launch. What they wrote before is seen after, by the loads above.
__device__ __forceinline__ void meet(u32* arrivals, u32 own, u32 all) {
    __syncthreads();
    if (threadIdx.x == 0) {
        u32 before, now;
        asm volatile("atom.add.acq_rel.gpu.global.u32 %0, [%1], %2;" : "=r"(before) : "l"(arrivals), "r"(own) : "memory");
        const u32 wanted = before - before % all + all;
        do asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(now) : "l"(arrivals) : "memory");
        while ((int)(now - wanted) < 0);
    }
    __syncthreads();
}
