//! The layers of a model that share a shape of rows: one batch serves them for all sequences.

use std::sync::Arc;

use cudarc::driver::CudaStream;

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

/// Sequences that one launch serves at most; larger batches take several.
pub(super) const MOST_SLOTS: usize = 8;

/// What the steps of a group have room for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Room {
    pub(super) slots: usize,
    pub(super) tokens: usize,
    pub(super) count: usize,
    pub(super) entries: usize,
}

impl Room {
    fn holds(&self, other: &Self) -> bool {
        self.slots >= other.slots && self.tokens >= other.tokens && self.count >= other.count && self.entries >= other.entries
    }

    fn with(&self, other: &Self) -> Self {
        Self {
            slots: self.slots.max(other.slots),
            tokens: self.tokens.max(other.tokens),
            count: self.count.max(other.count),
            entries: self.entries.max(other.entries),
        }
    }
}

/// What the batch of a group is to be, and the charge for it, before anything is allocated.
fn admitted(ledger: &Arc<Ledger>, key: &GroupKey, room: Room) -> Result<(BatchShape, Charge), CudaError> {
    let shape = BatchShape {
        geometry: key.geometry.clone(),
        plan: key.coders.first().map(|coder| coder.plan.clone()).ok_or(CudaError::NoHostRows)?,
        slots: room.slots,
        max_tokens: room.tokens,
        max_count: room.count,
        max_entries: room.entries,
        gather_blocks: GATHER_BLOCKS,
        trace_rows: None,
    };
    let charge = ledger.charge(DeviceBytes { workspace: shape.own_bytes(key.coders.len()), ..DeviceBytes::default() })?;
    Ok((shape, charge))
}

/// A group and its batch.
pub(super) struct Group {
    pub(super) key: GroupKey,
    pub(super) step: HostStep,
    room: Room,
    /// Slots that are worth asking for: fewer after the device had no room for more.
    most_slots: usize,
    _charge: Charge,
}

impl Group {
    pub(super) fn new(
        gpu: &Gpu,
        compiler: &Compiler,
        stream: &Arc<CudaStream>,
        ledger: &Arc<Ledger>,
        key: GroupKey,
        room: Room,
    ) -> Result<Self, CudaError> {
        let (shape, charge) = admitted(ledger, &key, room)?;
        let layers: Vec<BatchLayer<'_>> = (0..key.coders.len())
            .map(|layer| BatchLayer { coder: &key.coders[layer], scales: key.scales[layer].clone(), host: key.host[layer].clone() })
            .collect();
        let batch = Batch::new(gpu, compiler, stream, &shape, &layers)?;
        Ok(Self { step: HostStep::new(gpu, batch)?, key, room, most_slots: MOST_SLOTS, _charge: charge })
    }

    /// Makes room for more. Between steps; what there is stays as it is where that fails.
    pub(super) fn fit(
        &mut self,
        gpu: &Gpu,
        compiler: &Compiler,
        stream: &Arc<CudaStream>,
        ledger: &Arc<Ledger>,
        room: Room,
    ) -> Result<(), CudaError> {
        if !self.room.holds(&room) {
            *self = Self::new(gpu, compiler, stream, ledger, self.key.clone(), self.room.with(&room))?;
        }
        Ok(())
    }

    /// Sequences that a launch can serve.
    pub(super) fn slots(&self) -> usize {
        self.room.slots
    }

    /// Room for `sequences` at once, up to a bound.
    pub(super) fn room_for(&self, sequences: usize) -> Room {
        Room { slots: sequences.next_power_of_two().min(self.most_slots), ..self.room }
    }

    /// Asks for no more slots than there are.
    pub(super) fn keep_slots(&mut self) {
        self.most_slots = self.room.slots;
    }

    /// Seats sequences, as many as there are slots at most; answers with the slot of each, which together are consecutive. Those who sit well
    /// stay. Between steps.
    pub(super) fn seat_all(&mut self, seats: &[&Arc<Seat>]) -> Result<Vec<usize>, CudaError> {
        let batch = self.step.batch_mut();
        let slots = batch.shape().slots;
        if seats.len() > slots {
            return Err(CudaError::Bound { field: "sequences of a launch", value: seats.len() as u64, low: 0, high: slots as u64 });
        }
        let slot_of =
            |batch: &Batch, seat: &Arc<Seat>| (0..slots).find(|&slot| batch.seat(slot).is_some_and(|held| Arc::ptr_eq(held, seat)));
        let allowed = match seats {
            // One alone sits anywhere.
            [_] => 0..slots,
            _ => 0..seats.len(),
        };
        let mut found: Vec<Option<usize>> = seats.iter().map(|seat| slot_of(batch, seat).filter(|slot| allowed.contains(slot))).collect();
        for (index, seat) in seats.iter().enumerate() {
            if found[index].is_some() {
                continue;
            }
            if let Some(elsewhere) = slot_of(batch, seat) {
                batch.leave(elsewhere);
            }
            let mut free = allowed.clone().filter(|slot| !found.contains(&Some(*slot)));
            let slot = free.clone().find(|&slot| batch.seat(slot).is_none()).or_else(|| free.next());
            // There are as many slots as seats.
            let Some(slot) = slot else { continue };
            batch.sit(slot, seat)?;
            found[index] = Some(slot);
        }
        Ok(found.into_iter().flatten().collect())
    }

    /// Learns of the files that rows lie in. Between steps.
    pub(super) fn know(&mut self, files: &[(usize, Arc<HostSegment>)]) -> Result<(), CudaError> {
        let batch = self.step.batch_mut();
        for (number, file) in files {
            if !batch.segment(*number).is_some_and(|known| Arc::ptr_eq(known, file)) {
                batch.set_segment(*number, file)?;
            }
        }
        Ok(())
    }

    /// Lets go of seats whose sequences have gone.
    pub(super) fn sweep(&mut self) {
        let batch = self.step.batch_mut();
        for slot in 0..batch.shape().slots {
            if batch.seat(slot).is_some_and(|seat| Arc::strong_count(seat) == 1) {
                batch.leave(slot);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::heads::HeadMap;
    use crate::label::{LabelPlan, LaneCalibration, LayerCalibration};
    use crate::shape::RowType;

    #[test]
    fn what_a_group_takes_is_charged_before_it_is_allocated() {
        let geometry = LayerGeometry {
            heads: HeadMap::new(4, 2),
            head_dim: 64,
            row_type: RowType::F16,
            softmax_scale: 0.125,
            scales: LaneScales::default(),
        };
        let lane = LaneCalibration { order: (0..64).collect(), magnitude: vec![1.0; 64], low: vec![-1.0; 64], high: vec![1.0; 64] };
        let coder = LabelCoder::new(&LabelPlan::small(64), &LayerCalibration { layer: 0, lanes: vec![lane; 2] });
        let host = HostPart::whole(0, geometry.page_bytes() as u64);
        let key = GroupKey { geometry, coders: vec![coder; 3], scales: vec![LaneScales::default(); 3], host: vec![host; 3] };
        let room = Room { slots: 1, tokens: 4096, count: 256, entries: 1280 };
        let (shape, charge) = admitted(&Ledger::new(u64::MAX), &key, room).expect("room");
        let bytes = shape.own_bytes(3);
        assert!(bytes > 3 * 32_768, "the tables of files of three layers alone");
        drop(charge);
        let wider = admitted(&Ledger::new(u64::MAX), &key, Room { slots: 2, ..room }).expect("room").0.own_bytes(3);
        assert!(wider > bytes, "another slot takes more");

        // No GPU is needed to be refused: nothing has been allocated.
        let ledger = Ledger::new(bytes - 1);
        let refused = admitted(&ledger, &key, room).map(|_| ()).expect_err("a byte is missing");
        assert!(matches!(refused, CudaError::Budget { wanted, used: 0, .. } if wanted == bytes), "{refused}");
        let ledger = Ledger::new(bytes);
        let (_, charge) = admitted(&ledger, &key, room).expect("exactly enough");
        assert_eq!(ledger.used().workspace, bytes);
        drop(charge);
        assert_eq!(ledger.used().total(), 0);
    }
}
