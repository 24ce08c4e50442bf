//! Device memory beyond 4 GiB: hot rows, labels and newest rows are found there as anywhere.

use std::sync::Arc;

use sluice_kernels::device::cuda::batch::{Batch, BatchLayer, BatchShape};
use sluice_kernels::device::cuda::cut::Cut;
use sluice_kernels::device::cuda::host::HostPart;
use sluice_kernels::device::cuda::seat::{Kept, Seat, SeatShape};
use sluice_kernels::shape::RowType;

use crate::batch::{PLAN, gpu, hosted, settings, step};
use crate::data::{Shape, assert_close, naive};

const SHAPE: Shape = Shape { lanes: 8, group: 2, dim: 128, tokens: 1500, row_type: RowType::F16 };
const FAR: u64 = 1 << 32;

/// The last of `layers` layers, which `large` gives so much memory that `before(shape, last)` bytes of it lie before the last one's, has the bits
/// of a layer that is alone.
fn last_of_layers_has_the_bits_of_one(
    seed: u64,
    layers: usize,
    large: impl Fn(SeatShape) -> SeatShape,
    before: impl Fn(&SeatShape, usize) -> u64,
) {
    let Some((gpu, compiler)) = gpu() else { return };
    let mut hosted = hosted(&gpu, SHAPE, PLAN, seed);
    let (settings, length) = (settings(8), SHAPE.tokens);
    let count = settings.selected_tokens(length);
    let small = hosted.shape(Kept::Pool(count), count);
    let seat_shape = large(SeatShape { layers, ..small.0.clone() });
    let last = layers - 1;
    let bytes = before(&seat_shape, last);
    assert!(bytes >= FAR, "{bytes} bytes before the last layer's");
    let host = HostPart::whole(0, hosted.layer.geometry.page_bytes() as u64);
    let of_layer = BatchLayer { coder: &hosted.coder, scales: hosted.layer.geometry.scales.clone(), host };
    let stream = gpu.new_stream().expect("a stream");
    let batch_shape = BatchShape { max_tokens: seat_shape.max_tokens, ..small.1.clone() };
    let mut batch = Batch::new(&gpu, &compiler, &stream, &batch_shape, &vec![of_layer; layers]).expect("a batch");
    batch.set_host(&hosted.host).expect("planes");
    let seat = Arc::new(Seat::new(&gpu, &stream, &seat_shape).expect("a seat of 5 GB"));
    seat.set_host_places(&stream, 0, &hosted.places).expect("places");
    batch.sit(0, &seat).expect("seated");
    let horizon = settings.horizon(length) / 256;
    batch.make_labels(last, &seat, 0, &hosted.host_pages(0..horizon)).expect("labels");
    let tail: Vec<&[u8]> = hosted.layer.pages[horizon..].iter().map(Vec::as_slice).collect();
    seat.write_tail(&stream, last, horizon, &tail).expect("newest rows");
    batch.set_length(0, length, &settings, None).expect("a length that fits");

    let mut expected = hosted.seated(&gpu, &compiler, &small, length, &settings);
    let newest = hosted.newest(length);
    let mut query = Vec::new();
    for round in 0..4 {
        // Every second step finds what the one before has fetched.
        if round % 2 == 0 {
            query = hosted.layer.queries(1);
        }
        let result = step(&mut expected, &query, &newest);
        batch.set_queries(last, &query).expect("queries");
        batch.set_new_rows(last, &newest).expect("newest rows");
        batch.send_states().expect("states");
        batch.enqueue_layer(last, 0..1, Cut::Halves).expect("a step");
        assert!(batch.outputs(last).expect("outputs") == result, "step {round}");
    }
}

#[test]
fn hot_rows_beyond_4_gib_are_those_of_a_small_store() {
    // With the most places that a lane can have, those of the last layer begin beyond 4 GiB.
    const POOL: usize = 65_472;
    let large = |shape| SeatShape { kept: Kept::Pool(POOL), ..shape };
    last_of_layers_has_the_bits_of_one(71, 18, large, |shape, last| (last * SHAPE.lanes * POOL * shape.geometry.row_bytes()) as u64);
}

#[test]
fn labels_beyond_4_gib_are_those_of_a_small_store() {
    // A seat has labels for as many tokens as it has room for, layer by layer.
    const CHUNKS: usize = 7_800;
    let large = |shape| SeatShape { max_tokens: CHUNKS * 256, ..shape };
    last_of_layers_has_the_bits_of_one(73, 18, large, |shape, last| last as u64 * shape.label_slab(CHUNKS).layer_bytes());
}

#[test]
fn newest_rows_beyond_4_gib_are_attended() {
    let Some((gpu, compiler)) = gpu() else { return };
    let mut hosted = hosted(&gpu, SHAPE, PLAN, 72);
    // Rows of zeros, and at the end those of the layer.
    let page_bytes = hosted.layer.geometry.page_bytes();
    let tail_chunks = FAR as usize / page_bytes + 8;
    let first = tail_chunks - hosted.layer.pages.len();
    assert!((first * page_bytes) as u64 >= FAR, "chunk {first} lies beyond 4 GiB");
    let max_tokens = tail_chunks * 256;
    let (seat_shape, batch_shape) = hosted.shape(Kept::Pool(0), 0);
    let seat_shape = SeatShape { max_tokens, tail_chunks, ..seat_shape };
    let mut batch = hosted.batch(&gpu, &compiler, &BatchShape { max_tokens, max_entries: max_tokens, ..batch_shape });
    let seat = Arc::new(Seat::new(&gpu, batch.stream(), &seat_shape).expect("a seat of 4.3 GB"));
    batch.sit(0, &seat).expect("seated");
    let pages: Vec<&[u8]> = hosted.layer.pages.iter().map(Vec::as_slice).collect();
    seat.write_tail(batch.stream(), 0, first, &pages).expect("rows");
    let length = first * 256 + SHAPE.tokens;
    batch.set_dense_length(0, length).expect("a length that fits");
    // Large enough scores for the last rows to outweigh the zeros.
    let query: Vec<f32> = hosted.layer.queries(1).into_iter().map(|x| 2.0 * x).collect();
    batch.set_queries(0, &query).expect("queries");
    batch.set_new_rows(0, &hosted.newest(SHAPE.tokens)).expect("newest rows");
    batch.send_states().expect("states");
    batch.enqueue_dense_layer(0, 0..1).expect("a step");
    let (output, lse) = batch.outputs(0).expect("outputs");
    let rows: Vec<usize> = (0..SHAPE.tokens).collect();
    let (mut expected, mut expected_lse) = (Vec::new(), Vec::new());
    for head in 0..SHAPE.lanes * SHAPE.group {
        let (of_rows, of_rows_lse, _) = naive(&hosted.layer, &query[head * SHAPE.dim..][..SHAPE.dim], head / SHAPE.group, &rows);
        // A row of zeros has score zero and adds nothing.
        let all = (of_rows_lse.exp() + (first * 256) as f64).ln();
        expected.extend(of_rows.into_iter().map(|x| x * (of_rows_lse - all).exp()));
        expected_lse.push(all);
    }
    assert!(expected.iter().any(|x| x.abs() > 0.05), "the last rows matter");
    assert_close("output", &output, &expected, 1e-4);
    assert_close("log-sum-exp", &lse, &expected_lse, 1e-4);
}
