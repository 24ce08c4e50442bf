//! The seal pool: threads that carry out plain-data jobs on rows, so that the engine never touches one.
//!
//! A job says where rows are and where they go; what it means is decided by the engine when the result comes back. Pages are handled one
//! at a time: a thread's buffers are two pages, whatever the size of a chunk.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use crossbeam::channel::{Receiver, Sender};
use sluice_kernels::device::{Device, LabelJob, LayerGeometry};
use sluice_kernels::label::LabelCoder;
use sluice_kernels::layout::{ClassLayout, Plane};
use sluice_kernels::rows::first_non_finite;
use sluice_kernels::shape::{ModelShape, RowType};
use sluice_kernels::shared::SharedError;
use sluice_kernels::shared::folder::{create_allocated, open_read_only};
use sluice_kernels::shared::open::{Fidelity, OpenFile};
use sluice_kernels::shared::segment::{Access, LabelSegment, Segment};
use sluice_kernels::slot::{CHUNK_TOKENS, SlotClass};
use thiserror::Error;
use xxhash_rust::xxh3::xxh3_64;

use crate::engine::counters::Counters;

/// A slot of a mapped segment.
#[derive(Clone, Debug)]
pub struct Place {
    /// Segment.
    pub segment: Arc<Segment>,
    /// Index in it.
    pub index: u32,
}

/// How to label the keys of a chunk, and where the labels go.
#[derive(Clone, Debug)]
pub struct LabelTarget {
    /// Label file that lies parallel to the selected slot's segment.
    pub labels: Arc<LabelSegment>,
    /// Coder of each layer of the model; `None` for sliding-window layers.
    pub coders: Arc<Vec<Option<LabelCoder>>>,
    /// Shape of the model.
    pub shape: Arc<ModelShape>,
}

/// Copy one full chunk from open slots into the arena, check the copy and label it.
#[derive(Clone, Debug)]
pub struct SealJob {
    /// Sequence.
    pub sequence: u64,
    /// Its model.
    pub model: u64,
    /// Its seal epoch: a truncation makes results of older epochs void.
    pub epoch: u64,
    /// Chunk of the sequence.
    pub chunk: usize,
    /// Element type of rows.
    pub row_type: RowType,
    /// Where the chunk grew.
    pub open: Arc<OpenFile>,
    /// Workers that wrote it.
    pub writers: usize,
    /// Slot of the full-attention layers, if the model has any.
    pub selected: Option<Place>,
    /// Slot of the sliding-window layers, if the model has any.
    pub window: Option<Place>,
    /// Labels, once the model is calibrated.
    pub labels: Option<LabelTarget>,
}

/// What a sealed chunk turned out to be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sealed {
    /// Token ids, 256.
    pub tokens: Vec<u32>,
    /// How its rows were made.
    pub fidelity: Fidelity,
    /// Checksum of every (layer, lane) page: selected planes, then window planes.
    pub sums: Vec<u64>,
    /// BLAKE3 of the checksums.
    pub digest: [u8; 32],
    /// Label set that was written.
    pub label_set: Option<u64>,
}

/// Why a chunk is not sealed. Every case but `Shared` is the holder's doing.
#[derive(Debug, Error)]
pub enum SealError {
    /// A row that is not finite.
    #[error("layer {layer}: element {element} of chunk {chunk} is not finite")]
    NotFinite {
        /// Layer.
        layer: u16,
        /// Chunk of the sequence.
        chunk: usize,
        /// Element of the page.
        element: usize,
    },
    /// Rows changed after they were committed.
    #[error("layer {layer}: rows of chunk {chunk} changed after they were committed")]
    Changed {
        /// Layer.
        layer: u16,
        /// Chunk of the sequence.
        chunk: usize,
    },
    /// The slot belongs to another chunk.
    #[error("open slot of chunk {chunk} is marked as chunk {found:?}")]
    Record {
        /// Chunk of the sequence.
        chunk: usize,
        /// Chunk in the slot's record.
        found: Option<u64>,
    },
    /// The open slots cannot be read.
    #[error(transparent)]
    Shared(#[from] SharedError),
}

/// Check the rows of a sealed chunk against its checksums.
#[derive(Clone, Debug)]
pub struct VerifyJob {
    /// Chunk.
    pub chunk: u64,
    /// Slots that are kept.
    pub selected: Option<Place>,
    /// Slots that are kept.
    pub window: Option<Place>,
    /// Expected checksums, selected planes then window planes.
    pub sums: Vec<u64>,
}

/// Label a sealed chunk.
#[derive(Clone, Debug)]
pub struct RelabelJob {
    /// Model.
    pub model: u64,
    /// Chunk.
    pub chunk: u64,
    /// Its rows.
    pub selected: Place,
    /// How, and where to.
    pub target: LabelTarget,
}

/// Make a segment.
#[derive(Clone, Debug)]
pub struct SegmentJob {
    /// Number.
    pub id: u32,
    /// Model.
    pub model: u64,
    /// Slots.
    pub slots: u32,
    /// Layout of its rows.
    pub layout: Arc<ClassLayout>,
    /// Row file to make.
    pub rows: PathBuf,
    /// Label file to make: label set, layout, path.
    pub labels: Option<(u64, Arc<ClassLayout>, PathBuf)>,
    /// Threads that allocate.
    pub threads: usize,
}

/// Make a file of open slots ahead.
#[derive(Clone, Debug)]
pub struct SpareJob {
    /// File to make.
    pub path: PathBuf,
    /// Its bytes.
    pub bytes: u64,
}

/// Files of a new segment, mapped.
#[derive(Debug)]
pub struct NewSegment {
    /// Rows, and their descriptor for holders.
    pub rows: (Arc<Segment>, File),
    /// Labels, when asked for.
    pub labels: Option<(Arc<LabelSegment>, File)>,
}

/// A job of the pool.
#[derive(Clone, Debug)]
pub enum Job {
    /// Copy a chunk into the arena.
    Seal(SealJob),
    /// Check a chunk.
    Verify(VerifyJob),
    /// Label a chunk.
    Relabel(RelabelJob),
    /// Make a segment.
    Segment(SegmentJob),
    /// Make a file of open slots.
    Spare(SpareJob),
}

/// The result of a job.
#[derive(Debug)]
pub enum JobResult {
    /// A chunk was copied, or refused.
    Seal(SealJob, Result<Sealed, SealError>),
    /// Whether a chunk's rows are what they were.
    Verify {
        /// Chunk.
        chunk: u64,
        /// All checksums match.
        intact: bool,
    },
    /// A chunk was labelled.
    Relabel {
        /// Model.
        model: u64,
        /// Chunk.
        chunk: u64,
    },
    /// A segment was made, or could not be.
    Segment(SegmentJob, Result<NewSegment, SharedError>),
    /// A file of open slots was made, or could not be.
    Spare(SpareJob, Result<(), SharedError>),
    /// A thread of the pool panicked: the engine poisons itself.
    Panicked,
}

/// A thread's own tools.
pub(crate) struct Worker {
    pub(crate) device: Box<dyn Device>,
    pub(crate) counters: Arc<Counters>,
    pub(crate) scratch: Vec<u8>,
}

/// Carries out jobs until the channel closes.
pub(crate) fn serve(mut worker: Worker, jobs: &Receiver<Job>, results: &Sender<JobResult>) {
    while let Ok(job) = jobs.recv() {
        let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| carry_out(&mut worker, job)));
        let panicked = result.is_err();
        if results.send(result.unwrap_or(JobResult::Panicked)).is_err() || panicked {
            return;
        }
    }
}

fn carry_out(worker: &mut Worker, job: Job) -> JobResult {
    match job {
        Job::Seal(job) => {
            let begin = Instant::now();
            let sealed = seal(worker, &job);
            worker.counters.seal.observe(begin.elapsed());
            JobResult::Seal(job, sealed)
        }
        Job::Verify(job) => JobResult::Verify { chunk: job.chunk, intact: verify(&job) },
        Job::Relabel(job) => {
            label(worker.device.as_mut(), &job.selected, &job.target);
            JobResult::Relabel { model: job.model, chunk: job.chunk }
        }
        Job::Segment(job) => {
            let made = make_segment(&job);
            JobResult::Segment(job, made)
        }
        Job::Spare(job) => {
            let made = create_allocated(&job.path, job.bytes, 1).map(drop);
            JobResult::Spare(job, made)
        }
    }
}

fn seal(worker: &mut Worker, job: &SealJob) -> Result<Sealed, SealError> {
    let slot = job.open.layout().slot_of(job.chunk);
    let record = job.open.record(slot, job.writers)?;
    if record.chunk != Some(job.chunk as u64) {
        return Err(SealError::Record { chunk: job.chunk, found: record.chunk });
    }
    let tokens = job.open.tokens(slot, CHUNK_TOKENS)?;
    let mut sums = Vec::new();
    for (class, place) in [(SlotClass::Selected, &job.selected), (SlotClass::Window, &job.window)] {
        let Some(place) = place else { continue };
        for plane in &place.segment.layout().planes {
            copy_page(worker, job, class, place, plane, slot, &mut sums)?;
        }
    }
    let label_set = job.labels.as_ref().map(|target| target.labels.label_set);
    if let (Some(place), Some(target)) = (&job.selected, &job.labels) {
        label(worker.device.as_mut(), place, target);
    }
    let digest = *blake3::hash(bytemuck::cast_slice(&sums)).as_bytes();
    Ok(Sealed { tokens, fidelity: record.fidelity, sums, digest, label_set })
}

/// Copies one page and proves the copy: the checksums of the arena's bytes equal those of a second reading of the open slot.
fn copy_page(
    worker: &mut Worker,
    job: &SealJob,
    class: SlotClass,
    place: &Place,
    plane: &Plane,
    slot: u32,
    sums: &mut Vec<u64>,
) -> Result<(), SealError> {
    place.segment.fill_page(plane, place.index, |page| job.open.read_page(class, plane, slot, page))?;
    let copy = place.segment.page(plane, place.index);
    if let Some(element) = first_non_finite(copy, job.row_type) {
        return Err(SealError::NotFinite { layer: plane.layer, chunk: job.chunk, element });
    }
    worker.scratch.resize(copy.len(), 0);
    job.open.read_page(class, plane, slot, &mut worker.scratch)?;
    let first = sums.len();
    sums.extend(lane_sums(plane, copy));
    if !lane_sums(plane, &worker.scratch).eq(sums[first..].iter().copied()) {
        return Err(SealError::Changed { layer: plane.layer, chunk: job.chunk });
    }
    Ok(())
}

/// XXH3-64 of each lane's rows in a page.
fn lane_sums<'a>(plane: &Plane, page: &'a [u8]) -> impl Iterator<Item = u64> + use<'a> {
    page.chunks_exact(CHUNK_TOKENS * plane.row_bytes as usize).map(xxh3_64)
}

fn verify(job: &VerifyJob) -> bool {
    let mut expected = job.sums.iter().copied();
    for place in [&job.selected, &job.window].into_iter().flatten() {
        for plane in &place.segment.layout().planes {
            let page = place.segment.page(plane, place.index);
            if lane_sums(plane, page).any(|sum| expected.next() != Some(sum)) {
                return false;
            }
        }
    }
    true
}

fn label(device: &mut dyn Device, place: &Place, target: &LabelTarget) {
    for plane in &target.labels.layout().planes {
        let layer = usize::from(plane.layer);
        let rows = place.segment.layout().plane_of_layer(layer);
        let (Some(rows), Some(coder)) = (rows, &target.coders[layer]) else { continue };
        let geometry = LayerGeometry::of(&target.shape, layer);
        let page = place.segment.page(rows, place.index);
        target.labels.fill_page(plane, place.index, |out| device.label(&LabelJob { geometry: &geometry, page, coder }, out));
    }
}

fn make_segment(job: &SegmentJob) -> Result<NewSegment, SharedError> {
    let file = create_allocated(&job.rows, job.layout.segment_bytes(job.slots), job.threads)?;
    let segment = Segment::map(job.id, job.slots, Arc::clone(&job.layout), &file, Access::Writable)?;
    let rows = (Arc::new(segment), open_read_only(&job.rows)?);
    let labels = job.labels.as_ref().map(|(label_set, layout, path)| make_labels(*label_set, layout, job.slots, path));
    Ok(NewSegment { rows, labels: labels.transpose()? })
}

/// Makes the label file of a segment.
pub(crate) fn make_labels(
    label_set: u64,
    layout: &Arc<ClassLayout>,
    slots: u32,
    path: &Path,
) -> Result<(Arc<LabelSegment>, File), SharedError> {
    let file = create_allocated(path, layout.segment_bytes(slots), 1)?;
    let labels = LabelSegment::map(label_set, slots, Arc::clone(layout), &file, Access::Writable)?;
    Ok((Arc::new(labels), open_read_only(path)?))
}
