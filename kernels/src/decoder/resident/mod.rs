//! Steps of a device that keeps state of its own: labels, hot rows and the newest rows stay there between steps, and only what a step
//! selects and does not find there crosses the link.
//!
//! The state follows the sequence: before each step it takes up labels of new chunks, rows that were written, and places that have changed.
//! What it holds is never needed for a result, only for its speed: state that does not fit is made anew.

mod files;
mod group;
mod limits;
mod state;

use std::sync::Arc;
use std::time::Instant;

use super::{Plan, Query, StepError, StepReport};
use crate::budget::Budget;
use crate::device::cuda::compile::Compiler;
use crate::device::cuda::host::{HostFile, HostPage, HostPart, HostSegment};
use crate::device::cuda::host_step::{HostStep, LayerWork};
use crate::device::cuda::jobs::COLD;
use crate::device::cuda::seat::{DeviceBytes, Kept, Seat, SeatShape};
use crate::device::cuda::{CudaError, Doing, Gpu};
use crate::sequence::{LayerPart, Sequence};
use crate::slot::{CHUNK_TOKENS, SlotClass};
use files::Files;
use group::{Group, GroupKey, Room};
use limits::Ledger;
use state::{Progress, ResidentPart, TailPage};

pub use limits::DeviceLimits;
pub use state::Resident;

/// Seats have room for a multiple of this many tokens.
const CAPACITY_STEP: usize = 4096;
/// Pages from the horizon on, at least: with the default budget sequences are attended whole up to three chunks.
const TAIL_CHUNKS: usize = 4;
/// The same for sequences whose budget is everything: up to 32Ki tokens they lie on the device whole.
const DENSE_CHUNKS: usize = 128;

/// A device whose state of sequences outlives a step.
pub(super) struct ResidentDecoder {
    gpu: Gpu,
    compiler: Arc<Compiler>,
    limits: DeviceLimits,
    /// From the first use on.
    ledger: Option<Arc<Ledger>>,
    files: Files,
    groups: Vec<Group>,
    /// The group of the last step that selected.
    last: Option<usize>,
}

/// What a sequence's state has room for.
struct Size {
    capacity: usize,
    max_count: usize,
    pool: usize,
    tail_chunks: usize,
}

impl Size {
    /// For a sequence of `length` tokens that goes on growing; `None` where a lane selects more rows than places have numbers.
    fn of(sequence: &Sequence, length: usize, limits: DeviceLimits) -> Option<Self> {
        let capacity = (length + length / 8).next_multiple_of(CAPACITY_STEP);
        let max_count = most_selected(sequence, capacity);
        let most = usize::from(COLD) - 1;
        let wanted = match sequence.hot_rows_wanted().max(limits.hot_rows) {
            0 => 3 * max_count,
            rows => rows,
        };
        let pool = wanted.max(max_count).min(capacity).min(most);
        (max_count <= most).then_some(Self {
            capacity,
            max_count,
            pool,
            tail_chunks: tail_chunks_of(sequence).min(capacity / CHUNK_TOKENS),
        })
    }
}

impl ResidentDecoder {
    pub(super) fn new(gpu: Gpu, compiler: Arc<Compiler>) -> Self {
        let (files, groups) = (Files::default(), Vec::new());
        Self { gpu, compiler, limits: DeviceLimits::default(), ledger: None, files, groups, last: None }
    }

    pub(super) fn set_limits(&mut self, limits: DeviceLimits) {
        self.limits = limits;
    }

    /// Device memory in use, by what it is for.
    pub(super) fn bytes(&self) -> DeviceBytes {
        self.ledger.as_ref().map(|ledger| ledger.used()).unwrap_or_default()
    }

    /// Lets go of the memory of sequences that are gone.
    pub(super) fn sweep(&mut self) {
        self.groups.iter_mut().for_each(Group::sweep);
        let knowing = |number: usize, groups: &[Group]| groups.iter().filter(|group| group.step.batch().segment(number).is_some()).count();
        for (number, segment) in self.files.known() {
            // The reference at hand, and those of batches.
            if Arc::strong_count(&segment) == 1 + knowing(number, &self.groups) {
                self.groups.iter_mut().for_each(|group| group.step.batch_mut().forget_segment(number));
            }
        }
    }

    /// Positions that the last step selected, `[own lane][count]`.
    pub(super) fn positions(&self) -> Result<Vec<u32>, CudaError> {
        let Some(group) = self.last.and_then(|group| self.groups.get(group)) else { return Ok(Vec::new()) };
        group.step.batch().positions(0)
    }

    /// One layer of a step of one query, if the device can hold what that needs; `None` otherwise.
    pub(super) fn attend(
        &mut self,
        layer: usize,
        sequence: &mut Sequence,
        part: &LayerPart,
        plan: &Plan,
        query: &mut Query<'_>,
    ) -> Result<Option<StepReport>, StepError> {
        if !sequence.is_calibrated() || (plan.count == 0 && streams(sequence, query.position)) {
            return Ok(None);
        }
        let begin = Instant::now();
        let Some(mut resident) = self.state(sequence, query.position + 1)? else { return Ok(None) };
        // State that a failed call may have left half-way is dropped.
        let hits = self.attend_with(&mut resident, layer, sequence, part, plan, query)?;
        sequence.put_resident(resident);
        let lanes = part.geometry.heads.lanes();
        let exact_rows = query.position + 1 - if plan.count == 0 { 0 } else { plan.horizon };
        let label_bytes = sequence.coder(layer).map_or(0, |coder| coder.plan.label_bytes());
        Ok(Some(StepReport {
            selected_rows: (lanes * plan.count) as u64,
            hot_rows: hits,
            row_bytes: (lanes * (plan.count + exact_rows) * part.geometry.row_bytes()) as u64,
            label_bytes: if plan.count == 0 { 0 } else { (lanes * plan.horizon * label_bytes) as u64 },
            fused: begin.elapsed(),
            ..StepReport::default()
        }))
    }

    /// Answers with the selected rows that were hot.
    fn attend_with(
        &mut self,
        resident: &mut Resident,
        layer: usize,
        sequence: &Sequence,
        part: &LayerPart,
        plan: &Plan,
        query: &mut Query<'_>,
    ) -> Result<u64, StepError> {
        let before_horizon = if plan.count > 0 { plan.horizon / CHUNK_TOKENS } else { 0 };
        self.follow(resident, sequence, before_horizon)?;
        let Some((part_index, own_layer)) = resident.part_of_layer[layer] else { return Err(StepError::NotSelected { layer }) };
        let of_part = &mut resident.parts[part_index];
        let group = &mut self.groups[of_part.group];
        group.seat(&of_part.seat, &resident.files)?;
        let mut state = LayerState { layer, own_layer, sequence, progress: &mut of_part.layers[own_layer] };
        state.take_up_labels(group, &resident.places[..before_horizon], &resident.files)?;
        state.take_up_rows(group, before_horizon, query.position)?;
        state.set_input(&mut group.step, part, query)?;
        let length = query.position + 1;
        let work = if plan.count > 0 {
            group.step.batch_mut().set_length(0, length, &sequence.settings(), None)?;
            self.last = Some(of_part.group);
            LayerWork::Sparse
        } else {
            group.step.batch_mut().set_dense_length(0, length)?;
            LayerWork::Exact
        };
        group.step.perform(own_layer, work)?;
        state.progress.note(query.position / CHUNK_TOKENS, query.position % CHUNK_TOKENS + 1);
        let result = group.step.result(0);
        query.output.copy_from_slice(result.output);
        query.lse.copy_from_slice(result.lse);
        Ok(result.hits)
    }

    /// The sequence's state, made or made larger where it has to be; `None` where the device cannot have one.
    fn state(&mut self, sequence: &mut Sequence, length: usize) -> Result<Option<Box<Resident>>, StepError> {
        let count = most_selected(sequence, length);
        let tail_chunks = tail_chunks_of(sequence);
        let fits = |held: &Resident| {
            let wanted = tail_chunks.min(held.capacity / CHUNK_TOKENS);
            held.capacity >= length && held.max_count >= count && held.tail_chunks == wanted
        };
        let held = match sequence.take_resident() {
            Some(held) if fits(&held) => return Ok(Some(held)),
            other => other,
        };
        let Some(size) = Size::of(sequence, length, self.limits) else { return Ok(None) };
        self.sweep();
        let mut made = self.new_state(sequence, &size)?;
        if let Some(held) = held {
            self.take_over(&mut made, &held)?;
            made.files = held.files;
        }
        Ok(Some(made))
    }

    /// Registers the files in which the rows before `end` lie, so that they stream at the speed of the link.
    pub(super) fn register(&mut self, sequence: &mut Sequence, end: usize) -> Result<(), StepError> {
        let mut resident = sequence.take_resident().unwrap_or_default();
        for chunk in 0..end.div_ceil(CHUNK_TOKENS) {
            let (file, _) = sequence.chunk_place(chunk)?;
            self.number(&mut resident, &file)?;
        }
        sequence.put_resident(resident);
        Ok(())
    }

    /// The number of a file that the sequence has rows in.
    fn number(&mut self, resident: &mut Resident, file: &HostFile) -> Result<usize, CudaError> {
        // The last one first: neighbouring chunks often lie in one file.
        if let Some((number, _)) = resident.files.iter().rev().find(|(_, held)| held.file().is_same(file)) {
            return Ok(*number);
        }
        let (number, segment) = self.files.number(&self.gpu, file)?;
        resident.files.push((number, segment));
        Ok(number)
    }

    fn ledger(&mut self) -> Result<Arc<Ledger>, CudaError> {
        if let Some(ledger) = &self.ledger {
            return Ok(Arc::clone(ledger));
        }
        let limit = match self.limits.device_bytes {
            0 => self.gpu.context.mem_get_info().doing("asking for free memory")?.0 as u64 / 10 * 9,
            bytes => bytes,
        };
        let ledger = Ledger::new(limit);
        self.ledger = Some(Arc::clone(&ledger));
        Ok(ledger)
    }

    fn new_state(&mut self, sequence: &Sequence, size: &Size) -> Result<Box<Resident>, CudaError> {
        let ledger = self.ledger()?;
        let mut part_of_layer = vec![None; sequence.shape().layers.len()];
        let mut parts = Vec::new();
        for (key, layers) in keys_of(sequence) {
            let shape = SeatShape {
                geometry: key.geometry.clone(),
                plan: key.coders[0].plan.clone(),
                layers: layers.len(),
                max_tokens: size.capacity,
                kept: Kept::Pool(size.pool),
                tail_chunks: size.tail_chunks,
            };
            let charge = ledger.charge(shape.bytes())?;
            let entries = size.max_count + size.tail_chunks * CHUNK_TOKENS;
            let group = self.group(&ledger, key, Room { tokens: size.capacity, count: size.max_count, entries })?;
            let seat = Arc::new(Seat::new(&self.gpu, self.groups[group].step.batch().stream(), &shape)?);
            layers.iter().enumerate().for_each(|(own, &layer)| part_of_layer[layer] = Some((parts.len(), own)));
            let progress = Progress { labelled: 0, tail: vec![TailPage::default(); size.tail_chunks] };
            parts.push(ResidentPart { group, seat, layers: vec![progress; layers.len()], _charge: charge });
        }
        Ok(Box::new(Resident {
            parts,
            part_of_layer,
            places: Vec::new(),
            sealed: 0,
            files: Vec::new(),
            capacity: size.capacity,
            max_count: size.max_count,
            tail_chunks: size.tail_chunks,
            hot_stale: false,
        }))
    }

    /// The group of a shape, with room for more.
    fn group(&mut self, ledger: &Arc<Ledger>, key: GroupKey, room: Room) -> Result<usize, CudaError> {
        if let Some(index) = self.groups.iter().position(|group| group.key == key) {
            self.groups[index].fit(&self.gpu, &self.compiler, ledger, room)?;
            return Ok(index);
        }
        self.groups.push(Group::new(&self.gpu, &self.compiler, ledger, key, room)?);
        Ok(self.groups.len() - 1)
    }

    /// What a larger state of the same sequence can take from the one it replaces: labels and the newest rows.
    fn take_over(&self, made: &mut Resident, held: &Resident) -> Result<(), CudaError> {
        if !made.parts.iter().map(|part| part.group).eq(held.parts.iter().map(|part| part.group)) {
            return Ok(());
        }
        for (to, from) in made.parts.iter_mut().zip(&held.parts) {
            let stream = self.groups[to.group].step.batch().stream();
            let labelled = from.layers.iter().map(|layer| layer.labelled).max().unwrap_or(0);
            to.seat.take_over_labels(stream, &from.seat, labelled)?;
            to.layers.iter_mut().zip(&from.layers).for_each(|(to, from)| to.labelled = from.labelled);
            if made.tail_chunks == held.tail_chunks {
                to.seat.take_over_tail(stream, &from.seat)?;
                to.layers.iter_mut().zip(&from.layers).for_each(|(to, from)| to.tail.clone_from(&from.tail));
            }
        }
        Ok(())
    }

    /// Takes up where the first `chunks` chunks lie on the host, and forgets hot rows of positions that were written anew.
    fn follow(&mut self, resident: &mut Resident, sequence: &Sequence, chunks: usize) -> Result<(), StepError> {
        if resident.hot_stale {
            for part in &resident.parts {
                part.seat.forget_hot_rows(self.groups[part.group].step.batch().stream())?;
            }
            resident.hot_stale = false;
        }
        let sealed = sequence.sealed_chunks();
        if sealed == resident.sealed && chunks <= resident.places.len() {
            return Ok(());
        }
        // Chunks that were sealed since lie elsewhere now.
        let first = resident.sealed.min(resident.places.len());
        resident.places.truncate(first);
        for chunk in first..chunks.max(first) {
            let (file, slot) = sequence.chunk_place(chunk)?;
            let number = self.number(resident, &file)?;
            resident.places.push((number << 16) as u32 | slot);
        }
        resident.sealed = sealed;
        for part in &resident.parts {
            part.seat.set_host_places(self.groups[part.group].step.batch().stream(), first, &resident.places[first..])?;
        }
        Ok(())
    }
}

/// Whether an exact query at `position` attends more rows than a device keeps, which then stream past it. By length, settings and calibration
/// alone, as results are.
pub(super) fn streams(sequence: &Sequence, position: usize) -> bool {
    let most = if sequence.is_calibrated() { tail_chunks_of(sequence) } else { TAIL_CHUNKS };
    (position + 1).div_ceil(CHUNK_TOKENS) > most
}

/// Rows that a lane selects at most in sequences of up to `length` tokens. Where the budget is everything nothing is selected: all is attended.
fn most_selected(sequence: &Sequence, length: usize) -> usize {
    let settings = sequence.settings();
    match settings.budget {
        Budget::Dense => 0,
        Budget::Ratio { .. } => settings.selected_tokens(length),
    }
}

/// Pages of newest rows that steps by the sequence's settings attend at most without streaming.
fn tail_chunks_of(sequence: &Sequence) -> usize {
    let settings = sequence.settings();
    // The horizon leaves at most 255 rows beside the exact ones.
    let sparse = (settings.exact_tokens as usize).div_ceil(CHUNK_TOKENS) + 1;
    let least = if settings.budget == Budget::Dense { DENSE_CHUNKS } else { TAIL_CHUNKS };
    sparse.max(least)
}

/// The full-attention layers by their shape of rows.
fn keys_of(sequence: &Sequence) -> Vec<(GroupKey, Vec<usize>)> {
    let layout = sequence.open().layout().class(SlotClass::Selected);
    let mut keys: Vec<(GroupKey, Vec<usize>)> = Vec::new();
    for (plane, of_plane) in layout.planes.iter().enumerate() {
        let layer = usize::from(of_plane.layer);
        let (part, Some(coder)) = (sequence.part(layer), sequence.coder(layer)) else { continue };
        let lane_bytes = (CHUNK_TOKENS * part.geometry.row_bytes()) as u64;
        let own = part.lanes.start as u64 * lane_bytes..part.lanes.end as u64 * lane_bytes;
        let host = HostPart { plane, page_bytes: of_plane.page_bytes, own };
        let geometry = part.geometry.unscaled();
        let index = keys.iter().position(|(key, _)| key.geometry == geometry).unwrap_or_else(|| {
            keys.push((GroupKey { geometry, coders: Vec::new(), scales: Vec::new(), host: Vec::new() }, Vec::new()));
            keys.len() - 1
        });
        let (key, layers) = &mut keys[index];
        key.coders.push(coder.clone());
        key.scales.push(part.geometry.scales);
        key.host.push(host);
        layers.push(layer);
    }
    keys
}

/// One layer of a sequence, and what the device has of it.
struct LayerState<'a> {
    /// Layer of the model.
    layer: usize,
    /// Layer in its group.
    own_layer: usize,
    sequence: &'a Sequence,
    progress: &'a mut Progress,
}

impl LayerState<'_> {
    /// Brings labels of chunks to the device: the daemon's where they are mapped, others from their rows.
    fn take_up_labels(&mut self, group: &Group, places: &[u32], files: &[(usize, Arc<HostSegment>)]) -> Result<(), CudaError> {
        let (batch, mut first) = (group.step.batch(), self.progress.labelled);
        let Some(seat) = batch.seat(0) else { return Ok(()) };
        let made: Vec<&[u8]> = (first..places.len()).map_while(|chunk| self.sequence.label_page(self.layer, chunk)).collect();
        if !made.is_empty() {
            seat.write_labels(batch.stream(), self.own_layer, first, &made)?;
            first += made.len();
        }
        if first < places.len() {
            let page = |&place: &u32| {
                let (_, segment) = files.iter().find(|(number, _)| *number == (place >> 16) as usize).ok_or(CudaError::NoHostRows)?;
                Ok(HostPage { segment, slot: place & 0xFFFF })
            };
            let pages = places[first..].iter().map(page).collect::<Result<Vec<HostPage<'_>>, CudaError>>()?;
            batch.make_labels(self.own_layer, 0, first, &pages)?;
        }
        self.progress.labelled = self.progress.labelled.max(places.len());
        Ok(())
    }

    /// Brings the rows of chunks from `first` on up to `position` to the device, as far as they are not there.
    fn take_up_rows(&mut self, group: &Group, first: usize, position: usize) -> Result<(), StepError> {
        let batch = group.step.batch();
        let Some(seat) = batch.seat(0) else { return Ok(()) };
        for chunk in first..=position / CHUNK_TOKENS {
            let needed = (position - chunk * CHUNK_TOKENS).min(CHUNK_TOKENS);
            if self.progress.has(chunk, needed) {
                continue;
            }
            seat.write_tail(batch.stream(), self.own_layer, chunk, &[self.sequence.page(self.layer, chunk)?])?;
            let written = self.sequence.written(self.layer).saturating_sub(chunk * CHUNK_TOKENS);
            self.progress.note(chunk, written.min(CHUNK_TOKENS));
        }
        Ok(())
    }

    /// The query, and the row of its own token.
    fn set_input(&self, step: &mut HostStep, part: &LayerPart, query: &Query<'_>) -> Result<(), StepError> {
        let page = self.sequence.page(self.layer, query.position / CHUNK_TOKENS)?;
        let (values, rows) = step.input(0);
        values.copy_from_slice(query.values);
        let row_bytes = part.geometry.row_bytes();
        for (lane, row) in rows.chunks_exact_mut(row_bytes).enumerate() {
            row.copy_from_slice(&page[part.geometry.row_offset(lane, query.position)..][..row_bytes]);
        }
        Ok(())
    }
}
