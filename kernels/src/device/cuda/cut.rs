//! How a layer of a step is cut into parts, which go through its kernels side by side.

use std::ops::Range;

/// Missing bytes of a layer from which halves pay: what the link brings while a part of a sequence is scored and selects.
const HALVES_PAY_BYTES: u64 = 1 << 20;

/// Sequences of a step up to which the link bounds it, so that the first and the last are halved, each selects as fast as it can, and
/// micro-batches are fetched one after the other. Of more the kernels do, so that there are as few launches as can be, selections leave room
/// for scores, and gathers leave half of the processors to both.
pub(super) const FEW_SEQUENCES: usize = 4;

/// How a layer of a step is cut into parts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Cut {
    /// A part is a sequence: as few launches as can be, for steps that find their rows hot.
    Whole,
    /// For steps that miss rows. Of few sequences the first and the last are two parts each, of half of the lanes: the link is idle until the
    /// first part has selected, and after the last one has been fetched.
    Halves,
}

/// Lanes of a sequence that go through a layer together.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Part {
    pub(super) slot: usize,
    pub(super) lanes: Range<usize>,
}

impl Cut {
    /// The cut of a layer whose sequences are expected to miss so many bytes of rows.
    #[must_use]
    pub fn for_misses(bytes: u64) -> Self {
        if bytes < HALVES_PAY_BYTES { Self::Whole } else { Self::Halves }
    }

    /// Parts of a layer of `slots` sequences with `lanes` lanes each, in their order.
    pub(super) fn parts(self, slots: usize, lanes: usize) -> Vec<Part> {
        let is_cut = |slot| self == Self::Halves && slots <= FEW_SEQUENCES && (slot == 0 || slot + 1 == slots);
        let first_half = |slot| if is_cut(slot) { lanes / 2 } else { 0 };
        let halves = |slot| [0..first_half(slot), first_half(slot)..lanes].map(|lanes| Part { slot, lanes });
        (0..slots).flat_map(halves).filter(|part| !part.lanes.is_empty()).collect()
    }

    /// Parts that a layer of up to `slots` sequences has at most.
    pub(super) fn most_parts(slots: usize, lanes: usize) -> usize {
        (1..=slots).map(|slots| Self::Halves.parts(slots, lanes).len()).max().unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_are_every_lane_of_every_sequence_once() {
        for (slots, lanes) in [(1, 8), (1, 1), (2, 8), (3, 8), (8, 1), (5, 3), (2, 64)] {
            for cut in [Cut::Whole, Cut::Halves] {
                let parts = cut.parts(slots, lanes);
                let listed: Vec<_> = parts.iter().flat_map(|part| part.lanes.clone().map(|lane| (part.slot, lane))).collect();
                let all: Vec<_> = (0..slots).flat_map(|slot| (0..lanes).map(move |lane| (slot, lane))).collect();
                assert_eq!(listed, all, "{cut:?}, {slots} sequences of {lanes} lanes");
                assert!(parts.iter().all(|part| !part.lanes.is_empty()));
                assert!(cut == Cut::Halves || parts.len() == slots, "whole sequences");
            }
        }
    }

    #[test]
    fn the_first_and_the_last_of_few_sequences_are_halved() {
        let halved = |slots| {
            let mut slots: Vec<_> = Cut::Halves.parts(slots, 8).iter().filter(|part| part.lanes.len() == 4).map(|part| part.slot).collect();
            slots.dedup();
            slots
        };
        assert_eq!((halved(1), halved(2), halved(FEW_SEQUENCES)), (vec![0], vec![0, 1], vec![0, FEW_SEQUENCES - 1]));
        assert_eq!(halved(FEW_SEQUENCES + 1), Vec::<usize>::new());
        for most in 1..12 {
            assert!((1..=most).all(|slots| Cut::Halves.parts(slots, 8).len() <= Cut::most_parts(most, 8)), "{most} sequences");
        }
    }
}
