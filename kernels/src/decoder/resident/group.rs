//! The layers of a model that share a shape of rows: one batch serves them for all sequences.

use std::sync::Arc;

use super::limits::{Charge, Ledger};
use crate::device::LayerGeometry;
use crate::device::cuda::batch::{Batch, BatchLayer, BatchShape, GATHER_BLOCKS};
use crate::device::cuda::compile::Compiler;
use crate::device::cuda::host::{HostPart, HostSegment};
use crate::device::cuda::host_step::HostStep;
use crate::device::cuda::seat::{DeviceBytes, Seat};
use crate::device::cuda::{CudaError, Gpu};
use crate::label::LabelCoder;
use crate::scales::LaneScales;

/// What tells groups apart.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct GroupKey {
    /// Without scales, which are each layer's own.
    pub(super) geometry: LayerGeometry,
    /// By layer of the group.
    pub(super) coders: Vec<LabelCoder>,
    pub(super) scales: Vec<LaneScales>,
    pub(super) host: Vec<HostPart>,
}

/// What the steps of a group have room for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Room {
    pub(super) tokens: usize,
    pub(super) count: usize,
    pub(super) entries: usize,
}

impl Room {
    fn holds(&self, other: &Self) -> bool {
        self.tokens >= other.tokens && self.count >= other.count && self.entries >= other.entries
    }

    fn with(&self, other: &Self) -> Self {
        Self { tokens: self.tokens.max(other.tokens), count: self.count.max(other.count), entries: self.entries.max(other.entries) }
    }
}

/// A group and its batch of one slot.
pub(super) struct Group {
    pub(super) key: GroupKey,
    pub(super) step: HostStep,
    room: Room,
    _charge: Charge,
}

impl Group {
    pub(super) fn new(gpu: &Gpu, compiler: &Compiler, ledger: &Arc<Ledger>, key: GroupKey, room: Room) -> Result<Self, CudaError> {
        let plan = key.coders.first().map(|coder| coder.plan.clone()).ok_or(CudaError::NoHostRows)?;
        let shape = BatchShape {
            geometry: key.geometry.clone(),
            plan,
            slots: 1,
            max_tokens: room.tokens,
            max_count: room.count,
            max_entries: room.entries,
            gather_blocks: GATHER_BLOCKS,
            trace_rows: None,
        };
        let layers: Vec<BatchLayer<'_>> = (0..key.coders.len())
            .map(|layer| BatchLayer { coder: &key.coders[layer], scales: key.scales[layer].clone(), host: key.host[layer].clone() })
            .collect();
        let batch = Batch::new(gpu, compiler, &shape, &layers)?;
        let charge = ledger.charge(DeviceBytes { workspace: batch.own_bytes(), ..DeviceBytes::default() })?;
        Ok(Self { step: HostStep::new(gpu, batch)?, key, room, _charge: charge })
    }

    /// Makes room for more. Between steps.
    pub(super) fn fit(&mut self, gpu: &Gpu, compiler: &Compiler, ledger: &Arc<Ledger>, room: Room) -> Result<(), CudaError> {
        if !self.room.holds(&room) {
            *self = Self::new(gpu, compiler, ledger, self.key.clone(), self.room.with(&room))?;
        }
        Ok(())
    }

    /// Seats a sequence whose rows lie in `files`. Between steps; nothing happens where it sits already.
    pub(super) fn seat(&mut self, seat: &Arc<Seat>, files: &[(usize, Arc<HostSegment>)]) -> Result<(), CudaError> {
        let batch = self.step.batch_mut();
        if !batch.seat(0).is_some_and(|sitting| Arc::ptr_eq(sitting, seat)) {
            batch.sit(0, seat)?;
        }
        for (number, file) in files {
            if !batch.segment(*number).is_some_and(|known| Arc::ptr_eq(known, file)) {
                batch.set_segment(*number, file)?;
            }
        }
        Ok(())
    }

    /// Lets go of a seat whose sequence has gone.
    pub(super) fn sweep(&mut self) {
        let batch = self.step.batch_mut();
        if batch.seat(0).is_some_and(|seat| Arc::strong_count(seat) == 1) {
            batch.leave(0);
        }
    }
}
