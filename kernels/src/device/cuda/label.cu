// Keys of whole pages to label pages, by the quantiser and packing of kernels/src/label/packing.rs, to the bit.
//
// A block takes 32 tokens of one lane of one page: it brings their keys to shared memory and then makes a 32-bit word of the label page
// a thread at a time.
#include "common.cuh"

struct LabelJob {
    u64 pages;       // u64[page]: address of `lanes x 256 x ROW_BYTES`
    u64 labels;      // u64[page]: address of `lanes x 256 x LABEL_BYTES`
    u64 channels;    // u16[lane][CHANNELS]: channel of the key
    u64 low;         // float[lane][CHANNELS]: value of code 0
    u64 reciprocal;  // float[lane][CHANNELS]: 1 / step
    u64 scales;      // RowScale[lane], of e4m3
    u32 lanes;
    u32 page_count;
};
static_assert(sizeof(LabelJob) == LABEL_JOB_BYTES, "the job is the same on both sides");

struct Group {
    u32 channels;
    u32 bits;
};
__device__ constexpr Group GROUPS[N_GROUPS] = {PLAN_GROUPS};

constexpr u32 BLOCK_TOKENS = 16;
constexpr u32 TOKENS = 32;
constexpr u32 THREADS = 128;
constexpr u32 KEY_BYTES = HEAD_DIM * ELEMENT_BYTES;
// Keys are 16 bytes apart from each other, so that the same channel of neighbouring tokens lies in different banks.
constexpr u32 KEY_STRIDE = KEY_BYTES + 16;
constexpr u32 WORDS = BLOCK_TOKENS * LABEL_BYTES / 4;

struct Lane {
    u16 channels[CHANNELS];
    float low[CHANNELS];
    float reciprocal[CHANNELS];
    float scale;
};

// Each operation is rounded on its own, as on the CPU.
__device__ __forceinline__ u32 quantise(const Lane &lane, const u8 *key, u32 kept, u32 bits) {
    float x = to_f32(*reinterpret_cast<const element *>(key + lane.channels[kept] * ELEMENT_BYTES));
#if ROW_TYPE == ROW_FP8
    x = __fmul_rn(x, lane.scale);
#endif
    float offset = __fsub_rn(x, lane.low[kept]);
    float scaled = __fmul_rn(offset, lane.reciprocal[kept]);
    float shifted = floorf(__fadd_rn(scaled, 0.5f));
    float top = static_cast<float>((1u << bits) - 1);
    return static_cast<u32>(fminf(fmaxf(shifted, 0.0f), top));
}

// The word of `vector` (of a group whose first kept channel is `first`) that holds a token's codes.
__device__ __forceinline__ u32 vector_word(const Lane &lane, const u8 *key, u32 first, u32 vector, u32 bits) {
    u32 word = 0;
    if (bits == 16) {
        // Four channels make a vector of low bytes and then one of high bytes.
        for (u32 n = 0; n < 4; n++) {
            u32 code = quantise(lane, key, first + vector / 2 * 4 + n, 16);
            word |= (code >> (8 * (vector % 2)) & 0xFF) << (8 * n);
        }
        return word;
    }
    u32 channels = 32 / bits;
    for (u32 n = 0; n < channels; n++) {
        word |= quantise(lane, key, first + vector * channels + n, bits) << (8 * (n % 4) + bits * (n / 4));
    }
    return word;
}

// The 16 bits that hold a token's codes of the last 8 channels of a 2-bit group.
__device__ __forceinline__ u32 half_word(const Lane &lane, const u8 *key, u32 first) {
    u32 word = 0;
    for (u32 n = 0; n < 8; n++) {
        word |= quantise(lane, key, first + n, 2) << (4 * (n % 4) + 2 * (n / 4));
    }
    return word;
}

// Word `index` of a block of 16 tokens, whose keys begin at `keys`.
__device__ u32 label_word(const Lane &lane, const u8 *keys, u32 index) {
    u32 first = 0;
    for (u32 g = 0; g < N_GROUPS; g++) {
        u32 channels = GROUPS[g].channels, bits = GROUPS[g].bits;
        u32 words = BLOCK_TOKENS * channels * bits / 32;
        if (index < words) {
            u32 vector = index / BLOCK_TOKENS;
            if (bits == 2 && vector == channels / 16) {
                u32 pair = index % BLOCK_TOKENS, tail = first + channels / 16 * 16;
                u32 low = half_word(lane, keys + 2 * pair * KEY_STRIDE, tail);
                return low | half_word(lane, keys + (2 * pair + 1) * KEY_STRIDE, tail) << 16;
            }
            return vector_word(lane, keys + index % BLOCK_TOKENS * KEY_STRIDE, first, vector, bits);
        }
        index -= words;
        first += channels;
    }
    return 0;
}

extern "C" __global__ void __launch_bounds__(THREADS) label_pages(const LabelJob job) {
    __shared__ __align__(16) u8 keys[TOKENS * KEY_STRIDE];
    __shared__ Lane lane;
    u32 part = blockIdx.x % (CHUNK_TOKENS / TOKENS), rest = blockIdx.x / (CHUNK_TOKENS / TOKENS);
    u32 which = rest % job.lanes, page = rest / job.lanes;
    for (u32 kept = threadIdx.x; kept < CHANNELS; kept += THREADS) {
        u32 at = which * CHANNELS + kept;
        lane.channels[kept] = reinterpret_cast<const u16 *>(job.channels)[at];
        lane.low[kept] = reinterpret_cast<const float *>(job.low)[at];
        lane.reciprocal[kept] = reinterpret_cast<const float *>(job.reciprocal)[at];
    }
#if ROW_TYPE == ROW_FP8
    if (threadIdx.x == 0) lane.scale = reinterpret_cast<const RowScale *>(job.scales)[which].key;
#endif
    u64 first_token = static_cast<u64>(which) * CHUNK_TOKENS + part * TOKENS;
    const u8 *rows = reinterpret_cast<const u8 *>(reinterpret_cast<const u64 *>(job.pages)[page]) + first_token * ROW_BYTES;
    for (u32 unit = threadIdx.x; unit < TOKENS * (KEY_BYTES / 16); unit += THREADS) {
        u32 token = unit / (KEY_BYTES / 16), at = unit % (KEY_BYTES / 16) * 16;
        *reinterpret_cast<uint4 *>(keys + token * KEY_STRIDE + at) = load_16_once(rows + token * ROW_BYTES + at);
    }
    __syncthreads();
    u32 *labels = reinterpret_cast<u32 *>(reinterpret_cast<const u64 *>(job.labels)[page] + first_token * LABEL_BYTES);
    for (u32 word = threadIdx.x; word < TOKENS / BLOCK_TOKENS * WORDS; word += THREADS) {
        labels[word] = label_word(lane, keys + word / WORDS * BLOCK_TOKENS * KEY_STRIDE, word % WORDS);
    }
}
