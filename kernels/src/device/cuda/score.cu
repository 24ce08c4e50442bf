// Label scores and importance keys, by the definition at `ScoreJob` (kernels/src/device/mod.rs).
//
// `sample` scores the sampled rows for every head's log-sum-exp; `score` passes over all labels once and writes keys, and counts their
// upper bits for select.cu.
#include "types.cuh"
#include "append.cuh"
#include "tile.cuh"

constexpr u32 SAMPLE_THREADS = 512;
constexpr u32 SCORE_THREADS = 512;
// 2^-121, the importance of key 0, and the bits that a key leaves out: kernels/src/select.
constexpr float SMALLEST_KEYED = 3.76158192263132e-37f;
constexpr u32 KEY_SHIFT = 14;
constexpr float LOWEST = -3.0e38f;

// Asks the second-level cache for a line.
__device__ __forceinline__ void ask_for(const void* line) { asm volatile("prefetch.global.L2 [%0];" ::"l"(line)); }

// A running sum of powers of two.
struct PowerSum {
    float largest, sum;
};

__device__ __forceinline__ PowerSum joined(PowerSum a, PowerSum b) {
    const float largest = fmaxf(a.largest, b.largest);
    return {largest, a.sum * exp2_fast(a.largest - largest) + b.sum * exp2_fast(b.largest - largest)};
}

// The sum of sixteen neighbouring threads, in an order that is always the same.
__device__ __forceinline__ PowerSum joined_by_16(PowerSum own) {
#pragma unroll
    for (int step = 1; step < 16; step *= 2) {
        const PowerSum other = {__shfl_xor_sync(0xFFFFFFFFu, own.largest, step), __shfl_xor_sync(0xFFFFFFFFu, own.sum, step)};
        own = joined(own, other);
    }
    return own;
}

// The rows that give the log-sum-exps: all of the first and the newest chunk, and of every other chunk one block of 16 in `stride`.
struct Sample {
    u32 chunks, log_stride, blocks;
};

__device__ __forceinline__ Sample sample_of(u32 chunks) {
    u32 log_stride = 0;
    while (log_stride < 4 && 64u << log_stride < chunks) log_stride++;
    const u32 whole = min(chunks, 2);
    return {chunks, log_stride, whole * 16 + ((chunks - whole) << (4 - log_stride))};
}

// One block of the sample: its chunk, its place in the chunk, and log2 of how many blocks it stands for.
struct SampledBlock {
    u32 chunk, block;
    float weight;
};

__device__ __forceinline__ SampledBlock sampled_block(const Sample sample, u32 index) {
    if (index < 16) return {0, index, 0.0f};
    if (index < 32) return {sample.chunks - 1, index - 16, 0.0f};
    const u32 log_a_chunk = 4 - sample.log_stride, chunk = 1 + ((index - 32) >> log_a_chunk);
    const u32 in_chunk = (index - 32) & ((1u << log_a_chunk) - 1);
    return {chunk, (in_chunk << sample.log_stride) + (5 * chunk & ((1u << sample.log_stride) - 1)), (float)sample.log_stride};
}

// Asks the second-level cache for this block's share of the sample: a warp's units, in the order in which it will score them.
__device__ __forceinline__ void ask_for_sample(const StepJob& job, const SequenceState& sequence, const LayerPlace& place, const Sample rows, u32 lane, u32 part) {
    constexpr u32 A_UNIT = 2 * LOADS, LINES = (16 * LABEL_BYTES + 127) / 128;
    const u32 warp = threadIdx.x / 32, thread = threadIdx.x % 32;
    for (u32 unit = part + SAMPLE_PARTS * warp; unit * A_UNIT < rows.blocks; unit += SAMPLE_PARTS * (SAMPLE_THREADS / 32)) {
        for (u32 line = thread; line < A_UNIT * LINES; line += 32) {
            const SampledBlock block = sampled_block(rows, min(unit * A_UNIT + line / LINES, rows.blocks - 1));
            ask_for(label_page(job, sequence, place, block.chunk, lane) + block.block * 16 * LABEL_BYTES + line % LINES * 128);
        }
    }
}

extern "C" __global__ void __launch_bounds__(SAMPLE_THREADS) sample(const StepJob job) {
    __shared__ LaneWeights weights;
    __shared__ PowerSum warp_sums[SAMPLE_THREADS / 32][8 * COLUMN_TILES];
    enter_stream();
    const u32 lane = blockIdx.y, slot = blockIdx.z, part = blockIdx.x;
    const SequenceState sequence = reinterpret_cast<const SequenceState*>(job.sequences)[slot];
    const LayerPlace place = reinterpret_cast<const LayerPlace*>(job.places)[slot];
    if (sequence.length == 0) return;
    if (part == 1) append_row(job, sequence, place, slot, lane);
    if (sequence.chunks == 0) return;
    const u64 own_lane = slot * job.lanes + lane;
    // What the kernels after this one count in.
    for (u32 bin = part * SAMPLE_THREADS + threadIdx.x; bin < BINS; bin += SAMPLE_PARTS * SAMPLE_THREADS) {
        reinterpret_cast<u32*>(job.histogram)[own_lane * BINS + bin] = 0;
        reinterpret_cast<u32*>(job.victim_bins)[own_lane * BINS + bin] = 0;
    }
    if (part == 0 && threadIdx.x == 0) reinterpret_cast<VictimCounts*>(job.victim_counts)[own_lane] = {0, 0, 0, 0};
    const Sample rows = sample_of(sequence.chunks);
    ask_for_sample(job, sequence, place, rows, lane, part);
    make_weights(job, slot, lane, weights);
    if (part == 0)
        for (u32 word = threadIdx.x; word < WEIGHT_WORDS; word += SAMPLE_THREADS)
            reinterpret_cast<u32*>(job.weights)[own_lane * WEIGHT_WORDS + word] = reinterpret_cast<const u32*>(&weights)[word];
    Fragments fragments;
    fragments_of_group<0>(weights, fragments);
    const u32 warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    PowerSum sums[COLUMN_TILES][2];
#pragma unroll
    for (u32 tile = 0; tile < COLUMN_TILES; tile++) sums[tile][0] = sums[tile][1] = {LOWEST, 0.0f};
    constexpr u32 A_UNIT = 2 * LOADS;
    for (u32 unit = part + SAMPLE_PARTS * warp; unit * A_UNIT < rows.blocks; unit += SAMPLE_PARTS * (SAMPLE_THREADS / 32)) {
        const u8* from[LOADS];
#pragma unroll
        for (u32 load = 0; load < LOADS; load++) {
            const SampledBlock block = sampled_block(rows, min(unit * A_UNIT + 2 * load + g / 4, rows.blocks - 1));
            from[load] = label_page(job, sequence, place, block.chunk, lane) + block.block * 16 * LABEL_BYTES;
        }
        const float zero[COLUMN_TILES][2] = {};
        const Scores scores = score_unit(from, fragments, zero);
#pragma unroll
        for (u32 tile = 0; tile < COLUMN_TILES; tile++) {
#pragma unroll
            for (u32 sum = 0; sum < SUMS; sum++) {
#pragma unroll
                for (u32 i = 0; i < 4; i++) {
                    const u32 index = unit * A_UNIT + row_of(sum, i % 2) / 16;
                    const float weight = sampled_block(rows, min(index, rows.blocks - 1)).weight;
                    if (index < rows.blocks) sums[tile][i % 2] = joined(sums[tile][i % 2], {scores.x[tile][sum][i] + weight, 1.0f});
                }
            }
        }
    }
    // Threads whose columns are of one head: the same t (all g), and every PADDED / 2 threads of them.
#pragma unroll
    for (u32 tile = 0; tile < COLUMN_TILES; tile++) {
#pragma unroll
        for (u32 column = 0; column < 2; column++) {
            PowerSum& own = sums[tile][column];
#pragma unroll
            for (int step = PADDED <= 2 ? 1 : PADDED / 2; step < 32; step *= 2) {
                const PowerSum other = {__shfl_xor_sync(0xFFFFFFFFu, own.largest, step), __shfl_xor_sync(0xFFFFFFFFu, own.sum, step)};
                own = joined(own, other);
            }
        }
        if constexpr (PADDED == 1) sums[tile][0] = joined(sums[tile][0], sums[tile][1]);
        if (g == 0) {
            if (2 * t < PADDED) warp_sums[warp][8 * tile + 2 * t] = sums[tile][0];
            if (2 * t + 1 < PADDED) warp_sums[warp][8 * tile + 2 * t + 1] = sums[tile][1];
        }
    }
    __syncthreads();
    // Sixteen threads a head, one for each warp.
    static_assert(SAMPLE_THREADS / 32 == 16 && 16 * GROUP <= SAMPLE_THREADS, "a thread for each warp and head");
    if (threadIdx.x < (16 * GROUP + 31) / 32 * 32) {
        const u32 head = min(threadIdx.x / 16, GROUP - 1);
        const PowerSum all = joined_by_16(warp_sums[threadIdx.x % 16][head]);
        if (threadIdx.x % 16 == 0 && threadIdx.x / 16 < GROUP)
            reinterpret_cast<PowerSum*>(job.label_lse)[(own_lane * GROUP + head) * SAMPLE_PARTS + part] = all;
    }
}

// Log-sum-exps (log2) of the lane's heads; a barrier must follow.
__device__ __forceinline__ void set_lse(const StepJob& job, u64 own_lane, float* lse) {
    static_assert(SAMPLE_PARTS == 16 && 16 * GROUP <= SCORE_THREADS, "a thread for each part and head");
    if (threadIdx.x < (16 * GROUP + 31) / 32 * 32) {
        const u32 head = min(threadIdx.x / 16, GROUP - 1);
        const PowerSum* parts = reinterpret_cast<const PowerSum*>(job.label_lse) + (own_lane * GROUP + head) * SAMPLE_PARTS;
        const PowerSum all = joined_by_16(parts[threadIdx.x % 16]);
        if (threadIdx.x % 16 == 0) lse[head] = all.largest + log2f(all.sum);
    }
}

// The largest float below 128: its key is the largest.
constexpr float LARGEST_KEYED = 127.99999f;

__device__ __forceinline__ u32 key_of(float importance) {
    const float keyed = fminf(fmaxf(importance, SMALLEST_KEYED), LARGEST_KEYED);
    return (__float_as_uint(keyed) - __float_as_uint(SMALLEST_KEYED)) >> KEY_SHIFT;
}

// 2^floor(y) * (1 + y - floor(y)), y between -126 and 7, from y * 2^23 + 127 * 2^23: the bits of the result.
__device__ __forceinline__ float piecewise_exp2(float shifted) {
    const float clamped = fminf(fmaxf(shifted, 8388608.0f), 134.0f * 8388608.0f);
    return __int_as_float(__float2int_rz(clamped));
}

// Consecutive units that a warp scores: all of one chunk.
constexpr u32 RUN = UNITS_A_CHUNK < 4 ? UNITS_A_CHUNK : 4;
// Runs that a warp asks for ahead of the one that it scores.
constexpr u32 AHEAD = 1;

// Sums a row's importance over the threads that hold its heads, and writes two rows' keys. `keys` are those of the run, `row` counts in it.
__device__ __forceinline__ void write_keys(float first, float second, bool writes, u32 row, u32 sinks, const u16* trace, u32 trace_row, u32 run, u16* keys, u32* bins) {
#pragma unroll
    for (int step = 1; step < (int)PADDED / 2; step *= 2) {
        first += __shfl_xor_sync(0xFFFFFFFFu, first, step);
        second += __shfl_xor_sync(0xFFFFFFFFu, second, step);
    }
    if (!writes) return;
    u32 low = key_of(first), high = key_of(second);
#ifdef TRACE_KEYS
    // A bench replays recorded selections: the computed keys are thrown away (at the very end, so that they are computed).
    if (first != -1.0f && trace) low = trace[(trace_row + row) / run], high = trace[(trace_row + row + 1) / run];
#endif
    if (row < sinks) low = 0xFFFF;
    if (row + 1 < sinks) high = 0xFFFF;
    *reinterpret_cast<u32*>(keys + row) = low | high << 16;
    atomicAdd(&bins[low / REFINED], 1);
    atomicAdd(&bins[high / REFINED], 1);
}

__device__ __forceinline__ const u8* first_of_run(const StepJob& job, const SequenceState& sequence, const LayerPlace& place, u32 lane, u32 run) {
    constexpr u32 RUNS_A_CHUNK = UNITS_A_CHUNK / RUN;
    return label_page(job, sequence, place, run / RUNS_A_CHUNK, lane) + run % RUNS_A_CHUNK * (RUN * UNIT * LABEL_BYTES);
}

__device__ __forceinline__ void ask_for_run(const u8* first) {
    constexpr u32 BYTES = RUN * UNIT * LABEL_BYTES;
#pragma unroll
    for (u32 line = 0; line < (BYTES + 127) / 128; line += 32)
        if (line + threadIdx.x % 32 < (BYTES + 127) / 128) ask_for(first + (line + threadIdx.x % 32) * 128);
}

extern "C" __global__ void __launch_bounds__(SCORE_THREADS, 2) score(const StepJob job) {
    __shared__ LaneWeights weights;
    __shared__ float lse[GROUP];
    __shared__ u32 bins[BINS];
    for (u32 bin = threadIdx.x; bin < BINS; bin += SCORE_THREADS) bins[bin] = 0;
    enter_stream();
    const u32 lane = blockIdx.y, slot = blockIdx.z;
    const SequenceState sequence = reinterpret_cast<const SequenceState*>(job.sequences)[slot];
    const LayerPlace place = reinterpret_cast<const LayerPlace*>(job.places)[slot];
    if (sequence.length == 0 || sequence.chunks == 0) return;
    const u64 own_lane = slot * job.lanes + lane;
    const u32 runs = sequence.chunks * (UNITS_A_CHUNK / RUN);
    constexpr u32 WARPS = SCORE_THREADS / 32;
    const u32 stride = gridDim.x * WARPS, begin = blockIdx.x * WARPS + threadIdx.x / 32;
    // Where this warp's next run lies is always known a run ahead, and its labels are on their way.
    const u8* next = first_of_run(job, sequence, place, lane, min(begin, runs - 1));
    ask_for_run(next);
    set_lse(job, own_lane, lse);
    fetch_weights(job, own_lane, weights);
    Fragments fragments;
    fragments_of_group<0>(weights, fragments);
    const u32 g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    // Scores are counted in units of 2^-23, from the bits of 1: piecewise_exp2.
    float bias[COLUMN_TILES][2];
#pragma unroll
    for (u32 tile = 0; tile < COLUMN_TILES; tile++) {
#pragma unroll
        for (u32 column = 0; column < 2; column++) {
            const u32 head = 8 * tile + (2 * t + column) % PADDED;
            // Columns without a head give the least power there is, which no key shows.
            bias[tile][column] = head < GROUP ? (127.0f - lse[head < GROUP ? head : 0]) * 8388608.0f : LOWEST;
#pragma unroll
            for (u32 plane = 0; plane < PLANES; plane++) fragments.factors[tile][plane][column] *= 8388608.0f;
        }
    }
    u16* keys = reinterpret_cast<u16*>(job.keys) + own_lane * job.max_rows;
    const u16* trace = job.trace ? reinterpret_cast<const u16*>(job.trace) + own_lane * job.trace_rows : nullptr;
    // Positions of the trace are stretched in runs.
    const u32 trace_run = trace ? job.max_rows / job.trace_rows : 1;
    const bool writes = PADDED <= 2 || t % (PADDED / 2) == 0;
    for (u32 run = begin; run < runs; run += stride) {
        const u8* first = next + g / 4 * 16 * LABEL_BYTES;
        next = first_of_run(job, sequence, place, lane, min(run + AHEAD * stride, runs - 1));
        ask_for_run(next);
        const u32 base = run * (RUN * UNIT);
        const u32 sinks = base < sequence.sinks ? sequence.sinks - base : 0;
        u16* to = keys + base;
#pragma unroll
        for (u32 unit = 0; unit < RUN; unit++) {
            const u8* from[LOADS];
#pragma unroll
            for (u32 load = 0; load < LOADS; load++) from[load] = first + (unit * UNIT + load * 32) * LABEL_BYTES;
            const Scores scores = score_unit(from, fragments, bias);
#pragma unroll
            for (u32 sum = 0; sum < SUMS; sum++) {
                float importance[4];
#pragma unroll
                for (u32 i = 0; i < 4; i++) {
                    importance[i] = piecewise_exp2(scores.x[0][sum][i]);
#pragma unroll
                    for (u32 tile = 1; tile < COLUMN_TILES; tile++) importance[i] += piecewise_exp2(scores.x[tile][sum][i]);
                }
                const u32 row = unit * UNIT + row_of(sum, 0);
                if constexpr (PADDED == 1) {
                    // Two columns are two products' rows.
                    write_keys(importance[0], importance[2], true, row, sinks, trace, base, trace_run, to, bins);
                    write_keys(importance[1], importance[3], true, unit * UNIT + row_of(sum, 1), sinks, trace, base, trace_run, to, bins);
                } else {
                    write_keys(importance[0] + importance[1], importance[2] + importance[3], writes, row, sinks, trace, base, trace_run, to, bins);
                }
            }
        }
    }
    __syncthreads();
    u32* histogram = reinterpret_cast<u32*>(job.histogram) + own_lane * BINS;
    for (u32 bin = threadIdx.x; bin < BINS; bin += SCORE_THREADS)
        if (bins[bin]) atomicAdd(&histogram[bin], bins[bin]);
}
