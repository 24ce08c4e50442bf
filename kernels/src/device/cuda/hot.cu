// Fetches selected rows that are not hot from host memory, to the places of the victims that select.cu has listed.
#include "types.cuh"

constexpr u32 GATHER_THREADS = 384;
constexpr u32 GATHER_WARPS = GATHER_THREADS / 32;
constexpr u32 MAX_LANES = 64;

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

struct GatherRoom {
    u32 first[PARTS][MAX_LANES];   // by lane of the launch: index in the lane's list of the part's first row
    u32 missed[PARTS][MAX_LANES];
    u32 before[PARTS][MAX_LANES];  // rows that the lane misses in earlier parts
    u32 items[PARTS + 1];          // lanes x the most that any lane misses, summed over earlier parts
};

__device__ __forceinline__ u32 warp_prefix(u32 x) {
#pragma unroll
    for (u32 step = 1; step < 32; step *= 2) {
        const u32 before = __shfl_up_sync(0xFFFFFFFFu, x, step);
        if (threadIdx.x % 32 >= step) x += before;
    }
    return x;
}

__device__ __forceinline__ void set_room(const StepJob& job, u32 slot, GatherRoom& room) {
    static_assert(PARTS == 32, "a warp has a thread for each part");
    const PartCounts* parts = reinterpret_cast<const PartCounts*>(job.part_counts) + ((u64)slot * job.lanes + job.first_lane) * PARTS;
    const u32 part = threadIdx.x % 32;
    for (u32 lane = threadIdx.x / 32; lane < job.lane_count; lane += GATHER_WARPS) {
        const PartCounts counts = parts[lane * PARTS + part];
        room.first[part][lane] = counts.first;
        room.missed[part][lane] = counts.missed;
        room.before[part][lane] = warp_prefix(counts.missed) - counts.missed;
    }
    __syncthreads();
    if (threadIdx.x < 32) {
        u32 most = 0;
        for (u32 lane = 0; lane < job.lane_count; lane++) most = max(most, room.missed[part][lane]);
        room.items[part + 1] = warp_prefix(most * job.lane_count);
        if (part == 0) room.items[0] = 0;
    }
    __syncthreads();
}

// Item `item` of a slot: the r-th miss of a lane in a part, lanes side by side, so that rows in flight lie near each other. Gives the row its
// place. {0, 0} where the lane misses fewer.
__device__ __forceinline__ Fetch take_item(const StepJob& job, u32 slot, const LayerPlace& place, const GatherRoom& room, u32 item) {
    // The last part that begins at or before the item.
    u32 part = 0;
#pragma unroll
    for (u32 step = PARTS / 2; step > 0; step /= 2) part += room.items[part + step] <= item ? step : 0;
    const u32 of_launch = (item - room.items[part]) % job.lane_count, rank = (item - room.items[part]) / job.lane_count;
    if (rank >= room.missed[part][of_launch]) return {0, 0};
    const u32 lane = job.first_lane + of_launch;
    const u64 own_lane = slot * job.lanes + lane, list = own_lane * job.max_count;
    const Miss miss = reinterpret_cast<const Miss*>(job.misses)[list + room.first[part][of_launch] + rank];
    const Victim victim = reinterpret_cast<const Victim*>(job.victims)[list + room.before[part][of_launch] + rank];
    u16* map = reinterpret_cast<u16*>(place.map) + (u64)lane * place.max_rows;
    if (victim.row != NOBODY) map[victim.row] = (u16)COLD;
    map[miss.row] = (u16)victim.place;
    reinterpret_cast<u32*>(place.owner)[victim.at] = miss.row;
    reinterpret_cast<u32*>(job.hot_places)[list + miss.index] = victim.at;
    return {miss.from, place.hot + (u64)victim.at * ROW_BYTES};
}

// Copies the rows of a warp's 32 items, a whole row by consecutive threads, several rows in flight.
__device__ __forceinline__ void fetch_rows(Fetch fetch) {
    constexpr u32 PIECES = ROW_BYTES / 16;                     // of 16 bytes
    constexpr u32 A_PASS = PIECES >= 32 ? 1 : 32 / PIECES;     // rows that one load of the warp covers
    constexpr u32 PASSES = (PIECES + 31) / 32;
    constexpr u32 IN_FLIGHT = 4;
    const u32 thread = threadIdx.x % 32, piece = thread % (PIECES < 32 ? PIECES : 32), of_pass = thread / (PIECES < 32 ? PIECES : 32);
#pragma unroll 1
    for (u32 row = 0; row < 32; row += A_PASS * IN_FLIGHT) {
        uint4 data[IN_FLIGHT][PASSES];
        u64 to[IN_FLIGHT];
#pragma unroll
        for (u32 i = 0; i < IN_FLIGHT; i++) {
            const u32 item = row + i * A_PASS + of_pass;
            const u64 from = __shfl_sync(0xFFFFFFFFu, fetch.from, item % 32);
            to[i] = __shfl_sync(0xFFFFFFFFu, fetch.to, item % 32);
            if (item >= 32 || of_pass >= A_PASS) to[i] = 0;
#pragma unroll
            for (u32 pass = 0; pass < PASSES; pass++)
                if (to[i] && pass * 32 + piece < PIECES) data[i][pass] = load_16_once(reinterpret_cast<const uint4*>(from) + pass * 32 + piece);
        }
#pragma unroll
        for (u32 i = 0; i < IN_FLIGHT; i++)
#pragma unroll
            for (u32 pass = 0; pass < PASSES; pass++)
                if (to[i] && pass * 32 + piece < PIECES) reinterpret_cast<uint4*>(to[i])[pass * 32 + piece] = data[i][pass];
    }
}

// A small grid: more blocks fetch no faster and lose the nearness of the rows in flight (LIMITS.md).
extern "C" __global__ void __launch_bounds__(GATHER_THREADS, 3) gather(const StepJob job) {
    __shared__ GatherRoom room;
    enter_stream();
    for (u32 slot = 0; slot < job.slots; slot++) {
        const SequenceState sequence = reinterpret_cast<const SequenceState*>(job.sequences)[slot];
        if (sequence.length == 0 || sequence.count == 0) continue;
        const VictimCounts* counts = reinterpret_cast<const VictimCounts*>(job.victim_counts) + (u64)slot * job.lanes + job.first_lane;
        if (!__syncthreads_or(threadIdx.x < job.lane_count && counts[threadIdx.x].missed)) continue;
        set_room(job, slot, room);
        const u32 items = room.items[PARTS];
        const LayerPlace place = reinterpret_cast<const LayerPlace*>(job.places)[slot];
        for (u32 first = (blockIdx.x + gridDim.x * (threadIdx.x / 32)) * 32; first < items; first += gridDim.x * GATHER_WARPS * 32) {
            const u32 item = first + threadIdx.x % 32;
            const Fetch fetch = item < items ? take_item(job, slot, place, room, item) : Fetch{0, 0};
            fetch_rows(fetch);
        }
    }
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
