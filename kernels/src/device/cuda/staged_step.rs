//! The verbs of a decode step for jobs in host memory, with the kernels of the resident step: one layer, one sequence, everything copied.

use std::sync::Arc;

use cudarc::driver::CudaStream;

use super::batch::BatchShape;
use super::buffer::DeviceBuffer;
use super::error::CudaError;
use super::jobs::{Arrivals, BINS, LEAST_PARTS, LayerPlace, NOBODY, PART_WORDS, PARTS, SAMPLE_SUMS, SequenceState, StepJob, VictimCounts};
use super::label::Labeller;
use super::module::{Grid, Modules, Source, Specialisation};
use super::step::{SAMPLE_ALONE, SCORE_THREADS, SELECT_THREADS, SELECT_TILE_BYTES, SELECT_TILE_ROWS};
use crate::device::{AttendJob, HotRows, LayerGeometry, ScoreJob, SelectJob};
use crate::shape::RowType;
use crate::slot::CHUNK_TOKENS;

/// What every staged job has: the sequence and the place of its one layer, in device memory.
struct Seat {
    state: DeviceBuffer<SequenceState>,
    place: DeviceBuffer<LayerPlace>,
}

impl Seat {
    fn new(stream: &Arc<CudaStream>, state: SequenceState, place: LayerPlace) -> Result<Self, CudaError> {
        Ok(Self { state: DeviceBuffer::from_slice(stream, &[state])?, place: DeviceBuffer::from_slice(stream, &[place])? })
    }

    fn job(&self) -> StepJob {
        StepJob { sequences: self.state.address(), places: self.place.address(), parts: PARTS as u32, ..StepJob::default() }
    }
}

/// Writes `[lane][row]` importance keys.
pub(super) fn score(modules: &mut Modules, stream: &Arc<CudaStream>, job: &ScoreJob, keys: &mut [u16]) -> Result<(), CudaError> {
    let (geometry, plan) = (job.geometry, &job.coder.plan);
    let (lanes, group, chunks) = (geometry.heads.lanes(), geometry.heads.group(), job.labels.len());
    assert_eq!(keys.len(), lanes * chunks * CHUNK_TOKENS, "keys of {lanes} lanes and {chunks} chunks");
    assert_eq!(job.query.len(), lanes * group * geometry.head_dim, "query");
    if chunks == 0 {
        return Ok(());
    }
    let page_bytes = lanes * CHUNK_TOKENS * plan.label_bytes();
    let specialisation = Specialisation::labels(geometry, plan);
    let labeller = Labeller::with_module(&modules.get(Source::Label, &specialisation)?, stream, geometry, job.coder)?;
    let module = modules.get(Source::Score, &specialisation)?;
    let (sample, score) = (module.kernel("sample", 0)?, module.kernel("score", module.score_bytes(&specialisation))?);

    let context = stream.context();
    let labels = DeviceBuffer::<u8>::uninitialised(context, chunks * page_bytes)?;
    for (chunk, page) in job.labels.iter().enumerate() {
        assert_eq!(page.len(), page_bytes, "bytes of a label page");
        labels.write(stream, chunk * page_bytes, page)?;
    }
    let label_slots =
        DeviceBuffer::from_slice(stream, &(0..chunks).map(|chunk| labels.address_of(chunk * page_bytes)).collect::<Vec<u64>>())?;
    let query = DeviceBuffer::from_slice(stream, job.query)?;
    let label_lse = DeviceBuffer::<f32>::zeroed(stream, lanes * group * SAMPLE_SUMS)?;
    let room = DeviceBuffer::<u16>::zeroed(stream, keys.len())?;
    let histogram = DeviceBuffer::<u32>::zeroed(stream, lanes * BINS)?;
    let victim_counts = DeviceBuffer::<VictimCounts>::zeroed(stream, lanes)?;
    let arrivals = DeviceBuffer::<Arrivals>::zeroed(stream, lanes)?;
    // A step begins by appending the newest row, which nobody reads here.
    let new_rows = DeviceBuffer::<u8>::zeroed(stream, lanes * geometry.row_bytes())?;
    let tail = DeviceBuffer::<u8>::zeroed(stream, geometry.page_bytes())?;
    let state = SequenceState {
        label_slots: label_slots.address(),
        length: (chunks * CHUNK_TOKENS) as u32,
        chunks: chunks as u32,
        append_to: NOBODY,
        ..SequenceState::default()
    };
    let place = LayerPlace { tail: tail.address(), tail_chunks: 1, ..LayerPlace::default() };
    let seat = Seat::new(stream, state, place)?;
    let step = StepJob {
        new_rows: new_rows.address(),
        page_bytes: geometry.page_bytes() as u64,
        channels: labeller.channels(),
        steps: labeller.steps(),
        query: query.address(),
        label_lse: label_lse.address(),
        keys: room.address(),
        histogram: histogram.address(),
        victim_counts: victim_counts.address(),
        arrivals: arrivals.address(),
        lanes: lanes as u32,
        max_rows: (chunks * CHUNK_TOKENS) as u32,
        score_scale: geometry.softmax_scale * std::f32::consts::LOG2_E,
        ..seat.job()
    };
    let resident = score.resident_blocks(SCORE_THREADS)? * modules.gpu().processors as usize;
    let grid = |blocks| Grid { blocks: [blocks, lanes, 1], threads: SCORE_THREADS };
    // SAFETY: every address of the job is of a buffer above, which live until the keys have been read.
    unsafe {
        sample.launch(stream, grid(SAMPLE_ALONE), &step)?;
        score.launch(stream, grid((resident / lanes).max(1)), &step)?;
    }
    room.read(stream, 0, keys)
}

/// Writes `[lane][count]` positions, ascending.
pub(super) fn select(modules: &mut Modules, stream: &Arc<CudaStream>, job: &SelectJob, positions: &mut [u32]) -> Result<(), CudaError> {
    let SelectJob { keys, lanes, rows, count, sinks } = *job;
    assert!(keys.len() == lanes * rows && positions.len() == lanes * count, "keys and positions of all lanes");
    assert!(sinks <= count && count <= rows, "{sinks} sinks, {count} of {rows} rows");
    if count == 0 || lanes == 0 {
        return Ok(());
    }
    // Selection reads no rows, but every source is compiled for a shape of them.
    let shape = Specialisation { head_dim: 64, row_type: RowType::F16, group: 1, plan: None, replays_trace: false };
    let module = modules.get(Source::Select, &shape)?;
    // Rows that fill up the last chunk have the lowest key and the highest positions, so they are never selected.
    let padded = rows.next_multiple_of(CHUNK_TOKENS);
    let room = DeviceBuffer::<u16>::zeroed(stream, lanes * padded)?;
    for (lane, keys) in keys.chunks_exact(rows).enumerate() {
        room.write(stream, lane * padded, keys)?;
    }
    let histogram = DeviceBuffer::<u32>::zeroed(stream, lanes * BINS)?;
    let part_words = DeviceBuffer::<u64>::zeroed(stream, lanes * PARTS * PART_WORDS)?;
    let list = DeviceBuffer::<u32>::zeroed(stream, lanes * count)?;
    let arrivals = DeviceBuffer::<Arrivals>::zeroed(stream, lanes)?;
    let state = SequenceState {
        length: padded as u32,
        chunks: (padded / CHUNK_TOKENS) as u32,
        count: count as u32,
        sinks: sinks as u32,
        append_to: NOBODY,
        ..SequenceState::default()
    };
    let seat = Seat::new(stream, state, LayerPlace::default())?;
    let parts = padded.div_ceil(2 * SELECT_TILE_ROWS).next_power_of_two().clamp(LEAST_PARTS, PARTS);
    let step = StepJob {
        parts: parts as u32,
        keys: room.address(),
        histogram: histogram.address(),
        part_words: part_words.address(),
        positions: list.address(),
        arrivals: arrivals.address(),
        lanes: lanes as u32,
        max_rows: padded as u32,
        max_count: count as u32,
        ..seat.job()
    };
    let grid = Grid { blocks: [parts, lanes, 1], threads: SELECT_THREADS };
    for (name, shared_bytes) in [("count_keys", 0), ("select", 2 * SELECT_TILE_BYTES)] {
        // SAFETY: every address of the job is of a buffer above, which live until the positions have been read.
        unsafe { module.kernel(name, shared_bytes)?.launch(stream, grid, &step) }?;
    }
    list.read(stream, 0, positions)
}

/// The rows of an attention: those that are listed one by one, and the chunks from a horizon on.
struct Rows {
    listed_per_lane: usize,
    /// `[lane][listed][row_bytes]`.
    listed: Vec<u8>,
    horizon: usize,
    exact_to: usize,
    /// Pages from the horizon's chunk on, as the device's ring of them.
    tail: Vec<u8>,
}

impl Rows {
    /// The device's exact rows begin with a chunk; exact rows before that are listed, which changes nothing in the order of the rows.
    fn of(job: &AttendJob) -> Self {
        let geometry = job.geometry;
        let row_bytes = geometry.row_bytes();
        let horizon = job.exact_from.next_multiple_of(CHUNK_TOKENS);
        let before = job.exact_from..horizon.min(job.exact_to.max(job.exact_from));
        let mut listed = Vec::new();
        for lane in 0..geometry.heads.lanes() {
            for at in lane * job.listed_per_lane..(lane + 1) * job.listed_per_lane {
                match job.hot.filter(|hot| hot.slots[at] != HotRows::COLD) {
                    Some(hot) => listed.extend_from_slice(&hot.rows[hot.slots[at] as usize * row_bytes..][..row_bytes]),
                    None => listed.extend_from_slice(row(geometry, job.pages, lane, job.listed[at] as usize)),
                }
            }
            for position in before.clone() {
                listed.extend_from_slice(row(geometry, job.pages, lane, position));
            }
        }
        let chunks = horizon / CHUNK_TOKENS..job.exact_to.div_ceil(CHUNK_TOKENS).max(horizon / CHUNK_TOKENS);
        let mut tail = vec![0; chunks.len() * geometry.page_bytes()];
        for chunk in chunks.clone() {
            // A chunk's page lies at its number modulo their count.
            let at = chunk % chunks.len() * geometry.page_bytes();
            tail[at..at + geometry.page_bytes()].copy_from_slice(job.pages[chunk]);
        }
        Self { listed_per_lane: job.listed_per_lane + before.len(), listed, horizon, exact_to: job.exact_to.max(horizon), tail }
    }

    fn entries(&self) -> usize {
        self.listed_per_lane + self.exact_to - self.horizon
    }
}

fn row<'a>(geometry: &LayerGeometry, pages: &[&'a [u8]], lane: usize, position: usize) -> &'a [u8] {
    &pages[position / CHUNK_TOKENS][geometry.row_offset(lane, position)..][..geometry.row_bytes()]
}

/// Writes `[query_head][head_dim]` and `[query_head]`.
pub(super) fn attend(
    modules: &mut Modules,
    stream: &Arc<CudaStream>,
    job: &AttendJob,
    output: &mut [f32],
    lse: &mut [f32],
) -> Result<(), CudaError> {
    let geometry = job.geometry;
    let (lanes, group, dim) = (geometry.heads.lanes(), geometry.heads.group(), geometry.head_dim);
    assert!(job.query.len() == lanes * group * dim && output.len() == job.query.len() && lse.len() == lanes * group, "query and result");
    assert_eq!(job.listed.len(), lanes * job.listed_per_lane, "listed rows");
    let rows = Rows::of(job);
    if rows.entries() == 0 {
        output.fill(0.0);
        lse.fill(f32::NEG_INFINITY);
        return Ok(());
    }
    let specialisation = Specialisation::rows(geometry);
    let module = modules.get(Source::Attend, &specialisation)?;
    let (hot, tail) = (DeviceBuffer::from_slice(stream, &rows.listed)?, DeviceBuffer::from_slice(stream, &rows.tail)?);
    let places: Vec<u32> = (0..(lanes * rows.listed_per_lane) as u32).collect();
    let places = DeviceBuffer::from_slice(stream, &places)?;
    let query = DeviceBuffer::from_slice(stream, job.query)?;
    let scales = DeviceBuffer::from_slice(stream, &geometry.lane_scales())?;
    let (outputs, sums) = (DeviceBuffer::<f32>::zeroed(stream, output.len())?, DeviceBuffer::<f32>::zeroed(stream, lse.len())?);
    let block_rows = BatchShape::block_rows(rows.entries(), lanes);
    let blocks = rows.entries().div_ceil(block_rows);
    let partials = DeviceBuffer::<f32>::zeroed(stream, lanes * blocks * group * (dim + 2))?;
    let arrivals = DeviceBuffer::<Arrivals>::zeroed(stream, lanes)?;
    // Only whether there is a map matters here: without one, hot places would be positions.
    let map = DeviceBuffer::<u16>::zeroed(stream, 1)?;
    let state = SequenceState {
        length: rows.exact_to as u32,
        chunks: (rows.horizon / CHUNK_TOKENS) as u32,
        count: rows.listed_per_lane as u32,
        append_to: NOBODY,
        block_rows: block_rows as u32,
        ..SequenceState::default()
    };
    let place = LayerPlace {
        tail: tail.address(),
        hot: hot.address(),
        map: map.address(),
        tail_chunks: (rows.tail.len() / geometry.page_bytes()).max(1) as u32,
        ..LayerPlace::default()
    };
    let seat = Seat::new(stream, state, place)?;
    let step = StepJob {
        page_bytes: geometry.page_bytes() as u64,
        scales: scales.address(),
        query: query.address(),
        output: outputs.address(),
        lse: sums.address(),
        hot_places: places.address(),
        partials: partials.address(),
        arrivals: arrivals.address(),
        lanes: lanes as u32,
        max_count: rows.listed_per_lane as u32,
        max_blocks: blocks as u32,
        score_scale: geometry.softmax_scale * std::f32::consts::LOG2_E,
        ..seat.job()
    };
    let grid = Grid { blocks: [blocks, lanes, 1], threads: 32 * specialisation.attend_warps() };
    // SAFETY: every address of the job is of a buffer above, which live until the results have been read.
    unsafe { module.kernel("attend", 0)?.launch(stream, grid, &step)? };
    outputs.read(stream, 0, output)?;
    sums.read(stream, 0, lse)
}
