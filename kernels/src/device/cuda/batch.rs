//! A batch of sequences on the device: their labels, hot rows and newest rows, and the step over them.
//!
//! Rows before the horizon stay in host memory, in segments that the device reads across the link. Everything is allocated here, once; a
//! step allocates nothing and waits for nothing. What a graph's kernels find to do is in device tables ([`SequenceState`]), which change
//! between launches only, so that one captured graph serves every length.

use std::ops::Range;
use std::sync::Arc;

use cudarc::driver::{CudaGraph, CudaStream, sys};

use super::buffer::{DeviceBuffer, PinnedBuffer};
use super::compile::Compiler;
use super::error::{CudaError, Doing};
use super::host::HostRows;
use super::jobs::{BINS, COLD, LayerPlace, NOBODY, PARTS, PartCounts, REFINED, SAMPLE_PARTS, SequenceState, StepJob, VictimCounts};
use super::label::Labeller;
use super::module::Specialisation;
use super::open::Gpu;
use super::probe::Probe;
use super::step::{MAX_LANES, StepGrid, StepKernels};
use crate::budget::Settings;
use crate::device::LayerGeometry;
use crate::label::{LabelCoder, LabelPlan};
use crate::slot::CHUNK_TOKENS;

/// Host segments that a batch can name.
pub const MAX_SEGMENTS: usize = 4096;

/// Which rows before the horizon the device keeps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kept {
    /// So many rows a lane, the most important ones lately; at least as many as a lane selects, fewer than 65,535.
    Pool(usize),
    /// All of them.
    Everything,
}

/// What a batch has room for.
#[derive(Clone, Debug, PartialEq)]
pub struct BatchShape {
    /// Shape of the rows of every layer.
    pub geometry: LayerGeometry,
    /// Labels.
    pub plan: LabelPlan,
    /// Layers.
    pub layers: usize,
    /// Sequences at a time.
    pub slots: usize,
    /// Tokens of a sequence: a multiple of 256.
    pub max_tokens: usize,
    /// Rows that a lane selects at most.
    pub max_count: usize,
    /// Rows before the horizon that are kept.
    pub kept: Kept,
    /// Chunks from the horizon on.
    pub tail_chunks: usize,
    /// Rows of an attention block: a multiple of 64. Results depend on it.
    pub block_rows: usize,
    /// Blocks of the gather.
    pub gather_blocks: usize,
    /// Whether selections of a trace replace the computed ones: `Some(rows of the trace)`, for benches.
    pub trace_rows: Option<usize>,
}

/// Device memory of a batch by what it is for, in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct BatchBytes {
    /// Label pages.
    pub labels: u64,
    /// Hot rows.
    pub hot_rows: u64,
    /// Maps from rows to hot places, and back.
    pub maps: u64,
    /// Rows from the horizon on.
    pub tail: u64,
    /// Queries, outputs, keys, lists, partial results and tables.
    pub workspace: u64,
}

impl BatchBytes {
    /// All of it.
    #[must_use]
    pub fn total(&self) -> u64 {
        self.labels + self.hot_rows + self.maps + self.tail + self.workspace
    }
}

/// One layer's device memory, `[slot]` first.
struct Layer {
    labels: DeviceBuffer<u8>,
    tail: DeviceBuffer<u8>,
    hot: DeviceBuffer<u8>,
    map: DeviceBuffer<u16>,
    owner: DeviceBuffer<u32>,
    places: DeviceBuffer<LayerPlace>,
    planes: DeviceBuffer<u64>,
    labeller: Labeller,
}

/// Working room that layers share, `[slot]` first.
struct Workspace {
    weights: DeviceBuffer<u32>,
    label_lse: DeviceBuffer<f32>,
    keys: DeviceBuffer<u16>,
    histogram: DeviceBuffer<u32>,
    above: DeviceBuffer<u32>,
    positions: DeviceBuffer<u32>,
    hot_places: DeviceBuffer<u32>,
    misses: DeviceBuffer<u32>,
    part_counts: DeviceBuffer<PartCounts>,
    victim_bins: DeviceBuffer<u32>,
    victims: DeviceBuffer<u32>,
    victim_counts: DeviceBuffer<VictimCounts>,
    partials: DeviceBuffer<f32>,
}

/// A batch of sequences and the step over them.
pub struct Batch {
    shape: BatchShape,
    stream: Arc<CudaStream>,
    kernels: StepKernels,
    grid: StepGrid,
    layers: Vec<Layer>,
    jobs: Vec<StepJob>,
    host: Option<Arc<HostRows>>,
    /// Host places by slot and chunk.
    seats: Vec<Vec<u32>>,
    states: PinnedBuffer<SequenceState>,
    device_states: DeviceBuffer<SequenceState>,
    /// `[slot][2][chunk]`: host places, then places of labels.
    tables: DeviceBuffer<u32>,
    /// `[layer][slot][query head][head_dim]`, and the outputs.
    queries: DeviceBuffer<f32>,
    outputs: DeviceBuffer<f32>,
    lse: DeviceBuffer<f32>,
    /// `[layer][slot][lane][row_bytes]`.
    new_rows: DeviceBuffer<u8>,
    /// `[layer][slot][lane]`: hits and misses.
    counters: DeviceBuffer<[u64; 2]>,
    /// `[layer][slot][lane][trace_rows]`.
    trace: DeviceBuffer<u16>,
    workspace: Workspace,
}

impl BatchShape {
    /// Rows of an attention block that make one wave of blocks on an H100 (132 processors, four blocks each) of `rows` rows a lane.
    #[must_use]
    pub fn block_rows_for(rows: usize, lanes: usize) -> usize {
        const BLOCKS: usize = 4 * 132;
        (rows * lanes).div_ceil(BLOCKS).next_multiple_of(64)
    }

    fn lanes(&self) -> usize {
        self.geometry.heads.lanes()
    }

    fn chunks(&self) -> usize {
        self.max_tokens / CHUNK_TOKENS
    }

    /// Hot places a lane.
    fn pool(&self) -> usize {
        match self.kept {
            Kept::Pool(rows) => rows,
            Kept::Everything => self.max_tokens,
        }
    }

    fn attend_blocks(&self) -> usize {
        (self.max_count + self.tail_chunks * CHUNK_TOKENS).div_ceil(self.block_rows)
    }

    fn check(&self) -> Result<(), CudaError> {
        let bound = |field, value: usize, low: usize, high: usize| {
            let fits = (low..=high).contains(&value);
            if fits { Ok(()) } else { Err(CudaError::Bound { field, value: value as u64, low: low as u64, high: high as u64 }) }
        };
        bound("lanes", self.lanes(), 1, MAX_LANES)?;
        bound("layers", self.layers, 1, 65_535)?;
        bound("slots", self.slots, 1, 65_535)?;
        bound("tail_chunks", self.tail_chunks, 1, 65_535)?;
        bound("gather_blocks", self.gather_blocks, 1, 1024)?;
        bound("max_tokens", self.max_tokens, CHUNK_TOKENS, 1 << 20)?;
        bound("max_tokens modulo 256", self.max_tokens % CHUNK_TOKENS, 0, 0)?;
        bound("block_rows modulo 64", self.block_rows % 64, 0, 0)?;
        bound("block_rows", self.block_rows, 64, 1 << 20)?;
        bound("max_count", self.max_count, 0, self.max_tokens)?;
        match self.kept {
            Kept::Pool(rows) => bound("hot rows of a lane", rows, self.max_count, usize::from(COLD) - 1),
            Kept::Everything => Ok(()),
        }
    }
}

impl Batch {
    /// Compiles the kernels and allocates everything.
    ///
    /// # Errors
    /// A shape out of bounds, memory that the device does not have, or what the compiler says.
    pub fn new(gpu: &Gpu, compiler: &Compiler, shape: &BatchShape, coders: &[&LabelCoder]) -> Result<Self, CudaError> {
        shape.check()?;
        assert_eq!(coders.len(), shape.layers, "a coder a layer");
        let stream = gpu.context.new_stream().doing("making a stream")?;
        let mut specialisation = Specialisation::labels(&shape.geometry, &shape.plan);
        specialisation.replays_trace = shape.trace_rows.is_some();
        let kernels = StepKernels::load(gpu, compiler, &specialisation)?;
        let heads = shape.geometry.heads.query_heads();
        let context = &gpu.context;
        let (all, values) = (shape.layers * shape.slots, shape.layers * shape.slots * heads);
        let mut batch = Self {
            grid: StepGrid {
                lanes: shape.lanes(),
                slots: shape.slots,
                gather_blocks: shape.gather_blocks,
                attend_blocks: shape.attend_blocks(),
            },
            layers: Vec::with_capacity(shape.layers),
            jobs: Vec::new(),
            host: None,
            seats: vec![Vec::new(); shape.slots],
            states: PinnedBuffer::zeroed(context, shape.slots)?,
            device_states: DeviceBuffer::zeroed(context, shape.slots)?,
            tables: DeviceBuffer::zeroed(context, shape.slots * 2 * shape.chunks())?,
            queries: DeviceBuffer::zeroed(context, values * shape.geometry.head_dim)?,
            outputs: DeviceBuffer::zeroed(context, values * shape.geometry.head_dim)?,
            lse: DeviceBuffer::zeroed(context, values)?,
            new_rows: DeviceBuffer::zeroed(context, all * shape.lanes() * shape.geometry.row_bytes())?,
            counters: DeviceBuffer::zeroed(context, all * shape.lanes())?,
            trace: DeviceBuffer::zeroed(context, all * shape.lanes() * shape.trace_rows.unwrap_or(0))?,
            workspace: Workspace::new(gpu, shape)?,
            shape: shape.clone(),
            stream,
            kernels,
        };
        for coder in coders {
            let layer = Layer::new(gpu, compiler, &batch.stream, shape, coder)?;
            batch.layers.push(layer);
        }
        batch.jobs = (0..shape.layers).map(|layer| batch.job(layer)).collect();
        Ok(batch)
    }

    fn job(&self, layer: usize) -> StepJob {
        let (shape, of_layer, room) = (&self.shape, &self.layers[layer], &self.workspace);
        let heads = layer * shape.slots * shape.geometry.heads.query_heads();
        let lanes = layer * shape.slots * shape.lanes();
        let trace_rows = shape.trace_rows.unwrap_or(0);
        StepJob {
            sequences: self.device_states.address(),
            places: of_layer.places.address(),
            planes: of_layer.planes.address(),
            new_rows: self.new_rows.address_of(lanes * shape.geometry.row_bytes()),
            page_bytes: shape.geometry.page_bytes() as u64,
            channels: of_layer.labeller.channels(),
            steps: of_layer.labeller.steps(),
            query: self.queries.address_of(heads * shape.geometry.head_dim),
            output: self.outputs.address_of(heads * shape.geometry.head_dim),
            lse: self.lse.address_of(heads),
            weights: room.weights.address(),
            label_lse: room.label_lse.address(),
            keys: room.keys.address(),
            histogram: room.histogram.address(),
            above: room.above.address(),
            positions: room.positions.address(),
            hot_places: room.hot_places.address(),
            misses: room.misses.address(),
            part_counts: room.part_counts.address(),
            victim_bins: room.victim_bins.address(),
            victims: room.victims.address(),
            victim_counts: room.victim_counts.address(),
            partials: room.partials.address(),
            counters: self.counters.address_of(lanes),
            trace: if trace_rows > 0 { self.trace.address_of(lanes * trace_rows) } else { 0 },
            lanes: shape.lanes() as u32,
            max_rows: shape.max_tokens as u32,
            max_count: shape.max_count as u32,
            max_blocks: shape.attend_blocks() as u32,
            block_rows: shape.block_rows as u32,
            trace_rows: trace_rows as u32,
            score_scale: shape.geometry.softmax_scale * std::f32::consts::LOG2_E,
            slots: shape.slots as u32,
        }
    }

    /// What this batch has room for.
    #[must_use]
    pub fn shape(&self) -> &BatchShape {
        &self.shape
    }

    /// The stream of its steps.
    #[must_use]
    pub fn stream(&self) -> &Arc<CudaStream> {
        &self.stream
    }

    /// Device memory by what it is for.
    #[must_use]
    pub fn bytes(&self) -> BatchBytes {
        let mut bytes = BatchBytes { workspace: self.workspace.bytes(), ..BatchBytes::default() };
        for layer in &self.layers {
            bytes.labels += layer.labels.bytes() as u64;
            bytes.hot_rows += layer.hot.bytes() as u64;
            bytes.maps += (layer.map.bytes() + layer.owner.bytes()) as u64;
            bytes.tail += layer.tail.bytes() as u64;
            bytes.workspace += (layer.places.bytes() + layer.planes.bytes()) as u64;
        }
        let tables = self.device_states.bytes() + self.tables.bytes() + self.counters.bytes() + self.new_rows.bytes();
        bytes.workspace += (tables + self.queries.bytes() + self.outputs.bytes() + self.lse.bytes()) as u64;
        bytes
    }

    /// Tells the batch where rows lie on the host; plane l is layer l's. Between steps.
    ///
    /// # Errors
    /// More segments than a table has, or a failed copy.
    pub fn set_host(&mut self, host: &Arc<HostRows>) -> Result<(), CudaError> {
        let count = host.segments().len();
        if count > MAX_SEGMENTS {
            return Err(CudaError::Bound { field: "segments", value: count as u64, low: 0, high: MAX_SEGMENTS as u64 });
        }
        for (layer, of_layer) in self.layers.iter_mut().enumerate() {
            of_layer.planes.write(&self.stream, 0, &host.planes(layer))?;
        }
        self.host = Some(Arc::clone(host));
        Ok(())
    }

    /// Seats a sequence: where the rows of each of its chunks lie on the host (`segment << 16 | index`). Its labels are expected at the
    /// same chunk numbers. Between steps.
    ///
    /// # Errors
    /// More chunks than there is room for, or a failed copy.
    pub fn seat(&mut self, slot: usize, host_places: &[u32]) -> Result<(), CudaError> {
        let chunks = self.shape.chunks();
        if host_places.len() > chunks {
            return Err(CudaError::Bound { field: "chunks", value: host_places.len() as u64, low: 0, high: chunks as u64 });
        }
        let labels: Vec<u32> = (0..chunks as u32).collect();
        self.seats[slot] = host_places.to_vec();
        self.tables.write(&self.stream, slot * 2 * chunks, host_places)?;
        self.tables.write(&self.stream, (slot * 2 + 1) * chunks, &labels)
    }

    /// Says where the chunks of a slot lie on the host, for [`Batch::fetch_tail`] alone.
    pub fn seat_dense(&mut self, slot: usize, host_places: &[u32]) {
        self.seats[slot] = host_places.to_vec();
    }

    /// What the next step does for a slot: the length with the query's own token, by the sequence's settings. Takes effect at the next
    /// [`Batch::step`] or [`Batch::replay`].
    ///
    /// # Errors
    /// A length or a budget that there is no room for.
    pub fn set_length(&mut self, slot: usize, length: usize, settings: &Settings, append_to: Option<u32>) -> Result<(), CudaError> {
        let shape = &self.shape;
        let (horizon, count) = (settings.horizon(length), settings.selected_tokens(length));
        let bound = |field, value: usize, high: usize| {
            if value <= high { Ok(()) } else { Err(CudaError::Bound { field, value: value as u64, low: 0, high: high as u64 }) }
        };
        bound("length", length, shape.max_tokens)?;
        bound("selected rows", count, shape.max_count)?;
        bound("chunks from the horizon on", length.div_ceil(CHUNK_TOKENS) - horizon / CHUNK_TOKENS, shape.tail_chunks)?;
        let tables = self.tables.address_of(slot * 2 * shape.chunks());
        self.states[slot] = SequenceState {
            slots: tables,
            label_slots: tables + (shape.chunks() * size_of::<u32>()) as u64,
            length: length as u32,
            chunks: (horizon / CHUNK_TOKENS) as u32,
            count: count as u32,
            sinks: settings.sink_tokens.min(count as u32),
            append_to: append_to.unwrap_or(NOBODY),
            unused: 0,
        };
        Ok(())
    }

    /// A step that attends every row up to `length` exactly, from the tail's pages.
    ///
    /// # Errors
    /// A length that the tail has no room for.
    pub fn set_dense_length(&mut self, slot: usize, length: usize) -> Result<(), CudaError> {
        let high = self.shape.tail_chunks * CHUNK_TOKENS;
        if length > high {
            return Err(CudaError::Bound { field: "length", value: length as u64, low: 0, high: high as u64 });
        }
        self.states[slot] = SequenceState { length: length as u32, append_to: NOBODY, ..SequenceState::default() };
        Ok(())
    }

    /// Labels chunks `chunks` of a slot in one layer from their rows on the host. Waits.
    ///
    /// # Errors
    /// A failed launch.
    pub fn make_labels(&mut self, layer: usize, slot: usize, chunks: Range<usize>) -> Result<(), CudaError> {
        let Some(host) = &self.host else { return Err(CudaError::NoHostRows) };
        let page = (self.shape.lanes() * CHUNK_TOKENS * self.shape.plan.label_bytes()) as u64;
        let of_layer = &self.layers[layer];
        let first = of_layer.labels.address() + (slot * self.shape.chunks()) as u64 * page;
        let labels: Vec<u64> = chunks.clone().map(|chunk| first + chunk as u64 * page).collect();
        let pages: Vec<u64> = self.seats[slot][chunks].iter().map(|&place| host.page_address(layer, place)).collect();
        let (pages, labels) = (DeviceBuffer::from_slice(&self.stream, &pages)?, DeviceBuffer::from_slice(&self.stream, &labels)?);
        // SAFETY: the tables live until the stream has been waited for, label pages are this batch's own, and rows are registered while
        // this value keeps them.
        unsafe { of_layer.labeller.launch(&self.stream, pages.address(), labels.address(), pages.len())? };
        self.stream.synchronize().doing("labelling")
    }

    /// Copies chunks `chunks` of a slot in one layer from the host to the pages from the horizon on. Waits.
    ///
    /// # Errors
    /// A failed copy.
    pub fn fetch_tail(&mut self, layer: usize, slot: usize, chunks: Range<usize>) -> Result<(), CudaError> {
        let Some(host) = &self.host else { return Err(CudaError::NoHostRows) };
        let page_bytes = self.shape.geometry.page_bytes() as u64;
        for chunk in chunks {
            let to = self.tail_address(layer, slot) + (chunk % self.shape.tail_chunks) as u64 * page_bytes;
            // SAFETY: the page lies in the tail, and rows are registered while this value keeps them.
            unsafe { Probe::copy(&self.stream, to, host.page_address(layer, self.seats[slot][chunk]), page_bytes)? };
        }
        self.stream.synchronize().doing("fetching rows")
    }

    /// Device address of the pages from the horizon on of a slot in a layer: chunk c lies at page `c % tail_chunks`.
    #[must_use]
    pub fn tail_address(&self, layer: usize, slot: usize) -> u64 {
        self.layers[layer].tail.address_of(slot * self.shape.tail_chunks * self.shape.geometry.page_bytes())
    }

    /// Copies rows of consecutive positions of one lane to the places where [`Kept::Everything`] expects them.
    ///
    /// # Errors
    /// A failed copy.
    pub fn load_rows(&mut self, layer: usize, slot: usize, lane: usize, first_row: usize, rows: &[u8]) -> Result<(), CudaError> {
        assert_eq!(self.shape.kept, Kept::Everything, "a pool fetches rows by itself");
        let at = ((slot * self.shape.lanes() + lane) * self.shape.pool() + first_row) * self.shape.geometry.row_bytes();
        self.layers[layer].hot.write(&self.stream, at, rows)
    }

    /// Copies queries of one layer, `[slot][query head][head_dim]`.
    ///
    /// # Errors
    /// A failed copy.
    pub fn set_queries(&mut self, layer: usize, queries: &[f32]) -> Result<(), CudaError> {
        let values = self.shape.slots * self.shape.geometry.heads.query_heads() * self.shape.geometry.head_dim;
        assert_eq!(queries.len(), values, "queries of all slots");
        self.queries.write(&self.stream, layer * values, queries)
    }

    /// Copies newest rows of one layer, `[slot][lane][row_bytes]`.
    ///
    /// # Errors
    /// A failed copy.
    pub fn set_new_rows(&mut self, layer: usize, rows: &[u8]) -> Result<(), CudaError> {
        let bytes = self.shape.slots * self.shape.lanes() * self.shape.geometry.row_bytes();
        assert_eq!(rows.len(), bytes, "newest rows of all slots");
        self.new_rows.write(&self.stream, layer * bytes, rows)
    }

    /// Copies keys of a trace, `[lane][trace_rows]`, of one layer and slot.
    ///
    /// # Errors
    /// A failed copy.
    pub fn set_trace(&mut self, layer: usize, slot: usize, keys: &[u16]) -> Result<(), CudaError> {
        let values = self.shape.lanes() * self.shape.trace_rows.unwrap_or(0);
        assert_eq!(keys.len(), values, "keys of all lanes");
        self.trace.write(&self.stream, (layer * self.shape.slots + slot) * values, keys)
    }

    /// Forgets all hot rows of a slot.
    ///
    /// # Errors
    /// A failed call.
    pub fn forget_hot_rows(&mut self, slot: usize) -> Result<(), CudaError> {
        let (lanes, pool, rows) = (self.shape.lanes(), self.shape.pool(), self.shape.max_tokens);
        for layer in &mut self.layers {
            if !layer.map.is_empty() {
                layer.map.fill(&self.stream, slot * lanes * rows..(slot + 1) * lanes * rows)?;
                layer.owner.fill(&self.stream, slot * lanes * pool..(slot + 1) * lanes * pool)?;
            }
        }
        Ok(())
    }

    /// Enqueues the states that [`Batch::set_length`] set.
    ///
    /// # Errors
    /// A failed copy.
    pub fn send_states(&mut self) -> Result<(), CudaError> {
        // SAFETY: the states are pinned, belong to this value, and are changed after the stream was waited for or by set_length, whose
        // callers step once per change.
        unsafe { self.device_states.write_async(&self.stream, 0, &self.states) }
    }

    /// Enqueues one layer of a sparse step.
    ///
    /// # Errors
    /// A failed launch.
    pub fn enqueue_layer(&self, layer: usize) -> Result<(), CudaError> {
        // SAFETY: every address of the job is of a buffer of this value, or of a host segment registered for as long as planes name it.
        unsafe { self.kernels.sparse_layer(&self.stream, &self.grid, &self.jobs[layer]) }
    }

    /// Enqueues the exact attention of one layer over all rows kept: for [`Kept::Everything`] and settings that select everything.
    ///
    /// # Errors
    /// A failed launch.
    pub fn enqueue_dense_layer(&self, layer: usize) -> Result<(), CudaError> {
        // SAFETY: as above.
        unsafe {
            self.kernels.append(&self.stream, &self.grid, &self.jobs[layer])?;
            self.kernels.attend(&self.stream, &self.grid, &self.jobs[layer])
        }
    }

    /// Enqueues one part of one layer of a sparse step: 0 score, 1 select, 2 victims, 3 gather, 4 attend. For benches that time
    /// them one by one.
    ///
    /// # Errors
    /// A failed launch.
    pub fn enqueue_part(&self, layer: usize, part: usize) -> Result<(), CudaError> {
        let (stream, grid, job) = (&self.stream, &self.grid, &self.jobs[layer]);
        // SAFETY: as above.
        unsafe {
            match part {
                0 => self.kernels.score(stream, grid, job),
                1 => self.kernels.select(stream, grid, job),
                2 => self.kernels.pick_victims(stream, grid, job),
                3 => self.kernels.gather(stream, grid, job),
                _ => self.kernels.attend(stream, grid, job),
            }
        }
    }

    /// Captures what `enqueue` puts on the stream as a graph.
    ///
    /// # Errors
    /// A failed capture.
    pub fn capture(&self, enqueue: impl FnOnce() -> Result<(), CudaError>) -> Result<CudaGraph, CudaError> {
        let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        self.stream.begin_capture(mode).doing("beginning a capture")?;
        let enqueued = enqueue();
        let graph = self.stream.end_capture(sys::CUgraphInstantiate_flags(0)).doing("ending a capture");
        enqueued?;
        graph?.ok_or(CudaError::NothingCaptured)
    }

    /// Waits for the stream.
    ///
    /// # Errors
    /// A failure of the device.
    pub fn wait(&self) -> Result<(), CudaError> {
        self.stream.synchronize().doing("waiting for a step")
    }

    /// Outputs of one layer, `[slot][query head][head_dim]`, and their natural log-sum-exps. Waits.
    ///
    /// # Errors
    /// A failed copy.
    pub fn outputs(&self, layer: usize) -> Result<(Vec<f32>, Vec<f32>), CudaError> {
        let heads = self.shape.slots * self.shape.geometry.heads.query_heads();
        let (mut output, mut lse) = (vec![0.0; heads * self.shape.geometry.head_dim], vec![0.0; heads]);
        self.outputs.read(&self.stream, layer * output.len(), &mut output)?;
        self.lse.read(&self.stream, layer * heads, &mut lse)?;
        Ok((output, lse))
    }

    /// Positions that a slot selected in the layer that was enqueued last, `[lane][count]`. Waits.
    ///
    /// # Errors
    /// A failed copy.
    pub fn positions(&self, slot: usize) -> Result<Vec<u32>, CudaError> {
        let (lanes, max) = (self.shape.lanes(), self.shape.max_count);
        let count = self.states[slot].count as usize;
        let mut positions = vec![0; lanes * count];
        for (lane, positions) in positions.chunks_exact_mut(count.max(1)).enumerate() {
            self.workspace.positions.read(&self.stream, (slot * lanes + lane) * max, positions)?;
        }
        Ok(positions)
    }

    /// Keys that a slot computed in the layer that was enqueued last, `[lane][row]`. Waits.
    ///
    /// # Errors
    /// A failed copy.
    pub fn keys(&self, slot: usize) -> Result<Vec<u16>, CudaError> {
        let (lanes, rows) = (self.shape.lanes(), self.states[slot].chunks as usize * CHUNK_TOKENS);
        let mut keys = vec![0; lanes * rows];
        for (lane, keys) in keys.chunks_exact_mut(rows.max(1)).enumerate() {
            self.workspace.keys.read(&self.stream, (slot * lanes + lane) * self.shape.max_tokens, keys)?;
        }
        Ok(keys)
    }

    /// Hits and misses since the last call, `[layer][slot][lane]`. Waits.
    ///
    /// # Errors
    /// A failed copy.
    pub fn take_counters(&mut self) -> Result<Vec<[u64; 2]>, CudaError> {
        let mut counts = vec![[0; 2]; self.counters.len()];
        self.counters.read(&self.stream, 0, &mut counts)?;
        self.counters.clear(&self.stream, 0..counts.len())?;
        Ok(counts)
    }
}

impl Workspace {
    fn new(gpu: &Gpu, shape: &BatchShape) -> Result<Self, CudaError> {
        let context = &gpu.context;
        let (lanes, group) = (shape.slots * shape.lanes(), shape.geometry.heads.group());
        let listed = lanes * shape.max_count;
        Ok(Self {
            weights: DeviceBuffer::zeroed(context, lanes * group * (shape.plan.channels() / 4 + shape.plan.groups().len()))?,
            label_lse: DeviceBuffer::zeroed(context, lanes * group * SAMPLE_PARTS * 2)?,
            keys: DeviceBuffer::zeroed(context, lanes * shape.max_tokens)?,
            histogram: DeviceBuffer::zeroed(context, lanes * BINS)?,
            above: DeviceBuffer::zeroed(context, lanes * PARTS * (2 + REFINED))?,
            positions: DeviceBuffer::zeroed(context, listed)?,
            hot_places: DeviceBuffer::zeroed(context, listed)?,
            misses: DeviceBuffer::zeroed(context, listed)?,
            part_counts: DeviceBuffer::zeroed(context, lanes * PARTS)?,
            victim_bins: DeviceBuffer::zeroed(context, lanes * BINS)?,
            victims: DeviceBuffer::zeroed(context, listed)?,
            victim_counts: DeviceBuffer::zeroed(context, lanes)?,
            partials: DeviceBuffer::zeroed(context, lanes * shape.attend_blocks() * group * (shape.geometry.head_dim + 2))?,
        })
    }

    fn bytes(&self) -> u64 {
        let words = self.positions.bytes() + self.hot_places.bytes() + self.misses.bytes() + self.victims.bytes();
        let bins = self.histogram.bytes() + self.above.bytes() + self.victim_bins.bytes() + self.victim_counts.bytes();
        (words
            + bins
            + self.weights.bytes()
            + self.label_lse.bytes()
            + self.keys.bytes()
            + self.part_counts.bytes()
            + self.partials.bytes()) as u64
    }
}

impl Layer {
    fn new(gpu: &Gpu, compiler: &Compiler, stream: &Arc<CudaStream>, shape: &BatchShape, coder: &LabelCoder) -> Result<Self, CudaError> {
        let context = &gpu.context;
        let (lanes, pool) = (shape.slots * shape.lanes(), shape.pool());
        let mapped = matches!(shape.kept, Kept::Pool(_));
        let in_map = if mapped { lanes } else { 0 };
        let mut layer = Self {
            labels: DeviceBuffer::zeroed(context, lanes * shape.max_tokens * shape.plan.label_bytes())?,
            tail: DeviceBuffer::zeroed(context, shape.slots * shape.tail_chunks * shape.geometry.page_bytes())?,
            hot: DeviceBuffer::zeroed(context, lanes * pool * shape.geometry.row_bytes())?,
            map: DeviceBuffer::filled(context, in_map * shape.max_tokens)?,
            owner: DeviceBuffer::filled(context, in_map * pool)?,
            places: DeviceBuffer::zeroed(context, shape.slots)?,
            planes: DeviceBuffer::zeroed(context, MAX_SEGMENTS)?,
            labeller: Labeller::new(gpu, compiler, stream, &shape.geometry, coder)?,
        };
        let places: Vec<LayerPlace> = (0..shape.slots).map(|slot| layer.place(shape, slot)).collect();
        layer.places.write(stream, 0, &places)?;
        Ok(layer)
    }

    fn place(&self, shape: &BatchShape, slot: usize) -> LayerPlace {
        let (lanes, pool) = (slot * shape.lanes(), shape.pool());
        let mapped = !self.map.is_empty();
        LayerPlace {
            labels: self.labels.address_of(lanes * shape.max_tokens * shape.plan.label_bytes()),
            tail: self.tail.address_of(slot * shape.tail_chunks * shape.geometry.page_bytes()),
            hot: self.hot.address_of(lanes * pool * shape.geometry.row_bytes()),
            map: if mapped { self.map.address_of(lanes * shape.max_tokens) } else { 0 },
            owner: if mapped { self.owner.address_of(lanes * pool) } else { 0 },
            pool: pool as u32,
            tail_chunks: shape.tail_chunks as u32,
        }
    }
}
