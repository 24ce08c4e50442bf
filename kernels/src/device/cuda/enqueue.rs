//! What a batch puts on its stream: layers and whole steps, and parts of them.

use std::ops::Range;
use std::sync::Arc;

use cudarc::driver::CudaStream;

use super::batch::Batch;
use super::buffer::DeviceBuffer;
use super::cut::Cut;
use super::error::CudaError;
use super::jobs::StepJob;

impl Batch {
    /// Enqueues one layer of a sparse step of some slots. How it is cut changes no result.
    ///
    /// # Errors
    /// A failed launch.
    pub fn enqueue_layer(&self, layer: usize, slots: Range<usize>, cut: Cut) -> Result<(), CudaError> {
        // SAFETY: every address of the jobs is of a buffer of this value or of a seat or segment that it keeps.
        unsafe { self.pipeline.sparse_layer(&self.jobs[layer], &[slots], cut, &self.joins, |_, _| Ok(())) }
    }

    /// Enqueues all layers of a sparse step of micro-batches, which are consecutive slots each, follow each other, and go through the layers on
    /// their own: none waits for another at the end of a layer. How they are cut changes no result. `after(layer, micro-batch, stream)`
    /// enqueues what follows a micro-batch's attention in a layer: what a model computes before its next queries.
    ///
    /// # Errors
    /// A failed launch.
    pub fn enqueue_step(
        &self,
        micro_batches: &[Range<usize>],
        cut: Cut,
        mut after: impl FnMut(usize, usize, &Arc<CudaStream>) -> Result<(), CudaError>,
    ) -> Result<(), CudaError> {
        assert!(micro_batches.iter().all(|slots| !slots.is_empty()), "micro-batches of one slot at least");
        assert!(micro_batches.is_sorted_by(|a, b| a.end == b.start), "micro-batches that follow each other");
        let is_inside = |join: &[usize]| micro_batches.iter().any(|slots| join.iter().all(|slot| slots.contains(slot)));
        assert!(self.joins.iter().all(is_inside), "slots that are scored jointly are of one micro-batch");
        self.pipeline.begin(micro_batches)?;
        for (layer, jobs) in self.jobs.iter().enumerate() {
            // SAFETY: as above.
            unsafe {
                self.pipeline
                    .sparse_layer(jobs, micro_batches, cut, &self.joins, |micro_batch, stream| after(layer, micro_batch, stream))?;
            }
        }
        self.pipeline.end(micro_batches)
    }

    /// Enqueues, on a stream that `after` of [`Batch::enqueue_step`] has been given, the copy of queries of some slots in one layer, which are at
    /// their own places in `from`: `[layer][slot][query head][head_dim]`.
    ///
    /// # Errors
    /// A copy that the driver refuses.
    pub fn enqueue_queries(
        &self,
        stream: &CudaStream,
        layer: usize,
        slots: Range<usize>,
        from: &DeviceBuffer<f32>,
    ) -> Result<(), CudaError> {
        let shape = self.shape();
        let a_slot = shape.geometry.heads.query_heads() * shape.geometry.head_dim;
        assert!(
            layer < self.layers() && slots.end <= shape.slots,
            "slots {slots:?} of {} in layer {layer} of {}",
            shape.slots,
            self.layers()
        );
        let own = (layer * shape.slots + slots.start) * a_slot..(layer * shape.slots + slots.end) * a_slot;
        self.queries.copy_from(stream, own.start, from, own)
    }

    /// Enqueues the exact attention of one layer of some slots over all rows kept: for steps that select nothing, or everything of
    /// [`super::seat::Kept::Everything`].
    ///
    /// # Errors
    /// A failed launch.
    pub fn enqueue_dense_layer(&self, layer: usize, slots: Range<usize>) -> Result<(), CudaError> {
        // SAFETY: as above.
        unsafe { self.pipeline.dense_layer(&self.jobs[layer][slots]) }
    }

    /// Enqueues one layer of a sparse step of some slots up to the rows that are missing, without attention.
    ///
    /// # Errors
    /// A failed launch.
    pub fn enqueue_fetch(&self, layer: usize, slots: Range<usize>) -> Result<(), CudaError> {
        // SAFETY: as above.
        let fetch = |job: &StepJob| (0..3).try_for_each(|part| unsafe { self.pipeline.part(part, job) });
        self.jobs[layer][slots].iter().try_for_each(fetch)
    }

    /// Enqueues one part of one layer of a sparse step of every slot: 0 score, 1 select, 2 gather, 3 attend. For benches that time them one
    /// by one.
    ///
    /// # Errors
    /// A failed launch.
    pub fn enqueue_part(&self, layer: usize, part: usize) -> Result<(), CudaError> {
        // SAFETY: as above.
        self.jobs[layer].iter().try_for_each(|job| unsafe { self.pipeline.part(part, job) })
    }
}
