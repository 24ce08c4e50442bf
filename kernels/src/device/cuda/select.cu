// Top-k of 16-bit importance keys in token order, and which of the selected rows are hot.
//
// The score kernel has counted the upper 11 bits of every lane's keys. `count_part` finds the bin of the threshold and counts, part by
// part, the rows above that bin and the lower 5 bits of those in it. `compact` knows from these counts the threshold, how many rows of
// exactly that key are taken (the lowest positions), and where each part's rows go; it looks each up in the hot map, and counts how
// important the hot rows are that were not selected, for `hot.cu` to choose victims.
#include "types.cuh"

constexpr u32 THREADS = 512;
constexpr u32 WARPS = THREADS / 32;
// What a part counts: rows above the bin, rows of each key in it, and the bin.
constexpr u32 ABOVE_WORDS = 2 + REFINED;
// Keys that a thread holds at once: consecutive ones, of two loads of 16 bytes.
constexpr u32 AT_ONCE = 16;

struct Part {
    u32 first, end;  // rows
};

__device__ __forceinline__ Part part_of(u32 rows, u32 part) {
    const u32 size = (rows + PARTS * CHUNK_TOKENS - 1) / (PARTS * CHUNK_TOKENS) * CHUNK_TOKENS;
    const u32 first = min(rows, part * size);
    return {first, min(rows, first + size)};
}

__device__ __forceinline__ u32 warp_sum(u32 x) {
#pragma unroll
    for (int step = 16; step > 0; step /= 2) x += __shfl_xor_sync(0xFFFFFFFFu, x, step);
    return x;
}

__device__ __forceinline__ u32 warp_prefix(u32 x) {
    const u32 lane = threadIdx.x % 32;
#pragma unroll
    for (u32 step = 1; step < 32; step *= 2) {
        const u32 before = __shfl_up_sync(0xFFFFFFFFu, x, step);
        if (lane >= step) x += before;
    }
    return x;
}

// Inclusive sums over the threads of a block, in thread order; `room` has one word a warp. All threads take part.
__device__ __forceinline__ u32 block_prefix(u32 x, u32* room) {
    const u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const u32 inclusive = warp_prefix(x);
    __syncthreads();
    if (lane == 31) room[warp] = inclusive;
    __syncthreads();
    u32 before = 0;
#pragma unroll
    for (u32 other = 0; other < WARPS; other++) before += other < warp ? room[other] : 0;
    return before + inclusive;
}

struct Threshold {
    u32 bin;    // rows of higher bins are selected
    u32 above;  // how many they are
};

// The bin that holds the `wanted`-th largest key. `room`: one word a warp; `found`: where the result is shared.
__device__ __forceinline__ Threshold find_bin(const u32* histogram, u32 wanted, u32* room, Threshold* found) {
    constexpr u32 own = BINS / THREADS;
    u32 counts[own], sum = 0;
#pragma unroll
    for (u32 i = 0; i < own; i++) {
        // Thread 0 has the highest bins.
        counts[i] = histogram[BINS - 1 - (threadIdx.x * own + i)];
        sum += counts[i];
    }
    u32 above = block_prefix(sum, room) - sum;
#pragma unroll
    for (u32 i = 0; i < own; i++) {
        if (above < wanted && above + counts[i] >= wanted) *found = {BINS - 1 - (threadIdx.x * own + i), above};
        above += counts[i];
    }
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

// A thread's consecutive keys.
struct Keys {
    u32 pairs[AT_ONCE / 2];
};

__device__ __forceinline__ Keys load_keys(const u16* keys, u32 row, u32 end) {
    Keys loaded = {};
    if (row < end) {
#pragma unroll
        for (u32 i = 0; i < AT_ONCE / 8; i++) {
            const uint4 words = reinterpret_cast<const uint4*>(keys + row)[i];
            loaded.pairs[4 * i] = words.x, loaded.pairs[4 * i + 1] = words.y, loaded.pairs[4 * i + 2] = words.z, loaded.pairs[4 * i + 3] = words.w;
        }
    }
    return loaded;
}

__device__ __forceinline__ u32 key_at(const Keys& keys, u32 i) { return i % 2 ? keys.pairs[i / 2] >> 16 : keys.pairs[i / 2] & 0xFFFFu; }

extern "C" __global__ void __launch_bounds__(THREADS) count_part(const StepJob job) {
    __shared__ u32 room[WARPS];
    __shared__ Threshold found;
    __shared__ u32 counts[1 + REFINED];
    enter_stream();
    const u32 lane = blockIdx.y, slot = blockIdx.z, part = blockIdx.x;
    const SequenceState sequence = reinterpret_cast<const SequenceState*>(job.sequences)[slot];
    if (sequence.length == 0 || sequence.count == 0) return;
    const u64 own_lane = slot * job.lanes + lane;
    if (threadIdx.x < 1 + REFINED) counts[threadIdx.x] = 0;
    const Part rows = part_of(sequence.chunks * CHUNK_TOKENS, part);
    const u16* keys = reinterpret_cast<const u16*>(job.keys) + own_lane * job.max_rows;
    // On its way while the bin is searched.
    Keys loaded = load_keys(keys, rows.first + threadIdx.x * AT_ONCE, rows.end);
    const u32 bin = find_bin(reinterpret_cast<const u32*>(job.histogram) + own_lane * BINS, sequence.count, room, &found).bin;
    u32 above = 0;
    for (u32 row = rows.first + threadIdx.x * AT_ONCE; row < rows.end; row += THREADS * AT_ONCE) {
#pragma unroll
        for (u32 i = 0; i < AT_ONCE; i++) {
            const u32 key = key_at(loaded, i);
            above += key / REFINED > bin;
            if (key / REFINED == bin) atomicAdd(&counts[1 + key % REFINED], 1);
        }
        loaded = load_keys(keys, row + THREADS * AT_ONCE, rows.end);
    }
    above = warp_sum(above);
    if (threadIdx.x % 32 == 0 && above) atomicAdd(&counts[0], above);
    __syncthreads();
    u32* out = reinterpret_cast<u32*>(job.above) + (own_lane * PARTS + part) * ABOVE_WORDS;
    if (threadIdx.x < 1 + REFINED) out[threadIdx.x] = counts[threadIdx.x];
    if (threadIdx.x == 1 + REFINED) out[threadIdx.x] = bin;
}

// What a part selects: rows above `key`, and of the rows of exactly `key` the first `ties`; they begin at `first` in the lane's list.
struct Share {
    u32 key, ties, first, count;
};

struct ShareRoom {
    u32 above[PARTS][ABOVE_WORDS];
    u32 over[PARTS], equal[PARTS];
    u32 threshold, ties;
    Share share;
};

// By all threads of the block, from the counts of all parts.
__device__ __forceinline__ Share share_of(const u32* above, u32 wanted, u32 part, ShareRoom& room) {
    static_assert(PARTS == 32 && REFINED == 32, "a warp has a thread for each");
    for (u32 i = threadIdx.x; i < PARTS * ABOVE_WORDS; i += THREADS) (&room.above[0][0])[i] = above[i];
    __syncthreads();
    const u32 warp = threadIdx.x / 32, thread = threadIdx.x % 32;
    if (warp == 0) {
        // Thread i is lower key i. Rows of the bin with larger keys come after it.
        u32 here = 0;
#pragma unroll
        for (u32 other = 0; other < PARTS; other++) here += room.above[other][1 + thread];
        const u32 higher = warp_sum(room.above[thread][0]);
        const u32 to_here = warp_prefix(here), all = __shfl_sync(0xFFFFFFFFu, to_here, 31);
        const u32 larger = higher + all - to_here;
        if (larger < wanted && larger + here >= wanted) room.threshold = thread, room.ties = wanted - larger;
    }
    __syncthreads();
    const u32 threshold = room.threshold;
    for (u32 other = warp; other < PARTS; other += WARPS) {
        const u32 in_bin = room.above[other][1 + thread];
        const u32 over = room.above[other][0] + warp_sum(thread > threshold ? in_bin : 0);
        if (thread == 0) room.over[other] = over, room.equal[other] = room.above[other][1 + threshold];
    }
    __syncthreads();
    if (warp == 0) {
        // Thread i is part i.
        const u32 equal = room.equal[thread], over = room.over[thread];
        const u32 ties_before = min(room.ties, warp_prefix(equal) - equal), ties = min(room.ties - ties_before, equal);
        const u32 count = over + ties, end = warp_prefix(count);
        if (thread == part) room.share = {room.above[0][1 + REFINED] * REFINED + threshold, ties, end - count, count};
    }
    __syncthreads();
    return room.share;
}

// The part's selected positions, written to `positions` in ascending order.
__device__ __forceinline__ void write_positions(const u16* keys, const Part rows, const Share share, u32* positions, u32* room, u32* last_tie) {
    __shared__ u32 total;
    u32 before = 0;
    for (u32 base = rows.first; base < rows.end; base += THREADS * AT_ONCE) {
        const u32 row = base + threadIdx.x * AT_ONCE;
        const Keys loaded = load_keys(keys, row, rows.end);
        const bool present = row < rows.end;
        u32 over = 0, equal = 0;
#pragma unroll
        for (u32 i = 0; i < AT_ONCE; i++) {
            over |= (u32)(key_at(loaded, i) > share.key) << i;
            equal |= (u32)(key_at(loaded, i) == share.key) << i;
        }
        if (!present) over = equal = 0;
        // Rows above and ties side by side: a part has fewer than 65,536 of each at a time.
        const u32 own = __popc(over) | __popc(equal) << 16;
        const u32 to = block_prefix(own, room);
        const u32 first = before + to - own;
        u32 ties = first >> 16, at = (first & 0xFFFFu) + min(ties, share.ties);
        u32 bits = over | equal;
        while (bits) {
            const u32 i = __ffs(bits) - 1;
            bits &= bits - 1;
            const bool tie = equal >> i & 1;
            if (!tie || ties < share.ties) positions[at++] = row + i;
            if (tie && ++ties == share.ties) *last_tie = row + i + 1;
        }
        if (threadIdx.x == THREADS - 1) total = to;
        __syncthreads();
        before += total;
    }
}

// Hot places of the part's rows, and those that have none, in order.
__device__ __forceinline__ u32 look_up(const u16* map, const u32* positions, u32 first, u32 count, u32* places, u32* misses, u32* room) {
    __shared__ u32 total;
    u32 missed = 0;
    for (u32 base = 0; base < count; base += THREADS) {
        const u32 i = base + threadIdx.x;
        const bool present = i < count;
        const u32 place = present ? map[positions[i]] : 0;
        if (present) places[i] = place;
        const u32 miss = present && place == COLD;
        const u32 to = block_prefix(miss, room);
        if (miss) misses[missed + to - 1] = first + i;
        if (threadIdx.x == THREADS - 1) total = to;
        __syncthreads();
        missed += total;
    }
    return missed;
}

// Counts the keys of the hot rows up to the threshold: candidates to be dropped, and some selected rows of exactly the threshold.
// Places without a row count as key 0.
__device__ __forceinline__ void count_victims(const LayerPlace& place, u32 lane, u32 part, const u16* keys, u32 rows, u32 threshold, u32* bins, u32* histogram) {
    constexpr u32 TOGETHER = 3;
    const u32* owner = reinterpret_cast<const u32*>(place.owner) + (u64)lane * place.pool;
    const u32 size = (place.pool + PARTS - 1) / PARTS;
    const u32 end = min(place.pool, (part + 1) * size);
    for (u32 at = part * size + threadIdx.x; at < end; at += TOGETHER * THREADS) {
        u32 row[TOGETHER], key[TOGETHER];
#pragma unroll
        for (u32 i = 0; i < TOGETHER; i++) row[i] = at + i * THREADS < end ? owner[at + i * THREADS] : 0;
#pragma unroll
        for (u32 i = 0; i < TOGETHER; i++) key[i] = row[i] < rows ? keys[row[i]] : 0;
#pragma unroll
        for (u32 i = 0; i < TOGETHER; i++)
            if (at + i * THREADS < end && key[i] <= threshold) atomicAdd(&bins[key[i] / REFINED], 1);
    }
    __syncthreads();
    for (u32 bin = threadIdx.x; bin < BINS; bin += THREADS)
        if (bins[bin]) atomicAdd(&histogram[bin], bins[bin]);
}

extern "C" __global__ void __launch_bounds__(THREADS) compact(const StepJob job) {
    __shared__ u32 room[WARPS];
    __shared__ u32 bins[BINS];
    __shared__ ShareRoom share_room;
    __shared__ u32 last_tie;
    enter_stream();
    const u32 lane = blockIdx.y, slot = blockIdx.z, part = blockIdx.x;
    const SequenceState sequence = reinterpret_cast<const SequenceState*>(job.sequences)[slot];
    const LayerPlace place = reinterpret_cast<const LayerPlace*>(job.places)[slot];
    if (sequence.length == 0 || sequence.count == 0) return;
    const u64 own_lane = slot * job.lanes + lane;
    const u32 rows = sequence.chunks * CHUNK_TOKENS;
    for (u32 i = threadIdx.x; i < BINS; i += THREADS) bins[i] = 0;
    if (threadIdx.x == 0) last_tie = 0;
    const Share share = share_of(reinterpret_cast<const u32*>(job.above) + own_lane * PARTS * ABOVE_WORDS, sequence.count, part, share_room);
    const u16* keys = reinterpret_cast<const u16*>(job.keys) + own_lane * job.max_rows;
    const u64 list = own_lane * job.max_count + share.first;
    u32* positions = reinterpret_cast<u32*>(job.positions) + list;
    write_positions(keys, part_of(rows, part), share, positions, room, &last_tie);
    if (place.map == 0) return;
    const u16* map = reinterpret_cast<const u16*>(place.map) + (u64)lane * place.max_rows;
    u32* places = reinterpret_cast<u32*>(job.hot_places) + list;
    u32* misses = reinterpret_cast<u32*>(job.misses) + list;
    const u32 missed = look_up(map, positions, share.first, share.count, places, misses, room);
    if (threadIdx.x == 0) {
        if (missed) atomicAdd(&reinterpret_cast<VictimCounts*>(job.victim_counts)[own_lane].missed, missed);
        reinterpret_cast<PartCounts*>(job.part_counts)[own_lane * PARTS + part] = {share.first, missed, share.key, last_tie};
        u64* counters = reinterpret_cast<u64*>(job.counters) + own_lane * 2;
        atomicAdd(&counters[0], (u64)(share.count - missed));
        if (missed) atomicAdd(&counters[1], (u64)missed);
    }
    count_victims(place, lane, part, keys, rows, share.key, bins, reinterpret_cast<u32*>(job.victim_bins) + own_lane * BINS);
}
