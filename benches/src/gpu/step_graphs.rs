//! Whole sparse steps as graphs, cut as a decoder would cut them.

use std::ops::Range;
use std::sync::Arc;

use anyhow::Result;
use sluice_kernels::device::cuda::batch::Batch;
use sluice_kernels::device::cuda::cut::Cut;
use sluice_kernels::device::cuda::{CudaError, CudaGraph, CudaStream};

/// All layers of a sparse step of every slot, one graph a cut. A decoder cuts layer by layer; here a step has one cut for all of them.
pub(super) struct StepGraphs {
    whole: CudaGraph,
    halves: CudaGraph,
    /// Of the next step.
    cut: Cut,
}

impl StepGraphs {
    /// Everybody goes through the layers together.
    pub(super) fn capture(batch: &Batch) -> Result<Self> {
        Self::capture_apart(batch, &in_micro_batches(batch.shape().slots, 1), |_, _, _| Ok(()))
    }

    /// Micro-batches go through the layers on their own; after each layer of each follows what `after(layer, micro-batch, stream)` enqueues.
    pub(super) fn capture_apart(
        batch: &Batch,
        micro_batches: &[Range<usize>],
        after: impl Fn(usize, usize, &Arc<CudaStream>) -> Result<(), CudaError>,
    ) -> Result<Self> {
        let captured = |cut| batch.capture(|| batch.enqueue_step(micro_batches, cut, &after));
        Ok(Self { whole: captured(Cut::Whole)?, halves: captured(Cut::Halves)?, cut: Cut::Whole })
    }

    /// Launches a step that is expected to miss what the last one missed.
    pub(super) fn launch(&self) -> Result<()> {
        match self.cut {
            Cut::Whole => self.launch_without_misses(),
            Cut::Halves => Ok(self.halves.launch()?),
        }
    }

    /// Launches a step that is expected to find everything.
    pub(super) fn launch_without_misses(&self) -> Result<()> {
        Ok(self.whole.launch()?)
    }

    /// Takes note of the hits and misses of a step, by lane.
    pub(super) fn note(&mut self, batch: &Batch, counts: &[[u64; 2]]) {
        let missed: u64 = counts.iter().map(|counts| counts[1]).sum();
        self.cut = Cut::for_misses(missed * batch.shape().geometry.row_bytes() as u64 / batch.layers() as u64);
    }
}

/// Slots in so many micro-batches, as equally large as can be.
pub(super) fn in_micro_batches(slots: usize, count: usize) -> Vec<Range<usize>> {
    (0..count).map(|number| number * slots / count..(number + 1) * slots / count).collect()
}

#[cfg(test)]
mod tests {
    use super::in_micro_batches;

    #[test]
    fn every_slot_is_in_one_micro_batch() {
        assert_eq!(in_micro_batches(6, 1)[0], 0..6);
        assert_eq!(in_micro_batches(3, 2), [0..1, 1..3]);
        assert_eq!(in_micro_batches(7, 3), [0..2, 2..4, 4..7]);
        assert_eq!(in_micro_batches(2, 2), [0..1, 1..2]);
    }
}
