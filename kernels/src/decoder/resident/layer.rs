//! One layer of a sequence, and what the device has of it.

use std::sync::Arc;

use super::group::Group;
use super::labels::LabelHold;
use super::state::Progress;
use crate::decoder::{Item, StepError};
use crate::device::cuda::host::{HostPage, HostSegment};
use crate::device::cuda::seat::Seat;
use crate::device::cuda::{CudaError, Doing};
use crate::sequence::Sequence;
use crate::slot::CHUNK_TOKENS;

/// One layer of a sequence, and what the device has of it.
pub(super) struct LayerState<'a> {
    /// Layer of the model.
    pub(super) layer: usize,
    /// Layer in its group.
    pub(super) own_layer: usize,
    pub(super) sequence: &'a Sequence,
    pub(super) seat: &'a Seat,
    pub(super) progress: &'a mut Progress,
}

impl LayerState<'_> {
    /// Brings labels of chunks to the device, as far as no other sequence has: the daemon's where they are mapped, others from their rows.
    pub(super) fn take_up_labels(
        &mut self,
        group: &Group,
        labels: &[LabelHold],
        places: &[u32],
        files: &[(usize, Arc<HostSegment>)],
    ) -> Result<(), CudaError> {
        let batch = group.step.batch();
        let (mut copied, mut made, mut pages) = (Vec::new(), Vec::new(), Vec::new());
        for chunk in self.progress.labelled..places.len() {
            let page = &*labels[chunk].page;
            if page.is_made(self.own_layer) {
                continue;
            }
            if let Some(of_daemon) = self.sequence.label_page(self.layer, chunk) {
                // SAFETY: the labels are the sequence's, which is borrowed until the stream has been waited for.
                unsafe { page.write_async(batch.stream(), self.own_layer, of_daemon)? };
                copied.push(page);
            } else {
                let (number, slot) = ((places[chunk] >> 16) as usize, places[chunk] & 0xFFFF);
                let (_, segment) = files.iter().find(|(held, _)| *held == number).ok_or(CudaError::NoHostRows)?;
                pages.push(HostPage { segment, slot });
                made.push(page);
            }
        }
        if !copied.is_empty() {
            batch.stream().synchronize().doing("copying labels")?;
        }
        if !made.is_empty() {
            let addresses: Vec<u64> = made.iter().map(|page| page.address(self.own_layer)).collect();
            batch.make_labels_at(self.own_layer, &addresses, &pages)?;
        }
        copied.iter().chain(&made).for_each(|page| page.note_made(self.own_layer));
        self.progress.labelled = self.progress.labelled.max(places.len());
        Ok(())
    }

    /// Brings the rows of chunks from `first` on before `position` to the device, as far as they are not there.
    pub(super) fn take_up_rows(&mut self, group: &Group, first: usize, position: usize) -> Result<(), StepError> {
        let (seat, stream, own_layer) = (self.seat, group.step.batch().stream(), self.own_layer);
        let write = |chunk: usize, page: &[u8]| seat.write_tail(stream, own_layer, chunk, &[page]);
        self.progress.take_up(self.sequence, self.layer, first * CHUNK_TOKENS..position, write)
    }
}

impl Item<'_> {
    /// Writes the query and the row of the query's own token, which is written already, to where a step takes them from.
    pub(super) fn put_input(&self, layer: usize, values: &mut [f32], rows: &mut [u8]) -> Result<(), CudaError> {
        let (position, geometry) = (self.query.position, &self.part.geometry);
        let page = self.sequence.page(layer, position / CHUNK_TOKENS).map_err(|_| CudaError::NoHostRows)?;
        values.copy_from_slice(self.query.values);
        let row_bytes = geometry.row_bytes();
        for (lane, row) in rows.chunks_exact_mut(row_bytes).enumerate() {
            row.copy_from_slice(&page[geometry.row_offset(lane, position)..][..row_bytes]);
        }
        Ok(())
    }
}
