// The job of a decode step's kernels and what it points to. The same structures are in jobs.rs.
#pragma once

#include "common.cuh"

typedef signed char s8;

// Place of a row that is not hot, and owner of a hot place without a row.
constexpr u32 COLD = 0xFFFFu;
constexpr u32 NOBODY = 0xFFFFFFFFu;
// A histogram of keys counts their upper 11 bits; the lower 5 are refined.
constexpr u32 BINS = 2048;
constexpr u32 REFINED = 32;
// Sums of sampled scores that a head has at most, each of the warps of one block.
constexpr u32 SAMPLE_SUMS = 64;
// Blocks that share a lane while rows are selected, each with a contiguous part of the rows: a power of two, between these.
constexpr u32 PARTS = 32;
constexpr u32 LEAST_PARTS = 4;
// What a part of a lane's rows publishes (parts.cuh). An odd number of words, so that parts lie in shared-memory banks of their own.
constexpr u32 PART_WORDS = 85;
// Hot places are given to lanes in blocks of so many.
constexpr u32 POOL_BLOCK = 64;

// What a step needs to know of the sequence in a batch slot. In device memory, changed between launches only.
struct SequenceState {
    u64 slots;        // u32[chunk]: host place of a chunk's rows: segment << 16 | index
    u64 label_slots;  // u64[chunk]: address of its labels in the first layer, [lane][256 x LABEL_BYTES]
    u32 length;       // end of the attended rows: the query's position + 1; 0: nobody is in this batch slot
    u32 chunks;       // chunks before the horizon
    u32 count;        // rows to select a lane; chunks * 256 for all of them
    u32 sinks;        // first rows that are always selected
    u32 append_to;    // host place of the chunk that the newest row is written to: segment << 16 | index; NOBODY: none
    u32 block_rows;   // rows of an attention block: a multiple of 64
    u32 skipped;      // rows from the horizon on that are not attended: of a window, which begins within a chunk
    u32 common;       // first chunks whose labels are those of every sequence that is scored jointly with this one
};

// Where one layer of the sequence in a batch slot lies on the device. In device memory.
struct LayerPlace {
    u64 labels;  // bytes from a chunk's labels in the first layer to those in this one
    u64 tail;    // [chunk % tail_chunks][lane][256][ROW_BYTES]: rows from the horizon on
    u64 hot;     // [stored row][ROW_BYTES]: hot rows of all layers; without a map [lane][max_rows][ROW_BYTES] of this one
    u64 map;     // u16[lane][max_rows]: hot place of a row, or COLD; or none
    u64 owner;   // u32[stored row]: row of the lane that has the place, or NOBODY
    u64 blocks;  // u32[lane][max_blocks]: block of stored rows that a lane's places 64 i and on are
    u64 pools;   // u32[lane]: hot places, a multiple of POOL_BLOCK and less than COLD
    u32 tail_chunks;
    u32 max_rows;    // of the map
    u32 max_blocks;  // of a lane's places
    u32 unused;
};

// Where a lane's hot place is stored. `blocks` are the lane's.
__device__ __forceinline__ u32 stored_at(const u32* blocks, u32 place) {
    return blocks[place / POOL_BLOCK] * POOL_BLOCK + place % POOL_BLOCK;
}

// What a part of a lane's rows contributes to the lane's list.
struct PartCounts {
    u32 first;   // its first index in the list
    u32 missed;  // rows that are not hot, listed from `first` on in `misses`
};

// A selected row that is not hot.
struct Miss {
    u64 from;   // device address of its bytes in host memory
    u32 row;
    u32 index;  // in the lane's list
};

// A hot place to be taken, and the row that it holds, or NOBODY.
struct __align__(16) Victim {
    u32 place, row;
    u32 at;  // where the place is stored
    u32 unused;
};

// What a lane's victims are counted with.
struct VictimCounts {
    u32 free;  // free places
    u32 last;  // rows of the threshold's own bin
};

// Blocks of a lane that came somewhere. Counts go on from launch to launch.
struct Arrivals {
    u32 select;  // in select.cu: PARTS a launch, whatever its blocks
    u32 attend;  // to the end of attention, modulo the lane's blocks
};

// One layer of one step for all batch slots.
struct StepJob {
    u64 sequences;     // SequenceState[slot]
    u64 places;        // LayerPlace[slot], of this layer
    u64 planes;        // u64[segment]: device address of the first lane in this layer's plane of a host segment
    u64 new_rows;      // [slot][lane][ROW_BYTES]: the newest row of each sequence
    u64 page_bytes;    // bytes of a page of rows on the device: lanes x 256 x ROW_BYTES
    u64 host_page_bytes; // from one page to the next on the host, where a page has other workers' lanes as well
    u64 scales;        // RowScale[lane], of e4m3
    u64 channels;      // u16[lane][CHANNELS]
    u64 steps;         // f32[lane][CHANNELS]
    u64 query;         // f32[slot][query head][HEAD_DIM]
    u64 output;        // f32[slot][query head][HEAD_DIM]
    u64 lse;           // f32[slot][query head], natural
    u64 label_lse;     // f32[slot][query head][SAMPLE_SUMS]: log-sum-exps (log2) of sampled label scores
    u64 keys;          // u16[slot][lane][max_rows]
    u64 histogram;     // u32[slot][lane][BINS]: keys by their upper bits
    u64 part_words;    // u64[slot][lane][PARTS][PART_WORDS]: what parts publish, and its launch
    u64 positions;     // u32[slot][lane][max_count]: selected rows, ascending
    u64 hot_places;    // u32[slot][lane][max_count]: stored rows that they are
    u64 misses;        // Miss[slot][lane][max_count], by part
    u64 part_counts;   // PartCounts[slot][lane][PARTS]
    u64 victims;       // Victim[slot][lane][max_count]
    u64 victim_counts; // VictimCounts[slot][lane]
    u64 partials;      // f32[slot][lane][max_blocks][PARTIAL]
    u64 arrivals;      // Arrivals[slot][lane]
    u64 counters;      // u64[slot][lane][2]: hits and misses since they were reset
    u64 trace;         // u16[slot][lane][trace_rows]: keys to be selected by instead of the computed ones, row r's for rows r x run and on; or 0
    u32 lanes;
    u32 first_lane;    // of the launch
    u32 lane_count;    // and how many lanes it is for
    u32 max_rows;      // multiple of 256
    u32 max_count;
    u32 max_blocks;    // attention blocks a lane
    u32 trace_rows;
    float score_scale; // softmax scale x log2 e
    u32 parts;         // of a lane's rows: blocks that share a lane in the launch of select
    u32 items;         // rows that a warp of the gather takes at a time: a multiple of 4, 32 at most
    u32 appends;       // whether attention reads the newest row from new_rows and appends it
    u32 unused;
};

static_assert(sizeof(SequenceState) == SEQUENCE_STATE_BYTES, "as in jobs.rs");
static_assert(sizeof(LayerPlace) == LAYER_PLACE_BYTES, "as in jobs.rs");
static_assert(sizeof(PartCounts) == PART_COUNTS_BYTES, "as in jobs.rs");
static_assert(sizeof(Miss) == MISS_BYTES, "as in jobs.rs");
static_assert(sizeof(Victim) == VICTIM_BYTES, "as in jobs.rs");
static_assert(sizeof(Arrivals) == ARRIVALS_BYTES, "as in jobs.rs");
static_assert(sizeof(VictimCounts) == VICTIM_COUNTS_BYTES, "as in jobs.rs");
static_assert(sizeof(StepJob) == STEP_JOB_BYTES, "as in jobs.rs");
