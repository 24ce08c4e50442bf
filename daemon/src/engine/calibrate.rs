//! Models and their calibration: registration, labels of what is sealed already, removal.

use std::collections::VecDeque;

use sluice_kernels::slot::SlotClass;

use crate::engine::command::{CalibrationInForce, RegisterModel, Registered, Reply};
use crate::engine::error::EngineError;
use crate::engine::limbo::Waiting;
use crate::engine::model::{LabelSet, Model, parse_calibration};
use crate::engine::state::Engine;
use crate::journal::{Edit, ModelRecord};
use crate::seal::{Job, RelabelJob};

/// Labels of a model's sealed chunks in the making.
#[derive(Debug)]
pub(crate) struct Relabeling {
    json: Vec<u8>,
    queue: VecDeque<u64>,
    in_flight: usize,
    replies: Vec<(bool, Reply<CalibrationInForce>)>,
}

impl Engine {
    /// Registers a model, or finds it again.
    pub(crate) fn register_model(&mut self, request: &RegisterModel) -> Result<Registered, EngineError> {
        check_texts(request)?;
        request.shape.check().map_err(|error| EngineError::Misfit(error.to_string()))?;
        if !request.calibration_json.is_empty() {
            parse_calibration(&request.calibration_json, &request.shape)?;
        }
        let same = |model: &&Model| model.record.namespace == request.namespace && model.record.name == request.name;
        let same = |model: &&Model| same(model) && model.record.weights_digest == request.weights_digest;
        if let Some(model) = self.models.values().find(same) {
            let equal = model.record.shape == request.shape && model.record.rotary_layout == request.rotary_layout;
            if !equal {
                return Err(EngineError::Exists { field: "model.name", value: request.name.clone() });
            }
            return Ok(Registered { model: model.id(), calibrated: model.labels.is_some() });
        }
        if self.models.len() >= self.config.max_models {
            let fix = "unregister models, or raise max_models";
            return Err(EngineError::Exhausted { limit: "max_models", wanted: 1, available: 0, fix });
        }
        let id = self.new_id();
        let record = ModelRecord {
            id,
            name: request.name.clone(),
            namespace: request.namespace.clone(),
            weights_digest: request.weights_digest.clone(),
            rotary_layout: request.rotary_layout,
            shape: request.shape.clone(),
            label_set: None,
            calibration_json: None,
        };
        let model = Model::new(record)?;
        for class in [SlotClass::Selected, SlotClass::Window] {
            let (wanted, available) = (model.class(class).slot_bytes, self.config.arena_bytes / 2);
            if wanted > available {
                let fix = "one chunk of this model does not fit; raise arena_bytes";
                return Err(EngineError::Exhausted { limit: "arena_bytes", wanted, available, fix });
            }
        }
        self.edits.push(Edit::Model(model.record.clone()));
        self.models.insert(id, model);
        Ok(Registered { model: id, calibrated: false })
    }

    /// Sets the calibration of a model that has none; the reply is sent once every sealed chunk is labelled.
    pub(crate) fn set_calibration(&mut self, id: u64, json: Vec<u8>, reply: Reply<CalibrationInForce>) {
        if let Err(error) = self.begin_calibration(id, &json) {
            let _ = reply.send(Err(error));
            return;
        }
        let Some(model) = self.models.get(&id) else { return };
        if let Some(in_force) = &model.record.calibration_json {
            let accepted = parse_calibration(&json, &model.shape)
                .is_ok_and(|given| model.labels.as_ref().is_some_and(|labels| *labels.calibration == given));
            let _ = reply.send(Ok(CalibrationInForce { json: in_force.clone().into_bytes(), accepted }));
        } else if let Some(relabeling) = self.relabeling.get_mut(&id) {
            relabeling.replies.push((relabeling.json == json, reply));
            self.relabel(id);
        }
    }

    fn begin_calibration(&mut self, id: u64, json: &[u8]) -> Result<(), EngineError> {
        let model = self.model(id)?;
        let calibration = parse_calibration(json, &model.shape)?;
        if model.newest_labels().is_some() {
            return Ok(());
        }
        let labels = LabelSet::new(self.new_id(), calibration, &self.model(id)?.shape);
        if let Some(model) = self.models.get_mut(&id) {
            model.labels_to_come = Some(labels);
        }
        if let Err(error) = self.ensure_label_files(id) {
            self.models.get_mut(&id).into_iter().for_each(|model| model.labels_to_come = None);
            return Err(error);
        }
        let chunks = self.chunks.iter().filter(|chunk| chunk.record.model == id && chunk.record.selected.is_some());
        let queue = chunks.map(|chunk| chunk.record.id).collect();
        self.relabeling.insert(id, Relabeling { json: json.to_vec(), queue, in_flight: 0, replies: Vec::new() });
        Ok(())
    }

    /// Keeps the pool busy with labels of a model, and publishes them when the last one is made.
    pub(crate) fn relabel(&mut self, model: u64) {
        let most = 2 * self.config.seal_threads;
        while let Some(relabeling) = self.relabeling.get_mut(&model)
            && relabeling.in_flight < most
            && let Some(chunk) = relabeling.queue.pop_front()
        {
            let Some(slot) = self.chunks.get(chunk).and_then(|chunk| chunk.record.selected) else { continue };
            let Some(selected) = self.arena.place(slot) else { continue };
            let Some(target) = self.label_target(model, &selected) else { continue };
            // Held while it is read, so that its slot is not given away under the reader.
            self.chunks.hold(chunk);
            self.planned.push_back(Job::Relabel(RelabelJob { model, chunk, selected, target }));
            self.relabeling.get_mut(&model).into_iter().for_each(|relabeling| relabeling.in_flight += 1);
        }
        if self.relabeling.get(&model).is_some_and(|relabeling| relabeling.in_flight == 0 && relabeling.queue.is_empty()) {
            self.publish_labels(model);
        }
    }

    /// A chunk was labelled.
    pub(crate) fn relabelled(&mut self, model: u64, chunk: u64) {
        self.release_chunk(chunk);
        if let Some(relabeling) = self.relabeling.get_mut(&model) {
            relabeling.in_flight -= 1;
            self.relabel(model);
        }
    }

    fn publish_labels(&mut self, id: u64) {
        let Some(relabeling) = self.relabeling.remove(&id) else { return };
        let Some(model) = self.models.get_mut(&id) else { return };
        model.labels = model.labels_to_come.take();
        model.record.label_set = model.labels.as_ref().map(|labels| labels.id);
        model.record.calibration_json = Some(String::from_utf8_lossy(&relabeling.json).into_owned());
        self.edits.push(Edit::Model(model.record.clone()));
        let sequences = self.sequences.values().filter(|sequence| sequence.record.model == id);
        self.dirty.extend(sequences.map(|sequence| sequence.id()));
        for (accepted, reply) in relabeling.replies {
            let json = relabeling.json.clone();
            self.answers.push(Box::new(move || {
                let _ = reply.send(Ok(CalibrationInForce { json, accepted }));
            }));
        }
    }

    /// Removes a model that nobody holds, with everything that it has cached.
    pub(crate) fn unregister_model(&mut self, id: u64) -> Result<u64, EngineError> {
        self.model(id)?;
        let of_model = self.sequences.values().filter(|sequence| sequence.record.model == id);
        let (held, parked): (Vec<_>, Vec<_>) = of_model.partition(|sequence| sequence.is_held());
        if !held.is_empty() {
            let state = format!("{} sequences are held", held.len());
            return Err(EngineError::State { what: "model", id, state, needed: "close them first" });
        }
        for sequence in parked.iter().map(|sequence| sequence.id()).collect::<Vec<_>>() {
            self.drop_sequence(sequence);
        }
        self.limbo.forget(|what| match what {
            Waiting::Hold(chunk) => self.chunks.get(chunk).is_some_and(|chunk| chunk.record.model == id),
            Waiting::Slot(slot) => self.arena.segment(slot.segment).is_some_and(|segment| segment.record.model == id),
        });
        self.to_limbo.retain(|(what, _)| match what {
            Waiting::Hold(chunk) => self.chunks.get(*chunk).is_some_and(|chunk| chunk.record.model != id),
            Waiting::Slot(slot) => self.arena.segment(slot.segment).is_some_and(|segment| segment.record.model != id),
        });
        let chunks = self.chunks.remove_model(id);
        self.edits.extend(chunks.into_iter().map(Edit::DropChunk));
        let segments: Vec<u32> = self.arena.of_model(id).map(|segment| segment.record.id).collect();
        let freed = segments.into_iter().map(|segment| self.drop_segment(segment)).sum();
        self.models.remove(&id);
        self.relabeling.remove(&id);
        self.drop_spares();
        self.edits.push(Edit::DropModel(id));
        Ok(freed)
    }
}

fn check_texts(request: &RegisterModel) -> Result<(), EngineError> {
    let bytes = |field, length: usize, least: usize, most: usize| {
        let fits = (least..=most).contains(&length);
        if fits { Ok(()) } else { Err(EngineError::invalid(field, length, format!("{least} to {most} bytes"))) }
    };
    bytes("model.name", request.name.len(), 1, 256)?;
    bytes("model.weights_digest", request.weights_digest.len(), 1, 64)?;
    bytes("namespace", request.namespace.len(), 1, 128)
}
