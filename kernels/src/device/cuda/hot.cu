// Makes room for selected rows that are not hot, and fetches them from host memory.
//
// Victims are the hot rows of lowest importance in this step (DESIGN.md, section 6), by the upper bits of their keys. Which rows are hot
// decides where a row is read from, never the result. A lane has at least as many hot places as it selects rows, so there is always room.
#include "types.cuh"
#include "mma.cuh"

constexpr u32 PICK_THREADS = 512;
constexpr u32 GATHER_THREADS = 1024;
constexpr u32 GATHER_WARPS = GATHER_THREADS / 32;
constexpr u32 MAX_LANES = 64;

// Takes the next index of a counter for every thread of a warp that wants one.
__device__ __forceinline__ u32 next_index(u32* counter, bool wanted) {
    const u32 mask = __ballot_sync(0xFFFFFFFFu, wanted);
    if (mask == 0) return 0;
    const u32 lane = threadIdx.x % 32, leader = __ffs(mask) - 1;
    u32 first = 0;
    if (lane == leader) first = atomicAdd(counter, __popc(mask));
    return __shfl_sync(0xFFFFFFFFu, first, leader) + __popc(mask & ((1u << lane) - 1));
}

struct Cut {
    u32 bin;      // every candidate of a lower bin is taken
    u32 of_last;  // and so many of this one
};

// The bin up to which `wanted` candidates reach.
__device__ __forceinline__ Cut find_cut(const u32* bins, u32 wanted, u32* warps, Cut* found) {
    constexpr u32 own = BINS / PICK_THREADS;
    u32 counts[own], sum = 0;
#pragma unroll
    for (u32 i = 0; i < own; i++) sum += counts[i] = bins[threadIdx.x * own + i];
    u32 inclusive = sum;
#pragma unroll
    for (u32 step = 1; step < 32; step *= 2) {
        const u32 before = __shfl_up_sync(0xFFFFFFFFu, inclusive, step);
        if (threadIdx.x % 32 >= step) inclusive += before;
    }
    if (threadIdx.x % 32 == 31) warps[threadIdx.x / 32] = inclusive;
    __syncthreads();
    for (u32 warp = 0; warp < threadIdx.x / 32; warp++) inclusive += warps[warp];
    u32 below = inclusive - sum;
#pragma unroll
    for (u32 i = 0; i < own; i++) {
        if (below < wanted && below + counts[i] >= wanted) *found = {threadIdx.x * own + i, wanted - below};
        below += counts[i];
    }
    __syncthreads();
    return *found;
}

// Lists as many places as the lane misses rows: all candidates of lower bins, then of the last bin whoever comes first.
extern "C" __global__ void __launch_bounds__(PICK_THREADS) pick_victims(const StepJob job) {
    __shared__ u32 warps[PICK_THREADS / 32];
    __shared__ Cut found;
    enter_stream();
    const u32 lane = blockIdx.y, slot = blockIdx.z;
    const SequenceState sequence = reinterpret_cast<const SequenceState*>(job.sequences)[slot];
    if (sequence.length == 0 || sequence.count == 0) return;
    const u64 own_lane = slot * job.lanes + lane;
    VictimCounts& counts = reinterpret_cast<VictimCounts*>(job.victim_counts)[own_lane];
    const u32 missed = counts.missed;
    if (missed == 0) return;
    const PartCounts* parts = reinterpret_cast<const PartCounts*>(job.part_counts) + own_lane * PARTS;
    u32 last_tie = parts[threadIdx.x % PARTS].last_tie;
#pragma unroll
    for (int step = 16; step > 0; step /= 2) last_tie = max(last_tie, __shfl_xor_sync(0xFFFFFFFFu, last_tie, step));
    const u32 threshold = parts[0].threshold;
    const LayerPlace place = reinterpret_cast<const LayerPlace*>(job.places)[slot];
    const Cut cut = find_cut(reinterpret_cast<const u32*>(job.victim_bins) + own_lane * BINS, missed, warps, &found);
    const u16* keys = reinterpret_cast<const u16*>(job.keys) + own_lane * job.max_rows;
    const u32 rows = sequence.chunks * CHUNK_TOKENS;
    const u32* owner = reinterpret_cast<const u32*>(place.owner) + (u64)lane * place.pool;
    u32* victims = reinterpret_cast<u32*>(job.victims) + own_lane * job.max_count;
    const u32 size = (place.pool + gridDim.x * 32 - 1) / (gridDim.x * 32) * 32;
    const u32 begin = blockIdx.x * size, end = begin + size;
    for (u32 base = begin; base < end; base += PICK_THREADS) {
        const u32 at = base + threadIdx.x;
        const bool present = at < end && at < place.pool;
        const u32 row = present ? owner[at] : 0;
        const u32 key = present && row < rows ? keys[row] : 0;
        const bool candidate = present && (row == NOBODY || key < threshold || (key == threshold && row >= last_tie));
        const u32 bin = row == NOBODY ? 0 : key / REFINED;
        const bool lower = candidate && bin < cut.bin, last = candidate && bin == cut.bin;
        const u32 of_lower = next_index(&counts.lower, lower);
        if (lower) victims[cut.of_last + of_lower] = at;
        const u32 of_last = next_index(&counts.last, last);
        if (last && of_last < cut.of_last) victims[of_last] = at;
    }
}

// One row to fetch.
struct Fetch {
    u64 from, to;
};

struct GatherRoom {
    u32 first[PARTS][MAX_LANES];   // index in the lane's list of the part's first row
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
    const PartCounts* parts = reinterpret_cast<const PartCounts*>(job.part_counts) + (u64)slot * job.lanes * PARTS;
    const u32 part = threadIdx.x % 32;
    for (u32 lane = threadIdx.x / 32; lane < job.lanes; lane += GATHER_WARPS) {
        const PartCounts counts = parts[lane * PARTS + part];
        room.first[part][lane] = counts.first;
        room.missed[part][lane] = counts.missed;
        room.before[part][lane] = warp_prefix(counts.missed) - counts.missed;
    }
    __syncthreads();
    if (threadIdx.x < 32) {
        u32 most = 0;
        for (u32 lane = 0; lane < job.lanes; lane++) most = max(most, room.missed[part][lane]);
        room.items[part + 1] = warp_prefix(most * job.lanes);
        if (part == 0) room.items[0] = 0;
    }
    __syncthreads();
}

// Item `item` of a slot: the r-th miss of a lane in a part, lanes side by side, so that rows in flight lie near each other. Gives the row its
// place. {0, 0} where the lane misses fewer.
__device__ __forceinline__ Fetch take_item(const StepJob& job, u32 slot, const SequenceState& sequence, const LayerPlace& place, const GatherRoom& room, u32 item) {
    // The last part that begins at or before the item.
    u32 part = 0;
#pragma unroll
    for (u32 step = PARTS / 2; step > 0; step /= 2) part += room.items[part + step] <= item ? step : 0;
    const u32 lane = (item - room.items[part]) % job.lanes, rank = (item - room.items[part]) / job.lanes;
    if (rank >= room.missed[part][lane]) return {0, 0};
    const u64 own_lane = slot * job.lanes + lane, list = own_lane * job.max_count;
    const u32 index = reinterpret_cast<const u32*>(job.misses)[list + room.first[part][lane] + rank];
    const u32 row = reinterpret_cast<const u32*>(job.positions)[list + index];
    const u32 to = reinterpret_cast<const u32*>(job.victims)[list + room.before[part][lane] + rank];
    u32* owner = reinterpret_cast<u32*>(place.owner) + (u64)lane * place.pool + to;
    u16* map = reinterpret_cast<u16*>(place.map) + (u64)lane * place.max_rows;
    const u32 old = *owner;
    if (old != NOBODY) map[old] = (u16)COLD;
    *owner = row;
    map[row] = (u16)to;
    reinterpret_cast<u32*>(job.hot_places)[list + index] = to;
    const u32 chunk = reinterpret_cast<const u32*>(sequence.slots)[row / CHUNK_TOKENS];
    const u64 page = reinterpret_cast<const u64*>(job.planes)[chunk >> 16] + (chunk & 0xFFFFu) * job.host_page_bytes;
    return {page + ((u64)lane * CHUNK_TOKENS + row % CHUNK_TOKENS) * ROW_BYTES, place.hot + ((u64)lane * place.pool + to) * ROW_BYTES};
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
extern "C" __global__ void __launch_bounds__(GATHER_THREADS) gather(const StepJob job) {
    __shared__ GatherRoom room;
    enter_stream();
    for (u32 slot = 0; slot < job.slots; slot++) {
        const SequenceState sequence = reinterpret_cast<const SequenceState*>(job.sequences)[slot];
        if (sequence.length == 0 || sequence.count == 0) continue;
        const VictimCounts* counts = reinterpret_cast<const VictimCounts*>(job.victim_counts) + (u64)slot * job.lanes;
        if (!__syncthreads_or(threadIdx.x < job.lanes && counts[threadIdx.x].missed)) continue;
        set_room(job, slot, room);
        const u32 items = room.items[PARTS];
        const LayerPlace place = reinterpret_cast<const LayerPlace*>(job.places)[slot];
        for (u32 first = (blockIdx.x + gridDim.x * (threadIdx.x / 32)) * 32; first < items; first += gridDim.x * GATHER_WARPS * 32) {
            const u32 item = first + threadIdx.x % 32;
            const Fetch fetch = item < items ? take_item(job, slot, sequence, place, room, item) : Fetch{0, 0};
            fetch_rows(fetch);
        }
    }
}
