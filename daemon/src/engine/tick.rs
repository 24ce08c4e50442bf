//! What the engine does without being asked: reads headers, plans seals, empties limbo, looks after leases.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use sluice_kernels::slot::CHUNK_TOKENS;

use crate::engine::limbo::Waiting;
use crate::engine::sequence::SequenceState;
use crate::engine::state::{Engine, Until};

/// Polls without news after which a sequence's header is read less often.
const QUIET_POLLS: u32 = 64;
/// How much less often.
const QUIET_FACTOR: u32 = 8;

impl Engine {
    /// One round.
    pub(crate) fn tick(&mut self, now: Instant) {
        self.settle_limbo();
        let due = self.sequences.values().filter(|sequence| sequence.next_poll <= now && !sequence.record.poisoned);
        let due: Vec<u64> = due.map(SequenceState::id).collect();
        for id in due {
            self.poll_sequence(id);
        }
        if self.next_lease_check <= now {
            self.next_lease_check = now + self.config.lease_poll;
            self.check_leases(now);
            self.set_levels();
        }
    }

    /// When the next round is due.
    pub(crate) fn next_tick(&self, now: Instant) -> Duration {
        let soonest = self.sequences.values().filter(|sequence| !sequence.record.poisoned).map(|sequence| sequence.next_poll).min();
        let mut at = soonest.map_or(self.next_lease_check, |soonest| soonest.min(self.next_lease_check));
        if !self.limbo.is_empty() || !self.to_limbo.is_empty() || !self.planned.is_empty() {
            at = at.min(now + self.config.seal_poll);
        }
        at.saturating_duration_since(now)
    }

    fn settle_limbo(&mut self) {
        let sequences = &self.sequences;
        // Each header is read once a round, however many entries wait for it.
        let mut read = HashMap::new();
        let settled = self.limbo.settle(|id, generation| {
            let sequence = sequences.get(&id).filter(|sequence| sequence.is_held() && sequence.record.generation == generation)?;
            // A header that cannot be read belongs to a holder that cut its own file: it can fault only itself.
            *read.entry(id).or_insert_with(|| sequence.open.words().ok())
        });
        for what in settled {
            match what {
                Waiting::Slot(slot) => self.arena.free(slot),
                Waiting::Hold(chunk) => self.release_chunk(chunk),
            }
        }
        for (what, readers) in std::mem::take(&mut self.to_limbo) {
            self.limbo.add(what, readers);
        }
    }

    /// Reads a sequence's header and plans what follows from it.
    pub(crate) fn poll_sequence(&mut self, id: u64) {
        let poll = self.config.seal_poll;
        let Some(sequence) = self.sequences.get_mut(&id).filter(|sequence| !sequence.record.poisoned) else { return };
        let quiet = sequence.quiet_polls >= QUIET_POLLS;
        sequence.next_poll = Instant::now() + if quiet { poll * QUIET_FACTOR } else { poll };
        let committed = match sequence.open.words() {
            Ok(words) => sequence.committed_of(&words),
            Err(error) => {
                let reason = error.to_string();
                self.poison(id, &reason);
                return;
            }
        };
        let committed = match committed {
            Ok(committed) => committed,
            Err(word) => {
                let reason = format!("committed word: {word} is outside 0 to {}", sequence.capacity_tokens());
                self.poison(id, &reason);
                return;
            }
        };
        if committed > sequence.committed {
            self.counters.appended_tokens.add(committed - sequence.committed);
            sequence.quiet_polls = 0;
        } else {
            sequence.quiet_polls = sequence.quiet_polls.saturating_add(1);
        }
        if committed != sequence.committed {
            sequence.committed = committed;
            if let Some(lease) = &mut sequence.lease {
                lease.last_used = Instant::now();
            }
        }
        self.advance_window(id);
        self.plan_seal(id);
    }

    /// Parks sequences whose holders are dead, or have been silent for too long where there is no process to watch.
    fn check_leases(&mut self, now: Instant) {
        let idle = self.config.stream_idle;
        let ended = self.sequences.values().filter(|sequence| {
            sequence.lease.as_ref().is_some_and(|lease| match lease.processes.as_slice() {
                [] => now.saturating_duration_since(lease.last_used) > idle,
                processes => processes.iter().all(|process| process.is_dead()),
            })
        });
        let ended: Vec<u64> = ended.map(SequenceState::id).collect();
        for id in ended {
            tracing::info!(sequence = id, "the holder is gone: parked");
            self.park(id);
        }
        self.tickets.retain(|_, ticket| ticket.expires > now);
    }

    /// Whether what a waiting command needs has come about, or never will.
    pub(crate) fn is_over(&self, until: &Until) -> bool {
        match until {
            Until::Verified(chunks) => chunks.iter().all(|chunk| !self.verifying.contains(chunk)),
            Until::Calibrated(model) => !self.relabeling.contains_key(model),
            Until::Sealed(id, chunks) => self.sequences.get(id).is_none_or(|sequence| {
                let possible = sequence.committed as usize / CHUNK_TOKENS;
                let unread = !sequence.sealing && possible < *chunks && sequence.quiet_polls > 1;
                sequence.path.len() >= *chunks || sequence.record.poisoned || sequence.stall.is_some() || unread
            }),
        }
    }
}
