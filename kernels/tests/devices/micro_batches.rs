//! Micro-batches that go through the layers of a step on their own: the bits of a batch that goes through them in lockstep.

use std::ops::Range;
use std::sync::Arc;

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use sluice_kernels::device::cuda::Gpu;
use sluice_kernels::device::cuda::batch::{Batch, BatchLayer, BatchShape};
use sluice_kernels::device::cuda::buffer::DeviceBuffer;
use sluice_kernels::device::cuda::compile::Compiler;
use sluice_kernels::device::cuda::cut::Cut;
use sluice_kernels::device::cuda::host::HostPart;
use sluice_kernels::device::cuda::probe::Probe;
use sluice_kernels::device::cuda::seat::{Kept, Seat, SeatShape};
use sluice_kernels::shape::RowType;

use crate::batch::{Hosted, PLAN, counts, gpu, hosted, settings};
use crate::data::Shape;

const SHAPE: Shape = Shape { lanes: 4, group: 2, dim: 128, tokens: 6000, row_type: RowType::F16 };
const LAYERS: usize = 5;
const SLOTS: usize = 9;

/// Length of a slot's sequence, all of which have the same rows: none are as long as each other.
fn length_of(slot: usize) -> usize {
    SHAPE.tokens - 517 * slot
}

/// Slots whose layers all have the rows of one made-up layer.
fn seated(gpu: &Gpu, compiler: &Compiler, hosted: &Hosted) -> Batch {
    let settings = settings(8);
    let count = settings.selected_tokens(SHAPE.tokens);
    let (seat_shape, one) = hosted.shape(Kept::Pool(count + 100), count);
    let seat_shape = SeatShape { layers: LAYERS, ..seat_shape };
    let host = HostPart::whole(0, hosted.layer.geometry.page_bytes() as u64);
    let of_layer = BatchLayer { coder: &hosted.coder, scales: hosted.layer.geometry.scales.clone(), host };
    let stream = gpu.new_stream().expect("a stream");
    let mut batch = Batch::new(gpu, compiler, &stream, &BatchShape { slots: SLOTS, ..one }, &vec![of_layer; LAYERS]).expect("a batch");
    batch.set_host(&hosted.host).expect("planes");
    for slot in 0..SLOTS {
        let seat = Arc::new(Seat::new(gpu, &stream, &seat_shape).expect("a seat"));
        seat.set_host_places(&stream, 0, &hosted.places).expect("places");
        batch.sit(slot, &seat).expect("seated");
        let horizon = settings.horizon(length_of(slot)) / 256;
        let tail: Vec<&[u8]> = hosted.layer.pages[horizon..length_of(slot).div_ceil(256)].iter().map(Vec::as_slice).collect();
        for layer in 0..LAYERS {
            batch.make_labels(layer, &seat, 0, &hosted.host_pages(0..horizon)).expect("labels");
            seat.write_tail(&stream, layer, horizon, &tail).expect("newest rows");
        }
        batch.set_length(slot, length_of(slot), &settings, None).expect("a length that fits");
    }
    batch
}

/// Queries by layer; the same for all batches.
fn set_inputs(batch: &mut Batch, hosted: &Hosted, queries: &[Vec<f32>]) {
    let newest: Vec<u8> = (0..SLOTS).flat_map(|slot| hosted.newest(length_of(slot))).collect();
    for (layer, queries) in queries.iter().enumerate() {
        batch.set_queries(layer, queries).expect("queries");
        batch.set_new_rows(layer, &newest).expect("newest rows");
    }
    batch.send_states().expect("states");
}

fn outputs(batch: &Batch) -> Vec<(Vec<f32>, Vec<f32>)> {
    (0..LAYERS).map(|layer| batch.outputs(layer).expect("outputs")).collect()
}

#[test]
fn micro_batches_have_the_bits_of_lockstep() {
    let Some((gpu, compiler)) = gpu() else { return };
    let mut hosted = hosted(&gpu, SHAPE, PLAN, 81);
    let mut lockstep = seated(&gpu, &compiler, &hosted);
    // More micro-batches than streams, some of several slots, and one alone.
    let cuts: [Vec<Range<usize>>; 4] =
        [(0..SLOTS).map(|slot| slot..slot + 1).collect(), vec![0..1, 1..4, 4..9], vec![0..5, 5..9], std::iter::once(0..SLOTS).collect()];
    let mut apart: Vec<Batch> = cuts.iter().map(|_| seated(&gpu, &compiler, &hosted)).collect();
    let graphs: Vec<_> = apart
        .iter()
        .zip(&cuts)
        .map(|(batch, cut)| batch.capture(|| batch.enqueue_step(cut, Cut::Halves, |_, _, _| Ok(()))).expect("a graph"))
        .collect();
    let mut rng = StdRng::seed_from_u64(82);
    let mut queries: Vec<Vec<f32>> = (0..LAYERS).map(|_| hosted.layer.queries(SLOTS)).collect();
    let (mut hits, mut misses) = (0, 0);
    for round in 0..8 {
        // Queries drift, so that some rows are hot and others are not.
        queries.iter_mut().flatten().for_each(|x| *x += rng.random_range(-0.15..0.15));
        set_inputs(&mut lockstep, &hosted, &queries);
        (0..LAYERS).for_each(|layer| lockstep.enqueue_layer(layer, 0..SLOTS, Cut::Whole).expect("a layer"));
        let expected = outputs(&lockstep);
        let counted = counts(&mut lockstep);
        (hits, misses) = (hits + counted.0, misses + counted.1);
        for ((batch, graph), cut) in apart.iter_mut().zip(&graphs).zip(&cuts) {
            set_inputs(batch, &hosted, &queries);
            if round % 2 == 0 {
                graph.launch().expect("a launch");
            } else {
                batch.enqueue_step(cut, Cut::Whole, |_, _, _| Ok(())).expect("a step");
            }
            assert!(outputs(batch) == expected, "round {round}, {cut:?}");
            assert_eq!(counts(batch), counted, "hits and misses, round {round}, {cut:?}");
        }
    }
    assert!(hits > 0 && misses > 0, "{hits} hits, {misses} misses");
}

#[test]
fn what_follows_a_layer_comes_once_for_each_micro_batch() {
    let Some((gpu, compiler)) = gpu() else { return };
    let mut hosted = hosted(&gpu, SHAPE, PLAN, 83);
    let mut batch = seated(&gpu, &compiler, &hosted);
    let queries: Vec<Vec<f32>> = (0..LAYERS).map(|_| hosted.layer.queries(SLOTS)).collect();
    set_inputs(&mut batch, &hosted, &queries);
    let mut came = Vec::new();
    let micro_batches = [0..2, 2..3, 3..SLOTS];
    batch
        .enqueue_step(&micro_batches, Cut::Whole, |layer, micro_batch, _| {
            came.push((layer, micro_batch));
            Ok(())
        })
        .expect("a step");
    batch.wait().expect("the step");
    let expected: Vec<_> = (0..LAYERS).flat_map(|layer| (0..3).map(move |micro_batch| (layer, micro_batch))).collect();
    assert_eq!(came, expected);
}

/// As a model does it: the queries of a layer are there only when what follows the layer before has run, which takes its time.
#[test]
fn a_layer_has_the_queries_that_follow_the_layer_before() {
    let Some((gpu, compiler)) = gpu() else { return };
    let mut hosted = hosted(&gpu, SHAPE, PLAN, 84);
    let queries: Vec<Vec<f32>> = (0..LAYERS).map(|_| hosted.layer.queries(SLOTS)).collect();
    let stale: Vec<Vec<f32>> = (0..LAYERS).map(|layer| if layer == 0 { queries[0].clone() } else { hosted.layer.queries(SLOTS) }).collect();
    let mut lockstep = seated(&gpu, &compiler, &hosted);
    set_inputs(&mut lockstep, &hosted, &queries);
    (0..LAYERS).for_each(|layer| lockstep.enqueue_layer(layer, 0..SLOTS, Cut::Whole).expect("a layer"));
    let expected = outputs(&lockstep);
    let stream = gpu.new_stream().expect("a stream");
    let computed = DeviceBuffer::from_slice(&stream, &queries.concat()).expect("queries on the device");
    let weights = DeviceBuffer::<u8>::zeroed(&stream, 1 << 28).expect("what a layer reads");
    let probe = Probe::new(&gpu, &compiler).expect("a probe");
    stream.synchronize().expect("inputs");
    let one = |slots: Range<usize>| std::iter::once(slots).collect::<Vec<_>>();
    let each = |slots: Range<usize>| slots.map(|slot| slot..slot + 1).collect();
    for (micro_batches, cut) in [
        (one(0..SLOTS), Cut::Whole),
        (one(0..SLOTS), Cut::Halves),
        (one(0..3), Cut::Halves),
        (vec![0..4, 4..SLOTS], Cut::Halves),
        (each(0..SLOTS), Cut::Whole),
    ] {
        let mut batch = seated(&gpu, &compiler, &hosted);
        let step = |batch: &Batch| {
            batch.enqueue_step(&micro_batches, cut, |layer, micro_batch, stream| {
                probe.read(stream, &weights)?;
                let next = layer + 1;
                if next < LAYERS { batch.enqueue_queries(stream, next, micro_batches[micro_batch].clone(), &computed) } else { Ok(()) }
            })
        };
        let count = micro_batches.last().map_or(0, |slots| slots.end);
        set_inputs(&mut batch, &hosted, &stale);
        step(&batch).expect("a step");
        assert!(of_slots(&outputs(&batch), count) == of_slots(&expected, count), "{micro_batches:?}, {cut:?}");
        let graph = batch.capture(|| step(&batch)).expect("a graph");
        set_inputs(&mut batch, &hosted, &stale);
        graph.launch().expect("a launch");
        assert!(of_slots(&outputs(&batch), count) == of_slots(&expected, count), "{micro_batches:?}, {cut:?}, in a graph");
    }
}

/// The outputs of the first slots, by layer.
fn of_slots(outputs: &[(Vec<f32>, Vec<f32>)], count: usize) -> Vec<&[f32]> {
    outputs.iter().map(|(values, _)| &values[..values.len() / SLOTS * count]).collect()
}
