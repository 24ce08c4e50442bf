// Label scores and importance keys of several sequences whose first chunks are the same: these chunks' labels are read and decoded once, and
// multiplied with the weights of all of them. Every key has the bits that score.cu makes: sums of products are integers, and what follows them is
// the same operations in the same order. A head's log-sum-exp comes from a sample that its own sequence's length decides, so each
// member has one of its own, by a launch before.
#include "append.cuh"
#include "scan.cuh"

// Sequences that a launch takes at most, by the kernels below.
constexpr u32 MOST_MEMBERS = 4;

// The score of one layer for several sequences. The same structure is in jobs.rs.
struct JointJob {
    StepJob jobs[MOST_MEMBERS];  // by member; those beyond the last are the first
    u32 members;
    u32 unused;
};
static_assert(sizeof(JointJob) == JOINT_JOB_BYTES, "as in jobs.rs");

// What the blocks of a lane need to know of a member.
struct Member {
    u64 places;  // u64[chunk]: where its labels are
    u64 keys;    // of the lane's first row
    u32 length, chunks;
    u32 end;     // items, below, of it and of the members before it
    u32 sinks;
};

// Room that the threads of a block share.
template <u32 MEMBERS>
struct JointRoom {
    u32 bins[MEMBERS][BINS];
    Coder coder;
    LaneWeights weights[MEMBERS];
    float lse[MEMBERS][GROUP];
    Member members[MEMBERS];
    u32 common;
};

// A ring of stages of label bytes of one warp, which are asked for in the order in which they are read.
struct Ring {
    u32 first, stage;  // address of shared memory, number of the next stage

    // Asks for labels at an address, or for nothing.
    __device__ __forceinline__ void ask(u32 stage, const u8* run) {
        if (run) ask_for_run(run + threadIdx.x % 32 * 16, first + stage * RUN_BYTES + threadIdx.x % 32 * 16);
        end_copy_group();
    }
};

// An item is a chunk's part that is a warp's run: first those of all members, which are those of the first one, then the first one's own, then
// those of the others.
template <u32 MEMBERS>
struct Items {
    const JointRoom<MEMBERS>& room;
    u64 part;     // bytes from a chunk's labels to the run's
    u32 members;

    // Chunk of an item of a member's.
    __device__ __forceinline__ u32 chunk_of(u32 item, u32 member) const { return member ? item - room.members[member - 1].end + room.common : item; }

    __device__ __forceinline__ const u8* labels_of(u32 item) const {
        u32 member = 0;
        while (member < members && item >= room.members[member].end) member++;
        if (member == members) return nullptr;
        return reinterpret_cast<const u8*>(reinterpret_cast<const u64*>(room.members[member].places)[chunk_of(item, member)] + part);
    }
};

// What scores the members from `first` on.
template <typename C, u32 MEMBERS>
__device__ __forceinline__ void fragments_of(const JointRoom<MEMBERS>& room, u32 first, Fragments<C>& fragments) {
    fragments_of_group<0>(room.weights + first, fragments);
    float start[C::TILES][2];
#pragma unroll
    for (u32 tile = 0; tile < C::TILES; tile++) {
#pragma unroll
        for (u32 column = 0; column < 2; column++) {
            const auto [member, head] = column_of<C>(tile, 2 * (threadIdx.x % 4) + column);
            start[tile][column] = start_of_head(room.lse[first + member], head);
        }
    }
    set_scale(fragments, 1.0f / BINADES, start);
}

// Scores items from `item` to `end` with the columns of C, whose first sequence is `first`; answers with the next item.
template <typename C, u32 MEMBERS>
__device__ __forceinline__ u32 scan_items(const Items<MEMBERS>& items, Ring& ring, u32 item, u32 end, u32 step, u32 first) {
    if (item >= end) return item;
    const JointRoom<MEMBERS>& room = items.room;
    Fragments<C> fragments;
    fragments_of<C>(room, first, fragments);
    const u32 in_chunk = threadIdx.x / 32 % RUNS_A_CHUNK * RUN_ROWS + own_row<C>();
    const auto held_by = [=](u32 set, u32 held) { return first + column_of<C>(set * HEAD_TILES, 2 * (threadIdx.x % 4) + held).member; };
    u32 chunk = items.chunk_of(item, first), most_sinks = 0, own = threadIdx.x % 32;
    const u32 in_run = own / 16 * 16 * LABEL_BYTES;
    Outlet<C> out;
#pragma unroll
    for (u32 set = 0; set < C::SETS; set++) {
#pragma unroll
        for (u32 held = 0; held < Keys<C>::HELD; held++) {
            out.keys[set][held] = room.members[held_by(set, held)].keys + (u64)(chunk * CHUNK_TOKENS + in_chunk) * 2;
            out.bins[set][held] = shared_address(room.bins[held_by(set, held)]);
        }
    }
#pragma unroll
    for (u32 member = 0; member < C::MEMBERS; member++) most_sinks = max(most_sinks, room.members[first + member].sinks);
    u32 from_ring = ring.first + in_run;
    // As in score.cu: kept rather than computed again.
    asm volatile("" : "+r"(from_ring), "+r"(own));
#pragma unroll
    for (u32 group = 0; group < N_GROUPS; group++) asm volatile("" : "+r"(fragments.shifts[group]));
    for (; item < end; item += step, chunk += step) {
        const u8* labels = nullptr;
        const u8* next = nullptr;
        if constexpr (STAGES > 0) {
            next = items.labels_of(item + STAGES * step);
            wait_copy_groups<(STAGES > 0 ? STAGES - 1 : 0)>();
            __syncwarp();
        } else {
            labels = items.labels_of(item) + in_run;
        }
        const auto sinks = [&](u32 set, u32 held) {
            const u32 all = room.members[held_by(set, held)].sinks, row = chunk * CHUNK_TOKENS + in_chunk;
            return all > row ? all - row : 0;
        };
        const auto from = read_from<(STAGES > 0)>(from_ring + ring.stage * RUN_BYTES, labels);
        scan_run<C>(from, fragments, out, chunk * CHUNK_TOKENS < most_sinks, sinks, own, [](u32, u32, float, u32&) {});
#pragma unroll
        for (u32 set = 0; set < C::SETS; set++)
#pragma unroll
            for (u32 held = 0; held < Keys<C>::HELD; held++) out.keys[set][held] += step * CHUNK_TOKENS * 2;
        if constexpr (STAGES > 0) {
            __syncwarp();
            ring.ask(ring.stage, next);
            ring.stage = ring.stage + 1 == STAGES ? 0 : ring.stage + 1;
        }
    }
    return item;
}

// By the first MEMBERS threads: what the others need to know.
template <u32 MEMBERS>
__device__ __forceinline__ void set_members(const JointJob& joint, u32 lane, JointRoom<MEMBERS>& room) {
    const StepJob& job = joint.jobs[threadIdx.x];
    const SequenceState sequence = *reinterpret_cast<const SequenceState*>(job.sequences);
    const u32 chunks = sequence.length ? sequence.chunks : 0;
    constexpr u32 ALL = (1u << MEMBERS) - 1;
    const u32 common = __shfl_sync(ALL, sequence.common, 0);
    u32 end = threadIdx.x ? chunks - common : chunks;
#pragma unroll
    for (u32 step = 1; step < MEMBERS; step *= 2) {
        const u32 before = __shfl_up_sync(ALL, end, step);
        if (threadIdx.x >= step) end += before;
    }
    const u64 keys = (u64)__cvta_generic_to_global(reinterpret_cast<u16*>(job.keys) + (u64)lane * job.max_rows);
    room.members[threadIdx.x] = {sequence.label_slots, keys, sequence.length, chunks, end, sequence.sinks};
    if (threadIdx.x == 0) room.common = common;
}

// The newest rows of all members, keys of every row before their horizons, and histograms of these.
template <u32 MEMBERS>
__device__ __forceinline__ void score_jointly(const JointJob& joint, u8* rings, JointRoom<MEMBERS>& room) {
    const StepJob& job = joint.jobs[0];
    const u32 lane = blockIdx.y, warp = threadIdx.x / 32;
    const LayerPlace place = *reinterpret_cast<const LayerPlace*>(job.places);
    if (threadIdx.x < MEMBERS) set_members(joint, lane, room);
    fetch_coder(job, lane, room.coder);
    __syncthreads();
    const u64 part = place.labels + lane * (CHUNK_TOKENS * LABEL_BYTES) + warp % RUNS_A_CHUNK * RUN_BYTES;
    const Items<MEMBERS> items = {room, part, joint.members};
    Ring ring = {shared_address(rings + warp * (STAGES * RUN_BYTES)), 0};
    const u32 step = gridDim.x * CHUNKS_AT_ONCE;
    u32 item = (blockIdx.x * WARPS + warp) / RUNS_A_CHUNK;
#pragma unroll
    for (u32 stage = 0; stage < ASKED_AT_FIRST; stage++) ring.ask(stage, items.labels_of(item + stage * step));
    for (u32 bin = threadIdx.x; bin < MEMBERS * BINS; bin += SCORE_THREADS) room.bins[0][bin] = 0;
    enter_stream();
    for (u32 member = 0; member < joint.members; member++) {
        const StepJob& own = joint.jobs[member];
        if (room.members[member].length && (blockIdx.x + 1 + member) % gridDim.x == 0)
            append_row(own, *reinterpret_cast<const SequenceState*>(own.sequences), *reinterpret_cast<const LayerPlace*>(own.places), 0, lane);
    }
    // Those beyond the last are the first.
    for (u32 member = 0; member < MEMBERS; member++) set_scorer(joint.jobs[member], lane, sums_of(room.members[member].chunks), room.coder, room.weights[member], room.lse[member]);
#pragma unroll
    for (u32 stage = ASKED_AT_FIRST; stage < STAGES; stage++) ring.ask(stage, items.labels_of(item + stage * step));
    __syncthreads();
    item = scan_items<Columns<MEMBERS>>(items, ring, item, room.common, step, 0);
    for (u32 member = 0; member < joint.members; member++) item = scan_items<Alone>(items, ring, item, room.members[member].end, step, member);
    __syncthreads();
    for (u32 member = 0; member < joint.members; member++) add_counts(joint.jobs[member], lane, room.bins[member]);
}

#if GROUP <= 8
// The samples of all members, a layer of the grid each.
extern "C" __global__ void __launch_bounds__(SCORE_THREADS, 2) sample_members(const JointJob joint) {
    __shared__ SampleRoom room;
    sample_lane(joint.jobs[blockIdx.z], room);
}

extern "C" __global__ void __launch_bounds__(SCORE_THREADS, 2) score_2(const JointJob joint) {
    extern __shared__ __align__(16) u8 rings[];
    __shared__ JointRoom<2> room;
    score_jointly(joint, rings, room);
}
#endif

#if GROUP <= 4
extern "C" __global__ void __launch_bounds__(SCORE_THREADS, 2) score_4(const JointJob joint) {
    extern __shared__ __align__(16) u8 rings[];
    __shared__ JointRoom<4> room;
    score_jointly(joint, rings, room);
}
#endif
