//! One layer of a step of several sequences: everybody is brought up to date, then sequences of one shape take one launch together.

use std::sync::Arc;
use std::time::Instant;

use super::layer::LayerState;
use super::state::Resident;
use super::{ResidentDecoder, streams};
use crate::decoder::{Item, StepError, StepReport};
use crate::device::cuda::CudaError;
use crate::device::cuda::host_step::LayerWork;
use crate::shape::LaneKind;
use crate::slot::CHUNK_TOKENS;

/// A sequence that is up to date; its state is the step's until that has succeeded, so that a failed one leaves none half-way.
pub(super) struct Ready {
    /// Among the items.
    pub(super) index: usize,
    pub(super) resident: Box<Resident>,
    /// Of the resident's parts.
    pub(super) part: usize,
    pub(super) launch: Launch,
}

/// What sequences of one launch have in common.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) struct Launch {
    pub(super) group: usize,
    /// Layer in the group.
    pub(super) layer: usize,
    pub(super) work: Work,
}

/// What a launch does, and which groups it is of.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Work {
    /// A full-attention layer.
    Selected(LayerWork),
    /// A sliding-window layer.
    Window,
}

/// What a launch did for one of its sequences.
#[derive(Clone, Copy, Default)]
struct Done {
    /// Selected rows that were hot.
    hits: u64,
    /// Chunks whose labels were scored for others as well.
    common_chunks: usize,
}

impl ResidentDecoder {
    /// Positions that the last step selected, `[own lane][count]`: of its last sequence.
    pub(in crate::decoder) fn positions(&self) -> Result<Vec<u32>, CudaError> {
        let Some((group, slot)) = self.last else { return Ok(Vec::new()) };
        self.groups.get(group).map_or(Ok(Vec::new()), |group| group.step.batch().positions(slot))
    }

    /// One layer of a step of one query a sequence. `None` for those that the device cannot hold, or that stream.
    pub(in crate::decoder) fn attend(&mut self, layer: usize, items: &mut [Item<'_>]) -> Vec<Result<Option<StepReport>, StepError>> {
        let begin = Instant::now();
        let mut results: Vec<Result<Option<StepReport>, StepError>> = items.iter().map(|_| Ok(None)).collect();
        let mut waiting = Vec::new();
        for (index, item) in items.iter_mut().enumerate() {
            let prepared = match item.part.kind {
                LaneKind::Selected => self.prepare(layer, index, item),
                LaneKind::Window { .. } => self.prepare_window(layer, index, item),
            };
            match prepared {
                Ok(ready) => waiting.extend(ready),
                Err(error) => results[index] = Err(error),
            }
        }
        while let Some(launch) = waiting.first().map(|ready| ready.launch) {
            let (mut together, mut others): (Vec<Ready>, Vec<Ready>) = waiting.into_iter().partition(|ready| ready.launch == launch);
            let slots = match launch.work {
                Work::Selected(_) => self.slots(launch.group, together.len()),
                Work::Window => self.window_slots(launch.group, together.len()),
            };
            others.extend(together.split_off(slots.min(together.len())));
            waiting = others;
            let performed = match launch.work {
                Work::Selected(work) => self.perform(layer, launch, work, items, &mut together),
                Work::Window => {
                    self.perform_window(layer, launch, items, &mut together).map(|()| together.iter().map(|_| Done::default()).collect())
                }
            };
            match performed {
                Ok(done) => {
                    for (ready, done) in together.into_iter().zip(done) {
                        let item = &mut items[ready.index];
                        results[ready.index] = Ok(Some(report_of(layer, item, done)));
                        item.sequence.put_resident(ready.resident);
                    }
                }
                Err(error) => {
                    let error = Arc::new(error);
                    together.iter().for_each(|ready| results[ready.index] = Err(StepError::Device(Arc::clone(&error))));
                }
            }
        }
        // Those who step together have equal shares of the time.
        let done = results.iter_mut().filter_map(|result| result.as_mut().ok()?.as_mut()).collect::<Vec<_>>();
        let share = begin.elapsed() / done.len().max(1) as u32;
        done.into_iter().for_each(|report| report.fused = share);
        results
    }

    /// Brings what the device has of a sequence up to date.
    pub(super) fn prepare(&mut self, layer: usize, index: usize, item: &mut Item<'_>) -> Result<Option<Ready>, StepError> {
        let (plan, position) = (&item.plan, item.query.position);
        if !item.sequence.is_calibrated() || (plan.count == 0 && streams(item.sequence, position)) {
            return Ok(None);
        }
        let Some(mut resident) = self.state(item.sequence, position + 1)? else { return Ok(None) };
        let before_horizon = if plan.count > 0 { plan.horizon / CHUNK_TOKENS } else { 0 };
        self.follow(&mut resident, item.sequence, before_horizon)?;
        let Some((part, own_layer)) = resident.part_of_layer[layer] else { return Err(StepError::NotSelected { layer }) };
        let of_part = &mut resident.parts[part];
        let group = &self.groups[of_part.group];
        let progress = &mut of_part.layers[own_layer];
        let mut state = LayerState { layer, own_layer, sequence: item.sequence, seat: &of_part.seat, progress };
        state.take_up_labels(group, &of_part.labels, &resident.places[..before_horizon], &resident.files)?;
        state.take_up_rows(group, before_horizon, position)?;
        let work = if plan.count > 0 { LayerWork::Sparse } else { LayerWork::Exact };
        let launch = Launch { group: of_part.group, layer: own_layer, work: Work::Selected(work) };
        Ok(Some(Ready { index, resident, part, launch }))
    }

    /// Sequences that a group takes at once, of `wanted`: fewer where the device has no room for more.
    fn slots(&mut self, group: usize, wanted: usize) -> usize {
        let room = self.groups[group].room_for(wanted);
        // What there is serves as well, in turns.
        if let (Ok(stream), Ok(ledger)) = (self.stream(), self.ledger()) {
            let widened = self.groups[group].fit(&self.gpu, &self.compiler, &stream, &ledger, room);
            if widened.is_err() {
                self.groups[group].keep_slots();
            }
        }
        self.groups[group].slots()
    }

    /// Performs one launch.
    fn perform(
        &mut self,
        layer: usize,
        launch: Launch,
        work: LayerWork,
        items: &mut [Item<'_>],
        together: &mut [Ready],
    ) -> Result<Vec<Done>, CudaError> {
        let group = &mut self.groups[launch.group];
        let seats: Vec<_> = together.iter().map(|ready| &ready.resident.parts[ready.part].seat).collect();
        let slots = group.seat_all(&seats)?;
        for (ready, &slot) in together.iter().zip(&slots) {
            group.know(&ready.resident.files)?;
            let item = &items[ready.index];
            let (values, rows) = group.step.input(slot);
            item.put_input(layer, values, rows)?;
            let length = item.query.position + 1;
            match work {
                LayerWork::Sparse | LayerWork::Ahead => {
                    group.step.batch_mut().set_length(slot, length, &item.sequence.settings(), None)?;
                    self.last = Some((launch.group, slot));
                }
                LayerWork::Exact => group.step.batch_mut().set_dense_length(slot, length)?,
            }
        }
        let first = slots.iter().min().copied().unwrap_or(0);
        group.step.perform(launch.layer, work, first..first + slots.len())?;
        let take = |(ready, &slot): (&mut Ready, &usize)| {
            let query = &mut items[ready.index].query;
            let result = group.step.result(slot);
            query.output.copy_from_slice(result.output);
            query.lse.copy_from_slice(result.lse);
            let of_part = &mut ready.resident.parts[ready.part];
            of_part.layers[launch.layer].note(query.position / CHUNK_TOKENS, query.position % CHUNK_TOKENS + 1);
            if work == LayerWork::Sparse {
                of_part.balance.count(launch.layer * result.counts.len(), result.counts);
            }
            Done { hits: result.hits(), common_chunks: group.step.batch().common_chunks_of(slot) }
        };
        let done = together.iter_mut().zip(&slots).map(take).collect();
        for (ready, &slot) in together.iter_mut().zip(&slots).filter(|_| work == LayerWork::Sparse) {
            let (most_selected, of_part) = (ready.resident.max_count, &mut ready.resident.parts[ready.part]);
            if launch.layer + 1 == of_part.layers.len() {
                of_part.end_step(group.step.batch_mut(), slot, most_selected)?;
            }
        }
        Ok(done)
    }
}

/// What a step cost, but for its time.
fn report_of(layer: usize, item: &Item<'_>, done: Done) -> StepReport {
    let lanes = item.part.geometry.heads.lanes();
    let sparse = item.plan.count > 0;
    let exact_rows = item.query.position + 1 - item.plan.exact_from;
    let label_bytes = item.sequence.coder(layer).map_or(0, |coder| coder.plan.label_bytes());
    StepReport {
        selected_rows: (lanes * item.plan.count) as u64,
        hot_rows: done.hits,
        row_bytes: (lanes * (item.plan.count + exact_rows) * item.part.geometry.row_bytes()) as u64,
        label_bytes: if sparse { (lanes * item.plan.horizon * label_bytes) as u64 } else { 0 },
        shared_label_bytes: (lanes * done.common_chunks * CHUNK_TOKENS * label_bytes) as u64,
        ..StepReport::default()
    }
}
