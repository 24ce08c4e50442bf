// Fetches selected rows that are not hot from host memory, to the places of the victims that select.cu has listed.
#include "types.cuh"

constexpr u32 GATHER_THREADS = 384;
constexpr u32 GATHER_WARPS = GATHER_THREADS / 32;
constexpr u32 MAX_LANES = 64;
// Blocks that a processor could hold: a gather of 32 registers leaves room for a block of `score` and one of `select` beside it, to the last one.
constexpr u32 GATHER_AT_LEAST = 5;

// A block of hot places that goes from one lane to another: struct BlockMove of store.rs.
struct BlockMove {
    u64 map;        // u16[row] of the giver
    u64 owner;      // u32[POOL_BLOCK]: rows of the block's places
    u64 entry;      // u32: where the receiver's list of blocks goes on
    u64 from_pool;  // u32: places of the giver
    u64 to_pool;    // and of the receiver
    u32 block, unused;
};

struct MoveJob {
    u64 moves;  // BlockMove[block of the grid]
};

static_assert(sizeof(BlockMove) == BLOCK_MOVE_BYTES, "as in store.rs");
static_assert(sizeof(MoveJob) == MOVE_JOB_BYTES, "as in step.rs");

// One row to fetch.
struct Fetch {
    u64 from, to;
};

// A lane selects fewer rows than it has hot places, which are less than 2^16.
struct GatherRoom {
    u16 first[PARTS][MAX_LANES];   // by lane of the launch: index in the lane's list of the part's first row
    u16 missed[PARTS][MAX_LANES];
    u16 before[PARTS][MAX_LANES];  // rows that the lane misses in earlier parts
    u32 items[PARTS + 1];          // lanes x the most that any lane misses, summed over earlier parts
};

// Whether any of the thread's parts misses rows.
__device__ __forceinline__ bool own_misses(const StepJob& job) {
    const PartCounts* parts = reinterpret_cast<const PartCounts*>(job.part_counts) + (u64)job.first_lane * PARTS;
    u32 missed = 0;
    for (u32 part = threadIdx.x; part < job.lane_count * PARTS; part += GATHER_THREADS)
        if (part % PARTS < job.parts) missed |= parts[part].missed;
    return missed;
}

__device__ __forceinline__ void set_room(const StepJob& job, GatherRoom& room) {
    static_assert(PARTS == 32, "a warp has a thread for each part");
    const PartCounts* parts = reinterpret_cast<const PartCounts*>(job.part_counts) + (u64)job.first_lane * PARTS;
    const u32 part = threadIdx.x % 32;
    for (u32 lane = threadIdx.x / 32; lane < job.lane_count; lane += GATHER_WARPS) {
        const PartCounts counts = part < job.parts ? parts[lane * PARTS + part] : PartCounts{0, 0};
        room.first[part][lane] = counts.first;
        room.missed[part][lane] = counts.missed;
        room.before[part][lane] = warp_prefix(counts.missed) - counts.missed;
    }
    __syncthreads();
    if (threadIdx.x < 32) {
        u32 most = 0;
        for (u32 lane = 0; lane < job.lane_count; lane++) most = max(most, (u32)room.missed[part][lane]);
        room.items[part + 1] = warp_prefix(most * job.lane_count);
        if (part == 0) room.items[0] = 0;
    }
    __syncthreads();
}

// Item `item`: the r-th miss of a lane in a part, lanes side by side, so that rows in flight lie near each other. Gives the row its
// place. {0, 0} where the lane misses fewer.
__device__ __forceinline__ Fetch take_item(const StepJob& job, const GatherRoom& room, u32 item) {
    // The last part that begins at or before the item.
    u32 part = 0;
#pragma unroll
    for (u32 step = PARTS / 2; step > 0; step /= 2) part += room.items[part + step] <= item ? step : 0;
    const u32 of_launch = (item - room.items[part]) % job.lane_count, rank = (item - room.items[part]) / job.lane_count;
    if (rank >= room.missed[part][of_launch]) return {0, 0};
    const u32 lane = job.first_lane + of_launch;
    const u64 list = (u64)lane * job.max_count;
    const Miss miss = reinterpret_cast<const Miss*>(job.misses)[list + room.first[part][of_launch] + rank];
    const Victim victim = reinterpret_cast<const Victim*>(job.victims)[list + room.before[part][of_launch] + rank];
    const LayerPlace place = *reinterpret_cast<const LayerPlace*>(job.places);
    u16* map = reinterpret_cast<u16*>(place.map) + (u64)lane * place.max_rows;
    if (victim.row != NOBODY) map[victim.row] = (u16)COLD;
    map[miss.row] = (u16)victim.place;
    reinterpret_cast<u32*>(place.owner)[victim.at] = miss.row;
    reinterpret_cast<u32*>(job.hot_places)[list + miss.index] = victim.at;
    return {miss.from, place.hot + (u64)victim.at * ROW_BYTES};
}

// Copies the rows of a warp's items, a whole row by consecutive threads. One load a thread is on its way at a time: what it is kept in would
// take registers that blocks of other kernels need, and more warps are as good as more loads.
__device__ __forceinline__ void fetch_rows(Fetch fetch, u32 items) {
    constexpr u32 PIECES = ROW_BYTES / 16;                  // of 16 bytes
    constexpr u32 A_PASS = PIECES >= 32 ? 1 : 32 / PIECES;  // rows that one load of the warp covers
    constexpr u32 PASSES = (PIECES + 31) / 32;
    const u32 thread = threadIdx.x % 32, of_pass = thread / min(PIECES, 32), piece = thread % min(PIECES, 32);
#pragma unroll 1
    for (u32 item = of_pass; item < items + of_pass; item += A_PASS) {
        const u64 from = __shfl_sync(0xFFFFFFFFu, fetch.from, item % 32), to = __shfl_sync(0xFFFFFFFFu, fetch.to, item % 32);
        if (from == 0 || of_pass >= A_PASS) continue;
        uint4 data[PASSES];
#pragma unroll
        for (u32 pass = 0; pass < PASSES; pass++)
            if (PIECES <= 32 || pass * 32 + piece < PIECES) data[pass] = load_16_once(reinterpret_cast<const uint4*>(from) + pass * 32 + piece);
#pragma unroll
        for (u32 pass = 0; pass < PASSES; pass++)
            if (PIECES <= 32 || pass * 32 + piece < PIECES) reinterpret_cast<uint4*>(to)[pass * 32 + piece] = data[pass];
    }
}

// A small grid: more blocks fetch no faster and lose the nearness of the rows in flight (LIMITS.md).
extern "C" __global__ void __launch_bounds__(GATHER_THREADS, GATHER_AT_LEAST) gather(const StepJob job) {
    __shared__ GatherRoom room;
    enter_stream();
    const SequenceState* sequence = reinterpret_cast<const SequenceState*>(job.sequences);
    if (sequence->length == 0 || sequence->count == 0) return;
    if (!__syncthreads_or(own_misses(job))) return;
    set_room(job, room);
    const u32 items = room.items[PARTS], own = threadIdx.x % 32;
    for (u32 first = (blockIdx.x + gridDim.x * (threadIdx.x / 32)) * job.items; first < items; first += gridDim.x * GATHER_WARPS * job.items)
        fetch_rows(own < job.items && first + own < items ? take_item(job, room, first + own) : Fetch{0, 0}, job.items);
}

// Takes the last blocks of lanes, whose rows are hot no longer, and gives them to others. No lane does both. Between steps; a thread a place.
extern "C" __global__ void __launch_bounds__(POOL_BLOCK) move_blocks(const MoveJob job) {
    const BlockMove move = reinterpret_cast<const BlockMove*>(job.moves)[blockIdx.x];
    u32* owner = reinterpret_cast<u32*>(move.owner) + threadIdx.x;
    if (*owner != NOBODY) reinterpret_cast<u16*>(move.map)[*owner] = (u16)COLD;
    *owner = NOBODY;
    if (threadIdx.x > 0) return;
    *reinterpret_cast<u32*>(move.entry) = move.block;
    atomicSub(reinterpret_cast<u32*>(move.from_pool), POOL_BLOCK);
    atomicAdd(reinterpret_cast<u32*>(move.to_pool), POOL_BLOCK);
}
