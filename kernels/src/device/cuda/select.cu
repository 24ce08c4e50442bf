// Top-k of 16-bit importance keys in token order, which of the selected rows are hot, and which hot rows give way to those that are not.
//
// The score kernel has counted the upper 11 bits of every lane's keys. Some blocks, a power of two and PARTS at most, share a lane; each finds
// the bin of the threshold and counts, in its part, the rows above that bin and the lower 5 bits of those in it, which of them are not hot, and
// how important the hot rows below the bin are. Then they wait for each other: from all parts' counts each knows the threshold, how many rows
// of exactly that key are taken (the lowest positions), where its rows go, whether the lane misses any, and how many at most. It lists its
// rows; where the lane misses some, also the least important hot rows that were not selected, as victims (DESIGN.md, section 6), by the upper
// bits of their keys. There may be more victims than misses; the last ones are the most important. Which rows are hot decides where a row is
// read from, never the result. A lane has at least as many hot places as it selects rows, so there is always room.
#include "meet.cuh"
#include "types.cuh"

constexpr u32 THREADS = 512;
constexpr u32 WARPS = THREADS / 32;
// What a part publishes: rows above the bin; rows of each key in it; rows from the bin on that are not hot, of which above it, and a bit for
// each key in it that has some; free hot places; and by key in the bin, how many of its rows come before the first that is not hot.
constexpr u32 OF_KEY = 1, COLD_ROWS = OF_KEY + REFINED, COLD_ABOVE = COLD_ROWS + 1, COLD_KEYS = COLD_ABOVE + 1, FREE = COLD_KEYS + 1, BEFORE_COLD = FREE + 1;
static_assert(ABOVE_WORDS == BEFORE_COLD + REFINED / 2, "as in types.cuh");
// Consecutive rows that a thread holds at once, and those of a block, and how many of these a block holds at most. Parts of up to 2^18 rows a
// lane are one tile, where there are PARTS of them.
constexpr u32 OWN_ROWS = 16;
constexpr u32 TILE_ROWS = THREADS * OWN_ROWS;
constexpr u32 MOST_TILES = 2;
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

__device__ __forceinline__ u32 warp_sum(u32 x) {
#pragma unroll
    for (int step = 16; step > 0; step /= 2) x += __shfl_xor_sync(0xFFFFFFFFu, x, step);
    return x;
}

template <typename Word>
__device__ __forceinline__ Word warp_prefix(Word x) {
    const u32 lane = threadIdx.x % 32;
#pragma unroll
    for (u32 step = 1; step < 32; step *= 2) {
        const Word before = __shfl_up_sync(0xFFFFFFFFu, x, step);
        if (lane >= step) x += before;
    }
    return x;
}

// Of the threads before this one, and of all.
template <typename Word>
struct Sum {
    Word before, all;
};

// Sums over the threads of a block; `room` has a word a warp, and is free again after the next barrier. All threads take part.
template <typename Word>
__device__ __forceinline__ Sum<Word> block_sum(Word x, Word* room) {
    const u32 warp = threadIdx.x / 32;
    const Word inclusive = warp_prefix(x);
    if (threadIdx.x % 32 == 31) room[warp] = inclusive;
    __syncthreads();
    Sum<Word> sum = {inclusive - x, 0};
#pragma unroll
    for (u32 other = 0; other < WARPS; other++) {
        const Word of_other = room[other];
        sum.before += other < warp ? of_other : 0;
        sum.all += of_other;
    }
    return sum;
}

// The bin that holds the `wanted`-th largest key. `room`: one word a warp; `found`: where the result is shared.
__device__ __forceinline__ u32 find_bin(const u32* histogram, u32 wanted, u32* room, u32* found) {
    static_assert(BINS == 4 * THREADS, "four bins a thread");
    // Thread 0 has the highest bins.
    const uint4 words = reinterpret_cast<const uint4*>(histogram)[THREADS - 1 - threadIdx.x];
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

struct Cut {
    u32 bin;      // every candidate of a lower bin is taken
    u32 lower;    // so many
    u32 of_last;  // and at most so many of this one
};

// The bin up to which `wanted` candidates reach; `last` where there are too few below that. `words`: the thread's bins.
__device__ __forceinline__ Cut find_cut(const uint4 words, u32 wanted, u32 last, u32* room, Cut* found) {
    const u32 counts[4] = {words.x, words.y, words.z, words.w};
    const Sum<u32> sum = block_sum(counts[0] + counts[1] + counts[2] + counts[3], room);
    u32 below = sum.before;
#pragma unroll
    for (u32 i = 0; i < 4; i++) {
        if (below < wanted && below + counts[i] >= wanted) *found = {threadIdx.x * 4 + i, below, wanted - below};
        below += counts[i];
    }
    if (threadIdx.x == 0 && sum.all < wanted) *found = {last, sum.all, wanted - sum.all};
    __syncthreads();
    return *found;
}

// Counts the upper bits of keys, for keys that the score kernel did not make; the first `sinks` rows are given the highest key.
extern "C" __global__ void __launch_bounds__(THREADS) count_keys(const StepJob job) {
    __shared__ u32 bins[BINS];
    enter_stream();
    const u32 lane = blockIdx.y, slot = blockIdx.z;
    const SequenceState sequence = reinterpret_cast<const SequenceState*>(job.sequences)[slot];
    if (sequence.length == 0) return;
    const u32 rows = sequence.chunks * CHUNK_TOKENS;
    const Part part = part_of(rows, blockIdx.x);
    u16* keys = reinterpret_cast<u16*>(job.keys) + (u64)(slot * job.lanes + lane) * job.max_rows;
    for (u32 bin = threadIdx.x; bin < BINS; bin += THREADS) bins[bin] = 0;
    __syncthreads();
    for (u32 row = part.first + threadIdx.x; row < part.end; row += THREADS) {
        if (row < sequence.sinks) keys[row] = 0xFFFF;
        atomicAdd(&bins[keys[row] / REFINED], 1);
    }
    __syncthreads();
    u32* histogram = reinterpret_cast<u32*>(job.histogram) + (slot * job.lanes + lane) * BINS;
    for (u32 bin = threadIdx.x; bin < BINS; bin += THREADS)
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

// What a part selects: rows above `key`, and of the rows of exactly `key` the first `ties`; they begin at `first` in the lane's list.
struct Share {
    u32 key, ties, first, count;
    u32 missed;             // rows that the lane misses at most; 0 where it misses none
    u32 free, free_before;  // hot places of the lane without a row before the horizon, and those of earlier parts
};

struct ShareRoom {
    __align__(16) u32 above[PARTS][ABOVE_WORDS];
};

// How many rows of a part's key in the bin come before the first of them that is not hot, or a lower number.
__device__ __forceinline__ u32 before_cold(const u32* words, u32 key) {
    return words[BEFORE_COLD + key / 2] >> key % 2 * 16 & 0xFFFFu;
}

// By all threads of the block, from the counts of all parts.
__device__ __forceinline__ Share share_of(const u32* above, u32 bin, u32 wanted, u32 part, ShareRoom& room, Share& shared) {
    static_assert(PARTS == 32 && REFINED == 32 && ABOVE_WORDS % 2 == 1 && LEAST_PARTS * ABOVE_WORDS % 4 == 0 && PARTS * ABOVE_WORDS <= 4 * THREADS, "a warp has a thread for each");
    // Parts that the grid does not have count nothing.
    if (const u32 i = 4 * threadIdx.x; i < PARTS * ABOVE_WORDS) reinterpret_cast<uint4*>(&room.above[0][0])[i / 4] = i < gridDim.x * ABOVE_WORDS ? load_4_shared(above + i) : uint4{0, 0, 0, 0};
    __syncthreads();
    if (threadIdx.x < 32) {
        const u32 thread = threadIdx.x;
        // Thread i is lower key i. Rows of the bin with larger keys come after it.
        u32 here = 0;
#pragma unroll
        for (u32 other = 0; other < PARTS; other++) here += room.above[other][OF_KEY + thread];
        const u32 higher = warp_sum(room.above[thread][0]);
        const u32 to_here = warp_prefix(here), all = __shfl_sync(0xFFFFFFFFu, to_here, 31);
        const u32 larger = higher + all - to_here;
        const u32 threshold = __ffs(__ballot_sync(0xFFFFFFFFu, larger < wanted && larger + here >= wanted)) - 1;
        const u32 all_ties = wanted - __shfl_sync(0xFFFFFFFFu, larger, threshold);
        // Thread i is part i.
        const u32* own = room.above[thread];
        u32 over = own[0];
#pragma unroll
        for (u32 key = 0; key < REFINED; key++) over += key > threshold ? own[OF_KEY + key] : 0;
        const u32 equal = own[OF_KEY + threshold];
        const u32 ties_before = min(all_ties, warp_prefix(equal) - equal), ties = min(all_ties - ties_before, equal);
        const u32 count = over + ties, end = warp_prefix(count);
        // A selected row is not hot where one above the threshold is not, or a tie that is taken.
        const u32 cold_keys = own[COLD_KEYS] >> threshold;
        const bool misses = own[COLD_ABOVE] || cold_keys >> 1 || (cold_keys && before_cold(own, threshold) < ties);
        const bool lane_misses = __any_sync(0xFFFFFFFFu, misses);
        const u32 most_missed = min(wanted, warp_sum(own[COLD_ROWS]));
        const u32 free_to_here = warp_prefix(own[FREE]), free = __shfl_sync(0xFFFFFFFFu, free_to_here, 31);
        if (thread == part) {
            shared = {bin * REFINED + threshold, ties, end - count, count, lane_misses ? most_missed : 0, free, free_to_here - own[FREE]};
        }
    }
    __syncthreads();
    return shared;
}

// The lowest `count` bits of a mask.
__device__ __forceinline__ u32 lowest_bits(u32 mask, u32 count) {
    u32 dropped = __popc(mask);
    dropped -= min(dropped, count);
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
    u32* bins;
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
        reinterpret_cast<u32*>(job.victim_bins) + own_lane * BINS,
        reinterpret_cast<VictimCounts*>(job.victim_counts) + own_lane,
        reinterpret_cast<const u32*>(sequence.slots),
        reinterpret_cast<const u64*>(job.planes),
        job.host_page_bytes,
        (u64)lane * CHUNK_TOKENS * ROW_BYTES,
    };
}

// Keys and hot places of a tile's rows, and which rows are hot: a bit each.
struct Tile {
    OwnValues keys[THREADS], places[THREADS];
    u16 hot[THREADS];
};
static_assert(sizeof(Tile) == SELECT_TILE_BYTES, "as in step.rs");

// Room that the block's threads share, beside tiles.
struct Room {
    union {
        u32 bins[BINS];
        ShareRoom above;  // once the bins have been added to the lane's
    };
    u32 blocks[MOST_BLOCKS];  // where the lane's places are stored
    u64 pages[MOST_TILES * TILE_ROWS / CHUNK_TOKENS];  // where the lane's rows of the part's chunks lie on the host
    u64 counted[WARPS];
    Share share;
    u32 sums[2][WARPS];
    u32 counts[ABOVE_WORDS];
    u32 first_cold[REFINED];  // first row of each key in the bin that is not hot
    u32 before[REFINED];      // rows of that key before it
    u32 found;
    Cut cut;
    u32 first_lower, first_last;
};

// What no kernel changes between a step's gather and the next step's. Rows from `end` on are not hot.
__device__ __forceinline__ void load_places(const Lane& lane, u32 row, u32 end, Tile& tile) {
    const bool has = lane.map && row < end;
    OwnValues& places = tile.places[threadIdx.x];
    if (has) {
        places.words[0] = reinterpret_cast<const uint4*>(lane.map + row)[0];
        places.words[1] = reinterpret_cast<const uint4*>(lane.map + row)[1];
    }
    tile.hot[threadIdx.x] = has ? ~at_least(places, COLD) : 0;
}

// Rows from `end` on have the lowest key.
__device__ __forceinline__ void load_keys(const Lane& lane, u32 row, u32 end, Tile& tile) {
    OwnValues& keys = tile.keys[threadIdx.x];
    keys.words[0] = keys.words[1] = {0, 0, 0, 0};
    if (row < end) {
        keys.words[0] = reinterpret_cast<const uint4*>(lane.keys + row)[0];
        keys.words[1] = reinterpret_cast<const uint4*>(lane.keys + row)[1];
    }
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
    load_places(lane, own_row(base), tiles.rows.end, tiles.tiles[0]);
    load_keys(lane, own_row(base), tiles.rows.end, tiles.tiles[0]);
    return tiles.tiles[0];
}

// Where the lane's rows of a chunk lie on the host.
__device__ __forceinline__ u64 page_of(const Lane& lane, u32 chunk) {
    const u32 at = lane.slots[chunk];
    return lane.planes[at >> 16] + (at & 0xFFFFu) * lane.page_bytes + lane.in_page;
}

// Counts the part's rows above the bin and those of each key in it, which of them are not hot, and the keys of hot rows below the bin. The
// counts are complete after the next barrier, but for `before`, for which count_before_cold has to follow.
__device__ __forceinline__ void count_part(const Lane& lane, const Tiles& tiles, u32 bin, Room& room) {
    u32 above = 0, cold = 0, cold_above = 0;
    for (u32 base = tiles.rows.first; base < tiles.rows.end; base += TILE_ROWS) {
        const Tile& tile = tile_at(lane, tiles, base);
        const OwnValues& keys = tile.keys[threadIdx.x];
        const u32 over = at_least(keys, (bin + 1) * REFINED), from_bin = at_least(keys, bin * REFINED) & rows_within(own_row(base), tiles.rows.end);
        above += __popc(over);
        for (u32 rest = from_bin & ~over; rest;) atomicAdd(&room.counts[OF_KEY + value_at(keys, next_bit(rest)) % REFINED], 1);
        if (lane.map == nullptr) continue;
        const u32 hot = tile.hot[threadIdx.x];
        cold += __popc(from_bin & ~hot);
        cold_above += __popc(over & ~hot);
        for (u32 rest = from_bin & ~over & ~hot; rest;) {
            const u32 i = next_bit(rest);
            atomicMin(&room.first_cold[value_at(keys, i) % REFINED], own_row(base) + i);
        }
        for (u32 rest = hot & ~from_bin; rest;) atomicAdd(&room.bins[value_at(keys, next_bit(rest)) / REFINED], 1);
    }
    above = warp_sum(above);
    if (threadIdx.x % 32 == 0 && above) atomicAdd(&room.counts[0], above);
    if (lane.map == nullptr) return;
    cold = warp_sum(cold), cold_above = warp_sum(cold_above);
    if (threadIdx.x % 32 == 0 && cold) atomicAdd(&room.counts[COLD_ROWS], cold), atomicAdd(&room.counts[COLD_ABOVE], cold_above);
}

// Counts, for each key in the bin, the rows before the first that is not hot.
__device__ __forceinline__ void count_before_cold(const Lane& lane, const Tiles& tiles, u32 bin, Room& room) {
    for (u32 base = tiles.rows.first; base < tiles.rows.end; base += TILE_ROWS) {
        const Tile& tile = tile_at(lane, tiles, base);
        const OwnValues& keys = tile.keys[threadIdx.x];
        for (u32 rest = at_least(keys, bin * REFINED) & ~at_least(keys, (bin + 1) * REFINED) & tile.hot[threadIdx.x]; rest;) {
            const u32 i = next_bit(rest), key = value_at(keys, i) % REFINED;
            if (own_row(base) + i < room.first_cold[key]) atomicAdd(&room.before[key], 1);
        }
    }
}

// Writes the part's words, of which `free` is one.
__device__ __forceinline__ void publish(u32 free, u32* words, const Room& room) {
    static_assert(ABOVE_WORDS <= 64, "two warps, and one for the keys");
    const u32 word = threadIdx.x;
    if (word < BEFORE_COLD) {
        if (word != COLD_KEYS) words[word] = word == FREE ? free : room.counts[word];
    } else if (word < ABOVE_WORDS) {
        const u32 key = 2 * (word - BEFORE_COLD);
        words[word] = min(room.before[key], 0xFFFFu) | min(room.before[key + 1], 0xFFFFu) << 16;
    } else if (word / 32 == 2) {
        const u32 keys = __ballot_sync(0xFFFFFFFFu, room.first_cold[word % 32] != NOBODY);
        if (word % 32 == 0) words[COLD_KEYS] = keys;
    }
}

// Which hot rows give way: all candidates of lower bins, then of the last bin whoever comes first, after `free` free places.
struct Eviction {
    u32 free;
    Cut cut;
};

// As many as the lane misses at most; a lane may have fewer candidates, never fewer than misses. `bins`: the thread's bins of candidates.
__device__ __forceinline__ Eviction eviction_of(const Share& share, const uint4 bins, Room& room) {
    const u32 free = min(share.missed, share.free);
    if (share.missed == free) return {free, {0, 0, 0}};
    return {free, find_cut(bins, share.missed - free, share.key / REFINED, room.sums[0], &room.cut)};
}

// Lists free places as victims.
__device__ __forceinline__ void list_free_places(const Lane& lane, const Share& share, u32 free, u32 horizon, u32 part, u32 own_free_before, const Room& room) {
    u32 index = share.free_before + own_free_before;
    for (u32 place = part * THREADS + threadIdx.x; place < lane.pool; place += gridDim.x * THREADS) {
        const u32 at = stored_at(room.blocks, place), row = lane.owner[at];
        if (row >= horizon && index++ < free) lane.victims[index - 1] = {place, row, at, 0};
    }
}

// Which of the thread's hot rows that are not selected give way to others.
struct Victims {
    u32 lower, last;
};

__device__ __forceinline__ Victims victims_of(const OwnValues& keys, u32 candidates, const Cut& cut) {
    Victims victims = {0, 0};
    while (candidates) {
        const u32 i = next_bit(candidates), bin = value_at(keys, i) / REFINED;
        victims.lower |= (u32)(bin < cut.bin) << i;
        victims.last |= (u32)(bin == cut.bin) << i;
    }
    return victims;
}

// Lists the thread's victims from `of_lower` and `of_last` on, each counted among its own.
__device__ __forceinline__ void list_victims(const Lane& lane, Victims victims, const Eviction& eviction, const OwnValues& places, u32 row, u32 of_lower, u32 of_last, const Room& room) {
    while (victims.lower) {
        const u32 i = next_bit(victims.lower), place = value_at(places, i);
        lane.victims[eviction.free + of_lower++] = {place, row + i, stored_at(room.blocks, place), 0};
    }
    for (; victims.last && of_last < eviction.cut.of_last; of_last++) {
        const u32 i = next_bit(victims.last), place = value_at(places, i);
        lane.victims[eviction.free + eviction.cut.lower + of_last] = {place, row + i, stored_at(room.blocks, place), 0};
    }
}

// Lists the part's selected rows in ascending order, those that are not hot, and where the lane misses any, victims. Returns how many rows are
// not hot.
__device__ __forceinline__ u32 list_part(const Lane& lane, const Tiles& tiles, const Share& share, const Eviction& eviction, Room& room) {
    // Counts of misses and of victims side by side in a word: a tile has fewer than 2^14 rows.
    constexpr u32 LOWER = 21, LAST = 42, COUNT = (1u << LOWER) - 1;
    const u32 end = tiles.rows.end;
    u32 over_before = 0, ties_before = 0, missed = 0;
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
        Victims victims = {0, 0};
        Sum<u64> counts = {0, 0};
        if (share.missed) {
            victims = victims_of(keys, hot & ~selected, eviction.cut);
            counts = block_sum((u64)__popc(selected & ~hot) | (u64)__popc(victims.lower) << LOWER | (u64)__popc(victims.last) << LAST, room.counted);
            if (threadIdx.x == 0) room.first_lower = atomicAdd(&lane.counts->lower, (u32)(counts.all >> LOWER) & COUNT);
            if (threadIdx.x == 32) room.first_last = atomicAdd(&lane.counts->last, (u32)(counts.all >> LAST));
        }
        Miss* miss = lane.misses + share.first + missed + ((u32)counts.before & COUNT);
        missed += (u32)counts.all & COUNT;
        for (u32 rest = selected; rest; at++) {
            const u32 i = next_bit(rest);
            lane.positions[at] = row + i;
            if (lane.map == nullptr) continue;
            if (hot >> i & 1) {
                lane.places[at] = stored_at(room.blocks, value_at(places, i));
            } else {
                const u64 page = tiles.held ? room.pages[(row - tiles.rows.first) / CHUNK_TOKENS] : page_of(lane, row / CHUNK_TOKENS);
                *miss++ = {page + (row + i) % CHUNK_TOKENS * ROW_BYTES, row + i, at};
            }
        }
        if (share.missed == 0) continue;
        __syncthreads();
        list_victims(lane, victims, eviction, places, row, room.first_lower + ((u32)(counts.before >> LOWER) & COUNT), room.first_last + (u32)(counts.before >> LAST), room);
    }
    return missed;
}

extern "C" __global__ void __launch_bounds__(THREADS, 3) select(const StepJob job) {
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
        for (u32 base = rows.first; base < rows.end; base += TILE_ROWS) load_places(lane, own_row(base), rows.end, tile_of(tiles, base));
    }
    if (const u32 chunk = rows.first / CHUNK_TOKENS + threadIdx.x; tiles.held && lane.map && chunk * CHUNK_TOKENS < rows.end) room.pages[threadIdx.x] = page_of(lane, chunk);
    u32 free = 0;
    if (lane.map && horizon) {
        for (u32 place = part * THREADS + threadIdx.x; place < lane.pool; place += gridDim.x * THREADS) free += lane.owner[stored_at(lane.blocks, place)] >= horizon;
    }
    for (u32 i = threadIdx.x; i < BINS; i += THREADS) room.bins[i] = 0;
    for (u32 i = threadIdx.x; i < lane.pool / POOL_BLOCK; i += THREADS) room.blocks[i] = lane.blocks[i];
    if (threadIdx.x < REFINED) room.first_cold[threadIdx.x] = NOBODY, room.before[threadIdx.x] = 0;
    if (threadIdx.x < ABOVE_WORDS) room.counts[threadIdx.x] = 0;
    // The words of a sum are read before the barriers that follow.
    const Sum<u32> own_free = block_sum(free, room.sums[1]);
    enter_stream();
    if (horizon == 0) return;
    if (tiles.held) {
        for (u32 base = rows.first; base < rows.end; base += TILE_ROWS) load_keys(lane, own_row(base), rows.end, tile_of(tiles, base));
    }
    u32* arrivals = &reinterpret_cast<Arrivals*>(job.arrivals)[own_lane].select;
    u32* above = reinterpret_cast<u32*>(job.above) + own_lane * PARTS * ABOVE_WORDS;
    const u32 bin = find_bin(reinterpret_cast<const u32*>(job.histogram) + own_lane * BINS, sequence.count, room.sums[0], &room.found);
    count_part(lane, tiles, bin, room);
    __syncthreads();
    if (lane.map) {
        count_before_cold(lane, tiles, bin, room);
        for (u32 i = threadIdx.x; i < BINS; i += THREADS)
            if (room.bins[i]) atomicAdd(&lane.bins[i], room.bins[i]);
        __syncthreads();
    }
    publish(own_free.all, above + part * ABOVE_WORDS, room);
    meet(arrivals, PARTS / gridDim.x, PARTS);
    uint4 bins = {0, 0, 0, 0};
    if (lane.map) bins = load_4_shared(lane.bins + 4 * threadIdx.x);
    const Share share = share_of(above, bin, sequence.count, part, room.above, room.share);
    const Eviction eviction = eviction_of(share, bins, room);
    if (eviction.free > share.free_before) list_free_places(lane, share, eviction.free, horizon, part, own_free.before, room);
    const u32 missed = list_part(lane, tiles, share, eviction, room);
    if (lane.map == nullptr || threadIdx.x > 0) return;
    if (missed) atomicAdd(&lane.counts->missed, missed);
    reinterpret_cast<PartCounts*>(job.part_counts)[own_lane * PARTS + part] = {share.first, missed};
    u64* counters = reinterpret_cast<u64*>(job.counters) + own_lane * 2;
    atomicAdd(&counters[0], (u64)(share.count - missed));
    if (missed) atomicAdd(&counters[1], (u64)missed);
}
