//! Numbers of the engine, and the list of its sequences.

use crate::engine::command::{EngineStats, LeaseKey, SequenceInfo, SequenceStatus};
use crate::engine::error::EngineError;
use crate::engine::sequence::SequenceState;
use crate::engine::state::Engine;

impl Engine {
    /// Held and parked sequences.
    pub(crate) fn list(&self, model: Option<u64>) -> Result<Vec<SequenceInfo>, EngineError> {
        if let Some(model) = model {
            self.model(model)?;
        }
        let wanted = self.sequences.values().filter(|sequence| model.is_none_or(|model| sequence.record.model == model));
        Ok(wanted.map(|sequence| self.info(sequence)).collect())
    }

    fn info(&self, sequence: &SequenceState) -> SequenceInfo {
        let record = &sequence.record;
        let status = match (record.poisoned, sequence.is_held()) {
            (true, _) => SequenceStatus::Poisoned,
            (false, true) => SequenceStatus::Held,
            (false, false) => SequenceStatus::Parked,
        };
        let words = sequence.open.words().ok().and_then(|words| sequence.committed_of(&words).ok());
        SequenceInfo {
            lease: LeaseKey { sequence: record.id, generation: record.generation },
            model: record.model,
            namespace: self.models.get(&record.model).map(|model| model.record.namespace.clone()).unwrap_or_default(),
            status,
            committed_tokens: words.unwrap_or(sequence.committed),
            sealed_tokens: sequence.sealed_tokens(),
            holder_pid: record.processes.first().map_or(0, |process| process.pid as u32),
            direct: record.direct,
        }
    }

    /// What there is.
    pub(crate) fn stats(&self) -> EngineStats {
        let held = self.sequences.values().filter(|sequence| sequence.is_held()).count() as u64;
        let slots =
            |chunk: &crate::engine::chunk::Chunk| u64::from(chunk.record.selected.is_some()) + u64::from(chunk.record.window.is_some());
        EngineStats {
            models: self.models.len() as u64,
            sequences_held: held,
            sequences_parked: self.sequences.len() as u64 - held,
            chunks: self.chunks.len() as u64,
            chunks_held: self.chunks.held() as u64,
            arena_capacity_bytes: self.config.arena_bytes,
            arena_used_bytes: self.arena.used_bytes(),
            arena_file_bytes: self.arena.row_bytes(),
            label_bytes: self.arena.label_bytes(),
            open_slot_bytes: self.open_bytes(),
            spare_slot_bytes: self.spares.bytes(),
            limbo_slots: (self.limbo.slots() + self.to_limbo.len()) as u64,
            slots: self.arena.segments().map(|segment| u64::from(segment.record.slots)).sum(),
            free_slots: self.arena.segments().map(|segment| segment.free_slots() as u64).sum(),
            chunk_slots: self.chunks.iter().map(slots).sum(),
        }
    }

    /// Sets the levels of the metrics.
    pub(crate) fn set_levels(&self) {
        let stats = self.stats();
        let counters = &self.counters;
        let leases = self.sequences.values().filter_map(|sequence| sequence.lease.as_ref().map(|lease| (sequence, lease)));
        let (direct, streamed) = leases.fold((0, 0), |(direct, streamed), (sequence, lease)| {
            (direct + u64::from(sequence.record.direct), streamed + u64::from(lease.streamed))
        });
        counters.models.set(stats.models);
        counters.sequences_held.set(stats.sequences_held);
        counters.sequences_parked.set(stats.sequences_parked);
        counters.leases_direct.set(direct);
        counters.leases_stream.set(streamed);
        counters.chunks.set(stats.chunks);
        counters.chunks_held.set(stats.chunks_held);
        counters.limbo_slots.set(stats.limbo_slots);
        counters.arena_capacity_bytes.set(stats.arena_capacity_bytes);
        counters.arena_used_bytes.set(stats.arena_used_bytes);
        counters.label_bytes.set(stats.label_bytes);
        counters.open_slot_bytes.set(stats.open_slot_bytes);
        counters.spare_slot_bytes.set(stats.spare_slot_bytes);
    }
}
