// Attention of one query token a batch slot over the selected rows, then the rows from the horizon on, all on the device.
//
// A lane's rows are one list: the selected ones in position order, then the newest. A block attends `block_rows` consecutive entries of it,
// its warps sixteen rows at a time, and leaves a partial result; the lane's last block to come that far joins the partials in block order. So
// the result depends on the list alone, not on where a row lay, on the batch or on how many blocks ran at once.
//
// In dense steps the rows, but for the newest, are on their way before the kernel waits for the one before it.
//
// Keys by queries and values by weights run on tensor cores, straight from registers: a thread loads 16 bytes of a row, and the order of
// channels within a product is whatever those loads give. Queries and weights are split into two halves each (split_rows), which keeps
// their 21 and more bits. Codes of e4m3 become halves between load and product; the scales of the lane multiply scores and output.
#include "append.cuh"
#include "mma.cuh"

constexpr u32 WARPS = ATTEND_WARPS;
constexpr u32 THREADS = 32 * WARPS;
constexpr u32 PARTIAL = GROUP * (HEAD_DIM + 2);
constexpr float LOWEST = -3.0e38f;

// The rows that a lane attends.
struct List {
    const u32* positions;
    const u32* places;
    const u8* hot;
    const u8* tail;
    const u8* newest;  // the newest row, where it is not in the tail yet; or none
    u64 tail_stride;
    u32 listed, entries, horizon, tail_chunks;
    bool resident;     // row p lies at p
};

__device__ __forceinline__ List list_of(const StepJob& job, const SequenceState& sequence, const LayerPlace& place, u32 slot, u32 lane) {
    const u64 own_lane = slot * job.lanes + lane;
    List list;
    list.horizon = sequence.chunks * CHUNK_TOKENS + sequence.skipped;
    list.listed = sequence.count;
    list.entries = sequence.length ? sequence.count + sequence.length - list.horizon : 0;
    list.resident = place.map == 0;
    list.positions = sequence.count == list.horizon ? nullptr : reinterpret_cast<const u32*>(job.positions) + own_lane * job.max_count;
    list.places = reinterpret_cast<const u32*>(job.hot_places) + own_lane * job.max_count;
    list.hot = reinterpret_cast<const u8*>(place.hot) + (list.resident ? (u64)lane * place.max_rows * ROW_BYTES : 0);
    list.tail_chunks = place.tail_chunks;
    list.tail_stride = job.page_bytes;
    list.tail = reinterpret_cast<const u8*>(place.tail) + (u64)lane * CHUNK_TOKENS * ROW_BYTES;
    list.newest = job.appends ? reinterpret_cast<const u8*>(job.new_rows) + own_lane * ROW_BYTES : nullptr;
    return list;
}

// Where a row lies.
__device__ __forceinline__ const u8* row_of(const List& list, u32 entry) {
    if (entry < list.listed) {
        const u32 at = !list.resident ? list.places[entry] : list.positions ? list.positions[entry] : entry;
        return list.hot + (u64)at * ROW_BYTES;
    }
    if (list.newest && entry + 1 == list.entries) return list.newest;
    const u32 row = list.horizon + entry - list.listed;
    return list.tail + row / CHUNK_TOKENS % list.tail_chunks * list.tail_stride + row % CHUNK_TOKENS * ROW_BYTES;
}

// Where the row lies that `thread` of the warp knows of.
__device__ __forceinline__ const u8* row_of_thread(const u8* own, u32 thread) {
    return reinterpret_cast<const u8*>(__shfl_sync(0xFFFFFFFFu, reinterpret_cast<u64>(own), thread));
}

#if ROW_TYPE != ROW_F32
constexpr u32 TILE = 16;
constexpr u32 COLUMN_TILES = (GROUP + 7) / 8;
constexpr u32 KEY_PRODUCTS = HEAD_DIM / 16;
// Row elements that a thread loads of a value at once: all eight threads of a row together load contiguous bytes.
constexpr u32 VALUE_WORDS = HEAD_DIM % 64 == 0 ? 4 : 2;
constexpr u32 VALUE_LOADS = HEAD_DIM / (16 * VALUE_WORDS);

// The queries of a lane as B operands: [column tile][product][thread] high and low halves.
struct Queries {
    uint4 b[COLUMN_TILES][KEY_PRODUCTS][32];
};

__device__ __forceinline__ void set_queries(const StepJob& job, u32 slot, u32 lane, Queries& out) {
    for (u32 i = threadIdx.x; i < COLUMN_TILES * KEY_PRODUCTS * 32; i += THREADS) {
        const u32 thread = i % 32, product = i / 32 % KEY_PRODUCTS, tile = i / 32 / KEY_PRODUCTS;
        const u32 head = 8 * tile + thread / 4, channel = product / 2 * 32 + thread % 4 * 8 + product % 2 * 4;
        float4 q = {0.0f, 0.0f, 0.0f, 0.0f};
        if (head < GROUP) {
            const float* query = reinterpret_cast<const float*>(job.query) + ((u64)(slot * job.lanes + lane) * GROUP + head) * HEAD_DIM;
            q = *reinterpret_cast<const float4*>(query + channel);
        }
#if ROW_TYPE == ROW_FP8
        // Codes of even channels are expanded together, and those of odd ones.
        q = {q.x, q.z, q.y, q.w};
#endif
        const Split first = split_rows(q.x * job.score_scale, q.y * job.score_scale), second = split_rows(q.z * job.score_scale, q.w * job.score_scale);
        out.b[tile][product][thread] = {first.high, second.high, first.low, second.low};
    }
    __syncthreads();
}

// Eight elements of a key.
#if ROW_TYPE == ROW_FP8
typedef uint2 KeyPart;
__device__ __forceinline__ KeyPart load_key_part(const u8* from) { return load_8_once(from); }
#else
typedef uint4 KeyPart;
__device__ __forceinline__ KeyPart load_key_part(const u8* from) { return load_16_once(from); }
#endif

struct Keys {
    KeyPart row[2][HEAD_DIM / 32];
};

// Words of 16-bit elements, or of e4m3 half as many.
constexpr u32 LOADED_WORDS = VALUE_WORDS * ELEMENT_BYTES / 2;

struct Values {
    u32 row[4][VALUE_LOADS][LOADED_WORDS];
};

// Two registers of a left side: pairs of elements of a key, four elements at `half` of a part.
struct KeyPairs {
    u32 first, second;
};

__device__ __forceinline__ KeyPairs key_pairs(const KeyPart& part, u32 half) {
#if ROW_TYPE == ROW_FP8
    const u32 codes = half ? part.y : part.x;
    return {expanded(codes << 8), expanded(codes)};
#else
    return {half ? part.z : part.x, half ? part.w : part.y};
#endif
}

// The same channel of two rows: the lower or the upper one of pair `word` of a load.
template <bool UPPER>
__device__ __forceinline__ u32 value_pair(const u32 (&first)[LOADED_WORDS], const u32 (&second)[LOADED_WORDS], u32 word) {
#if ROW_TYPE == ROW_FP8
    return expanded(__byte_perm(first[word / 2], second[word / 2], (word % 2 ? 0x6020 : 0x4000) + (UPPER ? 0x1010 : 0)));
#else
    return __byte_perm(first[word], second[word], UPPER ? 0x7632 : 0x5410);
#endif
}

// Rows of a tile: thread r of the warp, and thread 16 + r, know where row r lies.
__device__ __forceinline__ Keys load_keys(const u8* own) {
    const u32 g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    Keys keys;
#pragma unroll
    for (u32 r = 0; r < 2; r++) {
        const u8* row = row_of_thread(own, g + 8 * r) + sizeof(KeyPart) * t;
#pragma unroll
        for (u32 i = 0; i < HEAD_DIM / 32; i++) keys.row[r][i] = load_key_part(row + 4 * sizeof(KeyPart) * i);
    }
    return keys;
}

__device__ __forceinline__ Values load_values(const u8* own) {
    const u32 g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    Values values;
#pragma unroll
    for (u32 r = 0; r < 4; r++) {
        const u8* row = row_of_thread(own, 2 * t + r % 2 + r / 2 * 8) + HEAD_DIM * ELEMENT_BYTES + 4 * LOADED_WORDS * g;
#pragma unroll
        for (u32 i = 0; i < VALUE_LOADS; i++) {
            if constexpr (LOADED_WORDS == 4) {
                const uint4 words = load_16_once(row + 128 * i);
                values.row[r][i][0] = words.x, values.row[r][i][1] = words.y, values.row[r][i][2] = words.z, values.row[r][i][3] = words.w;
            } else if constexpr (LOADED_WORDS == 2) {
                const uint2 words = *reinterpret_cast<const uint2*>(row + 64 * i);
                values.row[r][i][0] = words.x, values.row[r][i][1] = words.y;
            } else {
                values.row[r][i][0] = *reinterpret_cast<const u32*>(row + 32 * i);
            }
        }
    }
    return values;
}

// One warp's running result for eight heads. Threads hold columns (heads) 2t and 2t + 1.
struct Running {
    float largest[2], sum[2];
    float values[VALUE_LOADS][VALUE_WORDS][4];
};

__device__ __forceinline__ float column_max(float x) {
#pragma unroll
    for (int step = 4; step < 32; step *= 2) x = fmaxf(x, __shfl_xor_sync(0xFFFFFFFFu, x, step));
    return x;
}

__device__ __forceinline__ void attend_tile(const Keys& keys, const Values& values, const uint4 (&queries)[KEY_PRODUCTS][32], float factor, u32 valid, Running& running) {
    const u32 thread = threadIdx.x % 32, g = thread / 4;
    float scores[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
    for (u32 product = 0; product < KEY_PRODUCTS; product++) {
        const KeyPairs low = key_pairs(keys.row[0][product / 2], product % 2), high = key_pairs(keys.row[1][product / 2], product % 2);
        const uint4 b = queries[product][thread];
        mma_rows(scores, low.first, high.first, low.second, high.second, b.x, b.y);
        mma_rows(scores, low.first, high.first, low.second, high.second, b.z, b.w);
    }
#if ROW_TYPE == ROW_FP8
    scores[0] *= factor, scores[1] *= factor, scores[2] *= factor, scores[3] *= factor;
#endif
    if (g >= valid) scores[0] = scores[1] = LOWEST;
    if (g + 8 >= valid) scores[2] = scores[3] = LOWEST;
    float keep[2];
#pragma unroll
    for (u32 column = 0; column < 2; column++) {
        const float largest = fmaxf(running.largest[column], column_max(fmaxf(scores[column], scores[2 + column])));
        keep[column] = exp2_fast(running.largest[column] - largest);
        running.largest[column] = largest;
        scores[column] = exp2_fast(scores[column] - largest);
        scores[2 + column] = exp2_fast(scores[2 + column] - largest);
        running.sum[column] = running.sum[column] * keep[column] + scores[column] + scores[2 + column];
    }
    const Split first = split_rows(scores[0], scores[1]), second = split_rows(scores[2], scores[3]);
    const u32 b[4] = {transposed(first.high), transposed(second.high), transposed(first.low), transposed(second.low)};
#pragma unroll
    for (u32 load = 0; load < VALUE_LOADS; load++) {
#pragma unroll
        for (u32 word = 0; word < VALUE_WORDS; word++) {
            float(&sums)[4] = running.values[load][word];
            sums[0] *= keep[0], sums[1] *= keep[1], sums[2] *= keep[0], sums[3] *= keep[1];
            const u32 a0 = value_pair<false>(values.row[0][load], values.row[1][load], word);
            const u32 a1 = value_pair<true>(values.row[0][load], values.row[1][load], word);
            const u32 a2 = value_pair<false>(values.row[2][load], values.row[3][load], word);
            const u32 a3 = value_pair<true>(values.row[2][load], values.row[3][load], word);
            mma_rows(sums, a0, a1, a2, a3, b[0], b[1]);
            mma_rows(sums, a0, a1, a2, a3, b[2], b[3]);
        }
    }
}

// Heads of a column tile that exist.
constexpr u32 TILE_HEADS = GROUP < 8 ? GROUP : 8;

// The warps' results for one column tile.
struct JoinRoom {
    float largest[WARPS][8], sum[WARPS][8];
    float values[WARPS][TILE_HEADS][HEAD_DIM];
};

__device__ __forceinline__ void put_result(const Running& running, JoinRoom& room) {
    const u32 warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
    for (u32 column = 0; column < 2; column++) {
        const u32 head = 2 * t + column;
        float sum = running.sum[column];
#pragma unroll
        for (int step = 4; step < 32; step *= 2) sum += __shfl_xor_sync(0xFFFFFFFFu, sum, step);
        if (g == 0) room.largest[warp][head] = running.largest[column], room.sum[warp][head] = sum;
        if (head < TILE_HEADS) {
#pragma unroll
            for (u32 load = 0; load < VALUE_LOADS; load++)
#pragma unroll
                for (u32 word = 0; word < VALUE_WORDS; word++) {
                    const u32 channel = load * 16 * VALUE_WORDS + g * 2 * VALUE_WORDS + 2 * word;
                    *reinterpret_cast<float2*>(&room.values[warp][head][channel]) = {running.values[load][word][column], running.values[load][word][2 + column]};
                }
        }
    }
}

// Joins the warps' results in their order, and writes them as the block's partial result.
__device__ __forceinline__ void write_partial(const JoinRoom& room, u32 first_head, float* partial) {
    for (u32 i = threadIdx.x; i < TILE_HEADS * HEAD_DIM; i += THREADS) {
        const u32 head = i / HEAD_DIM, channel = i % HEAD_DIM;
        if (first_head + head >= GROUP) break;
        float largest = room.largest[0][head];
#pragma unroll
        for (u32 warp = 1; warp < WARPS; warp++) largest = fmaxf(largest, room.largest[warp][head]);
        float sum = 0.0f, value = 0.0f;
#pragma unroll
        for (u32 warp = 0; warp < WARPS; warp++) {
            const float share = exp2_fast(room.largest[warp][head] - largest);
            sum += room.sum[warp][head] * share;
            value += room.values[warp][head][channel] * share;
        }
        if (channel == 0) partial[first_head + head] = largest, partial[GROUP + first_head + head] = sum;
        partial[2 * GROUP + (first_head + head) * HEAD_DIM + channel] = value;
    }
}

__device__ __forceinline__ void attend_entries(const StepJob& job, const List& list, u32 slot, u32 lane, u32 begin, u32 end, float* partial) {
    // The warps' results take the place of the queries.
    constexpr u32 BYTES = sizeof(Queries) > sizeof(JoinRoom) ? sizeof(Queries) : sizeof(JoinRoom);
    __shared__ __align__(16) u8 shared[BYTES];
    Queries& queries = *reinterpret_cast<Queries*>(shared);
    JoinRoom& room = *reinterpret_cast<JoinRoom*>(shared);
    const u32 own = threadIdx.x % TILE, last = end - 1;
    u32 entry = begin + threadIdx.x / 32 * TILE;
    const u8* row = nullptr;
    Keys keys;
    Values values;
    // A dense step's rows lie where they lay at its beginning, but for the newest; the queries are made by the kernel before this one. In a
    // sparse step kernels before this one have chosen and fetched the rows since the queries were made.
    bool early = false;
    if (begin < end && job.appends) {
        row = row_of(list, min(entry + own, last));
        early = __all_sync(0xFFFFFFFFu, row != list.newest);
        if (early) keys = load_keys(row), values = load_values(row);
    }
    if (begin < end && !job.appends) set_queries(job, slot, lane, queries);
    enter_stream();
    if (begin >= end) return;
    if (job.appends) set_queries(job, slot, lane, queries);
    if (!early) {
        row = row_of(list, min(entry + own, last));
        keys = load_keys(row), values = load_values(row);
    }
    const float factor = key_factor(job.scales, lane);
    Running running[COLUMN_TILES];
#pragma unroll
    for (u32 tile = 0; tile < COLUMN_TILES; tile++) {
        running[tile] = {};
        running[tile].largest[0] = running[tile].largest[1] = LOWEST;
    }
    while (entry < end) {
        const u32 next = entry + WARPS * TILE;
        if (next < end) row = row_of(list, min(next + own, last));
#pragma unroll
        for (u32 tile = 0; tile < COLUMN_TILES; tile++) attend_tile(keys, values, queries.b[tile], factor, end - entry, running[tile]);
        entry = next;
        if (entry < end) keys = load_keys(row), values = load_values(row);
    }
#pragma unroll
    for (u32 tile = 0; tile < COLUMN_TILES; tile++) {
        __syncthreads();
        put_result(running[tile], room);
        __syncthreads();
        write_partial(room, 8 * tile, partial);
    }
}
#else
// Rows of f32 are for tests and small models: plain arithmetic, a warp a row.
__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
    for (int step = 16; step > 0; step /= 2) x += __shfl_xor_sync(0xFFFFFFFFu, x, step);
    return x;
}

__device__ __forceinline__ void attend_entries(const StepJob& job, const List& list, u32 slot, u32 lane, u32 begin, u32 end, float* partial) {
    constexpr u32 own = HEAD_DIM / 32;
    enter_stream();
    const u32 warp = threadIdx.x / 32, thread = threadIdx.x % 32;
    // Warps take heads in turns: each head meets all rows of the block in order.
    for (u32 head = warp; head < GROUP; head += WARPS) {
        const float* query = reinterpret_cast<const float*>(job.query) + ((u64)(slot * job.lanes + lane) * GROUP + head) * HEAD_DIM;
        float values[own] = {}, largest = LOWEST, sum = 0.0f;
        for (u32 entry = begin; entry < end; entry++) {
            const float* row = reinterpret_cast<const float*>(row_of(list, entry));
            float score = 0.0f;
#pragma unroll
            for (u32 i = 0; i < own; i++) score += query[i * 32 + thread] * row[i * 32 + thread];
            score = warp_sum(score) * job.score_scale;
            const float now = fmaxf(largest, score), keep = exp2_fast(largest - now), weight = exp2_fast(score - now);
            largest = now;
            sum = sum * keep + weight;
#pragma unroll
            for (u32 i = 0; i < own; i++) values[i] = values[i] * keep + weight * row[HEAD_DIM + i * 32 + thread];
        }
        if (thread == 0) partial[head] = largest, partial[GROUP + head] = sum;
#pragma unroll
        for (u32 i = 0; i < own; i++) partial[2 * GROUP + head * HEAD_DIM + i * 32 + thread] = values[i];
    }
}
#endif

// Blocks whose partials are joined at a time.
constexpr u32 TOGETHER = 64;

struct MergeRoom {
    float share[TOGETHER][GROUP];
    float keep[GROUP], sum[GROUP], largest[GROUP];
    bool last;
};

// Whether this block is the last of its lane's `blocks` to come here. What they wrote before is seen after, by this one.
__device__ __forceinline__ bool comes_last(u32* arrivals, u32 blocks, MergeRoom& room) {
    __syncthreads();
    if (threadIdx.x == 0) {
        u32 before;
        asm volatile("atom.acq_rel.gpu.global.inc.u32 %0, [%1], %2;" : "=r"(before) : "l"(arrivals), "r"(blocks - 1) : "memory");
        room.last = before == blocks - 1;
    }
    __syncthreads();
    return room.last;
}

// Words that other blocks of this launch may be writing.
__device__ __forceinline__ u32 load_shared(const u32* from) {
    u32 x;
    asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(x) : "l"(from) : "memory");
    return x;
}

__device__ __forceinline__ float2 load_2_shared(const float* from) {
    float2 x;
    asm volatile("ld.relaxed.gpu.global.v2.f32 {%0, %1}, [%2];" : "=f"(x.x), "=f"(x.y) : "l"(from) : "memory");
    return x;
}

__device__ __forceinline__ float load_float_shared(const float* from) { return __uint_as_float(load_shared(reinterpret_cast<const u32*>(from))); }

// The shares of up to TOGETHER blocks' partials in the sum of all so far, a warp a head.
__device__ __forceinline__ void set_shares(const float* partials, u32 blocks, MergeRoom& room) {
    const u32 thread = threadIdx.x % 32;
    for (u32 head = threadIdx.x / 32; head < GROUP; head += WARPS) {
        float of_block[TOGETHER / 32], sums[TOGETHER / 32], largest = room.largest[head];
        const float before = largest;
#pragma unroll
        for (u32 i = 0; i < TOGETHER / 32; i++) {
            const u32 block = thread + 32 * i;
            of_block[i] = block < blocks ? load_float_shared(partials + (u64)block * PARTIAL + head) : LOWEST;
            sums[i] = block < blocks ? load_float_shared(partials + (u64)block * PARTIAL + GROUP + head) : 0.0f;
        }
#pragma unroll
        for (u32 i = 0; i < TOGETHER / 32; i++) largest = fmaxf(largest, of_block[i]);
#pragma unroll
        for (int step = 16; step > 0; step /= 2) largest = fmaxf(largest, __shfl_xor_sync(0xFFFFFFFFu, largest, step));
        float sum = 0.0f;
#pragma unroll
        for (u32 i = 0; i < TOGETHER / 32; i++) {
            const float share = thread + 32 * i < blocks ? exp2_fast(of_block[i] - largest) : 0.0f;
            room.share[thread + 32 * i][head] = share;
            sum += sums[i] * share;
        }
#pragma unroll
        for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(0xFFFFFFFFu, sum, step);
        // Everybody has read what is written now.
        __syncwarp();
        if (thread == 0) {
            const float keep = exp2_fast(before - largest);
            room.keep[head] = keep, room.largest[head] = largest, room.sum[head] = room.sum[head] * keep + sum;
        }
    }
}

// Joins the partials of a lane in block order, and writes its heads' output. All threads of a block.
__device__ __forceinline__ void merge(const StepJob& job, u32 slot, u32 lane, const float* partials, u32 blocks, MergeRoom& room) {
    constexpr u32 PAIRS = GROUP * HEAD_DIM / 2, OWN = (PAIRS + THREADS - 1) / THREADS, AT_ONCE = OWN == 1 ? 16 : OWN == 2 ? 8 : 4;
    if (threadIdx.x < GROUP) room.largest[threadIdx.x] = LOWEST, room.sum[threadIdx.x] = 0.0f;
    __syncthreads();
    float2 values[OWN] = {};
    for (u32 first = 0; first < blocks; first += TOGETHER) {
        const u32 count = min(TOGETHER, blocks - first);
        const float* from = partials + (u64)first * PARTIAL;
        set_shares(from, count, room);
        __syncthreads();
#pragma unroll
        for (u32 own = 0; own < OWN; own++) {
            const float keep = room.keep[min(threadIdx.x + own * THREADS, PAIRS - 1) * 2 / HEAD_DIM];
            values[own].x *= keep, values[own].y *= keep;
        }
        for (u32 block = 0; block < count; block += AT_ONCE) {
            // All loads of a round are under way before the first is used.
            float2 next[AT_ONCE][OWN];
#pragma unroll
            for (u32 i = 0; i < AT_ONCE; i++)
#pragma unroll
                for (u32 own = 0; own < OWN; own++)
                    next[i][own] = load_2_shared(from + (u64)min(block + i, count - 1) * PARTIAL + 2 * GROUP + 2 * min(threadIdx.x + own * THREADS, PAIRS - 1));
#pragma unroll
            for (u32 i = 0; i < AT_ONCE; i++) {
#pragma unroll
                for (u32 own = 0; own < OWN; own++) {
                    const u32 head = min(threadIdx.x + own * THREADS, PAIRS - 1) * 2 / HEAD_DIM;
                    // Of a block after the last the share is zero.
                    const float share = block + i < count ? room.share[block + i][head] : 0.0f;
                    values[own].x += next[i][own].x * share, values[own].y += next[i][own].y * share;
                }
            }
        }
        __syncthreads();
    }
    const u64 first_head = (u64)(slot * job.lanes + lane) * GROUP;
    const float factor = value_factor(job.scales, lane);
    float2* output = reinterpret_cast<float2*>(reinterpret_cast<float*>(job.output) + first_head * HEAD_DIM);
#pragma unroll
    for (u32 own = 0; own < OWN; own++) {
        const u32 pair = threadIdx.x + own * THREADS;
        const float sum = room.sum[min(pair, PAIRS - 1) * 2 / HEAD_DIM];
        if (pair < PAIRS) output[pair] = blocks ? float2{values[own].x / sum * factor, values[own].y / sum * factor} : float2{0.0f, 0.0f};
    }
    if (threadIdx.x < GROUP)
        reinterpret_cast<float*>(job.lse)[first_head + threadIdx.x] = blocks ? (room.largest[threadIdx.x] + log2f(room.sum[threadIdx.x])) * 0.6931471805599453f : minus_infinity();
}

// Sixteen warps fit a processor where rows are short enough.
constexpr u32 AT_LEAST = HEAD_DIM <= 128 && GROUP <= 8 ? 16 / WARPS : 1;

extern "C" __global__ void __launch_bounds__(THREADS, AT_LEAST) attend(const StepJob job) {
    __shared__ MergeRoom room;
    const u32 lane = job.first_lane + blockIdx.y, slot = blockIdx.z;
    const u64 own_lane = slot * job.lanes + lane;
    const SequenceState sequence = reinterpret_cast<const SequenceState*>(job.sequences)[slot];
    const LayerPlace place = reinterpret_cast<const LayerPlace*>(job.places)[slot];
    const List list = list_of(job, sequence, place, slot, lane);
    const u32 begin = blockIdx.x * sequence.block_rows, end = min(list.entries, begin + sequence.block_rows);
    const u32 blocks = (list.entries + sequence.block_rows - 1) / sequence.block_rows;
    float* partials = reinterpret_cast<float*>(job.partials) + own_lane * job.max_blocks * PARTIAL;
    attend_entries(job, list, slot, lane, begin, end, partials + (u64)blockIdx.x * PARTIAL);
    if (sequence.length == 0 || (begin >= end && blockIdx.x > 0)) return;
    if (job.appends && blockIdx.x == 0) append_row(job, sequence, place, slot, lane);
    if (blocks <= 1 || comes_last(&reinterpret_cast<Arrivals*>(job.arrivals)[own_lane].attend, blocks, room)) {
        __syncthreads();
        merge(job, slot, lane, partials, blocks, room);
    }
}
