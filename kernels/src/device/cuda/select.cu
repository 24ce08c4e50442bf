// Top-k of 16-bit importance keys in token order, which of the selected rows are hot, and which hot rows give way to those that are not.
//
// The score kernel has counted the upper 11 bits of every lane's keys. Some blocks, a power of two and PARTS at most, share a lane; each finds
// the bin of the threshold and counts, in its part, the rows above that bin and the lower 5 bits of those in it, which of them are not hot, and
// how important the hot rows below the bin are. They publish these counts and wait for each other's (parts.cuh). From them each knows the
// threshold, how many rows of exactly that key are taken (the lowest positions), where its rows go, whether the lane misses any, and how many
// at most. It lists its rows; where the lane misses some, also the least important hot rows that were not selected, as victims (DESIGN.md,
// section 6), by class of importance. There may be more victims than misses; the last ones are the most important. Which rows are hot decides
// where a row is read from, never the result. A lane has at least as many hot places as it selects rows, so there is always room.
#include "parts.cuh"

// Consecutive rows that a thread holds at once, and those of a block, and how many of these a block holds at most. Parts of up to 2^18 rows a
// lane are one tile, where there are PARTS of them.
constexpr u32 OWN_ROWS = 16;
constexpr u32 TILE_ROWS = SELECT_THREADS * OWN_ROWS;
constexpr u32 MOST_TILES = 2;
// Rows that a thread lists at a time, so that what it looks up for them does not wait for each other.
constexpr u32 AT_ONCE = 4;
// Whose thread counts the block.
constexpr u32 USHER = SELECT_THREADS - 1;
// Blocks of a lane's hot places at most.
constexpr u32 MOST_BLOCKS = COLD / POOL_BLOCK;

struct Part {
    u32 first, end;  // rows
};

// Part `part` of as many as the grid has.
__device__ __forceinline__ Part part_of(u32 rows, u32 part) {
    const u32 size = (rows + gridDim.x * CHUNK_TOKENS - 1) / (gridDim.x * CHUNK_TOKENS) * CHUNK_TOKENS;
    const u32 first = min(rows, part * size);
    return {first, min(rows, first + size)};
}

// The bin that holds the `wanted`-th largest key. `room`: one word a warp; `found`: where the result is shared.
__device__ __forceinline__ u32 find_bin(const u32* histogram, u32 wanted, u32* room, u32* found) {
    static_assert(BINS == 4 * SELECT_THREADS, "four bins a thread");
    // Thread 0 has the highest bins.
    const uint4 words = reinterpret_cast<const uint4*>(histogram)[SELECT_THREADS - 1 - threadIdx.x];
    const u32 counts[4] = {words.w, words.z, words.y, words.x};
    u32 above = block_sum(counts[0] + counts[1] + counts[2] + counts[3], room).before;
#pragma unroll
    for (u32 i = 0; i < 4; i++) {
        if (above < wanted && above + counts[i] >= wanted) *found = BINS - 1 - (threadIdx.x * 4 + i);
        above += counts[i];
    }
    __syncthreads();
    return *found;
}

// Counts the upper bits of keys, for keys that the score kernel did not make; the first `sinks` rows are given the highest key.
extern "C" __global__ void __launch_bounds__(SELECT_THREADS) count_keys(const StepJob job) {
    __shared__ u32 bins[BINS];
    enter_stream();
    const u32 lane = blockIdx.y, slot = blockIdx.z;
    const SequenceState sequence = reinterpret_cast<const SequenceState*>(job.sequences)[slot];
    if (sequence.length == 0) return;
    const u32 rows = sequence.chunks * CHUNK_TOKENS;
    const Part part = part_of(rows, blockIdx.x);
    u16* keys = reinterpret_cast<u16*>(job.keys) + (u64)(slot * job.lanes + lane) * job.max_rows;
    for (u32 bin = threadIdx.x; bin < BINS; bin += SELECT_THREADS) bins[bin] = 0;
    __syncthreads();
    for (u32 row = part.first + threadIdx.x; row < part.end; row += SELECT_THREADS) {
        if (row < sequence.sinks) keys[row] = 0xFFFF;
        atomicAdd(&bins[keys[row] / REFINED], 1);
    }
    __syncthreads();
    u32* histogram = reinterpret_cast<u32*>(job.histogram) + (slot * job.lanes + lane) * BINS;
    for (u32 bin = threadIdx.x; bin < BINS; bin += SELECT_THREADS)
        if (bins[bin]) atomicAdd(&histogram[bin], bins[bin]);
}

// Sixteen-bit values of a thread's rows, in shared memory: only that thread reads and writes them.
struct OwnValues {
    uint4 words[2];
};

__device__ __forceinline__ u32 value_at(const OwnValues& values, u32 i) { return reinterpret_cast<const u16*>(values.words)[i]; }

// Twice a mask, and 1 where a sum carries.
__device__ __forceinline__ u32 with_carry(u32 mask, u32 first, u32 second) {
    u32 result;
    asm("{\n\t.reg .u32 sum;\n\tadd.cc.u32 sum, %1, %2;\n\taddc.u32 %0, %3, %3;\n\t}" : "=r"(result) : "r"(first), "r"(second), "r"(mask));
    return result;
}

// The thread's rows before `end`: a bit each. Chunks end where a thread's rows do.
__device__ __forceinline__ u32 rows_within(u32 row, u32 end) { return row < end ? 0xFFFFu : 0; }

// The rows whose value is at least `bound`: a bit each.
__device__ __forceinline__ u32 at_least(const OwnValues& values, u32 bound) {
    static_assert(OWN_ROWS == 16, "two words of eight");
    if (bound == 0) return 0xFFFFu;
    if (bound > 0xFFFFu) return 0;
    // Adding this to a value in the upper half of a word carries where the value is large enough.
    const u32 rest = 0u - (bound << 16);
    u32 mask = 0;
#pragma unroll
    for (u32 i = 8; i-- > 0;) {
        const uint4 words = values.words[i / 4];
        const u32 pair = i % 4 == 3 ? words.w : i % 4 == 2 ? words.z : i % 4 == 1 ? words.y : words.x;
        mask = with_carry(mask, pair, rest);
        mask = with_carry(mask, pair << 16, rest);
    }
    return mask;
}

// The rows whose value is that of the row before: a bit each.
__device__ __forceinline__ u32 same_as_before(const OwnValues& values) {
    u32 mask = 0, before = 0;
#pragma unroll
    for (u32 i = 0; i < OWN_ROWS / 2; i++) {
        const uint4 words = values.words[i / 4];
        const u32 pair = i % 4 == 3 ? words.w : i % 4 == 2 ? words.z : i % 4 == 1 ? words.y : words.x, low = pair & 0xFFFFu, high = pair >> 16;
        if (i > 0 && low == before) mask |= 1u << 2 * i;
        if (high == low) mask |= 2u << 2 * i;
        before = high;
    }
    return mask;
}

// Takes the rows of a mask, neighbours of the same value at a time: `take(first, rows)`. Keys of neighbours are often the same where many rows
// are hot or selected, and then one addition counts them all.
template <typename Take>
__device__ __forceinline__ void each_run(u32 mask, u32 same, const Take& take) {
#pragma unroll 1
    while (mask) {
        const u32 first = __ffs(mask) - 1, rows = __ffs(~((mask & same) >> first >> 1));
        mask &= ~0u << (first + rows);
        take(first, rows);
    }
}

// The lowest `count` bits of a mask.
__device__ __forceinline__ u32 lowest_bits(u32 mask, u32 count) {
    u32 dropped = __popc(mask);
    dropped -= min(dropped, count);
#pragma unroll 1
    for (; dropped; dropped--) mask &= ~(0x80000000u >> __clz(mask));
    return mask;
}

// Takes the lowest bit of a mask.
__device__ __forceinline__ u32 next_bit(u32& mask) {
    const u32 i = __ffs(mask) - 1;
    mask &= mask - 1;
    return i;
}

// What the blocks of a lane do with its rows.
struct Lane {
    const u16* keys;
    const u16* map;    // or none: every row is hot at its own position
    const u32* owner;  // by stored row
    const u32* blocks; // of the lane's places
    u32 pool;          // hot places of the lane
    u32* positions;    // from the lane's first on
    u32* places;
    Miss* misses;
    Victim* victims;
    VictimCounts* counts;
    const u32* slots;
    const u64* planes;
    u64 page_bytes, in_page;  // of the host
};

__device__ __forceinline__ Lane lane_of(const StepJob& job, const SequenceState& sequence, const LayerPlace& place, u32 slot, u32 lane) {
    const u64 own_lane = slot * job.lanes + lane, list = own_lane * job.max_count;
    return {
        reinterpret_cast<const u16*>(job.keys) + own_lane * job.max_rows,
        place.map ? reinterpret_cast<const u16*>(place.map) + (u64)lane * place.max_rows : nullptr,
        reinterpret_cast<const u32*>(place.owner),
        reinterpret_cast<const u32*>(place.blocks) + (u64)lane * place.max_blocks,
        place.map ? reinterpret_cast<const u32*>(place.pools)[lane] : 0,
        reinterpret_cast<u32*>(job.positions) + list,
        reinterpret_cast<u32*>(job.hot_places) + list,
        reinterpret_cast<Miss*>(job.misses) + list,
        reinterpret_cast<Victim*>(job.victims) + list,
        reinterpret_cast<VictimCounts*>(job.victim_counts) + own_lane,
        reinterpret_cast<const u32*>(sequence.slots),
        reinterpret_cast<const u64*>(job.planes),
        job.host_page_bytes,
        (u64)lane * CHUNK_TOKENS * ROW_BYTES,
    };
}

// Keys and hot places of a tile's rows; which rows are hot, and which have the key of the row before: a bit each.
struct Tile {
    OwnValues keys[SELECT_THREADS], places[SELECT_THREADS];
    u16 hot[SELECT_THREADS], same[SELECT_THREADS];
};
static_assert(sizeof(Tile) == SELECT_TILE_BYTES, "as in step.rs");

// Room that the block's threads share, beside tiles.
struct Room {
    AllParts parts;
    u32 blocks[MOST_BLOCKS];  // where the lane's places are stored
    u64 pages[MOST_TILES * TILE_ROWS / CHUNK_TOKENS];  // where the lane's rows of the part's chunks lie on the host
    u64 counted[SELECT_WARPS];
    u32 sums[2][SELECT_WARPS];
    u32 counts[PART_WORDS];
    u32 first_cold[REFINED];  // first row of each key in the bin that is not hot
    u32 before[REFINED];      // rows of that key before it
    u32 found, launch;
};

// The thread's places, where rows have any, and which of them are hot. What no kernel changes between a step's gather and the next step's.
__device__ __forceinline__ void load_places(const u16* map, bool has, Tile& tile) {
    OwnValues& places = tile.places[threadIdx.x];
    if (has) places.words[0] = reinterpret_cast<const uint4*>(map)[0], places.words[1] = reinterpret_cast<const uint4*>(map)[1];
    tile.hot[threadIdx.x] = has ? ~at_least(places, COLD) : 0;
}

// The thread's keys. Rows that are not there have the lowest one.
__device__ __forceinline__ void load_keys(const u16* from, bool has, Tile& tile) {
    OwnValues& keys = tile.keys[threadIdx.x];
    keys.words[0] = has ? reinterpret_cast<const uint4*>(from)[0] : uint4{0, 0, 0, 0};
    keys.words[1] = has ? reinterpret_cast<const uint4*>(from)[1] : uint4{0, 0, 0, 0};
    tile.same[threadIdx.x] = same_as_before(keys);
}

// Both, by a function of its own: few parts are so long, and the code of the others stays short.
__device__ __noinline__ void load_again(const u16* map, const u16* keys, bool has, Tile& tile) {
    load_places(map, map && has, tile);
    load_keys(keys, has, tile);
}

// A part's tiles. Where there is room for all of them they are loaded once, otherwise anew in each pass.
struct Tiles {
    Tile* tiles;
    Part rows;
    bool held;
};

__device__ __forceinline__ Tiles tiles_of(const Part rows, Tile* tiles) {
    u32 bytes;
    asm("mov.u32 %0, %%dynamic_smem_size;" : "=r"(bytes));
    return {tiles, rows, rows.end - rows.first <= bytes / (u32)sizeof(Tile) * TILE_ROWS};
}

// First of the thread's rows in the tile that begins at `base`.
__device__ __forceinline__ u32 own_row(u32 base) { return base + threadIdx.x * OWN_ROWS; }

__device__ __forceinline__ Tile& tile_of(const Tiles& tiles, u32 base) { return tiles.tiles[(base - tiles.rows.first) / TILE_ROWS]; }

// The tile that begins at `base`, loaded. A thread uses its own rows only.
__device__ __forceinline__ Tile& tile_at(const Lane& lane, const Tiles& tiles, u32 base) {
    if (tiles.held) return tile_of(tiles, base);
    const u32 row = own_row(base);
    load_again(lane.map ? lane.map + row : nullptr, lane.keys + row, row < tiles.rows.end, tiles.tiles[0]);
    return tiles.tiles[0];
}

// Where the lane's rows of a chunk lie on the host.
__device__ __forceinline__ u64 page_of(const Lane& lane, u32 chunk) {
    const u32 at = lane.slots[chunk];
    return lane.planes[at >> 16] + (at & 0xFFFFu) * lane.page_bytes + lane.in_page;
}

// Counts the part's rows above the bin and those of each key in it, which of them are not hot, and the hot rows below the bin by class. The
// counts are complete after the next barrier, but for `before`, for which count_before_cold has to follow.
__device__ __forceinline__ void count_part(const Lane& lane, const Tiles& tiles, u32 bin, Room& room) {
    u32 above = 0, cold = 0, cold_above = 0, hot_rows = 0;
#pragma unroll 1
    for (u32 base = tiles.rows.first; base < tiles.rows.end; base += TILE_ROWS) {
        const Tile& tile = tile_at(lane, tiles, base);
        const OwnValues& keys = tile.keys[threadIdx.x];
        const u32 over = at_least(keys, (bin + 1) * REFINED), from_bin = at_least(keys, bin * REFINED) & rows_within(own_row(base), tiles.rows.end);
        const u32 in_bin = from_bin & ~over, same = tile.same[threadIdx.x];
        above += __popc(over);
        each_run(in_bin, same, [&](u32 first, u32 rows) { atomicAdd(&room.counts[OF_KEY + value_at(keys, first) % REFINED], rows); });
        if (lane.map == nullptr) continue;
        const u32 hot = tile.hot[threadIdx.x];
        cold += __popc(from_bin & ~hot);
        cold_above += __popc(over & ~hot);
        hot_rows += __popc(hot);
        each_run(in_bin & ~hot, same, [&](u32 first, u32) { atomicMin(&room.first_cold[value_at(keys, first) % REFINED], own_row(base) + first); });
        each_run(hot & ~from_bin, same, [&](u32 first, u32 rows) { atomicAdd(&room.counts[OF_CLASS + class_of(value_at(keys, first) / REFINED, bin)], rows); });
    }
    above = warp_sum(above);
    if (threadIdx.x % 32 == 0 && above) atomicAdd(&room.counts[OVER], above);
    if (lane.map == nullptr) return;
    cold = warp_sum(cold), cold_above = warp_sum(cold_above), hot_rows = warp_sum(hot_rows);
    if (threadIdx.x % 32) return;
    if (cold) atomicAdd(&room.counts[COLD_ROWS], cold), atomicAdd(&room.counts[COLD_ABOVE], cold_above);
    if (hot_rows) atomicAdd(&room.counts[HOT_ROWS], hot_rows);
}

// Counts, for each key in the bin, the rows before the first that is not hot.
__device__ __forceinline__ void count_before_cold(const Lane& lane, const Tiles& tiles, u32 bin, Room& room) {
#pragma unroll 1
    for (u32 base = tiles.rows.first; base < tiles.rows.end; base += TILE_ROWS) {
        const Tile& tile = tile_at(lane, tiles, base);
        const OwnValues& keys = tile.keys[threadIdx.x];
        const u32 hot_in_bin = at_least(keys, bin * REFINED) & ~at_least(keys, (bin + 1) * REFINED) & tile.hot[threadIdx.x];
        each_run(hot_in_bin, tile.same[threadIdx.x], [&](u32 first, u32 rows) {
            const u32 key = value_at(keys, first) % REFINED;
            if (own_row(base) + first < room.first_cold[key]) atomicAdd(&room.before[key], rows);
        });
    }
}

// Publishes what the part has counted.
__device__ __forceinline__ void publish(u64* words, const Room& room) {
    static_assert(PART_WORDS <= 96 && BEFORE_COLD + REFINED / 2 == OF_CLASS, "three warps, and one for the keys");
    const u32 word = threadIdx.x;
    if (word < PART_WORDS && word != COLD_KEYS) {
        u32 value = room.counts[word];
        if (word >= BEFORE_COLD && word < OF_CLASS) {
            const u32 key = 2 * (word - BEFORE_COLD);
            value = min(room.before[key], 0xFFFFu) | min(room.before[key + 1], 0xFFFFu) << 16;
        }
        give_word(words + word, value, room.launch);
    } else if (word / 32 == 3) {
        const u32 keys = __ballot_sync(0xFFFFFFFFu, room.first_cold[word % 32] != NOBODY);
        if (word % 32 == 0) give_word(words + COLD_KEYS, keys, room.launch);
    }
}

// Lists free places as victims, in no order.
__device__ __forceinline__ void list_free_places(const Lane& lane, u32 free, u32 horizon, const Room& room) {
#pragma unroll 1
    for (u32 first = blockIdx.x * SELECT_THREADS; first < lane.pool; first += gridDim.x * SELECT_THREADS) {
        const u32 place = first + threadIdx.x, at = place < lane.pool ? stored_at(room.blocks, place) : 0;
        const u32 row = place < lane.pool ? lane.owner[at] : 0;
        const u32 own = threadIdx.x % 32, found = __ballot_sync(0xFFFFFFFFu, place < lane.pool && row >= horizon);
        u32 index = own == 0 && found ? atomicAdd(&lane.counts->free, __popc(found)) : 0;
        index = __shfl_sync(0xFFFFFFFFu, index, 0) + __popc(found & ((1u << own) - 1));
        if (found >> own & 1 && index < free) lane.victims[index] = {place, row, at, 0};
    }
}

// Which of the thread's hot rows that are not selected give way to others.
struct Victims {
    u32 lower, last;
};

__device__ __forceinline__ Victims victims_of(const OwnValues& keys, u32 candidates, u32 same, u32 bin, u32 cut) {
    Victims victims = {0, 0};
    each_run(candidates, same, [&](u32 first, u32 rows) {
        const u32 of = class_of(value_at(keys, first) / REFINED, bin), run = ((1u << rows) - 1) << first;
        if (of > cut) victims.lower |= run;
        if (of == cut) victims.last |= run;
    });
    return victims;
}

// Lists the thread's rows of a mask as victims from `at` on, up to `end`.
__device__ __forceinline__ void list_victims(const Lane& lane, u32 victims, const OwnValues& places, u32 row, u32 at, u32 end, const Room& room) {
#pragma unroll 1
    for (; victims && at < end; at += AT_ONCE) {
#pragma unroll
        for (u32 i = 0; i < AT_ONCE; i++) {
            if (!victims || at + i >= end) break;
            const u32 own = next_bit(victims), place = value_at(places, own);
            lane.victims[at + i] = {place, row + own, stored_at(room.blocks, place), 0};
        }
    }
}

// Lists the part's selected rows in ascending order, those that are not hot, and where the lane misses any, victims. Returns how many rows are
// not hot.
__device__ __forceinline__ u32 list_part(const Lane& lane, const Tiles& tiles, const Share& share, const Eviction& eviction, Room& room) {
    // Counts of misses and of victims side by side in a word: a tile has fewer than 2^14 rows.
    constexpr u32 LOWER = 21, LAST = 42, COUNT = (1u << LOWER) - 1;
    const u32 end = tiles.rows.end;
    u32 over_before = 0, ties_before = 0;
    u64 counted = 0;
#pragma unroll 1
    for (u32 base = tiles.rows.first; base < end; base += TILE_ROWS) {
        const u32 row = own_row(base);
        const Tile& tile = tile_at(lane, tiles, base);
        const OwnValues &keys = tile.keys[threadIdx.x], &places = tile.places[threadIdx.x];
        const u32 over = at_least(keys, share.key + 1), equal = at_least(keys, share.key) & ~over & rows_within(row, end), hot = tile.hot[threadIdx.x];
        // Rows above and ties side by side: a tile has fewer than 65,536 of each. Tiles take turns with the words of the sum, which may be read
        // until the next tile's barrier.
        const u32 turn = (base - tiles.rows.first) / TILE_ROWS % 2;
        const Sum<u32> sum = block_sum((u32)__popc(over) | (u32)__popc(equal) << 16, room.sums[turn]);
        const u32 ties = ties_before + (sum.before >> 16), selected = over | lowest_bits(equal, share.ties - min(share.ties, ties));
        u32 at = share.first + over_before + (sum.before & 0xFFFFu) + min(ties, share.ties);
        over_before += sum.all & 0xFFFFu;
        ties_before += sum.all >> 16;
        u32 missed_before = 0;
        if (share.missed) {
            const Victims victims = victims_of(keys, hot & ~selected, tile.same[threadIdx.x], share.key / REFINED, eviction.cut);
            const Sum<u64> counts = block_sum((u64)__popc(selected & ~hot) | (u64)__popc(victims.lower) << LOWER | (u64)__popc(victims.last) << LAST, room.counted);
            const u64 before = counted + counts.before;
            missed_before = (u32)before & COUNT;
            const u32 lower = eviction.lower + ((u32)(before >> LOWER) & COUNT);
            list_victims(lane, victims.lower, places, row, lower, NOBODY, room);
            u32 last = eviction.last + (u32)(before >> LAST);
            // Nobody has counted how many of the threshold's own bin each part has.
            if (eviction.cut == 0 && victims.last) last = eviction.last + atomicAdd(&lane.counts->last, __popc(victims.last));
            list_victims(lane, victims.last, places, row, last, eviction.end, room);
            counted += counts.all;
            // The words of this sum are read before the next tile's first barrier.
        }
        Miss* miss = lane.misses + share.first + missed_before;
#pragma unroll 1
        for (u32 rest = selected; rest; at += AT_ONCE) {
#pragma unroll
            for (u32 i = 0; i < AT_ONCE; i++) {
                if (!rest) break;
                const u32 own = next_bit(rest);
                lane.positions[at + i] = row + own;
                if (lane.map == nullptr) continue;
                if (hot >> own & 1) {
                    lane.places[at + i] = stored_at(room.blocks, value_at(places, own));
                } else {
                    const u64 page = tiles.held ? room.pages[(row - tiles.rows.first) / CHUNK_TOKENS] : page_of(lane, row / CHUNK_TOKENS);
                    *miss++ = {page + (row + own) % CHUNK_TOKENS * ROW_BYTES, row + own, at + i};
                }
            }
        }
    }
    return (u32)counted & COUNT;
}

extern "C" __global__ void __launch_bounds__(SELECT_THREADS, 3) select(const StepJob job) {
    extern __shared__ __align__(16) Tile own_tiles[];
    __shared__ __align__(16) Room room;
    const u32 lane_index = job.first_lane + blockIdx.y, slot = blockIdx.z, part = blockIdx.x;
    const SequenceState sequence = reinterpret_cast<const SequenceState*>(job.sequences)[slot];
    const LayerPlace place = reinterpret_cast<const LayerPlace*>(job.places)[slot];
    const u64 own_lane = slot * job.lanes + lane_index;
    const u32 horizon = sequence.length && sequence.count ? sequence.chunks * CHUNK_TOKENS : 0;
    const Part rows = part_of(horizon, part);
    const Lane lane = lane_of(job, sequence, place, slot, lane_index);
    const Tiles tiles = tiles_of(rows, own_tiles);
    if (tiles.held) {
#pragma unroll 1
        for (u32 base = rows.first; base < rows.end; base += TILE_ROWS) load_places(lane.map + own_row(base), lane.map && own_row(base) < rows.end, tile_of(tiles, base));
    }
    if (const u32 chunk = rows.first / CHUNK_TOKENS + threadIdx.x; tiles.held && lane.map && chunk * CHUNK_TOKENS < rows.end) room.pages[threadIdx.x] = page_of(lane, chunk);
#pragma unroll 1
    for (u32 i = threadIdx.x; i < lane.pool / POOL_BLOCK; i += SELECT_THREADS) room.blocks[i] = lane.blocks[i];
    if (threadIdx.x < REFINED) room.first_cold[threadIdx.x] = NOBODY, room.before[threadIdx.x] = 0;
    if (threadIdx.x < PART_WORDS) room.counts[threadIdx.x] = 0;
    enter_stream();
    if (horizon == 0) return;
    u32 arrived = 0;
    if (threadIdx.x == USHER) arrived = arrive(&reinterpret_cast<Arrivals*>(job.arrivals)[own_lane].select, PARTS / gridDim.x);
    if (tiles.held) {
#pragma unroll 1
        for (u32 base = rows.first; base < rows.end; base += TILE_ROWS) load_keys(lane.keys + own_row(base), own_row(base) < rows.end, tile_of(tiles, base));
    }
    const u32 bin = find_bin(reinterpret_cast<const u32*>(job.histogram) + own_lane * BINS, sequence.count, room.sums[0], &room.found);
    count_part(lane, tiles, bin, room);
    if (threadIdx.x == USHER) room.launch = arrived / PARTS + 1;
    __syncthreads();
    if (lane.map) {
        count_before_cold(lane, tiles, bin, room);
        __syncthreads();
    }
    u64* words = reinterpret_cast<u64*>(job.part_words) + own_lane * PARTS * PART_WORDS;
    publish(words + part * PART_WORDS, room);
    take_words(words, gridDim.x, room.launch, room.parts);
    if (threadIdx.x < 32) room.parts.share = share_of(room.parts, bin, sequence.count, part);
    if (threadIdx.x / 32 == 1 && lane.map) room.parts.eviction = eviction_of(room.parts, lane.pool, sequence.count, part);
    __syncthreads();
    const Share share = room.parts.share;
    const Eviction eviction = room.parts.eviction;
    if (share.missed && eviction.free) list_free_places(lane, eviction.free, horizon, room);
    const u32 missed = list_part(lane, tiles, share, eviction, room);
    if (lane.map == nullptr || threadIdx.x > 0) return;
    reinterpret_cast<PartCounts*>(job.part_counts)[own_lane * PARTS + part] = {share.first, missed};
    u64* counters = reinterpret_cast<u64*>(job.counters) + own_lane * 2;
    atomicAdd(&counters[0], (u64)(share.count - missed));
    if (missed) atomicAdd(&counters[1], (u64)missed);
}
