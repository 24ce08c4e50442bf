//! Steps of a device that keeps state of its own: labels, hot rows and the newest rows stay there between steps, and only what a step
//! selects and does not find there crosses the link.
//!
//! The state follows the sequence: before each step it takes up labels of new chunks, rows that were written, and places that have changed.
//! What it holds is never needed for a result, only for its speed: state that does not fit is made anew.

pub mod balance;
mod files;
mod group;
mod labels;
mod layer;
mod limits;
mod look_ahead;
mod restore;
mod state;
mod step;
mod window;

use std::sync::Arc;

use cudarc::driver::CudaStream;

use super::StepError;
use crate::budget::Budget;
use crate::device::cuda::compile::Compiler;
use crate::device::cuda::host::{HostFile, HostPart};
use crate::device::cuda::jobs::COLD;
use crate::device::cuda::label_pages::LabelPage;
use crate::device::cuda::seat::{DeviceBytes, Kept, Seat, SeatShape};
use crate::device::cuda::{CudaError, Doing, Gpu};
use crate::sequence::Sequence;
use crate::slot::{CHUNK_TOKENS, SlotClass};
use balance::Balance;
use files::Files;
use group::{Group, GroupKey, Room};
use labels::{LabelHold, LabelRoom, LabelStore, SLAB_CHUNKS};
use limits::Ledger;
use state::{Progress, ResidentPart, TailPage};
use window::WindowGroup;

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
    /// What all groups and seats do on the device, in order.
    stream: Option<Arc<CudaStream>>,
    files: Files,
    groups: Vec<Group>,
    /// By group.
    labels: Vec<LabelStore>,
    /// Groups of sliding-window layers.
    windows: Vec<WindowGroup>,
    /// Group and slot of the last step that selected.
    last: Option<(usize, usize)>,
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
        let (limits, files) = (DeviceLimits::default(), Files::default());
        let (groups, labels, windows) = (Vec::new(), Vec::new(), Vec::new());
        Self { gpu, compiler, limits, ledger: None, stream: None, files, groups, labels, windows, last: None }
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
        self.labels.iter_mut().for_each(LabelStore::sweep);
        let knowing = |number: usize, groups: &[Group]| groups.iter().filter(|group| group.step.batch().segment(number).is_some()).count();
        for (number, segment) in self.files.known() {
            // The reference at hand, and those of batches.
            if Arc::strong_count(&segment) == 1 + knowing(number, &self.groups) {
                self.groups.iter_mut().for_each(|group| group.step.batch_mut().forget_segment(number));
            }
        }
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
        let Some(size) = Size::of(sequence, length, self.limits) else {
            held.into_iter().for_each(|held| sequence.put_resident(held));
            return Ok(None);
        };
        self.sweep();
        let mut made = self.new_state(sequence, &size)?;
        if let Some(held) = held {
            self.take_over(&mut made, &held)?;
            made.files = held.files;
            made.windows = held.windows;
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

    fn stream(&mut self) -> Result<Arc<CudaStream>, CudaError> {
        if let Some(stream) = &self.stream {
            return Ok(Arc::clone(stream));
        }
        let stream = self.gpu.new_stream()?;
        self.stream = Some(Arc::clone(&stream));
        Ok(stream)
    }

    fn new_state(&mut self, sequence: &Sequence, size: &Size) -> Result<Box<Resident>, CudaError> {
        let (ledger, stream) = (self.ledger()?, self.stream()?);
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
            let charge = ledger.charge(shape.bytes_without_labels())?;
            let entries = size.max_count + size.tail_chunks * CHUNK_TOKENS;
            let group = self.group(&ledger, key, Room { slots: 1, tokens: size.capacity, count: size.max_count, entries })?;
            let seat = Arc::new(Seat::without_labels(&self.gpu, &stream, &shape, shape.label_slab(SLAB_CHUNKS))?);
            layers.iter().enumerate().for_each(|(own, &layer)| part_of_layer[layer] = Some((parts.len(), own)));
            let progress = Progress { labelled: 0, tail: vec![TailPage::default(); size.tail_chunks] };
            let balance = Balance::new(layers.len() * shape.geometry.heads.lanes());
            parts.push(ResidentPart { group, seat, layers: vec![progress; layers.len()], balance, labels: Vec::new(), _charge: charge });
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
            windows: None,
        }))
    }

    /// The group of a shape, with room for more.
    fn group(&mut self, ledger: &Arc<Ledger>, key: GroupKey, room: Room) -> Result<usize, CudaError> {
        let stream = self.stream()?;
        if let Some(index) = self.groups.iter().position(|group| group.key == key) {
            self.groups[index].fit(&self.gpu, &self.compiler, &stream, ledger, room)?;
            return Ok(index);
        }
        self.groups.push(Group::new(&self.gpu, &self.compiler, &stream, ledger, key, room)?);
        self.labels.push(LabelStore::default());
        Ok(self.groups.len() - 1)
    }

    /// What a larger state of the same sequence can take from the one it replaces: labels and the newest rows.
    fn take_over(&mut self, made: &mut Resident, held: &Resident) -> Result<(), CudaError> {
        let stream = self.stream()?;
        if !made.parts.iter().map(|part| part.group).eq(held.parts.iter().map(|part| part.group)) {
            return Ok(());
        }
        for (to, from) in made.parts.iter_mut().zip(&held.parts) {
            to.labels.clone_from(&from.labels);
            to.layers.iter_mut().zip(&from.layers).for_each(|(to, from)| to.labelled = from.labelled);
            if made.tail_chunks == held.tail_chunks {
                to.seat.take_over_tail(&stream, &from.seat)?;
                to.layers.iter_mut().zip(&from.layers).for_each(|(to, from)| to.tail.clone_from(&from.tail));
            }
        }
        Ok(())
    }

    /// Takes up where the first `chunks` chunks lie on the host, and forgets hot rows of positions that were written anew.
    fn follow(&mut self, resident: &mut Resident, sequence: &Sequence, chunks: usize) -> Result<(), StepError> {
        let stream = self.stream()?;
        if resident.hot_stale {
            for part in &resident.parts {
                part.seat.forget_hot_rows(&stream)?;
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
        for part in &mut resident.parts {
            self.hold_labels(part, sequence, first, &resident.places[first..])?;
            part.seat.set_host_places(&stream, first, &resident.places[first..])?;
        }
        resident.sealed = sealed;
        Ok(())
    }

    /// Takes hold of the labels of the chunks from `first` on, which lie at `places`.
    fn hold_labels(&mut self, part: &mut ResidentPart, sequence: &Sequence, first: usize, places: &[u32]) -> Result<(), CudaError> {
        let (ledger, stream) = (self.ledger()?, self.stream()?);
        let room = LabelRoom { gpu: &self.gpu, ledger: &ledger, slab: part.seat.shape().label_slab(SLAB_CHUNKS) };
        let store = &mut self.labels[part.group];
        let of_chunk = |(chunk, &place)| store.hold(&room, sequence, chunk, place, part.labels.get(chunk));
        let holds: Vec<LabelHold> = (first..).zip(places).map(of_chunk).collect::<Result<_, _>>()?;
        let pages: Vec<Arc<LabelPage>> = holds.iter().map(|hold| Arc::clone(&hold.page)).collect();
        part.seat.set_label_pages(&stream, first, &pages)?;
        // Which of these pages have labels they say themselves.
        part.layers.iter_mut().for_each(|layer| layer.labelled = layer.labelled.min(first));
        let replaced = first..part.labels.len().min(first + holds.len());
        part.labels.splice(replaced, holds);
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
