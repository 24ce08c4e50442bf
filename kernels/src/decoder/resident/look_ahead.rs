//! Looking ahead on a device that keeps sequences: a step without its attention.

use super::ResidentDecoder;
use crate::decoder::look_ahead::LookAhead;
use crate::decoder::{Item, StepError};
use crate::device::cuda::host_step::LayerWork;
use crate::slot::CHUNK_TOKENS;

impl ResidentDecoder {
    /// Fetches what the item's query selects. `None` where the device cannot hold the sequence.
    pub(in crate::decoder) fn look_ahead(&mut self, layer: usize, item: &mut Item<'_>) -> Result<Option<LookAhead>, StepError> {
        let Some(mut ready) = self.prepare(layer, 0, item)? else { return Ok(None) };
        let group = &mut self.groups[ready.launch.group];
        let of_part = &mut ready.resident.parts[ready.part];
        let slot = group.seat_all(&[&of_part.seat])?.first().copied().unwrap_or(0);
        group.know(&ready.resident.files)?;
        // Scoring stores the row of the query's own token: what is there already, or else what the step itself writes again.
        let (values, rows) = group.step.input(slot);
        item.put_input(layer, values, rows)?;
        let position = item.query.position;
        group.step.batch_mut().set_length(slot, position + 1, &item.sequence.settings(), None)?;
        group.step.perform(ready.launch.layer, LayerWork::Ahead, slot..slot + 1)?;
        let predicted_rows = (item.part.geometry.heads.lanes() * item.plan.count) as u64;
        let fetched_rows = predicted_rows - group.step.result(slot).hits();
        of_part.layers[ready.launch.layer].note(position / CHUNK_TOKENS, position % CHUNK_TOKENS);
        item.sequence.put_resident(ready.resident);
        Ok(Some(LookAhead { predicted_rows, fetched_rows }))
    }
}
