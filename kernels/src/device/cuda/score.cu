// Label scores and importance keys, by the definition at `ScoreJob` (kernels/src/device/mod.rs).
//
// Importance needs every head's log-sum-exp. So `sample` scores some rows first, and `score` then passes over all labels once, writes keys, and
// counts their upper bits for select.cu. The first labels are on their way to shared memory, where each warp has a ring of stages, before the kernel
// waits for the one before it: they depend on nothing that a step writes.
#include "append.cuh"
#include "scan.cuh"

// Room that the threads of a block of `score` share.
struct Room {
    u32 bins[BINS];
    Coder coder;
    LaneWeights weights;
    u64 places[SCORE_THREADS];
    float lse[GROUP];
};

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

// Sums of sampled rows' scores.
extern "C" __global__ void __launch_bounds__(SCORE_THREADS, 2) sample(const StepJob job) {
    __shared__ SampleRoom room;
    sample_lane(job, room);
}

// Appends the newest row; then importance keys of every row before the horizon, and their histogram.
extern "C" __global__ void __launch_bounds__(SCORE_THREADS, 2) score(const StepJob job) {
    extern __shared__ __align__(16) u8 rings[];
    __shared__ Room room;
    const u32 lane = job.first_lane + blockIdx.y, warp = threadIdx.x / 32;
    const SequenceState sequence = *reinterpret_cast<const SequenceState*>(job.sequences);
    const LayerPlace place = *reinterpret_cast<const LayerPlace*>(job.places);
    const u32 chunks = sequence.length ? sequence.chunks : 0;
    const OwnRuns runs = own_runs(sequence, place, lane);
    u8* ring = rings + warp * (STAGES * RUN_BYTES);
    const u64 first_place = runs.first < chunks ? runs.places[runs.first] : 0;
    const u32 placed = blockIdx.x * CHUNKS_AT_ONCE + threadIdx.x % CHUNKS_AT_ONCE + threadIdx.x / CHUNKS_AT_ONCE * runs.step;
    room.places[threadIdx.x] = placed < chunks ? runs.places[placed] : 0;
    fetch_coder(job, lane, room.coder);
    auto ask_for_stage = [&](u32 stage, u64 place) {
        if (place) ask_for_run(reinterpret_cast<const u8*>(place + runs.part) + threadIdx.x % 32 * 16, shared_address(ring + stage * RUN_BYTES) + threadIdx.x % 32 * 16);
        end_copy_group();
    };
    if (ASKED_AT_FIRST > 0) ask_for_stage(0, first_place);
    for (u32 bin = threadIdx.x; bin < BINS; bin += SCORE_THREADS) room.bins[bin] = 0;
    __syncthreads();
    enter_stream();
    if (sequence.length == 0) return;
    if (blockIdx.x + 1 == gridDim.x) append_row(job, sequence, place, 0, lane);
    if (chunks == 0) return;
    set_scorer(job, lane, sums_of(chunks), room.coder, room.weights, room.lse);
#pragma unroll
    for (u32 stage = ASKED_AT_FIRST; stage < STAGES; stage++) ask_for_stage(stage, room.places[warp / RUNS_A_CHUNK + stage * CHUNKS_AT_ONCE]);
    __syncthreads();
    Fragments<Alone> fragments;
    fragments_of_group<0>(&room.weights, fragments);
    const u32 g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    float start[HEAD_TILES][2];
#pragma unroll
    for (u32 tile = 0; tile < HEAD_TILES; tile++) {
#pragma unroll
        for (u32 column = 0; column < 2; column++) {
            const u32 head = 8 * tile + (2 * t + column) % PADDED;
            start[tile][column] = start_of_head(room.lse, head);
        }
    }
    set_scale(fragments, 1.0f / BINADES, start);
    const u32 in_chunk = warp % RUNS_A_CHUNK * RUN_ROWS + own_row<Alone>();
    u16* keys = reinterpret_cast<u16*>(job.keys) + (u64)lane * job.max_rows + in_chunk;
#ifdef TRACE_KEYS
    const u32 trace_run = job.max_rows / job.trace_rows;
    const Trace trace = {reinterpret_cast<const u16*>(job.trace) + (u64)lane * job.trace_rows, trace_run, trace_run & (trace_run - 1) ? 32u : 31u - __clz(trace_run)};
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
        u32 traced_keys[RUN][Keys<Alone>::ROWS];
#pragma unroll
        for (u32 unit = 0; unit < RUN; unit++)
#pragma unroll
            for (u32 i = 0; i < Keys<Alone>::ROWS; i++) traced_keys[unit][i] = traced(trace, row + unit * UNIT + i);
        // The computed keys are thrown away at the very end, so that they are computed.
        const auto replacing = [&](u32 unit, u32 i, float importance, u32& key) {
            if (importance != -1.0f) key = traced_keys[unit][i];
        };
#else
        const auto replacing = [](u32, u32, float, u32&) {};
#endif
        const u8* next = nullptr;
        if constexpr (STAGES > 0) {
            if (chunk + STAGES * step < chunks) next = reinterpret_cast<const u8*>(runs.places[chunk + STAGES * step] + part);
            wait_copy_groups<(STAGES > 0 ? STAGES - 1 : 0)>();
            __syncwarp();
        }
        const u8* labels = reinterpret_cast<const u8*>(runs.places[chunk] + runs.part) + g / 4 * 16 * LABEL_BYTES;
        const auto first = read_from<(STAGES > 0)>(from_ring + stage * RUN_BYTES, labels);
        const auto sinks = [&](u32, u32) { return sequence.sinks > row ? sequence.sinks - row : 0; };
        scan_run<Alone>(first, fragments, Outlet<Alone>{{{to}}, {{bins}}}, chunk * CHUNK_TOKENS < sequence.sinks, sinks, own, replacing);
        if constexpr (STAGES > 0) {
            __syncwarp();
            if (next) ask_for_run(next, own_stage + stage * RUN_BYTES);
            end_copy_group();
            stage = stage + 1 == STAGES ? 0 : stage + 1;
        }
    }
    __syncthreads();
    add_counts(job, lane, room.bins);
}
