// Label scores of a unit of rows on tensor cores: packed codes are unsigned bytes after a shift and a mask, query weights signed bytes.
// Codes of fewer than 8 bits stay at the top of their byte: multiplying shifts them there, in a pipeline that has nothing else to do.
//
// A unit is UNIT rows of one lane. The eight columns of the product are the query heads that the lane has in each of MEMBERS sequences, padded
// to PADDED; where that leaves columns over, they take further rows of the unit instead (weights of column n are those of column n % WIDTH,
// and zero unless it is the turn of n / WIDTH), so that no accumulator is idle. Where eight columns are too few there are several tiles of them.
#pragma once
#include "types.cuh"
#include "mma.cuh"

struct Group {
    u32 channels, bits;
};
constexpr Group GROUPS[N_GROUPS] = {PLAN_GROUPS};

constexpr u32 PADDED = GROUP <= 1 ? 1 : GROUP <= 2 ? 2 : GROUP <= 4 ? 4 : 8;
// Tiles that the heads of one sequence fill.
constexpr u32 HEAD_TILES = (GROUP + 7) / 8;

// What the columns of a unit's products are, for 1, 2 or 4 sequences.
template <u32 MEMBERS_>
struct Columns {
    static constexpr u32 MEMBERS = MEMBERS_;
    static constexpr u32 WIDTH = PADDED * MEMBERS < 8 ? PADDED * MEMBERS : 8;
    // Sets of tiles, each of so many sequences.
    static constexpr u32 SETS = PADDED * MEMBERS / WIDTH, A_SET = MEMBERS / SETS;
    static constexpr u32 TILES = SETS * HEAD_TILES;
    static constexpr u32 TURNS = 8 / WIDTH;
    // Sixteen rows are one product; a load of 16 bytes a thread brings 32 rows.
    static constexpr u32 SUMS = TURNS == 1 ? 2 : 1;
    static constexpr u32 UNIT = 16 * TURNS * SUMS;
    static constexpr u32 LOADS = UNIT / 32;
};
typedef Columns<1> Alone;
constexpr u32 UNIT = Alone::UNIT;
constexpr u32 LOADS = Alone::LOADS;

// Whose a column of a tile is: a sequence, and a head, which may be one of the padding.
struct Column {
    u32 member, head;
};

template <typename C>
__device__ __forceinline__ Column column_of(u32 tile, u32 column) {
    const u32 own = column % C::WIDTH;
    return {tile / HEAD_TILES * C::A_SET + own / PADDED, tile % HEAD_TILES * 8 + own % PADDED};
}

// 16-bit groups are two planes of 8 bits: low bytes, then high bytes.
__device__ constexpr u32 planes_of(u32 group) { return GROUPS[group].bits == 16 ? 2 : 1; }
__device__ constexpr u32 planes_before(u32 group) { return group == 0 ? 0 : planes_before(group - 1) + planes_of(group - 1); }
constexpr u32 PLANES = planes_before(N_GROUPS);
__device__ constexpr u32 quads_of(u32 group) { return GROUPS[group].channels / 4; }
__device__ constexpr u32 quads_before(u32 group) { return group == 0 ? 0 : quads_before(group - 1) + quads_of(group - 1); }
constexpr u32 QUADS = CHANNELS / 4;
// A product takes eight quads of one group.
__device__ constexpr u32 products_of(u32 group) { return (quads_of(group) + 7) / 8; }
__device__ constexpr u32 products_before(u32 group) { return group == 0 ? 0 : products_before(group - 1) + products_of(group - 1); }
constexpr u32 PRODUCTS = products_before(N_GROUPS);
// Operands of products, by plane as well.
__device__ constexpr u32 operands_before(u32 group) { return group == 0 ? 0 : operands_before(group - 1) + products_of(group - 1) * planes_of(group - 1); }
constexpr u32 OPERANDS = operands_before(N_GROUPS);
__device__ constexpr u32 bytes_before(u32 group) {
    return group == 0 ? 0 : bytes_before(group - 1) + 16 * GROUPS[group - 1].channels * GROUPS[group - 1].bits / 8;
}

// Query weights of one lane, by kernels/src/label/weights.rs.
struct LaneWeights {
    u32 quads[GROUP][QUADS];          // four signed bytes each
    float factors[GROUP][N_GROUPS];   // unit x softmax scale x log2 e
};

__device__ __forceinline__ float warp_max(float x) {
#pragma unroll
    for (int step = 16; step > 0; step /= 2) x = fmaxf(x, __shfl_xor_sync(0xFFFFFFFFu, x, step));
    return x;
}

// What the weights of a lane are made from beside the query, in shared memory.
struct Coder {
    u16 channels[CHANNELS];
    float steps[CHANNELS];
};

// Channels and steps, which no kernel writes; no barrier.
__device__ __forceinline__ void fetch_coder(const StepJob& job, u32 lane, Coder& out) {
    const u16* channels = reinterpret_cast<const u16*>(job.channels) + lane * CHANNELS;
    const float* steps = reinterpret_cast<const float*>(job.steps) + lane * CHANNELS;
    for (u32 channel = threadIdx.x; channel < CHANNELS; channel += blockDim.x) out.channels[channel] = channels[channel], out.steps[channel] = steps[channel];
}

// The weights of one group and head, by a warp. Products and roundings one by one: the weights are the same bits on every device.
template <u32 G>
__device__ __forceinline__ void weights_of_group(const float* query, const Coder& coder, float scale, u32 head, LaneWeights& out) {
    constexpr u32 first = 4 * quads_before(G), count = GROUPS[G].channels, rounds = (count + 31) / 32;
    const u32 lane = threadIdx.x % 32;
    float products[rounds], largest = 0.0f;
#pragma unroll
    for (u32 round = 0; round < rounds; round++) {
        const u32 c = round * 32 + lane;
        products[round] = c < count ? __fmul_rn(query[coder.channels[first + c]], coder.steps[first + c]) : 0.0f;
        largest = fmaxf(largest, fabsf(products[round]));
    }
    largest = warp_max(largest);
    const bool nothing = largest < 1e-30f;
    const float factor = nothing ? 0.0f : __fdiv_rn(127.0f, largest);
    s8* weights = reinterpret_cast<s8*>(out.quads[head]);
#pragma unroll
    for (u32 round = 0; round < rounds; round++) {
        const u32 c = round * 32 + lane;
        if (c < count) weights[first + c] = (s8)floorf(__fadd_rn(__fmul_rn(products[round], factor), 0.5f));
    }
    if (lane == 0) out.factors[head][G] = (nothing ? 0.0f : __fdiv_rn(largest, 127.0f)) * scale;
}

template <u32 G>
__device__ __forceinline__ void weights_of_task(const float* query, const Coder& coder, float scale, u32 task, LaneWeights& out) {
    if (task / GROUP == G) {
        const u32 head = task - G * GROUP;
        weights_of_group<G>(query + head * HEAD_DIM, coder, scale, head, out);
    }
    if constexpr (G + 1 < N_GROUPS) weights_of_task<G + 1>(query, coder, scale, task, out);
}

// Computes the weights of a lane, by all threads of the block, after `fetch_coder` and a barrier; ends with a barrier.
__device__ __forceinline__ void make_weights(const StepJob& job, u32 lane, const Coder& coder, LaneWeights& out) {
    const float* query = reinterpret_cast<const float*>(job.query) + lane * GROUP * HEAD_DIM;
    for (u32 task = threadIdx.x / 32; task < GROUP * N_GROUPS; task += blockDim.x / 32) weights_of_task<0>(query, coder, job.score_scale, task, out);
    __syncthreads();
}

// What a thread keeps of the weights: by column tile and product, for each turn. Threads of other turns hold zeros. A score is `start` and the
// sums of products by `factors`.
template <typename C>
struct Fragments {
    u32 b[C::TILES][PRODUCTS][2];
    float factors[C::TILES][PLANES][2];
    float start[C::TILES][2];
    // What moves a thread's codes to the top of their bytes, as a factor.
    u32 shifts[N_GROUPS];
};

// Bits below the codes of a group within their bytes.
__device__ constexpr u32 raised(u32 group) { return GROUPS[group].bits < 8 ? 8 - GROUPS[group].bits : 0; }

// `weights` by sequence.
template <u32 G, typename C>
__device__ __forceinline__ void fragments_of_group(const LaneWeights* weights, Fragments<C>& out) {
    const u32 g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
    for (u32 tile = 0; tile < C::TILES; tile++) {
        const auto [member, head] = column_of<C>(tile, g);
#pragma unroll
        for (u32 product = 0; product < products_of(G); product++) {
#pragma unroll
            for (u32 half = 0; half < 2; half++) {
                const u32 quad = 8 * product + 4 * half + t;
                const bool present = quad < quads_of(G) && head < GROUP;
                out.b[tile][products_before(G) + product][half] = present ? weights[member].quads[present ? head : 0][quads_before(G) + (present ? quad : 0)] : 0;
            }
        }
#pragma unroll
        for (u32 plane = 0; plane < planes_of(G); plane++) {
#pragma unroll
            for (u32 column = 0; column < 2; column++) {
                const auto [of_member, of] = column_of<C>(tile, 2 * t + column);
                out.factors[tile][planes_before(G) + plane][column] = of < GROUP ? weights[of_member].factors[of < GROUP ? of : 0][G] * (plane ? 256.0f : 1.0f / (1u << raised(G))) : 0.0f;
            }
        }
    }
    // Quads of a load begin at a multiple of four.
    out.shifts[G] = GROUPS[G].bits < 8 ? 1u << raised(G) >> t % (8 / min(GROUPS[G].bits, 8u)) * GROUPS[G].bits : 1;
    if constexpr (G + 1 < N_GROUPS) fragments_of_group<G + 1, C>(weights, out);
}

// Label bytes: at an address of shared memory, where they are staged, or from where they are read once. A stage is written again and again.
__device__ __forceinline__ uint4 label_16(u32 from) {
    uint4 x;
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w) : "r"(from));
    return x;
}
__device__ __forceinline__ uint4 label_16(const u8* from) { return load_16_once(from); }
__device__ __forceinline__ uint2 label_8(u32 from) {
    uint2 x;
    asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];" : "=r"(x.x), "=r"(x.y) : "r"(from));
    return x;
}
__device__ __forceinline__ uint2 label_8(const u8* from) { return load_8_once(from); }

// Codes of one product's A operand: quads 8 * PRODUCT + t and + 4 of 32 rows, which are two blocks of 16 rows of a label page: `block` is the
// first for threads of g < 4 and the second for the others. Word w of a thread is token 4 * (g % 4) + w of its block. A thread whose quad does
// not exist has those of another: its weights are zero.
template <u32 G, u32 PRODUCT, u32 PLANE, typename Address>
__device__ __forceinline__ void load_codes(Address block, u32 shift, u32 (&codes)[2][4]) {
    constexpr u32 bits = GROUPS[G].bits;
    const u32 g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    const Address group = block + bytes_before(G);
#pragma unroll
    for (u32 half = 0; half < 2; half++) {
        const u32 quad = 8 * PRODUCT + 4 * half + t;
        // Quads of this half that exist at all, known to the compiler.
        constexpr u32 whole = bits == 2 ? quads_of(G) / 4 * 4 : quads_of(G);
        const u32 base = 8 * PRODUCT + 4 * half;
        if (base >= quads_of(G)) {
#pragma unroll
            for (u32 w = 0; w < 4; w++) codes[half][w] = 0;
        } else if (bits == 2 && base >= whole) {
            // The last 8 channels of a 2-bit group: 16 bits a token, nibbles spread to bytes, then two bits a quad.
            const uint2 words = label_8(group + whole * 16 + (g % 4) * 8);
            const u32 pairs[2] = {words.x, words.y};
#pragma unroll
            for (u32 w = 0; w < 4; w++) {
                u32 word = w % 2 ? pairs[w / 2] >> 16 : pairs[w / 2] & 0xFFFFu;
                word = (word | word << 8) & 0x00FF00FFu;
                word = (word | word << 4) & 0x0F0F0F0Fu;
                codes[half][w] = word << (t == 1 ? 4 : 6) & 0xC0C0C0C0u;
            }
        } else {
            constexpr u32 a_vector = bits == 16 ? 1 : 8 / bits;
            const u32 safe = quad < quads_of(G) ? quad : base;
            const u32 vector = bits == 16 ? 2 * safe + PLANE : safe / a_vector;
            const uint4 words = label_16(group + vector * 64 + (g % 4) * 16);
            codes[half][0] = words.x, codes[half][1] = words.y, codes[half][2] = words.z, codes[half][3] = words.w;
            if constexpr (bits < 8) {
                constexpr u32 mask = bits == 2 ? 0xC0C0C0C0u : 0xF0F0F0F0u;
#pragma unroll
                for (u32 w = 0; w < 4; w++) codes[half][w] = codes[half][w] * shift & mask;
            }
        }
    }
}

// Largest sum of products that a group can have.
__device__ constexpr u32 most_of(u32 group) { return GROUPS[group].channels * 127 * (256 - (1u << raised(group))); }
__device__ constexpr u32 most_before(u32 group) { return group == 0 ? 0 : most_of(group - 1) > most_before(group - 1) ? most_of(group - 1) : most_before(group - 1); }
__device__ constexpr u32 least_before(u32 group) { return group == 0 ? ~0u : most_of(group - 1) < least_before(group - 1) ? most_of(group - 1) : least_before(group - 1); }
// Whether every sum fits 22 bits: then it is counted from the bits of 1.5 x 2^23, and is a float as it stands. Conversions have a pipeline of
// their own, and a slow one.
constexpr bool NARROW = most_before(N_GROUPS) < 1u << 22;
// Whether that 1.5 x 2^23 may stay in the sum until the end, as part of `start`: the rounding of one unit of a sum must be nothing to a score.
constexpr bool KEPT = NARROW && least_before(N_GROUPS) >= 1u << 18;
constexpr float FROM = 12582912.0f;

// Sums of products of a unit for the tiles of one set.
template <typename C>
struct Sums {
    int c[HEAD_TILES][C::SUMS][PLANES][4];
};

template <typename C>
__device__ __forceinline__ Sums<C> no_sums() {
    Sums<C> sums;
#pragma unroll
    for (u32 tile = 0; tile < HEAD_TILES; tile++)
#pragma unroll
        for (u32 sum = 0; sum < C::SUMS; sum++)
#pragma unroll
            for (u32 plane = 0; plane < PLANES; plane++)
#pragma unroll
                for (u32 i = 0; i < 4; i++) sums.c[tile][sum][plane][i] = NARROW ? __float_as_int(FROM) : 0;
    return sums;
}

// Scales scores by `by` and counts them from `start`.
template <typename C>
__device__ __forceinline__ void set_scale(Fragments<C>& weights, float by, const float (&start)[C::TILES][2]) {
#pragma unroll
    for (u32 tile = 0; tile < C::TILES; tile++) {
#pragma unroll
        for (u32 column = 0; column < 2; column++) {
            double from = start[tile][column];
#pragma unroll
            for (u32 plane = 0; plane < PLANES; plane++) {
                weights.factors[tile][plane][column] *= by;
                if (KEPT) from -= (double)FROM * weights.factors[tile][plane][column];
            }
            weights.start[tile][column] = (float)from;
        }
    }
}

// Codes of a unit, loaded where they are multiplied: for one set of columns. `blocks` are the blocks of 16 rows that this thread loads from.
template <typename C, typename Address>
struct CodesInPlace {
    const Address (&blocks)[C::LOADS];
    const u32 (&shifts)[N_GROUPS];

    template <u32 G, u32 PRODUCT, u32 PLANE>
    __device__ __forceinline__ void take(u32 load, u32 (&codes)[2][4]) const { load_codes<G, PRODUCT, PLANE>(blocks[load], shifts[G], codes); }
};

// Codes of a unit, loaded once for several sets.
template <typename C>
struct CodesKept {
    u32 codes[C::LOADS][OPERANDS][2][4];

    template <u32 G, u32 PRODUCT, u32 PLANE, typename Address>
    __device__ __forceinline__ void load_from(Address block, const u32 (&shifts)[N_GROUPS], u32 load) {
        load_codes<G, PRODUCT, PLANE>(block, shifts[G], codes[load][operands_before(G) + PRODUCT * planes_of(G) + PLANE]);
        if constexpr (PLANE + 1 < planes_of(G)) load_from<G, PRODUCT, PLANE + 1>(block, shifts, load);
        else if constexpr (PRODUCT + 1 < products_of(G)) load_from<G, PRODUCT + 1, 0>(block, shifts, load);
        else if constexpr (G + 1 < N_GROUPS) load_from<G + 1, 0, 0>(block, shifts, load);
    }

    template <typename Address>
    __device__ __forceinline__ CodesKept(const Address (&blocks)[C::LOADS], const u32 (&shifts)[N_GROUPS]) {
#pragma unroll
        for (u32 load = 0; load < C::LOADS; load++) load_from<0, 0, 0>(blocks[load], shifts, load);
    }

    template <u32 G, u32 PRODUCT, u32 PLANE>
    __device__ __forceinline__ void take(u32 load, u32 (&out)[2][4]) const {
#pragma unroll
        for (u32 w = 0; w < 8; w++) out[w / 4][w % 4] = codes[load][operands_before(G) + PRODUCT * planes_of(G) + PLANE][w / 4][w % 4];
    }
};

template <u32 G, u32 PRODUCT, u32 PLANE, typename Codes, typename C>
__device__ __forceinline__ void add_products(const Codes& source, u32 load, u32 set, const Fragments<C>& weights, Sums<C>& sums) {
    u32 codes[2][4];
    source.template take<G, PRODUCT, PLANE>(load, codes);
    const u32 g = threadIdx.x % 32 / 4;
#pragma unroll
    for (u32 m = 0; m < 2; m++) {
        const u32 product = 2 * load + m, turn = product % C::TURNS, sum = product / C::TURNS;
#pragma unroll
        for (u32 tile = 0; tile < HEAD_TILES; tile++) {
            const u32(&b)[2] = weights.b[set * HEAD_TILES + tile][products_before(G) + PRODUCT];
            const bool mine = C::TURNS == 1 || g / C::WIDTH == turn;
            int(&c)[4] = sums.c[tile][sum][planes_before(G) + PLANE];
            if constexpr (quads_of(G) - 8 * PRODUCT > 4) {
                const u32 a[4] = {codes[0][2 * m], codes[0][2 * m + 1], codes[1][2 * m], codes[1][2 * m + 1]};
                mma_bytes(c, a, mine ? b[0] : 0, mine ? b[1] : 0);
            } else {
                const u32 a[2] = {codes[0][2 * m], codes[0][2 * m + 1]};
                mma_bytes(c, a, mine ? b[0] : 0);
            }
        }
    }
    if constexpr (PLANE + 1 < planes_of(G)) {
        add_products<G, PRODUCT, PLANE + 1>(source, load, set, weights, sums);
    } else if constexpr (PRODUCT + 1 < products_of(G)) {
        add_products<G, PRODUCT + 1, 0>(source, load, set, weights, sums);
    } else if constexpr (G + 1 < N_GROUPS) {
        add_products<G + 1, 0, 0>(source, load, set, weights, sums);
    }
}

__device__ __forceinline__ float to_float(int sum) {
    if constexpr (KEPT) return __int_as_float(sum);
    if constexpr (NARROW) return __int_as_float(sum) - FROM;
    return (float)sum;
}

// Scores of a unit for a set, as `set_scale` says; in log2 by 1 from 0. Score [tile][sum][2 * r + c] of thread (g, t) is that of
// column_of(set * HEAD_TILES + tile, 2 * t + c) and of row row_of(sum, c) + r of the unit.
template <typename C>
struct Scores {
    float x[HEAD_TILES][C::SUMS][4];
};

template <typename C>
__device__ __forceinline__ u32 row_of(u32 sum, u32 column) {
    const u32 g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    const u32 product = sum * C::TURNS + (2 * t + column) / C::WIDTH % C::TURNS;
    return product / 2 * 32 + g / 4 * 16 + g % 4 * 4 + product % 2 * 2;
}

template <typename Codes, typename C>
__device__ __forceinline__ Scores<C> scores_of(const Codes& codes, u32 set, const Fragments<C>& weights) {
    Sums<C> sums = no_sums<C>();
#pragma unroll
    for (u32 load = 0; load < C::LOADS; load++) add_products<0, 0, 0>(codes, load, set, weights, sums);
    Scores<C> scores;
#pragma unroll
    for (u32 tile = 0; tile < HEAD_TILES; tile++) {
        const u32 of = set * HEAD_TILES + tile;
#pragma unroll
        for (u32 sum = 0; sum < C::SUMS; sum++) {
#pragma unroll
            for (u32 i = 0; i < 4; i++) {
                float x = weights.start[of][i % 2];
#pragma unroll
                for (u32 plane = 0; plane < PLANES; plane++) x = __fmaf_rn(to_float(sums.c[tile][sum][plane][i]), weights.factors[of][plane][i % 2], x);
                scores.x[tile][sum][i] = x;
            }
        }
    }
    return scores;
}

// Label page of a chunk's lane.
__device__ __forceinline__ const u8* label_page(const SequenceState& sequence, const LayerPlace& place, u32 chunk, u32 lane) {
    return reinterpret_cast<const u8*>(reinterpret_cast<const u64*>(sequence.label_slots)[chunk] + place.labels) + lane * (CHUNK_TOKENS * LABEL_BYTES);
}
