//! Warming up: between a prompt and its first step, when nobody waits, a layer's labels are brought to the device, and the rows that the
//! prompt's last queries select are fetched. Results never change.

use super::{Attend, Decoder, Item, Plan, Query, StepError, plan, sequence_part};
use crate::sequence::{LayerQueries, Sequence};
use crate::shape::LaneKind;

/// What warming up did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct WarmUp {
    /// Rows that are hot now and were not.
    pub fetched_rows: u64,
    /// Whether nothing is left to do for this layer.
    pub is_done: bool,
}

impl Decoder {
    /// Warms up one layer, up to 64 MiB of labels, one query's rows or a window a call, so that steps of others can come between calls.
    ///
    /// # Errors
    /// As [`Decoder::look_ahead`], and memory that the device does not have.
    pub fn warm_up(&mut self, layer: usize, sequence: &mut Sequence) -> Result<WarmUp, StepError> {
        let part = sequence_part(layer, sequence)?;
        let written = sequence.written(layer);
        let done = WarmUp { is_done: true, ..WarmUp::default() };
        if written == 0 {
            return Ok(done);
        }
        if let LaneKind::Window { tokens } = part.kind {
            if let Some(resident) = &mut self.resident {
                let query = Query { position: written - 1, values: &[], output: &mut [], lse: &mut [] };
                // Sealed rows of windows may be taken away between steps.
                sequence.open().start_step();
                let mut item = Item { sequence, part: &part, plan: Plan::window(tokens as usize, written - 1), query };
                let restored = resident.restore_window(layer, &mut item);
                item.sequence.open().complete_step();
                restored?;
            }
            return Ok(done);
        }
        if let Some(resident) = &mut self.resident {
            let plan = plan(sequence, Attend::Sparse, written - 1);
            let query = Query { position: written - 1, values: &[], output: &mut [], lse: &mut [] };
            if !resident.restore(layer, &mut Item { sequence, part: &part, plan, query })? {
                return Ok(WarmUp::default());
            }
        }
        let Some(LayerQueries { first_position, mut values }) = sequence.take_queries(layer) else {
            return Ok(done);
        };
        let unit = part.geometry.heads.query_heads() * part.geometry.head_dim;
        let later = values.split_off(unit.min(values.len()));
        let fetched_rows = self.look_ahead(layer, sequence, first_position, &values)?.fetched_rows;
        let is_done = later.is_empty();
        if !is_done {
            sequence.note_queries(layer, first_position + 1, &later, unit);
        }
        Ok(WarmUp { fetched_rows, is_done })
    }
}
