//! One layer of a step for callers whose queries and results lie in host memory: inputs go to the device, a captured graph runs, results
//! come back, and only then does the call return.

use std::collections::HashMap;
use std::ops::Range;

use cudarc::driver::CudaGraph;

use super::batch::Batch;
use super::buffer::PinnedBuffer;
use super::cut::Cut;
use super::error::{CudaError, Doing};
use super::joint::Joins;
use super::open::Gpu;

/// What a layer of a step does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum LayerWork {
    /// Scores, selects, fetches and attends.
    Sparse,
    /// Attends the rows from the horizon on: for steps that select nothing.
    Exact,
    /// Scores, selects and fetches: what a step with the same query would then find. Outputs are those of before.
    Ahead,
}

/// What a captured layer does.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct LayerKey {
    layer: usize,
    work: LayerWork,
    slots: Range<usize>,
    cut: Cut,
    joins: Joins,
}

/// Graphs of a layer that are kept: a batch whose slots are filled in ever new ways begins again.
const MOST_GRAPHS: usize = 64;

/// A captured layer.
struct LayerGraph(CudaGraph);

// SAFETY: a graph belongs to its context, not to a thread; this value is used by one thread at a time.
unsafe impl Send for LayerGraph {}

/// A batch with pinned room for one layer's inputs and results.
pub struct HostStep {
    batch: Batch,
    graphs: HashMap<LayerKey, LayerGraph>,
    /// `[slot][query head][head_dim]`, and the outputs.
    queries: PinnedBuffer<f32>,
    outputs: PinnedBuffer<f32>,
    lse: PinnedBuffer<f32>,
    /// `[slot][lane][row_bytes]`.
    new_rows: PinnedBuffer<u8>,
    /// `[slot][lane]`: hits and misses since the beginning, by the last step.
    counters: PinnedBuffer<[u64; 2]>,
    /// `[layer][slot][lane]`: the same before it.
    counted: Vec<[u64; 2]>,
    /// `[layer][slot]`: rows that the last step missed.
    missed: Vec<u64>,
}

/// Results of a slot.
#[derive(Clone, Copy, Debug)]
pub struct SlotResult<'a> {
    /// `[query head][head_dim]`.
    pub output: &'a [f32],
    /// `[query head]`, natural.
    pub lse: &'a [f32],
    /// By lane: selected rows that were hot, and those that were not.
    pub counts: &'a [[u64; 2]],
}

impl HostStep {
    /// Pinned room for a batch.
    ///
    /// # Errors
    /// Memory that cannot be pinned.
    pub fn new(gpu: &Gpu, batch: Batch) -> Result<Self, CudaError> {
        let (shape, layers) = (batch.shape(), batch.layers());
        let heads = shape.slots * shape.geometry.heads.query_heads();
        let lanes = shape.slots * shape.geometry.heads.lanes();
        let context = &gpu.context;
        Ok(Self {
            graphs: HashMap::new(),
            queries: PinnedBuffer::zeroed(context, heads * shape.geometry.head_dim)?,
            outputs: PinnedBuffer::zeroed(context, heads * shape.geometry.head_dim)?,
            lse: PinnedBuffer::zeroed(context, heads)?,
            new_rows: PinnedBuffer::zeroed(context, lanes * shape.geometry.row_bytes())?,
            counters: PinnedBuffer::zeroed(context, lanes)?,
            counted: vec![[0; 2]; layers * lanes],
            missed: vec![0; layers * shape.slots],
            batch,
        })
    }

    /// The batch. Between steps.
    #[must_use]
    pub fn batch(&self) -> &Batch {
        &self.batch
    }

    /// The batch. Between steps.
    pub fn batch_mut(&mut self) -> &mut Batch {
        &mut self.batch
    }

    /// Where a slot's query, `[query head][head_dim]`, and newest rows, `[lane][row_bytes]`, go before [`HostStep::perform`].
    pub fn input(&mut self, slot: usize) -> (&mut [f32], &mut [u8]) {
        let geometry = &self.batch.shape().geometry;
        let (values, bytes) = (geometry.heads.query_heads() * geometry.head_dim, geometry.heads.lanes() * geometry.row_bytes());
        (&mut self.queries[slot * values..(slot + 1) * values], &mut self.new_rows[slot * bytes..(slot + 1) * bytes])
    }

    /// Performs one layer for the sequences in `slots`, by the lengths set, and waits for the results.
    ///
    /// # Errors
    /// A copy or launch that the driver refuses, or a failure of the device.
    pub fn perform(&mut self, layer: usize, work: LayerWork, slots: Range<usize>) -> Result<(), CudaError> {
        let joins = if work == LayerWork::Sparse { self.batch.joins_of(slots.clone()) } else { Joins::default() };
        self.batch.join(joins.clone())?;
        let key = LayerKey { layer, work, cut: self.cut(layer, work, &slots), slots, joins };
        self.capture(&key)?;
        let slots = key.slots.clone();
        let geometry = &self.batch.shape().geometry;
        let (all, lanes, heads) = (self.batch.shape().slots, geometry.heads.lanes(), geometry.heads.query_heads());
        let (dim, row_bytes) = (geometry.head_dim, geometry.row_bytes());
        let of = |unit: usize| slots.start * unit..slots.end * unit;
        self.batch.send_states()?;
        let (queries, new_rows) = (&self.queries[of(heads * dim)], &self.new_rows[of(lanes * row_bytes)]);
        // SAFETY: the pinned inputs belong to this value and stay as they are until the stream has been waited for below.
        unsafe { self.batch.send_inputs(layer, slots.start, queries, new_rows)? };
        let graph = self.graphs.get(&key).ok_or(CudaError::NothingCaptured)?;
        graph.0.launch().doing("launching a layer")?;
        let (outputs, lse) = (&mut self.outputs[of(heads * dim)], &mut self.lse[of(heads)]);
        let counters = &mut self.counters[of(lanes)];
        // SAFETY: the pinned results belong to this value and are read after the stream has been waited for.
        unsafe { self.batch.fetch_results(layer, slots.start, outputs, lse, counters)? };
        self.batch.wait()?;
        // Counters of a layer run on; what this step added is kept in place of what they say.
        let counted = &mut self.counted[layer * all * lanes..][of(lanes)];
        for (now, before) in counters.iter_mut().zip(counted) {
            let counts = *now;
            *now = [counts[0] - before[0], counts[1] - before[1]];
            *before = counts;
        }
        for (missed, counts) in self.missed[layer * all..][slots].iter_mut().zip(counters.chunks(lanes)) {
            *missed = counts.iter().map(|counts| counts[1]).sum();
        }
        Ok(())
    }

    /// How a layer is cut: as if it missed what it missed the last time.
    fn cut(&self, layer: usize, work: LayerWork, slots: &Range<usize>) -> Cut {
        if work != LayerWork::Sparse {
            return Cut::Whole;
        }
        let shape = self.batch.shape();
        let missed: u64 = self.missed[layer * shape.slots..][slots.clone()].iter().sum();
        Cut::for_misses(missed * shape.geometry.row_bytes() as u64)
    }

    fn capture(&mut self, key: &LayerKey) -> Result<(), CudaError> {
        if !self.graphs.contains_key(key) {
            if self.graphs.len() >= MOST_GRAPHS * self.batch.layers() {
                self.graphs.clear();
            }
            let LayerKey { layer, work, slots, cut, .. } = key.clone();
            let graph = self.batch.capture(|| match work {
                LayerWork::Sparse => self.batch.enqueue_layer(layer, slots.clone(), cut),
                LayerWork::Exact => self.batch.enqueue_dense_layer(layer, slots.clone()),
                LayerWork::Ahead => self.batch.enqueue_fetch(layer, slots.clone()),
            })?;
            self.graphs.insert(key.clone(), LayerGraph(graph));
        }
        Ok(())
    }

    /// Results of a slot in the layer performed last.
    #[must_use]
    pub fn result(&self, slot: usize) -> SlotResult<'_> {
        let geometry = &self.batch.shape().geometry;
        let (heads, lanes) = (geometry.heads.query_heads(), geometry.heads.lanes());
        let of_slot = slot * heads..(slot + 1) * heads;
        SlotResult {
            output: &self.outputs[of_slot.start * geometry.head_dim..of_slot.end * geometry.head_dim],
            lse: &self.lse[of_slot],
            counts: &self.counters[slot * lanes..(slot + 1) * lanes],
        }
    }
}

impl SlotResult<'_> {
    /// Selected rows of all lanes that were hot.
    #[must_use]
    pub fn hits(&self) -> u64 {
        self.counts.iter().map(|counts| counts[0]).sum()
    }
}
