// Exact causal attention of many queries over pages (FlashAttention-2: tiles of rows stay, keys stream through shared memory).
//
// A row is one query head of one query token; row `query * GROUP + member` of a lane. A block takes MANY_ROWS rows of one lane and the
// keys of one or of all segments. A segment is SEGMENT keys at a fixed multiple: inside it a running maximum, sum and output begin anew,
// and segments are folded in order, in the same arithmetic whether one block does it or `merge_segments`. So the result of a row depends
// on its own keys only: not on the rows beside it, on how the work was split, or on the pieces in which the keys came.
//
// Scores are in units of log2. Rows of 16 bits: what the tensor cores multiply rows by is split into a sum of 16-bit numbers: q, scaled by a
// power of two, into two of binary16 or three of bfloat16, for 22 and 24 bits; weights, scaled by 2^SHIFT so that small ones do not
// vanish, into two. Codes of e4m3 become binary16 between shared memory and product; the lane's scale of keys is multiplied into q, that of
// values into the output at the end.
#include "common.cuh"

struct ManyJob {
    u64 queries;  // float[query][query_head][HEAD_DIM]
    u64 pages;    // u64[chunk - first_chunk]: address of `lanes x 256 x ROW_BYTES`
    u64 maxima;   // float[query][query_head]: the state, or with `split` float[segment - first_segment][query][query_head]
    u64 sums;     // the same
    u64 outputs;  // the same, [HEAD_DIM] each
    u64 scales;   // RowScale[lane], of e4m3
    u32 query_count;
    u32 first_position;
    u32 window;    // tokens, or 0 for none
    u32 key_from;  // keys of this launch
    u32 key_to;
    u32 first_chunk;
    u32 query_heads;
    u32 first_lane;
    u32 lane_count;
    u32 first_segment;
    u32 split;    // 1: block y takes segment first_segment + y alone
    float scale;  // softmax scale x log2(e)
};
static_assert(sizeof(ManyJob) == MANY_JOB_BYTES, "the job is the same on both sides");

struct MergeJob {
    u64 maxima;  // the state, as in ManyJob
    u64 sums;
    u64 outputs;
    u64 part_maxima;  // partial results by segment, as in ManyJob with `split`
    u64 part_sums;
    u64 part_outputs;
    u64 output;  // float[query][query_head][HEAD_DIM], written at the end
    u64 lse;     // float[query][query_head], written at the end
    u64 scales;  // RowScale[lane], of e4m3
    u32 query_count;
    u32 query_heads;
    u32 first_lane;
    u32 lane_count;
    u32 parts;
    u32 finish;  // 1: write output and lse instead of the state
};
static_assert(sizeof(MergeJob) == MERGE_JOB_BYTES, "the job is the same on both sides");

constexpr u32 ROWS = MANY_ROWS;
constexpr u32 KEYS = MANY_KEYS;
constexpr u32 SEGMENT = MANY_SEGMENT;
constexpr u32 THREADS = MANY_THREADS;
static_assert(CHUNK_TOKENS % KEYS == 0 && SEGMENT % CHUNK_TOKENS == 0, "a tile lies in one page, a segment has whole pages");

// The larger maximum of two partial results and what each side is multiplied by. Not both are minus infinity.
struct Fold {
    float maximum, before, after;
};

__device__ __forceinline__ Fold fold_of(float before, float after) {
    float maximum = fmaxf(before, after);
    return {maximum, exp2_fast(__fsub_rn(before, maximum)), exp2_fast(__fsub_rn(after, maximum))};
}

__device__ __forceinline__ float fold(const Fold &by, float before, float after) {
    return __fmaf_rn(before, by.before, __fmul_rn(after, by.after));
}

// The rows and keys of a block.
struct Block {
    u32 lane;
    u32 first_row;      // of the lane's `query_count * GROUP`
    u32 row_count;
    u32 key_from, key_to;  // seen by any row
};

__device__ __forceinline__ u32 visible_from(const ManyJob &job, u32 query) {
    u32 end = job.first_position + query + 1;
    u32 from = job.window != 0 && end > job.window ? end - job.window : 0;
    return max(from, job.key_from);
}

__device__ __forceinline__ u32 visible_to(const ManyJob &job, u32 query) {
    return min(job.first_position + query + 1, job.key_to);
}

__device__ __forceinline__ Block block_of(const ManyJob &job) {
    Block block;
    u32 rows = job.query_count * GROUP, tiles = (rows + ROWS - 1) / ROWS;
    // The last rows have the most keys, so they come first.
    u32 tile = tiles - 1 - blockIdx.x / job.lane_count;
    block.lane = job.first_lane + blockIdx.x % job.lane_count;
    block.first_row = tile * ROWS;
    block.row_count = min(ROWS, rows - block.first_row);
    block.key_from = visible_from(job, block.first_row / GROUP);
    block.key_to = visible_to(job, (block.first_row + block.row_count - 1) / GROUP);
    if (job.split != 0) {
        u32 first = (job.first_segment + blockIdx.y) * SEGMENT;
        block.key_from = max(block.key_from, first);
        block.key_to = min(block.key_to, first + SEGMENT);
    }
    return block;
}

// Index of a row's head among all heads of all queries.
__device__ __forceinline__ u64 head_index(const ManyJob &job, const Block &block, u32 row) {
    u32 at = block.first_row + row;
    return static_cast<u64>(at / GROUP) * job.query_heads + block.lane * GROUP + at % GROUP;
}

// Address of the rows of keys `key..key + KEYS`.
__device__ __forceinline__ const u8 *tile_rows(const ManyJob &job, u32 lane, u32 key) {
    u64 page = reinterpret_cast<const u64 *>(job.pages)[key / CHUNK_TOKENS - job.first_chunk];
    return reinterpret_cast<const u8 *>(page) + (static_cast<u64>(lane) * CHUNK_TOKENS + key % CHUNK_TOKENS) * ROW_BYTES;
}

// A row among all heads of all queries, and whether this thread writes the row's maximum and sum.
struct Place {
    u64 at;
    bool leads;
};

// How a row's outputs follow its maximum and sum: not at all (the segment had no key), as they are (the state had none), or folded.
struct Update {
    Fold by;
    bool untouched, fresh;
};

// Folds a segment's maximum and sum into the state. All threads of the warp call it, and all of a row with the same numbers.
__device__ __forceinline__ Update update_state(const ManyJob &job, const Place &place, bool valid, float maximum, float sum) {
    float *maxima = reinterpret_cast<float *>(job.maxima), *sums = reinterpret_cast<float *>(job.sums);
    u64 at = place.at;
    if (job.split != 0) {
        at += static_cast<u64>(blockIdx.y) * job.query_count * job.query_heads;
    }
    Update update;
    float before = minus_infinity(), before_sum = 0.0f;
    if (valid && job.split == 0) {
        before = maxima[at];
        // A state that is still empty has a maximum and nothing else.
        if (before != minus_infinity()) before_sum = sums[at];
    }
    // Every thread of the row has read before one writes.
    __syncwarp();
    update.untouched = !valid || maximum == minus_infinity();
    update.fresh = before == minus_infinity();
    update.by = {maximum, 0.0f, 1.0f};
    if (!update.untouched && !update.fresh) {
        update.by = fold_of(before, maximum);
        sum = fold(update.by, before_sum, sum);
    }
    if (valid && place.leads && (job.split != 0 || !update.untouched)) {
        maxima[at] = update.untouched ? minus_infinity() : update.by.maximum;
        sums[at] = sum;
    }
    return update;
}

// Where a row's outputs of this launch begin.
__device__ __forceinline__ float *outputs_of(const ManyJob &job, u64 at) {
    if (job.split != 0) {
        at += static_cast<u64>(blockIdx.y) * job.query_count * job.query_heads;
    }
    return reinterpret_cast<float *>(job.outputs) + at * HEAD_DIM;
}

#if ROW_TYPE != ROW_F32

constexpr u32 WARPS = THREADS / 32;
static_assert(ROWS == 16 * WARPS, "a warp has sixteen rows");
constexpr float SHIFT = 14.0f;
// Units of 16 bytes, of a row and of its key.
constexpr u32 UNITS = ROW_BYTES / 16;
constexpr u32 HALF_UNITS = UNITS / 2;
// A row in shared memory.
constexpr u32 ROW_STRIDE = (ROW_BYTES + 127) / 128 * 128;
constexpr u32 TILE_BYTES = KEYS * ROW_STRIDE;
// Tiles in shared memory: one is worked on, the others are on their way.
constexpr u32 STAGES = MANY_STAGES;
// Queries lie part after part.
constexpr u32 QUERY_PARTS = ROW_TYPE == ROW_BF16 ? 3 : 2;
constexpr u32 QUERY_STRIDE = (HEAD_DIM * 2 + 127) / 128 * 128;
constexpr u32 PART_BYTES = ROWS * QUERY_STRIDE;
constexpr u32 SCORE_TILES = KEYS / 8;
constexpr u32 OUTPUT_TILES = HEAD_DIM / 8;
// Whether a warp's queries stay in registers for good, of which they take this many a thread.
constexpr u32 QUERY_REGISTERS = QUERY_PARTS * HEAD_DIM / 4;
constexpr bool KEEPS_QUERIES = QUERY_REGISTERS <= 64;

// Units of a row are permuted so that the same unit of eight rows lies in different banks. Strides are multiples of 128 bytes.
__device__ __forceinline__ u32 permuted(u32 row, u32 unit) {
    return (unit ^ (row & 7)) << 4;
}

__device__ __forceinline__ u32 row_unit(u32 row, u32 unit) {
    return row * ROW_STRIDE + permuted(row, unit);
}

__device__ __forceinline__ u32 query_unit(u32 part, u32 row, u32 unit) {
    return part * PART_BYTES + row * QUERY_STRIDE + permuted(row, unit);
}

__device__ __forceinline__ void load_matrices(u32 (&to)[4], u32 address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(address)
                 : "memory");
}

__device__ __forceinline__ void load_matrices_transposed(u32 (&to)[4], u32 address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(address)
                 : "memory");
}

// c += a x b: 16 x 8 from 16 x 16 and 16 x 8.
__device__ __forceinline__ void multiply(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
#if ROW_TYPE == ROW_BF16
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
#else
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
#endif
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Rounds a pair and takes the rounded numbers off it.
__device__ __forceinline__ u32 take_pair(float &x, float &y) {
    u32 pair = pack_pair(x, y);
    x -= low_of_pair(pair);
    y -= high_of_pair(pair);
    return pair;
}

// Where a pair of channels lies among the pairs of a query. Two registers of a product have pairs t and 4 + t of 16 channels, and four codes
// of a key that lie together are pairs 2t and 2t + 1.
__device__ __forceinline__ u32 pair_place(u32 pair) {
#if ROW_TYPE == ROW_FP8
    return pair / 8 * 8 + pair % 8 / 2 + pair % 2 * 4;
#else
    return pair;
#endif
}

// Brings a warp's sixteen rows of queries to shared memory, scaled so that the largest element lies in 8..16; `unscale` takes that back.
__device__ void load_queries(const ManyJob &job, const Block &block, u8 *queries, float *unscale) {
    u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    constexpr u32 PAIRS = HEAD_DIM / 2, TURNS = (PAIRS + 31) / 32;
    float scale = job.scale * key_factor(job.scales, block.lane);
    for (u32 row = warp * 16; row < warp * 16 + 16; row++) {
        bool valid = row < block.row_count;
        const float2 *from = reinterpret_cast<const float2 *>(job.queries);
        if (valid) {
            from += head_index(job, block, row) * PAIRS;
        }
        float2 x[TURNS];
        float largest = 0.0f;
        for (u32 turn = 0; turn < TURNS; turn++) {
            u32 pair = turn * 32 + lane;
            x[turn] = valid && pair < PAIRS ? from[pair] : make_float2(0.0f, 0.0f);
            x[turn].x *= scale;
            x[turn].y *= scale;
            largest = fmaxf(largest, fmaxf(fabsf(x[turn].x), fabsf(x[turn].y)));
        }
        for (u32 distance = 16; distance > 0; distance /= 2) {
            largest = fmaxf(largest, __shfl_xor_sync(0xFFFFFFFFu, largest, distance));
        }
        u32 exponent = __float_as_uint(largest) >> 23;
        bool scaled = exponent >= 4 && exponent < 255;
        float by = scaled ? __uint_as_float((257 - exponent) << 23) : 1.0f;
        for (u32 turn = 0; turn < TURNS; turn++) {
            u32 pair = turn * 32 + lane;
            if (pair < PAIRS) {
                float low = x[turn].x * by, high = x[turn].y * by;
                for (u32 part = 0; part < QUERY_PARTS; part++) {
                    u32 place = pair_place(pair);
                    *reinterpret_cast<u32 *>(queries + query_unit(part, row, place / 4) + place % 4 * 4) = take_pair(low, high);
                }
            }
        }
        if (lane == 0) {
            unscale[row] = scaled ? __uint_as_float((exponent - 3) << 23) : 1.0f;
        }
    }
}

// Starts the copy of a tile. Rows that no row of the block sees become zero, because they may hold anything.
__device__ __forceinline__ void start_tile(const ManyJob &job, const Block &block, u32 tile, u32 to) {
    u32 key = tile * KEYS;
    const u8 *from = tile_rows(job, block.lane, key);
    for (u32 at = threadIdx.x; at < KEYS * UNITS; at += THREADS) {
        u32 row = at / UNITS, unit = at % UNITS;
        bool seen = key + row >= block.key_from && key + row < block.key_to;
        copy_16_async(to + row_unit(row, unit), from + at * 16, seen);
    }
}

// The two rows of a tile of scores that a thread has a part of: `lane / 4` and that + 8.
struct ThreadRows {
    u32 from[2], to[2];  // visible keys
    float unscale[2];
    float maximum[2], sum[2];
};

// A warp's queries as left sides of products, by 16 channels and part.
struct Queries {
    u32 fragments[KEEPS_QUERIES ? HEAD_DIM / 16 : 1][QUERY_PARTS][4];
    u32 address;  // of the warp's row `lane % 16`

    __device__ __forceinline__ void load(u32 place, u32 step) {
        u32 lane = threadIdx.x % 32, row = threadIdx.x / 32 * 16 + lane % 16;
#pragma unroll
        for (u32 part = 0; part < QUERY_PARTS; part++) {
            load_matrices(fragments[place][part], address + query_unit(part, row, 2 * step + lane / 16));
        }
    }

    // The parts of channels `step * 16..`. `step` is known when loops are unrolled.
    __device__ __forceinline__ const u32 (&of(u32 step))[QUERY_PARTS][4] {
        if (KEEPS_QUERIES) return fragments[step];
        load(0, step);
        return fragments[0];
    }
};

__device__ __forceinline__ void scores_of_tile(Queries &queries, u32 tile, float (&scores)[SCORE_TILES][4]) {
    u32 lane = threadIdx.x % 32;
#pragma unroll
    for (u32 n = 0; n < SCORE_TILES; n++) {
#pragma unroll
        for (u32 i = 0; i < 4; i++) {
            scores[n][i] = 0.0f;
        }
    }
#if ROW_TYPE == ROW_FP8
    // Four matrices of codes are two tiles of keys by 32 channels.
#pragma unroll
    for (u32 step = 0; step < HEAD_DIM / 16; step += 2) {
        u32 parts[2][QUERY_PARTS][4];
#pragma unroll
        for (u32 half = 0; half < 2; half++) {
            const u32(&of)[QUERY_PARTS][4] = queries.of(step + half);
#pragma unroll
            for (u32 i = 0; i < QUERY_PARTS * 4; i++) {
                parts[half][i / 4][i % 4] = of[i / 4][i % 4];
            }
        }
#pragma unroll
        for (u32 n = 0; n < SCORE_TILES; n += 2) {
            u32 codes[4];
            load_matrices(codes, tile + row_unit(n * 8 + lane / 16 * 8 + lane % 8, step + lane / 8 % 2));
#pragma unroll
            for (u32 i = 0; i < 4; i++) {
                u32 first = expanded(__byte_perm(codes[i], 0, 0x1404)), second = expanded(__byte_perm(codes[i], 0, 0x3424));
#pragma unroll
                for (u32 part = QUERY_PARTS; part-- > 0;) {
                    multiply(scores[n + i / 2], parts[i % 2][part], first, second);
                }
            }
        }
    }
#else
#pragma unroll
    for (u32 step = 0; step < HEAD_DIM / 16; step++) {
        const u32(&parts)[QUERY_PARTS][4] = queries.of(step);
#pragma unroll
        for (u32 n = 0; n < SCORE_TILES; n += 2) {
            u32 keys[4];
            load_matrices(keys, tile + row_unit(n * 8 + lane / 16 * 8 + lane % 8, 2 * step + lane / 8 % 2));
#pragma unroll
            for (u32 part = QUERY_PARTS; part-- > 0;) {
                multiply(scores[n], parts[part], keys[0], keys[1]);
                multiply(scores[n + 1], parts[part], keys[2], keys[3]);
            }
        }
    }
#endif
}

// Scores to weights under the rows' running maxima. Gives what the outputs so far are to be multiplied by. With `WHOLE` every row of the warp
// sees every key of the tile.
template <bool WHOLE>
__device__ __forceinline__ void weights_of_tile(ThreadRows &rows, u32 first_key, float (&scores)[SCORE_TILES][4], float (&keep)[2]) {
    u32 lane = threadIdx.x % 32;
#pragma unroll
    for (u32 half = 0; half < 2; half++) {
        float largest = minus_infinity();
#pragma unroll
        for (u32 n = 0; n < SCORE_TILES; n++) {
#pragma unroll
            for (u32 i = 0; i < 2; i++) {
                u32 key = first_key + n * 8 + lane % 4 * 2 + i;
                bool visible = WHOLE || (key >= rows.from[half] && key < rows.to[half]);
                float score = visible ? scores[n][2 * half + i] * rows.unscale[half] : minus_infinity();
                scores[n][2 * half + i] = score;
                largest = fmaxf(largest, score);
            }
        }
        largest = fmaxf(largest, __shfl_xor_sync(0xFFFFFFFFu, largest, 1));
        largest = fmaxf(largest, __shfl_xor_sync(0xFFFFFFFFu, largest, 2));
        float before = rows.maximum[half], maximum = fmaxf(before, largest);
        // A row that has seen no key yet has weights of zero under any finite reference.
        float reference = maximum == minus_infinity() ? 0.0f : maximum - SHIFT;
        keep[half] = before == minus_infinity() ? 0.0f : exp2_fast(before - maximum);
        float sum = 0.0f;
#pragma unroll
        for (u32 n = 0; n < SCORE_TILES; n++) {
#pragma unroll
            for (u32 i = 0; i < 2; i++) {
                float weight = exp2_fast(scores[n][2 * half + i] - reference);
                scores[n][2 * half + i] = weight;
                sum += weight;
            }
        }
        rows.maximum[half] = maximum;
        rows.sum[half] = __fmaf_rn(rows.sum[half], keep[half], sum);
    }
}

__device__ __forceinline__ void add_values(u32 tile, const float (&weights)[SCORE_TILES][4], float (&outputs)[OUTPUT_TILES][4]) {
    u32 lane = threadIdx.x % 32;
#pragma unroll
    for (u32 step = 0; step < KEYS / 16; step++) {
        u32 high[4], low[4];
#pragma unroll
        for (u32 i = 0; i < 4; i++) {
            // Registers of a left side: rows 0-7 and 8-15 of keys 0-7, then of keys 8-15.
            float x = weights[2 * step + i / 2][i % 2 * 2], y = weights[2 * step + i / 2][i % 2 * 2 + 1];
            high[i] = take_pair(x, y);
            low[i] = pack_pair(x, y);
        }
#if ROW_TYPE == ROW_FP8
        // A transposed element is the codes of two channels: even ones make one tile of outputs, odd ones the next.
#pragma unroll
        for (u32 n = 0; n < OUTPUT_TILES; n += 4) {
            u32 codes[4];
            load_matrices_transposed(codes, tile + row_unit(step * 16 + lane % 16, HALF_UNITS + n / 2 + lane / 16));
#pragma unroll
            for (u32 i = 0; i < 4; i++) {
                u32 shift = i % 2 ? 0 : 8, first = expanded(codes[i / 2 * 2] << shift), second = expanded(codes[i / 2 * 2 + 1] << shift);
                multiply(outputs[n + i], low, first, second);
                multiply(outputs[n + i], high, first, second);
            }
        }
#else
#pragma unroll
        for (u32 n = 0; n < OUTPUT_TILES; n += 2) {
            u32 values[4];
            load_matrices_transposed(values, tile + row_unit(step * 16 + lane % 16, HALF_UNITS + n + lane / 16));
            multiply(outputs[n], low, values[0], values[1]);
            multiply(outputs[n + 1], low, values[2], values[3]);
            multiply(outputs[n], high, values[0], values[1]);
            multiply(outputs[n + 1], high, values[2], values[3]);
        }
#endif
    }
}

// Two neighbouring channels of a thread's outputs, and which of the thread's pairs they are.
__device__ __forceinline__ float2 output_pair(const float (&outputs)[OUTPUT_TILES][4], u32 n, u32 half) {
#if ROW_TYPE == ROW_FP8
    u32 column = 2 * half + n % 2;
    return make_float2(outputs[n / 2 * 2][column], outputs[n / 2 * 2 + 1][column]);
#else
    return make_float2(outputs[n][2 * half], outputs[n][2 * half + 1]);
#endif
}

__device__ __forceinline__ u32 output_place(u32 n, u32 t) {
#if ROW_TYPE == ROW_FP8
    return n / 2 * 8 + 2 * t + n % 2;
#else
    return n * 4 + t;
#endif
}

// Folds the segment into the state and begins anew.
__device__ __forceinline__ void end_segment(const ManyJob &job, const Block &block, ThreadRows &rows, float (&outputs)[OUTPUT_TILES][4]) {
    u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32;
#pragma unroll
    for (u32 half = 0; half < 2; half++) {
        float sum = rows.sum[half];
        sum += __shfl_xor_sync(0xFFFFFFFFu, sum, 1);
        sum += __shfl_xor_sync(0xFFFFFFFFu, sum, 2);
        u32 row = warp * 16 + half * 8 + lane / 4;
        bool valid = row < block.row_count;
        Place place = {valid ? head_index(job, block, row) : 0, lane % 4 == 0};
        Update update = update_state(job, place, valid, rows.maximum[half], sum);
        if (!update.untouched) {
            float2 *to = reinterpret_cast<float2 *>(outputs_of(job, place.at));
#pragma unroll
            for (u32 n = 0; n < OUTPUT_TILES; n++) {
                float2 value = output_pair(outputs, n, half), *pair = to + output_place(n, lane % 4);
                if (!update.fresh) {
                    float2 before = *pair;
                    value = make_float2(fold(update.by, before.x, value.x), fold(update.by, before.y, value.y));
                }
                *pair = value;
            }
        }
        rows.maximum[half] = minus_infinity();
        rows.sum[half] = 0.0f;
    }
#pragma unroll
    for (u32 n = 0; n < OUTPUT_TILES; n++) {
#pragma unroll
        for (u32 i = 0; i < 4; i++) {
            outputs[n][i] = 0.0f;
        }
    }
}

extern "C" __global__ void __launch_bounds__(THREADS) attend_many(const ManyJob job) {
    extern __shared__ __align__(128) u8 shared[];
    __shared__ float unscale[ROWS];
    u32 tiles = shared_address(shared) + QUERY_PARTS * PART_BYTES;
    Block block = block_of(job);
    u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32;

    u32 tile = block.key_from / KEYS, end = block.key_from < block.key_to ? (block.key_to + KEYS - 1) / KEYS : tile;
#pragma unroll
    for (u32 ahead = 0; ahead + 1 < STAGES; ahead++) {
        if (tile + ahead < end) {
            start_tile(job, block, tile + ahead, tiles + (tile + ahead) % STAGES * TILE_BYTES);
        }
        end_copy_group();
    }
    load_queries(job, block, shared, unscale);
    __syncthreads();
    Queries queries;
    queries.address = shared_address(shared);
    if (KEEPS_QUERIES) {
#pragma unroll
        for (u32 step = 0; step < HEAD_DIM / 16; step++) {
            queries.load(step, step);
        }
    }

    ThreadRows rows;
    // Keys that any row of the warp sees, and those that all of them see.
    u32 any_from = 0xFFFFFFFFu, any_to = 0, all_from = 0, all_to = 0xFFFFFFFFu;
    for (u32 half = 0; half < 2; half++) {
        u32 row = warp * 16 + half * 8 + lane / 4, query = (block.first_row + row) / GROUP;
        bool valid = row < block.row_count;
        rows.from[half] = valid ? visible_from(job, query) : 0;
        rows.to[half] = valid ? visible_to(job, query) : 0;
        rows.unscale[half] = unscale[row];
        rows.maximum[half] = minus_infinity();
        rows.sum[half] = 0.0f;
        if (valid) {
            any_from = min(any_from, rows.from[half]);
            any_to = max(any_to, rows.to[half]);
        }
        all_from = max(all_from, rows.from[half]);
        all_to = min(all_to, rows.to[half]);
    }
    any_from = __reduce_min_sync(0xFFFFFFFFu, any_from);
    any_to = __reduce_max_sync(0xFFFFFFFFu, any_to);
    all_from = __reduce_max_sync(0xFFFFFFFFu, all_from);
    all_to = __reduce_min_sync(0xFFFFFFFFu, all_to);

    float outputs[OUTPUT_TILES][4];
#pragma unroll
    for (u32 n = 0; n < OUTPUT_TILES; n++) {
#pragma unroll
        for (u32 i = 0; i < 4; i++) {
            outputs[n][i] = 0.0f;
        }
    }
    for (; tile < end; tile++) {
        wait_copy_groups<STAGES - 2>();
        // All copies of this tile are there, and nobody works on the one before it any more.
        __syncthreads();
        u32 next = tile + STAGES - 1;
        if (next < end) {
            start_tile(job, block, next, tiles + next % STAGES * TILE_BYTES);
        }
        end_copy_group();
        u32 here = tiles + tile % STAGES * TILE_BYTES, first_key = tile * KEYS;
        // A tile that none of the warp's rows sees would change nothing.
        if (first_key < any_to && first_key + KEYS > any_from) {
            float scores[SCORE_TILES][4], keep[2];
            scores_of_tile(queries, here, scores);
            if (first_key >= all_from && first_key + KEYS <= all_to) {
                weights_of_tile<true>(rows, first_key, scores, keep);
            } else {
                weights_of_tile<false>(rows, first_key, scores, keep);
            }
            // Maxima seldom change, and a product with 1 changes nothing.
            if (__any_sync(0xFFFFFFFFu, keep[0] != 1.0f || keep[1] != 1.0f)) {
#pragma unroll
                for (u32 n = 0; n < OUTPUT_TILES; n++) {
#pragma unroll
                    for (u32 i = 0; i < 4; i++) {
                        outputs[n][i] *= keep[i / 2];
                    }
                }
            }
            add_values(here, scores, outputs);
        }
        if (job.split == 0 && ((tile + 1) * KEYS % SEGMENT == 0 || tile + 1 == end)) {
            end_segment(job, block, rows, outputs);
        }
    }
    if (job.split != 0) {
        end_segment(job, block, rows, outputs);
    }
}

#else

constexpr u32 ROW_THREADS = THREADS / ROWS;
constexpr u32 ROW_KEYS = KEYS / ROW_THREADS;
constexpr u32 ROW_CHANNELS = HEAD_DIM / ROW_THREADS;
// Padded so that the same channel of neighbouring keys lies in different banks.
constexpr u32 TILE_STRIDE = 2 * HEAD_DIM + 4;
constexpr u32 QUERY_STRIDE = HEAD_DIM + 4;
static_assert(ROW_THREADS == 8 && ROWS * ROW_THREADS == THREADS, "eight threads a row");

__device__ __forceinline__ float largest_of_row(float x) {
    for (u32 distance = 1; distance < ROW_THREADS; distance *= 2) {
        x = fmaxf(x, __shfl_xor_sync(0xFFFFFFFFu, x, distance));
    }
    return x;
}

__device__ __forceinline__ float sum_of_row(float x) {
    for (u32 distance = 1; distance < ROW_THREADS; distance *= 2) {
        x += __shfl_xor_sync(0xFFFFFFFFu, x, distance);
    }
    return x;
}

// Folds the segment into the state and begins anew.
__device__ __forceinline__ void end_segment(
    const ManyJob &job, const Block &block, float &maximum, float &sum, float (&outputs)[ROW_CHANNELS]) {
    u32 row = threadIdx.x / ROW_THREADS, part = threadIdx.x % ROW_THREADS;
    bool valid = row < block.row_count;
    Place place = {valid ? head_index(job, block, row) : 0, part == 0};
    Update update = update_state(job, place, valid, maximum, sum_of_row(sum));
    if (!update.untouched) {
        float *to = outputs_of(job, place.at) + part;
        for (u32 i = 0; i < ROW_CHANNELS; i++) {
            to[i * ROW_THREADS] = update.fresh ? outputs[i] : fold(update.by, to[i * ROW_THREADS], outputs[i]);
        }
    }
    maximum = minus_infinity();
    sum = 0.0f;
    for (u32 i = 0; i < ROW_CHANNELS; i++) {
        outputs[i] = 0.0f;
    }
}

// Rows of 32 bits, in plain arithmetic: eight threads have a row, each its keys of a tile and then its channels.
extern "C" __global__ void __launch_bounds__(THREADS) attend_many(const ManyJob job) {
    extern __shared__ __align__(128) float shared_floats[];
    float *queries = shared_floats, *tile_data = queries + ROWS * QUERY_STRIDE, *weights = tile_data + KEYS * TILE_STRIDE;
    Block block = block_of(job);
    u32 row = threadIdx.x / ROW_THREADS, part = threadIdx.x % ROW_THREADS, query = (block.first_row + row) / GROUP;
    bool valid = row < block.row_count;
    for (u32 channel = part; channel < HEAD_DIM; channel += ROW_THREADS) {
        const float *from = reinterpret_cast<const float *>(job.queries);
        queries[row * QUERY_STRIDE + channel] = valid ? from[head_index(job, block, row) * HEAD_DIM + channel] * job.scale : 0.0f;
    }
    u32 from = valid ? visible_from(job, query) : 0, to = valid ? visible_to(job, query) : 0;
    float maximum = minus_infinity(), sum = 0.0f, outputs[ROW_CHANNELS];
#pragma unroll
    for (u32 i = 0; i < ROW_CHANNELS; i++) {
        outputs[i] = 0.0f;
    }
    u32 tile = block.key_from / KEYS, end = block.key_from < block.key_to ? (block.key_to + KEYS - 1) / KEYS : tile;
    for (; tile < end; tile++) {
        u32 first_key = tile * KEYS;
        const u8 *rows = tile_rows(job, block.lane, first_key);
        __syncthreads();
        for (u32 at = threadIdx.x; at < KEYS * (ROW_BYTES / 16); at += THREADS) {
            u32 key = at / (ROW_BYTES / 16), unit = at % (ROW_BYTES / 16);
            bool seen = first_key + key >= block.key_from && first_key + key < block.key_to;
            copy_16_async(shared_address(tile_data + key * TILE_STRIDE + unit * 4), rows + at * 16, seen);
        }
        end_copy_group();
        wait_copy_groups<0>();
        __syncthreads();
        float scores[ROW_KEYS], largest = minus_infinity();
#pragma unroll
        for (u32 i = 0; i < ROW_KEYS; i++) {
            const float4 *q = reinterpret_cast<const float4 *>(queries + row * QUERY_STRIDE);
            const float4 *k = reinterpret_cast<const float4 *>(tile_data + (part + i * ROW_THREADS) * TILE_STRIDE);
            float dot = 0.0f;
            for (u32 channel = 0; channel < HEAD_DIM / 4; channel++) {
                float4 a = q[channel], b = k[channel];
                dot = __fmaf_rn(a.x, b.x, __fmaf_rn(a.y, b.y, __fmaf_rn(a.z, b.z, __fmaf_rn(a.w, b.w, dot))));
            }
            u32 key = first_key + part + i * ROW_THREADS;
            scores[i] = key >= from && key < to ? dot : minus_infinity();
            largest = fmaxf(largest, scores[i]);
        }
        float before = maximum;
        maximum = fmaxf(before, largest_of_row(largest));
        float reference = maximum == minus_infinity() ? 0.0f : maximum;
        float keep = before == minus_infinity() ? 0.0f : exp2_fast(before - maximum), weight_sum = 0.0f;
#pragma unroll
        for (u32 i = 0; i < ROW_KEYS; i++) {
            float weight = exp2_fast(scores[i] - reference);
            weights[row * KEYS + part + i * ROW_THREADS] = weight;
            weight_sum += weight;
        }
        sum = __fmaf_rn(sum, keep, weight_sum);
        // The threads of a row are in one warp.
        __syncwarp();
#pragma unroll
        for (u32 i = 0; i < ROW_CHANNELS; i++) {
            outputs[i] *= keep;
        }
        for (u32 key = 0; key < KEYS; key++) {
            float weight = weights[row * KEYS + key];
            const float *value = tile_data + key * TILE_STRIDE + HEAD_DIM + part;
#pragma unroll
            for (u32 i = 0; i < ROW_CHANNELS; i++) {
                outputs[i] = __fmaf_rn(weight, value[i * ROW_THREADS], outputs[i]);
            }
        }
        if (job.split == 0 && ((tile + 1) * KEYS % SEGMENT == 0 || tile + 1 == end)) {
            end_segment(job, block, maximum, sum, outputs);
        }
    }
    if (job.split != 0) {
        end_segment(job, block, maximum, sum, outputs);
    }
}
constexpr float SHIFT = 0.0f;

#endif

// Folds the partial results of segments into the state, in order, and at the end makes outputs of it. A block has one row; a thread has one
// channel.
extern "C" __global__ void __launch_bounds__(HEAD_DIM) merge_segments(const MergeJob job) {
    u32 heads = job.lane_count * GROUP;
    u64 row = static_cast<u64>(blockIdx.x / heads) * job.query_heads + job.first_lane * GROUP + blockIdx.x % heads;
    u64 rows = static_cast<u64>(job.query_count) * job.query_heads, at = row * HEAD_DIM + threadIdx.x;
    float *maxima = reinterpret_cast<float *>(job.maxima), *sums = reinterpret_cast<float *>(job.sums);
    float *outputs = reinterpret_cast<float *>(job.outputs);
    float maximum = maxima[row], sum = 0.0f, output = 0.0f;
    if (maximum != minus_infinity()) {
        sum = sums[row];
        output = outputs[at];
    }
    for (u32 part = 0; part < job.parts; part++) {
        float after = reinterpret_cast<const float *>(job.part_maxima)[part * rows + row];
        if (after == minus_infinity()) {
            continue;
        }
        float after_sum = reinterpret_cast<const float *>(job.part_sums)[part * rows + row];
        float after_output = reinterpret_cast<const float *>(job.part_outputs)[part * rows * HEAD_DIM + at];
        if (maximum == minus_infinity()) {
            maximum = after;
            sum = after_sum;
            output = after_output;
            continue;
        }
        Fold by = fold_of(maximum, after);
        maximum = by.maximum;
        sum = fold(by, sum, after_sum);
        output = fold(by, output, after_output);
    }
    if (job.finish != 0) {
        bool some = maximum != minus_infinity();
        float factor = value_factor(job.scales, job.first_lane + blockIdx.x % heads / GROUP);
        reinterpret_cast<float *>(job.output)[at] = some ? __fdiv_rn(output, sum) * factor : 0.0f;
        if (threadIdx.x == 0) {
            float lse = (maximum - SHIFT + log2f(sum)) * 0.693147180559945f;
            reinterpret_cast<float *>(job.lse)[row] = some ? lse : minus_infinity();
        }
        return;
    }
    // Every thread has read the maximum before one writes it.
    __syncthreads();
    outputs[at] = output;
    if (threadIdx.x == 0) {
        maxima[row] = maximum;
        sums[row] = sum;
    }
}
