//! Batches over a host cache, set up as the bench's contestants.

use anyhow::{Context, Result};
use sluice_kernels::budget::Settings;
use sluice_kernels::device::LayerGeometry;
use sluice_kernels::device::cuda::Gpu;
use sluice_kernels::device::cuda::batch::{Batch, BatchShape, Kept};
use sluice_kernels::device::cuda::compile::Compiler;
use sluice_kernels::device::cuda::stream::DoubleBuffer;
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
}

/// What a sparse contestant is made of.
#[derive(Clone, Debug)]
pub struct SparsePlan {
    /// Labels.
    pub plan: LabelPlan,
    /// Budget.
    pub settings: Settings,
    /// Hot places a lane.
    pub pool: usize,
    /// Blocks of the gather.
    pub gather_blocks: usize,
    /// Rows of a trace.
    pub trace_rows: Option<usize>,
}

impl Scene<'_> {
    /// Rows of a layer.
    #[must_use]
    pub fn geometry(&self) -> LayerGeometry {
        let layer = &self.shape.layers[0];
        LayerGeometry {
            heads: layer.heads(),
            head_dim: usize::from(layer.head_dim),
            row_type: self.shape.row_type,
            softmax_scale: layer.softmax_scale,
        }
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

    /// A sparse contestant, with labels and newest rows on the device and nothing hot.
    ///
    /// # Errors
    /// Memory or a launch that is refused.
    pub fn sparse(&self, sparse: &SparsePlan) -> Result<Batch> {
        let calibration = self.calibration(&sparse.plan)?;
        let coders: Vec<LabelCoder> = calibration.layers.iter().map(|layer| LabelCoder::new(&sparse.plan, layer)).collect();
        let coders: Vec<&LabelCoder> = coders.iter().collect();
        let shape = BatchShape {
            geometry: self.geometry(),
            plan: sparse.plan.clone(),
            layers: self.shape.layers.len(),
            slots: 1,
            max_tokens: self.context,
            max_count: sparse.settings.selected_tokens(self.context),
            kept: Kept::Pool(sparse.pool),
            // The horizon leaves at most 511 rows.
            tail_chunks: 2,
            block_rows: BatchShape::block_rows_for(
                sparse.settings.selected_tokens(self.context) + CHUNK_TOKENS,
                self.geometry().heads.lanes(),
            ),
            gather_blocks: sparse.gather_blocks,
            trace_rows: sparse.trace_rows,
        };
        let mut batch = Batch::new(self.gpu, self.compiler, &shape, &coders)?;
        let horizon = sparse.settings.horizon(self.context) / CHUNK_TOKENS;
        batch.set_host(&self.host.rows)?;
        batch.seat(0, &self.host.places)?;
        for layer in 0..shape.layers {
            batch.make_labels(layer, 0, 0..horizon)?;
            batch.fetch_tail(layer, 0, horizon..self.context.div_ceil(CHUNK_TOKENS))?;
            self.set_step(&mut batch, layer, layer, 0)?;
        }
        let open = self.host.places[(self.context - 1) / CHUNK_TOKENS];
        let grows = (open >> 16) as usize + 1 == self.host.rows.segments().len();
        batch.set_length(0, self.context, &sparse.settings, grows.then_some(open))?;
        batch.send_states()?;
        batch.wait()?;
        Ok(batch)
    }

    /// Queries and newest rows of a batch layer: those of the model's layer.
    ///
    /// # Errors
    /// A failed copy.
    pub fn set_step(&self, batch: &mut Batch, batch_layer: usize, layer: usize, variant: u64) -> Result<()> {
        batch.set_queries(batch_layer, &self.generator.query(layer, self.context - 1, variant))?;
        let geometry = self.geometry();
        let (page, last) = (self.host.page(layer, (self.context - 1) / CHUNK_TOKENS), self.context - 1);
        let newest = (0..geometry.heads.lanes()).flat_map(|lane| page[geometry.row_offset(lane, last)..][..geometry.row_bytes()].to_vec());
        batch.set_new_rows(batch_layer, &newest.collect::<Vec<u8>>())?;
        Ok(())
    }

    /// Dense attention over `layers` layers whose rows all lie on the device.
    ///
    /// # Errors
    /// Memory or a launch that is refused.
    pub fn dense(&self, context: usize, layers: usize) -> Result<Batch> {
        let plan = LabelPlan::small(self.shape.layers[0].head_dim);
        let calibration = self.calibration(&plan)?;
        let coders: Vec<LabelCoder> = calibration.layers.iter().map(|layer| LabelCoder::new(&plan, layer)).collect();
        let shape = BatchShape {
            geometry: self.geometry(),
            plan,
            layers,
            slots: 1,
            max_tokens: CHUNK_TOKENS,
            max_count: 0,
            kept: Kept::Pool(0),
            tail_chunks: context.div_ceil(CHUNK_TOKENS),
            block_rows: BatchShape::block_rows_for(context, self.geometry().heads.lanes()),
            gather_blocks: 1,
            trace_rows: None,
        };
        let coders: Vec<&LabelCoder> = coders.iter().take(layers).collect();
        let mut batch = Batch::new(self.gpu, self.compiler, &shape, &coders)?;
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
        batch.seat_dense(0, &self.host.places[..context / CHUNK_TOKENS]);
        for layer in 0..layers {
            batch.fetch_tail(layer, 0, 0..context / CHUNK_TOKENS)?;
        }
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
        Ok(DoubleBuffer::new(self.gpu, batch, std::sync::Arc::clone(&self.host.rows))?)
    }
}
