//! Start: takes up what the last daemon left, and throws away what its journal does not know.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet, VecDeque};
use std::fs::DirBuilder;
use std::io::Read;
use std::os::unix::fs::DirBuilderExt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use sluice_kernels::shared::board::Board;
use sluice_kernels::shared::folder::{open_read_only, open_writable};
use sluice_kernels::shared::open::{OpenFile, OpenLayout};
use sluice_kernels::shared::segment::{Access, LabelSegment, Segment};
use sluice_kernels::slot::{CHUNK_TOKENS, SlotClass};

use crate::engine::arena::{Arena, SegmentLabels, SegmentState};
use crate::engine::chunk::ChunkStore;
use crate::engine::config::EngineConfig;
use crate::engine::counters::Counters;
use crate::engine::error::EngineError;
use crate::engine::lease::{Process, boot_id};
use crate::engine::limbo::{Limbo, Waiting};
use crate::engine::model::{Folder, Model};
use crate::engine::sequence::{Lease, SequenceState};
use crate::engine::spare::Spares;
use crate::engine::state::{Engine, Queues};
use crate::journal::{ChunkRecord, Edit, Journal, JournalError, SegmentRecord, SequenceRecord, Snapshot};

impl Engine {
    /// Opens the arena folder and brings the engine to where the journal says it was.
    pub(crate) fn recover(config: EngineConfig, counters: Arc<Counters>, queues: Queues) -> Result<Self, EngineError> {
        config.check()?;
        let folder = Folder(config.arena_dir.clone());
        DirBuilder::new().recursive(true).mode(0o700).create(folder.path()).map_err(|error| {
            EngineError::invalid("arena_dir", format!("{}: {error}", folder.path().display()), "folders that can be created")
        })?;
        let journal = Journal::open(&folder.journal(), &boot_id()).map_err(|error| match error {
            JournalError::InUse => EngineError::invalid("arena_dir", folder.path().display(), "folders that no running daemon uses"),
            other => other.into(),
        })?;
        let snapshot = journal.snapshot()?;
        let mut engine = Self {
            counters,
            folder,
            journal,
            boot_epoch: random_epoch()?,
            models: BTreeMap::new(),
            arena: Arena::default(),
            chunks: ChunkStore::default(),
            sequences: BTreeMap::new(),
            limbo: Limbo::default(),
            waiting: VecDeque::new(),
            tickets: HashMap::new(),
            verifying: HashSet::new(),
            relabeling: BTreeMap::new(),
            growing: HashMap::new(),
            spares: Spares::default(),
            queues,
            next_id: snapshot.next_id,
            reserved_id: snapshot.next_id,
            next_segment: snapshot.next_segment,
            next_lease_check: Instant::now(),
            edits: Vec::new(),
            doomed: Vec::new(),
            dirty: BTreeSet::new(),
            window_words: BTreeSet::new(),
            planned: VecDeque::new(),
            answers: Vec::new(),
            to_limbo: Vec::new(),
            config: Arc::new(config),
        };
        engine.take_up(snapshot)?;
        engine.check_room()?;
        engine.settle()?;
        engine.delete_doomed();
        engine.set_levels();
        Ok(engine)
    }

    fn take_up(&mut self, snapshot: Snapshot) -> Result<(), EngineError> {
        for record in snapshot.models {
            self.models.insert(record.id, Model::new(record)?);
        }
        for record in snapshot.segments {
            if let Err(error) = self.take_up_segment(record) {
                tracing::error!(%error, segment = record.id, "a segment of the journal cannot be mapped: dropped");
                self.edits.push(Edit::DropSegment(record.id));
            }
        }
        for record in snapshot.chunks {
            self.take_up_chunk(record);
        }
        self.recount_ends();
        for (record, path) in snapshot.sequences {
            let id = record.id;
            if let Err(error) = self.take_up_sequence(record, path) {
                tracing::error!(%error, sequence = id, "a sequence of the journal cannot be opened: dropped");
                self.edits.push(Edit::DropSequence(id));
            }
        }
        self.drop_stray_windows();
        self.bound_parked();
        self.hold_back_free_slots();
        self.delete_orphans()
    }

    fn take_up_segment(&mut self, record: SegmentRecord) -> Result<(), EngineError> {
        let model = self.model(record.model)?;
        let path = self.folder.rows(record.id);
        let file = open_writable(&path)?;
        let mapped = Segment::map(record.id, record.slots, Arc::clone(model.class(record.class)), &file, Access::Writable)?;
        let mut segment = SegmentState::new(record, Arc::new(mapped), open_read_only(&path)?);
        if let Some(labels) = model.labels.as_ref().filter(|_| record.class == SlotClass::Selected) {
            let path = self.folder.labels(record.id, labels.id);
            let file = open_writable(&path)?;
            let mapped = LabelSegment::map(labels.id, record.slots, Arc::clone(&labels.layout), &file, Access::Writable)?;
            let bytes = labels.layout.segment_bytes(record.slots);
            segment.labels = Some(SegmentLabels { mapped: Arc::new(mapped), read_only: open_read_only(&path)?, bytes });
        }
        self.arena.add(segment);
        Ok(())
    }

    fn take_up_chunk(&mut self, record: ChunkRecord) {
        let lost = [record.selected, record.window].into_iter().flatten().any(|slot| !self.arena.claim(slot));
        let orphan = record.parent.is_some_and(|parent| self.chunks.get(parent).is_none());
        if lost || orphan {
            for slot in [record.selected, record.window].into_iter().flatten().filter(|_| !lost) {
                self.arena.free(slot);
            }
            self.edits.push(Edit::DropChunk(record.id));
            return;
        }
        self.chunks.add(record, false);
    }

    fn take_up_sequence(&mut self, record: SequenceRecord, mut path: Vec<u64>) -> Result<(), EngineError> {
        let id = record.id;
        let model = self.model(record.model)?;
        let (layout, lanes) = (OpenLayout::new(&model.shape, record.open_slots)?, model.lanes());
        let open_bytes = layout.file_bytes();
        let open = OpenFile::reopen(open_writable(&self.folder.open(id))?, layout);
        let board = Board::map(&open_writable(&self.folder.board(id))?, Access::Writable)?;
        let whole = path.iter().position(|&chunk| self.chunks.get(chunk).is_none()).unwrap_or(path.len());
        let is_cut = whole < path.len();
        path.truncate(whole);
        let processes: Vec<Process> = record.processes.iter().filter_map(|&process| Process::reopen(process)).collect();
        let is_held = record.parked_at.is_none() && (record.processes.is_empty() || !processes.is_empty());
        let lease = is_held.then(|| Lease { processes, last_used: Instant::now(), streamed: false });
        for &chunk in &path {
            self.chunks.hold(chunk);
        }
        let window_from = self.kept_windows_from(&path);
        for &chunk in &path[window_from..] {
            self.need_window(chunk);
        }
        let committed = (path.len() * CHUNK_TOKENS) as u64;
        let seal_epoch = board.truncations();
        let was_parked = record.parked_at.is_some();
        let sequence = SequenceState {
            record,
            path,
            open: Arc::new(open),
            open_bytes,
            board,
            lease,
            committed,
            seal_epoch,
            sealing: false,
            stall: None,
            lanes,
            window_from,
            published: 0,
            next_poll: Instant::now(),
            quiet_polls: 0,
        };
        self.sequences.insert(id, sequence);
        self.dirty.insert(id);
        if is_cut {
            self.edits.push(Edit::CutPath { sequence: id, keep: whole as u32 });
            self.poison(id, "a chunk of its path is lost");
        }
        if !is_held && !was_parked {
            self.park(id);
        }
        Ok(())
    }

    /// First chunk of the last run of chunks that have window rows.
    fn kept_windows_from(&self, path: &[u64]) -> usize {
        let has_window = |id: &&u64| self.chunks.get(**id).is_some_and(|chunk| chunk.record.window.is_some());
        path.len() - path.iter().rev().take_while(has_window).count()
    }

    /// Frees window slots that no end needs: the last daemon died before it had given them up.
    fn drop_stray_windows(&mut self) {
        let stray = self.chunks.iter().filter(|chunk| chunk.window_needs == 0 && chunk.record.window.is_some());
        for id in stray.map(|chunk| chunk.record.id).collect::<Vec<_>>() {
            self.need_window(id);
            self.unneed_window(id);
        }
    }

    /// Limbo is not journaled: a live worker may be in a step over slots that are free by the journal, so they wait for it. The last
    /// daemon's own decoder died with it and reads nothing any more.
    fn hold_back_free_slots(&mut self) {
        let models: Vec<u64> = self.models.keys().copied().collect();
        for model in models {
            let of_model = self.sequences.values().filter(|sequence| sequence.record.model == model);
            let of_model = of_model.filter(|sequence| sequence.is_held() && sequence.record.direct);
            let readers: Vec<(u64, u64)> = of_model.map(|sequence| (sequence.id(), sequence.record.generation)).collect();
            if !readers.is_empty() {
                let slots = self.arena.take_free(model);
                self.to_limbo.extend(slots.into_iter().map(|slot| (Waiting::Slot(slot), readers.clone())));
            }
        }
    }

    /// Deletes files that the journal does not know: half-made ones, spares, and those of dropped sequences.
    fn delete_orphans(&mut self) -> Result<(), EngineError> {
        let mut known: HashSet<PathBuf> = HashSet::from([self.folder.journal()]);
        for segment in self.arena.segments() {
            known.insert(self.folder.rows(segment.record.id));
            known.extend(segment.labels.as_ref().map(|labels| self.folder.labels(segment.record.id, labels.mapped.label_set)));
        }
        for &id in self.sequences.keys() {
            known.extend([self.folder.open(id), self.folder.board(id)]);
        }
        known.extend(self.doomed.iter().cloned());
        let failed = |error: std::io::Error| EngineError::Internal(format!("read the arena folder: {error}"));
        for entry in std::fs::read_dir(self.folder.path()).map_err(failed)? {
            let path = entry.map_err(failed)?.path();
            let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
            let ours = ["seg-", "open-", "board-", "spare-"].iter().any(|prefix| name.starts_with(prefix));
            if ours && !known.contains(&path) {
                tracing::info!(path = %path.display(), "deleting a file that the journal does not know");
                self.doomed.push(path);
            }
        }
        Ok(())
    }

    /// Refuses a budget that the file system of the arena cannot hold.
    fn check_room(&self) -> Result<(), EngineError> {
        let stat = rustix::fs::statvfs(self.folder.path());
        let stat = stat.map_err(|error| EngineError::Internal(format!("inspect the arena folder: {error}")))?;
        let available = stat.f_bavail * stat.f_frsize;
        let wanted = self.config.arena_bytes.saturating_sub(self.arena.row_bytes());
        if wanted > available {
            let fix = "lower arena_bytes, or enlarge the tmpfs of arena_dir (mount -o remount,size=...)";
            return Err(EngineError::Exhausted { limit: "arena_bytes", wanted, available, fix });
        }
        Ok(())
    }
}

fn random_epoch() -> Result<u64, EngineError> {
    let mut bytes = [0; 8];
    let read = std::fs::File::open("/dev/urandom").and_then(|mut source| source.read_exact(&mut bytes));
    read.map_err(|error| EngineError::Internal(format!("read random bytes: {error}")))?;
    Ok(u64::from_le_bytes(bytes).max(1))
}
