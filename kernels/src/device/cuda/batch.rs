//! A batch: what the step over several seats needs besides their memory, and the step itself.
//!
//! Rows before the horizon stay in host memory, in segments that the device reads across the link. Everything is allocated here, once; a
//! step allocates nothing and waits for nothing. What a graph's kernels find to do is in device tables ([`SequenceState`]), which change
//! between launches only, so that one captured graph serves every length.

use std::sync::Arc;

use cudarc::driver::{CudaGraph, CudaStream, sys};

use super::buffer::{DeviceBuffer, PinnedBuffer};
use super::compile::Compiler;
use super::error::{CudaError, Doing};
use super::host::{HostPage, HostPart, HostRows, HostSegment};
use super::jobs::{BINS, LayerPlace, NOBODY, PART_WORDS, PARTS, SAMPLE_SUMS, SequenceState, StepJob};
use super::joint::{CommonChunks, Joins, JointKernels};
use super::label::Labeller;
use super::module::Specialisation;
use super::open::Gpu;
use super::pipeline::{Pipeline, StepBlocks};
use super::seat::{DeviceBytes, Seat, bound};
use super::step::{ITEMS_ALONE, MAX_LANES, StepKernels};
use super::store::{BlockMove, PoolMove};
use super::workspace::Workspace;
use crate::budget::Settings;
use crate::device::LayerGeometry;
use crate::label::{LabelCoder, LabelPlan};
use crate::scales::LaneScales;
use crate::slot::CHUNK_TOKENS;

/// Host segments that a batch can name.
pub const MAX_SEGMENTS: usize = 4096;

/// Blocks of the gather where nothing else was measured (docs/decisions/0004-the-gpu-step.md).
pub const GATHER_BLOCKS: usize = 128;

/// Moves of hot places at a time.
const MAX_MOVES: usize = 4096;

/// Attention blocks that make one wave on an H100: 132 processors, two blocks each. A constant, so that devices agree to the bit.
const WAVE_BLOCKS: usize = 2 * 132;

/// What a batch has room for.
#[derive(Clone, Debug, PartialEq)]
pub struct BatchShape {
    /// Shape of the rows of every layer; scales are each layer's own.
    pub geometry: LayerGeometry,
    /// Labels.
    pub plan: LabelPlan,
    /// Seats at a time.
    pub slots: usize,
    /// Tokens of a sequence: a multiple of 256.
    pub max_tokens: usize,
    /// Rows that a lane selects at most.
    pub max_count: usize,
    /// Rows that a lane attends at most, selected or not.
    pub max_entries: usize,
    /// Blocks of the gather.
    pub gather_blocks: usize,
    /// Whether selections of a trace replace the computed ones: `Some(rows of the trace)`, for benches.
    pub trace_rows: Option<usize>,
}

/// One layer of a batch.
#[derive(Clone, Debug)]
pub struct BatchLayer<'a> {
    /// What its labels mean.
    pub coder: &'a LabelCoder,
    /// Scales of its lanes, where rows are scaled.
    pub scales: LaneScales,
    /// Where its rows lie on the host.
    pub host: HostPart,
}

/// One layer's tables.
struct Layer {
    /// By segment.
    planes: DeviceBuffer<u64>,
    labeller: Labeller,
    host: HostPart,
}

/// Seats and the step over them.
pub struct Batch {
    pub(super) shape: BatchShape,
    stream: Arc<CudaStream>,
    pub(super) pipeline: Pipeline,
    layers: Vec<Layer>,
    /// By layer, by slot.
    pub(super) jobs: Vec<Vec<StepJob>>,
    /// `[slot][layer]`.
    places: DeviceBuffer<LayerPlace>,
    pub(super) seats: Vec<Option<Arc<Seat>>>,
    /// By number: segments that planes name, kept for as long.
    segments: Vec<Option<Arc<HostSegment>>>,
    pub(super) states: PinnedBuffer<SequenceState>,
    device_states: DeviceBuffer<SequenceState>,
    /// `[layer][slot][query head][head_dim]`, and the outputs.
    pub(super) queries: DeviceBuffer<f32>,
    outputs: DeviceBuffer<f32>,
    lse: DeviceBuffer<f32>,
    /// `[layer][slot][lane][row_bytes]`.
    new_rows: DeviceBuffer<u8>,
    /// `[layer][slot][lane]`: hits and misses.
    counters: DeviceBuffer<[u64; 2]>,
    /// `[layer][slot][lane][trace_rows]`.
    trace: DeviceBuffer<u16>,
    moves: DeviceBuffer<BlockMove>,
    workspace: Workspace,
    /// Who is scored with whom.
    pub(super) joins: Joins,
    pub(super) common: CommonChunks,
}

impl BatchShape {
    /// Rows of an attention block for `entries` rows a lane: one wave of blocks over all lanes of a sequence. Results depend on it.
    #[must_use]
    pub fn block_rows(entries: usize, lanes: usize) -> usize {
        (entries * lanes).div_ceil(WAVE_BLOCKS).next_multiple_of(64).max(64)
    }

    pub(super) fn lanes(&self) -> usize {
        self.geometry.heads.lanes()
    }

    /// Most attention blocks of a lane, of any number of entries.
    pub(super) fn attend_blocks(&self) -> usize {
        Self::most_blocks(self.max_entries, self.lanes())
    }

    /// Attention blocks of a lane, of up to `entries` entries.
    pub(super) fn most_blocks(entries: usize, lanes: usize) -> usize {
        entries.div_ceil(64).min(WAVE_BLOCKS.div_ceil(lanes)).max(1)
    }

    /// Values of a lane's partial results: by block, by query head of the group, output and two more.
    pub(super) fn lane_partials(&self) -> usize {
        self.attend_blocks() * self.geometry.heads.group() * (self.geometry.head_dim + 2)
    }

    /// Device memory of a batch of so many layers beside its seats, in bytes.
    #[must_use]
    pub fn own_bytes(&self, layers: usize) -> u64 {
        let (slots, lanes, heads) = (layers * self.slots, layers * self.slots * self.lanes(), self.geometry.heads.query_heads());
        let tables = layers * MAX_SEGMENTS * size_of::<u64>()
            + slots * size_of::<LayerPlace>()
            + self.slots * size_of::<SequenceState>()
            + lanes * (size_of::<[u64; 2]>() + self.geometry.row_bytes() + self.trace_rows.unwrap_or(0) * size_of::<u16>())
            + MAX_MOVES * size_of::<BlockMove>();
        let vectors = slots * heads * (2 * self.geometry.head_dim + 1) * size_of::<f32>();
        Workspace::bytes_of(self) + (tables + vectors) as u64
    }

    fn check(&self) -> Result<(), CudaError> {
        bound("lanes", self.lanes(), 1, MAX_LANES)?;
        bound("slots", self.slots, 1, 65_535)?;
        bound("gather_blocks", self.gather_blocks, 1, 1024)?;
        bound("max_tokens", self.max_tokens, CHUNK_TOKENS, 1 << 24)?;
        bound("max_tokens modulo 256", self.max_tokens % CHUNK_TOKENS, 0, 0)?;
        bound("max_count", self.max_count, 0, self.max_tokens)
    }
}

impl Batch {
    /// Compiles the kernels and allocates everything; no seat is taken. Steps, and what seats are told between them, go to `stream`.
    ///
    /// # Errors
    /// A shape out of bounds, memory that the device does not have, or what the compiler says.
    pub fn new(
        gpu: &Gpu,
        compiler: &Compiler,
        stream: &Arc<CudaStream>,
        shape: &BatchShape,
        layers: &[BatchLayer<'_>],
    ) -> Result<Self, CudaError> {
        shape.check()?;
        let mut specialisation = Specialisation::labels(&shape.geometry, &shape.plan);
        specialisation.replays_trace = shape.trace_rows.is_some();
        let kernels = StepKernels::load(gpu, compiler, &specialisation)?;
        let heads = shape.geometry.heads.query_heads();
        let context = &gpu.context;
        let (all, values) = (layers.len() * shape.slots, layers.len() * shape.slots * heads);
        // Traces replace the keys of one sequence at a time.
        let joint =
            if shape.slots > 1 && !specialisation.replays_trace { JointKernels::load(gpu, compiler, &specialisation)? } else { None };
        let blocks = StepBlocks { lanes: shape.lanes(), gather: shape.gather_blocks, attend: shape.attend_blocks() };
        let mut batch = Self {
            pipeline: Pipeline::new(gpu, kernels, joint, stream, blocks, shape.slots)?,
            places: DeviceBuffer::zeroed(stream, all)?,
            layers: Vec::with_capacity(layers.len()),
            jobs: Vec::new(),
            seats: vec![None; shape.slots],
            segments: Vec::new(),
            states: PinnedBuffer::zeroed(context, shape.slots)?,
            device_states: DeviceBuffer::zeroed(stream, shape.slots)?,
            queries: DeviceBuffer::zeroed(stream, values * shape.geometry.head_dim)?,
            outputs: DeviceBuffer::zeroed(stream, values * shape.geometry.head_dim)?,
            lse: DeviceBuffer::zeroed(stream, values)?,
            new_rows: DeviceBuffer::zeroed(stream, all * shape.lanes() * shape.geometry.row_bytes())?,
            counters: DeviceBuffer::zeroed(stream, all * shape.lanes())?,
            trace: DeviceBuffer::zeroed(stream, all * shape.lanes() * shape.trace_rows.unwrap_or(0))?,
            moves: DeviceBuffer::uninitialised(context, MAX_MOVES)?,
            workspace: Workspace::new(stream, shape)?,
            joins: Joins::default(),
            common: CommonChunks::default(),
            shape: BatchShape { geometry: shape.geometry.unscaled(), ..shape.clone() },
            stream: Arc::clone(stream),
        };
        for layer in layers {
            let layer = Layer::new(gpu, compiler, stream, shape, layer)?;
            batch.layers.push(layer);
        }
        batch.jobs = (0..layers.len()).map(|layer| (0..shape.slots).map(|slot| batch.job(layer, slot)).collect()).collect();
        Ok(batch)
    }

    /// One layer's part of a step of one slot.
    fn job(&self, layer: usize, slot: usize) -> StepJob {
        let (shape, of_layer, room) = (&self.shape, &self.layers[layer], &self.workspace);
        let (lanes, heads) = (shape.lanes(), shape.geometry.heads.query_heads());
        // Of tables by layer and slot, and of the room that layers share, which is by slot.
        let (at, lane) = (layer * shape.slots + slot, slot * lanes);
        let trace_rows = shape.trace_rows.unwrap_or(0);
        let listed = lane * shape.max_count;
        StepJob {
            sequences: self.device_states.address_of(slot),
            places: self.places.address_of(slot * self.layers.len() + layer),
            planes: of_layer.planes.address(),
            new_rows: self.new_rows.address_of(at * lanes * shape.geometry.row_bytes()),
            page_bytes: shape.geometry.page_bytes() as u64,
            host_page_bytes: of_layer.host.page_bytes,
            scales: of_layer.labeller.scales(),
            channels: of_layer.labeller.channels(),
            steps: of_layer.labeller.steps(),
            query: self.queries.address_of(at * heads * shape.geometry.head_dim),
            output: self.outputs.address_of(at * heads * shape.geometry.head_dim),
            lse: self.lse.address_of(at * heads),
            label_lse: room.label_lse.address_of(slot * heads * SAMPLE_SUMS),
            keys: room.keys.address_of(lane * shape.max_tokens),
            histogram: room.histogram.address_of(lane * BINS),
            part_words: room.part_words.address_of(lane * PARTS * PART_WORDS),
            positions: room.positions.address_of(listed),
            hot_places: room.hot_places.address_of(listed),
            misses: room.misses.address_of(listed),
            part_counts: room.part_counts.address_of(lane * PARTS),
            victims: room.victims.address_of(listed),
            victim_counts: room.victim_counts.address_of(lane),
            partials: room.partials.address_of(lane * shape.lane_partials()),
            arrivals: room.arrivals.address_of(lane),
            counters: self.counters.address_of(at * lanes),
            trace: if trace_rows > 0 { self.trace.address_of(at * lanes * trace_rows) } else { 0 },
            lanes: lanes as u32,
            first_lane: 0,
            lane_count: lanes as u32,
            max_rows: shape.max_tokens as u32,
            max_count: shape.max_count as u32,
            max_blocks: shape.attend_blocks() as u32,
            trace_rows: trace_rows as u32,
            score_scale: shape.geometry.softmax_scale * std::f32::consts::LOG2_E,
            parts: PARTS as u32,
            items: ITEMS_ALONE,
            appends: 0,
            unused: 0,
        }
    }

    /// What this batch has room for.
    #[must_use]
    pub fn shape(&self) -> &BatchShape {
        &self.shape
    }

    /// Layers.
    #[must_use]
    pub fn layers(&self) -> usize {
        self.layers.len()
    }

    /// The stream of its steps.
    #[must_use]
    pub fn stream(&self) -> &Arc<CudaStream> {
        &self.stream
    }

    /// Device memory of the batch and of those who sit in it.
    #[must_use]
    pub fn bytes(&self) -> DeviceBytes {
        let mut bytes = DeviceBytes { workspace: self.own_bytes(), ..DeviceBytes::default() };
        self.seats.iter().flatten().for_each(|seat| bytes += seat.shape().bytes());
        bytes
    }

    /// Device memory of the batch beside its seats, in bytes: [`BatchShape::own_bytes`].
    #[must_use]
    pub fn own_bytes(&self) -> u64 {
        let of_layers: usize = self.layers.iter().map(|layer| layer.planes.bytes()).sum();
        let tables = self.places.bytes() + self.device_states.bytes() + self.counters.bytes() + self.new_rows.bytes() + self.trace.bytes();
        let tables = tables + self.moves.bytes();
        let vectors = self.queries.bytes() + self.outputs.bytes() + self.lse.bytes();
        self.workspace.bytes() + (of_layers + tables + vectors) as u64
    }

    /// Tells the batch where the rows of `host` lie, by their numbers. Between steps.
    ///
    /// # Errors
    /// More segments than a table has, or a failed copy.
    pub fn set_host(&mut self, host: &HostRows) -> Result<(), CudaError> {
        host.segments().iter().enumerate().try_for_each(|(number, segment)| self.set_segment(number, segment))
    }

    /// Gives segment `number` a meaning. Between steps.
    ///
    /// # Errors
    /// A number that tables have no place for, or a failed copy.
    pub fn set_segment(&mut self, number: usize, segment: &Arc<HostSegment>) -> Result<(), CudaError> {
        bound("segments", number + 1, 1, MAX_SEGMENTS)?;
        for layer in &self.layers {
            let address = layer.host.address(HostPage { segment, slot: 0 });
            layer.planes.write(&self.stream, number, &[address])?;
        }
        if self.segments.len() <= number {
            self.segments.resize(number + 1, None);
        }
        self.segments[number] = Some(Arc::clone(segment));
        Ok(())
    }

    /// The segment that has a number.
    #[must_use]
    pub fn segment(&self, number: usize) -> Option<&Arc<HostSegment>> {
        self.segments.get(number)?.as_ref()
    }

    /// Lets go of a segment that no seat names any more. Between steps.
    pub fn forget_segment(&mut self, number: usize) {
        if let Some(segment) = self.segments.get_mut(number) {
            *segment = None;
        }
    }

    /// Seats a sequence. Between steps.
    ///
    /// # Errors
    /// A seat that is longer than the batch has room for, or a failed copy.
    pub fn sit(&mut self, slot: usize, seat: &Arc<Seat>) -> Result<(), CudaError> {
        assert!(seat.shape().geometry.unscaled() == self.shape.geometry && seat.shape().plan == self.shape.plan, "seats of this shape");
        assert_eq!(seat.shape().layers, self.layers.len(), "layers of the seat");
        bound("tokens of the seat", seat.shape().max_tokens, 0, self.shape.max_tokens)?;
        let places: Vec<LayerPlace> = (0..self.layers.len()).map(|layer| seat.place(layer)).collect();
        self.places.write(&self.stream, slot * places.len(), &places)?;
        self.seats[slot] = Some(Arc::clone(seat));
        self.states[slot] = SequenceState::default();
        Ok(())
    }

    /// Empties a slot: steps pass it over.
    pub fn leave(&mut self, slot: usize) {
        self.seats[slot] = None;
        self.states[slot] = SequenceState::default();
    }

    /// Who sits in a slot.
    #[must_use]
    pub fn seat(&self, slot: usize) -> Option<&Arc<Seat>> {
        self.seats[slot].as_ref()
    }

    fn seated(&self, slot: usize) -> &Arc<Seat> {
        self.seats[slot].as_ref().unwrap_or_else(|| panic!("nobody sits in slot {slot}"))
    }

    /// What the next step does for a slot: the length with the query's own token, by the sequence's settings. Takes effect at the next
    /// [`Batch::send_states`].
    ///
    /// # Errors
    /// A length or a budget that there is no room for.
    pub fn set_length(&mut self, slot: usize, length: usize, settings: &Settings, append_to: Option<u32>) -> Result<(), CudaError> {
        let (horizon, count) = (settings.horizon(length), settings.selected_tokens(length));
        let seat = Arc::clone(self.seated(slot));
        bound("length", length, 0, seat.shape().max_tokens)?;
        bound("selected rows", count, 0, self.shape.max_count.min(seat.least_pool()))?;
        let state = SequenceState {
            length: length as u32,
            chunks: (horizon / CHUNK_TOKENS) as u32,
            count: count as u32,
            sinks: settings.sink_tokens.min(count as u32),
            append_to: append_to.unwrap_or(NOBODY),
            ..SequenceState::default()
        };
        self.set_state(slot, &seat, state)
    }

    /// A step that attends every row up to `length` exactly, from the tail's pages.
    ///
    /// # Errors
    /// A length that the tail has no room for.
    pub fn set_dense_length(&mut self, slot: usize, length: usize) -> Result<(), CudaError> {
        let seat = Arc::clone(self.seated(slot));
        self.set_state(slot, &seat, SequenceState { length: length as u32, append_to: NOBODY, ..SequenceState::default() })
    }

    fn set_state(&mut self, slot: usize, seat: &Seat, state: SequenceState) -> Result<(), CudaError> {
        let exact = state.length as usize - state.chunks as usize * CHUNK_TOKENS;
        let entries = state.count as usize + exact;
        bound("chunks from the horizon on", exact.div_ceil(CHUNK_TOKENS), 0, seat.shape().tail_chunks)?;
        bound("attended rows", entries, 0, self.shape.max_entries)?;
        self.states[slot] = SequenceState {
            slots: seat.host_places_address(),
            label_slots: seat.label_places_address(),
            block_rows: BatchShape::block_rows(entries, self.shape.lanes()) as u32,
            ..state
        };
        Ok(())
    }

    /// Labels the chunks from `first` on of a seat in one layer from their rows on the host. Waits.
    ///
    /// # Errors
    /// More chunks than there is room for, or a failed launch.
    pub fn make_labels(&self, layer: usize, seat: &Seat, first: usize, pages: &[HostPage<'_>]) -> Result<(), CudaError> {
        bound("chunks", first + pages.len(), 0, seat.shape().chunks())?;
        let labels: Vec<u64> = (first..first + pages.len()).map(|chunk| seat.label_address(layer, chunk)).collect();
        self.make_labels_at(layer, &labels, pages)
    }

    /// Labels chunks in one layer from their rows on the host, each to its address of a label page. Waits.
    ///
    /// # Errors
    /// A failed launch.
    pub(crate) fn make_labels_at(&self, layer: usize, labels: &[u64], pages: &[HostPage<'_>]) -> Result<(), CudaError> {
        assert_eq!(labels.len(), pages.len(), "an address for each chunk");
        let of_layer = &self.layers[layer];
        let pages: Vec<u64> = pages.iter().map(|&page| of_layer.host.address(page)).collect();
        let (pages, labels) = (DeviceBuffer::from_slice(&self.stream, &pages)?, DeviceBuffer::from_slice(&self.stream, labels)?);
        // SAFETY: the tables live until the stream has been waited for, label pages are the seat's own, and rows are registered while
        // their segments are borrowed.
        unsafe { of_layer.labeller.launch(&self.stream, pages.address(), labels.address(), pages.len())? };
        self.stream.synchronize().doing("labelling")
    }

    /// What makes the labels of a layer.
    pub(super) fn labeller(&self, layer: usize) -> &Labeller {
        &self.layers[layer].labeller
    }

    /// Where the rows of a layer lie on the host.
    pub(super) fn host_part(&self, layer: usize) -> &HostPart {
        &self.layers[layer].host
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
        self.seated(slot).forget_hot_rows(&self.stream)
    }

    /// Gives blocks of hot places of a slot's seat to other lanes, in order; no lane both gives and takes. Who gives a block forgets the rows in
    /// it. Between steps; waits.
    ///
    /// # Errors
    /// A move that is impossible: nothing has moved then. Or a failed call.
    pub fn move_blocks(&mut self, slot: usize, moves: &[PoolMove]) -> Result<(), CudaError> {
        let orders = self.seated(slot).note_moves(moves)?;
        for orders in orders.chunks(MAX_MOVES) {
            self.moves.write(&self.stream, 0, orders)?;
            // SAFETY: the orders name tables of the seat, which sits here, and the table of orders is this value's.
            unsafe { self.pipeline.move_blocks(self.moves.address(), orders.len())? };
        }
        Ok(())
    }

    /// Enqueues the states that [`Batch::set_length`] set.
    ///
    /// # Errors
    /// A failed copy.
    pub fn send_states(&mut self) -> Result<(), CudaError> {
        self.note_common_chunks();
        // SAFETY: the states are pinned, belong to this value, and are changed after the stream was waited for or by set_length, whose
        // callers step once per change.
        unsafe { self.device_states.write_async(&self.stream, 0, &self.states) }
    }

    /// Enqueues the copies of queries, `[slot][query head][head_dim]`, and newest rows, `[slot][lane][row_bytes]`, of slots from `first` on in
    /// one layer.
    ///
    /// # Safety
    /// Both stay as they are until the stream has passed this point.
    ///
    /// # Errors
    /// A copy that the driver refuses.
    pub(super) unsafe fn send_inputs(&self, layer: usize, first: usize, queries: &[f32], new_rows: &[u8]) -> Result<(), CudaError> {
        let (geometry, at) = (&self.shape.geometry, layer * self.shape.slots + first);
        // SAFETY: the caller's promise.
        unsafe {
            self.queries.write_async(&self.stream, at * geometry.heads.query_heads() * geometry.head_dim, queries)?;
            self.new_rows.write_async(&self.stream, at * self.shape.lanes() * geometry.row_bytes(), new_rows)
        }
    }

    /// Enqueues the copies of results of slots from `first` on in one layer: outputs, log-sum-exps and counters.
    ///
    /// # Safety
    /// They are used by nobody else until the stream has passed this point.
    ///
    /// # Errors
    /// A copy that the driver refuses.
    pub(super) unsafe fn fetch_results(
        &self,
        layer: usize,
        first: usize,
        outputs: &mut [f32],
        lse: &mut [f32],
        counters: &mut [[u64; 2]],
    ) -> Result<(), CudaError> {
        let (at, heads) = (layer * self.shape.slots + first, self.shape.geometry.heads.query_heads());
        // SAFETY: the caller's promise.
        unsafe {
            self.outputs.read_async(&self.stream, at * heads * self.shape.geometry.head_dim, outputs)?;
            self.lse.read_async(&self.stream, at * heads, lse)?;
            self.counters.read_async(&self.stream, at * self.shape.lanes(), counters)
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

impl Layer {
    fn new(
        gpu: &Gpu,
        compiler: &Compiler,
        stream: &Arc<CudaStream>,
        shape: &BatchShape,
        layer: &BatchLayer<'_>,
    ) -> Result<Self, CudaError> {
        let geometry = LayerGeometry { scales: layer.scales.clone(), ..shape.geometry.clone() };
        Ok(Self {
            planes: DeviceBuffer::zeroed(stream, MAX_SEGMENTS)?,
            labeller: Labeller::new(gpu, compiler, stream, &geometry, layer.coder)?,
            host: layer.host.clone(),
        })
    }
}
