// The pass over labels: keys of runs of rows, and their histogram.
#pragma once
#include "sample.cuh"

// 2^-121, the importance of key 0, and the bits that a key leaves out: kernels/src/select.
constexpr float SMALLEST_KEYED = 3.76158192263132e-37f;
constexpr u32 KEY_SHIFT = 14;

// Binades between the least and the largest power of a head, -126 and 7.
constexpr float BINADES = 133.0f;
// Bits of the mantissa that powers are rounded to.
constexpr u32 FRACTION = 14;
constexpr float FRACTIONS = 1 << FRACTION;

// 2^floor(y) * (1 + y - floor(y)), y clamped to [-126, 7], from (y + 126) / 133: the bits of the result are y + 127 in units of 2^-23, and
// a float of 2^23 or more has its integer in its lower bits.
__device__ __forceinline__ float piecewise_exp2(float part) {
    const float counted = __fmaf_rn(__saturatef(part), BINADES * FRACTIONS, 8388608.0f + FRACTIONS);
    return __int_as_float(__float_as_int(counted) << (23 - FRACTION));
}

// What scores of a head are counted from, in powers of `piecewise_exp2`. Columns without a head give the least power there is, which no key shows.
__device__ __forceinline__ float start_of_head(const float (&lse)[GROUP], u32 head) {
    return head < GROUP ? (126.0f - lse[head < GROUP ? head : 0]) * (1.0f / BINADES) : -1.0f;
}

// The key of a sum of powers: kernels/src/select. Its bits, counted from those of 2^-121 and bounded by those of the largest float below 128.
__device__ __forceinline__ u32 key_of(float importance) {
    const int bits = __float_as_int(importance) - __float_as_int(SMALLEST_KEYED), most = 0x42FFFFFF - __float_as_int(SMALLEST_KEYED);
#if __CUDA_ARCH__ >= 900
    u32 bounded;
    asm("min.relu.s32 %0, %1, %2;" : "=r"(bounded) : "r"(bits), "r"(most));
    return bounded >> KEY_SHIFT;
#else
    return (u32)min(max(bits, 0), most) >> KEY_SHIFT;
#endif
}

// The log-sum-exp of a head from its `count` sums, by a warp.
__device__ __forceinline__ void take_lse_of_head(const float* from, u32 count, float& to) {
    static_assert(SAMPLE_SUMS == 64, "two a thread");
    const u32 own = threadIdx.x % 32;
    const float first = own < count ? from[own] : LOWEST, second = own + 32 < count ? from[own + 32] : LOWEST;
    const float largest = warp_max(fmaxf(first, second));
    float sum = exp2_fast(first - largest) + exp2_fast(second - largest);
#pragma unroll
    for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(0xFFFFFFFFu, sum, step);
    if (own == 0) to = largest + log2f(sum);
}

// What a lane's rows are scored with: query weights of its heads, and these heads' log-sum-exps by the sums that `sample` has written. By all warps of
// the block; a barrier is to follow.
__device__ __forceinline__ void set_scorer(const StepJob& job, u32 lane, u32 sums, const Coder& coder, LaneWeights& weights, float (&lse)[GROUP]) {
    constexpr u32 TASKS = GROUP * N_GROUPS;
    const float* query = reinterpret_cast<const float*>(job.query) + lane * GROUP * HEAD_DIM;
    const float* from = reinterpret_cast<const float*>(job.label_lse) + lane * GROUP * SAMPLE_SUMS;
    for (u32 task = threadIdx.x / 32; task < TASKS + GROUP; task += WARPS) {
        if (task < TASKS) weights_of_task<0>(query, coder, job.score_scale, task, weights);
        else take_lse_of_head(from + (task - TASKS) * SAMPLE_SUMS, sums, lse[task - TASKS]);
    }
}

// A run is RUN consecutive units of a chunk as one sequence alone has them; a warp scores one after the other. With STAGES a run is a stage of
// the warp's ring.
constexpr u32 RUN_ROWS = RUN * UNIT;
constexpr u32 RUN_BYTES = RUN_ROWS * LABEL_BYTES;
constexpr u32 RUNS_A_CHUNK = CHUNK_TOKENS / RUN_ROWS;
static_assert(RUN_ROWS * RUNS_A_CHUNK == CHUNK_TOKENS, "ring.rs");

// What keys a thread makes of a unit: of consecutive rows for one sequence, or two, of each set.
template <typename C>
struct Keys {
    static constexpr u32 HELD = PADDED == 1 && C::MEMBERS > 1 ? 2 : 1;
    static constexpr u32 ROWS = C::UNIT * C::A_SET / (32 * HELD);
};

// Chunks that the warps of a block are in at a time.
constexpr u32 CHUNKS_AT_ONCE = WARPS / RUNS_A_CHUNK;
static_assert(WARPS % RUNS_A_CHUNK == 0, "whole chunks");

// Stages that are asked for at first: more would make what the block waits for wait behind them.
constexpr u32 ASKED_AT_FIRST = STAGES < 1 ? STAGES : 1;

// Starts the copy of 16 bytes of labels, which nobody reads again before the next step: they give way first.
__device__ __forceinline__ void copy_labels(u32 to, const u8* from) {
#if __CUDA_ARCH__ >= 900
    // createpolicy.fractional.L2::evict_first of everything, as a constant.
    constexpr u64 EVICT_FIRST = 0x12F0000000000000;
    asm volatile("cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "l"(EVICT_FIRST) : "memory");
#else
    copy_16_async(to, from, true);
#endif
}

// Starts the copy of a run to a stage, by a warp; both addresses are of the thread's first 16 bytes.
__device__ __forceinline__ void ask_for_run(const u8* run, u32 stage) {
#pragma unroll
    for (u32 piece = 0; piece < RUN_BYTES; piece += 512)
        if (RUN_BYTES % 512 == 0 || piece + threadIdx.x % 32 * 16 < RUN_BYTES) copy_labels(stage + piece, run + piece);
}

// Counts `times` in a word of shared memory.
__device__ __forceinline__ void count_in(u32 word, u32 times) { asm volatile("red.shared.add.u32 [%0], %1;" ::"r"(word), "r"(times)); }

// First of the thread's own rows in a unit.
template <typename C>
__device__ __forceinline__ u32 own_row() {
    const u32 g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    if constexpr (PADDED == 8 || C::WIDTH == 4 && C::MEMBERS == 1) return threadIdx.x % 32;
    else if constexpr (PADDED == 4) return 4 * g + t % 2 * 2;
    else if constexpr (C::WIDTH == 8) return 4 * g;
    else if constexpr (C::WIDTH == 4) return 4 * g + t / 2 * 2;
    else if constexpr (C::WIDTH == 2) return t / 2 * 32 + 4 * g + t % 2 * 2;
    else return t * 32 + 4 * g;
}

// Keeps one of two values and adds to it what the thread `step` away has of the same one: `second` where the thread's bit `step` is set.
__device__ __forceinline__ float shared_out(float first, float second, u32 step, u32 own) {
    const bool upper = own & step;
    const float given = upper ? first : second;
    return (upper ? second : first) + __shfl_xor_sync(0xFFFFFFFFu, given, step);
}

// Importance of the thread's own rows for the sequences of a set that it holds: powers of the heads, summed over the threads that have them,
// in the same order whatever the columns.
template <typename C>
__device__ __forceinline__ void importance_of(const Scores<C>& scores, float (&rows)[Keys<C>::HELD][Keys<C>::ROWS], u32 own) {
    float powers[C::SUMS][4];
#pragma unroll
    for (u32 sum = 0; sum < C::SUMS; sum++) {
#pragma unroll
        for (u32 i = 0; i < 4; i++) {
            powers[sum][i] = piecewise_exp2(scores.x[0][sum][i]);
#pragma unroll
            for (u32 tile = 1; tile < HEAD_TILES; tile++) powers[sum][i] += piecewise_exp2(scores.x[tile][sum][i]);
        }
    }
    if constexpr (PADDED == 1 && C::MEMBERS == 1) {
        // Two columns are two products' rows.
        rows[0][0] = powers[0][0], rows[0][1] = powers[0][2], rows[0][2] = powers[0][1], rows[0][3] = powers[0][3];
    } else if constexpr (PADDED == 1) {
        // Two columns are two sequences'.
        rows[0][0] = powers[0][0], rows[0][1] = powers[0][2], rows[1][0] = powers[0][1], rows[1][1] = powers[0][3];
    } else {
        float pairs[C::SUMS][2];
#pragma unroll
        for (u32 sum = 0; sum < C::SUMS; sum++) pairs[sum][0] = powers[sum][0] + powers[sum][1], pairs[sum][1] = powers[sum][2] + powers[sum][3];
        if constexpr (PADDED == 2) {
#pragma unroll
            for (u32 sum = 0; sum < C::SUMS; sum++) rows[0][2 * sum] = pairs[sum][0], rows[0][2 * sum + 1] = pairs[sum][1];
        }
        constexpr u32 LAST = C::SUMS - 1;
        if constexpr (PADDED == 4 && C::MEMBERS == 1) rows[0][0] = shared_out(pairs[0][0], pairs[0][1], 1, own);
        if constexpr (PADDED == 4 && C::MEMBERS > 1) rows[0][0] = shared_out(pairs[0][0], pairs[LAST][0], 1, own), rows[0][1] = shared_out(pairs[0][1], pairs[LAST][1], 1, own);
        if constexpr (PADDED == 8) rows[0][0] = shared_out(shared_out(pairs[0][0], pairs[LAST][0], 2, own), shared_out(pairs[0][1], pairs[LAST][1], 2, own), 1, own);
    }
}

// Writes keys of consecutive rows to an address of global memory.
template <u32 ROWS>
__device__ __forceinline__ void write_keys(u64 to, const u32 (&keys)[ROWS]) {
    if constexpr (ROWS == 1) asm volatile("st.global.u16 [%0], %1;" ::"l"(to), "h"((u16)keys[0]) : "memory");
    if constexpr (ROWS == 2) asm volatile("st.global.u32 [%0], %1;" ::"l"(to), "r"(keys[0] | keys[1] << 16) : "memory");
    if constexpr (ROWS == 4) asm volatile("st.global.v2.u32 [%0], {%1, %2};" ::"l"(to), "r"(keys[0] | keys[1] << 16), "r"(keys[ROWS - 2] | keys[ROWS - 1] << 16) : "memory");
}

#ifdef TRACE_KEYS
// A bench replays recorded selections: positions of the trace are stretched in runs of `rows`, 2^shift of them or as many as it takes.
struct Trace {
    const u16* keys;
    u32 rows, shift;
};

__device__ __forceinline__ u32 traced(const Trace& trace, u32 row) { return trace.keys[trace.shift < 32 ? row >> trace.shift : row / trace.rows]; }
#endif


// Where what a thread makes of a run goes, by set and sequence that it holds.
template <typename C>
struct Outlet {
    u64 keys[C::SETS][Keys<C>::HELD];  // of the run's first own row, in global memory
    u32 bins[C::SETS][Keys<C>::HELD];  // histograms in shared memory
};

// How the codes of a unit are taken: for several sets they are kept, so that only one set's sums take registers at a time.
template <typename C, typename Address, bool SEVERAL = (C::SETS > 1)>
struct WhichCodes {
    typedef CodesInPlace<C, Address> type;
};
template <typename C, typename Address>
struct WhichCodes<C, Address, true> {
    typedef CodesKept<C> type;
};

// Rows before `sinks` get the highest key instead of their own. `row` is that of the first key.
template <u32 ROWS>
__device__ __forceinline__ void raise_sinks(u32 (&keys)[ROWS], u32 row, u32 sinks, u32 bins, u64 to) {
#pragma unroll
    for (u32 i = 0; i < ROWS; i++) {
        if (row + i >= sinks) continue;
        count_in(bins + keys[i] / REFINED * 4, ~0u);
        count_in(bins + (BINS - 1) * 4, 1);
        keys[i] = 0xFFFF;
    }
    write_keys(to, keys);
}

// Keys of a run, which are written and counted. `first` is where the thread's labels begin; `sinks(set, held)` says how many rows from the run's
// first own row on are always selected, if `has_sinks`; `replacing` are keys of a trace, or none.
template <typename C, typename Address, typename Sinks, typename Replacing>
__device__ __forceinline__ void scan_run(Address first, const Fragments<C>& fragments, const Outlet<C>& out, bool has_sinks, const Sinks& sinks, u32 own, const Replacing& replacing) {
    constexpr u32 HELD = Keys<C>::HELD, ROWS = Keys<C>::ROWS, UNITS = RUN_ROWS / C::UNIT;
    using Codes = typename WhichCodes<C, Address>::type;
    // Few runs have sinks: one sequence alone looks for them after all units, several after each, whose keys they would otherwise keep.
    constexpr bool LATE = C::MEMBERS == 1;
    u32 run_keys[UNITS][C::SETS][HELD][ROWS];
#pragma unroll
    for (u32 unit = 0; unit < UNITS; unit++) {
        Address from[C::LOADS];
#pragma unroll
        for (u32 load = 0; load < C::LOADS; load++) from[load] = first + (unit * C::UNIT + load * 32) * LABEL_BYTES;
        const Codes codes{from, fragments.shifts};
#pragma unroll
        for (u32 set = 0; set < C::SETS; set++) {
            float importance[HELD][ROWS];
            importance_of<C>(scores_of(codes, set, fragments), importance, own);
#pragma unroll
            for (u32 held = 0; held < HELD; held++) {
                u32(&keys)[ROWS] = run_keys[unit][set][held];
#pragma unroll
                for (u32 i = 0; i < ROWS; i++) {
                    keys[i] = key_of(importance[held][i]);
                    replacing(unit, i, importance[held][i], keys[i]);
                    count_in(out.bins[set][held] + keys[i] / REFINED * 4, 1);
                }
                write_keys(out.keys[set][held] + unit * C::UNIT * 2, keys);
                if (!LATE && has_sinks) raise_sinks(keys, unit * C::UNIT, sinks(set, held), out.bins[set][held], out.keys[set][held] + unit * C::UNIT * 2);
            }
        }
    }
    if (LATE && has_sinks) {
#pragma unroll
        for (u32 unit = 0; unit < UNITS; unit++) raise_sinks(run_keys[unit][0][0], unit * C::UNIT, sinks(0, 0), out.bins[0][0], out.keys[0][0] + unit * C::UNIT * 2);
    }
}

// Adds the block's counts to the lane's histogram.
__device__ __forceinline__ void add_counts(const StepJob& job, u64 own_lane, const u32 (&bins)[BINS]) {
    // Two bins in one addition: no count comes near 2^32.
    u64* histogram = reinterpret_cast<u64*>(job.histogram) + own_lane * (BINS / 2);
    for (u32 pair = threadIdx.x; pair < BINS / 2; pair += SCORE_THREADS) {
        const u64 counts = reinterpret_cast<const u64*>(bins)[pair];
        if (counts) atomicAdd(&histogram[pair], counts);
    }
}
