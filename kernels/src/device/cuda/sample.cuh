// The log-sum-exps of a lane's label scores, from a sample of the rows, which the blocks of the lane sum together.
#pragma once
#include "tile.cuh"
#include "words.cuh"

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

// Bytes for a warp's sampled unit, where they suffice.
constexpr u32 WARP_UNIT = BINS * 4 / WARPS;

// Room that the block's threads share.
struct Room {
    // First a warp's sampled unit, where it fits, then the histogram.
    union {
        __align__(16) u8 units[WARPS][WARP_UNIT];
        u32 bins[BINS];
    };
    Coder coder;
    LaneWeights weights;
    u64 places[SCORE_THREADS];
    PowerSum sums[GROUP][WARPS];
    float lse[GROUP];
    u32 launch;
};

// Where labels are read: from shared memory, or from the device's.
template <bool STAGED>
__device__ __forceinline__ auto read_from(u32 stage, const u8* labels) {
    if constexpr (STAGED) return stage;
    else return labels;
}
constexpr bool UNIT_FITS = UNIT_BYTES <= WARP_UNIT;

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

// Arrivals that a launch counts, whatever its blocks: how many launches there were is in the upper bits.
constexpr u32 LAUNCH_ARRIVALS = 128;

// Waits until all blocks have arrived that the launch has, `before` of which the usher was told.
__device__ __forceinline__ void await_arrivals(const u32* arrivals, const u32& before) {
    const u32 wanted = (before / LAUNCH_ARRIVALS + 1) * LAUNCH_ARRIVALS;
    u32 now;
    do asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(now) : "l"(arrivals) : "memory");
    while ((int)(now - wanted) < 0);
}

// Gives the log-sum-exps (log2) of the sums that the block's warps made together. `to`: [head][SAMPLE_SUMS].
__device__ __forceinline__ void give_sums(const Room& room, u64* to) {
    static_assert(WARPS == 16, "sixteen threads a head");
    for (u32 first = 0; first < WARPS * GROUP; first += SCORE_THREADS) {
        const u32 own = first + threadIdx.x, head = own / WARPS;
        if (own / 32 * 32 >= WARPS * GROUP) return;
        const PowerSum all = joined_by_16(room.sums[min(head, GROUP - 1)][own % WARPS]);
        if (own % WARPS == 0 && head < GROUP) give_word(to + head * SAMPLE_SUMS, __float_as_uint(all.largest + log2f(all.sum)), room.launch);
    }
}

// The log-sum-exp of a head from those of `count` sums of all blocks, by a warp.
__device__ __forceinline__ void take_lse_of_head(const u64* from, u32 count, const u32& launch, float& to) {
    static_assert(SAMPLE_SUMS == 64, "two a thread");
    const u32 own = threadIdx.x % 32;
    const float first = own < count ? __uint_as_float(take_word(from + own, launch)) : LOWEST;
    const float second = own + 32 < count ? __uint_as_float(take_word(from + own + 32, launch)) : LOWEST;
    const float largest = warp_max(fmaxf(first, second));
    float sum = exp2_fast(first - largest) + exp2_fast(second - largest);
#pragma unroll
    for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(0xFFFFFFFFu, sum, step);
    if (own == 0) to = largest + log2f(sum);
}

// Those of the lane's heads, by the first warps; a barrier is to follow.
__device__ __forceinline__ void take_lse(const u64* from, u32 count, Room& room) {
    for (u32 head = threadIdx.x / 32; head < GROUP; head += WARPS) take_lse_of_head(from + head * SAMPLE_SUMS, count, room.launch, room.lse[head]);
}

// Whose thread counts the block.
constexpr u32 USHER = SCORE_THREADS - 32;

// Clears what blocks of the lane, and the kernels after this one, count in, and counts the block: whoever adds to it does so after all have
// arrived. By a warp, whose first thread learns of the arrivals before.
__device__ __forceinline__ void begin_counts(const StepJob& job, const u64& own_lane, const u32& sums_given, u64* const& given, u32* const& arrivals, u32& before) {
    for (u32 bin = blockIdx.x * 32 + threadIdx.x % 32; bin < BINS; bin += gridDim.x * 32) reinterpret_cast<u32*>(job.histogram)[own_lane * BINS + bin] = 0;
    if (blockIdx.x == 0) {
        // Sums that are not given are of no launch.
        for (u32 sum = sums_given + threadIdx.x % 32; sum < SAMPLE_SUMS; sum += 32)
            for (u32 head = 0; head < GROUP; head++) given[head * SAMPLE_SUMS + sum] = 0;
        if (threadIdx.x % 32 == 0) reinterpret_cast<VictimCounts*>(job.victim_counts)[own_lane] = {};
    }
    __syncwarp();
    if (threadIdx.x % 32 == 0) {
        const u32 counts = blockIdx.x == 0 ? LAUNCH_ARRIVALS - (gridDim.x - 1) : 1;
        asm volatile("atom.add.release.gpu.global.u32 %0, [%1], %2;" : "=r"(before) : "l"(arrivals), "r"(counts) : "memory");
    }
}

// Sums the block's part of the sample and gives the sums. The labels of unit `own_sum` of each warp are asked for.
__device__ __forceinline__ void sum_sample(const SequenceState& sequence, const LayerPlace& place, const Sample& rows, const SampleUnits& units, const u32& lane, const u32& before, const Fragments<Alone>& fragments, const u32& own_sum, u64* const& given, Room& room) {
    const u32 warp = threadIdx.x / 32;
    for (u32 first = blockIdx.x * WARPS;; first += gridDim.x * WARPS) {
        const u32 sum = first + warp;
        if (sum < units.sums) {
            sum_units(sequence, place, rows, sum * units.each, min(units.count, (sum + 1) * units.each), lane, room.units[warp], fragments, sum == own_sum, &room.sums[0][warp]);
        } else if (threadIdx.x % 32 == 0) {
            for (u32 head = 0; head < GROUP; head++) room.sums[head][warp] = {LOWEST, 0.0f};
        }
        if (threadIdx.x == USHER) room.launch = before / LAUNCH_ARRIVALS + 1;
        __syncthreads();
        if (first < units.sums) give_sums(room, given + first / WARPS);
        if (first + gridDim.x * WARPS >= units.sums) break;
        __syncthreads();
    }
}
