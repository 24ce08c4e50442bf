//! How label bytes travel while rows are scored: runs of units, in rings of stages in shared memory, one ring a warp.

use super::compile::Target;
use super::module::Specialisation;
use super::step::SCORE_THREADS;
use crate::slot::CHUNK_TOKENS;

/// Bytes of a stage, where it has several units.
const STAGE_BYTES: usize = 1024;
/// Bytes of a unit that still has a stage.
const MOST_BYTES: usize = 2048;
/// Units of a run at most.
const MOST_UNITS: usize = 4;

/// The rings of score.cu and joint.cu.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Rings {
    /// Units of a run, which is a stage.
    run: usize,
    /// Stages; none where a unit is larger than a stage may be.
    stages: usize,
    /// Bytes of a run.
    run_bytes: usize,
}

impl Rings {
    /// For a specialisation with a plan.
    pub(super) fn new(specialisation: &Specialisation, target: Target) -> Self {
        let label_bytes = specialisation.plan.as_ref().map_or(0, |plan| plan.label_bytes());
        // As in tile.cuh: eight columns take heads, and then rows.
        let turns = 8 / specialisation.group.next_power_of_two().min(8);
        let unit = 16 * turns.max(2);
        let units = |most: usize| (0..=most.ilog2()).map(|log| 1 << log).rfind(|run| run * unit <= CHUNK_TOKENS).unwrap_or(1);
        let unit_bytes = unit * label_bytes.max(1);
        // More stages, or larger ones, were slower: other kernels' blocks then do not fit beside these.
        let stages = if unit_bytes > MOST_BYTES {
            0
        } else if target.capability == (9, 0) {
            3
        } else {
            2
        };
        let run = units(if stages == 0 { MOST_UNITS } else { (STAGE_BYTES / unit_bytes).clamp(1, MOST_UNITS) });
        Self { run, stages, run_bytes: run * unit * label_bytes }
    }

    /// Dynamic shared memory of the kernels that pass over labels.
    pub(super) fn shared_bytes(&self) -> usize {
        SCORE_THREADS / 32 * self.stages * self.run_bytes
    }

    /// `-D` options.
    pub(super) fn options(&self) -> [String; 2] {
        [format!("-DRUN={}", self.run), format!("-DSTAGES={}", self.stages)]
    }
}
