//! Sequences of one step that have their first chunks in common: who is scored with whom, and the launches that do it.

use std::cmp::Reverse;
use std::ops::Range;
use std::sync::Arc;

use cudarc::driver::CudaStream;

use super::batch::Batch;
use super::compile::Compiler;
use super::error::CudaError;
use super::jobs::{JointJob, MOST_MEMBERS, StepJob};
use super::module::{Grid, Kernel, Module, Source, Specialisation};
use super::open::Gpu;
use super::seat::{Seat, bound};
use super::step::{SAMPLE_BESIDE, SCORE_THREADS};

/// Chunks that sequences have in common at least where they are scored jointly, which costs a graph for each way to join them: 4,096 tokens,
/// whose labels a score kernel alone reads in less time than a launch takes.
pub const LEAST_COMMON: usize = 16;
/// What sequences have in common is at least this part of what any of them selects from: what each has of its own is scored as fast by launches
/// of its own, which overlap other sequences' gathers (docs/decisions/0007-sequences-of-a-gpu-step.md has the measurements).
const LEAST_PART: usize = 2;

/// Sequences that one launch scores jointly at most, of a lane's query heads: their columns fill two tiles (tile.cuh), whose sums and weights are
/// what the registers of a thread have room for.
#[must_use]
pub fn most_members(group: usize) -> usize {
    match group {
        0..=4 => MOST_MEMBERS,
        5..=8 => 2,
        _ => 1,
    }
}

/// Which slots of a step are scored jointly: disjoint, each of at least two, in ascending order.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct Joins(Vec<Vec<usize>>);

impl Joins {
    /// The joins of sequences that have `common(a, b)` chunks in common, of at most `most` sequences each: again and again those for which most
    /// reads of labels are saved.
    #[must_use]
    pub fn of(slots: Range<usize>, most: usize, common: impl Fn(usize, usize) -> usize) -> Self {
        let (mut left, mut joins): (Vec<usize>, Vec<Vec<usize>>) = (slots.collect(), Vec::new());
        // Of equals the first slots.
        let best = |left: &[usize]| {
            let of = |&first: &usize| best_join(first, left, most, &common);
            left.iter().rev().filter_map(of).max_by_key(|(saved, _)| *saved)
        };
        while let Some((_, mut join)) = best(&left) {
            left.retain(|slot| !join.contains(slot));
            join.sort_unstable();
            joins.push(join);
        }
        joins.sort_unstable();
        Self(joins)
    }

    /// Slots of each join.
    pub fn iter(&self) -> impl Iterator<Item = &[usize]> {
        self.0.iter().map(Vec::as_slice)
    }

    /// Whether a slot is in a join.
    #[must_use]
    pub fn has(&self, slot: usize) -> bool {
        self.0.iter().any(|join| join.contains(&slot))
    }
}

/// The join with `first` that saves most reads of chunks, and how many; `None` where nobody has enough in common with it.
fn best_join(first: usize, left: &[usize], most: usize, common: impl Fn(usize, usize) -> usize) -> Option<(usize, Vec<usize>)> {
    let others = left.iter().filter(|&&slot| slot != first).map(|&slot| (Reverse(common(first, slot)), slot));
    let mut others: Vec<_> = others.filter(|other| other.0.0 >= LEAST_COMMON).collect();
    others.sort_unstable();
    let saved = |count: &usize| others[count - 1].0.0 * count;
    let count = (1..=others.len().min(most.saturating_sub(1))).max_by_key(saved)?;
    Some((saved(&count), std::iter::once(first).chain(others[..count].iter().map(|other| other.1)).collect()))
}

/// How many first chunks of two seats are the same, remembered until one of them has other label pages.
#[derive(Debug, Default)]
pub(super) struct CommonChunks {
    /// Versions of two tables of label pages, and how far these are the same.
    known: Vec<([u64; 2], usize)>,
}

impl CommonChunks {
    /// Pairs that are remembered: of the slots of a launch, twice.
    const MOST_KNOWN: usize = 64;

    pub(super) fn of(&mut self, first: &Arc<Seat>, second: &Arc<Seat>) -> usize {
        let versions = [first.label_version(), second.label_version()];
        if let Some((_, common)) = self.known.iter().find(|known| known.0 == versions) {
            return *common;
        }
        let common = first.common_label_pages(second);
        if self.known.len() == Self::MOST_KNOWN {
            self.known.remove(0);
        }
        self.known.push((versions, common));
        common
    }
}

impl Batch {
    /// Says which of some slots would be scored jointly, by the lengths set: those whose first chunks have the same label pages.
    pub fn joins_of(&mut self, slots: Range<usize>) -> Joins {
        let (mut common, most) = (vec![0; self.shape.slots * self.shape.slots], self.pipeline.most_members());
        for first in slots.clone().filter(|_| most > 1) {
            for second in slots.start..first {
                let longest = self.states[first].chunks.max(self.states[second].chunks) as usize;
                let chunks = Some(self.common_chunks(&[first, second])).filter(|chunks| chunks * LEAST_PART >= longest).unwrap_or(0);
                (common[first * self.shape.slots + second], common[second * self.shape.slots + first]) = (chunks, chunks);
            }
        }
        Joins::of(slots, most, |first, second| common[first * self.shape.slots + second])
    }

    /// Whom the layers enqueued from now on score jointly: any slots at all, whose results do not depend on it. How many chunks they have in
    /// common is found at each [`Batch::send_states`].
    ///
    /// # Errors
    /// More slots in a join than there is a kernel for.
    pub fn join(&mut self, joins: Joins) -> Result<(), CudaError> {
        joins.iter().try_for_each(|join| bound("sequences scored jointly", join.len(), 2, self.pipeline.most_members()))?;
        self.joins = joins;
        Ok(())
    }

    /// Chunks that a slot's sequence has in common with those that it is scored with, by the states sent last; 0 for one that is scored alone.
    #[must_use]
    pub fn common_chunks_of(&self, slot: usize) -> usize {
        if self.joins.has(slot) { self.states[slot].common as usize } else { 0 }
    }

    /// First chunks before the horizons of slots whose label pages are the same.
    fn common_chunks(&mut self, slots: &[usize]) -> usize {
        let seats: Vec<_> = slots.iter().filter_map(|&slot| self.seats[slot].clone()).collect();
        let [first, others @ ..] = &*seats else { return 0 };
        let least = slots.iter().map(|&slot| self.states[slot].chunks as usize).min().unwrap_or(0);
        others.iter().fold(if seats.len() == slots.len() { least } else { 0 }, |least, other| least.min(self.common.of(first, other)))
    }

    /// Takes up how many chunks joined slots have in common now.
    pub(super) fn note_common_chunks(&mut self) {
        let joins = std::mem::take(&mut self.joins);
        for join in joins.iter() {
            let common = self.common_chunks(join) as u32;
            join.iter().for_each(|&slot| self.states[slot].common = common);
        }
        self.joins = joins;
    }

    /// Enqueues the scores of one layer of some slots, without what follows them: for benches.
    ///
    /// # Errors
    /// A failed launch.
    pub fn enqueue_scores(&self, layer: usize, slots: Range<usize>) -> Result<(), CudaError> {
        // SAFETY: every address of the jobs is of a buffer of this value or of a seat or segment that it keeps.
        unsafe { self.pipeline.scores(&self.jobs[layer], slots, &self.joins) }
    }
}

/// Compiled kernels that score several sequences; none for shapes whose heads leave no room for a second one.
#[derive(Clone, Debug)]
pub(super) struct JointKernels {
    /// By members at most: a kernel, launched after all that came before has ended, and how many of its blocks run at once.
    by_members: Vec<(usize, Kernel, usize)>,
    /// Of all members at once.
    sample: Kernel,
}

impl JointKernels {
    /// Compiles (or takes from the cache) and loads the kernels.
    ///
    /// # Errors
    /// What the compiler or the driver says.
    pub(super) fn load(gpu: &Gpu, compiler: &Compiler, specialisation: &Specialisation) -> Result<Option<Self>, CudaError> {
        let most = most_members(specialisation.group);
        if most < 2 {
            return Ok(None);
        }
        let module = Module::load(gpu, compiler, Source::Joint, specialisation)?;
        let processors = gpu.processors as usize;
        let mut by_members = Vec::new();
        for (members, name) in [(2, "score_2"), (4, "score_4")].into_iter().filter(|kernel| kernel.0 <= most) {
            // A processor without the shared memory that the histograms of four take is no error: two are scored together then, or one.
            let Ok(kernel) = module.overlapping_kernel(name, module.score_bytes(specialisation)) else { break };
            let blocks = kernel.resident_blocks(SCORE_THREADS)? * processors;
            if blocks > 0 {
                by_members.push((members, kernel.apart(), blocks));
            }
        }
        Ok(Some(Self { by_members, sample: module.overlapping_kernel("sample_members", 0)?.apart() }))
    }

    /// Members that a launch takes.
    pub(super) fn most_members(&self) -> usize {
        self.by_members.last().map_or(1, |kernel| kernel.0)
    }

    /// Appends the newest rows of the members; then importance keys of every row before their horizons, and their histograms: what
    /// [`super::step::StepKernels::score`] does for one.
    ///
    /// # Safety
    /// As [`super::module::Kernel::launch`], for every job.
    ///
    /// # Errors
    /// A launch that the driver refuses, or more members than there is a kernel for.
    pub(super) unsafe fn score(&self, stream: &CudaStream, lanes: usize, members: &[&StepJob]) -> Result<(), CudaError> {
        let count = members.len();
        let Some(((_, kernel, blocks), first)) = self.by_members.iter().find(|kernel| kernel.0 >= count).zip(members.first()) else {
            let high = self.most_members() as u64;
            return Err(CudaError::Bound { field: "members of a join", value: count as u64, low: 2, high });
        };
        let mut job = JointJob { jobs: [**first; MOST_MEMBERS], members: count as u32, unused: 0 };
        job.jobs.iter_mut().zip(members).for_each(|(to, &member)| *to = *member);
        let grid = |blocks| Grid { blocks, threads: SCORE_THREADS };
        // SAFETY: the caller's promise.
        unsafe {
            self.sample.launch(stream, grid([SAMPLE_BESIDE, lanes, count]), &job)?;
            kernel.launch(stream, grid([(blocks / lanes).max(1), lanes, 1]), &job)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Joins of sequences whose prefixes are given as paths: as many chunks are common as their paths are the same.
    fn joins(most: usize, paths: &[&str]) -> Vec<Vec<usize>> {
        let common = |a: usize, b: usize| 32 * paths[a].bytes().zip(paths[b].bytes()).take_while(|(a, b)| a == b).count();
        Joins::of(0..paths.len(), most, common).0
    }

    #[test]
    fn those_are_joined_who_save_most() {
        assert_eq!(joins(4, &["aa", "bb", "ab"]), [vec![0, 2]]);
        assert_eq!(joins(4, &["aaaa", "b", "aaaa", "aaaa", "b"]), [vec![0, 2, 3], vec![1, 4]]);
        assert_eq!(joins(2, &["aaaa", "b", "aaaa", "aaaa", "b"]), [vec![0, 2], vec![1, 4]], "no more than two");
        assert_eq!(joins(1, &["aaaa", "aaaa"]), Vec::<Vec<usize>>::new(), "nobody with another");
        // Three of them save 2 x 32 chunks together, and two of these 7 x 32.
        assert_eq!(joins(4, &["ab", "aaaaaaa", "aaaaaaa"]), [vec![1, 2]]);
        assert_eq!(joins(4, &["aab", "aaaab", "aaaaa"]), [vec![0, 1, 2]], "2 x 64 and 128: more are joined");
    }

    #[test]
    fn a_short_prefix_joins_nobody() {
        let joined = |chunks: usize| !Joins::of(2..4, 4, |_, _| chunks).0.is_empty();
        assert!(joined(LEAST_COMMON) && !joined(LEAST_COMMON - 1));
        let joins = Joins::of(2..4, 4, |_, _| LEAST_COMMON);
        assert!(joins.has(2) && joins.has(3) && !joins.has(0));
        assert_eq!(joins.iter().collect::<Vec<_>>(), [[2, 3]]);
    }

    #[test]
    fn columns_bound_the_members() {
        assert_eq!([1, 2, 4, 5, 8, 9, 16].map(most_members), [4, 4, 4, 2, 2, 1, 1]);
    }
}
