//! One layer of a step: while the misses of some lanes or sequences cross the link, the next ones are scored and select, and those before are
//! attended.
//!
//! A layer is taken in parts ([`Cut`]), each with launches of its own on a stream of its own. No result depends on a grid, so a sequence has
//! the bits that it has alone. Parts are scored one after the other, because the link waits for the first of them; from there on each goes
//! its own way.

use std::ops::Range;
use std::sync::Arc;

use cudarc::driver::{CudaEvent, CudaStream};

use super::cut::{Cut, Part};
use super::error::{CudaError, Doing};
use super::jobs::{LEAST_PARTS, PARTS, StepJob};
use super::joint::{Joins, JointKernels};
use super::open::Gpu;
use super::step::{ITEMS_ALONE, ITEMS_BESIDE, MOST_SCORE_BLOCKS, StepGrid, StepKernels, score_blocks_of_lane};

/// Blocks of a layer's launches.
#[derive(Clone, Copy, Debug)]
pub(super) struct StepBlocks {
    pub(super) lanes: usize,
    pub(super) gather: usize,
    /// A lane.
    pub(super) attend: usize,
}

/// Kernels, streams, and the events that join them.
pub(super) struct Pipeline {
    kernels: StepKernels,
    /// The same for launches that several others come before.
    apart: StepKernels,
    /// Where batches have several slots.
    joint: Option<JointKernels>,
    blocks: StepBlocks,
    /// Blocks of the score kernel where nothing else runs, and beside other parts: there one a processor, so that both have room.
    score_alone: usize,
    score_beside: usize,
    processors: usize,
    /// The parts of a layer take turns on these. The batch's own stream is the first.
    streams: Vec<Arc<CudaStream>>,
    /// By part.
    scored: Vec<CudaEvent>,
    attended: Vec<CudaEvent>,
}

/// Streams that may run at once where `places` blocks of the score and select kernels do. Blocks of a lane wait for each other in these
/// kernels, and start in grid order: as long as not every kernel can be short of a place for its first unfinished lane, one of them goes on.
fn streams_at_once(places: usize) -> usize {
    1 + places.saturating_sub(MOST_SCORE_BLOCKS) / PARTS
}

/// Blocks of the select kernel that share a lane, so that there is one a processor. Where there are two, no block of the score kernel fits beside
/// them, and since its blocks wait for each other it stands until they have ended.
fn select_blocks_beside(processors: usize, lanes: usize) -> usize {
    1 << (processors / lanes).clamp(LEAST_PARTS, PARTS).ilog2()
}

impl Pipeline {
    pub(super) fn new(
        gpu: &Gpu,
        kernels: StepKernels,
        joint: Option<JointKernels>,
        stream: &Arc<CudaStream>,
        blocks: StepBlocks,
        slots: usize,
    ) -> Result<Self, CudaError> {
        let parts = Cut::Halves.parts(slots, blocks.lanes).len();
        let event = || gpu.context.new_event(None).doing("making an event");
        let events = || (0..parts).map(|_| event()).collect::<Result<Vec<_>, _>>();
        let mut streams = vec![Arc::clone(stream)];
        for _ in 1..parts.min(streams_at_once(kernels.places())) {
            streams.push(gpu.new_stream()?);
        }
        Ok(Self {
            score_alone: kernels.score_blocks(),
            score_beside: kernels.score_blocks().min(gpu.processors as usize),
            processors: gpu.processors as usize,
            apart: kernels.apart(),
            joint,
            kernels,
            blocks,
            streams,
            scored: events()?,
            attended: events()?,
        })
    }

    fn grid(&self, score_blocks: usize, lanes: usize) -> StepGrid {
        StepGrid {
            lanes,
            score_blocks: score_blocks_of_lane(score_blocks, lanes),
            gather_blocks: self.blocks.gather,
            attend_blocks: self.blocks.attend,
        }
    }

    /// All lanes of a sequence, while nothing else runs.
    fn alone(&self) -> StepGrid {
        self.grid(self.score_alone, self.blocks.lanes)
    }

    /// Sequences that are scored jointly at most.
    pub(super) fn most_members(&self) -> usize {
        self.joint.as_ref().map_or(1, JointKernels::most_members)
    }

    /// One layer of a sparse step of some slots, of which some are scored jointly, before all others.
    ///
    /// # Safety
    /// As [`super::module::Kernel::launch`], for every job; so for all launches of this type.
    ///
    /// # Errors
    /// A launch that the driver refuses; so for all launches of this type.
    pub(super) unsafe fn sparse_layer(&self, jobs: &[StepJob], slots: Range<usize>, cut: Cut, joins: &Joins) -> Result<(), CudaError> {
        let (first, parts) = (slots.start, cut.parts(slots.len(), self.blocks.lanes));
        if let ([job], [_]) = (&jobs[slots.clone()], &*parts) {
            // SAFETY: the caller's promise.
            return unsafe { self.kernels.sparse_layer(&self.streams[0], &self.alone(), job) };
        }
        let (joining, items) = ("joining streams", if slots.len() > 1 { ITEMS_BESIDE } else { ITEMS_ALONE });
        // SAFETY: the caller's promise.
        unsafe { self.joint_scores(jobs, joins)? };
        // Between a first and a last sequence in halves, one alone is what the link waits for; of several each selects while another is fetched.
        let whole = parts.iter().filter(|part| part.lanes.len() == self.blocks.lanes).count();
        let select_blocks = |part: &Part| if whole > 1 { select_blocks_beside(self.processors, part.lanes.len()) } else { PARTS };
        for (number, part) in parts.iter().enumerate() {
            let stream = &self.streams[number % self.streams.len()];
            let job = StepJob {
                first_lane: part.lanes.start as u32,
                lane_count: part.lanes.len() as u32,
                parts: select_blocks(part) as u32,
                items,
                ..jobs[first + part.slot]
            };
            // Kernels that come early take places and wait: beside a gather they would keep it from starting.
            let (early, grid) = match number {
                0 => (&self.kernels, self.grid(self.score_alone, part.lanes.len())),
                _ => (&self.apart, self.grid(self.score_beside, part.lanes.len())),
            };
            if number > 0 {
                stream.wait(&self.scored[number - 1]).doing(joining)?;
            }
            // SAFETY: the caller's promise; parts have nothing in common that a launch writes.
            unsafe {
                if !joins.has(first + part.slot) {
                    self.apart.score(stream, &grid, &job)?;
                }
                self.scored[number].record(stream).doing(joining)?;
                early.select(stream, &grid, &job)?;
                self.apart.gather(stream, &grid, &job)?;
                self.apart.attend(stream, &grid, &job)?;
            }
            self.attended[number].record(stream).doing(joining)?;
        }
        self.attended[..parts.len()].iter().try_for_each(|attended| self.streams[0].wait(attended).doing(joining))
    }

    /// The joint scores among those of a layer.
    unsafe fn joint_scores(&self, jobs: &[StepJob], joins: &Joins) -> Result<(), CudaError> {
        let Some(kernels) = &self.joint else { return Ok(()) };
        joins.iter().try_for_each(|join| {
            let members: Vec<&StepJob> = join.iter().map(|&slot| &jobs[slot]).collect();
            // SAFETY: the caller's promise.
            unsafe { kernels.score(&self.streams[0], self.blocks.lanes, &members) }
        })
    }

    /// The scores of one layer of several sequences alone.
    ///
    /// # Safety
    /// As [`Pipeline::sparse_layer`].
    ///
    /// # Errors
    /// As [`Pipeline::sparse_layer`].
    pub(super) unsafe fn scores(&self, jobs: &[StepJob], slots: Range<usize>, joins: &Joins) -> Result<(), CudaError> {
        // SAFETY: the caller's promise.
        unsafe {
            self.joint_scores(jobs, joins)?;
            slots.filter(|&slot| !joins.has(slot)).try_for_each(|slot| self.kernels.score(&self.streams[0], &self.alone(), &jobs[slot]))
        }
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
            unsafe { self.kernels.attend(&self.streams[0], &self.alone(), &StepJob { appends: 1, ..*job })? };
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
        unsafe { self.kernels.move_blocks(&self.streams[0], moves, count) }
    }

    /// One part of a layer of a sparse step: 0 score, 1 select, 2 gather, 3 attend.
    ///
    /// # Safety
    /// As [`Pipeline::sparse_layer`].
    ///
    /// # Errors
    /// As [`Pipeline::sparse_layer`].
    pub(super) unsafe fn part(&self, part: usize, job: &StepJob) -> Result<(), CudaError> {
        let (kernels, stream, grid) = (&self.kernels, &self.streams[0], &self.alone());
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kernels_that_wait_cannot_take_all_places_from_each_other() {
        for places in 1..2048 {
            let streams = streams_at_once(places);
            // One scores; the others may all be selecting. Each lacks one block at least of its first unfinished lane.
            let stuck = MOST_SCORE_BLOCKS - 1 + (streams - 1) * (PARTS - 1);
            assert!(streams == 1 || stuck < places, "{places} places, {streams} streams");
        }
    }
}
