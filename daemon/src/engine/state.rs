//! The engine's state, and how a change of it reaches the journal, the boards and the pool, in this order.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet, VecDeque};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use crossbeam::channel::{Sender, TrySendError};
use sluice_kernels::slot::{SlotClass, SlotId};

use crate::engine::arena::Arena;
use crate::engine::calibrate::Relabeling;
use crate::engine::chunk::{ChunkStore, Removed};
use crate::engine::command::{Command, LeaseKey};
use crate::engine::config::EngineConfig;
use crate::engine::counters::Counters;
use crate::engine::error::EngineError;
use crate::engine::limbo::{Limbo, Waiting};
use crate::engine::model::{Folder, Model};
use crate::engine::sequence::SequenceState;
use crate::engine::spare::Spares;
use crate::journal::{Edit, Journal, JournalError};
use crate::seal::Job;

/// Ids that are reserved in the journal at a time.
const ID_BLOCK: u64 = 1 << 12;

/// What a command needs before it can be carried out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Until {
    /// These chunks are verified.
    Verified(Vec<u64>),
    /// The path of this sequence has so many chunks, or cannot get them.
    Sealed(u64, usize),
    /// The labels of this model are made.
    Calibrated(u64),
}

/// The outcome of a command.
#[derive(Debug)]
pub(crate) enum Outcome<T> {
    /// It was carried out.
    Done(T),
    /// Ask again later.
    Later(Until),
}

/// A ticket for the side socket.
#[derive(Debug)]
pub(crate) struct Ticket {
    pub(crate) lease: LeaseKey,
    pub(crate) writer: u32,
    pub(crate) expires: Instant,
}

/// Ways to the threads of the pool.
pub(crate) struct Queues {
    /// Seals, checks and labels.
    pub(crate) jobs: Sender<Job>,
    /// Segments.
    pub(crate) makers: Sender<Job>,
    /// Spare files.
    pub(crate) spares: Sender<Job>,
}

/// All state of the daemon but the rows.
pub(crate) struct Engine {
    pub(crate) config: Arc<EngineConfig>,
    pub(crate) counters: Arc<Counters>,
    pub(crate) folder: Folder,
    pub(crate) journal: Journal,
    pub(crate) boot_epoch: u64,
    pub(crate) models: BTreeMap<u64, Model>,
    pub(crate) arena: Arena,
    pub(crate) chunks: ChunkStore,
    pub(crate) sequences: BTreeMap<u64, SequenceState>,
    pub(crate) limbo: Limbo,
    pub(crate) waiting: VecDeque<(Until, Command)>,
    pub(crate) tickets: HashMap<[u8; 16], Ticket>,
    /// Chunks that are being verified.
    pub(crate) verifying: HashSet<u64>,
    /// Models whose chunks are being labelled.
    pub(crate) relabeling: BTreeMap<u64, Relabeling>,
    /// Bytes of segments that are being made, by model and class.
    pub(crate) growing: HashMap<(u64, SlotClass), u64>,
    /// Files of open slots made ahead.
    pub(crate) spares: Spares,
    pub(crate) queues: Queues,
    pub(crate) next_id: u64,
    pub(crate) reserved_id: u64,
    pub(crate) next_segment: u32,
    pub(crate) next_lease_check: Instant,
    /// Changes of this turn.
    pub(crate) edits: Vec<Edit>,
    /// Files to delete once the journal has forgotten them.
    pub(crate) doomed: Vec<PathBuf>,
    /// Boards to write once the journal has the news.
    pub(crate) dirty: BTreeSet<u64>,
    /// Window words to write again: sequence and chunk.
    pub(crate) window_words: BTreeSet<(u64, usize)>,
    /// Jobs to start once the journal has the news.
    pub(crate) planned: VecDeque<Job>,
    /// Answers to send once the boards are written.
    pub(crate) answers: Vec<Box<dyn FnOnce() + Send>>,
    /// What enters limbo at the next tick, with its readers.
    pub(crate) to_limbo: Vec<(Waiting, Vec<(u64, u64)>)>,
}

impl Engine {
    /// A new id.
    pub(crate) fn new_id(&mut self) -> u64 {
        let id = self.next_id;
        self.next_id += 1;
        if self.next_id > self.reserved_id {
            self.reserved_id = self.next_id + ID_BLOCK;
            self.edits.push(Edit::NextId(self.reserved_id));
        }
        id
    }

    /// Entries of every board.
    pub(crate) fn table_chunks(&self) -> u32 {
        self.config.max_tokens.div_ceil(sluice_kernels::slot::CHUNK_TOKENS as u64) as u32
    }

    /// A model.
    pub(crate) fn model(&self, id: u64) -> Result<&Model, EngineError> {
        self.models.get(&id).ok_or(EngineError::NotFound { field: "model_id", value: id })
    }

    /// The sequence of a lease in force.
    pub(crate) fn leased(&mut self, key: LeaseKey) -> Result<&mut SequenceState, EngineError> {
        let unknown = EngineError::NotFound { field: "lease.sequence_id", value: key.sequence };
        let sequence = self.sequences.get_mut(&key.sequence).ok_or(unknown)?;
        let current = sequence.record.generation;
        if current != key.generation {
            return Err(EngineError::StaleLease { sequence: key.sequence, given: key.generation, current });
        }
        let Some(lease) = &mut sequence.lease else {
            let needed = "resume it with Open first";
            return Err(EngineError::State { what: "sequence", id: key.sequence, state: "parked".to_owned(), needed });
        };
        lease.last_used = Instant::now();
        Ok(sequence)
    }

    /// The sequence of a lease in force whose rows are sound.
    pub(crate) fn leased_sound(&mut self, key: LeaseKey) -> Result<&mut SequenceState, EngineError> {
        let sequence = self.leased(key)?;
        if sequence.record.poisoned {
            let state = "poisoned by rows that cannot be sealed".to_owned();
            return Err(EngineError::State { what: "sequence", id: key.sequence, state, needed: "only Close is accepted" });
        }
        Ok(sequence)
    }

    /// Writes the journal, then boards, then starts jobs and deletes files. Answers are sent after it.
    pub(crate) fn settle(&mut self) -> Result<(), JournalError> {
        if !self.edits.is_empty() {
            let begin = Instant::now();
            self.journal.commit(&self.edits)?;
            self.counters.journal_commit.observe(begin.elapsed());
            self.edits.clear();
        }
        for id in std::mem::take(&mut self.dirty) {
            self.publish(id);
        }
        for (id, chunk) in std::mem::take(&mut self.window_words) {
            self.publish_window(id, chunk);
        }
        self.start_jobs();
        for answer in self.answers.drain(..) {
            answer();
        }
        Ok(())
    }

    /// Deletes files that the journal has forgotten; after the answers, because giving memory back takes time.
    pub(crate) fn delete_doomed(&mut self) {
        if !self.edits.is_empty() {
            return;
        }
        for path in self.doomed.drain(..) {
            if let Err(error) = std::fs::remove_file(&path) {
                tracing::warn!(path = %path.display(), %error, "cannot delete a file of the arena");
            }
        }
    }

    fn start_jobs(&mut self) {
        while let Some(job) = self.planned.pop_front() {
            // Files are made by threads of their own, so that sealing goes on meanwhile.
            let queue = match job {
                Job::Segment(_) => &self.queues.makers,
                Job::Spare(_) => &self.queues.spares,
                Job::Seal(_) | Job::Verify(_) | Job::Relabel(_) => &self.queues.jobs,
            };
            if let Err(TrySendError::Full(job)) = queue.try_send(job) {
                self.planned.push_front(job);
                return;
            }
        }
    }

    /// Writes a sequence's board: table words first, the count of sealed chunks after them.
    fn publish(&mut self, id: u64) {
        let Some(sequence) = self.sequences.get_mut(&id) else { return };
        let length = sequence.path.len();
        if length < sequence.published {
            sequence.board.set_sealed_chunks(length);
            sequence.published = length;
        }
        for index in sequence.published..length {
            let Some(chunk) = self.chunks.get(sequence.path[index]) else { continue };
            sequence.board.set_slot(SlotClass::Selected, index, chunk.record.selected);
            sequence.board.set_slot(SlotClass::Window, index, chunk.record.window);
        }
        sequence.board.set_sealed_chunks(length);
        sequence.published = length;
        sequence.board.set_truncations(sequence.seal_epoch);
        let labels = self.models.get(&sequence.record.model).and_then(|model| model.labels.as_ref());
        sequence.board.set_label_set(labels.map(|labels| labels.id));
        sequence.board.set_lease(self.boot_epoch, sequence.record.generation, sequence.board_state());
    }

    fn publish_window(&mut self, id: u64, index: usize) {
        let Some(sequence) = self.sequences.get(&id) else { return };
        let chunk = sequence.path.get(index).and_then(|&chunk| self.chunks.get(chunk));
        if index < sequence.published {
            sequence.board.set_slot(SlotClass::Window, index, chunk.and_then(|chunk| chunk.record.window));
        }
    }

    /// Live leases whose path has `chunk` at `index`.
    pub(crate) fn holders_of(&self, chunk: u64, index: usize) -> Vec<(u64, u64)> {
        let holds = |sequence: &&SequenceState| sequence.path.get(index) == Some(&chunk);
        self.sequences.values().filter(holds).map(|sequence| (sequence.id(), sequence.record.generation)).collect()
    }

    /// Frees a slot once none of `readers` can be reading it.
    pub(crate) fn retire_slot(&mut self, slot: SlotId, readers: Vec<(u64, u64)>) {
        let live = |&(id, _): &(u64, u64)| self.sequences.get(&id).is_some_and(SequenceState::is_held);
        if readers.iter().any(live) {
            self.to_limbo.push((Waiting::Slot(slot), readers));
        } else {
            self.arena.free(slot);
        }
    }

    /// Records that chunks have left the store.
    pub(crate) fn removed(&mut self, removed: impl IntoIterator<Item = Removed>) {
        for Removed { id, slots } in removed {
            self.edits.push(Edit::DropChunk(id));
            for slot in slots.into_iter().flatten() {
                self.arena.free(slot);
            }
        }
    }

    /// Gives up a hold on a chunk.
    pub(crate) fn release_chunk(&mut self, chunk: u64) {
        let removed = self.chunks.release(chunk);
        self.removed(removed);
    }
}
