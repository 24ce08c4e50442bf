// Label scores and importance keys, by the definition at `ScoreJob` (kernels/src/device/mod.rs).
//
// Importance needs every head's log-sum-exp. So the blocks of a lane first score the sampled rows together and take each other's sums; then
// they pass over all labels once, write keys, and count their upper bits for select.cu. Labels are on their way to shared memory, a ring of
// stages for each warp, before the kernel waits for the one before it: they depend on nothing that a step writes. Blocks of a lane follow each
// other in the grid and start in that order, so that whoever waits waits for blocks that run.
#include "append.cuh"
#include "sample.cuh"
#include "tile.cuh"

// 2^-121, the importance of key 0, and the bits that a key leaves out: kernels/src/select.
constexpr float SMALLEST_KEYED = 3.76158192263132e-37f;
constexpr u32 KEY_SHIFT = 14;

// Asks the second-level cache for a line.
__device__ __forceinline__ void ask_for(const void* line) { asm volatile("prefetch.global.L2 [%0];" ::"l"(line)); }

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

// A run is RUN consecutive units of a chunk; a warp scores one after the other. With STAGES a run is a stage of the warp's ring.
constexpr u32 RUN_ROWS = RUN * UNIT;
constexpr u32 RUN_BYTES = RUN_ROWS * LABEL_BYTES;
constexpr u32 RUNS_A_CHUNK = CHUNK_TOKENS / RUN_ROWS;
static_assert(RUN_ROWS * RUNS_A_CHUNK == CHUNK_TOKENS, "ring.rs");
// Consecutive rows of a unit whose keys a thread makes.
constexpr u32 OWN_ROWS = UNIT / 32;

// Chunks that the warps of a block are in at a time.
constexpr u32 CHUNKS_AT_ONCE = WARPS / RUNS_A_CHUNK;
static_assert(WARPS % RUNS_A_CHUNK == 0, "whole chunks");

// Where a warp's runs are: the same part of every `step`-th chunk.
struct OwnRuns {
    const u64* places;  // by chunk
    u64 part;           // from there
    u32 first, step;    // chunks
};

__device__ __forceinline__ OwnRuns own_runs(const SequenceState& sequence, const LayerPlace& place, u32 lane) {
    const u32 warp = threadIdx.x / 32;
    const u64 part = place.labels + lane * (CHUNK_TOKENS * LABEL_BYTES) + warp % RUNS_A_CHUNK * RUN_BYTES;
    return {reinterpret_cast<const u64*>(sequence.label_slots), part, (blockIdx.x * WARPS + warp) / RUNS_A_CHUNK, gridDim.x * CHUNKS_AT_ONCE};
}

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
__device__ __forceinline__ u32 own_row() {
    const u32 g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    return PADDED >= 4 ? threadIdx.x % 32 : PADDED == 2 ? t / 2 * 32 + 4 * g + t % 2 * 2 : t * 32 + 4 * g;
}

// Keeps one of two values and adds to it what the thread `step` away has of the same one: `second` where the thread's bit `step` is set.
__device__ __forceinline__ float shared_out(float first, float second, u32 step, u32 own) {
    const bool upper = own & step;
    const float given = upper ? first : second;
    return (upper ? second : first) + __shfl_xor_sync(0xFFFFFFFFu, given, step);
}

// Importance of the thread's own rows: powers of the heads, summed over the threads that hold them.
__device__ __forceinline__ void importance_of(const Scores& scores, float (&rows)[OWN_ROWS], u32 own) {
    float powers[SUMS][4];
#pragma unroll
    for (u32 sum = 0; sum < SUMS; sum++) {
#pragma unroll
        for (u32 i = 0; i < 4; i++) {
            powers[sum][i] = piecewise_exp2(scores.x[0][sum][i]);
#pragma unroll
            for (u32 tile = 1; tile < COLUMN_TILES; tile++) powers[sum][i] += piecewise_exp2(scores.x[tile][sum][i]);
        }
    }
    if constexpr (PADDED == 1) {
        // Two columns are two products' rows.
        rows[0] = powers[0][0], rows[1] = powers[0][2], rows[2] = powers[0][1], rows[3] = powers[0][3];
    } else {
        float pairs[SUMS][2];
#pragma unroll
        for (u32 sum = 0; sum < SUMS; sum++) pairs[sum][0] = powers[sum][0] + powers[sum][1], pairs[sum][1] = powers[sum][2] + powers[sum][3];
        if constexpr (PADDED == 2) rows[0] = pairs[0][0], rows[1] = pairs[0][1];
        if constexpr (PADDED == 4) rows[0] = shared_out(pairs[0][0], pairs[0][1], 1, own);
        if constexpr (PADDED == 8) rows[0] = shared_out(shared_out(pairs[0][0], pairs[SUMS - 1][0], 2, own), shared_out(pairs[0][1], pairs[SUMS - 1][1], 2, own), 1, own);
    }
}

// Writes keys of consecutive rows to an address of global memory.
__device__ __forceinline__ void write_keys(u64 to, const u32 (&keys)[OWN_ROWS]) {
    if constexpr (OWN_ROWS == 1) asm volatile("st.global.u16 [%0], %1;" ::"l"(to), "h"((u16)keys[0]) : "memory");
    if constexpr (OWN_ROWS == 2) asm volatile("st.global.u32 [%0], %1;" ::"l"(to), "r"(keys[0] | keys[1] << 16) : "memory");
    if constexpr (OWN_ROWS == 4) asm volatile("st.global.v2.u32 [%0], {%1, %2};" ::"l"(to), "r"(keys[0] | keys[1] << 16), "r"(keys[OWN_ROWS - 2] | keys[OWN_ROWS - 1] << 16) : "memory");
}

#ifdef TRACE_KEYS
// A bench replays recorded selections: positions of the trace are stretched in runs of `rows`, 2^shift of them or as many as it takes.
struct Trace {
    const u16* keys;
    u32 rows, shift;
};

__device__ __forceinline__ u32 traced(const Trace& trace, u32 row) { return trace.keys[trace.shift < 32 ? row >> trace.shift : row / trace.rows]; }
#endif

// Arrivals that a launch counts, whatever its blocks: how many launches there were is in the upper bits.
constexpr u32 LAUNCH_ARRIVALS = 128;
// Whose thread counts the block.
constexpr u32 USHER = SCORE_THREADS - 32;

// Stages that are asked for at first, and until the sample is scored: more would make what the block waits for wait behind them.
constexpr u32 ASKED_AT_FIRST = STAGES < 1 ? STAGES : 1;
constexpr u32 ASKED_WITH_WEIGHTS = STAGES < 2 ? STAGES : 2;

extern "C" __global__ void __launch_bounds__(SCORE_THREADS, 2) score(const StepJob job) {
    extern __shared__ __align__(16) u8 rings[];
    __shared__ Room room;
    const u32 lane = job.first_lane + blockIdx.y, slot = blockIdx.z, warp = threadIdx.x / 32;
    const SequenceState sequence = reinterpret_cast<const SequenceState*>(job.sequences)[slot];
    const LayerPlace place = reinterpret_cast<const LayerPlace*>(job.places)[slot];
    const u64 own_lane = slot * job.lanes + lane;
    const u32 chunks = sequence.length ? sequence.chunks : 0;
    const Sample rows = sample_of(chunks);
    const SampleUnits units = units_of(rows);
    const OwnRuns runs = own_runs(sequence, place, lane);
    u8* ring = rings + warp * (STAGES * RUN_BYTES);
    const u32 own_sum = blockIdx.x * WARPS + warp;
    const bool sums_own = own_sum < units.sums;
    // What the block waits for is asked for before the labels, which take the memory for themselves. The queries are another kernel's, and
    // perhaps not there yet; where they are, they come nearer.
    if (threadIdx.x < GROUP * HEAD_DIM / 32) ask_for(reinterpret_cast<const float*>(job.query) + own_lane * GROUP * HEAD_DIM + threadIdx.x * 32);
    const u8* piece = UNIT_FITS && sums_own ? piece_of_unit(sequence, place, rows, own_sum * units.each, lane) : nullptr;
    u64 first_place = runs.first < chunks ? runs.places[runs.first] : 0;
    const u32 placed = blockIdx.x * CHUNKS_AT_ONCE + threadIdx.x % CHUNKS_AT_ONCE + threadIdx.x / CHUNKS_AT_ONCE * runs.step;
    room.places[threadIdx.x] = placed < chunks ? runs.places[placed] : 0;
    fetch_coder(job, lane, room.coder);
    if (UNIT_FITS && sums_own) ask_for_unit(piece, room.units[warp]);
    end_copy_group();
    auto ask_for_stage = [&](u32 stage, u64 place) {
        if (place) ask_for_run(reinterpret_cast<const u8*>(place + runs.part) + threadIdx.x % 32 * 16, shared_address(ring + stage * RUN_BYTES) + threadIdx.x % 32 * 16);
        end_copy_group();
    };
    if (ASKED_AT_FIRST > 0) ask_for_stage(0, first_place);
    __syncthreads();
    enter_stream();
    if (sequence.length == 0) return;
    if (blockIdx.x + 1 == gridDim.x) append_row(job, sequence, place, slot, lane);
    if (chunks == 0) return;
    u32* arrivals = &reinterpret_cast<Arrivals*>(job.arrivals)[own_lane].score;
    u64* given = reinterpret_cast<u64*>(job.label_lse) + own_lane * GROUP * SAMPLE_SUMS;
    const u32 sums_given = (units.sums + WARPS - 1) / WARPS;
    u32 before = 0;
    if (warp == WARPS - 1) {
        // What blocks of the lane, and the kernels after this one, count in: a block adds to it after all have arrived.
        for (u32 bin = blockIdx.x * 32 + threadIdx.x % 32; bin < BINS; bin += gridDim.x * 32) {
            reinterpret_cast<u32*>(job.histogram)[own_lane * BINS + bin] = 0;
            reinterpret_cast<u32*>(job.victim_bins)[own_lane * BINS + bin] = 0;
        }
        if (blockIdx.x == 0) {
            // Sums that are not given are of no launch.
            for (u32 sum = sums_given + threadIdx.x % 32; sum < SAMPLE_SUMS; sum += 32)
                for (u32 head = 0; head < GROUP; head++) given[head * SAMPLE_SUMS + sum] = 0;
            if (threadIdx.x % 32 == 0) reinterpret_cast<VictimCounts*>(job.victim_counts)[own_lane] = {};
        }
        __syncwarp();
        if (threadIdx.x == USHER) {
            const u32 counts = blockIdx.x == 0 ? LAUNCH_ARRIVALS - (gridDim.x - 1) : 1;
            asm volatile("atom.add.release.gpu.global.u32 %0, [%1], %2;" : "=r"(before) : "l"(arrivals), "r"(counts) : "memory");
        }
    }
    make_weights(job, slot, lane, room.coder, room.weights);
    Fragments fragments;
    fragments_of_group<0>(room.weights, fragments);
    const float zero[COLUMN_TILES][2] = {};
    set_scale(fragments, 1.0f, zero);
    if (ASKED_WITH_WEIGHTS > ASKED_AT_FIRST) ask_for_stage(1, room.places[warp / RUNS_A_CHUNK + CHUNKS_AT_ONCE]);
    wait_copy_groups<ASKED_WITH_WEIGHTS>();
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
#pragma unroll
    for (u32 stage = ASKED_WITH_WEIGHTS; stage < STAGES; stage++) ask_for_stage(stage, room.places[warp / RUNS_A_CHUNK + stage * CHUNKS_AT_ONCE]);
    for (u32 bin = threadIdx.x; bin < BINS; bin += SCORE_THREADS) room.bins[bin] = 0;
    take_lse(given, sums_given, room);
    if (threadIdx.x == USHER) {
        const u32 wanted = (before / LAUNCH_ARRIVALS + 1) * LAUNCH_ARRIVALS;
        u32 now;
        do asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(now) : "l"(arrivals) : "memory");
        while ((int)(now - wanted) < 0);
    }
    __syncthreads();
    const u32 g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    float start[COLUMN_TILES][2];
#pragma unroll
    for (u32 tile = 0; tile < COLUMN_TILES; tile++) {
#pragma unroll
        for (u32 column = 0; column < 2; column++) {
            const u32 head = 8 * tile + (2 * t + column) % PADDED;
            // Columns without a head give the least power there is, which no key shows.
            start[tile][column] = head < GROUP ? (126.0f - room.lse[head < GROUP ? head : 0]) * (1.0f / BINADES) : -1.0f;
        }
    }
    set_scale(fragments, 1.0f / BINADES, start);
    const u32 in_chunk = warp % RUNS_A_CHUNK * RUN_ROWS + own_row();
    u16* keys = reinterpret_cast<u16*>(job.keys) + own_lane * job.max_rows + in_chunk;
#ifdef TRACE_KEYS
    const u32 trace_run = job.max_rows / job.trace_rows;
    const Trace trace = {reinterpret_cast<const u16*>(job.trace) + own_lane * job.trace_rows, trace_run, trace_run & (trace_run - 1) ? 32u : 31u - __clz(trace_run)};
#endif
    const u64 part = runs.part + threadIdx.x % 32 * 16;
    const u32 step = runs.step;
    u64 to = (u64)__cvta_generic_to_global(keys + runs.first * CHUNK_TOKENS);
    u32 from_ring = shared_address(ring) + g / 4 * 16 * LABEL_BYTES, own = threadIdx.x % 32;
    // The compiler would rather compute these again in every round than keep them.
    asm volatile("" : "+l"(to), "+r"(from_ring), "+r"(own));
#pragma unroll
    for (u32 group = 0; group < N_GROUPS; group++) asm volatile("" : "+r"(fragments.shifts[group]));
    const u32 bins = shared_address(room.bins), own_stage = shared_address(ring) + threadIdx.x % 32 * 16;
    u32 stage = 0;
    for (u32 chunk = runs.first; chunk < chunks; chunk += step, to += step * CHUNK_TOKENS * 2) {
        const u32 row = chunk * CHUNK_TOKENS + in_chunk;
#ifdef TRACE_KEYS
        u32 replacing[RUN][OWN_ROWS];
#pragma unroll
        for (u32 unit = 0; unit < RUN; unit++)
#pragma unroll
            for (u32 i = 0; i < OWN_ROWS; i++) replacing[unit][i] = traced(trace, row + unit * UNIT + i);
#endif
        const u8* next = nullptr;
        if constexpr (STAGES > 0) {
            if (chunk + STAGES * step < chunks) next = reinterpret_cast<const u8*>(runs.places[chunk + STAGES * step] + part);
            wait_copy_groups<(STAGES > 0 ? STAGES - 1 : 0)>();
            __syncwarp();
        }
        const u8* labels = reinterpret_cast<const u8*>(runs.places[chunk] + runs.part) + g / 4 * 16 * LABEL_BYTES;
        const auto first = read_from<(STAGES > 0)>(from_ring + stage * RUN_BYTES, labels);
        u32 run_keys[RUN][OWN_ROWS];
#pragma unroll
        for (u32 unit = 0; unit < RUN; unit++) {
            decltype(read_from<(STAGES > 0)>(0, nullptr)) from[LOADS];
#pragma unroll
            for (u32 load = 0; load < LOADS; load++) from[load] = first + (unit * UNIT + load * 32) * LABEL_BYTES;
            float importance[OWN_ROWS];
            importance_of(scores_of(sums_of_unit(from, fragments), fragments), importance, own);
#pragma unroll
            for (u32 i = 0; i < OWN_ROWS; i++) {
                run_keys[unit][i] = key_of(importance[i]);
#ifdef TRACE_KEYS
                // The computed keys are thrown away at the very end, so that they are computed.
                if (importance[i] != -1.0f) run_keys[unit][i] = replacing[unit][i];
#endif
                count_in(bins + run_keys[unit][i] / REFINED * 4, 1);
            }
            write_keys(to + unit * UNIT * 2, run_keys[unit]);
        }
        if (chunk * CHUNK_TOKENS < sequence.sinks) {
            // Few runs have them: rows that are always selected get the highest key instead of their own.
#pragma unroll
            for (u32 unit = 0; unit < RUN; unit++) {
#pragma unroll
                for (u32 i = 0; i < OWN_ROWS; i++) {
                    if (row + unit * UNIT + i >= sequence.sinks) continue;
                    count_in(bins + run_keys[unit][i] / REFINED * 4, ~0u);
                    count_in(bins + (BINS - 1) * 4, 1);
                    run_keys[unit][i] = 0xFFFF;
                }
                write_keys(to + unit * UNIT * 2, run_keys[unit]);
            }
        }
        if constexpr (STAGES > 0) {
            __syncwarp();
            if (next) ask_for_run(next, own_stage + stage * RUN_BYTES);
            end_copy_group();
            stage = stage + 1 == STAGES ? 0 : stage + 1;
        }
    }
    __syncthreads();
    // Two bins in one addition: no count comes near 2^32.
    u64* histogram = reinterpret_cast<u64*>(job.histogram) + own_lane * (BINS / 2);
    for (u32 pair = threadIdx.x; pair < BINS / 2; pair += SCORE_THREADS) {
        const u64 counts = reinterpret_cast<const u64*>(room.bins)[pair];
        if (counts) atomicAdd(&histogram[pair], counts);
    }
}
