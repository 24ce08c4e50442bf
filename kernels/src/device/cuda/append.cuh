// The newest row of a sequence: to its place among the rows from the horizon on, and across the link to its open slot on the host.
#pragma once
#include "types.cuh"

// One lane's row, by all threads of the block.
__device__ __forceinline__ void append_row(const StepJob& job, const SequenceState& sequence, const LayerPlace& place, u32 slot, u32 lane) {
    const u32 row = sequence.length - 1, chunk = row / CHUNK_TOKENS;
    const u64 in_page = ((u64)lane * CHUNK_TOKENS + row % CHUNK_TOKENS) * ROW_BYTES;
    const uint4* from = reinterpret_cast<const uint4*>(job.new_rows + (u64)(slot * job.lanes + lane) * ROW_BYTES);
    uint4* tail = reinterpret_cast<uint4*>(place.tail + chunk % place.tail_chunks * job.page_bytes + in_page);
    uint4* host = nullptr;
    if (sequence.append_to != NOBODY) {
        const u64 plane = reinterpret_cast<const u64*>(job.planes)[sequence.append_to >> 16];
        host = reinterpret_cast<uint4*>(plane + (sequence.append_to & 0xFFFFu) * job.host_page_bytes + in_page);
    }
    for (u32 piece = threadIdx.x; piece < ROW_BYTES / 16; piece += blockDim.x) {
        const uint4 data = from[piece];
        tail[piece] = data;
        if (host) host[piece] = data;
    }
}
