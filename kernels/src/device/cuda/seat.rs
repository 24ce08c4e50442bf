//! The device memory of one sequence: its labels, hot rows and newest rows in every layer of one shape.
//!
//! A seat is allocated when a sequence is admitted and freed with its value. A [`super::batch::Batch`] works on any seats of its shape.
//! Labels of a chunk may lie in a page that other seats hold as well.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use cudarc::driver::CudaStream;
use parking_lot::Mutex;

use super::buffer::{DeviceBuffer, copy};
use super::error::{CudaError, Doing};
use super::jobs::{COLD, LayerPlace, POOL_BLOCK};
use super::label_pages::{LabelPage, LabelSlab, SlabShape};
use super::open::Gpu;
use super::store::{BlockMove, HotStore, PoolMove};
use crate::device::LayerGeometry;
use crate::label::LabelPlan;
use crate::slot::CHUNK_TOKENS;

/// Which rows before the horizon the device keeps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kept {
    /// So many rows a lane on average, rounded up to whole blocks of 64, the most important ones lately; at least as many as a lane selects,
    /// at most 65,472. Lanes begin with as many each; [`super::batch::Batch::move_blocks`] moves places between them.
    Pool(usize),
    /// All of them.
    Everything,
}

/// What a seat has room for.
#[derive(Clone, Debug, PartialEq)]
pub struct SeatShape {
    /// Shape of the rows of every layer.
    pub geometry: LayerGeometry,
    /// Labels.
    pub plan: LabelPlan,
    /// Layers.
    pub layers: usize,
    /// Tokens: a multiple of 256.
    pub max_tokens: usize,
    /// Rows before the horizon that are kept.
    pub kept: Kept,
    /// Chunks from the horizon on.
    pub tail_chunks: usize,
}

/// Device memory by what it is for, in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct DeviceBytes {
    /// Label pages.
    pub labels: u64,
    /// Hot rows.
    pub hot_rows: u64,
    /// Maps from rows to hot places, and back.
    pub maps: u64,
    /// Rows from the horizon on.
    pub tail: u64,
    /// Tables, and what steps need besides.
    pub workspace: u64,
}

impl DeviceBytes {
    /// All of it.
    #[must_use]
    pub fn total(&self) -> u64 {
        self.labels + self.hot_rows + self.maps + self.tail + self.workspace
    }
}

impl std::ops::AddAssign for DeviceBytes {
    fn add_assign(&mut self, other: Self) {
        self.labels += other.labels;
        self.hot_rows += other.hot_rows;
        self.maps += other.maps;
        self.tail += other.tail;
        self.workspace += other.workspace;
    }
}

impl std::ops::SubAssign for DeviceBytes {
    fn sub_assign(&mut self, other: Self) {
        self.labels -= other.labels;
        self.hot_rows -= other.hot_rows;
        self.maps -= other.maps;
        self.tail -= other.tail;
        self.workspace -= other.workspace;
    }
}

impl SeatShape {
    pub(super) fn lanes(&self) -> usize {
        self.geometry.heads.lanes()
    }

    pub(super) fn chunks(&self) -> usize {
        self.max_tokens / CHUNK_TOKENS
    }

    /// Hot places a lane.
    pub(super) fn pool(&self) -> usize {
        match self.kept {
            Kept::Pool(rows) => rows.next_multiple_of(POOL_BLOCK),
            Kept::Everything => self.max_tokens,
        }
    }

    fn label_page_bytes(&self) -> usize {
        self.lanes() * CHUNK_TOKENS * self.plan.label_bytes()
    }

    /// A slab of the labels of `chunks` chunks.
    #[must_use]
    pub fn label_slab(&self, chunks: usize) -> SlabShape {
        SlabShape { layers: self.layers, chunks, page_bytes: self.label_page_bytes() }
    }

    /// Whether rows are where maps say.
    pub(super) fn has_maps(&self) -> bool {
        matches!(self.kept, Kept::Pool(_))
    }

    /// Elements of a layer's map.
    fn map_rows(&self) -> usize {
        if self.has_maps() { self.lanes() * self.max_tokens } else { 0 }
    }

    /// What a seat with labels of its own takes.
    #[must_use]
    pub fn bytes(&self) -> DeviceBytes {
        DeviceBytes { labels: self.label_slab(self.chunks()).bytes(), ..self.bytes_without_labels() }
    }

    /// What a seat takes whose labels lie in pages of others.
    #[must_use]
    pub fn bytes_without_labels(&self) -> DeviceBytes {
        let layers = self.layers as u64;
        let tables = if self.has_maps() { self.store_table_bytes() } else { 0 };
        DeviceBytes {
            labels: 0,
            hot_rows: (self.places() * self.geometry.row_bytes()) as u64,
            maps: layers * (self.map_rows() * size_of::<u16>()) as u64 + tables as u64,
            tail: layers * (self.tail_chunks * self.geometry.page_bytes()) as u64,
            workspace: (self.chunks() * (size_of::<u32>() + size_of::<u64>())) as u64,
        }
    }

    pub(super) fn check(&self) -> Result<(), CudaError> {
        bound("layers", self.layers, 1, 65_535)?;
        bound("tail_chunks", self.tail_chunks, 1, 65_535)?;
        bound("max_tokens", self.max_tokens, CHUNK_TOKENS, 1 << 24)?;
        bound("max_tokens modulo 256", self.max_tokens % CHUNK_TOKENS, 0, 0)?;
        match self.kept {
            Kept::Pool(_) => bound("hot rows of a lane", self.pool(), 0, usize::from(COLD) - 1),
            Kept::Everything => Ok(()),
        }
    }
}

/// Refuses a value out of its bound.
pub(super) fn bound(field: &'static str, value: usize, low: usize, high: usize) -> Result<(), CudaError> {
    let fits = (low..=high).contains(&value);
    if fits { Ok(()) } else { Err(CudaError::Bound { field, value: value as u64, low: low as u64, high: high as u64 }) }
}

/// A number that was not given before.
fn next_version() -> u64 {
    static GIVEN: AtomicU64 = AtomicU64::new(0);
    GIVEN.fetch_add(1, Ordering::Relaxed)
}

/// One layer's memory.
#[derive(Debug)]
struct SeatLayer {
    tail: DeviceBuffer<u8>,
    map: DeviceBuffer<u16>,
}

impl SeatLayer {
    fn new(stream: &CudaStream, shape: &SeatShape) -> Result<Self, CudaError> {
        Ok(Self {
            tail: DeviceBuffer::zeroed(stream, shape.tail_chunks * shape.geometry.page_bytes())?,
            map: DeviceBuffer::filled(stream, shape.map_rows())?,
        })
    }
}

/// Device memory of one sequence.
#[derive(Debug)]
pub struct Seat {
    shape: SeatShape,
    layers: Vec<SeatLayer>,
    hot: HotStore,
    /// By chunk: host places.
    host_places: DeviceBuffer<u32>,
    /// By chunk: address of its labels in the first layer.
    label_places: DeviceBuffer<u64>,
    /// From a layer's labels to the next layer's.
    label_layer_bytes: u64,
    /// By chunk: the pages that `label_places` names, kept for as long.
    label_pages: Mutex<Vec<Arc<LabelPage>>>,
    /// Another number after each change of these, and in each seat.
    label_version: AtomicU64,
}

impl Seat {
    /// Allocates everything, and labels for all chunks; nothing is hot.
    ///
    /// # Errors
    /// A shape out of bounds, or memory that the device does not have.
    pub fn new(gpu: &Gpu, stream: &Arc<CudaStream>, shape: &SeatShape) -> Result<Self, CudaError> {
        let seat = Self::without_labels(gpu, stream, shape, shape.label_slab(shape.chunks()))?;
        let slab = LabelSlab::new(gpu, shape.label_slab(shape.chunks()), ())?;
        let pages: Vec<Arc<LabelPage>> = std::iter::from_fn(|| slab.take()).map(Arc::new).collect();
        seat.set_label_pages(stream, 0, &pages)?;
        Ok(seat)
    }

    /// Allocates everything but labels, whose pages are to come from slabs of one shape; nothing is hot.
    ///
    /// # Errors
    /// As [`Seat::new`].
    pub fn without_labels(gpu: &Gpu, stream: &Arc<CudaStream>, shape: &SeatShape, slab: SlabShape) -> Result<Self, CudaError> {
        shape.check()?;
        Ok(Self {
            shape: shape.clone(),
            hot: HotStore::new(gpu, stream, shape)?,
            layers: (0..shape.layers).map(|_| SeatLayer::new(stream, shape)).collect::<Result<_, _>>()?,
            host_places: DeviceBuffer::zeroed(stream, shape.chunks())?,
            label_places: DeviceBuffer::zeroed(stream, shape.chunks())?,
            label_layer_bytes: slab.layer_bytes(),
            label_pages: Mutex::default(),
            label_version: AtomicU64::new(next_version()),
        })
    }

    /// What there is room for.
    #[must_use]
    pub fn shape(&self) -> &SeatShape {
        &self.shape
    }

    /// Tells kernels where rows of the chunks from `first` on lie on the host: `segment << 16 | index`.
    ///
    /// # Errors
    /// More chunks than there is room for, or a failed copy.
    pub fn set_host_places(&self, stream: &Arc<CudaStream>, first: usize, places: &[u32]) -> Result<(), CudaError> {
        bound("chunks", first + places.len(), 0, self.shape.chunks())?;
        self.host_places.write(stream, first, places)
    }

    pub(super) fn host_places_address(&self) -> u64 {
        self.host_places.address()
    }

    /// Tells kernels where the labels of the chunks from `first` on lie, and forgets those after them. Between steps.
    ///
    /// # Errors
    /// More chunks than there is room for, or a failed copy.
    pub fn set_label_pages(&self, stream: &Arc<CudaStream>, first: usize, pages: &[Arc<LabelPage>]) -> Result<(), CudaError> {
        bound("chunks", first + pages.len(), 0, self.shape.chunks())?;
        assert!(pages.iter().all(|page| page.slab_shape().layer_bytes() == self.label_layer_bytes), "pages of slabs of one shape");
        let addresses: Vec<u64> = pages.iter().map(|page| page.address(0)).collect();
        self.label_places.write(stream, first, &addresses)?;
        let mut held = self.label_pages.lock();
        held.truncate(first);
        held.extend_from_slice(pages);
        self.label_version.store(next_version(), Ordering::Relaxed);
        Ok(())
    }

    /// By chunk: the pages that the seat holds.
    #[must_use]
    pub fn label_pages(&self) -> Vec<Arc<LabelPage>> {
        self.label_pages.lock().clone()
    }

    /// What tells this state of the label pages from all others, of any seat.
    pub(super) fn label_version(&self) -> u64 {
        self.label_version.load(Ordering::Relaxed)
    }

    /// First chunks whose label pages another seat has as well.
    pub(super) fn common_label_pages(&self, other: &Self) -> usize {
        if std::ptr::eq(self, other) {
            return self.label_pages.lock().len();
        }
        let (own, others) = (self.label_pages.lock(), other.label_pages.lock());
        own.iter().zip(others.iter()).take_while(|(own, other)| Arc::ptr_eq(own, other)).count()
    }

    pub(super) fn label_places_address(&self) -> u64 {
        self.label_places.address()
    }

    /// What kernels need to know of a layer.
    pub(super) fn place(&self, layer: usize) -> LayerPlace {
        let (memory, first_lane) = (&self.layers[layer], layer * self.shape.lanes());
        let (hot, blocks, pools) = if self.shape.has_maps() {
            (self.hot.rows.address(), self.hot.blocks_address(first_lane), self.hot.pool_address(first_lane))
        } else {
            (self.hot.rows.address_of(self.layer_bytes(layer)), 0, 0)
        };
        LayerPlace {
            labels: layer as u64 * self.label_layer_bytes,
            tail: memory.tail.address(),
            hot,
            map: memory.map.address(),
            owner: self.hot.owner.address(),
            blocks,
            pools,
            tail_chunks: self.shape.tail_chunks as u32,
            max_rows: self.shape.max_tokens as u32,
            max_blocks: self.hot.most_blocks() as u32,
            unused: 0,
        }
    }

    /// Bytes of the hot rows of so many layers without maps.
    fn layer_bytes(&self, layers: usize) -> usize {
        layers * self.shape.lanes() * self.shape.pool() * self.shape.geometry.row_bytes()
    }

    /// Blocks of 64 hot places by lane, `[layer][lane]`; empty for [`Kept::Everything`].
    #[must_use]
    pub fn pool_blocks(&self) -> Vec<usize> {
        self.hot.sizes()
    }

    /// Blocks of 64 hot places that a lane can have at most.
    #[must_use]
    pub fn most_pool_blocks(&self) -> usize {
        self.hot.most_blocks()
    }

    /// Rows that every lane has hot places for.
    pub(super) fn least_pool(&self) -> usize {
        self.hot.least()
    }

    /// Notes moves of hot places between lanes, and gives the device's part of them.
    pub(super) fn note_moves(&self, moves: &[PoolMove]) -> Result<Vec<BlockMove>, CudaError> {
        let lanes = self.shape.lanes();
        self.hot.note(moves, |lane| self.layers[lane / lanes].map.address_of(lane % lanes * self.shape.max_tokens))
    }

    /// Device address of a chunk's labels in a layer.
    #[must_use]
    pub fn label_address(&self, layer: usize, chunk: usize) -> u64 {
        self.label_pages.lock()[chunk].address(layer)
    }

    /// Labels of a chunk in a layer, `lanes x 256 x label_bytes`. Waits.
    ///
    /// # Errors
    /// A failed copy.
    pub fn read_labels(&self, stream: &Arc<CudaStream>, layer: usize, chunk: usize) -> Result<Vec<u8>, CudaError> {
        let page = Arc::clone(&self.label_pages.lock()[chunk]);
        page.read(stream, layer)
    }

    /// Device address of the pages from the horizon on: chunk c lies at page `c % tail_chunks`.
    #[must_use]
    pub fn tail_address(&self, layer: usize) -> u64 {
        self.layers[layer].tail.address()
    }

    /// Copies pages of consecutive chunks, `lanes x 256 x row_bytes` each, to their places from the horizon on. Waits.
    ///
    /// # Errors
    /// A failed copy.
    pub fn write_tail(&self, stream: &Arc<CudaStream>, layer: usize, first: usize, pages: &[&[u8]]) -> Result<(), CudaError> {
        for (chunk, page) in (first..).zip(pages) {
            assert_eq!(page.len(), self.shape.geometry.page_bytes(), "bytes of a page");
            let at = chunk % self.shape.tail_chunks * page.len();
            // SAFETY: the pages are borrowed until the stream has been waited for.
            unsafe { self.layers[layer].tail.write_async(stream, at, page)? };
        }
        stream.synchronize().doing("copying rows")
    }

    /// Copies rows of consecutive positions of one lane to the places where [`Kept::Everything`] expects them. Waits.
    ///
    /// # Errors
    /// A failed copy.
    pub fn load_rows(&self, stream: &Arc<CudaStream>, layer: usize, lane: usize, first_row: usize, rows: &[u8]) -> Result<(), CudaError> {
        assert_eq!(self.shape.kept, Kept::Everything, "a pool fetches rows by itself");
        let at = (lane * self.shape.pool() + first_row) * self.shape.geometry.row_bytes();
        self.hot.rows.write(stream, self.layer_bytes(layer) + at, rows)
    }

    /// Forgets all hot rows.
    ///
    /// # Errors
    /// A failed call.
    pub fn forget_hot_rows(&self, stream: &Arc<CudaStream>) -> Result<(), CudaError> {
        for layer in &self.layers {
            layer.map.fill(stream, 0..layer.map.len())?;
        }
        self.hot.owner.fill(stream, 0..self.hot.owner.len())
    }

    /// Takes over the rows from the horizon on from a seat with as many pages for them.
    ///
    /// # Errors
    /// A copy that the driver refuses.
    pub fn take_over_tail(&self, stream: &Arc<CudaStream>, other: &Self) -> Result<(), CudaError> {
        assert_eq!(self.shape.tail_chunks, other.shape.tail_chunks, "pages from the horizon on");
        for (layer, memory) in self.layers.iter().enumerate() {
            // SAFETY: both tails have this many bytes, as asserted; freeing a seat waits for the device.
            unsafe { copy(stream, self.tail_address(layer), other.tail_address(layer), memory.tail.bytes() as u64)? };
        }
        Ok(())
    }
}
