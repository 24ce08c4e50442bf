//! The kernels of a decode step and their launches, one layer at a time: the path of a token on the device, in order.

use cudarc::driver::CudaStream;

use super::compile::Compiler;
use super::error::CudaError;
use super::jobs::{PARTS, SAMPLE_PARTS, StepJob};
use super::module::{Grid, Kernel, Module, Source, Specialisation};
use super::open::Gpu;

/// Threads of the kernels' blocks, as their sources say.
pub(super) const SAMPLE_THREADS: usize = 512;
pub(super) const SCORE_THREADS: usize = 512;
pub(super) const SELECT_THREADS: usize = 512;
const PICK_THREADS: usize = 512;
const GATHER_THREADS: usize = 1024;
pub(super) const ATTEND_THREADS: usize = 128;
const APPEND_THREADS: usize = 128;
pub(super) const MERGE_THREADS: usize = 512;
/// Blocks that share a lane's hot places while victims are picked.
const PICK_BLOCKS: usize = 32;
/// Most lanes that the gather keeps count of.
pub const MAX_LANES: usize = 64;

/// Compiled kernels for rows and labels of one shape.
#[derive(Clone, Debug)]
pub struct StepKernels {
    sample: Kernel,
    score: Kernel,
    count_part: Kernel,
    compact: Kernel,
    pick_victims: Kernel,
    gather: Kernel,
    append: Kernel,
    attend: Kernel,
    merge: Kernel,
    group: usize,
    processors: usize,
}

/// How a layer's launches are laid out. Grids never change within a graph; what they find to do does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StepGrid {
    /// Lanes.
    pub lanes: usize,
    /// Batch slots.
    pub slots: usize,
    /// Blocks of the gather: few, so that rows in flight lie near each other (LIMITS.md).
    pub gather_blocks: usize,
    /// Attention blocks a lane.
    pub attend_blocks: usize,
}

impl StepKernels {
    /// Compiles (or takes from the cache) and loads the kernels.
    ///
    /// # Errors
    /// What the compiler or the driver says.
    pub fn load(gpu: &Gpu, compiler: &Compiler, specialisation: &Specialisation) -> Result<Self, CudaError> {
        let module = |source| Module::load(gpu, compiler, source, specialisation);
        let (score, select, hot, attend, append) =
            (module(Source::Score)?, module(Source::Select)?, module(Source::Hot)?, module(Source::Attend)?, module(Source::Append)?);
        Ok(Self {
            sample: score.overlapping_kernel("sample")?,
            score: score.overlapping_kernel("score")?,
            count_part: select.overlapping_kernel("count_part")?,
            compact: select.overlapping_kernel("compact")?,
            pick_victims: hot.overlapping_kernel("pick_victims")?,
            gather: hot.overlapping_kernel("gather")?,
            append: append.overlapping_kernel("append")?,
            attend: attend.overlapping_kernel("attend")?,
            merge: attend.overlapping_kernel("merge")?,
            group: specialisation.group,
            processors: gpu.processors as usize,
        })
    }

    /// The newest rows to the device's tail and to their open slots, for steps that score nothing.
    ///
    /// # Safety
    /// As [`Kernel::launch`]; so for all launches of this type.
    ///
    /// # Errors
    /// A launch that the driver refuses; so for all launches of this type.
    pub unsafe fn append(&self, stream: &CudaStream, grid: &StepGrid, job: &StepJob) -> Result<(), CudaError> {
        // SAFETY: the caller's promise.
        unsafe { self.append.launch(stream, Grid { blocks: [1, grid.lanes, grid.slots], threads: APPEND_THREADS }, job) }
    }

    /// Appends the newest rows; then importance keys of every row before the horizon, and their histogram.
    ///
    /// # Safety
    /// As [`StepKernels::append`].
    ///
    /// # Errors
    /// As [`StepKernels::append`].
    pub unsafe fn score(&self, stream: &CudaStream, grid: &StepGrid, job: &StepJob) -> Result<(), CudaError> {
        // Two blocks fit a processor at a time.
        let blocks = (2 * self.processors / (grid.lanes * grid.slots)).max(1);
        // SAFETY: the caller's promise.
        unsafe {
            self.sample.launch(stream, Grid { blocks: [SAMPLE_PARTS, grid.lanes, grid.slots], threads: SAMPLE_THREADS }, job)?;
            self.score.launch(stream, Grid { blocks: [blocks, grid.lanes, grid.slots], threads: SCORE_THREADS }, job)
        }
    }

    /// Selected positions, ascending, and which of them are hot.
    ///
    /// # Safety
    /// As [`StepKernels::append`].
    ///
    /// # Errors
    /// As [`StepKernels::append`].
    pub unsafe fn select(&self, stream: &CudaStream, grid: &StepGrid, job: &StepJob) -> Result<(), CudaError> {
        let blocks = Grid { blocks: [PARTS, grid.lanes, grid.slots], threads: SELECT_THREADS };
        // SAFETY: the caller's promise.
        unsafe {
            self.count_part.launch(stream, blocks, job)?;
            self.compact.launch(stream, blocks, job)
        }
    }

    /// Room for the selected rows that are not hot: the places of the least important hot rows.
    ///
    /// # Safety
    /// As [`StepKernels::append`].
    ///
    /// # Errors
    /// As [`StepKernels::append`].
    pub unsafe fn pick_victims(&self, stream: &CudaStream, grid: &StepGrid, job: &StepJob) -> Result<(), CudaError> {
        // SAFETY: the caller's promise.
        unsafe { self.pick_victims.launch(stream, Grid { blocks: [PICK_BLOCKS, grid.lanes, grid.slots], threads: PICK_THREADS }, job) }
    }

    /// Fetches the missing rows across the link.
    ///
    /// # Safety
    /// As [`StepKernels::append`].
    ///
    /// # Errors
    /// As [`StepKernels::append`].
    pub unsafe fn gather(&self, stream: &CudaStream, grid: &StepGrid, job: &StepJob) -> Result<(), CudaError> {
        // SAFETY: the caller's promise.
        unsafe { self.gather.launch(stream, Grid { blocks: [grid.gather_blocks, 1, 1], threads: GATHER_THREADS }, job) }
    }

    /// Attention over the listed rows and those from the horizon on.
    ///
    /// # Safety
    /// As [`StepKernels::append`].
    ///
    /// # Errors
    /// As [`StepKernels::append`].
    pub unsafe fn attend(&self, stream: &CudaStream, grid: &StepGrid, job: &StepJob) -> Result<(), CudaError> {
        // SAFETY: the caller's promise.
        unsafe {
            self.attend.launch(stream, Grid { blocks: [grid.attend_blocks, grid.lanes, grid.slots], threads: ATTEND_THREADS }, job)?;
            self.merge.launch(stream, Grid { blocks: [self.group, grid.lanes, grid.slots], threads: MERGE_THREADS }, job)
        }
    }

    /// One layer of a sparse step, whole.
    ///
    /// # Safety
    /// As [`StepKernels::append`].
    ///
    /// # Errors
    /// As [`StepKernels::append`].
    pub unsafe fn sparse_layer(&self, stream: &CudaStream, grid: &StepGrid, job: &StepJob) -> Result<(), CudaError> {
        // SAFETY: the caller's promise.
        unsafe {
            self.score(stream, grid, job)?;
            self.select(stream, grid, job)?;
            self.pick_victims(stream, grid, job)?;
            self.gather(stream, grid, job)?;
            self.attend(stream, grid, job)
        }
    }
}
