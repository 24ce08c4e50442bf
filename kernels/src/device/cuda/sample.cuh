// Sums of a lane's label scores over a sample of its rows, by blocks of the lane: what its heads' log-sum-exps are made of.
#pragma once
#include "tile.cuh"

constexpr u32 SCORE_THREADS = 512;
constexpr u32 WARPS = SCORE_THREADS / 32;
constexpr float LOWEST = -3.0e38f;

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

constexpr u32 UNIT_BYTES = UNIT * LABEL_BYTES;
// Sampled blocks of a unit.
constexpr u32 A_UNIT = 2 * LOADS;
// Sums of sampled units that a head has at most, one a warp.
constexpr u32 UNIT_SUMS = SAMPLE_SUMS * WARPS;

// Bytes of a unit that a warp copies to shared memory, 16 a thread; larger ones are read where they are.
constexpr bool UNIT_FITS = UNIT_BYTES <= 512;

// Room that the threads of a block of `sample` share.
struct SampleRoom {
    __align__(16) u8 units[WARPS][UNIT_FITS ? UNIT_BYTES : 16];
    Coder coder;
    LaneWeights weights;
    PowerSum sums[GROUP][WARPS];
};

// Where labels are read: from shared memory, or from the device's.
template <bool STAGED>
__device__ __forceinline__ auto read_from(u32 stage, const u8* labels) {
    if constexpr (STAGED) return stage;
    else return labels;
}

// The place of a sampled block's labels.
__device__ __forceinline__ const u8* sampled_labels(const SequenceState& sequence, const LayerPlace& place, const Sample rows, u32 index, u32 lane) {
    const SampledBlock block = sampled_block(rows, min(index, rows.blocks - 1));
    return label_page(sequence, place, block.chunk, lane) + block.block * 16 * LABEL_BYTES;
}

// The thread's 16 bytes of a unit of the sample: where they lie.
__device__ __forceinline__ const u8* piece_of_unit(const SequenceState& sequence, const LayerPlace& place, const Sample rows, u32 unit, u32 lane) {
    const u32 piece = min(threadIdx.x % 32, UNIT_BYTES / 16 - 1);
    return sampled_labels(sequence, place, rows, unit * A_UNIT + piece / LABEL_BYTES, lane) + piece % LABEL_BYTES * 16;
}

// Starts the copy of a unit of the sample, by a warp.
__device__ __forceinline__ void ask_for_unit(const u8* piece, u8* to) {
    if (threadIdx.x % 32 < UNIT_BYTES / 16) copy_16_async(shared_address(to + threadIdx.x % 32 * 16), piece, true);
}

// Asks the second-level cache for a line.
__device__ __forceinline__ void ask_for(const void* line) { asm volatile("prefetch.global.L2 [%0];" ::"l"(line)); }

// How the sample's units are summed: `each` by one warp, as the length says and nothing else, so that sums are always the same.
struct SampleUnits {
    u32 count, each, sums;
};

__device__ __forceinline__ SampleUnits units_of(const Sample rows) {
    const u32 count = (rows.blocks + A_UNIT - 1) / A_UNIT, each = (count + UNIT_SUMS - 1) / UNIT_SUMS;
    return {count, each, each ? (count + each - 1) / each : 0};
}

// Scores units `first` to `end`, and writes each head's sum of powers to `to`, [head][WARPS]. By a warp.
__device__ __forceinline__ void sum_units(const SequenceState& sequence, const LayerPlace& place, const Sample rows, u32 first, u32 end, u32 lane, u8* room, const Fragments<Alone>& fragments, bool asked, PowerSum* to) {
    const u32 g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    PowerSum sums[HEAD_TILES][2];
#pragma unroll
    for (u32 tile = 0; tile < HEAD_TILES; tile++) sums[tile][0] = sums[tile][1] = {LOWEST, 0.0f};
    for (u32 unit = first; unit < end; unit++) {
        if constexpr (UNIT_FITS) {
            if (unit > first || !asked) {
                __syncwarp();
                ask_for_unit(piece_of_unit(sequence, place, rows, unit, lane), room);
                end_copy_group();
                wait_copy_groups<0>();
            }
            __syncwarp();
        }
        decltype(read_from<UNIT_FITS>(0, nullptr)) from[LOADS];
#pragma unroll
        for (u32 load = 0; load < LOADS; load++) {
            const u32 block = 2 * load + g / 4;
            from[load] = read_from<UNIT_FITS>(shared_address(room) + block * 16 * LABEL_BYTES, sampled_labels(sequence, place, rows, unit * A_UNIT + block, lane));
        }
        const Scores<Alone> scores = scores_of(CodesInPlace<Alone, decltype(read_from<UNIT_FITS>(0, nullptr))>{from, fragments.shifts}, 0, fragments);
#pragma unroll
        for (u32 tile = 0; tile < HEAD_TILES; tile++) {
#pragma unroll
            for (u32 sum = 0; sum < Alone::SUMS; sum++) {
#pragma unroll
                for (u32 i = 0; i < 4; i++) {
                    const u32 index = unit * A_UNIT + row_of<Alone>(sum, i % 2) / 16;
                    const float weight = sampled_block(rows, min(index, rows.blocks - 1)).weight;
                    if (index < rows.blocks) sums[tile][i % 2] = joined(sums[tile][i % 2], {scores.x[tile][sum][i] + weight, 1.0f});
                }
            }
        }
    }
    // Threads whose columns are of one head: the same t (all g), and every PADDED / 2 threads of them.
#pragma unroll
    for (u32 tile = 0; tile < HEAD_TILES; tile++) {
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
#pragma unroll
        for (u32 column = 0; column < 2; column++) {
            const u32 of = 2 * t + column, head = 8 * tile + of;
            if (g == 0 && of < PADDED && head < GROUP) to[head * WARPS] = sums[tile][column];
        }
    }
}

// Writes the log-sum-exps (log2) of the sums that the block's warps made together. `to`: [head][SAMPLE_SUMS].
__device__ __forceinline__ void write_sums(const SampleRoom& room, float* to) {
    static_assert(WARPS == 16, "sixteen threads a head");
    for (u32 first = 0; first < WARPS * GROUP; first += SCORE_THREADS) {
        const u32 own = first + threadIdx.x, head = own / WARPS;
        if (own / 32 * 32 >= WARPS * GROUP) return;
        const PowerSum all = joined_by_16(room.sums[min(head, GROUP - 1)][own % WARPS]);
        if (own % WARPS == 0 && head < GROUP) to[head * SAMPLE_SUMS] = all.largest + log2f(all.sum);
    }
}

// Sums the block's part of the sample, and writes the sums. The labels of unit `own_sum` of each warp are asked for.
__device__ __forceinline__ void sum_sample(const SequenceState& sequence, const LayerPlace& place, const Sample& rows, const SampleUnits& units, u32 lane, const Fragments<Alone>& fragments, u32 own_sum, float* sums, SampleRoom& room) {
    const u32 warp = threadIdx.x / 32;
    for (u32 first = blockIdx.x * WARPS; first < units.sums; first += gridDim.x * WARPS) {
        const u32 sum = first + warp;
        if (sum < units.sums) {
            sum_units(sequence, place, rows, sum * units.each, min(units.count, (sum + 1) * units.each), lane, room.units[warp], fragments, sum == own_sum, &room.sums[0][warp]);
        } else if (threadIdx.x % 32 == 0) {
            for (u32 head = 0; head < GROUP; head++) room.sums[head][warp] = {LOWEST, 0.0f};
        }
        __syncthreads();
        write_sums(room, sums + first / WARPS);
        __syncthreads();
    }
}

// Clears what the kernels after this one count in.
__device__ __forceinline__ void clear_counts(const StepJob& job, u32 lane) {
    for (u32 bin = blockIdx.x * SCORE_THREADS + threadIdx.x; bin < BINS; bin += gridDim.x * SCORE_THREADS) reinterpret_cast<u32*>(job.histogram)[lane * BINS + bin] = 0;
    if (blockIdx.x == 0 && threadIdx.x == 0) reinterpret_cast<VictimCounts*>(job.victim_counts)[lane] = {};
}

// A lane's sums of sampled scores, by its blocks. Clears what the kernels after this one count in.
__device__ __forceinline__ void sample_lane(const StepJob& job, SampleRoom& room) {
    const u32 lane = job.first_lane + blockIdx.y, warp = threadIdx.x / 32;
    const SequenceState sequence = *reinterpret_cast<const SequenceState*>(job.sequences);
    const LayerPlace place = *reinterpret_cast<const LayerPlace*>(job.places);
    const u32 chunks = sequence.length ? sequence.chunks : 0;
    const Sample rows = sample_of(chunks);
    const SampleUnits units = units_of(rows);
    const u32 own_sum = blockIdx.x * WARPS + warp;
    // The queries are another kernel's, and perhaps not there yet; where they are, they come nearer.
    if (threadIdx.x < GROUP * HEAD_DIM / 32) ask_for(reinterpret_cast<const float*>(job.query) + lane * GROUP * HEAD_DIM + threadIdx.x * 32);
    if (UNIT_FITS && own_sum < units.sums) ask_for_unit(piece_of_unit(sequence, place, rows, own_sum * units.each, lane), room.units[warp]);
    end_copy_group();
    fetch_coder(job, lane, room.coder);
    __syncthreads();
    enter_stream();
    if (chunks == 0) return;
    clear_counts(job, lane);
    if (own_sum - warp >= units.sums) return;
    make_weights(job, lane, room.coder, room.weights);
    Fragments<Alone> fragments;
    fragments_of_group<0>(&room.weights, fragments);
    const float zero[HEAD_TILES][2] = {};
    set_scale(fragments, 1.0f, zero);
    wait_copy_groups<0>();
    sum_sample(sequence, place, rows, units, lane, fragments, own_sum, reinterpret_cast<float*>(job.label_lse) + lane * GROUP * SAMPLE_SUMS, room);
}

// Sums of a head of a sample, each of a block's warps.
__device__ __forceinline__ u32 sums_of(u32 chunks) { return (units_of(sample_of(chunks)).sums + WARPS - 1) / WARPS; }
