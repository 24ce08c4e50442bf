//! One layer of a step: while the misses of some lanes or sequences cross the link, the next ones are scored and select, and those before are
//! attended.
//!
//! A layer is taken in parts ([`Cut`]), each with launches of its own on a stream of its own. No result depends on a grid, so a sequence has
//! the bits that it has alone. Parts are scored one after the other, because the link waits for the first of them; from there on each goes
//! its own way. Where no rows are expected to be missing nobody waits for the link, and a part is scored as soon as the one before has begun to be.
//!
//! Several micro-batches go through the layers on their own: what one of them fetches crosses the link while another is between two layers.
//! Within a layer they are scored in their order, and where they are few fetched in their order too, so that they stay apart.

use std::ops::Range;
use std::sync::Arc;

use cudarc::driver::{CudaEvent, CudaStream};

use super::cut::{Cut, FEW_SEQUENCES, Part};
use super::error::{CudaError, Doing};
use super::jobs::{LEAST_PARTS, PARTS, StepJob};
use super::joint::{Joins, JointKernels};
use super::open::Gpu;
use super::step::{ITEMS_ALONE, ITEMS_BESIDE, SAMPLE_ALONE, SAMPLE_BESIDE, StepGrid, StepKernels};

const JOINING: &str = "joining streams";

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
    /// By part: that it is scored, or, where nothing is missing, that its scoring has begun.
    scored: Vec<CudaEvent>,
    fetched: Vec<CudaEvent>,
    attended: Vec<CudaEvent>,
    /// By micro-batch: where it begins and ends a step.
    turn: Vec<CudaEvent>,
}

/// Streams that may run at once where `places` blocks of the select kernel do. Blocks of a lane wait for each other there, and start in grid
/// order: as long as not every kernel can be short of a place for its first unfinished lane, one of them goes on.
fn streams_at_once(places: usize) -> usize {
    (places / PARTS).max(1)
}

/// Blocks of the select kernel that share a lane, so that there is one a processor. Where there are two, no block of the score kernel fits beside
/// them.
fn select_blocks_beside(processors: usize, lanes: usize) -> usize {
    1 << (processors / lanes).clamp(LEAST_PARTS, PARTS).ilog2()
}

/// What parts of a layer are launched with.
struct PartKinds {
    /// How many there are.
    parts: usize,
    /// Of several micro-batches.
    are_apart: bool,
    /// Expected to find their rows.
    are_hot: bool,
    /// Whether the link bounds the step, rather than kernels.
    are_few: bool,
    gather_blocks: usize,
    items: u32,
}

impl PartKinds {
    fn new(pipeline: &Pipeline, micro_batches: &[Range<usize>], parts: usize, cut: Cut) -> Self {
        let slots = micro_batches.iter().map(ExactSizeIterator::len).sum::<usize>();
        let (are_apart, are_few, gather_blocks) = (micro_batches.len() > 1, slots <= FEW_SEQUENCES, pipeline.blocks.gather);
        Self {
            parts,
            are_apart,
            are_hot: cut == Cut::Whole,
            are_few,
            gather_blocks: if are_few { gather_blocks } else { gather_blocks.div_ceil(2) },
            items: if slots > 1 { ITEMS_BESIDE } else { ITEMS_ALONE },
        }
    }

    /// Whether one is fetched after the other.
    fn take_turns(&self) -> bool {
        self.are_apart && self.are_few
    }

    /// Of few sequences each selection is what the link waits for, if it has anything to fetch; otherwise each selects while others are scored.
    fn select_blocks(&self, pipeline: &Pipeline, part: &Part) -> usize {
        if self.are_few && !self.are_hot { PARTS } else { select_blocks_beside(pipeline.processors, part.lanes.len()) }
    }
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
        let parts = Cut::most_parts(slots, blocks.lanes);
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
            fetched: events()?,
            attended: events()?,
            turn: (0..slots).map(|_| event()).collect::<Result<_, _>>()?,
        })
    }

    /// All lanes of a sequence, while nothing else runs.
    fn alone(&self) -> StepGrid {
        let lanes = self.blocks.lanes;
        StepGrid {
            lanes,
            sample_blocks: SAMPLE_ALONE,
            score_blocks: (self.score_alone / lanes).max(1),
            gather_blocks: self.blocks.gather,
            attend_blocks: self.blocks.attend,
        }
    }

    /// Sequences that are scored jointly at most.
    pub(super) fn most_members(&self) -> usize {
        self.joint.as_ref().map_or(1, JointKernels::most_members)
    }

    /// The parts of a layer in their order, and by micro-batch which of them are its own. One micro-batch alone is cut as `cut` says; several
    /// need no halves, since the link has the others' rows to fetch.
    fn parts(&self, micro_batches: &[Range<usize>], cut: Cut) -> (Vec<Part>, Vec<Range<usize>>) {
        let cut = if micro_batches.len() > 1 { Cut::Whole } else { cut };
        let (mut parts, mut own) = (Vec::new(), Vec::new());
        for slots in micro_batches {
            let first = parts.len();
            parts.extend(cut.parts(slots.len(), self.blocks.lanes).into_iter().map(|part| Part { slot: slots.start + part.slot, ..part }));
            own.push(first..parts.len());
        }
        (parts, own)
    }

    fn stream_of(&self, part: usize) -> &Arc<CudaStream> {
        &self.streams[part % self.streams.len()]
    }

    /// The stream on which a micro-batch goes from one layer to the next.
    pub(super) fn stream_between_layers(&self, micro_batches: &[Range<usize>], number: usize) -> &Arc<CudaStream> {
        // Of several micro-batches every part is a slot.
        self.stream_of(micro_batches[number].start - micro_batches[0].start)
    }

    /// Lets every micro-batch begin, once all that is on the batch's own stream has ended.
    ///
    /// # Errors
    /// A call that the driver refuses.
    pub(super) fn begin(&self, micro_batches: &[Range<usize>]) -> Result<(), CudaError> {
        self.turn[0].record(&self.streams[0]).doing(JOINING)?;
        if let [first, .., last] = micro_batches {
            // What the first part is scored after, in later layers the last part.
            self.scored[last.end - first.start - 1].record(&self.streams[0]).doing(JOINING)?;
        }
        (1..micro_batches.len()).try_for_each(|number| self.stream_between_layers(micro_batches, number).wait(&self.turn[0]).doing(JOINING))
    }

    /// Lets what follows on the batch's own stream begin, once every micro-batch has ended.
    ///
    /// # Errors
    /// A call that the driver refuses.
    pub(super) fn end(&self, micro_batches: &[Range<usize>]) -> Result<(), CudaError> {
        (1..micro_batches.len()).try_for_each(|number| {
            self.turn[number].record(self.stream_between_layers(micro_batches, number)).doing(JOINING)?;
            self.streams[0].wait(&self.turn[number]).doing(JOINING)
        })
    }

    /// One layer of a sparse step of some micro-batches, consecutive slots each; those that are scored jointly are of one of them.
    ///
    /// # Safety
    /// As [`super::module::Kernel::launch`], for every job; so for all launches of this type.
    ///
    /// # Errors
    /// A launch that the driver refuses; so for all launches of this type.
    pub(super) unsafe fn sparse_layer(
        &self,
        jobs: &[StepJob],
        micro_batches: &[Range<usize>],
        cut: Cut,
        joins: &Joins,
        mut after: impl FnMut(usize, &Arc<CudaStream>) -> Result<(), CudaError>,
    ) -> Result<(), CudaError> {
        let (parts, own) = self.parts(micro_batches, cut);
        if let [part] = &*parts {
            // SAFETY: the caller's promise.
            unsafe { self.kernels.sparse_layer(&self.streams[0], &self.alone(), &jobs[part.slot])? };
            return after(0, &self.streams[0]);
        }
        let kinds = PartKinds::new(self, micro_batches, parts.len(), cut);
        for (micro_batch, numbers) in own.into_iter().enumerate() {
            let (main, first) = (self.stream_of(numbers.start), numbers.start);
            // SAFETY: the caller's promise.
            unsafe { self.joint_scores(main, jobs, &micro_batches[micro_batch], joins)? };
            for number in numbers.clone() {
                let part = &parts[number];
                if number > first {
                    // Not before the micro-batch may begin this layer, and its first part has been sampled undisturbed.
                    self.stream_of(number).wait(&self.scored[first]).doing(JOINING)?;
                }
                // SAFETY: the caller's promise.
                unsafe { self.part_of_layer(number, part, &kinds, &jobs[part.slot], joins.has(part.slot))? };
            }
            self.attended[numbers].iter().try_for_each(|attended| main.wait(attended).doing(JOINING))?;
            after(micro_batch, main)?;
        }
        Ok(())
    }

    /// A part of a layer, scored after all parts of lower numbers.
    unsafe fn part_of_layer(&self, number: usize, part: &Part, kinds: &PartKinds, job: &StepJob, is_scored: bool) -> Result<(), CudaError> {
        let (stream, lanes) = (self.stream_of(number), part.lanes.len());
        let job = StepJob {
            first_lane: part.lanes.start as u32,
            lane_count: lanes as u32,
            parts: kinds.select_blocks(self, part) as u32,
            items: kinds.items,
            ..*job
        };
        // Kernels that come early take places and wait: beside a gather they would keep it from starting.
        let is_first = number == 0 && !kinds.are_apart;
        let (early, score_blocks) = if is_first { (&self.kernels, self.score_alone) } else { (&self.apart, self.score_beside) };
        let grid = StepGrid {
            lanes,
            sample_blocks: SAMPLE_BESIDE,
            score_blocks: (score_blocks / lanes).max(1),
            gather_blocks: kinds.gather_blocks,
            ..self.alone()
        };
        let begun = (kinds.are_hot && !is_scored).then_some(&self.scored[number]);
        // SAFETY: the caller's promise; parts have nothing in common that a launch writes.
        unsafe {
            if !is_scored {
                self.apart.sample(stream, &grid, &job)?;
            }
            if number > 0 || kinds.are_apart {
                stream.wait(&self.scored[(number + kinds.parts - 1) % kinds.parts]).doing(JOINING)?;
            }
            if !is_scored {
                early.score(stream, &grid, &job, begun)?;
            }
            if begun.is_none() {
                self.scored[number].record(stream).doing(JOINING)?;
            }
            early.select(stream, &grid, &job)?;
            if kinds.take_turns() && number > 0 {
                stream.wait(&self.fetched[number - 1]).doing(JOINING)?;
            }
            self.apart.gather(stream, &grid, &job)?;
            if kinds.take_turns() {
                self.fetched[number].record(stream).doing(JOINING)?;
            }
            self.apart.attend(stream, &grid, &job)?;
        }
        self.attended[number].record(stream).doing(JOINING)
    }

    /// The joint scores of a layer among some slots.
    unsafe fn joint_scores(&self, stream: &CudaStream, jobs: &[StepJob], slots: &Range<usize>, joins: &Joins) -> Result<(), CudaError> {
        let Some(kernels) = &self.joint else { return Ok(()) };
        joins.iter().filter(|join| slots.contains(&join[0])).try_for_each(|join| {
            let members: Vec<&StepJob> = join.iter().map(|&slot| &jobs[slot]).collect();
            // SAFETY: the caller's promise.
            unsafe { kernels.score(stream, self.blocks.lanes, &members) }
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
            self.joint_scores(&self.streams[0], jobs, &slots, joins)?;
            slots.filter(|&slot| !joins.has(slot)).try_for_each(|slot| self.part(0, &jobs[slot]))
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
                0 => {
                    kernels.sample(stream, grid, job)?;
                    kernels.score(stream, grid, job, None)
                }
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
            // All of them may be selecting. Each lacks one block at least of its first unfinished lane.
            let stuck = streams * (PARTS - 1);
            assert!(streams == 1 || stuck < places, "{places} places, {streams} streams");
        }
    }

    #[test]
    fn selections_beside_scores_have_one_block_a_processor() {
        for (processors, lanes) in (1..=160).flat_map(|processors| (1..=64).map(move |lanes| (processors, lanes))) {
            let blocks = select_blocks_beside(processors, lanes);
            assert!(blocks.is_power_of_two() && (LEAST_PARTS..=PARTS).contains(&blocks), "{blocks} blocks");
            assert!(blocks == LEAST_PARTS || blocks * lanes <= processors, "{blocks} blocks of {lanes} lanes on {processors} processors");
            assert!(
                blocks == PARTS || 2 * blocks * lanes > processors,
                "{blocks} blocks of {lanes} lanes: too few for {processors} processors"
            );
        }
    }
}
