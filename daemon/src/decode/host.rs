//! Sequences that the daemon's decoder holds, and the segments that they share.

use std::collections::HashMap;
use std::sync::Arc;

use sluice_kernels::layout::ClassLayout;
use sluice_kernels::sequence::{Sequence, SequenceFiles};
use sluice_kernels::shape::{LaneKind, ModelShape};
use sluice_kernels::shared::board::BoardState;
use sluice_kernels::shared::segment::{Access, LabelSegment, Segment};

use crate::decode::DecodeError;
use crate::engine::EngineHandle;
use crate::engine::command::{HolderSegment, LeaseKey};

/// Rounds of mapping before a sequence counts as unreachable: the daemon may publish more meanwhile, but not for ever.
const REFRESH_ROUNDS: usize = 64;

struct Mapped {
    rows: Arc<Segment>,
    labels: Option<Arc<LabelSegment>>,
}

/// Hosted sequences.
pub(super) struct Hosts {
    engine: EngineHandle,
    sequences: HashMap<LeaseKey, Sequence>,
    segments: HashMap<u32, Mapped>,
}

impl Hosts {
    pub(super) fn new(engine: EngineHandle) -> Self {
        Self { engine, sequences: HashMap::new(), segments: HashMap::new() }
    }

    /// The sequence of a lease, up to date with what is sealed.
    pub(super) fn sequence(&mut self, lease: LeaseKey) -> Result<&mut Sequence, DecodeError> {
        if !self.sequences.contains_key(&lease) {
            let sequence = self.attach(lease)?;
            self.sequences.insert(lease, sequence);
        } else if self.sequences.get(&lease).is_some_and(|sequence| is_over(lease, sequence)) {
            self.sequences.remove(&lease);
            // The engine says what has become of the lease.
            let sequence = self.attach(lease)?;
            self.sequences.insert(lease, sequence);
        }
        self.refresh(lease)?;
        self.sequences.get_mut(&lease).ok_or(DecodeError::Engine(crate::engine::EngineError::Unavailable("the sequence is gone")))
    }

    /// The sequence of a lease, if the decoder has it already.
    pub(super) fn hosted(&mut self, lease: LeaseKey) -> Option<&mut Sequence> {
        self.sequences.get_mut(&lease)
    }

    /// Hands out a sequence that a step works on, until it is put back.
    pub(super) fn take(&mut self, lease: LeaseKey) -> Option<Sequence> {
        self.sequences.remove(&lease)
    }

    /// Takes a sequence back.
    pub(super) fn put(&mut self, lease: LeaseKey, sequence: Sequence) {
        self.sequences.insert(lease, sequence);
    }

    /// Lets go of sequences whose lease has ended, and of segments that no sequence can need.
    pub(super) fn sweep(&mut self) {
        self.sequences.retain(|&lease, sequence| !is_over(lease, sequence));
        if self.sequences.is_empty() {
            self.segments.clear();
        }
    }

    fn attach(&mut self, lease: LeaseKey) -> Result<Sequence, DecodeError> {
        let files = self.engine.host_blocking(lease)?;
        let rows_per_lane = hot_rows_per_lane(self.engine.config().hot_bytes, &files.shape);
        let mut sequence = Sequence::attach(SequenceFiles {
            shape: files.shape,
            calibration: files.calibration,
            board: files.board,
            open: files.open,
            open_slots: files.open_slots,
            writer: files.writer as usize,
            lanes: None,
            settings: files.settings,
        })?;
        if rows_per_lane > 0 {
            sequence.set_hot_rows(rows_per_lane);
        }
        Ok(sequence)
    }

    fn refresh(&mut self, lease: LeaseKey) -> Result<(), DecodeError> {
        for _ in 0..REFRESH_ROUNDS {
            let Some(sequence) = self.sequences.get_mut(&lease) else { return Ok(()) };
            if sequence.needs_calibration()
                && let Some(calibration) = self.engine.calibration_blocking(lease)?
            {
                sequence.set_calibration(&calibration)?;
            }
            let missing = sequence.refresh()?;
            if missing.is_empty() {
                return Ok(());
            }
            let (shape, label_set) = (Arc::clone(sequence.shape()), sequence.board().label_set());
            let plan = sequence.plan().cloned();
            for id in missing {
                if !self.is_mapped(id, label_set) {
                    let files = self.engine.segment_blocking(lease, id)?;
                    let mapped = map(files, &shape, plan.as_ref())?;
                    self.segments.insert(id, mapped);
                }
                if let (Some(mapped), Some(sequence)) = (self.segments.get(&id), self.sequences.get_mut(&lease)) {
                    sequence.add_segment(Arc::clone(&mapped.rows), mapped.labels.clone());
                }
            }
        }
        Ok(())
    }

    fn is_mapped(&self, id: u32, label_set: Option<u64>) -> bool {
        let Some(mapped) = self.segments.get(&id) else { return false };
        label_set.is_none() || mapped.labels.as_ref().map(|labels| labels.label_set) == label_set
    }
}

fn is_over(lease: LeaseKey, sequence: &Sequence) -> bool {
    sequence.board().generation() != lease.generation || sequence.board().state() == BoardState::Closed
}

fn map(files: HolderSegment, shape: &ModelShape, plan: Option<&sluice_kernels::label::LabelPlan>) -> Result<Mapped, DecodeError> {
    let shared = |error: sluice_kernels::shared::SharedError| DecodeError::Sequence(error.into());
    let layout = Arc::new(ClassLayout::new(shape, files.class));
    let rows = Segment::map(files.id, files.slots, layout, &files.rows, Access::ReadOnly).map_err(shared)?;
    let labels = match (&files.labels, plan) {
        (Some((label_set, file)), Some(plan)) => {
            let layout = Arc::new(ClassLayout::labels(shape, plan));
            Some(Arc::new(LabelSegment::map(*label_set, files.slots, layout, file, Access::ReadOnly).map_err(shared)?))
        }
        _ => None,
    };
    Ok(Mapped { rows: Arc::new(rows), labels })
}

/// Rows of every full-attention lane that `hot_bytes` can keep.
fn hot_rows_per_lane(hot_bytes: u64, shape: &ModelShape) -> usize {
    let selected = shape.layers.iter().filter(|layer| layer.kind == LaneKind::Selected);
    let bytes: usize = selected.map(|layer| layer.lanes() * layer.row_bytes(shape.row_type)).sum();
    hot_bytes as usize / bytes.max(1)
}
