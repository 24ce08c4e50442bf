//! The sealed chunks of a sequence: slots from the board, resolved to mapped segments.

use std::sync::Arc;

use crate::layout::Plane;
use crate::sequence::SequenceError;
use crate::shared::board::Board;
use crate::shared::segment::{LabelSegment, Segment};
use crate::slot::{SlotClass, SlotId};

#[derive(Clone, Copy, Debug)]
struct Place {
    selected: Option<SlotId>,
}

#[derive(Debug, Default)]
struct Mapped {
    rows: Option<Arc<Segment>>,
    labels: Option<Arc<LabelSegment>>,
}

/// Sealed chunks from the first on.
#[derive(Debug, Default)]
pub(super) struct Path {
    places: Vec<Place>,
    /// By segment number.
    segments: Vec<Mapped>,
    /// Chunks whose labels are mapped as well, of the label set taken up last.
    labelled: usize,
    label_set: Option<u64>,
}

impl Path {
    /// Chunks taken up.
    pub(super) fn len(&self) -> usize {
        self.places.len()
    }

    /// Chunks whose daemon-made labels can be read.
    pub(super) fn labelled_chunks(&self) -> usize {
        self.labelled
    }

    /// Forgets the chunks, not the segments.
    pub(super) fn clear(&mut self) {
        self.places.clear();
        self.labelled = 0;
    }

    pub(super) fn add_segment(&mut self, rows: Arc<Segment>, labels: Option<Arc<LabelSegment>>) {
        let index = rows.id as usize;
        if self.segments.len() <= index {
            self.segments.resize_with(index + 1, Mapped::default);
        }
        self.segments[index] = Mapped { rows: Some(rows), labels };
    }

    /// Takes up what the board publishes as far as segments are mapped; returns the segments that are missing, each once.
    pub(super) fn refresh(&mut self, board: &Board, calibrated: bool) -> Vec<u32> {
        let sealed = board.sealed_chunks();
        let label_set = board.label_set().filter(|_| calibrated);
        if sealed == self.places.len() && label_set == self.label_set && (label_set.is_none() || self.labelled == sealed) {
            return Vec::new();
        }
        if sealed < self.places.len() {
            self.clear();
        }
        self.label_set = label_set;
        let mut missing = Vec::new();
        self.take_up_rows(board, sealed, &mut missing);
        self.take_up_labels(&mut missing);
        missing.sort_unstable();
        missing.dedup();
        missing
    }

    fn take_up_rows(&mut self, board: &Board, sealed: usize, missing: &mut Vec<u32>) {
        let mut whole = true;
        for chunk in self.places.len()..sealed {
            let place = Place { selected: board.slot(SlotClass::Selected, chunk) };
            let slots = [place.selected, board.slot(SlotClass::Window, chunk)];
            let unmapped = slots.into_iter().flatten().filter(|slot| self.rows(slot.segment).is_none());
            let before = missing.len();
            missing.extend(unmapped.map(|slot| slot.segment));
            whole &= missing.len() == before;
            if whole {
                self.places.push(place);
            }
        }
    }

    fn take_up_labels(&mut self, missing: &mut Vec<u32>) {
        let Some(label_set) = self.label_set else {
            self.labelled = 0;
            return;
        };
        let mut labelled = 0;
        for place in &self.places {
            let Some(slot) = place.selected else { break };
            if self.label_segment(slot.segment).is_none_or(|labels| labels.label_set != label_set) {
                missing.push(slot.segment);
                break;
            }
            labelled += 1;
        }
        self.labelled = labelled;
    }

    fn rows(&self, segment: u32) -> Option<&Arc<Segment>> {
        self.segments.get(segment as usize)?.rows.as_ref()
    }

    fn label_segment(&self, segment: u32) -> Option<&Arc<LabelSegment>> {
        self.segments.get(segment as usize)?.labels.as_ref()
    }

    /// The page of a chunk, all lanes. A chunk's selected slot is its own for as long as the sequence holds it; its window slot can be taken
    /// away at any time, so the board is asked within the step.
    #[inline]
    pub(super) fn page(&self, board: &Board, layer: usize, plane: &Plane, class: SlotClass, chunk: usize) -> Result<&[u8], SequenceError> {
        let slot = match class {
            SlotClass::Selected => self.places.get(chunk).and_then(|place| place.selected),
            SlotClass::Window => board.slot(SlotClass::Window, chunk),
        };
        let slot = slot.ok_or(SequenceError::WindowGone { layer, chunk })?;
        let rows = self.rows(slot.segment).ok_or(SequenceError::SegmentMissing { segment: slot.segment })?;
        Ok(rows.page(plane, slot.index))
    }

    /// The segment and slot of a chunk's full-attention layers.
    pub(super) fn selected(&self, chunk: usize) -> Result<(&Arc<Segment>, u32), SequenceError> {
        let slot = self.places.get(chunk).and_then(|place| place.selected);
        let missing = SequenceError::SegmentMissing { segment: slot.map_or(u32::MAX, |slot| slot.segment) };
        let slot = slot.ok_or(missing)?;
        Ok((self.rows(slot.segment).ok_or(SequenceError::SegmentMissing { segment: slot.segment })?, slot.index))
    }

    pub(super) fn selected_slot(&self, chunk: usize) -> Option<SlotId> {
        self.places.get(chunk)?.selected
    }

    /// What to say when a chunk has no label page here.
    pub(super) fn label_missing(&self, chunk: usize) -> SequenceError {
        let slot = self.places.get(chunk).and_then(|place| place.selected);
        SequenceError::SegmentMissing { segment: slot.map_or(u32::MAX, |slot| slot.segment) }
    }

    /// The label page of a labelled chunk, all lanes.
    #[inline]
    pub(super) fn label_page(&self, layer: usize, chunk: usize) -> Option<&[u8]> {
        let slot = self.places.get(chunk)?.selected?;
        let labels = self.label_segment(slot.segment)?;
        let plane = labels.layout().plane_of_layer(layer)?;
        Some(labels.page(plane, slot.index))
    }
}
