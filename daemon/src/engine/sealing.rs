//! Sealing: which chunk goes where, and what its name is.

use std::sync::Arc;

use sluice_kernels::slot::{CHUNK_TOKENS, SlotClass, SlotId};

use crate::engine::sequence::Stall;
use crate::engine::state::Engine;
use crate::journal::{ChunkRecord, Edit};
use crate::seal::{Job, LabelTarget, Place, SealError, SealJob, Sealed};

impl Engine {
    /// Plans the seal of a sequence's next chunk, when it is full and a slot is free.
    pub(crate) fn plan_seal(&mut self, id: u64) {
        let Some(sequence) = self.sequences.get(&id) else { return };
        let chunk = sequence.path.len();
        let full = sequence.committed >= ((chunk + 1) * CHUNK_TOKENS) as u64;
        if !full || sequence.sealing || sequence.record.poisoned || chunk >= sequence.board.table_chunks() as usize {
            return;
        }
        let model = sequence.record.model;
        if sequence.unwritten_lanes().is_some() {
            self.sequences.get_mut(&id).into_iter().for_each(|sequence| sequence.stall = Some(Stall::Writers));
            return;
        }
        let Some(slots) = self.allocate_both(model) else {
            // While a segment is on its way or slots are in limbo this is a matter of time, not of space.
            let hopeless = !self.growing.keys().any(|&(of, _)| of == model) && self.limbo.is_empty() && self.to_limbo.is_empty();
            if let Some(sequence) = self.sequences.get_mut(&id) {
                sequence.stall = hopeless.then_some(Stall::Space);
            }
            return;
        };
        for class in [SlotClass::Selected, SlotClass::Window] {
            self.grow_ahead(model, class, 1);
        }
        self.start_seal(id, chunk, slots);
    }

    fn start_seal(&mut self, id: u64, chunk: usize, slots: [Option<SlotId>; 2]) {
        let Some(sequence) = self.sequences.get_mut(&id) else { return };
        sequence.sealing = true;
        sequence.stall = None;
        let (epoch, open, model) = (sequence.seal_epoch, Arc::clone(&sequence.open), sequence.record.model);
        let writers = sequence.writer_count();
        let [selected, window] = slots.map(|slot| slot.and_then(|slot| self.arena.place(slot)));
        let labels = selected.as_ref().and_then(|place| self.label_target(model, place));
        let Some(row_type) = self.models.get(&model).map(|model| model.shape.row_type) else { return };
        let job = SealJob { sequence: id, model, epoch, chunk, row_type, open, writers, selected, window, labels };
        self.planned.push_back(Job::Seal(job));
    }

    /// One slot of each class that the model has; none is kept unless all are there.
    fn allocate_both(&mut self, model: u64) -> Option<[Option<SlotId>; 2]> {
        let wants = [SlotClass::Selected, SlotClass::Window].map(|class| self.models.get(&model).is_some_and(|model| model.has(class)));
        let selected = if wants[0] { Some(self.allocate(model, SlotClass::Selected)?) } else { None };
        if !wants[1] {
            return Some([selected, None]);
        }
        let window = self.allocate(model, SlotClass::Window);
        if window.is_none()
            && let Some(slot) = selected
        {
            self.arena.free(slot);
        }
        window.map(|window| [selected, Some(window)])
    }

    /// How chunks of a model are labelled now.
    pub(crate) fn label_target(&self, model: u64, place: &Place) -> Option<LabelTarget> {
        let model = self.models.get(&model)?;
        let newest = model.newest_labels()?;
        let labels = &self.arena.segment(place.segment.id)?.labels.as_ref()?.mapped;
        let coders = Arc::clone(&newest.coders);
        (labels.label_set == newest.id).then(|| LabelTarget { labels: Arc::clone(labels), coders, shape: Arc::clone(&model.shape) })
    }

    /// Takes up the result of a seal job.
    pub(crate) fn sealed(&mut self, mut job: SealJob, result: Result<Sealed, SealError>) {
        let current = self.sequences.get_mut(&job.sequence).filter(|sequence| !sequence.record.poisoned);
        let Some(sequence) = current.filter(|sequence| sequence.seal_epoch == job.epoch && sequence.path.len() == job.chunk) else {
            self.drop_seal(&job);
            return;
        };
        let sealed = match result {
            Ok(sealed) => sealed,
            Err(error) => {
                sequence.sealing = false;
                self.counters.refused_chunks.add(1);
                self.poison(job.sequence, &error.to_string());
                self.drop_seal(&job);
                return;
            }
        };
        // A calibration may have come while the chunk was copied: then it is labelled before anybody sees it.
        if let Some(place) = &job.selected
            && let Some(target) = self.label_target(job.model, place)
            && sealed.label_set != Some(target.labels.label_set)
        {
            job.labels = Some(target);
            self.planned.push_back(Job::Seal(job));
            return;
        }
        self.append_chunk(&job, sealed);
        if let Some(sequence) = self.sequences.get_mut(&job.sequence) {
            sequence.sealing = false;
        }
        self.counters.sealed_tokens.add(CHUNK_TOKENS as u64);
        self.poll_sequence(job.sequence);
    }

    /// Frees the slots of a job whose result nobody wants.
    fn drop_seal(&mut self, job: &SealJob) {
        if let Some(sequence) = self.sequences.get_mut(&job.sequence) {
            sequence.sealing = false;
        }
        for place in [&job.selected, &job.window].into_iter().flatten() {
            self.arena.free(SlotId { segment: place.segment.id, index: place.index });
        }
    }

    fn append_chunk(&mut self, job: &SealJob, sealed: Sealed) {
        let Some(sequence) = self.sequences.get(&job.sequence) else { return };
        let parent = sequence.path.last().and_then(|&id| self.chunks.get(id));
        let parent_name = match parent {
            Some(parent) => parent.record.name,
            None => Some(sequence.record.root),
        };
        let name = parent_name.map(|name| name.child(&sealed.tokens, sealed.fidelity));
        let dense = sealed.fidelity.is_none() && parent.is_none_or(|parent| parent.record.dense);
        let parent = parent.map(|parent| parent.record.id);
        let [selected, window] =
            [&job.selected, &job.window].map(|place| place.as_ref().map(|place| SlotId { segment: place.segment.id, index: place.index }));
        let known = name.and_then(|name| self.chunks.named(job.model, name)).map(|chunk| (chunk.record, chunk.verified));
        let chunk = match known {
            Some((known, true)) if known.digest == sealed.digest => {
                self.share_known(known, selected, window);
                known.id
            }
            _ => {
                if let Some((known, false)) = known {
                    // Its rows were not checked since the restart; the new copy's were, so the new copy takes the name.
                    self.chunks.rename(known.id, None);
                    self.edits.push(Edit::Chunk(ChunkRecord { name: None, ..known }));
                }
                let name = name.filter(|_| known.is_none_or(|(_, verified)| !verified));
                let id = self.new_id();
                let (model, index, digest, fidelity) = (job.model, job.chunk as u32, sealed.digest, sealed.fidelity);
                let record = ChunkRecord { id, model, index, name, parent, fidelity, dense, selected, window, digest, reusable_end: false };
                self.chunks.add(record, true);
                self.edits.push(Edit::Chunk(record));
                self.edits.push(Edit::ChunkContent { id, tokens: sealed.tokens, sums: sealed.sums });
                id
            }
        };
        self.push_path(job.sequence, chunk);
    }

    /// An equal chunk is there already: the copy is given up, except for window rows that the known one has lost.
    fn share_known(&mut self, known: ChunkRecord, selected: Option<SlotId>, window: Option<SlotId>) {
        self.counters.deduplicated_chunks.add(1);
        let index = known.index as usize;
        if known.window.is_none()
            && window.is_some()
            && let Some(chunk) = self.chunks.get_mut(known.id)
        {
            chunk.record.window = window;
            self.edits.push(Edit::Chunk(chunk.record));
            let readers = self.holders_of(known.id, index);
            self.window_words.extend(readers.iter().map(|&(sequence, _)| (sequence, index)));
        } else if let Some(window) = window {
            self.arena.free(window);
        }
        if let Some(selected) = selected {
            self.arena.free(selected);
        }
    }

    fn push_path(&mut self, id: u64, chunk: u64) {
        self.chunks.hold(chunk);
        self.need_window(chunk);
        let Some(sequence) = self.sequences.get_mut(&id) else { return };
        let index = sequence.path.len();
        sequence.path.push(chunk);
        let is_prompt_end = index + 1 == sequence.record.prompt_chunks as usize;
        self.edits.push(Edit::Path { sequence: id, first: index as u32, chunks: vec![chunk] });
        if is_prompt_end {
            self.mark_end(chunk);
        }
        self.advance_window(id);
        self.dirty.insert(id);
    }
}
