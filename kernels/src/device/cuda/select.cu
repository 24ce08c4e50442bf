// Top-k of 16-bit importance keys in token order, and which of the selected rows are hot.
//
// The score kernel has counted the upper 11 bits of every lane's keys. `count_part` finds the bin of the threshold and counts, part by
// part, the rows above that bin and the lower 5 bits of those in it. `compact` knows from these counts the threshold, how many rows of
// exactly that key are taken (the lowest positions), and where each part's rows go; it looks each up in the hot map, and counts how
// important the hot rows are that were not selected, for `hot.cu` to choose victims.
#include "types.cuh"

constexpr u32 THREADS = 512;
constexpr u32 WARPS = THREADS / 32;
// Keys that a thread holds at once: of 16-byte loads.
constexpr u32 AT_ONCE = 8;

struct Part {
    u32 first, end;  // rows
};

__device__ __forceinline__ Part part_of(u32 rows, u32 part) {
    const u32 size = (rows + PARTS * 256 - 1) / (PARTS * 256) * 256;
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

extern "C" __global__ void __launch_bounds__(THREADS) count_part(const StepJob job) {
    __shared__ u32 room[WARPS];
    __shared__ Threshold found;
    __shared__ u32 counts[1 + REFINED];
    const u32 lane = blockIdx.y, slot = blockIdx.z, part = blockIdx.x;
    const SequenceState sequence = reinterpret_cast<const SequenceState*>(job.sequences)[slot];
    if (sequence.length == 0 || sequence.count == 0) return;
    const u64 own_lane = slot * job.lanes + lane;
    if (threadIdx.x < 1 + REFINED) counts[threadIdx.x] = 0;
    const u32 bin = find_bin(reinterpret_cast<const u32*>(job.histogram) + own_lane * BINS, sequence.count, room, &found).bin;
    const Part rows = part_of(sequence.chunks * CHUNK_TOKENS, part);
    const u16* keys = reinterpret_cast<const u16*>(job.keys) + own_lane * job.max_rows;
    u32 above = 0;
    for (u32 row = rows.first + threadIdx.x * AT_ONCE; row < rows.end; row += THREADS * AT_ONCE) {
        const uint4 words = *reinterpret_cast<const uint4*>(keys + row);
        const u32 pairs[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
        for (u32 i = 0; i < AT_ONCE; i++) {
            const u32 key = i % 2 ? pairs[i / 2] >> 16 : pairs[i / 2] & 0xFFFFu;
            above += key / REFINED > bin;
            if (key / REFINED == bin) atomicAdd(&counts[1 + key % REFINED], 1);
        }
    }
    above = warp_sum(above);
    if (threadIdx.x % 32 == 0 && above) atomicAdd(&counts[0], above);
    __syncthreads();
    u32* out = reinterpret_cast<u32*>(job.above) + (own_lane * PARTS + part) * (1 + REFINED);
    if (threadIdx.x < 1 + REFINED) out[threadIdx.x] = counts[threadIdx.x];
}

// What a part selects: rows above `key`, and of the rows of exactly `key` the first `ties`; they begin at `first` in the lane's list.
struct Share {
    u32 key, ties, first, count;
};

// By the first warp, thread i being lower key i.
__device__ __forceinline__ Share share_of(const u32* above, u32 bin, u32 wanted, u32 part) {
    const u32 refined = threadIdx.x;
    u32 higher = 0, here = 0;
#pragma unroll
    for (u32 other = 0; other < PARTS; other++) {
        higher += above[other * (1 + REFINED)];
        here += above[other * (1 + REFINED) + 1 + refined];
    }
    // Rows of the bin with larger keys.
    const u32 to_here = warp_prefix(here), all = __shfl_sync(0xFFFFFFFFu, to_here, 31);
    const u32 larger = higher + all - to_here;
    const u32 is = __ballot_sync(0xFFFFFFFFu, larger < wanted && larger + here >= wanted);
    const u32 threshold = 31 - __clz(is);
    u32 ties = wanted - __shfl_sync(0xFFFFFFFFu, larger, threshold);
    Share share = {bin * REFINED + threshold, 0, 0, 0};
    for (u32 other = 0; other <= part; other++) {
        const u32 in_bin = above[other * (1 + REFINED) + 1 + refined];
        const u32 over = above[other * (1 + REFINED)] + warp_sum(refined > threshold ? in_bin : 0);
        const u32 equal = min(ties, __shfl_sync(0xFFFFFFFFu, in_bin, threshold));
        share.ties = equal;
        share.count = over + equal;
        if (other < part) share.first += over + equal;
        ties -= equal;
    }
    return share;
}

// Whether row i of a thread's keys is selected, bit by bit; `ties` is the number of earlier rows of exactly the key.
__device__ __forceinline__ u32 selected_bits(const uint4 words, const Share share, u32 ties, u32 row, u32* last_tie) {
    const u32 pairs[4] = {words.x, words.y, words.z, words.w};
    u32 bits = 0;
#pragma unroll
    for (u32 i = 0; i < AT_ONCE; i++) {
        const u32 key = i % 2 ? pairs[i / 2] >> 16 : pairs[i / 2] & 0xFFFFu;
        const bool tie = key == share.key;
        bits |= (u32)(key > share.key || (tie && ties < share.ties)) << i;
        ties += tie;
        if (tie && ties == share.ties) *last_tie = row + i + 1;
    }
    return bits;
}

__device__ __forceinline__ u32 ties_of(const uint4 words, u32 key) {
    const u32 pairs[4] = {words.x, words.y, words.z, words.w};
    u32 ties = 0;
#pragma unroll
    for (u32 i = 0; i < 4; i++) ties += ((pairs[i] & 0xFFFFu) == key) + (pairs[i] >> 16 == key);
    return ties;
}

// The part's selected positions, written to `positions` in ascending order.
__device__ void write_positions(const u16* keys, const Part rows, const Share share, u32* positions, u32* room, u32* last_tie) {
    u32 written = 0, ties = 0;
    for (u32 base = rows.first; base < rows.end; base += THREADS * AT_ONCE) {
        const u32 row = base + threadIdx.x * AT_ONCE;
        const bool present = row < rows.end;
        uint4 words = {0, 0, 0, 0};
        if (present) words = *reinterpret_cast<const uint4*>(keys + row);
        const u32 own_ties = present ? ties_of(words, share.key) : 0;
        // Ties before this thread matter only where there are more than are taken.
        const u32 ties_to = block_prefix(own_ties, room);
        u32 bits = present ? selected_bits(words, share, ties + ties_to - own_ties, row, last_tie) : 0;
        const u32 own = __popc(bits);
        const u32 to = block_prefix(own, room);
        u32 at = written + to - own;
        while (bits) {
            const u32 i = __ffs(bits) - 1;
            positions[at++] = row + i;
            bits &= bits - 1;
        }
        __shared__ u32 totals[2];
        if (threadIdx.x == THREADS - 1) totals[0] = ties_to, totals[1] = to;
        __syncthreads();
        ties += totals[0];
        written += totals[1];
    }
}

// Hot places of the part's rows, and those that have none, in order.
__device__ u32 look_up(const u16* map, const u32* positions, u32 first, u32 count, u32* places, u32* misses, u32* room) {
    u32 missed = 0;
    for (u32 base = 0; base < count; base += THREADS) {
        const u32 i = base + threadIdx.x;
        const bool present = i < count;
        const u32 place = present ? map[positions[i]] : 0;
        if (present) places[i] = place;
        const u32 miss = present && place == COLD;
        const u32 to = block_prefix(miss, room);
        if (miss) misses[missed + to - 1] = first + i;
        __shared__ u32 total;
        if (threadIdx.x == THREADS - 1) total = to;
        __syncthreads();
        missed += total;
    }
    return missed;
}

// Counts the keys of the hot rows up to the threshold: candidates to be dropped, and some selected rows of exactly the threshold.
// Places without a row count as key 0.
__device__ void count_victims(const LayerPlace& place, u32 lane, u32 part, const u16* keys, u32 rows, u32 threshold, u32* bins, u32* histogram) {
    for (u32 bin = threadIdx.x; bin < BINS; bin += THREADS) bins[bin] = 0;
    __syncthreads();
    const u32* owner = reinterpret_cast<const u32*>(place.owner) + (u64)lane * place.pool;
    const u32 size = (place.pool + PARTS - 1) / PARTS;
    const u32 end = min(place.pool, (part + 1) * size);
    for (u32 at = part * size + threadIdx.x; at < end; at += THREADS) {
        const u32 row = owner[at];
        const u32 key = row < rows ? keys[row] : 0;
        if (row == NOBODY || key <= threshold) atomicAdd(&bins[row == NOBODY ? 0 : key / REFINED], 1);
    }
    __syncthreads();
    for (u32 bin = threadIdx.x; bin < BINS; bin += THREADS)
        if (bins[bin]) atomicAdd(&histogram[bin], bins[bin]);
}

extern "C" __global__ void __launch_bounds__(THREADS) compact(const StepJob job) {
    __shared__ u32 room[WARPS];
    __shared__ u32 bins[BINS];
    __shared__ Threshold found;
    __shared__ Share shared_share;
    __shared__ u32 last_tie;
    const u32 lane = blockIdx.y, slot = blockIdx.z, part = blockIdx.x;
    const SequenceState sequence = reinterpret_cast<const SequenceState*>(job.sequences)[slot];
    if (sequence.length == 0 || sequence.count == 0) return;
    const LayerPlace place = reinterpret_cast<const LayerPlace*>(job.places)[slot];
    const u64 own_lane = slot * job.lanes + lane;
    const u32 rows = sequence.chunks * CHUNK_TOKENS;
    const u32 bin = find_bin(reinterpret_cast<const u32*>(job.histogram) + own_lane * BINS, sequence.count, room, &found).bin;
    if (threadIdx.x < 32) {
        const Share share = share_of(reinterpret_cast<const u32*>(job.above) + own_lane * PARTS * (1 + REFINED), bin, sequence.count, part);
        if (threadIdx.x == 0) shared_share = share, last_tie = 0;
    }
    __syncthreads();
    const Share share = shared_share;
    const u16* keys = reinterpret_cast<const u16*>(job.keys) + own_lane * job.max_rows;
    const u64 list = own_lane * job.max_count + share.first;
    u32* positions = reinterpret_cast<u32*>(job.positions) + list;
    write_positions(keys, part_of(rows, part), share, positions, room, &last_tie);
    if (place.map == 0) return;
    const u16* map = reinterpret_cast<const u16*>(place.map) + (u64)lane * job.max_rows;
    u32* places = reinterpret_cast<u32*>(job.hot_places) + list;
    u32* misses = reinterpret_cast<u32*>(job.misses) + list;
    const u32 missed = look_up(map, positions, share.first, share.count, places, misses, room);
    if (threadIdx.x == 0) {
        reinterpret_cast<PartCounts*>(job.part_counts)[own_lane * PARTS + part] = {share.first, missed, share.key, last_tie};
        u64* counters = reinterpret_cast<u64*>(job.counters) + slot * 2;
        atomicAdd(&counters[0], (u64)(share.count - missed));
        if (missed) atomicAdd(&counters[1], (u64)missed);
    }
    count_victims(place, lane, part, keys, rows, share.key, bins, reinterpret_cast<u32*>(job.victim_bins) + own_lane * BINS);
}
