//! How a layer of a step is cut into parts, which go through its kernels side by side.

use std::ops::Range;

/// Missing bytes of a layer from which halves pay: what the link brings while a part of a sequence is scored and selects.
const HALVES_PAY_BYTES: u64 = 1 << 20;

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
        let is_cut = |slot| self == Self::Halves && (slot == 0 || slot + 1 == slots);
        let first_half = |slot| if is_cut(slot) { lanes / 2 } else { 0 };
        let halves = |slot| [0..first_half(slot), first_half(slot)..lanes].map(|lanes| Part { slot, lanes });
        (0..slots).flat_map(halves).filter(|part| !part.lanes.is_empty()).collect()
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
}
