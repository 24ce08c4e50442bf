//! The job of a decode step's kernels and what it points to: the structures of types.cuh.

use bytemuck::{Pod, Zeroable};

/// Place of a row that is not hot. A lane has fewer hot places than this.
pub const COLD: u16 = u16::MAX;
/// Owner of a hot place without a row; host place of a row that is written nowhere.
pub const NOBODY: u32 = u32::MAX;
/// Bins that keys are counted in, by their upper 11 bits.
pub const BINS: usize = 2048;
/// Values of the lower 5 bits.
pub const REFINED: usize = 32;
/// Blocks that share a lane while rows are selected: a power of two, this many at most.
pub const PARTS: usize = 32;
/// And at least.
pub const LEAST_PARTS: usize = 4;
/// Words that each of them publishes.
pub const PART_WORDS: usize = 85;
/// Hot places are given to lanes in blocks of so many.
pub const POOL_BLOCK: usize = 64;
/// Sums of sampled scores that a head has at most.
pub const SAMPLE_SUMS: usize = 64;

/// What a step needs to know of the sequence in a batch slot.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, Pod, Zeroable, PartialEq, Eq)]
pub struct SequenceState {
    /// Address of u32 by chunk: host place of its rows, `segment << 16 | index`.
    pub slots: u64,
    /// Address of u64 by chunk: address of its labels in the first layer, `[lane][256 x label_bytes]`.
    pub label_slots: u64,
    /// End of the attended rows: the query's position + 1. Zero: nobody is in this batch slot.
    pub length: u32,
    /// Chunks before the horizon.
    pub chunks: u32,
    /// Rows to select a lane; `chunks * 256` for all of them.
    pub count: u32,
    /// First rows that are always selected.
    pub sinks: u32,
    /// Host place of the chunk that the newest row is written to, or [`NOBODY`].
    pub append_to: u32,
    /// Rows of an attention block: a multiple of 64. Results depend on it, so it is a function of the length and the settings.
    pub block_rows: u32,
    /// Rows from the horizon on that are not attended: of a window, which begins within a chunk.
    pub skipped: u32,
    /// First chunks whose labels are those of every sequence that is scored jointly with this one.
    pub common: u32,
}

/// Where one layer of the sequence in a batch slot lies on the device.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, Pod, Zeroable)]
pub struct LayerPlace {
    /// Bytes from a chunk's labels in the first layer to those in this one.
    pub labels: u64,
    /// `[chunk % tail_chunks][lane][256][row_bytes]`: rows from the horizon on.
    pub tail: u64,
    /// `[stored row][row_bytes]` of all layers; without a map `[lane][max_rows][row_bytes]` of this one.
    pub hot: u64,
    /// u16 `[lane][max_rows]` with this seat's `max_rows`: hot place of a row, or [`COLD`]. Zero: row p lies at hot place p.
    pub map: u64,
    /// u32 by stored row: row of the lane that has the place, or [`NOBODY`].
    pub owner: u64,
    /// u32 `[lane][max_blocks]`: block of stored rows that a lane's places `64 i` and on are.
    pub blocks: u64,
    /// u32 by lane: hot places, a multiple of [`POOL_BLOCK`] and less than [`COLD`].
    pub pools: u64,
    /// Pages of the tail.
    pub tail_chunks: u32,
    /// Rows a lane of the map has room for.
    pub max_rows: u32,
    /// Blocks of a lane's places at most.
    pub max_blocks: u32,
    /// Zero.
    pub unused: u32,
}

/// What a part of a lane's rows contributes to the lane's list.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, Pod, Zeroable)]
pub struct PartCounts {
    /// Its first index in the list.
    pub first: u32,
    /// Rows that are not hot.
    pub missed: u32,
}

/// A selected row that is not hot.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, Pod, Zeroable)]
pub struct Miss {
    /// Device address of its bytes in host memory.
    pub from: u64,
    /// Position.
    pub row: u32,
    /// Index in the lane's list.
    pub index: u32,
}

/// A hot place to be taken.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, Pod, Zeroable)]
pub struct Victim {
    /// Place.
    pub place: u32,
    /// The row that it holds, or [`NOBODY`].
    pub row: u32,
    /// Where the place is stored.
    pub at: u32,
    /// Zero.
    pub unused: u32,
}

/// What a lane's victims are counted with.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, Pod, Zeroable)]
pub struct VictimCounts {
    /// Free places.
    pub free: u32,
    /// Rows of the threshold's own bin.
    pub last: u32,
}

/// Blocks of a lane that came somewhere; begins with zeros and is the kernels' own from then on.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, Pod, Zeroable)]
pub struct Arrivals {
    /// In the selection: [`PARTS`] a launch, whatever its blocks.
    pub select: u32,
    /// To the end of attention.
    pub attend: u32,
}

/// Sequences whose labels one launch scores jointly at most (joint.cu).
pub const MOST_MEMBERS: usize = 4;

/// The score of one layer for several sequences that have their first chunks in common.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, Pod, Zeroable)]
pub struct JointJob {
    /// By member; those beyond the last are the first.
    pub jobs: [StepJob; MOST_MEMBERS],
    /// Members.
    pub members: u32,
    /// Zero.
    pub unused: u32,
}

/// One layer of one step for all batch slots. Addresses, and what lies there by batch slot: see types.cuh.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, Pod, Zeroable)]
pub struct StepJob {
    /// [`SequenceState`] by batch slot.
    pub sequences: u64,
    /// [`LayerPlace`] by batch slot.
    pub places: u64,
    /// u64 by segment: device address of the first lane in this layer's plane.
    pub planes: u64,
    /// `[slot][lane][row_bytes]`: newest rows.
    pub new_rows: u64,
    /// Bytes of a page of rows on the device.
    pub page_bytes: u64,
    /// Bytes from one page to the next on the host, where a page has other workers' lanes as well.
    pub host_page_bytes: u64,
    /// [`crate::scales::RowScale`] by lane.
    pub scales: u64,
    /// u16 `[lane][channels]`.
    pub channels: u64,
    /// f32 `[lane][channels]`.
    pub steps: u64,
    /// f32 `[slot][query head][head_dim]`.
    pub query: u64,
    /// f32 `[slot][query head][head_dim]`.
    pub output: u64,
    /// f32 `[slot][query head]`.
    pub lse: u64,
    /// f32 `[slot][query head][SAMPLE_SUMS]`: log-sum-exps.
    pub label_lse: u64,
    /// u16 `[slot][lane][max_rows]`.
    pub keys: u64,
    /// u32 `[slot][lane][BINS]`.
    pub histogram: u64,
    /// u64 `[slot][lane][PARTS][PART_WORDS]`: what parts publish, and its launch.
    pub part_words: u64,
    /// u32 `[slot][lane][max_count]`.
    pub positions: u64,
    /// u32 `[slot][lane][max_count]`.
    pub hot_places: u64,
    /// [`Miss`] `[slot][lane][max_count]`.
    pub misses: u64,
    /// [`PartCounts`] `[slot][lane][PARTS]`.
    pub part_counts: u64,
    /// [`Victim`] `[slot][lane][max_count]`.
    pub victims: u64,
    /// [`VictimCounts`] `[slot][lane]`.
    pub victim_counts: u64,
    /// f32 `[slot][lane][max_blocks][group x (head_dim + 2)]`.
    pub partials: u64,
    /// [`Arrivals`] `[slot][lane]`.
    pub arrivals: u64,
    /// u64 `[slot][lane][2]`: hits and misses.
    pub counters: u64,
    /// u16 `[slot][lane][trace_rows]`, or zero.
    pub trace: u64,
    /// Lanes.
    pub lanes: u32,
    /// First lane that a launch is for.
    pub first_lane: u32,
    /// Lanes that a launch is for.
    pub lane_count: u32,
    /// Rows a lane has room for: a multiple of 256.
    pub max_rows: u32,
    /// Selected rows a lane has room for.
    pub max_count: u32,
    /// Attention blocks a lane has room for.
    pub max_blocks: u32,
    /// Rows of the trace.
    pub trace_rows: u32,
    /// Softmax scale times log2 e.
    pub score_scale: f32,
    /// Parts of a lane's rows: blocks that share a lane in the launch of select.
    pub parts: u32,
    /// Rows that a warp of the gather takes at a time: a multiple of 4, 32 at most.
    pub items: u32,
    /// 1: attention takes the newest rows from `new_rows` and appends them; 0: they are appended before.
    pub appends: u32,
    /// Of the alignment.
    pub unused: u32,
}
