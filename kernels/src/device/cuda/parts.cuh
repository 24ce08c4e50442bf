// What the blocks of a lane tell each other while rows are selected, and what each makes of it.
//
// A word is a value and above it the launch that it is of, so that it needs no other signal: a fence and a count of arrivals took three times as
// long. Blocks of a lane follow each other in the grid and start in that order, so that whoever waits waits for blocks that run.
#pragma once
#include "types.cuh"

constexpr u32 SELECT_THREADS = 512;
constexpr u32 SELECT_WARPS = SELECT_THREADS / 32;

// A part's words: rows above the bin of the threshold; rows of each key in it; rows from the bin on that are not hot, of which above it, and a
// bit for each key in it that has some; hot rows; by key in the bin, how many of its rows come before the first that is not hot, in pairs; and
// hot rows below the bin by class.
constexpr u32 OVER = 0, OF_KEY = 1, COLD_ROWS = OF_KEY + REFINED, COLD_ABOVE = COLD_ROWS + 1, COLD_KEYS = COLD_ABOVE + 1, HOT_ROWS = COLD_KEYS + 1;
constexpr u32 BEFORE_COLD = HOT_ROWS + 1, OF_CLASS = BEFORE_COLD + REFINED / 2;

// Classes of importance: 0 are rows of the threshold's bin, the others so many bins each, the less important the higher; all that is less
// important still is in the last one. There are 16 bins to a power of two.
constexpr u32 CLASSES = 32;
constexpr u32 CLASS_BINS = 4;
static_assert(PART_WORDS == OF_CLASS + CLASSES && PART_WORDS % 2 == 1, "as in types.cuh");

__device__ __forceinline__ u32 class_of(u32 of, u32 bin) { return of >= bin ? 0 : min((bin - of - 1) / CLASS_BINS + 1, CLASSES - 1); }

__device__ __forceinline__ u32 warp_sum(u32 x) { return __reduce_add_sync(0xFFFFFFFFu, x); }

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
    for (u32 other = 0; other < SELECT_WARPS; other++) {
        const Word of_other = room[other];
        sum.before += other < warp ? of_other : 0;
        sum.all += of_other;
    }
    return sum;
}

// Counts a block, `own` of a launch's arrivals. Returns those before.
__device__ __forceinline__ u32 arrive(u32* arrivals, u32 own) {
    u32 before;
    asm volatile("atom.add.relaxed.gpu.global.u32 %0, [%1], %2;" : "=r"(before) : "l"(arrivals), "r"(own) : "memory");
    return before;
}

// What a part selects: rows above `key`, and of the rows of exactly `key` the first `ties`; they begin at `first` in the lane's list.
struct Share {
    u32 key, ties, first, count;
    u32 missed;  // rows that the lane misses at most; 0 where it misses none
};

// Who gives way where the lane misses rows: first so many free places; then all hot rows of classes above `cut`, of which the part's are listed
// from `lower` on; and rows of that class up to `end` in the list, the part's from `last` on.
struct Eviction {
    u32 free, cut, lower, last, end;
};

// The words of all parts, and what they say.
struct AllParts {
    u32 words[PARTS][PART_WORDS];
    Share share;
    Eviction eviction;
};

__device__ __forceinline__ void give_word(u64* to, u32 value, u32 launch) {
    asm volatile("st.relaxed.gpu.global.u64 [%0], %1;" ::"l"(to), "l"((u64)launch << 32 | value) : "memory");
}

// A word as it is now.
__device__ __forceinline__ u64 word_now(const u64* from) {
    u64 word;
    asm volatile("ld.relaxed.gpu.global.u64 %0, [%1];" : "=l"(word) : "l"(from) : "memory");
    return word;
}

// Two words as they are now. Says whether both are of the launch.
__device__ __forceinline__ bool take_pair(const u64* from, u32 launch, u64 (&pair)[2]) {
    asm volatile("ld.relaxed.gpu.global.v2.u64 {%0, %1}, [%2];" : "=l"(pair[0]), "=l"(pair[1]) : "l"(from) : "memory");
    return pair[0] >> 32 == launch && pair[1] >> 32 == launch;
}

// Waits until all parts have published their words, and takes them. By all threads of the block; a barrier at the end.
__device__ __forceinline__ void take_words(const u64* words, u32 parts, u32 launch, AllParts& all) {
    static_assert(LEAST_PARTS * PART_WORDS % 2 == 0, "pairs");
    constexpr u32 ROUNDS = (PARTS * PART_WORDS + 2 * SELECT_THREADS - 1) / (2 * SELECT_THREADS);
    // One warp waits for a word of each part: what so many blocks ask for while they wait takes others' time.
    if (threadIdx.x < 32) {
        u64 word = 0;
        const bool has = threadIdx.x < parts;
        do {
            if (has) word = word_now(words + threadIdx.x * PART_WORDS);
        } while (!__all_sync(0xFFFFFFFFu, !has || word >> 32 == launch));
    }
    __syncthreads();
    u64 pairs[ROUNDS][2];
    bool are_there;
    do {
        are_there = true;
#pragma unroll
        for (u32 round = 0; round < ROUNDS; round++) {
            const u32 first = 2 * (round * SELECT_THREADS + threadIdx.x);
            if (first < parts * PART_WORDS) are_there &= take_pair(words + first, launch, pairs[round]);
        }
    } while (!are_there);
    // Parts that the grid does not have count nothing.
#pragma unroll
    for (u32 round = 0; round < ROUNDS; round++) {
        const u32 first = 2 * (round * SELECT_THREADS + threadIdx.x);
        const bool has = first < parts * PART_WORDS;
        if (first >= PARTS * PART_WORDS) break;
        (&all.words[0][0])[first] = has ? (u32)pairs[round][0] : 0;
        (&all.words[0][0])[first + 1] = has ? (u32)pairs[round][1] : 0;
    }
    __syncthreads();
}

// How many rows of a part's key in the bin come before the first of them that is not hot, or a lower number.
__device__ __forceinline__ u32 before_cold(const u32* words, u32 key) { return words[BEFORE_COLD + key / 2] >> key % 2 * 16 & 0xFFFFu; }

// A word of shared memory, loaded whether it is used or not: the compiler would rather ask, for each of many words, and wait for each.
__device__ __forceinline__ u32 word_at(const u32* word) {
    u32 x;
    asm volatile("ld.shared.u32 %0, [%1];" : "=r"(x) : "r"(shared_address(word)) : "memory");
    return x;
}

// What part `part` selects of `wanted` rows, by a warp; its first thread has the result.
__device__ __forceinline__ Share share_of(const AllParts& all, u32 bin, u32 wanted, u32 part) {
    static_assert(PARTS == 32 && REFINED == 32, "a warp has a thread for each");
    const u32 thread = threadIdx.x % 32;
    // Thread i is lower key i. Rows of the bin with larger keys come after it.
    u32 here = 0;
#pragma unroll
    for (u32 other = 0; other < PARTS; other++) here += all.words[other][OF_KEY + thread];
    // From here on thread i is part i as well.
    const u32* own = all.words[thread];
    const u32 higher = warp_sum(own[OVER]);
    const u32 to_here = warp_prefix(here), larger = higher + __shfl_sync(0xFFFFFFFFu, to_here, 31) - to_here;
    const u32 threshold = __ffs(__ballot_sync(0xFFFFFFFFu, larger < wanted && larger + here >= wanted)) - 1;
    const u32 all_ties = wanted - __shfl_sync(0xFFFFFFFFu, larger, threshold);
    u32 over = own[OVER];
#pragma unroll
    for (u32 key = 0; key < REFINED; key++) over += word_at(own + OF_KEY + key) & (key > threshold ? ~0u : 0);
    const u32 equal = own[OF_KEY + threshold];
    const u32 ties_before = min(all_ties, warp_prefix(equal) - equal), ties = min(all_ties - ties_before, equal);
    const u32 count = over + ties, first = warp_prefix(count) - count;
    // A selected row is not hot where one above the threshold is not, or a tie that is taken.
    const u32 cold_keys = own[COLD_KEYS] >> threshold;
    const bool misses = own[COLD_ABOVE] || cold_keys >> 1 || (cold_keys && before_cold(own, threshold) < ties);
    const u32 missed = __any_sync(0xFFFFFFFFu, misses) ? min(wanted, warp_sum(own[COLD_ROWS])) : 0;
    const u32 of_part[3] = {__shfl_sync(0xFFFFFFFFu, ties, part), __shfl_sync(0xFFFFFFFFu, first, part), __shfl_sync(0xFFFFFFFFu, count, part)};
    return {bin * REFINED + threshold, of_part[0], of_part[1], of_part[2], missed};
}

// Who of part `part` gives way, if the lane misses any of `wanted` rows, by a warp. A lane may have fewer candidates than rows that it misses at
// most, never fewer than misses.
__device__ __forceinline__ Eviction eviction_of(const AllParts& all, u32 pool, u32 wanted, u32 part) {
    static_assert(PARTS == 32 && CLASSES == 32, "a warp has a thread for each");
    const u32 thread = threadIdx.x % 32;
    const u32* own = all.words[thread];
    const u32 missed = min(wanted, warp_sum(own[COLD_ROWS])), free = min(missed, pool - warp_sum(own[HOT_ROWS])), rest = missed - free;
    // Thread i is the class that is i-th from the least important.
    const u32 of = CLASSES - 1 - thread;
    u32 here = 0;
#pragma unroll
    for (u32 other = 0; other < PARTS; other++) here += all.words[other][OF_CLASS + of];
    const u32 to_here = warp_prefix(here), reach = __ballot_sync(0xFFFFFFFFu, to_here >= rest);
    // Where all of them do not reach, rows of the threshold's bin give way too; where nobody has to, the cut is above all classes.
    const u32 last = reach ? __ffs(reach) - 1 : CLASSES - 1, cut = rest ? CLASSES - 1 - last : CLASSES;
    const u32 all_lower = rest ? __shfl_sync(0xFFFFFFFFu, to_here - here, last) : 0;
    // From here on thread i is part i.
    u32 lower = 0;
#pragma unroll
    for (u32 other = 0; other < CLASSES; other++) lower += word_at(own + OF_CLASS + other) & (other > cut ? ~0u : 0);
    const u32 of_last = cut < CLASSES ? own[OF_CLASS + cut] : 0;
    const u32 lower_before = __shfl_sync(0xFFFFFFFFu, warp_prefix(lower) - lower, part), last_before = __shfl_sync(0xFFFFFFFFu, warp_prefix(of_last) - of_last, part);
    return {free, cut, free + lower_before, free + all_lower + last_before, missed};
}
