//! Sliding-window layers: the newest rows of each in a ring of pages on the device, and the exact attention of one query a sequence over them.
//!
//! A ring is what the step over selected rows calls a tail, and its kernel attends it; here nothing is selected, and the first row that is
//! attended may lie within a page.

use std::ops::Range;
use std::sync::Arc;

use bytemuck::Pod;
use cudarc::driver::CudaStream;

use super::batch::BatchShape;
use super::buffer::{DeviceBuffer, PinnedBuffer};
use super::compile::Compiler;
use super::error::{CudaError, Doing};
use super::jobs::{Arrivals, LayerPlace, NOBODY, SequenceState, StepJob};
use super::module::{Grid, Kernel, Module, Source, Specialisation};
use super::open::Gpu;
use super::seat::bound;
use crate::device::LayerGeometry;
use crate::scales::{LaneScales, RowScale};
use crate::slot::CHUNK_TOKENS;

/// What a sequence's rings have room for.
#[derive(Clone, Debug, PartialEq)]
pub struct RingShape {
    /// Shape of the rows of every layer.
    pub geometry: LayerGeometry,
    /// Layers.
    pub layers: usize,
    /// Pages of a ring.
    pub chunks: usize,
}

impl RingShape {
    /// Chunks that a window of so many rows reaches into at most.
    #[must_use]
    pub fn chunks_of(window: usize) -> usize {
        window.saturating_sub(1).div_ceil(CHUNK_TOKENS) + 1
    }

    /// Device memory of the rings, in bytes.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        (self.layers * self.chunks * self.geometry.page_bytes()) as u64
    }
}

/// The newest rows of one sequence in layers of one shape: chunk c of a layer lies at page `c % chunks` of its ring.
#[derive(Debug)]
pub struct Rings {
    shape: RingShape,
    rows: DeviceBuffer<u8>,
}

impl Rings {
    /// Allocates rings without rows.
    ///
    /// # Errors
    /// Memory that the device does not have.
    pub fn new(gpu: &Gpu, shape: RingShape) -> Result<Self, CudaError> {
        let rows = DeviceBuffer::uninitialised(&gpu.context, shape.bytes() as usize)?;
        Ok(Self { shape, rows })
    }

    /// What there is room for.
    #[must_use]
    pub fn shape(&self) -> &RingShape {
        &self.shape
    }

    fn at(&self, layer: usize, chunk: usize) -> usize {
        (layer * self.shape.chunks + chunk % self.shape.chunks) * self.shape.geometry.page_bytes()
    }

    /// Copies the page of a chunk, `lanes x 256 x row_bytes`, to its place. Waits.
    ///
    /// # Errors
    /// A failed copy.
    pub fn write(&self, stream: &CudaStream, layer: usize, chunk: usize, page: &[u8]) -> Result<(), CudaError> {
        assert_eq!(page.len(), self.shape.geometry.page_bytes(), "bytes of a page");
        self.rows.write(stream, self.at(layer, chunk), page)
    }
}

/// What steps over window layers of one shape have room for.
#[derive(Clone, Debug, PartialEq)]
pub struct WindowShape {
    /// Shape of the rows of every layer; scales are each layer's own.
    pub geometry: LayerGeometry,
    /// Sequences at a time.
    pub slots: usize,
    /// Rows that a query attends at most.
    pub max_rows: usize,
}

impl WindowShape {
    fn lanes(&self) -> usize {
        self.geometry.heads.lanes()
    }

    fn blocks(&self) -> usize {
        BatchShape::most_blocks(self.max_rows, self.lanes())
    }

    /// Floats of a lane's partial results.
    fn lane_partials(&self) -> usize {
        self.blocks() * self.geometry.heads.group() * (self.geometry.head_dim + 2)
    }

    /// Values of a query.
    fn query_values(&self) -> usize {
        self.geometry.heads.query_heads() * self.geometry.head_dim
    }

    /// Bytes of a row of every lane.
    fn row_bytes(&self) -> usize {
        self.lanes() * self.geometry.row_bytes()
    }

    /// Device memory of the steps of so many layers, in bytes.
    #[must_use]
    pub fn own_bytes(&self, layers: usize) -> u64 {
        let floats = 2 * self.query_values() + self.geometry.heads.query_heads() + self.lanes() * self.lane_partials();
        let slot = size_of::<SequenceState>() + size_of::<LayerPlace>() + self.row_bytes() + self.lanes() * size_of::<Arrivals>();
        (self.slots * (slot + floats * size_of::<f32>()) + layers * self.lanes() * size_of::<RowScale>()) as u64
    }
}

/// What a slot's query attends.
#[derive(Clone, Debug)]
pub struct Attended<'a> {
    /// The sequence's rings, which have all of these rows but the last. The last one is the slot's newest row, and is stored.
    pub rings: &'a Rings,
    /// Positions.
    pub span: Range<usize>,
}

/// Elements by slot, on the device and in pinned memory.
struct Mirrored<T> {
    device: DeviceBuffer<T>,
    host: PinnedBuffer<T>,
    /// Elements of a slot.
    of_slot: usize,
}

impl<T: Pod> Mirrored<T> {
    fn new(gpu: &Gpu, slots: usize, of_slot: usize) -> Result<Self, CudaError> {
        let device = DeviceBuffer::uninitialised(&gpu.context, slots * of_slot)?;
        Ok(Self { device, host: PinnedBuffer::zeroed(&gpu.context, slots * of_slot)?, of_slot })
    }

    fn range(&self, slot: usize) -> Range<usize> {
        slot * self.of_slot..(slot + 1) * self.of_slot
    }

    fn slot(&self, slot: usize) -> &[T] {
        &self.host[self.range(slot)]
    }

    fn slot_mut(&mut self, slot: usize) -> &mut [T] {
        let range = self.range(slot);
        &mut self.host[range]
    }

    /// Enqueues the copy of the first `slots` slots to the device.
    ///
    /// # Safety
    /// Nobody writes them before the stream has passed this point.
    unsafe fn send(&self, stream: &CudaStream, slots: usize) -> Result<(), CudaError> {
        // SAFETY: the caller's promise.
        unsafe { self.device.write_async(stream, 0, &self.host[..slots * self.of_slot]) }
    }

    /// Enqueues the copy of the first `slots` slots from the device.
    ///
    /// # Safety
    /// Nobody uses them before the stream has passed this point.
    unsafe fn fetch(&mut self, stream: &CudaStream, slots: usize) -> Result<(), CudaError> {
        // SAFETY: the caller's promise.
        unsafe { self.device.read_async(stream, 0, &mut self.host[..slots * self.of_slot]) }
    }
}

/// The step over window layers of one shape, for callers whose queries and results lie in host memory.
pub struct WindowStep {
    shape: WindowShape,
    stream: Arc<CudaStream>,
    attend: Kernel,
    threads: usize,
    states: Mirrored<SequenceState>,
    places: Mirrored<LayerPlace>,
    /// `[slot][query head][head_dim]`, and the outputs.
    queries: Mirrored<f32>,
    outputs: Mirrored<f32>,
    lse: Mirrored<f32>,
    /// `[slot][lane][row_bytes]`.
    new_rows: Mirrored<u8>,
    partials: DeviceBuffer<f32>,
    arrivals: DeviceBuffer<Arrivals>,
    /// `[layer][lane]`.
    scales: DeviceBuffer<RowScale>,
}

impl WindowStep {
    /// Compiles the kernel and allocates everything; `scales` are those of the layers. Steps go to `stream`.
    ///
    /// # Errors
    /// Memory that the device does not have, or what the compiler says.
    pub fn new(
        gpu: &Gpu,
        compiler: &Compiler,
        stream: &Arc<CudaStream>,
        shape: &WindowShape,
        scales: &[LaneScales],
    ) -> Result<Self, CudaError> {
        bound("rows of a window", shape.max_rows, 1, 1 << 24)?;
        let specialisation = Specialisation::rows(&shape.geometry);
        let attend = Module::load(gpu, compiler, Source::Attend, &specialisation)?.kernel("attend", 0)?;
        let (slots, lanes) = (shape.slots, shape.lanes());
        let scales: Vec<RowScale> = scales.iter().flat_map(|scales| (0..lanes).map(|lane| scales.of(lane))).collect();
        Ok(Self {
            attend,
            threads: 32 * specialisation.attend_warps(),
            states: Mirrored::new(gpu, slots, 1)?,
            places: Mirrored::new(gpu, slots, 1)?,
            queries: Mirrored::new(gpu, slots, shape.query_values())?,
            outputs: Mirrored::new(gpu, slots, shape.query_values())?,
            lse: Mirrored::new(gpu, slots, shape.geometry.heads.query_heads())?,
            new_rows: Mirrored::new(gpu, slots, shape.row_bytes())?,
            partials: DeviceBuffer::uninitialised(&gpu.context, slots * lanes * shape.lane_partials())?,
            arrivals: DeviceBuffer::zeroed(stream, slots * lanes)?,
            scales: DeviceBuffer::from_slice(stream, &scales)?,
            shape: WindowShape { geometry: shape.geometry.unscaled(), ..shape.clone() },
            stream: Arc::clone(stream),
        })
    }

    /// What there is room for.
    #[must_use]
    pub fn shape(&self) -> &WindowShape {
        &self.shape
    }

    /// The stream of its steps.
    #[must_use]
    pub fn stream(&self) -> &Arc<CudaStream> {
        &self.stream
    }

    /// Where a slot's query, `[query head][head_dim]`, and newest rows, `[lane][row_bytes]`, go before [`WindowStep::perform`].
    pub fn input(&mut self, slot: usize) -> (&mut [f32], &mut [u8]) {
        (self.queries.slot_mut(slot), self.new_rows.slot_mut(slot))
    }

    fn set(&mut self, slot: usize, layer: usize, Attended { rings, span }: &Attended<'_>) -> Result<(), CudaError> {
        assert!(rings.shape.geometry.unscaled() == self.shape.geometry, "rings of this shape");
        let first = span.start / CHUNK_TOKENS;
        bound("attended rows", span.len(), 1, self.shape.max_rows)?;
        bound("chunks of a window", span.end.div_ceil(CHUNK_TOKENS) - first, 1, rings.shape.chunks)?;
        self.states.slot_mut(slot)[0] = SequenceState {
            length: span.end as u32,
            chunks: first as u32,
            skipped: (span.start % CHUNK_TOKENS) as u32,
            append_to: NOBODY,
            block_rows: BatchShape::block_rows(span.len(), self.shape.lanes()) as u32,
            ..SequenceState::default()
        };
        let (tail, tail_chunks) = (rings.rows.address_of(rings.at(layer, 0)), rings.shape.chunks as u32);
        self.places.slot_mut(slot)[0] = LayerPlace { tail, tail_chunks, ..LayerPlace::default() };
        Ok(())
    }

    /// Performs the step of a layer for the first slots, and waits for the results.
    ///
    /// # Errors
    /// Rows that there is no room for, a copy or launch that the driver refuses, or a failure of the device.
    pub fn perform(&mut self, layer: usize, attended: &[Attended<'_>]) -> Result<(), CudaError> {
        let slots = attended.len();
        bound("sequences of a launch", slots, 0, self.shape.slots)?;
        for (slot, attended) in attended.iter().enumerate() {
            self.set(slot, layer, attended)?;
        }
        let (shape, stream) = (&self.shape, &self.stream);
        let lanes = shape.lanes();
        let job = StepJob {
            sequences: self.states.device.address(),
            places: self.places.device.address(),
            new_rows: self.new_rows.device.address(),
            page_bytes: shape.geometry.page_bytes() as u64,
            scales: self.scales.address_of(layer * lanes),
            query: self.queries.device.address(),
            output: self.outputs.device.address(),
            lse: self.lse.device.address(),
            partials: self.partials.address(),
            arrivals: self.arrivals.address(),
            lanes: lanes as u32,
            max_blocks: shape.blocks() as u32,
            score_scale: shape.geometry.softmax_scale * std::f32::consts::LOG2_E,
            appends: 1,
            ..StepJob::default()
        };
        let grid = Grid { blocks: [shape.blocks(), lanes, slots], threads: self.threads };
        // SAFETY: every address of the job is of a buffer of this value or of rings, and the pinned inputs and results are this value's. All of
        // them are borrowed until the stream has been waited for.
        let enqueued = unsafe {
            self.states.send(stream, slots).and_then(|()| {
                self.places.send(stream, slots)?;
                self.queries.send(stream, slots)?;
                self.new_rows.send(stream, slots)?;
                self.attend.launch(stream, grid, &job)?;
                self.outputs.fetch(stream, slots)?;
                self.lse.fetch(stream, slots)
            })
        };
        stream.synchronize().doing("waiting for a window layer")?;
        enqueued
    }

    /// A slot's output, `[query head][head_dim]`, and natural log-sum-exps of the step performed last.
    #[must_use]
    pub fn result(&self, slot: usize) -> (&[f32], &[f32]) {
        (self.outputs.slot(slot), self.lse.slot(slot))
    }
}
