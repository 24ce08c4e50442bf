// Tensor-core products. Layouts: PTX ISA, "Matrix Fragments for mma.m16n8k16 /
// m16n8k32". A thread of a warp is (g, t) = (lane / 4, lane % 4).
#pragma once
#include "common.cuh"

// a 16 x 32 of unsigned bytes by b 32 x 8 of signed bytes, added to c.
__device__ __forceinline__ void mma_bytes(int (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    asm("mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// a 16 x 16 by b 16 x 8, likewise.
__device__ __forceinline__ void mma_bytes(int (&c)[4], const u32 (&a)[2], u32 b) {
    asm("mma.sync.aligned.m16n8k16.row.col.s32.u8.s8.s32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
                 : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(b));
}

#if ROW_TYPE != ROW_F32
// a 16 x 16 by b 16 x 8 of row elements, added to c.
__device__ __forceinline__ void mma_rows(float (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
#if ROW_TYPE == ROW_BF16
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
#else
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
#endif
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// A float pair as the sum of two packed pairs: what the first loses, the second holds.
struct Split {
    u32 high, low;
};
__device__ __forceinline__ Split split_rows(float first, float second) {
    Split split;
    split.high = pack_pair(first, second);
    split.low = pack_pair(first - low_of_pair(split.high), second - high_of_pair(split.high));
    return split;
}

#endif

// The 8 x 8 matrix of 16-bit elements that a warp holds, transposed.
__device__ __forceinline__ u32 transposed(u32 matrix) {
    u32 result;
    asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(result) : "r"(matrix));
    return result;
}
