//! Rows of many tokens from the device to open slots on the host: what a prompt writes, layer by layer.
//!
//! The newest pages of a seat have the layout of open slots. So rows go to their places there, labels of chunks that are whole are made from
//! there, and the link copies whole pages, beside the kernels of whatever comes next.

use std::sync::Arc;

use bytemuck::{Pod, Zeroable};
use cudarc::driver::CudaEvent;

use super::batch::Batch;
use super::buffer::DeviceBuffer;
use super::compile::Compiler;
use super::copies::{Copied, Copies, Copy};
use super::error::{CudaError, Doing};
use super::host::{HostPage, HostRows, HostSegment};
use super::module::{Grid, Kernel, Module, Source, Specialisation};
use super::open::Gpu;
use super::seat::{Seat, bound};
use crate::slot::CHUNK_TOKENS;

const THREADS: usize = 256;

/// The job of arrange.cu.
#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
pub(super) struct ArrangeJob {
    rows: u64,
    tail: u64,
    first_position: u32,
    tokens: u32,
    lanes: u32,
    tail_chunks: u32,
}

/// Rows of consecutive tokens of one layer in device memory.
#[derive(Clone, Copy, Debug)]
pub struct DeviceRows {
    /// Address of `[token][lane][row_bytes]`.
    pub address: u64,
    /// Position of the first token.
    pub first_position: usize,
    /// Tokens.
    pub tokens: usize,
}

/// Rows of consecutive tokens of one layer in a buffer, `[token][lane][row_bytes]`, and where they go.
#[derive(Clone, Copy, Debug)]
pub struct BufferRows<'a> {
    /// Layer of the batch.
    pub layer: usize,
    /// Position of the first token.
    pub first_position: usize,
    /// The rows.
    pub rows: &'a DeviceBuffer<u8>,
    /// Of the tokens' chunks on the host, `segment << 16 | slot`.
    pub places: &'a [u32],
}

impl DeviceRows {
    fn end(&self) -> usize {
        self.first_position + self.tokens
    }
}

/// Appends to one sequence that sits in a batch.
pub struct Appender {
    /// Dropped first: that waits for copies, which need the rest.
    copies: Copies,
    arrange: Kernel,
    blocks: usize,
    slot: usize,
    seat: Arc<Seat>,
    arranged: CudaEvent,
    /// By layer: what was appended last has reached the host.
    copied: Vec<Copied>,
    /// Files that copies may be on their way to.
    files: Vec<Arc<HostSegment>>,
    /// `[layer][chunk]`, chunks twice as many as the tail has pages: their addresses there, in a ring.
    tail_pages: DeviceBuffer<u64>,
    /// `[layer][chunk]`: addresses of label pages.
    label_pages: DeviceBuffer<u64>,
}

impl Appender {
    /// For whoever sits in `slot`.
    ///
    /// # Errors
    /// An empty slot, or what the compiler or the driver says.
    pub fn new(gpu: &Gpu, compiler: &Compiler, batch: &Batch, slot: usize) -> Result<Self, CudaError> {
        let seat = Arc::clone(batch.seat(slot).ok_or(CudaError::NoHostRows)?);
        let (shape, layers) = (seat.shape(), batch.layers());
        let module = Module::load(gpu, compiler, Source::Arrange, &Specialisation::rows(&shape.geometry))?;
        let page_bytes = shape.geometry.page_bytes() as u64;
        let tail_page = |layer, chunk| seat.tail_address(layer) + (chunk % shape.tail_chunks) as u64 * page_bytes;
        let tail_pages: Vec<u64> = (0..layers)
            .flat_map(|layer| (0..2 * shape.tail_chunks).map(move |chunk| (layer, chunk)))
            .map(|(l, c)| tail_page(l, c))
            .collect();
        let label_pages: Vec<u64> = (0..layers)
            .flat_map(|layer| (0..shape.chunks()).map(move |chunk| (layer, chunk)))
            .map(|(l, c)| seat.label_address(l, c))
            .collect();
        let copies = Copies::new(&gpu.context)?;
        Ok(Self {
            arrange: module.kernel("arrange_rows", 0)?,
            blocks: 4 * gpu.processors as usize,
            slot,
            arranged: gpu.context.new_event(None).doing("making an event")?,
            copied: (0..layers).map(|_| copies.point()).collect::<Result<_, _>>()?,
            tail_pages: DeviceBuffer::from_slice(batch.stream(), &tail_pages)?,
            label_pages: DeviceBuffer::from_slice(batch.stream(), &label_pages)?,
            files: Vec::new(),
            copies,
            seat,
        })
    }

    /// Appends rows in buffers to places of `host`, one piece after the other, and waits until they are there; nobody else has the rows of
    /// `host` meanwhile.
    ///
    /// # Errors
    /// As [`Appender::append`], and a failure of the device. What was appended before it is there.
    pub fn append_buffers<'a>(
        &mut self,
        batch: &Batch,
        host: &mut HostRows,
        pieces: impl IntoIterator<Item = BufferRows<'a>>,
    ) -> Result<(), CudaError> {
        let geometry = &self.seat.shape().geometry;
        let token_bytes = geometry.heads.lanes() * geometry.row_bytes();
        let is_of_host = |&place: &u32| {
            let number = (place >> 16) as usize;
            batch.segment(number).zip(host.segments().get(number)).is_some_and(|(known, own)| Arc::ptr_eq(known, own))
        };
        let appended = pieces.into_iter().try_for_each(|BufferRows { layer, first_position, rows, places }| {
            if !places.iter().all(is_of_host) {
                return Err(CudaError::NoHostRows);
            }
            let rows = DeviceRows { address: rows.address(), first_position, tokens: rows.len() / token_bytes };
            // SAFETY: the buffers are borrowed, and the rows of the host exclusively, until everything has been waited for below.
            unsafe { self.append(batch, layer, &rows, places) }
        });
        let copied = self.wait();
        batch.wait()?;
        copied.and(appended)
    }

    /// Enqueues rows of one layer: to the seat's newest pages, to their labels where a chunk becomes whole, and to the chunks' `places` on the
    /// host, `segment << 16 | slot` of segments that the batch knows and that are registered for writing. The chunks' earlier rows are in the
    /// newest pages already. The rows have been read when the batch's stream has passed this point; they are on the host after
    /// [`Appender::wait`].
    ///
    /// # Safety
    /// The rows stay valid until the batch's stream has passed this point. Nobody else uses their places on the host until they are there.
    ///
    /// # Errors
    /// Rows that the seat has no room for, a segment that the batch does not know, or a launch or copy that the driver refuses.
    pub unsafe fn append(&mut self, batch: &Batch, layer: usize, rows: &DeviceRows, places: &[u32]) -> Result<(), CudaError> {
        let seat = Arc::clone(&self.seat);
        let (shape, stream) = (seat.shape(), batch.stream());
        let chunks = rows.first_position / CHUNK_TOKENS..rows.end().div_ceil(CHUNK_TOKENS);
        bound("end of the rows", rows.end(), 0, shape.max_tokens)?;
        bound("chunks of the rows", chunks.len(), 0, shape.tail_chunks)?;
        assert!(batch.seat(self.slot).is_some_and(|sitting| Arc::ptr_eq(sitting, &seat)), "the seat that this value was made for");
        assert_eq!(places.len(), chunks.len(), "a place for each chunk of the rows");
        let segment = |&place: &u32| batch.segment((place >> 16) as usize).map(Arc::clone).ok_or(CudaError::NoHostRows);
        let files = places.iter().map(segment).collect::<Result<Vec<_>, _>>()?;
        self.copied[layer].wait_on(stream)?;
        // SAFETY: the tail belongs to the seat, and what was in these pages has reached the host; the rows are the caller's promise.
        unsafe { self.arrange(batch, layer, rows) }?;
        let whole = chunks.start..rows.end() / CHUNK_TOKENS;
        if !whole.is_empty() {
            let from = self.tail_pages.address_of(layer * 2 * shape.tail_chunks + whole.start % shape.tail_chunks);
            let to = self.label_pages.address_of(layer * shape.chunks() + whole.start);
            // SAFETY: both tables have this many entries from there on, of pages that belong to the seat.
            unsafe { batch.labeller(layer).launch(stream, from, to, whole.len()) }?;
        }
        self.arranged.record(stream).doing("marking rows")?;
        self.copies.follow(&self.arranged)?;
        let mut copies = Vec::new();
        for (chunk, (segment, &place)) in chunks.zip(files.iter().zip(places)) {
            let to = batch.host_part(layer).address(HostPage { segment, slot: place & 0xFFFF });
            self.add_copies(&mut copies, layer, rows, chunk, to);
        }
        // SAFETY: pages belong to the seat, places to files that are kept until copies have been waited for; nobody else uses them by the
        // promise of the caller.
        unsafe { self.copies.enqueue(&copies) }?;
        let known = |file: &Arc<HostSegment>, files: &[Arc<HostSegment>]| files.iter().any(|held| Arc::ptr_eq(held, file));
        for file in files {
            if !known(&file, &self.files) {
                self.files.push(file);
            }
        }
        self.copies.mark(&self.copied[layer])
    }

    unsafe fn arrange(&self, batch: &Batch, layer: usize, rows: &DeviceRows) -> Result<(), CudaError> {
        let shape = self.seat.shape();
        let job = ArrangeJob {
            rows: rows.address,
            tail: self.seat.tail_address(layer),
            first_position: rows.first_position as u32,
            tokens: rows.tokens as u32,
            lanes: shape.geometry.heads.lanes() as u32,
            tail_chunks: shape.tail_chunks as u32,
        };
        // SAFETY: the caller's promise.
        unsafe { self.arrange.launch(batch.stream(), Grid { blocks: [self.blocks, 1, 1], threads: THREADS }, &job) }
    }

    /// Adds the copies of the rows of one chunk to its page on the host: one of a whole page, or one a lane.
    fn add_copies(&self, copies: &mut Vec<Copy>, layer: usize, rows: &DeviceRows, chunk: usize, to: u64) {
        let geometry = &self.seat.shape().geometry;
        let (page_bytes, row_bytes) = (geometry.page_bytes(), geometry.row_bytes());
        let first = rows.first_position.saturating_sub(chunk * CHUNK_TOKENS);
        let count = (rows.end() - chunk * CHUNK_TOKENS).min(CHUNK_TOKENS) - first;
        let from = self.seat.tail_address(layer) + (chunk % self.seat.shape().tail_chunks * page_bytes) as u64;
        if count == CHUNK_TOKENS {
            copies.push(Copy { to, from, bytes: page_bytes });
            return;
        }
        for lane in 0..geometry.heads.lanes() {
            let at = (lane * CHUNK_TOKENS + first) * row_bytes;
            copies.push(Copy { to: to + at as u64, from: from + at as u64, bytes: count * row_bytes });
        }
    }

    /// Waits until everything appended so far is on the host.
    ///
    /// # Errors
    /// A failure of the device.
    pub fn wait(&mut self) -> Result<(), CudaError> {
        self.copies.wait()?;
        self.files.clear();
        Ok(())
    }
}
