//! The decoder: one layer of one step over a ragged batch of sequences (DESIGN.md, section 6).
//!
//! The result of a query at position p is a function of the rows up to p, the query, the sequence's settings and its calibration: the
//! horizon follows from p + 1 alone, wherever rows and labels happen to lie.

mod fidelity;
mod look_ahead;
mod resident;
mod warm_up;

use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};

use thiserror::Error;

use crate::device::cuda::CudaError;
use crate::device::cuda::seat::DeviceBytes;
use crate::device::{AttendJob, Device, HotRows, ManyJob, SelectJob, StepJob, StepResult};
use crate::hot::{HotFetch, HotPool};
use crate::rows::first_non_finite_value;
use crate::sequence::{LayerPart, Sequence, SequenceError};
use crate::shape::LaneKind;
use crate::slot::CHUNK_TOKENS;

pub use fidelity::fidelity_digest;
pub use look_ahead::LookAhead;
use resident::ResidentDecoder;
pub use resident::{DeviceLimits, Resident, balance};
pub use warm_up::WarmUp;

/// How a step attends full-attention layers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Attend {
    /// By the sequence's settings; densely while it has no calibration.
    Sparse,
    /// All rows, exactly.
    Dense,
}

/// One sequence's part of one layer of a step.
pub struct StepRequest<'a> {
    /// The sequence; rows of the query tokens are appended already.
    pub sequence: &'a mut Sequence,
    /// Position of the first query token; the others follow it.
    pub first_position: usize,
    /// `[query][own query head][head_dim]`, f32, after rotary embedding, not scaled.
    pub queries: &'a [f32],
    /// Sparse or dense.
    pub attend: Attend,
    /// `[query][own query head][head_dim]`.
    pub output: &'a mut [f32],
    /// `[query][own query head]`: natural log-sum-exp of the scaled scores over the attended rows.
    pub lse: &'a mut [f32],
}

/// Costs of one sequence's part of one layer of a step.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct StepReport {
    /// Rows selected before the horizon, all lanes and queries.
    pub selected_rows: u64,
    /// Of these, found in the hot pool.
    pub hot_rows: u64,
    /// Bytes of rows read, selected and exact.
    pub row_bytes: u64,
    /// Bytes of labels that were scored.
    pub label_bytes: u64,
    /// Of these, in chunks that others of the batch have as well, so that they were read once for all of them.
    pub shared_label_bytes: u64,
    /// Scoring labels.
    pub score: Duration,
    /// Choosing rows.
    pub select: Duration,
    /// Fetching rows that were not hot, where it is a pass of its own (the CPU fetches while it attends).
    pub gather: Duration,
    /// Attending.
    pub attend: Duration,
    /// All of it, on a device that does not tell the parts apart because its launches overlap: an equal share of what the batch took.
    pub fused: Duration,
}

impl std::ops::AddAssign for StepReport {
    fn add_assign(&mut self, other: Self) {
        self.selected_rows += other.selected_rows;
        self.hot_rows += other.hot_rows;
        self.row_bytes += other.row_bytes;
        self.label_bytes += other.label_bytes;
        self.shared_label_bytes += other.shared_label_bytes;
        self.score += other.score;
        self.select += other.select;
        self.gather += other.gather;
        self.attend += other.attend;
        self.fused += other.fused;
    }
}

/// A step that is refused; nothing was computed.
#[derive(Debug, Error)]
pub enum StepError {
    /// The sequence refuses.
    #[error(transparent)]
    Sequence(#[from] SequenceError),
    /// Buffers that do not fit each other.
    #[error("{field}: {given} values, {expected} expected")]
    Length {
        /// Which buffer.
        field: &'static str,
        /// Values given.
        given: usize,
        /// Values expected.
        expected: usize,
    },
    /// A query with a value that cannot be scored.
    #[error("queries: value {index} is not finite")]
    NotFinite {
        /// Index of the value.
        index: usize,
    },
    /// Rows of the queries' own tokens are missing.
    #[error("first_position: queries end at {end}, but layer {layer} has {written} rows")]
    NotWritten {
        /// Layer.
        layer: usize,
        /// End of the queries.
        end: usize,
        /// Rows of the layer.
        written: usize,
    },
    /// The device refuses, or has failed.
    #[error(transparent)]
    Device(Arc<CudaError>),
    /// Selected rows exist for full-attention layers only.
    #[error("layer: {layer} is a sliding-window layer; rows are selected in full-attention layers only")]
    NotSelected {
        /// Layer.
        layer: usize,
    },
}

impl From<CudaError> for StepError {
    fn from(error: CudaError) -> Self {
        Self::Device(Arc::new(error))
    }
}

/// Rows that a step attends, to hand to somebody who attends them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LaneRows {
    /// Ascending positions.
    pub positions: Vec<u32>,
    /// Their rows, `[row][row_bytes]`.
    pub rows: Vec<u8>,
}

/// Performs steps on one device.
pub struct Decoder {
    device: Box<dyn Device>,
    /// On devices that keep state between steps.
    resident: Option<ResidentDecoder>,
    positions: Vec<u32>,
    keys: Vec<u16>,
    hot_slots: Vec<u32>,
}

impl std::fmt::Debug for Decoder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Decoder").field("device", &self.device.name()).finish_non_exhaustive()
    }
}

/// One query token of a request and where its result goes.
struct Query<'a> {
    position: usize,
    /// `[own query head][head_dim]`.
    values: &'a [f32],
    output: &'a mut [f32],
    lse: &'a mut [f32],
}

/// One query token of one sequence.
struct Item<'a> {
    sequence: &'a mut Sequence,
    part: &'a LayerPart,
    plan: Plan,
    query: Query<'a>,
}

impl<'a> Item<'a> {
    /// Query `index` of a request, where it has so many.
    fn of<'b: 'a>(request: &'a mut StepRequest<'b>, part: &'a LayerPart, index: usize) -> Option<Self> {
        let heads = part.geometry.heads.query_heads();
        let unit = heads * part.geometry.head_dim;
        let query = Query {
            position: request.first_position + index,
            values: request.queries.chunks_exact(unit).nth(index)?,
            output: &mut request.output[index * unit..(index + 1) * unit],
            lse: &mut request.lse[index * heads..(index + 1) * heads],
        };
        let plan = match part.kind {
            LaneKind::Selected => plan(request.sequence, request.attend, query.position),
            LaneKind::Window { tokens } => Plan::window(tokens as usize, query.position),
        };
        Some(Self { sequence: request.sequence, part, plan, query })
    }
}

/// What one query token attends.
struct Plan {
    /// Rows selected a lane; zero when everything before the horizon is attended exactly.
    count: usize,
    horizon: usize,
    exact_from: usize,
}

impl Plan {
    /// A window of so many rows, the query's own included.
    fn window(tokens: usize, position: usize) -> Self {
        Self { count: 0, horizon: 0, exact_from: (position + 1).saturating_sub(tokens) }
    }
}

impl Decoder {
    /// A decoder on a device.
    #[must_use]
    pub fn new(device: Box<dyn Device>) -> Self {
        let resident = device.gpu().map(|(gpu, compiler)| ResidentDecoder::new(gpu, compiler));
        Self { device, resident, positions: Vec::new(), keys: Vec::new(), hot_slots: Vec::new() }
    }

    /// The same with bounds of the device's memory; devices without memory of their own have none.
    #[must_use]
    pub fn with_limits(mut self, limits: DeviceLimits) -> Self {
        self.resident.iter_mut().for_each(|resident| resident.set_limits(limits));
        self
    }

    /// Device memory in use, by what it is for.
    #[must_use]
    pub fn device_bytes(&self) -> DeviceBytes {
        self.resident.as_ref().map(ResidentDecoder::bytes).unwrap_or_default()
    }

    /// Lets go of the device memory of sequences that are gone. Cheap; call it now and then, and after a sequence was dropped.
    pub fn sweep(&mut self) {
        self.resident.iter_mut().for_each(ResidentDecoder::sweep);
    }

    /// Performs one sequence's part of one layer of a step.
    ///
    /// # Errors
    /// Buffers, positions or values that do not fit; rows that cannot be reached.
    pub fn step_one(&mut self, layer: usize, request: &mut StepRequest<'_>) -> Result<StepReport, StepError> {
        self.step(layer, std::slice::from_mut(request)).pop().unwrap_or(Ok(StepReport::default()))
    }

    /// Performs one layer of one step. Each request succeeds or is refused on its own, and has the bits that it has alone. A device that keeps
    /// sequences serves them together.
    pub fn step(&mut self, layer: usize, batch: &mut [StepRequest<'_>]) -> Vec<Result<StepReport, StepError>> {
        let parts: Vec<Result<LayerPart, StepError>> = batch.iter().map(|request| check(layer, request)).collect();
        let mut results = Vec::with_capacity(batch.len());
        for (request, part) in batch.iter_mut().zip(&parts) {
            results.push(match part {
                Err(_) => Ok(StepReport::default()),
                Ok(part) => {
                    request.sequence.open().start_step();
                    self.exact_part(layer, request, part)
                }
            });
        }
        self.queries_one_by_one(layer, batch, &parts, &mut results);
        for (request, part) in batch.iter().zip(&parts) {
            if part.is_ok() {
                request.sequence.open().complete_step();
            }
        }
        parts.into_iter().zip(results).map(|(part, result)| part.and(result)).collect()
    }

    /// What of a request is attended exactly by all of its queries at once; nothing of others.
    fn exact_part(&mut self, layer: usize, request: &mut StepRequest<'_>, part: &LayerPart) -> Result<StepReport, StepError> {
        match part.kind {
            _ if goes_one_by_one(request, part) => Ok(StepReport::default()),
            LaneKind::Window { tokens } => self.many(layer, request, part, Some(tokens as usize)),
            LaneKind::Selected => {
                if request.sequence.is_calibrated() {
                    let unit = part.geometry.heads.query_heads() * part.geometry.head_dim;
                    request.sequence.note_queries(layer, request.first_position, request.queries, unit);
                }
                self.many(layer, request, part, None)
            }
        }
    }

    /// The first query of every sequence, then the second ones, and so on.
    fn queries_one_by_one(
        &mut self,
        layer: usize,
        batch: &mut [StepRequest<'_>],
        parts: &[Result<LayerPart, StepError>],
        results: &mut [Result<StepReport, StepError>],
    ) {
        for index in 0.. {
            let mut items = Vec::new();
            for (number, (request, part)) in batch.iter_mut().zip(parts).enumerate() {
                if let (Ok(part), Ok(_)) = (part, &results[number])
                    && goes_one_by_one(request, part)
                    && let Some(item) = Item::of(request, part, index)
                {
                    items.push((number, item));
                }
            }
            if items.is_empty() {
                return;
            }
            let (numbers, mut items): (Vec<usize>, Vec<Item<'_>>) = items.into_iter().unzip();
            for (number, done) in numbers.into_iter().zip(self.one_query_each(layer, &mut items)) {
                match (&mut results[number], done) {
                    (Ok(report), Ok(done)) => *report += done,
                    (result, Err(error)) => *result = Err(error),
                    (Err(_), Ok(_)) => {}
                }
            }
        }
    }

    fn one_query_each(&mut self, layer: usize, items: &mut [Item<'_>]) -> Vec<Result<StepReport, StepError>> {
        for item in items.iter_mut().filter(|item| item.plan.count > 0) {
            item.sequence.mark_fidelity(item.query.position);
        }
        let resident = match &mut self.resident {
            Some(resident) => resident.attend(layer, items),
            None => items.iter().map(|_| Ok(None)).collect(),
        };
        let rest = |(item, done): (&mut Item<'_>, Result<Option<StepReport>, StepError>)| match done? {
            Some(report) => Ok(report),
            None => self.one_query(layer, item),
        };
        items.iter_mut().zip(resident).map(rest).collect()
    }

    /// One query of a sequence that no device keeps.
    fn one_query(&mut self, layer: usize, item: &mut Item<'_>) -> Result<StepReport, StepError> {
        let attends_all = item.part.kind == LaneKind::Selected;
        if item.plan.count > 0 {
            self.attend_selected(layer, item)
        } else if attends_all && self.resident.is_some() && resident::streams(item.sequence, item.query.position) {
            self.stream(layer, item)
        } else {
            self.attend_from(layer, item.sequence, item.part, item.plan.exact_from, &mut item.query)
        }
    }

    fn attend_selected(&mut self, layer: usize, item: &mut Item<'_>) -> Result<StepReport, StepError> {
        let chunks = item.plan.horizon / CHUNK_TOKENS;
        item.sequence.ensure_labels(layer, chunks, self.device.as_mut());
        let mut pool = item.sequence.take_hot_pool(layer);
        let result = self.select_and_attend(layer, item, pool.as_mut());
        item.sequence.put_hot_pool(layer, pool);
        result
    }

    fn select_and_attend(&mut self, layer: usize, item: &mut Item<'_>, pool: Option<&mut HotPool>) -> Result<StepReport, StepError> {
        let Item { sequence, part, plan, query } = item;
        let chunks = plan.horizon / CHUNK_TOKENS;
        let mut labels = Vec::with_capacity(chunks);
        let Some(coder) = sequence.labels(layer, chunks, &mut labels)? else {
            return self.attend_from(layer, sequence, part, 0, query);
        };
        let exact_to = query.position + 1;
        let mut pages = Vec::with_capacity(exact_to.div_ceil(CHUNK_TOKENS));
        sequence.pages(layer, 0..exact_to.div_ceil(CHUNK_TOKENS), &mut pages)?;
        let lanes = part.geometry.heads.lanes();
        self.positions.resize(lanes * plan.count, 0);
        let job = StepJob {
            geometry: &part.geometry,
            query: query.values,
            labels: &labels,
            coder,
            pages: &pages,
            count: plan.count,
            sinks: (sequence.settings().sink_tokens as usize).min(plan.count),
            exact_to,
        };
        let mut report = match pool {
            None => self.step_cold(&job, query),
            Some(pool) => self.step_hot(&job, query, pool),
        };
        report.selected_rows = (lanes * plan.count) as u64;
        report.row_bytes = (lanes * (plan.count + exact_to - plan.horizon) * part.geometry.row_bytes()) as u64;
        report.label_bytes = labels.iter().map(|page| page.len() as u64).sum();
        Ok(report)
    }

    /// All rows from the slots: the fused verb.
    fn step_cold(&mut self, job: &StepJob<'_>, query: &mut Query<'_>) -> StepReport {
        let result = StepResult { positions: &mut self.positions, output: query.output, lse: query.lse };
        let times = self.device.step(job, result);
        StepReport { score: times.score, select: times.select, attend: times.attend, ..StepReport::default() }
    }

    /// Rows from the hot pool where it has them: the verbs one after the other.
    fn step_hot(&mut self, job: &StepJob<'_>, query: &mut Query<'_>, pool: &mut HotPool) -> StepReport {
        let lanes = job.geometry.heads.lanes();
        let rows = job.horizon();
        let begin = Instant::now();
        self.keys.resize(lanes * rows, 0);
        self.device.score(&job.score(), &mut self.keys);
        let scored = Instant::now();
        let select = SelectJob { keys: &self.keys, lanes, rows, count: job.count, sinks: job.sinks };
        self.device.select(&select, &mut self.positions);
        let selected = Instant::now();
        let hits_before = pool.counts().hits;
        self.hot_slots.resize(lanes * job.count, 0);
        let fetch = HotFetch { geometry: job.geometry, pages: job.pages };
        for lane in 0..lanes {
            let listed = lane * job.count..(lane + 1) * job.count;
            let keys = &self.keys[lane * rows..(lane + 1) * rows];
            pool.resolve(lane, &self.positions[listed.clone()], keys, &fetch, &mut self.hot_slots[listed]);
        }
        let gathered = Instant::now();
        let mut attend = job.attend(&self.positions);
        attend.hot = Some(HotRows { slots: &self.hot_slots, rows: pool.rows() });
        self.device.attend(&attend, query.output, query.lse);
        StepReport {
            hot_rows: pool.counts().hits - hits_before,
            score: scored - begin,
            select: selected - scored,
            gather: gathered - selected,
            attend: gathered.elapsed(),
            ..StepReport::default()
        }
    }

    /// One query over every row from `first` to its own.
    fn attend_from(
        &mut self,
        layer: usize,
        sequence: &Sequence,
        part: &LayerPart,
        first: usize,
        query: &mut Query<'_>,
    ) -> Result<StepReport, StepError> {
        let exact_to = query.position + 1;
        let mut pages = Vec::with_capacity(exact_to.div_ceil(CHUNK_TOKENS));
        sequence.pages(layer, first / CHUNK_TOKENS..exact_to.div_ceil(CHUNK_TOKENS), &mut pages)?;
        let begin = Instant::now();
        let job = AttendJob {
            geometry: &part.geometry,
            query: query.values,
            pages: &pages,
            listed: &[],
            listed_per_lane: 0,
            exact_from: first,
            exact_to,
            hot: None,
        };
        self.device.attend(&job, query.output, query.lse);
        let row_bytes = ((exact_to - first) * part.geometry.heads.lanes() * part.geometry.row_bytes()) as u64;
        Ok(StepReport { row_bytes, attend: begin.elapsed(), ..StepReport::default() })
    }

    /// One query over every row up to its own, on a device that they stream past.
    fn stream(&mut self, layer: usize, item: &mut Item<'_>) -> Result<StepReport, StepError> {
        let Item { sequence, part, query, .. } = item;
        let (first_position, queries, attend) = (query.position, query.values, Attend::Dense);
        let mut request = StepRequest { sequence, first_position, queries, attend, output: query.output, lse: query.lse };
        self.many(layer, &mut request, part, None)
    }

    /// Exact causal attention of all query tokens of a request: prefill over an offloaded prefix, and sliding-window layers.
    fn many(
        &mut self,
        layer: usize,
        request: &mut StepRequest<'_>,
        part: &LayerPart,
        window: Option<usize>,
    ) -> Result<StepReport, StepError> {
        let Range { start, end } = attended(request, part, window);
        if let (Some(resident), None) = (&mut self.resident, window) {
            resident.register(request.sequence, end)?;
        }
        let mut pages = Vec::with_capacity(end.div_ceil(CHUNK_TOKENS));
        request.sequence.pages(layer, start / CHUNK_TOKENS..end.div_ceil(CHUNK_TOKENS), &mut pages)?;
        let begin = Instant::now();
        let first_position = request.first_position;
        let job = ManyJob { geometry: &part.geometry, queries: request.queries, first_position, window, pages: &pages };
        self.device.attend_many(&job, request.output, request.lse);
        let row_bytes = ((end - start) * part.geometry.heads.lanes() * part.geometry.row_bytes()) as u64;
        Ok(StepReport { row_bytes, attend: begin.elapsed(), ..StepReport::default() })
    }

    /// The rows that a sparse step of one query at `position` attends, by own lane: selected and exact ones, ascending.
    ///
    /// # Errors
    /// As [`Decoder::step_one`]; sliding-window layers have no selection.
    pub fn rows(&mut self, layer: usize, sequence: &mut Sequence, position: usize, query: &[f32]) -> Result<Vec<LaneRows>, StepError> {
        let part = sequence_part(layer, sequence)?;
        if part.kind != LaneKind::Selected {
            return Err(StepError::NotSelected { layer });
        }
        let mut output = vec![0.0; query.len()];
        let mut lse = vec![0.0; part.geometry.heads.query_heads()];
        let attend = Attend::Sparse;
        let (queries, first_position) = (query, position);
        self.step_one(layer, &mut StepRequest { sequence, first_position, queries, attend, output: &mut output, lse: &mut lse })?;
        let plan = plan(sequence, attend, position);
        if let (Some(resident), true) = (&self.resident, plan.count > 0) {
            self.positions = resident.positions()?;
        }
        let mut pages = Vec::new();
        sequence.pages(layer, 0..position / CHUNK_TOKENS + 1, &mut pages)?;
        let row_bytes = part.geometry.row_bytes();
        let lanes = (0..part.lanes.len()).map(|lane| {
            let selected = &self.positions[lane * plan.count..(lane + 1) * plan.count];
            let positions: Vec<u32> = selected.iter().copied().chain(plan.exact_from as u32..position as u32 + 1).collect();
            let row = |position: u32| {
                let (chunk, token) = (position as usize / CHUNK_TOKENS, position as usize % CHUNK_TOKENS);
                let first = (lane * CHUNK_TOKENS + token) * row_bytes;
                &pages[chunk][first..first + row_bytes]
            };
            let rows = positions.iter().flat_map(|&position| row(position)).copied().collect();
            LaneRows { positions, rows }
        });
        Ok(lanes.collect())
    }
}

/// Whether a request's queries select rows each for itself, or are one.
fn goes_one_by_one(request: &StepRequest<'_>, part: &LayerPart) -> bool {
    let count = request.queries.len() / (part.geometry.heads.query_heads() * part.geometry.head_dim);
    count == 1 || (part.kind == LaneKind::Selected && request.attend == Attend::Sparse)
}

/// Rows that the query tokens of a request attend, all together.
fn attended(request: &StepRequest<'_>, part: &LayerPart, window: Option<usize>) -> Range<usize> {
    let count = request.queries.len() / (part.geometry.heads.query_heads() * part.geometry.head_dim);
    let start = window.map_or(0, |window| (request.first_position + 1).saturating_sub(window));
    start..request.first_position + count
}

fn sequence_part(layer: usize, sequence: &Sequence) -> Result<LayerPart, StepError> {
    sequence.check_layer(layer)?;
    Ok(sequence.part(layer))
}

/// Everything that may be wrong with a request, before anything is computed.
fn check(layer: usize, request: &StepRequest<'_>) -> Result<LayerPart, StepError> {
    let part = sequence_part(layer, request.sequence)?;
    let heads = part.geometry.heads.query_heads();
    let unit = heads * part.geometry.head_dim;
    let count = request.queries.len() / unit;
    let length = |field, given, expected| if given == expected { Ok(()) } else { Err(StepError::Length { field, given, expected }) };
    length("queries", request.queries.len(), count.max(1) * unit)?;
    length("output", request.output.len(), count * unit)?;
    length("log_sum_exp", request.lse.len(), count * heads)?;
    if let Some(index) = first_non_finite_value(request.queries) {
        return Err(StepError::NotFinite { index });
    }
    let (end, written) = (request.first_position + count, request.sequence.written(layer));
    if end > written {
        return Err(StepError::NotWritten { layer, end, written });
    }
    Ok(part)
}

fn plan(sequence: &Sequence, attend: Attend, position: usize) -> Plan {
    let settings = sequence.settings();
    let horizon = settings.horizon(position + 1);
    let count = settings.selected_tokens(position + 1);
    if attend == Attend::Dense || count >= horizon || !sequence.is_calibrated() {
        return Plan { count: 0, horizon, exact_from: 0 };
    }
    Plan { count, horizon, exact_from: horizon }
}
