//! One layer of a step over several sequences: while the misses of one cross the link, the next ones are scored and select, and those before
//! are attended.
//!
//! Kernels whose blocks wait for each other (score, select) follow one another on one stream, so that no two of them can hold each other's
//! places; the gathers have a stream, whose blocks are the first to get places, and attention has one. Each sequence has launches of its own,
//! and no result depends on a grid, so its bits are those it has alone.

use std::sync::Arc;

use cudarc::driver::{CudaEvent, CudaStream};

use super::error::{CudaError, Doing};
use super::jobs::StepJob;
use super::open::Gpu;
use super::step::{StepGrid, StepKernels, score_blocks_of_lane};

/// Blocks of a layer's launches.
#[derive(Clone, Copy, Debug)]
pub(super) struct StepBlocks {
    pub(super) lanes: usize,
    pub(super) gather: usize,
    /// A lane.
    pub(super) attend: usize,
}

/// Streams, and the events that join them.
pub(super) struct Pipeline {
    kernels: StepKernels,
    /// The same for launches that several others come before.
    apart: StepKernels,
    /// Where nothing else runs.
    alone: StepGrid,
    /// Beside the gather of another sequence: one block of the score kernel a processor, so that both have room.
    beside: StepGrid,
    stream: Arc<CudaStream>,
    gathers: Arc<CudaStream>,
    attends: Arc<CudaStream>,
    /// By slot.
    selected: Vec<CudaEvent>,
    gathered: Vec<CudaEvent>,
    attended: CudaEvent,
}

impl Pipeline {
    pub(super) fn new(
        gpu: &Gpu,
        kernels: StepKernels,
        stream: &Arc<CudaStream>,
        blocks: StepBlocks,
        slots: usize,
    ) -> Result<Self, CudaError> {
        let grid = |score: usize| StepGrid {
            lanes: blocks.lanes,
            score_blocks: score_blocks_of_lane(score, blocks.lanes),
            gather_blocks: blocks.gather,
            attend_blocks: blocks.attend,
        };
        let event = || gpu.context.new_event(None).doing("making an event");
        let events = || (0..slots).map(|_| event()).collect::<Result<Vec<_>, _>>();
        Ok(Self {
            alone: grid(kernels.score_blocks()),
            beside: grid(kernels.score_blocks().min(gpu.processors as usize)),
            apart: kernels.apart(),
            kernels,
            stream: Arc::clone(stream),
            gathers: gpu.new_urgent_stream()?,
            attends: gpu.new_stream()?,
            selected: events()?,
            gathered: events()?,
            attended: event()?,
        })
    }

    /// One layer of a sparse step of several sequences.
    ///
    /// # Safety
    /// As [`super::module::Kernel::launch`], for every job; so for all launches of this type.
    ///
    /// # Errors
    /// A launch that the driver refuses; so for all launches of this type.
    pub(super) unsafe fn sparse_layer(&self, jobs: &[StepJob]) -> Result<(), CudaError> {
        if let [job] = jobs {
            // SAFETY: the caller's promise.
            return unsafe { self.kernels.sparse_layer(&self.stream, &self.alone, job) };
        }
        let joining = "joining streams";
        for (slot, job) in jobs.iter().enumerate() {
            // Kernels that come early take places and wait: beside a gather they would keep it from starting.
            let (early, grid) = if slot == 0 { (&self.kernels, &self.alone) } else { (&self.apart, &self.beside) };
            // SAFETY: the caller's promise; streams are joined by events before anything is read that another one writes.
            unsafe {
                self.apart.score(&self.stream, grid, job)?;
                early.select(&self.stream, grid, job)?;
                self.selected[slot].record(&self.stream).doing(joining)?;
                self.gathers.wait(&self.selected[slot]).doing(joining)?;
                self.apart.gather(&self.gathers, grid, job)?;
                self.gathered[slot].record(&self.gathers).doing(joining)?;
                self.attends.wait(&self.gathered[slot]).doing(joining)?;
                self.apart.attend(&self.attends, grid, job)?;
            }
        }
        self.attended.record(&self.attends).doing(joining)?;
        self.stream.wait(&self.attended).doing(joining)
    }

    /// The exact attention of one layer of several sequences.
    ///
    /// # Safety
    /// As [`Pipeline::sparse_layer`].
    ///
    /// # Errors
    /// As [`Pipeline::sparse_layer`].
    pub(super) unsafe fn dense_layer(&self, jobs: &[StepJob]) -> Result<(), CudaError> {
        for job in jobs {
            // SAFETY: the caller's promise.
            unsafe { self.kernels.attend(&self.stream, &self.alone, &StepJob { appends: 1, ..*job })? };
        }
        Ok(())
    }

    /// Gives `count` blocks of hot places to other lanes, as the [`super::store::BlockMove`]s at `moves` say.
    ///
    /// # Safety
    /// As [`Pipeline::sparse_layer`].
    ///
    /// # Errors
    /// As [`Pipeline::sparse_layer`].
    pub(super) unsafe fn move_blocks(&self, moves: u64, count: usize) -> Result<(), CudaError> {
        // SAFETY: the caller's promise.
        unsafe { self.kernels.move_blocks(&self.stream, moves, count) }
    }

    /// One part of a layer of a sparse step: 0 score, 1 select, 2 gather, 3 attend.
    ///
    /// # Safety
    /// As [`Pipeline::sparse_layer`].
    ///
    /// # Errors
    /// As [`Pipeline::sparse_layer`].
    pub(super) unsafe fn part(&self, part: usize, job: &StepJob) -> Result<(), CudaError> {
        let (kernels, stream, grid) = (&self.kernels, &self.stream, &self.alone);
        // SAFETY: the caller's promise.
        unsafe {
            match part {
                0 => kernels.score(stream, grid, job),
                1 => kernels.select(stream, grid, job),
                2 => kernels.gather(stream, grid, job),
                _ => kernels.attend(stream, grid, job),
            }
        }
    }
}
