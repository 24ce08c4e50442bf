//! Bringing a sequence to the device between steps.

use super::ResidentDecoder;
use super::layer::LayerState;
use crate::decoder::{Item, StepError};
use crate::slot::CHUNK_TOKENS;

/// Bytes of labels that are brought at a time: others wait for little more than a millisecond of copying.
const PIECE_BYTES: usize = 64 << 20;

impl ResidentDecoder {
    /// Brings labels of a layer, a piece at a time; whether all of those are there that a step at the item's position needs, or none is needed.
    pub(in crate::decoder) fn restore(&mut self, layer: usize, item: &mut Item<'_>) -> Result<bool, StepError> {
        if !item.sequence.is_calibrated() || item.plan.count == 0 {
            return Ok(true);
        }
        let Some(mut resident) = self.state(item.sequence, item.query.position + 1)? else { return Ok(true) };
        let chunks = item.plan.horizon / CHUNK_TOKENS;
        self.follow(&mut resident, item.sequence, chunks)?;
        let Some((part, own_layer)) = resident.part_of_layer[layer] else { return Err(StepError::NotSelected { layer }) };
        let of_part = &mut resident.parts[part];
        let progress = &mut of_part.layers[own_layer];
        let page_bytes = item.part.geometry.heads.lanes() * CHUNK_TOKENS * of_part.seat.shape().plan.label_bytes();
        let to = chunks.min(progress.labelled + (PIECE_BYTES / page_bytes).max(1));
        let mut state = LayerState { layer, own_layer, sequence: item.sequence, seat: &of_part.seat, progress };
        state.take_up_labels(&self.groups[of_part.group], &of_part.labels, &resident.places[..to], &resident.files)?;
        let is_done = of_part.layers[own_layer].labelled >= chunks;
        item.sequence.put_resident(resident);
        Ok(is_done)
    }
}
