//! The resident decode step of the CUDA device: rows in host memory in random slots, labels and hot rows on the device.

use std::ops::Range;
use std::sync::Arc;

use rand::rngs::StdRng;
use rand::seq::SliceRandom;
use rand::{Rng, SeedableRng};
use sluice_kernels::budget::{Budget, Settings};
use sluice_kernels::device::cuda::Gpu;
use sluice_kernels::device::cuda::batch::{Batch, BatchLayer, BatchShape};
use sluice_kernels::device::cuda::buffer::{DeviceBuffer, HostAccess};
use sluice_kernels::device::cuda::compile::Compiler;
use sluice_kernels::device::cuda::cut::Cut;
use sluice_kernels::device::cuda::host::{HostFile, HostPage, HostPart, HostRows, HostSegment};
use sluice_kernels::device::cuda::seat::{Kept, Seat, SeatShape};
use sluice_kernels::device::cuda::store::PoolMove;
use sluice_kernels::device::reference::Reference;
use sluice_kernels::device::{AttendJob, Device, LabelJob, ScoreJob, SelectJob};
use sluice_kernels::label::{LabelCoder, LabelPlan};
use sluice_kernels::layout::ClassLayout;
use sluice_kernels::shape::{LaneKind, LayerShape, ModelShape, RowType};
use sluice_kernels::shared::segment::{Access, Segment};
use sluice_kernels::slot::SlotClass;

use crate::data::{Layer, Shape, assert_close};

/// The GPU, where the environment asks for it.
pub(crate) fn gpu() -> Option<(Gpu, Compiler)> {
    if std::env::var("SLUICE_TEST_DEVICES").as_deref() != Ok("cuda") {
        eprintln!("NOT COVERED: the resident step. SLUICE_TEST_DEVICES=cuda runs it on a GPU.");
        return None;
    }
    Some((Gpu::open(0).expect("a GPU"), Compiler::find().expect("NVRTC")))
}

/// A made-up layer whose chunks lie in random places of one pinned segment.
pub(crate) struct Hosted {
    pub(crate) layer: Layer,
    pub(crate) coder: LabelCoder,
    segment: Arc<Segment>,
    pub(crate) host: HostRows,
    pub(crate) places: Vec<u32>,
}

pub(crate) const PLAN: &str = "16@4+32@2";

pub(crate) fn hosted(gpu: &Gpu, shape: Shape, plan: &str, seed: u64) -> Hosted {
    let mut layer = Layer::new(shape, seed);
    let plan: LabelPlan = plan.parse().expect("a plan");
    let coder = layer.coder(&plan);
    let mut places: Vec<u32> = (0..layer.pages.len() as u32 + 3).collect();
    places.shuffle(&mut StdRng::seed_from_u64(seed));
    places.truncate(layer.pages.len());
    let of_layer = LayerShape {
        kind: LaneKind::Selected,
        query_heads: (shape.lanes * shape.group) as u16,
        kv_heads: shape.lanes as u16,
        head_dim: shape.dim as u16,
        softmax_scale: layer.geometry.softmax_scale,
    };
    let model = ModelShape { row_type: shape.row_type, layers: vec![of_layer], scales: layer.model_scales() };
    let layout = Arc::new(ClassLayout::new(&model, SlotClass::Selected));
    let slots = layer.pages.len() as u32 + 3;
    let file = tempfile::tempfile_in("/dev/shm").expect("a file");
    file.set_len(layout.segment_bytes(slots)).expect("room");
    let segment = Segment::map(0, slots, Arc::clone(&layout), &file, Access::Writable).expect("a mapping");
    for (page, &place) in layer.pages.iter().zip(&places) {
        segment.fill_page(&layout.planes[0], place, |to| to.copy_from_slice(page));
    }
    let segment = Arc::new(segment);
    let registered = HostSegment::register(gpu, HostFile::Sealed(Arc::clone(&segment)), HostAccess::Write).expect("a registration");
    Hosted { layer, coder, segment, host: HostRows::new(layout, vec![registered]), places }
}

impl Hosted {
    pub(crate) fn shape(&self, kept: Kept, max_count: usize) -> (SeatShape, BatchShape) {
        let (geometry, plan, max_tokens) = (self.layer.geometry.clone(), self.coder.plan.clone(), self.layer.pages.len() * 256);
        let seat = SeatShape { geometry: geometry.clone(), plan: plan.clone(), layers: 1, max_tokens, kept, tail_chunks: 3 };
        let max_entries = max_count + 3 * 256;
        (seat, BatchShape { geometry, plan, slots: 1, max_tokens, max_count, max_entries, gather_blocks: 8, trace_rows: None })
    }

    /// A batch of one slot over this host memory.
    pub(crate) fn batch(&self, gpu: &Gpu, compiler: &Compiler, shape: &BatchShape) -> Batch {
        let host = HostPart::whole(0, self.layer.geometry.page_bytes() as u64);
        let layer = BatchLayer { coder: &self.coder, scales: self.layer.geometry.scales.clone(), host };
        let stream = gpu.new_stream().expect("a stream");
        let mut batch = Batch::new(gpu, compiler, &stream, shape, &[layer]).expect("a batch");
        assert_eq!(batch.own_bytes(), shape.own_bytes(1), "what is charged is what is allocated");
        batch.set_host(&self.host).expect("planes");
        batch
    }

    pub(crate) fn host_pages(&self, chunks: Range<usize>) -> Vec<HostPage<'_>> {
        self.places[chunks].iter().map(|&place| self.host.host_page(place)).collect()
    }

    fn fetch_tail(&self, batch: &Batch, chunks: Range<usize>) {
        self.write_tail(batch, 0, chunks.start, &self.places[chunks]);
    }

    /// Brings the rows of chunks from `first` on, which lie at `places`, to where steps of a slot attend them.
    pub(crate) fn write_tail(&self, batch: &Batch, slot: usize, first: usize, places: &[u32]) {
        let pages: Vec<&[u8]> = places.iter().map(|&place| self.host.page(0, place)).collect();
        batch.seat(slot).expect("a seat").write_tail(batch.stream(), 0, first, &pages).expect("tail");
    }

    /// Seats the sequence in a batch of its own, rows up to `length`.
    pub(crate) fn seated(
        &self,
        gpu: &Gpu,
        compiler: &Compiler,
        shape: &(SeatShape, BatchShape),
        length: usize,
        settings: &Settings,
    ) -> Batch {
        let mut batch = self.batch(gpu, compiler, &shape.1);
        let seat = Arc::new(Seat::new(gpu, batch.stream(), &shape.0).expect("a seat"));
        seat.set_host_places(batch.stream(), 0, &self.places).expect("places");
        batch.sit(0, &seat).expect("seated");
        let horizon = settings.horizon(length) / 256;
        batch.make_labels(0, &seat, 0, &self.host_pages(0..horizon)).expect("labels");
        self.fetch_tail(&batch, horizon..length.div_ceil(256));
        if shape.0.kept == Kept::Everything {
            for (chunk, page) in self.layer.pages[..horizon].iter().enumerate() {
                for lane in 0..self.layer.shape.lanes {
                    let lane_bytes = 256 * self.layer.geometry.row_bytes();
                    let rows = &page[lane * lane_bytes..(lane + 1) * lane_bytes];
                    seat.load_rows(batch.stream(), 0, lane, chunk * 256, rows).expect("rows");
                }
            }
        }
        batch.set_length(0, length, settings, None).expect("a length that fits");
        batch
    }

    /// The newest row of every lane.
    pub(crate) fn newest(&self, length: usize) -> Vec<u8> {
        let geometry = &self.layer.geometry;
        let page = &self.layer.pages[(length - 1) / 256];
        (0..self.layer.shape.lanes)
            .flat_map(|lane| page[geometry.row_offset(lane, length - 1)..][..geometry.row_bytes()].to_vec())
            .collect()
    }

    fn labels(&self, chunks: &[usize]) -> Vec<Vec<u8>> {
        let geometry = &self.layer.geometry;
        let label = |&chunk: &usize| {
            let mut labels = vec![0; self.layer.shape.lanes * 256 * self.coder.plan.label_bytes()];
            Reference.label(&LabelJob { geometry, page: &self.layer.pages[chunk], coder: &self.coder }, &mut labels);
            labels
        };
        chunks.iter().map(label).collect()
    }

    /// Keys are the reference's but for one step, positions are those of these keys, and outputs are those of these positions.
    pub(crate) fn assert_as_the_reference(&self, what: &str, asked: &Asked<'_>, made: &Made) {
        let Asked { chunks, length, settings, query } = *asked;
        let (lanes, geometry) = (self.layer.shape.lanes, &self.layer.geometry);
        let (horizon, count) = (settings.horizon(length), settings.selected_tokens(length));
        let sinks = settings.sink_tokens.min(count as u32);
        let labels = self.labels(&chunks[..horizon / 256]);
        let labels: Vec<&[u8]> = labels.iter().map(Vec::as_slice).collect();
        let mut expected = vec![0; lanes * horizon];
        Reference.score(&ScoreJob { geometry, query, labels: &labels, coder: &self.coder }, &mut expected);
        let mut keys = made.keys.clone();
        for (index, (&key, &expected)) in keys.iter().zip(&expected).enumerate() {
            let sink = index % horizon < sinks as usize;
            assert!(if sink { key == u16::MAX } else { key.abs_diff(expected) <= 1 }, "{what}: key {index} is {key}, expected {expected}");
        }
        for lane in keys.chunks_exact_mut(horizon) {
            lane[..sinks as usize].fill(0);
        }
        let mut positions = vec![0; lanes * count];
        Reference.select(&SelectJob { keys: &keys, lanes, rows: horizon, count, sinks: sinks as usize }, &mut positions);
        assert!(made.positions == positions, "{what}: positions");

        let pages: Vec<&[u8]> = chunks.iter().map(|&chunk| &*self.layer.pages[chunk]).collect();
        let job = AttendJob {
            geometry,
            query,
            pages: &pages,
            listed: &positions,
            listed_per_lane: count,
            exact_from: horizon,
            exact_to: length,
            hot: None,
        };
        let (mut expected, mut expected_lse) = (vec![0.0; made.output.len()], vec![0.0; made.lse.len()]);
        Reference.attend(&job, &mut expected, &mut expected_lse);
        let wide = |values: &[f32]| values.iter().map(|&x| f64::from(x)).collect::<Vec<_>>();
        assert_close(&format!("{what}: output"), &made.output, &wide(&expected), 1e-4);
        assert_close(&format!("{what}: lse"), &made.lse, &wide(&expected_lse), 1e-4);
    }
}

/// A step of a sequence that has some chunks of the layer.
pub(crate) struct Asked<'a> {
    pub(crate) chunks: &'a [usize],
    pub(crate) length: usize,
    pub(crate) settings: &'a Settings,
    pub(crate) query: &'a [f32],
}

/// What a step of a sequence made.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Made {
    pub(crate) keys: Vec<u16>,
    pub(crate) positions: Vec<u32>,
    pub(crate) output: Vec<f32>,
    pub(crate) lse: Vec<f32>,
}

pub(crate) fn settings(denominator: u32) -> Settings {
    let budget = Budget::Ratio { numerator: 1, denominator, floor_tokens: 16, cap_tokens: 0 };
    Settings { budget, exact_tokens: 64, sink_tokens: 4 }
}

pub(crate) fn step(batch: &mut Batch, query: &[f32], newest: &[u8]) -> (Vec<f32>, Vec<f32>) {
    batch.set_queries(0, query).expect("queries");
    batch.set_new_rows(0, newest).expect("newest rows");
    batch.send_states().expect("states");
    batch.enqueue_layer(0, 0..batch.shape().slots, Cut::Whole).expect("a step");
    batch.outputs(0).expect("outputs")
}

/// Hits and misses of all lanes since the last call.
pub(crate) fn counts(batch: &mut Batch) -> (u64, u64) {
    batch.take_counters().expect("counters").iter().fold((0, 0), |sum, lane| (sum.0 + lane[0], sum.1 + lane[1]))
}

#[test]
fn a_step_selects_and_attends_as_the_reference_does() {
    let Some((gpu, compiler)) = gpu() else { return };
    let cases = [
        (Shape { lanes: 8, group: 4, dim: 128, tokens: 5000, row_type: RowType::F16 }, PLAN, 16),
        (Shape { lanes: 2, group: 1, dim: 64, tokens: 2300, row_type: RowType::Bf16 }, "32@4", 8),
        (Shape { lanes: 3, group: 2, dim: 96, tokens: 1100, row_type: RowType::F16 }, "24@2", 4),
        (Shape { lanes: 1, group: 8, dim: 256, tokens: 3000, row_type: RowType::F16 }, "32@4+64@2", 16),
        (Shape { lanes: 2, group: 7, dim: 128, tokens: 700, row_type: RowType::Bf16 }, "8@16+8@8+16@4+24@2", 4),
        (Shape { lanes: 2, group: 16, dim: 64, tokens: 2000, row_type: RowType::F32 }, "8@16+8@2", 8),
        (Shape { lanes: 8, group: 4, dim: 128, tokens: 5000, row_type: RowType::Fp8 }, PLAN, 16),
        (Shape { lanes: 3, group: 2, dim: 96, tokens: 1100, row_type: RowType::Fp8 }, "24@2", 4),
        (Shape { lanes: 2, group: 16, dim: 64, tokens: 2000, row_type: RowType::Fp8 }, "8@16+8@2", 8),
        (Shape { lanes: 1, group: 8, dim: 256, tokens: 3000, row_type: RowType::Fp8 }, "32@4+64@2", 16),
        (Shape { lanes: 1, group: 4, dim: 64, tokens: 40_000, row_type: RowType::F16 }, "8@4+16@2", 64),
        // More rows a block of the selection than it keeps.
        (Shape { lanes: 1, group: 1, dim: 64, tokens: 280_000, row_type: RowType::F16 }, "8@4+16@2", 256),
    ];
    for (seed, (shape, plan, denominator)) in cases.into_iter().enumerate() {
        let mut hosted = hosted(&gpu, shape, plan, 40 + seed as u64);
        let (length, settings) = (shape.tokens, settings(denominator));
        let count = settings.selected_tokens(length);
        let query = hosted.layer.queries(1);
        let mut batch = hosted.seated(&gpu, &compiler, &hosted.shape(Kept::Pool(count + 7), count), length, &settings);
        let (output, lse) = step(&mut batch, &query, &hosted.newest(length));

        let made = Made { keys: batch.keys(0).expect("keys"), positions: batch.positions(0).expect("positions"), output, lse };
        let chunks: Vec<usize> = (0..length.div_ceil(256)).collect();
        hosted.assert_as_the_reference(
            &format!("{shape:?}"),
            &Asked { chunks: &chunks, length, settings: &settings, query: &query },
            &made,
        );
    }
}

#[test]
fn what_is_hot_never_changes_a_bit() {
    let Some((gpu, compiler)) = gpu() else { return };
    for row_type in [RowType::F16, RowType::Fp8] {
        nothing_hot_changes_a_bit(&gpu, &compiler, Shape { lanes: 8, group: 4, dim: 128, tokens: 6000, row_type });
    }
}

fn nothing_hot_changes_a_bit(gpu: &Gpu, compiler: &Compiler, shape: Shape) {
    let mut hosted = hosted(gpu, shape, PLAN, 7);
    let settings = settings(8);
    let count = settings.selected_tokens(6000);
    let kept = [Kept::Everything, Kept::Pool(count), Kept::Pool(2 * count), Kept::Pool(5000)];
    let mut batches: Vec<Batch> =
        kept.iter().map(|&kept| hosted.seated(gpu, compiler, &hosted.shape(kept, count), 5100, &settings)).collect();
    let graphs: Vec<_> = batches
        .iter()
        .map(|batch| batch.capture(|| batch.enqueue_layer(0, 0..batch.shape().slots, Cut::Halves)).expect("a graph"))
        .collect();
    let mut rng = StdRng::seed_from_u64(3);
    let mut query = hosted.layer.queries(1);
    let mut all_hits = 0;
    for number in 0..24 {
        let length = 5100 + number;
        // The query drifts, so that steps share most of their rows but not all, and jumps at times.
        if number % 6 == 5 {
            query = hosted.layer.queries(1);
        } else if number > 0 {
            query.iter_mut().for_each(|x| *x += rng.random_range(-0.15..0.15));
        }
        let newest = hosted.newest(length);
        let mut results = Vec::new();
        for (index, batch) in batches.iter_mut().enumerate() {
            batch.set_length(0, length, &settings, None).expect("a length");
            let result = if (number + index) % 2 == 0 {
                step(batch, &query, &newest)
            } else {
                batch.set_queries(0, &query).expect("queries");
                batch.set_new_rows(0, &newest).expect("newest rows");
                batch.send_states().expect("states");
                graphs[index].launch().expect("a launch");
                batch.outputs(0).expect("outputs")
            };
            results.push((result, batch.positions(0).expect("positions")));
        }
        for (kept, result) in kept.iter().zip(&results).skip(1) {
            assert!(*result == results[0], "step {number}: {kept:?}");
        }
        let wanted = (shape.lanes * settings.selected_tokens(length)) as u64;
        for (kept, batch) in kept.iter().zip(&mut batches).skip(1) {
            let (hits, misses) = counts(batch);
            assert_eq!(hits + misses, wanted, "step {number}: {kept:?}");
            assert!(number > 0 || hits == 0, "nothing is hot at first");
            all_hits += hits;
        }
    }
    assert!(all_hits > 0, "some rows were hot");
    // The same query again: all of its rows are there.
    for batch in &mut batches[1..] {
        step(batch, &query, &hosted.newest(5123));
        let (hits, misses) = counts(batch);
        assert!(hits > 0 && misses == 0, "{hits} hits, {misses} misses");
    }
}

/// Moves of blocks between lanes, drawn at random: some lanes give, others take, nobody below `least` blocks.
fn random_moves(rng: &mut StdRng, sizes: &[usize], least: usize, most: usize) -> Vec<PoolMove> {
    let mut sizes = sizes.to_vec();
    let gives: Vec<bool> = sizes.iter().map(|_| rng.random_bool(0.5)).collect();
    let mut moves = Vec::new();
    for _ in 0..rng.random_range(0..12) {
        let (from, to) = (rng.random_range(0..sizes.len()), rng.random_range(0..sizes.len()));
        if gives[from] && !gives[to] && sizes[from] > least && sizes[to] < most {
            sizes[from] -= 1;
            sizes[to] += 1;
            moves.push(PoolMove { from, to });
        }
    }
    moves
}

#[test]
fn hot_places_that_move_between_lanes_never_change_a_bit() {
    let Some((gpu, compiler)) = gpu() else { return };
    let shape = Shape { lanes: 8, group: 4, dim: 128, tokens: 6000, row_type: RowType::F16 };
    let mut hosted = hosted(&gpu, shape, PLAN, 17);
    let settings = settings(8);
    let count = settings.selected_tokens(6000);
    let kept = [Kept::Everything, Kept::Pool(2 * count)];
    let [mut whole, mut batch] = kept.map(|kept| hosted.seated(&gpu, &compiler, &hosted.shape(kept, count), 5100, &settings));
    let graph = batch.capture(|| batch.enqueue_layer(0, 0..1, Cut::Halves)).expect("a graph");
    let seat = Arc::clone(batch.seat(0).expect("a seat"));
    let (least, most) = (count.div_ceil(64), seat.most_pool_blocks());
    let mut expected = seat.pool_blocks();
    assert_eq!(expected, vec![(2 * count).div_ceil(64); 8], "equal pools at first");
    let mut rng = StdRng::seed_from_u64(5);
    let mut query = hosted.layer.queries(1);
    let (mut moved, mut hits_after) = (0, 0);
    for number in 0..60 {
        let length = 5100 + number;
        if number % 9 == 8 {
            query = hosted.layer.queries(1);
        } else {
            query.iter_mut().for_each(|x| *x += rng.random_range(-0.2..0.2));
        }
        let newest = hosted.newest(length);
        for batch in [&mut whole, &mut batch] {
            batch.set_length(0, length, &settings, None).expect("a length");
        }
        let result = step(&mut whole, &query, &newest);
        batch.set_queries(0, &query).expect("queries");
        batch.set_new_rows(0, &newest).expect("newest rows");
        batch.send_states().expect("states");
        graph.launch().expect("a launch");
        assert!(batch.outputs(0).expect("outputs") == result, "step {number}");
        hits_after += counts(&mut batch).0;
        let moves = random_moves(&mut rng, &expected, least, most);
        batch.move_blocks(0, &moves).expect("moves that fit");
        for PoolMove { from, to } in &moves {
            (expected[*from], expected[*to]) = (expected[*from] - 1, expected[*to] + 1);
        }
        assert_eq!(seat.pool_blocks(), expected, "step {number}");
        moved += moves.len();
        if number % 3 == 0 {
            // The same step again finds all but what was in the blocks that moved.
            assert!(step(&mut batch, &query, &newest) == result, "step {number} again");
            let misses = counts(&mut batch).1 as usize;
            assert!(misses <= 64 * moves.len(), "step {number}: {misses} misses after {} moves", moves.len());
            assert!(step(&mut batch, &query, &newest) == result, "step {number} once more");
            assert_eq!(counts(&mut batch).1, 0, "step {number} once more");
        }
    }
    assert!(moved > 60 && hits_after > 0, "{moved} blocks moved, {hits_after} hits");
    // What cannot be moved leaves everything as it was.
    let both = [PoolMove { from: 0, to: 1 }, PoolMove { from: 1, to: 2 }];
    batch.move_blocks(0, &both).expect_err("a lane that takes and gives");
    batch.move_blocks(0, &vec![PoolMove { from: 3, to: 4 }; expected[3] + 1]).expect_err("more than a lane has");
    batch.move_blocks(0, &[PoolMove { from: 0, to: 8 }]).expect_err("a lane that is not there");
    assert_eq!(seat.pool_blocks(), expected, "nothing moved");
    // A pool smaller than what a lane selects is refused before a step.
    batch.move_blocks(0, &vec![PoolMove { from: 3, to: 4 }; expected[3]]).expect("all of a lane's places");
    batch.set_length(0, 5200, &settings, None).expect_err("a lane without places");
}

#[test]
fn the_newest_row_reaches_the_host_and_the_device() {
    let Some((gpu, compiler)) = gpu() else { return };
    for row_type in [RowType::F16, RowType::Fp8] {
        the_newest_row_is_stored(&gpu, &compiler, Shape { lanes: 2, group: 2, dim: 64, tokens: 1000, row_type });
    }
}

fn the_newest_row_is_stored(gpu: &Gpu, compiler: &Compiler, shape: Shape) {
    let mut hosted = hosted(gpu, shape, "8@4+16@2", 9);
    let settings = settings(4);
    let count = settings.selected_tokens(1000);
    let query = hosted.layer.queries(1);
    let newest = hosted.newest(1000);
    let mut whole = hosted.seated(gpu, compiler, &hosted.shape(Kept::Pool(count), count), 1000, &settings);
    let expected = step(&mut whole, &query, &newest);
    // The same sequence without its last row, which the step brings.
    let place = hosted.places[999 / 256];
    let row_bytes = hosted.layer.geometry.row_bytes();
    let at = [0, 1].map(|lane| hosted.layer.geometry.row_offset(lane, 999));
    let segment = Arc::clone(&hosted.segment);
    let plane = segment.layout().planes[0];
    segment.fill_page(&plane, place, |page| at.iter().for_each(|&at| page[at..at + row_bytes].fill(0xFF)));
    let mut batch = hosted.seated(gpu, compiler, &hosted.shape(Kept::Pool(count), count), 999, &settings);
    hosted.fetch_tail(&batch, 3..4);
    batch.set_length(0, 1000, &settings, Some(place)).expect("a length");
    assert!(step(&mut batch, &query, &newest) == expected, "the same result");
    for (lane, &at) in at.iter().enumerate() {
        let row = &segment.page(&plane, place)[at..at + row_bytes];
        assert!(row == &newest[lane * row_bytes..(lane + 1) * row_bytes], "lane {lane}");
    }
}

#[test]
fn device_memory_is_zeroed_while_a_graph_is_captured() {
    let Some((gpu, compiler)) = gpu() else { return };
    let hosted = hosted(&gpu, Shape { lanes: 2, group: 2, dim: 64, tokens: 600, row_type: RowType::F16 }, "8@4+16@2", 11);
    let batch = hosted.batch(&gpu, &compiler, &hosted.shape(Kept::Pool(64), 64).1);
    let zeroed = || {
        let stream = gpu.new_stream().expect("a stream");
        let mut values = vec![1u32; 1 << 20];
        for fill in [0, u32::MAX] {
            let buffer = if fill == 0 { DeviceBuffer::zeroed(&stream, 1 << 20) } else { DeviceBuffer::filled(&stream, 1 << 20) };
            buffer.expect("memory").read(&stream, 0, &mut values).expect("a copy");
            assert!(values.iter().all(|&value| value == fill), "every element is {fill}");
        }
    };
    let graph = batch.capture(|| {
        std::thread::scope(|scope| scope.spawn(zeroed).join()).expect("another thread allocates");
        batch.enqueue_layer(0, 0..1, Cut::Whole)
    });
    drop(graph.expect("a graph"));
}
