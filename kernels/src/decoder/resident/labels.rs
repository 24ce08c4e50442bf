//! Labels of chunks on the device.

use std::sync::{Arc, Weak};

use super::limits::Ledger;
use crate::device::cuda::label_pages::{LabelPage, LabelSlab, SlabShape};
use crate::device::cuda::seat::DeviceBytes;
use crate::device::cuda::{CudaError, Gpu};

/// Chunks of a slab.
pub(super) const SLAB_CHUNKS: usize = 16;

/// A sequence's hold on the labels of one of its chunks.
#[derive(Clone, Debug)]
pub(super) struct LabelHold {
    pub(super) page: Arc<LabelPage>,
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
}

impl LabelStore {
    /// The hold of a sequence on the labels of a chunk; `held` is what it has of the chunk already.
    ///
    /// # Errors
    /// Memory that is not admitted, or that the device does not have.
    pub(super) fn hold(&mut self, room: &LabelRoom<'_>, held: Option<&LabelHold>) -> Result<LabelHold, CudaError> {
        match held {
            Some(held) => Ok(held.clone()),
            None => Ok(LabelHold { page: Arc::new(self.free(room)?) }),
        }
    }

    /// Forgets slabs of which nobody has a page.
    pub(super) fn sweep(&mut self) {
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
