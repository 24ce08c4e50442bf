//! Whole sparse steps as graphs, cut as a decoder would cut them.

use anyhow::Result;
use sluice_kernels::device::cuda::CudaGraph;
use sluice_kernels::device::cuda::batch::Batch;
use sluice_kernels::device::cuda::cut::Cut;

/// All layers of a sparse step of every slot, one graph a cut. A decoder cuts layer by layer; here a step has one cut for all of them.
pub(super) struct StepGraphs {
    whole: CudaGraph,
    halves: CudaGraph,
    /// Of the next step.
    cut: Cut,
}

impl StepGraphs {
    pub(super) fn capture(batch: &Batch) -> Result<Self> {
        let slots = batch.shape().slots;
        let captured = |cut| batch.capture(|| (0..batch.layers()).try_for_each(|layer| batch.enqueue_layer(layer, 0..slots, cut)));
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
