// Label scores and importance keys, by the definition at `ScoreJob` (kernels/src/device/mod.rs).
//
// Importance needs every head's log-sum-exp. So the blocks of a lane first score the sampled rows together and wait for each other; then they
// pass over all labels once, write keys, and count their upper bits for select.cu. Labels are on their way to shared memory, a ring of stages
// for each warp, before the kernel waits for the one before it: they depend on nothing that a step writes.
#include "append.cuh"
#include "meet.cuh"
#include "tile.cuh"

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

constexpr u32 WARPS = SCORE_THREADS / 32;
constexpr u32 UNIT_BYTES = UNIT * LABEL_BYTES;
// Sampled blocks of a unit.
constexpr u32 A_UNIT = 2 * LOADS;

// Room that the block's threads share.
struct Room {
    // First a warp's sampled unit, where it fits, then the histogram.
    union {
        __align__(16) u8 units[WARPS][BINS * 4 / WARPS];
        u32 bins[BINS];
    };
    WeightSources sources;
    LaneWeights weights;
    PowerSum sums[WARPS][GROUP];
    float lse[GROUP];
};
constexpr bool UNIT_FITS = UNIT_BYTES <= BINS * 4 / WARPS;

// The place of a sampled block's labels.
__device__ __forceinline__ const u8* sampled_labels(const StepJob& job, const SequenceState& sequence, const LayerPlace& place, const Sample rows, u32 index, u32 lane) {
    const SampledBlock block = sampled_block(rows, min(index, rows.blocks - 1));
    return label_page(job, sequence, place, block.chunk, lane) + block.block * 16 * LABEL_BYTES;
}

// Starts the copy of a unit of the sample, by a warp.
__device__ __forceinline__ void ask_for_unit(const StepJob& job, const SequenceState& sequence, const LayerPlace& place, const Sample rows, u32 unit, u32 lane, u8* to) {
    for (u32 piece = threadIdx.x % 32; piece < UNIT_BYTES / 16; piece += 32) {
        const u8* from = sampled_labels(job, sequence, place, rows, unit * A_UNIT + piece / LABEL_BYTES, lane);
        copy_16_async(shared_address(to + piece * 16), from + piece % LABEL_BYTES * 16, true);
    }
}

// How the sample's units are summed: `each` by one warp, as the length says and nothing else, so that sums are always the same.
struct SampleUnits {
    u32 count, each, sums;
};

__device__ __forceinline__ SampleUnits units_of(const Sample rows) {
    const u32 count = (rows.blocks + A_UNIT - 1) / A_UNIT, each = (count + SAMPLE_SUMS - 1) / SAMPLE_SUMS;
    return {count, each, each ? (count + each - 1) / each : 0};
}

// Scores units `first` to `end`, and writes each head's sum of powers to `sums`, [head][SAMPLE_SUMS]. By a warp; the first unit has been asked for.
__device__ __forceinline__ void sum_units(const StepJob& job, const SequenceState& sequence, const LayerPlace& place, const Sample rows, u32 first, u32 end, u32 lane, u8* room, const Fragments& fragments, bool asked, PowerSum* to) {
    const u32 g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    PowerSum sums[COLUMN_TILES][2];
#pragma unroll
    for (u32 tile = 0; tile < COLUMN_TILES; tile++) sums[tile][0] = sums[tile][1] = {LOWEST, 0.0f};
    for (u32 unit = first; unit < end; unit++) {
        const u8* from[LOADS];
        if constexpr (UNIT_FITS) {
            if (unit > first || !asked) {
                __syncwarp();
                ask_for_unit(job, sequence, place, rows, unit, lane, room);
                end_copy_group();
                wait_copy_groups<0>();
            }
            __syncwarp();
        }
#pragma unroll
        for (u32 load = 0; load < LOADS; load++)
            from[load] = UNIT_FITS ? room + (2 * load + g / 4) * 16 * LABEL_BYTES : sampled_labels(job, sequence, place, rows, unit * A_UNIT + 2 * load + g / 4, lane);
        const Scores scores = score_unit<UNIT_FITS>(from, fragments);
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
#pragma unroll
        for (u32 column = 0; column < 2; column++) {
            const u32 of = 2 * t + column, head = 8 * tile + of;
            if (g == 0 && of < PADDED && head < GROUP) to[head * SAMPLE_SUMS] = sums[tile][column];
        }
    }
}

// Log-sum-exps (log2) of the lane's heads from all sums of the sample; ends with a barrier.
__device__ __forceinline__ void set_lse(const float* sums, u32 count, Room& room) {
    static_assert(SAMPLE_SUMS == 2 * SCORE_THREADS && 16 * GROUP <= SCORE_THREADS && WARPS == 16, "two sums a thread; a thread for each warp and head");
    PowerSum own[GROUP][2];
#pragma unroll
    for (u32 head = 0; head < GROUP; head++) {
#pragma unroll
        for (u32 i = 0; i < 2; i++) {
            own[head][i] = {LOWEST, 0.0f};
            if (threadIdx.x + i * SCORE_THREADS < count) {
                const float2 sum = load_2_shared(sums + 2 * (head * SAMPLE_SUMS + threadIdx.x + i * SCORE_THREADS));
                own[head][i] = {sum.x, sum.y};
            }
        }
    }
#pragma unroll
    for (u32 head = 0; head < GROUP; head++) {
        const float largest = warp_max(fmaxf(own[head][0].largest, own[head][1].largest));
        float sum = own[head][0].sum * exp2_fast(own[head][0].largest - largest) + own[head][1].sum * exp2_fast(own[head][1].largest - largest);
#pragma unroll
        for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(0xFFFFFFFFu, sum, step);
        if (threadIdx.x % 32 == 0) room.sums[threadIdx.x / 32][head] = {largest, sum};
    }
    __syncthreads();
    if (threadIdx.x < (16 * GROUP + 31) / 32 * 32) {
        const u32 head = min(threadIdx.x / 16, GROUP - 1);
        const PowerSum all = joined_by_16(room.sums[threadIdx.x % 16][head]);
        if (threadIdx.x % 16 == 0) room.lse[head] = all.largest + log2f(all.sum);
    }
    __syncthreads();
}

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
    const int bits = __float_as_int(importance) - __float_as_int(SMALLEST_KEYED);
    return (u32)min(max(bits, 0), 0x42FFFFFF - __float_as_int(SMALLEST_KEYED)) >> KEY_SHIFT;
}

// A run is RUN consecutive units of a chunk; a warp scores one after the other. With STAGES a run is a stage of the warp's ring.
constexpr u32 RUN_ROWS = RUN * UNIT;
constexpr u32 RUN_BYTES = RUN_ROWS * LABEL_BYTES;
constexpr u32 RUNS_A_CHUNK = CHUNK_TOKENS / RUN_ROWS;
static_assert(RUN_ROWS * RUNS_A_CHUNK == CHUNK_TOKENS, "ring.rs");
// Consecutive rows of a unit whose keys a thread makes.
constexpr u32 OWN_ROWS = UNIT / 32;

__device__ __forceinline__ const u8* first_of_run(const StepJob& job, const SequenceState& sequence, const LayerPlace& place, u32 lane, u32 run) {
    return label_page(job, sequence, place, run / RUNS_A_CHUNK, lane) + run % RUNS_A_CHUNK * RUN_BYTES;
}

// Starts the copy of a run to a stage, by a warp.
__device__ __forceinline__ void ask_for_run(const u8* run, u32 stage) {
#pragma unroll
    for (u32 piece = 0; piece < RUN_BYTES / 16; piece += 32) {
        const u32 own = piece + threadIdx.x % 32;
        if (RUN_BYTES / 16 % 32 == 0 || own < RUN_BYTES / 16) copy_16_async(stage + own * 16, run + own * 16, true);
    }
}

// First of the thread's own rows in a unit.
__device__ __forceinline__ u32 own_row() {
    const u32 g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    return PADDED >= 4 ? threadIdx.x % 32 : PADDED == 2 ? t / 2 * 32 + 4 * g + t % 2 * 2 : t * 32 + 4 * g;
}

// Keeps one of two values and adds to it what the thread `step` away has of the same one: `second` where the thread's bit `step` is set.
__device__ __forceinline__ float shared_out(float first, float second, u32 step) {
    const bool upper = threadIdx.x & step;
    const float given = upper ? first : second;
    return (upper ? second : first) + __shfl_xor_sync(0xFFFFFFFFu, given, step);
}

// Importance of the thread's own rows: powers of the heads, summed over the threads that hold them.
__device__ __forceinline__ void importance_of(const Scores& scores, float (&rows)[OWN_ROWS]) {
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
        if constexpr (PADDED == 4) rows[0] = shared_out(pairs[0][0], pairs[0][1], 1);
        if constexpr (PADDED == 8) rows[0] = shared_out(shared_out(pairs[0][0], pairs[SUMS - 1][0], 2), shared_out(pairs[0][1], pairs[SUMS - 1][1], 2), 1);
    }
}

// Writes keys of consecutive rows.
__device__ __forceinline__ void write_keys(u16* to, const u32 (&keys)[OWN_ROWS]) {
    if constexpr (OWN_ROWS == 1) *to = (u16)keys[0];
    if constexpr (OWN_ROWS == 2) *reinterpret_cast<u32*>(to) = keys[0] | keys[1] << 16;
    if constexpr (OWN_ROWS == 4) *reinterpret_cast<uint2*>(to) = {keys[0] | keys[1] << 16, keys[OWN_ROWS - 2] | keys[OWN_ROWS - 1] << 16};
}

#ifdef TRACE_KEYS
// A bench replays recorded selections: positions of the trace are stretched in runs of `rows`, 2^shift of them or as many as it takes.
struct Trace {
    const u16* keys;
    u32 rows, shift;
};

__device__ __forceinline__ u32 traced(const Trace& trace, u32 row) { return trace.keys[trace.shift < 32 ? row >> trace.shift : row / trace.rows]; }
#endif

extern "C" __global__ void __launch_bounds__(SCORE_THREADS, 2) score(const StepJob job) {
    extern __shared__ __align__(16) u8 rings[];
    __shared__ Room room;
    const u32 lane = blockIdx.y, slot = blockIdx.z, warp = threadIdx.x / 32;
    const SequenceState sequence = reinterpret_cast<const SequenceState*>(job.sequences)[slot];
    const LayerPlace place = reinterpret_cast<const LayerPlace*>(job.places)[slot];
    const u64 own_lane = slot * job.lanes + lane;
    const u32 chunks = sequence.length ? sequence.chunks : 0, runs = chunks * RUNS_A_CHUNK;
    const u32 stride = gridDim.x * WARPS, begin = blockIdx.x * WARPS + warp;
    const Sample rows = sample_of(chunks);
    const SampleUnits units = units_of(rows);
    u8* ring = rings + warp * (STAGES * RUN_BYTES);
    if (UNIT_FITS && begin < units.sums) ask_for_unit(job, sequence, place, rows, begin * units.each, lane, room.units[warp]);
    end_copy_group();
#pragma unroll
    for (u32 stage = 0; stage < STAGES; stage++) {
        const u32 run = begin + stage * stride;
        if (run < runs) ask_for_run(first_of_run(job, sequence, place, lane, run), shared_address(ring + stage * RUN_BYTES));
        end_copy_group();
    }
    fetch_coder(job, lane, room.sources);
    // The queries are another kernel's, and perhaps not there yet; where they are, they come nearer.
    if (threadIdx.x < GROUP * HEAD_DIM / 32) ask_for(reinterpret_cast<const float*>(job.query) + own_lane * GROUP * HEAD_DIM + threadIdx.x * 32);
    enter_stream();
    if (sequence.length == 0) return;
    if (blockIdx.x + 1 == gridDim.x) append_row(job, sequence, place, slot, lane);
    if (runs == 0) return;
    // What blocks of the lane, and the kernels after this one, count in.
    for (u32 bin = blockIdx.x * SCORE_THREADS + threadIdx.x; bin < BINS; bin += gridDim.x * SCORE_THREADS) {
        reinterpret_cast<u32*>(job.histogram)[own_lane * BINS + bin] = 0;
        reinterpret_cast<u32*>(job.victim_bins)[own_lane * BINS + bin] = 0;
    }
    if (blockIdx.x == 0 && threadIdx.x == 0) reinterpret_cast<VictimCounts*>(job.victim_counts)[own_lane] = {};
    make_weights(job, slot, lane, room.sources, room.weights);
    Fragments fragments;
    fragments_of_group<0>(room.weights, fragments);
    const float zero[COLUMN_TILES][2] = {};
    set_scale(fragments, 1.0f, zero);
    wait_copy_groups<STAGES>();
    PowerSum* sums = reinterpret_cast<PowerSum*>(job.label_lse) + own_lane * GROUP * SAMPLE_SUMS;
    for (u32 sum = begin; sum < units.sums; sum += stride)
        sum_units(job, sequence, place, rows, sum * units.each, min(units.count, (sum + 1) * units.each), lane, room.units[warp], fragments, sum == begin, sums + sum);
    meet(&reinterpret_cast<Arrivals*>(job.arrivals)[own_lane].score, gridDim.x);
    for (u32 bin = threadIdx.x; bin < BINS; bin += SCORE_THREADS) room.bins[bin] = 0;
    set_lse(reinterpret_cast<const float*>(sums), units.sums, room);
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
    u16* keys = reinterpret_cast<u16*>(job.keys) + own_lane * job.max_rows + own_row();
#ifdef TRACE_KEYS
    const u32 trace_run = job.max_rows / job.trace_rows;
    const Trace trace = {reinterpret_cast<const u16*>(job.trace) + own_lane * job.trace_rows, trace_run, trace_run & (trace_run - 1) ? 32u : 31u - __clz(trace_run)};
#endif
    u32 stage = 0;
    for (u32 run = begin; run < runs; run += stride) {
        const u32 base = run * RUN_ROWS;
        // Of the thread's first row of the run.
        const u32 sinks = max((int)sequence.sinks - (int)(base + own_row()), 0);
#ifdef TRACE_KEYS
        u32 replacing[RUN][OWN_ROWS];
#pragma unroll
        for (u32 unit = 0; unit < RUN; unit++)
#pragma unroll
            for (u32 i = 0; i < OWN_ROWS; i++) replacing[unit][i] = traced(trace, base + unit * UNIT + own_row() + i);
#endif
        const u8 *first, *next = nullptr;
        if constexpr (STAGES > 0) {
            if (run + STAGES * stride < runs) next = first_of_run(job, sequence, place, lane, run + STAGES * stride);
            wait_copy_groups<(STAGES > 0 ? STAGES - 1 : 0)>();
            __syncwarp();
            first = ring + stage * RUN_BYTES;
        } else {
            first = first_of_run(job, sequence, place, lane, run);
        }
        first += g / 4 * 16 * LABEL_BYTES;
#pragma unroll
        for (u32 unit = 0; unit < RUN; unit++) {
            const u8* from[LOADS];
#pragma unroll
            for (u32 load = 0; load < LOADS; load++) from[load] = first + (unit * UNIT + load * 32) * LABEL_BYTES;
            const Scores scores = score_unit<(STAGES > 0)>(from, fragments);
            float importance[OWN_ROWS];
            importance_of(scores, importance);
            u32 own_keys[OWN_ROWS];
#pragma unroll
            for (u32 i = 0; i < OWN_ROWS; i++) {
                own_keys[i] = key_of(importance[i]);
#ifdef TRACE_KEYS
                // The computed keys are thrown away at the very end, so that they are computed.
                if (importance[i] != -1.0f) own_keys[i] = replacing[unit][i];
#endif
                if (unit * UNIT + i < sinks) own_keys[i] = 0xFFFF;
                atomicAdd(&room.bins[own_keys[i] / REFINED], 1);
            }
            write_keys(keys + base + unit * UNIT, own_keys);
        }
        if constexpr (STAGES > 0) {
            __syncwarp();
            if (next) ask_for_run(next, shared_address(ring + stage * RUN_BYTES));
            end_copy_group();
            stage = stage + 1 == STAGES ? 0 : stage + 1;
        }
    }
    __syncthreads();
    u32* histogram = reinterpret_cast<u32*>(job.histogram) + own_lane * BINS;
    for (u32 bin = threadIdx.x; bin < BINS; bin += SCORE_THREADS)
        if (room.bins[bin]) atomicAdd(&histogram[bin], room.bins[bin]);
}
