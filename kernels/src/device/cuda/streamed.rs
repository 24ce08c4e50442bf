//! Exact attention of many queries over rows in host memory: pieces are copied into two halves of a device buffer in turn, and each is
//! attended while the next is copied.

use std::sync::Arc;

use cudarc::driver::{CudaEvent, CudaStream};

use super::buffer::DeviceBuffer;
use super::error::{CudaError, Doing};
use super::many::{Many, Piece, Queries, SEGMENT_KEYS};
use super::module::Modules;
use crate::device::LayerGeometry;
use crate::scales::LaneScales;
use crate::slot::CHUNK_TOKENS;

/// Bytes of a half, at most. Small against what a layer reads, so that little time passes before the first piece can be attended; large
/// against what a copy costs to start.
pub const PIECE_BYTES: usize = 16 << 20;

/// Chunks of a segment: pieces are multiples of it, so that their cut changes no bit.
const SEGMENT_CHUNKS: usize = SEGMENT_KEYS / CHUNK_TOKENS;

/// Chunks and lanes of a piece.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Cut {
    chunks: usize,
    lanes: usize,
}

impl Cut {
    /// All lanes of as many chunks as fit, or else as many lanes of one segment as fit.
    fn new(geometry: &LayerGeometry, piece_bytes: usize) -> Self {
        let lane_bytes = CHUNK_TOKENS * geometry.row_bytes();
        let lanes = (piece_bytes / (SEGMENT_CHUNKS * lane_bytes)).clamp(1, geometry.heads.lanes());
        let segments = (piece_bytes / (SEGMENT_CHUNKS * lane_bytes * lanes)).max(1);
        Self { chunks: segments * SEGMENT_CHUNKS, lanes }
    }
}

/// One of the two places of a piece.
struct Half {
    rows: DeviceBuffer<u8>,
    /// For every first lane that a piece can have, the addresses of its pages, as if they had all lanes.
    tables: DeviceBuffer<u64>,
    copied: CudaEvent,
    attended: CudaEvent,
}

impl Half {
    fn new(stream: &Arc<CudaStream>, geometry: &LayerGeometry, cut: Cut) -> Result<Self, CudaError> {
        let context = stream.context();
        let lane_bytes = CHUNK_TOKENS * geometry.row_bytes();
        let rows = DeviceBuffer::uninitialised(context, cut.chunks * cut.lanes * lane_bytes)?;
        let first_lanes = (0..geometry.heads.lanes()).step_by(cut.lanes);
        let first = rows.address();
        let page = move |chunk: usize| first + (chunk * cut.lanes * lane_bytes) as u64;
        // The pages of a piece lack the lanes before its first; kernels add them to the address again.
        let from = |lane: usize| (0..cut.chunks).map(move |chunk| page(chunk).wrapping_sub((lane * lane_bytes) as u64));
        let table: Vec<u64> = first_lanes.flat_map(from).collect();
        Ok(Self {
            tables: DeviceBuffer::from_slice(stream, &table)?,
            rows,
            copied: context.new_event(None).doing("making an event")?,
            attended: context.new_event(None).doing("making an event")?,
        })
    }
}

/// Attention of many queries of one shape of layer over host pages.
pub struct Streamed {
    many: Many,
    cut: Cut,
    halves: [Half; 2],
    next: usize,
    copies: Arc<CudaStream>,
}

impl Streamed {
    /// Compiles the kernels and allocates both halves, of `piece_bytes` each (or one segment of one lane where that is more).
    ///
    /// # Errors
    /// What the compiler or the driver says.
    pub fn new(modules: &mut Modules, stream: &Arc<CudaStream>, geometry: &LayerGeometry, piece_bytes: usize) -> Result<Self, CudaError> {
        let cut = Cut::new(geometry, piece_bytes);
        Ok(Self {
            many: Many::new(modules, geometry)?,
            halves: [Half::new(stream, geometry, cut)?, Half::new(stream, geometry, cut)?],
            next: 0,
            copies: stream.context().new_stream().doing("making a stream")?,
            cut,
        })
    }

    /// Device memory of both halves.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.halves.iter().map(|half| half.rows.bytes() + half.tables.bytes()).sum()
    }

    /// Enqueues on `stream` the attention of `queries` over host `pages`, of a layer of these scales, by chunk from chunk 0; those without a key of any query may be
    /// empty. Results go to device addresses: `[query][query_head][head_dim]` and `[query][query_head]`, f32. Pages in pinned or registered
    /// memory are copied beside the attention and this returns at once; others are copied by the calling thread.
    ///
    /// # Safety
    /// Queries, pages and results stay valid, and the results are used by nobody else, until the stream has passed this point.
    ///
    /// # Errors
    /// Memory that the device does not have, or a call that the driver refuses.
    pub unsafe fn attend(
        &mut self,
        stream: &Arc<CudaStream>,
        queries: Queries,
        scales: &LaneScales,
        pages: &[&[u8]],
        output: u64,
        lse: u64,
    ) -> Result<(), CudaError> {
        let keys = queries.keys();
        let (lanes, lane_bytes) = (self.many.geometry().heads.lanes(), CHUNK_TOKENS * self.many.geometry().row_bytes());
        let needed = keys.start / CHUNK_TOKENS..keys.end.div_ceil(CHUNK_TOKENS);
        assert!(pages.len() >= needed.end, "pages of {} chunks, {} needed", pages.len(), needed.end);
        self.many.begin(stream, queries, scales)?;
        let first = needed.start / SEGMENT_CHUNKS * SEGMENT_CHUNKS;
        for chunk in (first..needed.end).step_by(self.cut.chunks) {
            let chunks = chunk.max(needed.start)..(chunk + self.cut.chunks).min(needed.end);
            for (table, lane) in (0..lanes).step_by(self.cut.lanes).enumerate() {
                let lanes = lane..(lane + self.cut.lanes).min(lanes);
                let half = &mut self.halves[self.next];
                self.next = 1 - self.next;
                self.copies.wait(&half.attended).doing("waiting for a piece to be attended")?;
                for chunk_of_piece in chunks.clone() {
                    let page = pages[chunk_of_piece];
                    assert_eq!(page.len(), self.many.geometry().page_bytes(), "bytes of the page of chunk {chunk_of_piece}");
                    let part = &page[lanes.start * lane_bytes..lanes.end * lane_bytes];
                    // SAFETY: the caller keeps the pages.
                    unsafe { half.rows.write_async(&self.copies, (chunk_of_piece - chunk) * self.cut.lanes * lane_bytes, part) }?;
                }
                half.copied.record(&self.copies).doing("marking a piece as copied")?;
                stream.wait(&half.copied).doing("waiting for a piece to be copied")?;
                let pages = half.tables.address_of(table * self.cut.chunks);
                let piece = Piece { pages, keys: chunk * CHUNK_TOKENS..chunks.end * CHUNK_TOKENS, lanes };
                // SAFETY: the half holds the rows of every chunk that a query attends, and is written again only after this attention; the
                // queries are the caller's promise.
                unsafe { self.many.attend(stream, &piece) }?;
                half.attended.record(stream).doing("marking a piece as attended")?;
            }
        }
        // SAFETY: the results are the caller's promise.
        unsafe { self.many.finish(stream, output, lse) }
    }
}
