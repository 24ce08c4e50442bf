//! Resume, fork, truncate, close, and what happens when a holder dies.

use std::time::{Instant, SystemTime, UNIX_EPOCH};

use sluice_kernels::shared::board::BoardState;
use sluice_kernels::slot::CHUNK_TOKENS;

use crate::engine::command::{Fork, LeaseKey, Open, Opened};
use crate::engine::error::EngineError;
use crate::engine::limbo::Waiting;
use crate::engine::open::{NewSequence, holder};
use crate::engine::sequence::{SequenceState, Stall};
use crate::engine::state::{Engine, Outcome, Until};
use crate::journal::Edit;

impl Engine {
    /// Gives a parked sequence a new lease.
    pub(crate) fn resume(&mut self, id: u64, request: &Open) -> Result<Outcome<Opened>, EngineError> {
        let sequence = self.sequences.get(&id).ok_or(EngineError::NotFound { field: "resume_sequence_id", value: id })?;
        let state = |state: &str, needed| Err(EngineError::State { what: "sequence", id, state: state.to_owned(), needed });
        if sequence.is_held() {
            return state("held by a live lease", "it can be resumed once its holder has died");
        }
        if sequence.record.poisoned {
            return state("poisoned", "it cannot be resumed");
        }
        if sequence.sealing {
            return Ok(Outcome::Later(Until::Sealed(id, sequence.path.len() + 1)));
        }
        let holder = holder(request.holder_pid, request.peer)?;
        let unverified = self.unverified(&sequence.path);
        if !unverified.is_empty() {
            return Ok(Outcome::Later(Until::Verified(self.verify(unverified)?)));
        }
        let committed = self.recovered_tokens(id)?;
        self.check_parked_windows(id, committed)?;
        self.merge_records(id, committed)?;
        let Some(sequence) = self.sequences.get_mut(&id) else { return state("gone", "open it by tokens") };
        sequence.open.set_committed(committed)?;
        sequence.committed = committed;
        sequence.next_poll = Instant::now();
        sequence.record.generation += 1;
        sequence.record.parked_at = None;
        sequence.record.direct = false;
        sequence.record.writers.clear();
        sequence.record.uid = holder.uid;
        sequence.record.processes = holder.lease.processes.iter().map(|process| process.id).collect();
        sequence.lease = Some(holder.lease);
        let (record, opaque) = (sequence.record.clone(), sequence.open.opaque()?);
        let lease = LeaseKey { sequence: id, generation: record.generation };
        let mut opened = self.opened(lease, record.settings);
        opened.opaque_state = opaque.unwrap_or_default();
        opened.token_ids = self.token_ids(id, committed)?;
        self.edits.push(Edit::Sequence(record));
        self.dirty.insert(id);
        Ok(Outcome::Done(opened))
    }

    /// Tokens of a parked sequence that are whole: what its last holder committed, as far as it can be true.
    fn recovered_tokens(&mut self, id: u64) -> Result<u64, EngineError> {
        let Some(sequence) = self.sequences.get(&id) else { return Ok(0) };
        let sealed = sequence.sealed_tokens();
        let committed = sequence.committed_of(&sequence.open.words()?).unwrap_or(sealed);
        if committed < sealed {
            // The holder died within a truncation: it had lowered its word, but not told us yet.
            self.cut(id, committed)?;
            return Ok(committed);
        }
        let mut whole = sealed;
        while whole < committed {
            let chunk = whole as usize / CHUNK_TOKENS;
            let record = sequence.open.record(sequence.open.layout().slot_of(chunk), sequence.writer_count())?;
            if record.chunk != Some(chunk as u64) {
                break;
            }
            whole = committed.min(whole + CHUNK_TOKENS as u64);
        }
        Ok(whole)
    }

    /// Gives the chunks that are not sealed one record for whichever workers come next, out of those of the last ones.
    fn merge_records(&self, id: u64, committed: u64) -> Result<(), EngineError> {
        let Some(sequence) = self.sequences.get(&id) else { return Ok(()) };
        for chunk in sequence.path.len()..(committed as usize).div_ceil(CHUNK_TOKENS) {
            let slot = sequence.open.layout().slot_of(chunk);
            let record = sequence.open.record(slot, sequence.writer_count())?;
            sequence.open.write_record(slot, record)?;
        }
        Ok(())
    }

    fn check_parked_windows(&self, id: u64, committed: u64) -> Result<(), EngineError> {
        let Some(sequence) = self.sequences.get(&id) else { return Ok(()) };
        self.check_window(sequence.record.model, &sequence.path, committed, committed)
    }

    /// Token ids of the first `count` tokens of a sequence.
    pub(crate) fn token_ids(&self, id: u64, count: u64) -> Result<Vec<u32>, EngineError> {
        let Some(sequence) = self.sequences.get(&id) else { return Ok(Vec::new()) };
        let count = count as usize;
        let mut ids = Vec::with_capacity(count);
        for chunk in 0..count.div_ceil(CHUNK_TOKENS) {
            match sequence.path.get(chunk) {
                Some(&sealed) => ids.extend(self.journal.tokens(sealed)?),
                None => ids.extend(sequence.open.tokens(sequence.open.layout().slot_of(chunk), CHUNK_TOKENS)?),
            }
        }
        ids.truncate(count);
        Ok(ids)
    }

    /// A new sequence that shares the first tokens of another.
    pub(crate) fn fork(&mut self, request: &Fork) -> Result<Outcome<Opened>, EngineError> {
        let position = request.position;
        self.leased_sound(request.lease)?;
        self.poll_sequence(request.lease.sequence);
        let parent = self.leased_sound(request.lease)?;
        let committed = parent.committed;
        if position > committed {
            check_writers(parent, committed)?;
            return Err(EngineError::invalid("position", position, format!("0 to {committed} committed tokens")));
        }
        let whole_chunks = position as usize / CHUNK_TOKENS;
        if parent.path.len() < whole_chunks {
            check_writers(parent, parent.sealed_tokens())?;
            if parent.stall == Some(Stall::Space) {
                let fix = "close sequences, or raise arena_bytes (counted in chunks of 256 tokens)";
                let wanted = (whole_chunks - parent.path.len()) as u64;
                return Err(EngineError::Exhausted { limit: "arena_bytes", wanted, available: 0, fix });
            }
            return Ok(Outcome::Later(Until::Sealed(request.lease.sequence, whole_chunks)));
        }
        let (model, root, settings) = (parent.record.model, parent.record.root, parent.record.settings);
        let path = parent.path.clone();
        self.check_window(model, &path, position, committed)?;
        let open_slots = self.check_open_slots(model, request.open_slots)?;
        let holder = holder(request.holder_pid, request.peer)?;
        let path = path[..whole_chunks].to_vec();
        let end = path.last().copied();
        let lease = self.create(NewSequence { model, root, settings, open_slots, prompt_chunks: 0, path, position, holder })?;
        let child = self.sequences.get(&lease.sequence).map(|child| std::sync::Arc::clone(&child.open));
        if let Some(open) = child
            && let Err(error) = self.copy_part(request.lease.sequence, position, &open)
        {
            self.drop_sequence(lease.sequence);
            return Err(error);
        }
        if let Some(end) = end {
            self.mark_end(end);
        }
        let mut opened = self.opened(lease, settings);
        opened.token_ids = self.token_ids(lease.sequence, position)?;
        Ok(Outcome::Done(opened))
    }

    /// Drops the tokens from `position` on; the holder has lowered its committed word to it.
    pub(crate) fn truncate(&mut self, key: LeaseKey, position: u64) -> Result<u64, EngineError> {
        let sequence = self.leased_sound(key)?;
        let words = sequence.open.words()?;
        let highest = words.committed[..sequence.writer_count()].iter().copied().max().unwrap_or(0);
        let has_worker = sequence.record.direct || sequence.lease.as_ref().is_some_and(|lease| lease.streamed);
        if highest > position && has_worker {
            let state = format!("{highest} tokens are committed, {position} are to stay");
            let needed = "every worker lowers its committed word before one of them truncates";
            return Err(EngineError::State { what: "sequence", id: key.sequence, state, needed });
        }
        // What its holder has not lowered its words below is whole; with a word that cannot be true nothing is.
        let whole = sequence.committed_of(&words).unwrap_or(0);
        if position > whole {
            check_writers(sequence, whole)?;
            return Err(EngineError::invalid("position", position, format!("0 to {whole} committed tokens")));
        }
        let (model, path, committed) = (sequence.record.model, sequence.path.clone(), sequence.committed.max(position));
        self.check_window(model, &path, position, committed)?;
        self.cut(key.sequence, position)?;
        if let Some(sequence) = self.sequences.get(&key.sequence) {
            sequence.open.set_committed(position)?;
        }
        Ok(position)
    }

    /// Cuts a path at `position`: copies the part of a sealed chunk into its open slot and lets go of what is behind.
    fn cut(&mut self, id: u64, position: u64) -> Result<(), EngineError> {
        let keep = position as usize / CHUNK_TOKENS;
        let Some(sequence) = self.sequences.get(&id) else { return Ok(()) };
        let open = std::sync::Arc::clone(&sequence.open);
        if keep < sequence.path.len() {
            self.copy_part(id, position, &open)?;
        }
        let Some(sequence) = self.sequences.get_mut(&id) else { return Ok(()) };
        let needed_before = sequence.path[sequence.window_from.min(sequence.path.len())..].to_vec();
        let dropped = sequence.path.split_off(keep.min(sequence.path.len()));
        sequence.committed = position;
        sequence.seal_epoch += 1;
        sequence.next_poll = Instant::now();
        sequence.quiet_polls = 0;
        sequence.record.prompt_chunks = sequence.record.prompt_chunks.min(keep as u32);
        let lease = sequence.lease.as_ref().map(|_| (id, sequence.record.generation));
        if !dropped.is_empty() {
            self.edits.push(Edit::CutPath { sequence: id, keep: keep as u32 });
        }
        let record = sequence.record.clone();
        self.edits.push(Edit::Sequence(record));
        // The new end's needs are counted before the old end's are given up: what both need must not fall to zero in between.
        self.need_windows_from(id, position);
        for chunk in needed_before {
            self.unneed_window(chunk);
        }
        for chunk in dropped {
            match lease {
                Some(lease) => self.to_limbo.push((Waiting::Hold(chunk), vec![lease])),
                None => self.release_chunk(chunk),
            }
        }
        self.dirty.insert(id);
        Ok(())
    }

    /// Cuts a parked sequence back to `chunks` whole chunks.
    pub(crate) fn cut_parked(&mut self, id: u64, chunks: usize) {
        let position = (chunks * CHUNK_TOKENS) as u64;
        let cut = self.cut(id, position);
        let committed = self.sequences.get(&id).map(|sequence| sequence.open.set_committed(position));
        if cut.is_err() || matches!(committed, Some(Err(_))) {
            self.poison(id, "its open slots cannot be written");
        }
    }

    /// Ends a lease and forgets the sequence; its chunks stay as cache.
    pub(crate) fn close(&mut self, key: LeaseKey) -> Result<Outcome<()>, EngineError> {
        self.leased(key)?;
        self.poll_sequence(key.sequence);
        let sequence = self.leased(key)?;
        if !sequence.record.poisoned && sequence.stall.is_none() {
            let whole_chunks = sequence.committed as usize / CHUNK_TOKENS;
            if sequence.path.len() < whole_chunks {
                return Ok(Outcome::Later(Until::Sealed(key.sequence, whole_chunks)));
            }
        }
        if let Some(&end) = sequence.path.last() {
            self.mark_end(end);
        }
        self.drop_sequence(key.sequence);
        Ok(Outcome::Done(()))
    }

    /// Forgets a sequence and deletes its files.
    pub(crate) fn drop_sequence(&mut self, id: u64) {
        self.unneed_windows(id);
        let Some(sequence) = self.sequences.remove(&id) else { return };
        sequence.board.set_lease(self.boot_epoch, sequence.record.generation, BoardState::Closed);
        for chunk in sequence.path.iter().rev() {
            self.release_chunk(*chunk);
        }
        self.edits.push(Edit::DropSequence(id));
        self.doomed.push(self.folder.open(id));
        self.doomed.push(self.folder.board(id));
        self.tickets.retain(|_, ticket| ticket.lease.sequence != id);
    }

    /// Ends the lease of a holder that is gone; the sequence can be resumed.
    pub(crate) fn park(&mut self, id: u64) {
        let Some(sequence) = self.sequences.get_mut(&id) else { return };
        sequence.lease = None;
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        sequence.record.parked_at = Some(now.as_millis() as u64);
        sequence.record.processes.clear();
        let record = sequence.record.clone();
        self.edits.push(Edit::Sequence(record));
        self.dirty.insert(id);
        self.tickets.retain(|_, ticket| ticket.lease.sequence != id);
        self.counters.leases_dead.add(1);
        self.bound_parked();
    }

    /// Drops the oldest parked sequences above the bound, and poisoned ones, which nobody can resume.
    pub(crate) fn bound_parked(&mut self) {
        let parked = self.sequences.values().filter(|sequence| !sequence.is_held());
        let mut parked: Vec<(bool, u64, u64)> =
            parked.map(|sequence| (!sequence.record.poisoned, sequence.record.parked_at.unwrap_or(0), sequence.id())).collect();
        parked.sort_unstable();
        let poisoned = parked.iter().filter(|(sound, ..)| !sound).count();
        let surplus = parked.len().saturating_sub(self.config.parked_sequences_max).max(poisoned);
        for &(_, _, id) in &parked[..surplus] {
            self.drop_sequence(id);
        }
    }

    /// Stops a sequence whose rows cannot be trusted: only Close is accepted from now on.
    pub(crate) fn poison(&mut self, id: u64, reason: &str) {
        let Some(sequence) = self.sequences.get_mut(&id) else { return };
        tracing::warn!(sequence = id, reason, "sequence poisoned");
        sequence.record.poisoned = true;
        let record = sequence.record.clone();
        self.edits.push(Edit::Sequence(record));
        self.dirty.insert(id);
    }
}

/// Refuses what needs rows beyond the first `whole` tokens while some lanes have no worker.
fn check_writers(sequence: &SequenceState, whole: u64) -> Result<(), EngineError> {
    let Some(lanes) = sequence.unwritten_lanes() else { return Ok(()) };
    let state = format!("lanes {} to {} have no worker, so only its first {whole} tokens are whole", lanes.start, lanes.end - 1);
    Err(EngineError::State { what: "sequence", id: sequence.id(), state, needed: "attach a worker for these lanes first" })
}
