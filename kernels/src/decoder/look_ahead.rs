//! Look-ahead: rows that a step is expected to select are fetched before its query is known (Double Sparsity, arXiv 2408.07092, section 3.4:
//! the hidden state of the layer before predicts a layer's query). The step itself selects by its true query, so results never change.

use super::{Attend, Decoder, Item, Query, StepError, plan, sequence_part};
use crate::device::{ScoreJob, SelectJob};
use crate::hot::{HotFetch, HotPool};
use crate::rows::first_non_finite_value;
use crate::sequence::Sequence;
use crate::shape::LaneKind;
use crate::slot::CHUNK_TOKENS;

/// What looking ahead did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LookAhead {
    /// Rows that the predicted query selects, all lanes.
    pub predicted_rows: u64,
    /// Of these, those that were not hot yet and are now.
    pub fetched_rows: u64,
}

impl Decoder {
    /// Fetches into the hot rows of a full-attention layer what a step at `position` would select with `query`, `[own query head][head_dim]`,
    /// which the caller has predicted. Rows of the step's own token need not be written. Without hot rows, and where nothing is selected,
    /// nothing happens. The rows are there when this returns; on a GPU it reads them beside what the caller has enqueued there before.
    ///
    /// # Errors
    /// A layer without a selection, a query that does not fit or cannot be scored, rows before the horizon that are missing or cannot be
    /// reached.
    pub fn look_ahead(&mut self, layer: usize, sequence: &mut Sequence, position: usize, query: &[f32]) -> Result<LookAhead, StepError> {
        let part = sequence_part(layer, sequence)?;
        if part.kind != LaneKind::Selected {
            return Err(StepError::NotSelected { layer });
        }
        let expected = part.geometry.heads.query_heads() * part.geometry.head_dim;
        if query.len() != expected {
            return Err(StepError::Length { field: "query", given: query.len(), expected });
        }
        if let Some(index) = first_non_finite_value(query) {
            return Err(StepError::NotFinite { index });
        }
        let plan = plan(sequence, Attend::Sparse, position);
        let written = sequence.written(layer);
        if plan.horizon > written {
            return Err(StepError::NotWritten { layer, end: plan.horizon, written });
        }
        if plan.count == 0 {
            return Ok(LookAhead::default());
        }
        sequence.open().start_step();
        let query = Query { position, values: query, output: &mut [], lse: &mut [] };
        let mut item = Item { sequence, part: &part, plan, query };
        let result = match &mut self.resident {
            Some(resident) => resident.look_ahead(layer, &mut item).map(Option::unwrap_or_default),
            None => self.fetch_ahead(layer, &mut item),
        };
        item.sequence.open().complete_step();
        result
    }

    fn fetch_ahead(&mut self, layer: usize, item: &mut Item<'_>) -> Result<LookAhead, StepError> {
        let Some(mut pool) = item.sequence.take_hot_pool(layer) else { return Ok(LookAhead::default()) };
        item.sequence.ensure_labels(layer, item.plan.horizon / CHUNK_TOKENS, self.device.as_mut());
        let result = self.select_ahead(layer, item, &mut pool);
        item.sequence.put_hot_pool(layer, Some(pool));
        result
    }

    fn select_ahead(&mut self, layer: usize, item: &Item<'_>, pool: &mut HotPool) -> Result<LookAhead, StepError> {
        let Item { sequence, part, plan, query } = item;
        let (chunks, lanes, rows, count) = (plan.horizon / CHUNK_TOKENS, part.geometry.heads.lanes(), plan.horizon, plan.count);
        let (mut labels, mut pages) = (Vec::with_capacity(chunks), Vec::with_capacity(chunks));
        let Some(coder) = sequence.labels(layer, chunks, &mut labels)? else { return Ok(LookAhead::default()) };
        sequence.pages(layer, 0..chunks, &mut pages)?;
        self.keys.resize(lanes * rows, 0);
        self.device.score(&ScoreJob { geometry: &part.geometry, query: query.values, labels: &labels, coder }, &mut self.keys);
        self.positions.resize(lanes * count, 0);
        let sinks = (sequence.settings().sink_tokens as usize).min(count);
        self.device.select(&SelectJob { keys: &self.keys, lanes, rows, count, sinks }, &mut self.positions);
        let fetch = HotFetch { geometry: &part.geometry, pages: &pages };
        let fetched = (0..lanes).map(|lane| {
            let (positions, keys) = (&self.positions[lane * count..(lane + 1) * count], &self.keys[lane * rows..(lane + 1) * rows]);
            pool.fetch_ahead(lane, positions, keys, &fetch) as u64
        });
        Ok(LookAhead { fetched_rows: fetched.sum(), predicted_rows: (lanes * count) as u64 })
    }
}
