//! Direct access: tickets, and the files that a holder is given.

use std::io::Read;
use std::sync::Arc;
use std::time::Instant;

use sluice_kernels::label::Calibration;
use sluice_kernels::shared::folder::{open_read_only, open_writable};
use sluice_kernels::shared::open::{MAX_OPAQUE_BYTES, MAX_WRITERS};

use crate::engine::command::{Attach, Attached, HolderFiles, HolderSegment, LeaseKey, Peer};
use crate::engine::error::EngineError;
use crate::engine::lease::Process;
use crate::engine::state::{Engine, Ticket};
use crate::journal::Edit;

/// Most tickets that are not redeemed.
const TICKETS_MAX: usize = 4096;

impl Engine {
    /// Makes a ticket.
    pub(crate) fn attach(&mut self, request: &Attach) -> Result<Attached, EngineError> {
        let sequence = self.leased_sound(request.lease)?;
        let id = request.lease.sequence;
        if sequence.lease.as_ref().is_some_and(|lease| lease.streamed) {
            let state = "decoded by the daemon".to_owned();
            return Err(EngineError::State { what: "sequence", id, state, needed: "attach before the first Append or Decode" });
        }
        let (model, mut writers) = (sequence.record.model, sequence.record.writers.clone());
        if request.lanes.is_some() && writers.is_empty() && sequence.record.direct {
            let state = "attached by a worker of all lanes".to_owned();
            return Err(EngineError::State { what: "sequence", id, state, needed: "its first worker names its lanes as well" });
        }
        if self.tickets.len() >= TICKETS_MAX {
            let fix = "redeem tickets, or wait until they expire";
            return Err(EngineError::Exhausted { limit: "tickets", wanted: 1, available: 0, fix });
        }
        let writer = match &request.lanes {
            Some(lanes) => self.writer_of(model, &mut writers, lanes.start, lanes.end.saturating_sub(lanes.start))?,
            None if writers.is_empty() => 0,
            None => return Err(EngineError::invalid("lane_count", 0, "the lanes that no other worker of the sequence has")),
        };
        let mut ticket = [0; 16];
        let random = std::fs::File::open("/dev/urandom").and_then(|mut source| source.read_exact(&mut ticket));
        random.map_err(|error| EngineError::Internal(format!("read random bytes: {error}")))?;
        let expires = Instant::now() + self.config.ticket_lifetime;
        self.tickets.insert(ticket, Ticket { lease: request.lease, writer, expires });
        let sequence = self.leased_sound(request.lease)?;
        sequence.record.direct = true;
        sequence.record.writers = writers;
        let settings = sequence.record.settings;
        let record = sequence.record.clone();
        self.edits.push(Edit::Sequence(record));
        let calibration = self.model(model)?.labels.as_ref().map(|labels| (labels.id, Arc::clone(&labels.calibration)));
        Ok(Attached { ticket, writer, calibration, settings })
    }

    /// The writer index of a lane range: the one it has already, or a new one.
    fn writer_of(&self, model: u64, writers: &mut Vec<(u32, u32)>, first: u32, count: u32) -> Result<u32, EngineError> {
        let layers = &self.model(model)?.shape.layers;
        let lanes = layers.first().map_or(0, |layer| u32::from(layer.kv_heads));
        if layers.iter().any(|layer| u32::from(layer.kv_heads) != lanes) {
            return Err(EngineError::invalid("lane_count", count, "0 for a model whose layers differ in kv_heads"));
        }
        if count == 0 || first.checked_add(count).is_none_or(|end| end > lanes) {
            return Err(EngineError::invalid(
                "first_lane + lane_count",
                u64::from(first) + u64::from(count),
                format!("1 to {lanes} lanes"),
            ));
        }
        if let Some(writer) = writers.iter().position(|&range| range == (first, count)) {
            return Ok(writer as u32);
        }
        let overlaps = |&&(start, length): &&(u32, u32)| first < start + length && start < first + count;
        if let Some(&(start, length)) = writers.iter().find(overlaps) {
            let bound = format!("lanes outside {start}..{}, which another worker has", start + length);
            return Err(EngineError::invalid("first_lane", first, bound));
        }
        if writers.len() >= MAX_WRITERS {
            return Err(EngineError::invalid("lane ranges of the sequence", writers.len() + 1, format!("1 to {MAX_WRITERS}")));
        }
        writers.push((first, count));
        let covered: u32 = writers.iter().map(|&(_, count)| count).sum();
        if writers.len() == MAX_WRITERS && covered < lanes {
            let bound = format!("{} lanes, what worker {MAX_WRITERS} of {MAX_WRITERS} must complete", lanes - covered + count);
            return Err(EngineError::invalid("lane_count", count, bound));
        }
        Ok(writers.len() as u32 - 1)
    }

    /// Redeems a ticket, once.
    pub(crate) fn redeem(&mut self, ticket: &[u8; 16], peer: Peer) -> Result<HolderFiles, EngineError> {
        let unknown = || EngineError::invalid("ticket", "given", "tickets that Attach answered less than ticket_lifetime ago, once");
        let Ticket { lease, writer, expires } = self.tickets.remove(ticket).ok_or_else(unknown)?;
        if expires <= Instant::now() {
            return Err(unknown());
        }
        let Peer::Local { pid, uid } = peer else {
            return Err(EngineError::Permission { field: "ticket", pid: 0, reason: "is not of this machine" });
        };
        let refused = |reason| EngineError::Permission { field: "ticket", pid: pid.into(), reason };
        let sequence = self.leased_sound(lease)?;
        if uid != sequence.record.uid {
            return Err(refused("belongs to another user"));
        }
        // Whoever maps the files is part of the lease: it ends when the last of its processes is dead.
        let known = sequence.record.processes.iter().any(|process| process.pid == pid);
        if !known {
            let process = Process::open(pid, uid).map_err(refused)?;
            sequence.record.processes.push(process.id);
            sequence.lease.iter_mut().for_each(|lease| lease.processes.retain(|process| process.id.pid != pid));
            if let Some(lease) = &mut sequence.lease {
                lease.processes.push(process);
            }
            let record = sequence.record.clone();
            self.edits.push(Edit::Sequence(record));
        }
        self.holder_files(lease, writer)
    }

    /// Files for the daemon's own decoder.
    pub(crate) fn host(&mut self, key: LeaseKey) -> Result<HolderFiles, EngineError> {
        let sequence = self.leased_sound(key)?;
        if sequence.record.direct {
            let state = "attached directly".to_owned();
            return Err(EngineError::State { what: "sequence", id: key.sequence, state, needed: "its holder appends and decodes itself" });
        }
        if let Some(lease) = &mut sequence.lease {
            lease.streamed = true;
        }
        self.holder_files(key, 0)
    }

    fn holder_files(&mut self, key: LeaseKey, writer: u32) -> Result<HolderFiles, EngineError> {
        let board = open_read_only(&self.folder.board(key.sequence))?;
        let open = open_writable(&self.folder.open(key.sequence))?;
        let sequence = self.leased_sound(key)?;
        let (settings, open_slots, committed) = (sequence.record.settings, sequence.record.open_slots, sequence.committed);
        let (table_chunks, model) = (sequence.board.table_chunks(), sequence.record.model);
        let model = self.model(model)?;
        let calibration = model.labels.as_ref().map(|labels| Arc::clone(&labels.calibration));
        let shape = Arc::clone(&model.shape);
        Ok(HolderFiles { lease: key, board, open, shape, calibration, settings, open_slots, table_chunks, committed, writer })
    }

    /// Stores opaque state for a holder that has no descriptor of its open slots.
    pub(crate) fn store_opaque(&mut self, key: LeaseKey, state: &[u8]) -> Result<(), EngineError> {
        if state.len() > MAX_OPAQUE_BYTES {
            return Err(EngineError::invalid("state", format!("{} bytes", state.len()), format!("0 to {MAX_OPAQUE_BYTES} bytes")));
        }
        let sequence = self.leased_sound(key)?;
        if sequence.record.direct {
            let state = "attached directly".to_owned();
            return Err(EngineError::State { what: "sequence", id: key.sequence, state, needed: "its holder stores the state itself" });
        }
        Ok(sequence.open.store_opaque(state)?)
    }

    /// A segment for a holder of the same model.
    pub(crate) fn holder_segment(&mut self, key: LeaseKey, id: u32) -> Result<HolderSegment, EngineError> {
        let model = self.leased(key)?.record.model;
        let segment = self.arena.segment(id).filter(|segment| segment.record.model == model);
        let segment = segment.ok_or(EngineError::NotFound { field: "segment", value: id.into() })?;
        let duplicate =
            |file: &std::fs::File| file.try_clone().map_err(|error| EngineError::Internal(format!("duplicate a descriptor: {error}")));
        let labels = match &segment.labels {
            Some(labels) => Some((labels.mapped.label_set, duplicate(&labels.read_only)?)),
            None => None,
        };
        let (slots, class) = (segment.record.slots, segment.record.class);
        Ok(HolderSegment { id, slots, class, rows: duplicate(&segment.read_only)?, labels })
    }

    /// Calibration in force of a sequence's model.
    pub(crate) fn calibration_of(&mut self, key: LeaseKey) -> Result<Option<Arc<Calibration>>, EngineError> {
        let model = self.leased(key)?.record.model;
        Ok(self.model(model)?.labels.as_ref().map(|labels| Arc::clone(&labels.calibration)))
    }
}
