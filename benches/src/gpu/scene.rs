//! Batches over a host cache, set up as the bench's contestants.

use std::ops::Range;
use std::sync::Arc;

use anyhow::{Context, Result};
use sluice_kernels::budget::Settings;
use sluice_kernels::device::LayerGeometry;
use sluice_kernels::device::cuda::Gpu;
use sluice_kernels::device::cuda::batch::{Batch, BatchLayer, BatchShape};
use sluice_kernels::device::cuda::compile::Compiler;
use sluice_kernels::device::cuda::host::{HostPage, HostPart, HostRows};
use sluice_kernels::device::cuda::seat::{Kept, Seat, SeatShape};
use sluice_kernels::device::cuda::whole_cache::DoubleBuffer;
use sluice_kernels::label::{Calibration, Calibrator, LabelCoder, LabelPlan};
use sluice_kernels::shape::ModelShape;
use sluice_kernels::slot::CHUNK_TOKENS;

use super::host::HostCache;
use crate::generator::Generator;

/// Tokens that labels are calibrated on.
const CALIBRATION_TOKENS: usize = 512;

/// Everything that contestants share.
pub struct Scene<'a> {
    /// The GPU.
    pub gpu: &'a Gpu,
    /// The compiler.
    pub compiler: &'a Compiler,
    /// Shape of the model.
    pub shape: &'a ModelShape,
    /// Rows and queries.
    pub generator: &'a Generator,
    /// Rows on the host.
    pub host: &'a HostCache,
    /// Tokens of the sequence.
    pub context: usize,
    /// Sequences on the host.
    pub sequences: usize,
    /// First chunks that all of them have in common.
    pub common: usize,
}

/// What a sparse contestant is made of.
#[derive(Clone, Debug)]
pub struct SparsePlan {
    /// Labels.
    pub plan: LabelPlan,
    /// Budget.
    pub settings: Settings,
    /// Rows that stay on the device.
    pub kept: Kept,
    /// Blocks of the gather.
    pub gather_blocks: usize,
    /// Rows of a trace.
    pub trace_rows: Option<usize>,
}

/// Room of a batch.
struct Room {
    slots: usize,
    max_count: usize,
    max_entries: usize,
    gather_blocks: usize,
}

impl Scene<'_> {
    /// Rows of a layer.
    #[must_use]
    pub fn geometry(&self) -> LayerGeometry {
        LayerGeometry::of(self.shape, 0)
    }

    fn calibration(&self, plan: &LabelPlan) -> Result<Calibration> {
        let mut calibrator = Calibrator::new(self.shape, plan, "", 1);
        for layer in 0..self.shape.layers.len() {
            let shape = &self.shape.layers[layer];
            let (lanes, dim) = (shape.lanes(), usize::from(shape.head_dim));
            let mut keys = vec![0.0; CALIBRATION_TOKENS * lanes * dim];
            let mut lane_keys = vec![0.0; CALIBRATION_TOKENS * dim];
            let mut queries = Vec::new();
            for lane in 0..lanes {
                self.generator.fill_keys(layer, lane, 0..CALIBRATION_TOKENS, &mut lane_keys);
                for (token, key) in lane_keys.chunks_exact(dim).enumerate() {
                    keys[(token * lanes + lane) * dim..][..dim].copy_from_slice(key);
                }
            }
            for token in 0..CALIBRATION_TOKENS {
                queries.extend(self.generator.query(layer, token.max(1), 1));
            }
            calibrator.add(layer, &keys, Some(&queries));
        }
        calibrator.finish().context("a calibration of every layer")
    }

    /// A batch in whose slots new seats are taken.
    fn batch(&self, seat: &SeatShape, room: &Room, trace_rows: Option<usize>) -> Result<Batch> {
        let calibration = self.calibration(&seat.plan)?;
        let coders: Vec<LabelCoder> = calibration.layers.iter().map(|layer| LabelCoder::new(&seat.plan, layer)).collect();
        let page_bytes = seat.geometry.page_bytes() as u64;
        let layer = |(plane, coder)| BatchLayer { coder, scales: self.shape.scales_of(plane), host: HostPart::whole(plane, page_bytes) };
        let layers: Vec<BatchLayer<'_>> = coders.iter().take(seat.layers).enumerate().map(layer).collect();
        let shape = BatchShape {
            geometry: seat.geometry.clone(),
            plan: seat.plan.clone(),
            slots: room.slots,
            max_tokens: seat.max_tokens,
            max_count: room.max_count,
            max_entries: room.max_entries,
            gather_blocks: room.gather_blocks,
            trace_rows,
        };
        let mut batch = Batch::new(self.gpu, self.compiler, &self.gpu.new_stream()?, &shape, &layers)?;
        for slot in 0..room.slots {
            let seat = Seat::new(self.gpu, batch.stream(), seat)?;
            batch.sit(slot, &Arc::new(seat))?;
        }
        Ok(batch)
    }

    /// Gives a sequence the label pages that the first one has for the chunks in common.
    fn share_labels(&self, batch: &Batch, slot: usize) -> Result<()> {
        let (first, seat) = (batch.seat(0).context("a seat")?, batch.seat(slot).context("a seat")?);
        let pages: Vec<_> =
            first.label_pages().into_iter().take(self.common).chain(seat.label_pages().into_iter().skip(self.common)).collect();
        Ok(seat.set_label_pages(batch.stream(), 0, &pages)?)
    }

    /// Copies the rows of chunks to where steps expect those from the horizon on.
    fn fetch_tail(&self, batch: &Batch, slot: usize, layer: usize, chunks: Range<usize>) -> Result<()> {
        let seat = batch.seat(slot).context("a seat")?;
        let pages: Vec<&[u8]> = chunks.clone().map(|chunk| self.host.page(layer, self.host_chunk(slot, chunk))).collect();
        Ok(seat.write_tail(batch.stream(), layer, chunks.start, &pages)?)
    }

    /// A chunk of a sequence, among those of the host: first what all have in common, then the others of one sequence after the other.
    fn host_chunk(&self, slot: usize, chunk: usize) -> usize {
        if chunk < self.common { chunk } else { slot * (self.chunks() - self.common) + chunk }
    }

    /// Chunks of a sequence.
    fn chunks(&self) -> usize {
        self.context.div_ceil(CHUNK_TOKENS)
    }

    /// A sparse contestant of one sequence, with labels and newest rows on the device and nothing hot.
    ///
    /// # Errors
    /// Memory or a launch that is refused.
    pub fn sparse(&self, sparse: &SparsePlan) -> Result<Batch> {
        self.sparse_batch(sparse, 1)
    }

    /// The same for `slots` sequences, one after the other in the host's chunks.
    ///
    /// # Errors
    /// Memory or a launch that is refused.
    pub fn sparse_batch(&self, sparse: &SparsePlan, slots: usize) -> Result<Batch> {
        let (layers, chunks) = (self.shape.layers.len(), self.chunks());
        let seat = SeatShape {
            geometry: self.geometry(),
            plan: sparse.plan.clone(),
            layers,
            max_tokens: self.context,
            kept: sparse.kept,
            // The horizon leaves at most 511 rows.
            tail_chunks: 2,
        };
        let count = sparse.settings.selected_tokens(self.context);
        let room = Room { slots, max_count: count, max_entries: count + 2 * CHUNK_TOKENS, gather_blocks: sparse.gather_blocks };
        let mut batch = self.batch(&seat, &room, sparse.trace_rows)?;
        let horizon = sparse.settings.horizon(self.context) / CHUNK_TOKENS;
        batch.set_host(&self.host.rows)?;
        for slot in 0..slots {
            let places: Vec<u32> = (0..chunks).map(|chunk| self.host.places[self.host_chunk(slot, chunk)]).collect();
            self.share_labels(&batch, slot)?;
            let pages: Vec<HostPage<'_>> = places[..horizon].iter().map(|&place| self.host.rows.host_page(place)).collect();
            for layer in 0..layers {
                batch.make_labels(layer, batch.seat(slot).context("a seat")?, 0, &pages)?;
                self.fetch_tail(&batch, slot, layer, horizon..chunks)?;
            }
            if let Some(seat) = batch.seat(slot) {
                seat.set_host_places(batch.stream(), 0, &places)?;
            }
            let open = places[chunks - 1];
            // The last sequence's last chunk is the one that may be written.
            let grows = (open >> 16) as usize + 1 == self.host.rows.segments().len();
            batch.set_length(slot, self.context, &sparse.settings, grows.then_some(open))?;
        }
        for layer in 0..layers {
            self.set_step(&mut batch, layer, layer, 0)?;
        }
        batch.send_states()?;
        batch.wait()?;
        Ok(batch)
    }

    /// Queries and newest rows of a batch layer: those of the model's layer.
    ///
    /// # Errors
    /// A failed copy.
    pub fn set_step(&self, batch: &mut Batch, batch_layer: usize, layer: usize, variant: u64) -> Result<()> {
        let (geometry, last, slots) = (self.geometry(), self.context - 1, batch.shape().slots);
        let query = |slot: usize| self.generator.query(layer, last, variant + slot as u64);
        batch.set_queries(batch_layer, &(0..slots).flat_map(query).collect::<Vec<f32>>())?;
        let mut newest = Vec::new();
        for slot in 0..slots {
            let page = self.host.page(layer, self.host_chunk(slot, last / CHUNK_TOKENS));
            newest.extend(
                (0..geometry.heads.lanes()).flat_map(|lane| page[geometry.row_offset(lane, last)..][..geometry.row_bytes()].to_vec()),
            );
        }
        batch.set_new_rows(batch_layer, &newest)?;
        Ok(())
    }

    /// Dense attention over `layers` layers whose rows all lie on the device.
    ///
    /// # Errors
    /// Memory or a launch that is refused.
    pub fn dense(&self, context: usize, layers: usize) -> Result<Batch> {
        let plan = LabelPlan::small(self.shape.layers[0].head_dim);
        let tail_chunks = context.div_ceil(CHUNK_TOKENS);
        let seat = SeatShape { geometry: self.geometry(), plan, layers, max_tokens: CHUNK_TOKENS, kept: Kept::Pool(0), tail_chunks };
        let room = Room { slots: 1, max_count: 0, max_entries: tail_chunks * CHUNK_TOKENS, gather_blocks: 1 };
        let mut batch = self.batch(&seat, &room, None)?;
        for layer in 0..layers {
            self.set_step(&mut batch, layer, layer, 0)?;
        }
        batch.set_dense_length(0, context)?;
        batch.send_states()?;
        batch.wait()?;
        Ok(batch)
    }

    /// [`Scene::dense`] with its rows copied to the device.
    ///
    /// # Errors
    /// As [`Scene::dense`].
    pub fn resident(&self, context: usize) -> Result<Batch> {
        let layers = self.shape.layers.len();
        let mut batch = self.dense(context, layers)?;
        batch.set_host(&self.host.rows)?;
        for layer in 0..layers {
            self.fetch_tail(&batch, 0, layer, 0..context / CHUNK_TOKENS)?;
        }
        Ok(batch)
    }

    /// A sequence that grows up to `tokens` tokens in the chunks of `host`, of which there are none yet.
    ///
    /// # Errors
    /// Memory that is refused.
    pub fn growing(&self, tokens: usize, host: &HostRows) -> Result<Batch> {
        let (layers, tail_chunks) = (self.shape.layers.len(), 4);
        let plan = LabelPlan::small(self.shape.layers[0].head_dim);
        let seat = SeatShape { geometry: self.geometry(), plan, layers, max_tokens: tokens, kept: Kept::Pool(0), tail_chunks };
        let room = Room { slots: 1, max_count: 0, max_entries: tail_chunks * CHUNK_TOKENS, gather_blocks: 1 };
        let mut batch = self.batch(&seat, &room, None)?;
        batch.set_host(host)?;
        Ok(batch)
    }

    /// The whole cache streamed through two buffers.
    ///
    /// # Errors
    /// As [`Scene::dense`].
    pub fn streamed(&self) -> Result<DoubleBuffer> {
        let rows: u64 = self.host.rows.pieces(0).iter().map(|piece| piece.1).sum();
        let chunks = rows as usize / self.geometry().page_bytes();
        let mut batch = self.dense(chunks * CHUNK_TOKENS, 2)?;
        batch.set_dense_length(0, self.context)?;
        Ok(DoubleBuffer::new(self.gpu, batch, Arc::clone(&self.host.rows))?)
    }
}
