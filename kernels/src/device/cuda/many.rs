//! Exact attention of many queries over pages, resident or streamed from host memory.

use std::ops::Range;
use std::sync::Arc;

use bytemuck::{Pod, Zeroable};
use cudarc::driver::CudaStream;

use super::buffer::DeviceBuffer;
use super::compile::Target;
use super::error::CudaError;
use super::module::{Grid, Kernel, Modules, Source, Specialisation};
use super::open::Gpu;
use crate::device::LayerGeometry;
use crate::scales::{LaneScales, RowScale};
use crate::shape::RowType;
use crate::slot::CHUNK_TOKENS;

/// Keys of a segment: folded into the state as one, so that pieces which begin at its multiples give the same bits as the whole.
pub const SEGMENT_KEYS: usize = 2048;

/// Partial results of segments take at most this much device memory; where they would take more, blocks walk the segments in turn.
const PARTIAL_BYTES: usize = 256 << 20;

/// Tiles of keys in shared memory at a time. With three, or with 128 rows a block, nothing was faster (docs/decisions/0004).
const STAGES: usize = 2;

/// The first job of many.cu.
#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
pub(super) struct ManyLaunch {
    queries: u64,
    pages: u64,
    maxima: u64,
    sums: u64,
    outputs: u64,
    scales: u64,
    query_count: u32,
    first_position: u32,
    window: u32,
    key_from: u32,
    key_to: u32,
    first_chunk: u32,
    query_heads: u32,
    first_lane: u32,
    lane_count: u32,
    first_segment: u32,
    split: u32,
    scale: f32,
}

/// The second job of many.cu.
#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
pub(super) struct MergeLaunch {
    maxima: u64,
    sums: u64,
    outputs: u64,
    part_maxima: u64,
    part_sums: u64,
    part_outputs: u64,
    output: u64,
    lse: u64,
    scales: u64,
    query_count: u32,
    query_heads: u32,
    first_lane: u32,
    lane_count: u32,
    parts: u32,
    finish: u32,
}

/// Sizes of the tiles of many.cu.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Tiles {
    /// Query heads of query tokens in a block.
    rows: usize,
    /// Keys of a tile.
    keys: usize,
    /// Threads of a block.
    threads: usize,
    /// Tiles of keys in shared memory at a time.
    stages: usize,
    /// Dynamic shared memory.
    shared_bytes: usize,
}

impl Tiles {
    /// The largest that fit the shared memory of a block of `target`.
    pub(super) fn new(head_dim: usize, row_type: RowType, target: Target) -> Self {
        // Sixteen query heads, eight threads each; rows are padded by 16 bytes.
        let plain = |rows, keys| {
            let floats = rows * (head_dim + 4) + keys * (2 * head_dim + 4) + rows * keys;
            Self { rows, keys, threads: 128, stages: 1, shared_bytes: 4 * floats }
        };
        // Sixteen query heads a warp, each in two or three parts of multiples of 128 bytes.
        let matrices = |rows, keys| {
            let parts = if row_type == RowType::Bf16 { 3 } else { 2 };
            let row_stride = (2 * head_dim * row_type.element_bytes()).next_multiple_of(128);
            let queries = parts * rows * (2 * head_dim).next_multiple_of(128);
            Self { rows, keys, threads: 2 * rows, stages: STAGES, shared_bytes: queries + STAGES * keys * row_stride }
        };
        let most = match target.capability {
            (8, 0 | 7) => 162 << 10,
            (9 | 10, _) => 226 << 10,
            _ => 98 << 10,
        };
        let fits = |tiles: &Self| tiles.shared_bytes <= most;
        let found = match row_type {
            RowType::F32 => [plain(16, 32), plain(16, 16)].into_iter().find(fits),
            // With more than 32 keys of 256 channels a thread's registers do not suffice.
            RowType::F16 | RowType::Bf16 | RowType::Fp8 => {
                let sizes = [(64, 64), (64, 32), (64, 16), (32, 16)].into_iter().filter(|(_, keys)| keys * head_dim <= 8192);
                sizes.map(|(rows, keys)| matrices(rows, keys)).find(fits)
            }
        };
        found.expect("the smallest tiles of 256 channels take 80 KiB")
    }

    /// Options of the compiler.
    pub(super) fn options(self) -> [String; 5] {
        [
            format!("-DMANY_ROWS={}", self.rows),
            format!("-DMANY_KEYS={}", self.keys),
            format!("-DMANY_THREADS={}", self.threads),
            format!("-DMANY_STAGES={}", self.stages),
            format!("-DMANY_SEGMENT={SEGMENT_KEYS}"),
        ]
    }
}

/// What `Many` is between two pieces, per (query, query head): largest score (in units of log2), sum of weights, sum of weighted values.
#[derive(Debug)]
struct Carry {
    maxima: DeviceBuffer<f32>,
    sums: DeviceBuffer<f32>,
    outputs: DeviceBuffer<f32>,
}

impl Carry {
    fn new(gpu: &Gpu) -> Result<Self, CudaError> {
        let empty = || DeviceBuffer::uninitialised(&gpu.context, 0);
        Ok(Self { maxima: empty()?, sums: empty()?, outputs: empty()? })
    }

    fn fit(&mut self, heads: usize, head_dim: usize) -> Result<(), CudaError> {
        self.maxima.fit(heads)?;
        self.sums.fit(heads)?;
        self.outputs.fit(heads * head_dim)
    }
}

/// Query tokens of one attention.
#[derive(Clone, Copy, Debug)]
pub struct Queries {
    /// Device address of `[query][query_head][head_dim]` f32.
    pub address: u64,
    /// Query tokens.
    pub count: usize,
    /// Position of the first.
    pub first_position: usize,
    /// Sliding window in tokens, the query's own included.
    pub window: Option<usize>,
}

impl Queries {
    /// Keys that any query attends.
    #[must_use]
    pub fn keys(&self) -> Range<usize> {
        let from = self.window.map_or(0, |window| (self.first_position + 1).saturating_sub(window));
        from..self.first_position + self.count
    }
}

/// Keys that the queries attend next.
#[derive(Clone, Debug)]
pub struct Piece {
    /// Device address of a table of page addresses, from the chunk of the first key on. A page is `lanes x 256 x row_bytes`, of which the
    /// parts of other lanes than `lanes` are not read.
    pub pages: u64,
    /// Positions. For results that do not depend on the cut, pieces begin and end at multiples of [`SEGMENT_KEYS`] (or at the very ends).
    pub keys: Range<usize>,
    /// Lanes.
    pub lanes: Range<usize>,
}

/// Attention of many queries over pieces of keys, in order of position: [`Self::begin`], [`Self::attend`] for each piece, [`Self::finish`].
///
/// The result of a query is a function of the query and its keys: pieces, splits and neighbouring queries do not change a bit of it.
#[derive(Debug)]
pub struct Many {
    geometry: LayerGeometry,
    tiles: Tiles,
    attend: Kernel,
    merge: Kernel,
    /// Blocks that run at once; none where segments are never attended side by side.
    resident_blocks: usize,
    state: Carry,
    partial: Carry,
    queries: Option<Queries>,
    /// Written by [`Many::begin`], where rows are scaled.
    scales: DeviceBuffer<RowScale>,
}

impl Many {
    /// Compiles the kernels for layers of this geometry, whatever their scales.
    ///
    /// # Errors
    /// What the compiler or the driver says.
    pub fn new(modules: &mut Modules, geometry: &LayerGeometry) -> Result<Self, CudaError> {
        let module = modules.get(Source::Many, &Specialisation::rows(geometry))?;
        let gpu = modules.gpu();
        let tiles = Tiles::new(geometry.head_dim, geometry.row_type, Target { capability: gpu.capability });
        let attend = module.kernel("attend_many", tiles.shared_bytes)?;
        Ok(Self {
            geometry: geometry.unscaled(),
            tiles,
            resident_blocks: attend.resident_blocks(tiles.threads)? * gpu.processors as usize,
            attend,
            merge: module.kernel("merge_segments", 0)?,
            state: Carry::new(gpu)?,
            partial: Carry::new(gpu)?,
            queries: None,
            scales: DeviceBuffer::uninitialised(&gpu.context, geometry.heads.lanes())?,
        })
    }

    /// The shape of the rows, without scales.
    #[must_use]
    pub fn geometry(&self) -> &LayerGeometry {
        &self.geometry
    }

    /// From now on blocks walk the segments of a piece in turn however few they are.
    pub fn never_split(&mut self) {
        self.resident_blocks = 0;
    }

    /// Begins the attention of `queries`, which have seen no key yet, over rows of a layer of these scales.
    ///
    /// # Errors
    /// Memory that the device does not have.
    pub fn begin(&mut self, stream: &Arc<CudaStream>, queries: Queries, scales: &LaneScales) -> Result<(), CudaError> {
        if self.geometry.row_type == RowType::Fp8 {
            let lanes: Vec<RowScale> = (0..self.geometry.heads.lanes()).map(|lane| scales.of(lane)).collect();
            self.scales.write(stream, 0, &lanes)?;
        }
        let heads = queries.count * self.geometry.heads.query_heads();
        self.state.fit(heads, self.geometry.head_dim)?;
        self.state.maxima.set(stream, 0..heads, f32::NEG_INFINITY)?;
        self.queries = Some(queries);
        Ok(())
    }

    /// Enqueues the attention over a piece. With few queries the segments of the piece are attended side by side.
    ///
    /// # Safety
    /// The queries, the table and the pages stay valid until the stream has passed this point; pages hold the rows of every key that a
    /// query attends.
    ///
    /// # Errors
    /// Memory that the device does not have, or a launch that the driver refuses.
    pub unsafe fn attend(&mut self, stream: &Arc<CudaStream>, piece: &Piece) -> Result<(), CudaError> {
        let queries = self.queries.expect("an attention was begun");
        let (heads, group) = (self.geometry.heads, self.geometry.heads.group());
        let seen = queries.keys();
        let keys = piece.keys.start.max(seen.start)..piece.keys.end.min(seen.end);
        assert!(piece.lanes.end <= heads.lanes() && piece.keys.end <= 1 << 31, "lanes of the layer, positions of 31 bits");
        if keys.is_empty() || piece.lanes.is_empty() || queries.count == 0 {
            return Ok(());
        }
        let segments = keys.start / SEGMENT_KEYS..keys.end.div_ceil(SEGMENT_KEYS);
        let blocks = (queries.count * group).div_ceil(self.tiles.rows) * piece.lanes.len();
        // Segments side by side, as many as partial results have room for, or else all of them in turn.
        let at_once = (PARTIAL_BYTES / (queries.count * heads.query_heads() * self.geometry.head_dim * 4)).clamp(1, segments.len());
        let split = self.waves_saved(blocks, at_once);
        for first in segments.clone().step_by(if split { at_once } else { segments.len() }) {
            let end = if split { (first + at_once).min(segments.end) } else { segments.end };
            let keys = keys.start.max(first * SEGMENT_KEYS)..keys.end.min(end * SEGMENT_KEYS);
            // SAFETY: the caller's promise.
            unsafe { self.attend_segments(stream, piece, &Segments { keys, range: first..end, blocks, split }) }?;
        }
        Ok(())
    }

    unsafe fn attend_segments(&mut self, stream: &Arc<CudaStream>, piece: &Piece, of: &Segments) -> Result<(), CudaError> {
        let (queries, heads) = (self.queries.expect("an attention was begun"), self.geometry.heads);
        let carry = if of.split {
            self.partial.fit(of.range.len() * queries.count * heads.query_heads(), self.geometry.head_dim)?;
            &self.partial
        } else {
            &self.state
        };
        let job = ManyLaunch {
            queries: queries.address,
            pages: piece.pages,
            maxima: carry.maxima.address(),
            sums: carry.sums.address(),
            outputs: carry.outputs.address(),
            scales: self.scales.address(),
            query_count: queries.count as u32,
            first_position: queries.first_position as u32,
            window: queries.window.unwrap_or(0) as u32,
            key_from: of.keys.start as u32,
            key_to: of.keys.end as u32,
            first_chunk: (piece.keys.start / CHUNK_TOKENS) as u32,
            query_heads: heads.query_heads() as u32,
            first_lane: piece.lanes.start as u32,
            lane_count: piece.lanes.len() as u32,
            first_segment: of.range.start as u32,
            split: u32::from(of.split),
            scale: self.geometry.softmax_scale * std::f32::consts::LOG2_E,
        };
        let grid = Grid { blocks: [of.blocks, if of.split { of.range.len() } else { 1 }, 1], threads: self.tiles.threads };
        // SAFETY: the state and the partial results are this value's and large enough, the rest is the caller's promise.
        unsafe { self.attend.launch(stream, grid, &job) }?;
        if of.split {
            self.merge(stream, piece.lanes.clone(), Merge { parts: of.range.len(), output: 0, lse: 0 })?;
        }
        Ok(())
    }

    /// Whether `blocks` blocks a segment end sooner side by side than if each walks all segments.
    fn waves_saved(&self, blocks: usize, segments: usize) -> bool {
        let waves = |blocks: usize| blocks.div_ceil(self.resident_blocks.max(1));
        self.resident_blocks > 0 && waves(blocks * segments) < waves(blocks) * segments
    }

    /// Enqueues the outputs: `[query][query_head][head_dim]` and natural log-sum-exps `[query][query_head]`, f32, at device addresses.
    ///
    /// # Safety
    /// Both results are valid until the stream has passed this point, and used by nobody else.
    ///
    /// # Errors
    /// A launch that the driver refuses.
    pub unsafe fn finish(&mut self, stream: &Arc<CudaStream>, output: u64, lse: u64) -> Result<(), CudaError> {
        self.merge(stream, 0..self.geometry.heads.lanes(), Merge { parts: 0, output, lse })
    }

    /// With an output the end, otherwise partial results into the state.
    fn merge(&self, stream: &Arc<CudaStream>, lanes: Range<usize>, merge: Merge) -> Result<(), CudaError> {
        let queries = self.queries.expect("an attention was begun");
        let job = MergeLaunch {
            maxima: self.state.maxima.address(),
            sums: self.state.sums.address(),
            outputs: self.state.outputs.address(),
            part_maxima: self.partial.maxima.address(),
            part_sums: self.partial.sums.address(),
            part_outputs: self.partial.outputs.address(),
            output: merge.output,
            lse: merge.lse,
            scales: self.scales.address(),
            query_count: queries.count as u32,
            query_heads: self.geometry.heads.query_heads() as u32,
            first_lane: lanes.start as u32,
            lane_count: lanes.len() as u32,
            parts: merge.parts as u32,
            finish: u32::from(merge.output != 0),
        };
        let blocks = queries.count * lanes.len() * self.geometry.heads.group();
        // SAFETY: state and partial results are this value's; the callers promise the results.
        unsafe { self.merge.launch(stream, Grid { blocks: [blocks, 1, 1], threads: self.geometry.head_dim }, &job) }
    }
}

/// Segments of a launch.
struct Segments {
    keys: Range<usize>,
    range: Range<usize>,
    /// Blocks a segment.
    blocks: usize,
    /// Whether they are attended side by side.
    split: bool,
}

/// What a merge reads and writes beyond the state.
struct Merge {
    parts: usize,
    output: u64,
    lse: u64,
}
