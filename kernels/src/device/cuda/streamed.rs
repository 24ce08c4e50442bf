//! Exact attention of many queries over rows in host memory: pieces are copied into a few places of device memory in turn, and each is
//! attended while the next ones are copied.

use std::ops::Range;
use std::sync::Arc;

use cudarc::driver::{CudaEvent, CudaStream};

use super::buffer::{DeviceBuffer, is_pinned};
use super::copies::{Copied, Copies, Copy};
use super::error::{CudaError, Doing};
use super::many::{Many, Piece, Queries, SEGMENT_KEYS};
use super::module::Modules;
use crate::device::LayerGeometry;
use crate::scales::LaneScales;
use crate::slot::CHUNK_TOKENS;

/// Bytes of a place, at most. Small against what a layer reads, so that little time passes before the first piece can be attended; large
/// against what a copy costs to start.
pub const PIECE_BYTES: usize = 16 << 20;

/// Places of pieces.
const PLACES: usize = 4;

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

/// What is copied and attended as one.
#[derive(Clone, Debug)]
struct PieceRange {
    /// The first chunk of the piece's place, which may lie before those that are needed.
    first: usize,
    chunks: Range<usize>,
    lanes: Range<usize>,
}

/// Where a piece is copied to.
struct Place {
    rows: DeviceBuffer<u8>,
    /// For every first lane that a piece can have, the addresses of its pages, as if they had all lanes.
    tables: DeviceBuffer<u64>,
    copied: Copied,
    attended: CudaEvent,
}

impl Place {
    fn new(stream: &Arc<CudaStream>, copies: &Copies, geometry: &LayerGeometry, cut: Cut) -> Result<Self, CudaError> {
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
            copied: copies.point()?,
            attended: context.new_event(None).doing("making an event")?,
        })
    }
}

/// Attention of many queries of one shape of layer over host pages.
pub struct Streamed {
    many: Many,
    cut: Cut,
    places: Vec<Place>,
    next: usize,
    copies: Copies,
}

impl Streamed {
    /// Compiles the kernels and allocates the places, of `piece_bytes` each (or one segment of one lane where that is more).
    ///
    /// # Errors
    /// What the compiler or the driver says.
    pub fn new(modules: &mut Modules, stream: &Arc<CudaStream>, geometry: &LayerGeometry, piece_bytes: usize) -> Result<Self, CudaError> {
        let cut = Cut::new(geometry, piece_bytes);
        let copies = Copies::new(stream.context())?;
        Ok(Self {
            many: Many::new(modules, geometry)?,
            places: (0..PLACES).map(|_| Place::new(stream, &copies, geometry, cut)).collect::<Result<_, _>>()?,
            next: 0,
            copies,
            cut,
        })
    }

    /// Device memory of all places.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.places.iter().map(|place| place.rows.bytes() + place.tables.bytes()).sum()
    }

    /// Begins to copy `pages`, by chunk from chunk 0, of which those of `keys` are needed and others may be empty. Pages in pinned or
    /// registered memory are copied while this returns at once; others are copied by the calling thread.
    ///
    /// # Safety
    /// The pages stay valid until the stream of [`Run::attend`] has passed it, or the run has been dropped.
    ///
    /// # Errors
    /// A call that the driver refuses.
    pub unsafe fn start<'a>(&'a mut self, keys: Range<usize>, pages: &'a [&'a [u8]]) -> Result<Run<'a>, CudaError> {
        let lanes = self.many.geometry().heads.lanes();
        let needed = keys.start / CHUNK_TOKENS..keys.end.div_ceil(CHUNK_TOKENS);
        assert!(pages.len() >= needed.end, "pages of {} chunks, {} needed", pages.len(), needed.end);
        let first = needed.start / SEGMENT_CHUNKS * SEGMENT_CHUNKS;
        let of_lanes = |first: usize, lane: usize| PieceRange {
            first,
            chunks: first.max(needed.start)..(first + self.cut.chunks).min(needed.end),
            lanes: lane..(lane + self.cut.lanes).min(lanes),
        };
        let firsts = (first..needed.end).step_by(self.cut.chunks);
        let pieces = firsts.flat_map(|first| (0..lanes).step_by(self.cut.lanes).map(move |lane| (first, lane)));
        let pieces = pieces.map(|(first, lane)| of_lanes(first, lane)).collect();
        let mut run = Run { streamed: self, pages, keys, pieces, copied: 0, attended: 0 };
        // One place is left, so that queries that come now need not wait for all of them to be filled.
        run.copy_to(run.streamed.places.len().saturating_sub(1).max(1))?;
        Ok(run)
    }
}

/// An attention whose first pieces are being copied.
pub struct Run<'a> {
    streamed: &'a mut Streamed,
    pages: &'a [&'a [u8]],
    keys: Range<usize>,
    pieces: Vec<PieceRange>,
    /// Pieces whose copies were enqueued.
    copied: usize,
    /// Pieces whose attention was enqueued.
    attended: usize,
}

impl Run<'_> {
    /// Enqueues on `stream` the attention of `queries`, which see no other keys than those started with, over rows of a layer of these
    /// scales. Results go to device addresses: `[query][query_head][head_dim]` and `[query][query_head]`, f32.
    ///
    /// # Safety
    /// Queries and results stay valid, and the results are used by nobody else, until the stream has passed this point.
    ///
    /// # Errors
    /// Memory that the device does not have, or a call that the driver refuses.
    pub unsafe fn attend(
        mut self,
        stream: &Arc<CudaStream>,
        queries: Queries,
        scales: &LaneScales,
        output: u64,
        lse: u64,
    ) -> Result<(), CudaError> {
        assert_eq!(queries.keys(), self.keys, "keys of the queries");
        self.streamed.many.begin(stream, queries, scales)?;
        let places = self.streamed.places.len();
        while self.attended < self.pieces.len() {
            self.copy_to(self.attended + places)?;
            let piece = &self.pieces[self.attended];
            let streamed = &mut *self.streamed;
            let place = &streamed.places[(streamed.next + self.attended) % places];
            place.copied.wait_on(stream)?;
            let piece = Piece {
                pages: place.tables.address_of(piece.lanes.start / streamed.cut.lanes * streamed.cut.chunks),
                keys: piece.first * CHUNK_TOKENS..piece.chunks.end * CHUNK_TOKENS,
                lanes: piece.lanes.clone(),
            };
            // SAFETY: the place holds the rows of every chunk that a query attends, and is written again only after this attention; the
            // queries are the caller's promise.
            unsafe { streamed.many.attend(stream, &piece) }?;
            place.attended.record(stream).doing("marking a piece as attended")?;
            self.attended += 1;
        }
        // SAFETY: the results are the caller's promise.
        unsafe { self.streamed.many.finish(stream, output, lse) }
    }

    /// Enqueues the copies of the pieces before `end`; each waits until its place has been attended.
    fn copy_to(&mut self, end: usize) -> Result<(), CudaError> {
        let lane_bytes = CHUNK_TOKENS * self.streamed.many.geometry().row_bytes();
        while self.copied < end.min(self.pieces.len()) {
            let piece = &self.pieces[self.copied];
            let streamed = &mut *self.streamed;
            let place = &streamed.places[(streamed.next + self.copied) % streamed.places.len()];
            streamed.copies.follow(&place.attended)?;
            let mut pinned = Vec::with_capacity(piece.chunks.len());
            for chunk in piece.chunks.clone() {
                let page = self.pages[chunk];
                assert_eq!(page.len(), streamed.many.geometry().page_bytes(), "bytes of the page of chunk {chunk}");
                let part = &page[piece.lanes.start * lane_bytes..piece.lanes.end * lane_bytes];
                let at = (chunk - piece.first) * streamed.cut.lanes * lane_bytes;
                if is_pinned(part.as_ptr()) {
                    pinned.push(Copy { to: place.rows.address_of(at), from: part.as_ptr() as u64, bytes: part.len() });
                } else {
                    // SAFETY: the pages live until the run has ended, by the promise of its start; so here and below.
                    unsafe { place.rows.write_async(streamed.copies.next(), at, part) }?;
                }
            }
            // SAFETY: the parts lie in the place, which nobody uses before the copies are marked.
            unsafe { streamed.copies.enqueue(&pinned) }?;
            streamed.copies.mark(&place.copied)?;
            self.copied += 1;
        }
        Ok(())
    }
}

impl Drop for Run<'_> {
    /// Copies that nothing waits for are waited for here, so that their pages can go.
    fn drop(&mut self) {
        self.streamed.next += self.copied;
        if self.attended < self.copied {
            self.streamed.copies.settle();
        }
    }
}
