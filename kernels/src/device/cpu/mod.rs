//! The fast CPU device: SIMD chosen at run time, all threads given.

mod attend;
mod convert;

mod element;
mod label;
mod many;
mod parts;
mod placement;
pub mod pool;
mod product;
mod score;
mod select;
mod simd;
mod wait;

use std::marker::PhantomData;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use self::attend::{AttendSegment, MergePartials, Segments, partial_len};
use self::element::{Element, with_element};
use self::label::LabelLane;
use self::many::{QueryTile, Room, queries_a_tile};
use self::parts::Parts;
use self::pool::{DEFAULT_SPIN, SpinPool};
use self::score::{KeysOfChunk, LaneQuery, SAMPLE_PIECE, SamplePiece, Sampled, ScoreRoom, sampled_blocks};
use self::select::SelectLane;
use super::{AttendJob, Device, DeviceError, LabelJob, ManyJob, ScoreJob, SelectJob, StepJob, StepResult, StepTimes};
use crate::slot::CHUNK_TOKENS;

pub use simd::Level;

/// Chunks that one thread scores at a time when a lane is shared by threads.
const CHUNKS_A_TASK: usize = 16;

/// The fast CPU device.
pub struct Cpu {
    level: Level,
    name: String,
    pool: SpinPool,
    /// Of each lane, or of each thread when threads take whole lanes.
    lanes: Vec<LaneRoom>,
    sample: Vec<Sampled>,
    threads: Vec<ThreadRoom>,
    partials: Vec<f32>,
    keys: Vec<u16>,
}

/// Working room of a lane that is being scored.
#[derive(Default)]
struct LaneRoom {
    query: LaneQuery,
    /// What each piece of the sample left, `[piece][head]`.
    pieces: Vec<(f32, f32)>,
}

/// Working room of a thread.
#[derive(Default)]
struct ThreadRoom {
    scores: Vec<f32>,
    score: Box<ScoreRoom>,
    select: Vec<u16>,
    many: Room,
}

impl LaneRoom {
    /// Prepares `lane`, all but its normalisers, and makes room for the pieces of the sample.
    fn set(&mut self, job: &ScoreJob, lane: usize, sample: &[Sampled]) {
        self.query.set(job, lane);
        self.pieces.resize(sample.len().div_ceil(SAMPLE_PIECE) * job.geometry.heads.group(), (0.0, 0.0));
    }
}

impl Cpu {
    /// The device with the best instructions that this CPU has.
    ///
    /// # Errors
    /// A thread that could not be started.
    pub fn open(threads: usize) -> Result<Self, DeviceError> {
        Self::with_level(threads, Level::available()[0], DEFAULT_SPIN)
    }

    /// The device with given instructions, whose idle threads spin for `spin` before they sleep.
    ///
    /// # Errors
    /// A thread that could not be started.
    pub fn with_level(threads: usize, level: Level, spin: Duration) -> Result<Self, DeviceError> {
        let pool = SpinPool::start(threads, spin).map_err(|(index, source)| DeviceError::Spawn { index, threads, source })?;
        Ok(Self {
            level,
            name: format!("cpu-{}", format!("{level:?}").to_lowercase()),
            lanes: Vec::new(),
            sample: Vec::new(),
            threads: (0..pool.threads()).map(|_| ThreadRoom::default()).collect(),
            partials: Vec::new(),
            keys: Vec::new(),
            pool,
        })
    }

    /// Scores and, where `select` is given, selects; adds the threads' time for each.
    fn score_lanes(&mut self, job: &ScoreJob, keys: &mut [u16], select: Option<Selection>) -> ScoreTimes {
        let (lanes, chunks) = (job.geometry.heads.lanes(), job.labels.len());
        assert_eq!(keys.len(), lanes * chunks * CHUNK_TOKENS, "keys of {lanes} lanes and {chunks} chunks");
        for page in job.labels {
            assert_eq!(page.len(), lanes * CHUNK_TOKENS * job.coder.plan.label_bytes(), "bytes of a label page");
        }
        if chunks == 0 {
            return ScoreTimes::default();
        }
        let threads = self.pool.threads();
        self.lanes.resize_with(lanes.max(threads), LaneRoom::default);
        sampled_blocks(chunks, &mut self.sample);
        if lanes.is_multiple_of(threads) || lanes >= 4 * threads {
            self.lanes_apart(job, keys, select)
        } else {
            self.lanes_shared(job, keys, select)
        }
    }

    /// Each thread takes whole lanes, whose keys then stay in its caches until their selection.
    fn lanes_apart(&mut self, job: &ScoreJob, keys: &mut [u16], select: Option<Selection>) -> ScoreTimes {
        let (lanes, chunks, group, level) = (job.geometry.heads.lanes(), job.labels.len(), job.geometry.heads.group(), self.level);
        let (rooms, threads, keys) = (Parts::new(&mut self.lanes), Parts::new(&mut self.threads), Parts::new(keys));
        let (rows, sample) = (chunks * CHUNK_TOKENS, &self.sample[..]);
        let start = Instant::now();
        let selecting = AtomicU64::new(0);
        let counted = self.pool.threads().min(lanes) as u32;
        let select = select.map(|select| (select.count, select.sinks, Parts::new(select.positions)));
        self.pool.tasks(lanes, |thread, lane| {
            // SAFETY: a thread uses the rooms of its own number, and a lane's keys and positions are written by the thread that took it.
            let (room, own, keys) = unsafe {
                (
                    &mut rooms.part(thread..thread + 1)[0],
                    &mut threads.part(thread..thread + 1)[0],
                    keys.part(lane * rows..(lane + 1) * rows),
                )
            };
            room.set(job, lane, sample);
            for (piece, totals) in room.pieces.chunks_exact_mut(group).enumerate() {
                level.enter(SamplePiece { job, lane, query: &room.query, sample, piece, room: &mut own.score, totals });
            }
            room.query.normalise(&room.pieces);
            for (chunk, keys) in keys.chunks_exact_mut(CHUNK_TOKENS).enumerate() {
                keys_of_chunk(level, job, (lane, chunk), &room.query, &mut own.score, keys);
            }
            if let Some((count, sinks, positions)) = &select {
                let scored = Instant::now();
                // SAFETY: as above.
                let positions = unsafe { positions.part(lane * count..(lane + 1) * count) };
                level.enter(SelectLane { keys, sinks: *sinks, positions, room: &mut own.select });
                selecting.fetch_add(scored.elapsed().as_nanos() as u64, Ordering::Relaxed);
            }
        });
        let select = Duration::from_nanos(selecting.into_inner()) / counted;
        ScoreTimes { score: start.elapsed().saturating_sub(select), select }
    }

    /// Threads share every lane: its sample, then its keys, then selection by lane.
    fn lanes_shared(&mut self, job: &ScoreJob, keys: &mut [u16], select: Option<Selection>) -> ScoreTimes {
        let (lanes, chunks, group, level) = (job.geometry.heads.lanes(), job.labels.len(), job.geometry.heads.group(), self.level);
        let (start, sample) = (Instant::now(), &self.sample[..]);
        for (lane, room) in self.lanes[..lanes].iter_mut().enumerate() {
            room.set(job, lane, sample);
        }
        let rooms: Vec<_> = self.lanes[..lanes].iter_mut().map(|room| (&room.query, Parts::new(&mut room.pieces))).collect();
        let pieces = sample.len().div_ceil(SAMPLE_PIECE);
        let threads = Parts::new(&mut self.threads);
        self.pool.tasks(lanes * pieces, |thread, task| {
            let (lane, piece) = (task / pieces, task % pieces);
            // SAFETY: a piece is one task, and a thread uses the room of its own number.
            let (totals, own) =
                unsafe { (rooms[lane].1.part(piece * group..(piece + 1) * group), &mut threads.part(thread..thread + 1)[0]) };
            level.enter(SamplePiece { job, lane, query: rooms[lane].0, sample, piece, room: &mut own.score, totals });
        });
        drop(rooms);
        for room in &mut self.lanes[..lanes] {
            room.query.normalise(&room.pieces);
        }
        let (rooms, parts, tasks) = (&self.lanes, Parts::new(keys), chunks.div_ceil(CHUNKS_A_TASK));
        self.pool.tasks(lanes * tasks, |thread, task| {
            let (lane, first) = (task / tasks, task % tasks * CHUNKS_A_TASK);
            // SAFETY: a thread uses the room of its own number.
            let own = unsafe { &mut threads.part(thread..thread + 1)[0] };
            for chunk in first..chunks.min(first + CHUNKS_A_TASK) {
                let at = (lane * chunks + chunk) * CHUNK_TOKENS;
                // SAFETY: a chunk belongs to one task.
                let keys = unsafe { parts.part(at..at + CHUNK_TOKENS) };
                keys_of_chunk(level, job, (lane, chunk), &rooms[lane].query, &mut own.score, keys);
            }
        });
        let scored = Instant::now();
        if let Some(Selection { count, sinks, positions }) = select {
            self.select(&SelectJob { keys, lanes, rows: chunks * CHUNK_TOKENS, count, sinks }, positions);
        }
        ScoreTimes { score: scored - start, select: scored.elapsed() }
    }

    fn merge(&mut self, job: &AttendJob, segments: Segments, output: &mut [f32], lse: &mut [f32]) {
        let (dim, group, level) = (job.geometry.head_dim, job.geometry.heads.group(), self.level);
        let a_segment = group * partial_len(dim);
        let (output, lse, partials) = (Parts::new(output), Parts::new(lse), Parts::new(&mut self.partials));
        self.pool.tasks(job.geometry.heads.query_heads(), |_, head| {
            // SAFETY: each head is one task, and partials are only read.
            let (output, lse) = unsafe { (output.part(head * dim..(head + 1) * dim), output_one(&lse, head)) };
            let first = head / group * segments.count * a_segment + head % group * partial_len(dim);
            let factor = with_element!(job.geometry.row_type, E => <E as Element>::FACTOR);
            let scale = factor * job.geometry.scales.of(head / group).value;
            *lse = level.enter(MergePartials { partials: &partials, first, stride: a_segment, segments: segments.count, scale, output });
        });
    }
}

/// One element of a slice of parts.
///
/// # Safety
/// As [`Parts::part`].
#[expect(clippy::mut_from_ref, reason = "that parts do not overlap is the caller's promise")]
unsafe fn output_one<'a>(parts: &'a Parts<'_, f32>, index: usize) -> &'a mut f32 {
    // SAFETY: the caller's promise.
    unsafe { &mut parts.part(index..index + 1)[0] }
}

/// What is selected after scoring.
struct Selection<'a> {
    count: usize,
    sinks: usize,
    positions: &'a mut [u32],
}

#[derive(Default)]
struct ScoreTimes {
    score: Duration,
    select: Duration,
}

fn keys_of_chunk(level: Level, job: &ScoreJob, (lane, chunk): (usize, usize), query: &LaneQuery, room: &mut ScoreRoom, keys: &mut [u16]) {
    let lane_bytes = job.labels[chunk].len() / job.geometry.heads.lanes();
    let labels = |chunk: usize| &job.labels[chunk][lane * lane_bytes..(lane + 1) * lane_bytes];
    let next = labels((chunk + 1).min(job.labels.len() - 1));
    level.enter(KeysOfChunk { plan: &job.coder.plan, query, labels: labels(chunk), next, room, keys });
}

impl Device for Cpu {
    fn name(&self) -> &str {
        &self.name
    }

    fn label(&mut self, job: &LabelJob, out: &mut [u8]) {
        let lanes = job.geometry.heads.lanes();
        let lane_bytes = CHUNK_TOKENS * job.coder.plan.label_bytes();
        assert!(out.len() == lanes * lane_bytes && job.page.len() == job.geometry.page_bytes(), "bytes of a page and of its labels");
        let (out, level) = (Parts::new(out), self.level);
        self.pool.tasks(lanes, |_, lane| {
            // SAFETY: each lane is one task.
            let out = unsafe { out.part(lane * lane_bytes..(lane + 1) * lane_bytes) };
            with_element!(job.geometry.row_type, E => level.enter(LabelLane::<E> { job, lane, out, element: PhantomData }));
        });
    }

    fn score(&mut self, job: &ScoreJob, keys: &mut [u16]) {
        self.score_lanes(job, keys, None);
    }

    fn select(&mut self, job: &SelectJob, positions: &mut [u32]) {
        assert!(job.keys.len() == job.lanes * job.rows && positions.len() == job.lanes * job.count, "keys and positions of all lanes");
        let (positions, threads, level) = (Parts::new(positions), Parts::new(&mut self.threads), self.level);
        self.pool.tasks(job.lanes, |thread, lane| {
            let keys = &job.keys[lane * job.rows..(lane + 1) * job.rows];
            // SAFETY: each lane is one task, and a thread uses the room of its own number.
            let (positions, room) =
                unsafe { (positions.part(lane * job.count..(lane + 1) * job.count), &mut threads.part(thread..thread + 1)[0].select) };
            level.enter(SelectLane { keys, sinks: job.sinks, positions, room });
        });
    }

    fn attend(&mut self, job: &AttendJob, output: &mut [f32], lse: &mut [f32]) {
        let geometry = job.geometry;
        let (lanes, group, dim, level) = (geometry.heads.lanes(), geometry.heads.group(), geometry.head_dim, self.level);
        assert!(
            job.query.len() == lanes * group * dim && output.len() == job.query.len() && lse.len() == lanes * group,
            "query and result"
        );
        assert_eq!(job.listed.len(), lanes * job.listed_per_lane, "listed rows");
        let segments = Segments::new(job);
        let a_segment = group * partial_len(dim);
        self.partials.resize(lanes * segments.count * a_segment, 0.0);
        let (partials, threads) = (Parts::new(&mut self.partials), Parts::new(&mut self.threads));
        self.pool.tasks(lanes * segments.count, |thread, task| {
            // SAFETY: each segment is one task, and a thread uses the room of its own number.
            let (partials, room) =
                unsafe { (partials.part(task * a_segment..(task + 1) * a_segment), &mut threads.part(thread..thread + 1)[0]) };
            let (lane, segment, scores) = (task / segments.count, task % segments.count, &mut room.scores);
            with_element!(geometry.row_type, E => level.enter(AttendSegment::<E> {
                job, lane, segments, segment, partials, scores, element: PhantomData
            }));
        });
        self.merge(job, segments, output, lse);
    }

    fn attend_many(&mut self, job: &ManyJob, output: &mut [f32], lse: &mut [f32]) {
        let geometry = job.geometry;
        let (heads, dim, level) = (geometry.heads.query_heads(), geometry.head_dim, self.level);
        let queries = job.queries.len() / (heads * dim);
        assert!(job.queries.len() == queries * heads * dim && output.len() == job.queries.len(), "queries and outputs");
        assert_eq!(lse.len(), queries * heads, "log-sum-exps");
        let a_tile = queries_a_tile(geometry.heads.group());
        let tiles = queries.div_ceil(a_tile);
        let (output, lse, threads) = (Parts::new(output), Parts::new(lse), Parts::new(&mut self.threads));
        let write = |query: usize, head: usize, from: &[f32], log_sum: f32| {
            let at = query * heads + head;
            // SAFETY: each (query, head) is written by the one task that has its lane and tile.
            unsafe {
                output.part(at * dim..(at + 1) * dim).copy_from_slice(from);
                *output_one(&lse, at) = log_sum;
            }
        };
        // The last tiles have the most keys, so they come first.
        self.pool.tasks(geometry.heads.lanes() * tiles, |thread, task| {
            let (lane, tile) = (task % geometry.heads.lanes(), tiles - 1 - task / geometry.heads.lanes());
            let (first, count) = (tile * a_tile, a_tile.min(queries - tile * a_tile));
            // SAFETY: a thread uses the room of its own number.
            let room = unsafe { &mut threads.part(thread..thread + 1)[0].many };
            with_element!(geometry.row_type, E => level.enter(QueryTile::<E> {
                job, lane, first, count, room, write: &write, element: PhantomData
            }));
        });
    }

    fn step(&mut self, job: &StepJob, result: StepResult) -> StepTimes {
        let lanes = job.geometry.heads.lanes();
        assert!(result.positions.len() == lanes * job.count && job.sinks <= job.count && job.count <= job.horizon(), "selected rows");
        let mut keys = std::mem::take(&mut self.keys);
        keys.resize(lanes * job.horizon(), 0);
        let select = Selection { count: job.count, sinks: job.sinks, positions: result.positions };
        let times = self.score_lanes(&job.score(), &mut keys, Some(select));
        self.keys = keys;
        let start = Instant::now();
        self.attend(&job.attend(result.positions), result.output, result.lse);
        StepTimes { score: times.score, select: times.select, attend: start.elapsed() }
    }
}

/// Rounds f32 to little-endian binary16, as `half::f16::from_f32`.
pub(crate) fn to_f16(level: Level, from: &[f32], to: &mut [u8]) {
    level.enter(convert::ToF16 { from, to });
}

/// Converts f32 to e4m3 at one scale, as [`crate::rows::e4m3::code_of`].
pub(crate) fn to_e4m3(level: Level, from: &[f32], scale: f32, to: &mut [u8]) {
    level.enter(convert::ToE4m3 { from, scale, to });
}
