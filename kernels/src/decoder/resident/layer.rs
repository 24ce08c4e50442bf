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

    /// Brings the rows of chunks from `first` on up to `position` to the device, as far as they are not there.
    pub(super) fn take_up_rows(&mut self, group: &Group, first: usize, position: usize) -> Result<(), StepError> {
        let batch = group.step.batch();
        for chunk in first..=position / CHUNK_TOKENS {
            let needed = (position - chunk * CHUNK_TOKENS).min(CHUNK_TOKENS);
            if self.progress.has(chunk, needed) {
                continue;
            }
            self.seat.write_tail(batch.stream(), self.own_layer, chunk, &[self.sequence.page(self.layer, chunk)?])?;
            let written = self.sequence.written(self.layer).saturating_sub(chunk * CHUNK_TOKENS);
            self.progress.note(chunk, written.min(CHUNK_TOKENS));
        }
        Ok(())
    }
}

/// Gives a slot its query and the row of the query's own token, which is written already.
pub(super) fn set_input(group: &mut Group, slot: usize, layer: usize, item: &Item<'_>) -> Result<(), CudaError> {
    let (position, geometry) = (item.query.position, &item.part.geometry);
    let page = item.sequence.page(layer, position / CHUNK_TOKENS).map_err(|_| CudaError::NoHostRows)?;
    let (values, rows) = group.step.input(slot);
    values.copy_from_slice(item.query.values);
    let row_bytes = geometry.row_bytes();
    for (lane, row) in rows.chunks_exact_mut(row_bytes).enumerate() {
        row.copy_from_slice(&page[geometry.row_offset(lane, position)..][..row_bytes]);
    }
    Ok(())
}
