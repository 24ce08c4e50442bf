//! Slots for chunks: free ones, new segments within the budget, and what the cache can spare.

use std::sync::Arc;

use sluice_kernels::slot::{SlotClass, SlotId};

use crate::engine::arena::{SegmentLabels, SegmentState};
use crate::engine::error::EngineError;
use crate::engine::state::Engine;
use crate::journal::{Edit, SegmentRecord};
use crate::seal::{Job, NewSegment, SegmentJob};

impl Engine {
    /// A slot, or `None` when there is none now; then a segment is being made, slots are on their way through limbo, or the arena is full.
    pub(crate) fn allocate(&mut self, model: u64, class: SlotClass) -> Option<SlotId> {
        if let Some(slot) = self.arena.allocate(model, class) {
            return Some(slot);
        }
        if self.growing.contains_key(&(model, class)) || self.grow(model, class) {
            return None;
        }
        match class {
            SlotClass::Selected => {
                let leaf = self.chunks.least_recent_leaf(model)?;
                self.shed(leaf);
            }
            SlotClass::Window => {
                let end = self.chunks.least_recent_end(model)?;
                self.clear_end(end);
            }
        }
        self.arena.allocate(model, class)
    }

    /// Makes the next segment before the last slot is taken: a holder that appends fast must not wait for memory to be zeroed.
    pub(crate) fn grow_ahead(&mut self, model: u64, class: SlotClass, wanted: u64) {
        let Some(slot_bytes) = self.models.get(&model).filter(|state| state.has(class)).map(|state| state.class(class).slot_bytes) else {
            return;
        };
        let segment_slots = self.config.segment_bytes / slot_bytes.max(1);
        let low_water = wanted.max(segment_slots / 8);
        if !self.growing.contains_key(&(model, class)) && self.arena.free_slots(model, class) < low_water {
            self.grow(model, class);
        }
    }

    /// Drops a chunk of the cache.
    fn shed(&mut self, id: u64) {
        self.clear_end(id);
        let removed = self.chunks.remove(id);
        self.removed(removed);
        self.counters.shed_chunks.add(1);
    }

    /// Bytes that a class of a model may take: with both classes, neither may starve the other.
    fn class_budget(&self, model: u64) -> u64 {
        let both = self.models.get(&model).is_some_and(|model| model.has(SlotClass::Selected) && model.has(SlotClass::Window));
        if both { self.config.arena_bytes / 2 } else { self.config.arena_bytes }
    }

    /// Bytes of rows that new segments of a class may still take.
    fn growth_left(&self, model: u64, class: SlotClass) -> u64 {
        let of_class = self.arena.of_model(model).filter(|segment| segment.record.class == class);
        let class_bytes: u64 = of_class.map(|segment| segment.bytes).sum();
        let all_bytes = self.arena.row_bytes() + self.growing.values().sum::<u64>();
        let class_left = self.class_budget(model).saturating_sub(class_bytes);
        class_left.min(self.config.arena_bytes.saturating_sub(all_bytes))
    }

    /// Chunks for which rows could be found, beside the `kept` cached ones that an Open wants to share.
    pub(crate) fn available_chunks(&self, model: u64, kept: u64) -> u64 {
        let Some(state) = self.models.get(&model) else { return 0 };
        let class = if state.has(SlotClass::Selected) { SlotClass::Selected } else { SlotClass::Window };
        let idle = self.chunks.idle(model) as u64;
        let growing = self.growing.get(&(model, class)).copied().unwrap_or(0);
        let growth = (self.growth_left(model, class) + growing) / state.class(class).slot_bytes.max(1);
        self.arena.free_slots(model, class) + idle.saturating_sub(kept) + growth
    }

    /// Starts to make a segment; `false` when the budget has no room for one slot.
    pub(crate) fn grow(&mut self, model: u64, class: SlotClass) -> bool {
        let Some(state) = self.models.get(&model) else { return false };
        let layout = Arc::clone(state.class(class));
        if self.growth_left(model, class) < layout.slot_bytes {
            self.drop_empty_segments(model);
        }
        let budget = self.growth_left(model, class).min(self.config.segment_bytes.max(layout.slot_bytes));
        let slots = (budget / layout.slot_bytes.max(1)).min(u64::from(u32::MAX)) as u32;
        if slots == 0 {
            return false;
        }
        let id = self.next_segment;
        self.next_segment += 1;
        self.edits.push(Edit::NextSegment(self.next_segment));
        let Some(state) = self.models.get(&model) else { return false };
        let labels = state.newest_labels().filter(|labels| class == SlotClass::Selected && labels.layout.slot_bytes > 0);
        let labels = labels.map(|labels| (labels.id, Arc::clone(&labels.layout), self.folder.labels(id, labels.id)));
        self.growing.insert((model, class), layout.segment_bytes(slots));
        let rows = self.folder.rows(id);
        self.planned.push_back(Job::Segment(SegmentJob { id, model, slots, layout, rows, labels, threads: 2 }));
        true
    }

    /// Gives up segments of other models that hold nothing.
    fn drop_empty_segments(&mut self, model: u64) {
        let empty = self.arena.segments().filter(|segment| segment.record.model != model && segment.is_empty());
        let empty: Vec<u32> = empty.map(|segment| segment.record.id).collect();
        for id in empty {
            self.drop_segment(id);
        }
    }

    /// Unlinks a segment; answers with its bytes.
    pub(crate) fn drop_segment(&mut self, id: u32) -> u64 {
        let Some(segment) = self.arena.remove(id) else { return 0 };
        self.edits.push(Edit::DropSegment(id));
        self.doomed.push(self.folder.rows(id));
        if let Some(labels) = &segment.labels {
            self.doomed.push(self.folder.labels(id, labels.mapped.label_set));
        }
        segment.bytes + segment.labels.as_ref().map_or(0, |labels| labels.bytes)
    }

    /// Takes up a segment that the pool has made.
    pub(crate) fn segment_made(&mut self, job: &SegmentJob, made: Result<NewSegment, sluice_kernels::shared::SharedError>) {
        let class = job.layout.class;
        self.growing.remove(&(job.model, class));
        let made = match made {
            Ok(made) => made,
            Err(error) => {
                // The tmpfs is smaller than the budget: what exists must do; the next chunk tries again.
                tracing::error!(%error, segment = job.id, "cannot make a segment");
                return;
            }
        };
        if !self.models.contains_key(&job.model) {
            self.doomed.push(job.rows.clone());
            self.doomed.extend(job.labels.iter().map(|(_, _, path)| path.clone()));
            return;
        }
        let record = SegmentRecord { id: job.id, model: job.model, class, slots: job.slots };
        let (mapped, read_only) = made.rows;
        let mut segment = SegmentState::new(record, mapped, read_only);
        segment.labels = made.labels.map(|(mapped, read_only)| {
            let bytes = mapped.layout().segment_bytes(job.slots);
            SegmentLabels { mapped, read_only, bytes }
        });
        self.arena.add(segment);
        self.edits.push(Edit::Segment(record));
        if let Err(error) = self.ensure_label_files(job.model) {
            tracing::error!(%error, segment = job.id, "cannot make labels of a segment");
        }
    }

    /// Makes the label files that segments of a model lack.
    ///
    /// # Errors
    /// The arena folder has no room.
    pub(crate) fn ensure_label_files(&mut self, model: u64) -> Result<(), EngineError> {
        let Some(labels) = self.models.get(&model).and_then(|model| model.newest_labels()) else { return Ok(()) };
        if labels.layout.slot_bytes == 0 {
            return Ok(());
        }
        let (label_set, layout) = (labels.id, Arc::clone(&labels.layout));
        let lacks = |segment: &&SegmentState| {
            segment.record.class == SlotClass::Selected && segment.labels.as_ref().is_none_or(|labels| labels.mapped.label_set != label_set)
        };
        let segments: Vec<(u32, u32)> =
            self.arena.of_model(model).filter(lacks).map(|segment| (segment.record.id, segment.record.slots)).collect();
        for (id, slots) in segments {
            let made = crate::seal::make_labels(label_set, &layout, slots, &self.folder.labels(id, label_set))?;
            if let Some(segment) = self.arena.segment_mut(id) {
                segment.labels = Some(SegmentLabels { mapped: made.0, read_only: made.1, bytes: layout.segment_bytes(slots) });
            }
        }
        Ok(())
    }
}
