//! Open: the longest known prefix, a lease, and room to grow.

use std::sync::Arc;
use std::time::Instant;

use sluice_kernels::budget::{Budget, Settings};
use sluice_kernels::shared::board::Board;
use sluice_kernels::shared::folder::create_allocated;
use sluice_kernels::shared::open::{OpenFile, OpenLayout};
use sluice_kernels::slot::{CHUNK_TOKENS, SlotClass};

use crate::engine::command::{LeaseKey, Open, Opened, Peer};
use crate::engine::error::EngineError;
use crate::engine::lease::Process;
use crate::engine::name::Name;
use crate::engine::sequence::{Lease, SequenceState};
use crate::engine::state::{Engine, Outcome, Until};
use crate::journal::{Edit, SequenceRecord};

/// Most further key parts of a prefix.
const EXTRA_KEYS_MAX: usize = 16;
/// Most bytes of each.
const EXTRA_KEY_BYTES_MAX: usize = 256;

/// Who will hold a lease.
pub(crate) struct Holder {
    pub(crate) lease: Lease,
    pub(crate) uid: u32,
}

/// A sequence to be made.
pub(crate) struct NewSequence {
    pub(crate) model: u64,
    pub(crate) root: Name,
    pub(crate) settings: Settings,
    pub(crate) open_slots: u32,
    pub(crate) prompt_chunks: usize,
    pub(crate) path: Vec<u64>,
    pub(crate) position: u64,
    pub(crate) holder: Holder,
}

impl Engine {
    /// Opens a sequence over the longest known prefix.
    pub(crate) fn open(&mut self, request: &Open) -> Result<Outcome<Opened>, EngineError> {
        if let Some(id) = request.resume {
            return self.resume(id, request);
        }
        self.check_open(request)?;
        let settings = request.settings.unwrap_or(self.config.settings_default);
        check_settings(&settings)?;
        let open_slots = self.check_open_slots(request.model, request.open_slots)?;
        let holder = holder(request.holder_pid, request.peer)?;
        let root = self.model(request.model)?.root(&self.config.namespace_salt, &request.extra_keys);
        let path = self.match_prefix(request.model, root, &request.tokens);
        let unverified = self.unverified(&path);
        if !unverified.is_empty() {
            return Ok(Outcome::Later(Until::Verified(self.verify(unverified)?)));
        }
        let end = self.usable_end(request.model, &path);
        let path = path[..end].to_vec();
        let prompt_chunks = request.tokens.len() / CHUNK_TOKENS;
        self.admit(request.model, &path, prompt_chunks, open_slots)?;
        let position = (end * CHUNK_TOKENS) as u64;
        self.counters.prefix_hit_tokens.add(position);
        self.counters.prefix_miss_tokens.add(request.tokens.len() as u64 - position);
        let model = request.model;
        for class in [SlotClass::Selected, SlotClass::Window] {
            self.grow_ahead(model, class, u64::from(open_slots).max(1));
        }
        let lease = self.create(NewSequence { model, root, settings, open_slots, prompt_chunks, path, position, holder })?;
        Ok(Outcome::Done(self.opened(lease, settings)))
    }

    fn check_open(&self, request: &Open) -> Result<(), EngineError> {
        self.model(request.model)?;
        if request.tokens.len() as u64 > self.config.max_tokens {
            return Err(EngineError::invalid("token_ids", request.tokens.len(), format!("0 to {} tokens", self.config.max_tokens)));
        }
        if request.extra_keys.len() > EXTRA_KEYS_MAX {
            return Err(EngineError::invalid("extra_keys", request.extra_keys.len(), format!("0 to {EXTRA_KEYS_MAX} keys")));
        }
        if let Some(key) = request.extra_keys.iter().find(|key| key.len() > EXTRA_KEY_BYTES_MAX) {
            return Err(EngineError::invalid("extra_keys", key.len(), format!("0 to {EXTRA_KEY_BYTES_MAX} bytes a key")));
        }
        Ok(())
    }

    /// Checks the open slots wanted and that there is memory for one sequence more.
    pub(crate) fn check_open_slots(&self, model: u64, wanted: u32) -> Result<u32, EngineError> {
        let open_slots = if wanted == 0 { self.config.open_slots_default } else { wanted };
        let shape = &self.model(model)?.shape;
        let layout = OpenLayout::new(shape, open_slots).map_err(|_| EngineError::invalid("open_slots", wanted, "2 to 4096, or 0"))?;
        if self.sequences.len() >= self.config.max_sequences {
            let fix = "close sequences, or raise max_sequences";
            return Err(EngineError::Exhausted { limit: "max_sequences", wanted: 1, available: 0, fix });
        }
        let available = self.config.open_bytes_max.saturating_sub(self.open_bytes());
        if layout.file_bytes() > available {
            let fix = "ask for fewer open_slots, close sequences, or raise open_bytes_max";
            return Err(EngineError::Exhausted { limit: "open_bytes_max", wanted: layout.file_bytes(), available, fix });
        }
        Ok(open_slots)
    }

    /// Bytes of all open slot files.
    pub(crate) fn open_bytes(&self) -> u64 {
        self.sequences.values().map(|sequence| sequence.open_bytes).sum()
    }

    /// Chunks of the longest prefix of `tokens` that is known and sound so far.
    fn match_prefix(&self, model: u64, root: Name, tokens: &[u32]) -> Vec<u64> {
        let mut name = root;
        let mut path = Vec::new();
        for part in tokens.chunks_exact(CHUNK_TOKENS) {
            name = name.child(part, None);
            match self.chunks.named(model, name) {
                Some(chunk) if chunk.is_shareable() => path.push(chunk.record.id),
                _ => break,
            }
        }
        path
    }

    /// Refuses what could not be sealed: the prompt's chunks and some growth, beside what others were promised.
    fn admit(&self, model: u64, path: &[u64], prompt_chunks: usize, open_slots: u32) -> Result<(), EngineError> {
        let wanted = (prompt_chunks - path.len()) as u64 + u64::from(open_slots);
        let promised = self.sequences.values().filter(|sequence| sequence.record.model == model && sequence.is_held());
        let promised: u64 =
            promised.map(|sequence| (sequence.record.prompt_chunks as usize).saturating_sub(sequence.path.len()) as u64).sum();
        let kept = path.iter().filter(|&&id| self.chunks.get(id).is_some_and(|chunk| !chunk.is_held())).count();
        let available = self.available_chunks(model, kept as u64).saturating_sub(promised);
        if wanted > available {
            let fix = "close sequences, or raise arena_bytes (counted in chunks of 256 tokens)";
            return Err(EngineError::Exhausted { limit: "arena_bytes", wanted, available, fix });
        }
        Ok(())
    }

    /// Makes files and state of a sequence whose path is given, with the first lease.
    pub(crate) fn create(&mut self, new: NewSequence) -> Result<LeaseKey, EngineError> {
        let table_chunks = self.table_chunks();
        let model = self.model(new.model)?;
        let (layout, lanes) = (OpenLayout::new(&model.shape, new.open_slots)?, model.lanes());
        let id = self.new_id();
        let (open_path, board_path) = (self.folder.open(id), self.folder.board(id));
        let open_bytes = layout.file_bytes();
        self.spare_bytes_for(open_bytes);
        let open = OpenFile::create(self.open_slot_file(&open_path, open_bytes)?, layout)?;
        let board = create_allocated(&board_path, Board::file_bytes(table_chunks), 1).and_then(|file| Board::create(&file, table_chunks));
        let board = board.inspect_err(|_| self.doomed.push(open_path))?;
        open.set_committed(new.position)?;
        let record = SequenceRecord {
            id,
            model: new.model,
            root: new.root,
            settings: new.settings,
            generation: 1,
            parked_at: None,
            poisoned: false,
            processes: new.holder.lease.processes.iter().map(|process| process.id).collect(),
            uid: new.holder.uid,
            direct: false,
            writers: Vec::new(),
            open_slots: new.open_slots,
            prompt_chunks: new.prompt_chunks as u32,
        };
        for &chunk in &new.path {
            self.chunks.hold(chunk);
        }
        if !new.path.is_empty() {
            self.edits.push(Edit::Path { sequence: id, first: 0, chunks: new.path.clone() });
        }
        self.edits.push(Edit::Sequence(record.clone()));
        let sequence = SequenceState {
            record,
            path: new.path,
            open: Arc::new(open),
            open_bytes,
            board,
            lease: Some(new.holder.lease),
            committed: new.position,
            seal_epoch: 0,
            sealing: false,
            stall: None,
            lanes,
            window_from: 0,
            published: 0,
            next_poll: Instant::now(),
            quiet_polls: 0,
        };
        self.sequences.insert(id, sequence);
        self.plan_spares(open_bytes);
        self.need_windows_from(id, new.position);
        self.dirty.insert(id);
        Ok(LeaseKey { sequence: id, generation: 1 })
    }

    /// The answer to an Open whose matched tokens the caller knows.
    pub(crate) fn opened(&self, lease: LeaseKey, settings: Settings) -> Opened {
        let sequence = self.sequences.get(&lease.sequence);
        let matched_tokens = sequence.map_or(0, |sequence| sequence.committed);
        let tokens_until_full = sequence.map_or(0, |sequence| sequence.capacity_tokens()) - matched_tokens;
        Opened { lease, matched_tokens, settings, opaque_state: Vec::new(), token_ids: Vec::new(), tokens_until_full }
    }
}

/// The process that will hold a lease, proven to exist and to belong to the caller's user.
pub(crate) fn holder(holder_pid: u32, peer: Peer) -> Result<Holder, EngineError> {
    let (pid, uid) = match peer {
        Peer::Local { pid, uid } if holder_pid == 0 => (i64::from(pid), uid),
        Peer::Local { uid, .. } => (i64::from(holder_pid), uid),
        Peer::Remote if holder_pid == 0 => {
            let lease = Lease { processes: Vec::new(), last_used: Instant::now(), streamed: false };
            return Ok(Holder { lease, uid: 0 });
        }
        Peer::Remote => {
            let reason = "can only be named over the Unix socket";
            return Err(EngineError::Permission { field: "holder_pid", pid: holder_pid.into(), reason });
        }
    };
    let refused = |reason| EngineError::Permission { field: "holder_pid", pid, reason };
    let pid = i32::try_from(pid).map_err(|_| refused("is not a process id"))?;
    let process = Process::open(pid, uid).map_err(refused)?;
    Ok(Holder { lease: Lease { processes: vec![process], last_used: Instant::now(), streamed: false }, uid })
}

/// Checks the settings of steps.
pub(crate) fn check_settings(settings: &Settings) -> Result<(), EngineError> {
    if !(64..=65_536).contains(&settings.exact_tokens) {
        return Err(EngineError::invalid("settings.exact_tokens", settings.exact_tokens, "64 to 65536, or 0"));
    }
    if settings.sink_tokens > 64 {
        return Err(EngineError::invalid("settings.sink_tokens", settings.sink_tokens, "0 to 64"));
    }
    if let Budget::Ratio { numerator, denominator, .. } = settings.budget
        && (numerator == 0 || denominator < numerator)
    {
        let value = format!("{numerator}/{denominator}");
        return Err(EngineError::invalid("settings.budget", value, "ratios above 0 and up to 1, or 0/0"));
    }
    Ok(())
}
