//! The arena: segments of all models, and their free slots.

use std::collections::BTreeMap;
use std::fs::File;
use std::sync::Arc;

use sluice_kernels::shared::segment::{LabelSegment, Segment};
use sluice_kernels::slot::{SlotClass, SlotId};

use crate::journal::SegmentRecord;
use crate::seal::Place;

/// Labels of a segment.
#[derive(Debug)]
pub struct SegmentLabels {
    /// Mapped writable.
    pub mapped: Arc<LabelSegment>,
    /// The descriptor for holders.
    pub read_only: File,
    /// Bytes of the file.
    pub bytes: u64,
}

/// A segment, mapped.
#[derive(Debug)]
pub struct SegmentState {
    /// What is journaled.
    pub record: SegmentRecord,
    /// Mapped writable.
    pub mapped: Arc<Segment>,
    /// The descriptor for holders.
    pub read_only: File,
    /// Bytes of the file.
    pub bytes: u64,
    /// Labels in force or to come.
    pub labels: Option<SegmentLabels>,
    /// Free slots; the last one is given next.
    free: Vec<u32>,
}

impl SegmentState {
    /// A segment whose slots are all free.
    #[must_use]
    pub fn new(record: SegmentRecord, mapped: Arc<Segment>, read_only: File) -> Self {
        let bytes = mapped.layout().segment_bytes(record.slots);
        Self { record, mapped, read_only, bytes, labels: None, free: (0..record.slots).rev().collect() }
    }

    /// Free slots.
    #[must_use]
    pub fn free_slots(&self) -> usize {
        self.free.len()
    }

    /// Whether no chunk lies in it and none is on its way.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.free.len() == self.record.slots as usize
    }
}

/// All segments.
#[derive(Debug, Default)]
pub struct Arena {
    segments: BTreeMap<u32, SegmentState>,
}

impl Arena {
    /// Takes up a segment.
    pub fn add(&mut self, segment: SegmentState) {
        self.segments.insert(segment.record.id, segment);
    }

    /// Lets go of a segment.
    pub fn remove(&mut self, id: u32) -> Option<SegmentState> {
        self.segments.remove(&id)
    }

    /// A segment.
    #[must_use]
    pub fn segment(&self, id: u32) -> Option<&SegmentState> {
        self.segments.get(&id)
    }

    /// A segment.
    pub fn segment_mut(&mut self, id: u32) -> Option<&mut SegmentState> {
        self.segments.get_mut(&id)
    }

    /// All segments, by number.
    pub fn segments(&self) -> impl Iterator<Item = &SegmentState> {
        self.segments.values()
    }

    /// The segments of a model.
    pub fn of_model(&self, model: u64) -> impl Iterator<Item = &SegmentState> {
        self.segments.values().filter(move |segment| segment.record.model == model)
    }

    /// Takes a free slot.
    pub fn allocate(&mut self, model: u64, class: SlotClass) -> Option<SlotId> {
        let fits = |segment: &&mut SegmentState| segment.record.model == model && segment.record.class == class;
        let segment = self.segments.values_mut().filter(fits).find(|segment| !segment.free.is_empty())?;
        let index = segment.free.pop()?;
        Some(SlotId { segment: segment.record.id, index })
    }

    /// Gives a slot back. Whoever calls knows that nobody can read it any more.
    pub fn free(&mut self, slot: SlotId) {
        if let Some(segment) = self.segments.get_mut(&slot.segment) {
            assert!(slot.index < segment.record.slots && !segment.free.contains(&slot.index), "slot {slot:?} is freed twice");
            segment.free.push(slot.index);
        }
    }

    /// Marks a slot as used while the journal is read; `false` when it does not exist or is taken.
    pub fn claim(&mut self, slot: SlotId) -> bool {
        let Some(segment) = self.segments.get_mut(&slot.segment) else { return false };
        let Some(at) = segment.free.iter().position(|&index| index == slot.index) else { return false };
        segment.free.remove(at);
        true
    }

    /// Takes all free slots of a model, to be freed again later.
    pub fn take_free(&mut self, model: u64) -> Vec<SlotId> {
        let mut taken = Vec::new();
        for segment in self.segments.values_mut().filter(|segment| segment.record.model == model) {
            let id = segment.record.id;
            taken.extend(segment.free.drain(..).map(|index| SlotId { segment: id, index }));
        }
        taken
    }

    /// Free slots of a class.
    #[must_use]
    pub fn free_slots(&self, model: u64, class: SlotClass) -> u64 {
        self.of_model(model).filter(|segment| segment.record.class == class).map(|segment| segment.free.len() as u64).sum()
    }

    /// Bytes of all row files.
    #[must_use]
    pub fn row_bytes(&self) -> u64 {
        self.segments.values().map(|segment| segment.bytes).sum()
    }

    /// Bytes of the slots that are not free.
    #[must_use]
    pub fn used_bytes(&self) -> u64 {
        let used =
            |segment: &SegmentState| (u64::from(segment.record.slots) - segment.free.len() as u64) * segment.mapped.layout().slot_bytes;
        self.segments.values().map(used).sum()
    }

    /// Bytes of all label files.
    #[must_use]
    pub fn label_bytes(&self) -> u64 {
        self.segments.values().filter_map(|segment| segment.labels.as_ref()).map(|labels| labels.bytes).sum()
    }

    /// The mapped place of a slot.
    #[must_use]
    pub fn place(&self, slot: SlotId) -> Option<Place> {
        let segment = self.segments.get(&slot.segment)?;
        Some(Place { segment: Arc::clone(&segment.mapped), index: slot.index })
    }
}
