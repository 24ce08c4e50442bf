//! Labels of chunks on the device: once for each sealed chunk, whatever sequences have it.

use std::collections::HashMap;
use std::sync::{Arc, Weak};

use super::limits::Ledger;
use crate::device::cuda::label_pages::{LabelPage, LabelSlab, SlabShape};
use crate::device::cuda::seat::DeviceBytes;
use crate::device::cuda::{CudaError, Gpu};
use crate::sequence::Sequence;
use crate::shared::board::{Board, BoardState};
use crate::slot::{SlotClass, SlotId};

/// Chunks of a slab.
pub(super) const SLAB_CHUNKS: usize = 16;

/// A sequence's hold on the labels of one of its chunks.
#[derive(Clone, Debug)]
pub(super) struct LabelHold {
    pub(super) page: Arc<LabelPage>,
    /// Where the chunk's rows lie on the host, once it is sealed: number of the file `<< 16 |` slot.
    place: Option<u32>,
    /// Others find the page by it.
    _witness: Option<Arc<Witness>>,
}

/// Who says that a sealed chunk is in a slot: the board of a sequence that has it there. A sequence that is gone, or whose chunk was
/// truncated, may still hold the page of a slot that has another chunk by now.
#[derive(Debug)]
struct Witness {
    page: Arc<LabelPage>,
    board: Arc<Board>,
    chunk: usize,
    slot: SlotId,
}

impl Witness {
    fn holds(&self) -> bool {
        self.board.state() == BoardState::Live
            && self.chunk < self.board.sealed_chunks()
            && self.board.slot(SlotClass::Selected, self.chunk) == Some(self.slot)
    }
}

/// What pages are made from.
pub(super) struct LabelRoom<'a> {
    pub(super) gpu: &'a Gpu,
    pub(super) ledger: &'a Arc<Ledger>,
    pub(super) slab: SlabShape,
}

/// The label pages of a group.
#[derive(Debug, Default)]
pub(super) struct LabelStore {
    slabs: Vec<Weak<LabelSlab>>,
    /// By the places of sealed chunks on the host.
    witnesses: HashMap<u32, Vec<Weak<Witness>>>,
}

impl LabelStore {
    /// The hold of a sequence on the labels of its chunk, which lies at `place`; `held` is what it has of the chunk already.
    ///
    /// # Errors
    /// Memory that is not admitted, or that the device does not have.
    pub(super) fn hold(
        &mut self,
        room: &LabelRoom<'_>,
        sequence: &Sequence,
        chunk: usize,
        place: u32,
        held: Option<&LabelHold>,
    ) -> Result<LabelHold, CudaError> {
        let Some(slot) = sequence.sealed_slot(chunk) else {
            // A chunk that still grows, or waits to be sealed, is nobody else's.
            let page = match held {
                Some(LabelHold { page, place: None, .. }) => Arc::clone(page),
                _ => Arc::new(self.free(room)?),
            };
            return Ok(LabelHold { page, place: None, _witness: None });
        };
        if let Some(held) = held.filter(|held| held.place == Some(place)) {
            return Ok(held.clone());
        }
        let witnesses = self.witnesses.entry(place).or_default();
        witnesses.retain(|witness| witness.strong_count() > 0);
        let known = witnesses.iter().filter_map(Weak::upgrade).find(|witness| witness.holds()).map(|witness| Arc::clone(&witness.page));
        let page = match (known, held) {
            (Some(page), _) => page,
            // It was sealed since; its rows are the same.
            (None, Some(LabelHold { page, place: None, .. })) => Arc::clone(page),
            (None, _) => Arc::new(self.free(room)?),
        };
        let witness = Arc::new(Witness { page: Arc::clone(&page), board: Arc::clone(sequence.shared_board()), chunk, slot });
        self.witnesses.entry(place).or_default().push(Arc::downgrade(&witness));
        Ok(LabelHold { page, place: Some(place), _witness: Some(witness) })
    }

    /// Forgets places whose chunks nobody has.
    pub(super) fn sweep(&mut self) {
        self.witnesses.retain(|_, witnesses| {
            witnesses.retain(|witness| witness.strong_count() > 0);
            !witnesses.is_empty()
        });
        self.slabs.retain(|slab| slab.strong_count() > 0);
    }

    fn free(&mut self, room: &LabelRoom<'_>) -> Result<LabelPage, CudaError> {
        if let Some(page) = self.slabs.iter().filter_map(Weak::upgrade).find_map(|slab| slab.take()) {
            return Ok(page);
        }
        let charge = room.ledger.charge(DeviceBytes { labels: room.slab.bytes(), ..DeviceBytes::default() })?;
        let slab = LabelSlab::new(room.gpu, room.slab, charge)?;
        self.slabs.push(Arc::downgrade(&slab));
        let chunks = room.slab.chunks as u64;
        slab.take().ok_or(CudaError::Bound { field: "chunks of a slab", value: chunks, low: 1, high: u64::MAX })
    }
}
