//! The kernels of a decode step and their launches, one layer of one sequence at a time: the path of a token on the device, in order.

use bytemuck::{Pod, Zeroable};
use cudarc::driver::{CudaEvent, CudaStream};

use super::compile::Compiler;
use super::error::CudaError;
use super::jobs::{PARTS, POOL_BLOCK, StepJob};
use super::module::{Grid, Kernel, Module, Source, Specialisation};
use super::open::Gpu;

/// Threads of the kernels' blocks, as their sources say.
pub(super) const SCORE_THREADS: usize = 512;
pub(super) const SELECT_THREADS: usize = 512;
/// Rows of a tile of the select kernel, sixteen a thread, and what it takes of shared memory: key, hot place, and two bits of each.
pub(super) const SELECT_TILE_ROWS: usize = SELECT_THREADS * 16;
pub(super) const SELECT_TILE_BYTES: usize = SELECT_TILE_ROWS * 4 + SELECT_TILE_ROWS / 4;
const GATHER_THREADS: usize = 384;
/// Rows that a warp of the gather takes at a time, where one sequence is fetched, and beside other sequences: the fewer, the more are on their way
/// across the link at a time, and the longer everything else takes.
pub(super) const ITEMS_ALONE: u32 = 8;
pub(super) const ITEMS_BESIDE: u32 = 16;
/// Blocks of the sample kernel that share a lane, where nothing else runs and beside other parts: one for each sum that the sample of a long
/// sequence has with four heads a lane, and one for two of them.
pub(super) const SAMPLE_ALONE: usize = 33;
pub(super) const SAMPLE_BESIDE: usize = 17;
/// Most lanes that the gather keeps count of.
pub const MAX_LANES: usize = 64;

/// Compiled kernels for rows and labels of one shape.
#[derive(Clone, Debug)]
pub struct StepKernels {
    sample: Kernel,
    score: Kernel,
    select: Kernel,
    /// The same for launches of fewer parts, which are twice as long.
    select_wide: Kernel,
    gather: Kernel,
    attend: Kernel,
    move_blocks: Kernel,
    attend_threads: usize,
    /// Blocks of the score kernel that run at once.
    score_blocks: usize,
    /// Blocks of the select kernel that do.
    places: usize,
}

/// Moves of hot places: struct MoveJob of hot.cu.
#[repr(C)]
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
pub(super) struct MoveJob {
    moves: u64,
}

/// How a layer's launches are laid out. Grids never change within a graph; what they find to do does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StepGrid {
    /// Lanes.
    pub lanes: usize,
    /// Blocks of the sample kernel that share a lane.
    pub sample_blocks: usize,
    /// Blocks of the score kernel that do.
    pub score_blocks: usize,
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
        let (score, select, hot, attend) = (module(Source::Score)?, module(Source::Select)?, module(Source::Hot)?, module(Source::Attend)?);
        let scores = score.overlapping_kernel("score", score.score_bytes(specialisation))?;
        let sample = score.overlapping_kernel("sample", 0)?;
        let selects = select.overlapping_kernel("select", SELECT_TILE_BYTES)?;
        let select_wide = select.overlapping_kernel("select", 2 * SELECT_TILE_BYTES)?;
        let processors = gpu.processors as usize;
        let score_blocks = scores.resident_blocks(SCORE_THREADS)?;
        let select_blocks = selects.resident_blocks(SELECT_THREADS)?.min(select_wide.resident_blocks(SELECT_THREADS)?);
        Ok(Self {
            sample,
            score: scores,
            select: selects,
            select_wide,
            gather: hot.overlapping_kernel("gather", 0)?,
            attend: attend.overlapping_kernel("attend", 0)?,
            move_blocks: hot.kernel("move_blocks", 0)?,
            attend_threads: 32 * specialisation.attend_warps(),
            score_blocks: score_blocks * processors,
            places: select_blocks * processors,
        })
    }

    /// The same, launched after all that came before has ended: for launches that follow several others, on several streams.
    #[must_use]
    pub fn apart(&self) -> Self {
        let [sample, score, select, select_wide, gather, attend] =
            [&self.sample, &self.score, &self.select, &self.select_wide, &self.gather, &self.attend].map(Kernel::apart);
        Self { sample, score, select, select_wide, gather, attend, move_blocks: self.move_blocks.clone(), ..*self }
    }

    /// Blocks of the score kernel that run at once.
    #[must_use]
    pub fn score_blocks(&self) -> usize {
        self.score_blocks
    }

    /// Blocks of the select kernel that run at once.
    #[must_use]
    pub(super) fn places(&self) -> usize {
        self.places
    }

    /// Sums of sampled rows' label scores, from which [`StepKernels::score`] has every head's log-sum-exp.
    ///
    /// # Safety
    /// As [`Kernel::launch`]; so for all launches of this type.
    ///
    /// # Errors
    /// A launch that the driver refuses; so for all launches of this type.
    pub unsafe fn sample(&self, stream: &CudaStream, grid: &StepGrid, job: &StepJob) -> Result<(), CudaError> {
        // SAFETY: the caller's promise.
        unsafe { self.sample.launch(stream, Grid { blocks: [grid.sample_blocks, grid.lanes, 1], threads: SCORE_THREADS }, job) }
    }

    /// Appends the newest rows; then importance keys of every row before the horizon, and their histogram. `begun` is recorded when all blocks run.
    ///
    /// # Safety
    /// As [`StepKernels::sample`].
    ///
    /// # Errors
    /// As [`StepKernels::sample`].
    pub unsafe fn score(&self, stream: &CudaStream, grid: &StepGrid, job: &StepJob, begun: Option<&CudaEvent>) -> Result<(), CudaError> {
        // SAFETY: the caller's promise.
        unsafe {
            self.score.launch_telling(stream, Grid { blocks: [grid.score_blocks, grid.lanes, 1], threads: SCORE_THREADS }, job, begun)
        }
    }

    /// Selected positions, ascending, which of them are hot, and room for those that are not: the places of the least important hot rows.
    ///
    /// # Safety
    /// As [`StepKernels::sample`].
    ///
    /// # Errors
    /// As [`StepKernels::sample`].
    pub unsafe fn select(&self, stream: &CudaStream, grid: &StepGrid, job: &StepJob) -> Result<(), CudaError> {
        let kernel = if job.parts as usize == PARTS { &self.select } else { &self.select_wide };
        // SAFETY: the caller's promise.
        unsafe { kernel.launch(stream, Grid { blocks: [job.parts as usize, grid.lanes, 1], threads: SELECT_THREADS }, job) }
    }

    /// Fetches the missing rows across the link.
    ///
    /// # Safety
    /// As [`StepKernels::sample`].
    ///
    /// # Errors
    /// As [`StepKernels::sample`].
    pub unsafe fn gather(&self, stream: &CudaStream, grid: &StepGrid, job: &StepJob) -> Result<(), CudaError> {
        // SAFETY: the caller's promise.
        unsafe { self.gather.launch(stream, Grid { blocks: [grid.gather_blocks, 1, 1], threads: GATHER_THREADS }, job) }
    }

    /// Attention over the listed rows and those from the horizon on; where the job says so, appends the newest rows itself.
    ///
    /// # Safety
    /// As [`StepKernels::sample`].
    ///
    /// # Errors
    /// As [`StepKernels::sample`].
    pub unsafe fn attend(&self, stream: &CudaStream, grid: &StepGrid, job: &StepJob) -> Result<(), CudaError> {
        let blocks = [grid.attend_blocks, grid.lanes, 1];
        // SAFETY: the caller's promise.
        unsafe { self.attend.launch(stream, Grid { blocks, threads: self.attend_threads }, job) }
    }

    /// Gives `count` blocks of hot places to other lanes, as `moves` says: [`super::store::BlockMove`] by block.
    ///
    /// # Safety
    /// As [`StepKernels::sample`].
    ///
    /// # Errors
    /// As [`StepKernels::sample`].
    pub unsafe fn move_blocks(&self, stream: &CudaStream, moves: u64, count: usize) -> Result<(), CudaError> {
        // SAFETY: the caller's promise.
        unsafe { self.move_blocks.launch(stream, Grid { blocks: [count, 1, 1], threads: POOL_BLOCK }, &MoveJob { moves }) }
    }

    /// One layer of a sparse step, whole.
    ///
    /// # Safety
    /// As [`StepKernels::sample`].
    ///
    /// # Errors
    /// As [`StepKernels::sample`].
    pub unsafe fn sparse_layer(&self, stream: &CudaStream, grid: &StepGrid, job: &StepJob) -> Result<(), CudaError> {
        // SAFETY: the caller's promise.
        unsafe {
            self.sample(stream, grid, job)?;
            self.score(stream, grid, job, None)?;
            self.select(stream, grid, job)?;
            self.gather(stream, grid, job)?;
            self.attend(stream, grid, job)
        }
    }
}
