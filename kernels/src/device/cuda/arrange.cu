// Rows of many tokens as a model makes them, token after token, to pages of 256 tokens, lane after lane.
#include "common.cuh"

struct ArrangeJob {
    u64 rows;  // [token][lane] rows
    u64 tail;  // pages; chunk c lies at page c % tail_chunks
    u32 first_position;
    u32 tokens;
    u32 lanes;
    u32 tail_chunks;
};
static_assert(sizeof(ArrangeJob) == ARRANGE_JOB_BYTES, "the job is the same on both sides");

constexpr u32 UNITS = ROW_BYTES / 16;

extern "C" __global__ void __launch_bounds__(256) arrange_rows(const ArrangeJob job) {
    const uint4 *from = reinterpret_cast<const uint4 *>(job.rows);
    uint4 *tail = reinterpret_cast<uint4 *>(job.tail);
    u32 units = job.tokens * job.lanes * UNITS;
    for (u32 at = blockIdx.x * blockDim.x + threadIdx.x; at < units; at += gridDim.x * blockDim.x) {
        u32 row = at / UNITS, unit = at % UNITS, lane = row % job.lanes, position = job.first_position + row / job.lanes;
        u64 page = position / CHUNK_TOKENS % job.tail_chunks;
        tail[((page * job.lanes + lane) * CHUNK_TOKENS + position % CHUNK_TOKENS) * UNITS + unit] = load_16_once(from + at);
    }
}
