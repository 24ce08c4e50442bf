//! Ways to cut the same work that must not change a bit, which only the CUDA device has; and shapes beyond those of the other tests.

use std::sync::MutexGuard;

use sluice_kernels::device::cuda::Cuda;
use sluice_kernels::device::cuda::buffer::{DeviceBuffer, PinnedBuffer};
use sluice_kernels::device::cuda::many::{Many, Piece, Queries, SEGMENT_KEYS};
use sluice_kernels::device::cuda::streamed::Streamed;
use sluice_kernels::device::reference::Reference;
use sluice_kernels::device::{Device, LabelJob, ManyJob};
use sluice_kernels::label::LabelPlan;
use sluice_kernels::shape::RowType;

use crate::data::{Layer, ROW_TYPES, Shape, assert_close};
use crate::{asked_for_cuda, gpu};

fn device() -> Option<MutexGuard<'static, Cuda>> {
    asked_for_cuda().then(gpu)
}

#[test]
fn label_pages_have_the_references_bits() {
    let Some(mut device) = device() else { return };
    let plans = ["16@4+32@2", "64@4", "8@2", "24@2", "8@16+8@8+16@4+24@2", "40@8", "16@16", "8@4+40@2"];
    for (index, plan) in plans.into_iter().enumerate() {
        let plan: LabelPlan = plan.parse().expect("a plan");
        for row_type in ROW_TYPES {
            let dim = [64, 96, 128, 256][index % 4];
            let mut layer = Layer::new(Shape { lanes: 3, group: 2, dim, tokens: 256, row_type }, index as u64);
            let coder = layer.coder(&plan);
            let job = LabelJob { geometry: &layer.geometry, page: &layer.pages[0], coder: &coder };
            let mut expected = vec![0; 3 * 256 * plan.label_bytes()];
            Reference.label(&job, &mut expected);
            let mut labels = vec![0xAA; expected.len()];
            device.label(&job, &mut labels);
            assert!(labels == expected, "{plan}, {row_type:?}, d = {dim}");
        }
    }
}

struct Case {
    shape: Shape,
    queries: usize,
    window: Option<usize>,
}

fn cases() -> Vec<Case> {
    let shape = |lanes, group, dim, tokens, row_type| Shape { lanes, group, dim, tokens, row_type };
    let [f32, f16, bf16, fp8] = ROW_TYPES;
    let mut cases = vec![
        // More segments than one, split and not.
        Case { shape: shape(2, 4, 64, 3 * SEGMENT_KEYS + 300, f16), queries: 3, window: None },
        Case { shape: shape(1, 2, 128, 2 * SEGMENT_KEYS + 1, bf16), queries: 5, window: Some(SEGMENT_KEYS + 7) },
        Case { shape: shape(1, 1, 64, 2 * SEGMENT_KEYS, f32), queries: 2, window: None },
        // A group that does not divide the rows of a block, the largest group, whole prompts.
        Case { shape: shape(2, 7, 96, 500, f16), queries: 90, window: None },
        Case { shape: shape(1, 64, 64, 300, bf16), queries: 9, window: None },
        Case { shape: shape(1, 64, 64, 300, f32), queries: 9, window: Some(40) },
        Case { shape: shape(1, 4, 64, 400, f16), queries: 400, window: None },
        Case { shape: shape(2, 1, 128, 600, f16), queries: 600, window: Some(130) },
        Case { shape: shape(1, 1, 64, 1, f16), queries: 1, window: None },
        Case { shape: shape(3, 4, 128, 2 * SEGMENT_KEYS + 70, fp8), queries: 4, window: None },
        Case { shape: shape(2, 7, 96, 500, fp8), queries: 90, window: Some(200) },
    ];
    for (index, dim) in [64, 96, 128, 256].into_iter().enumerate() {
        for (turn, row_type) in ROW_TYPES.into_iter().enumerate() {
            let group = [1, 2, 4, 8, 3][(index + turn) % 5];
            let window = [None, Some(100), Some(1)][(index + 2 * turn) % 3];
            cases.push(Case { shape: shape(2, group, dim, 257 + 100 * turn + index, row_type), queries: 40, window });
        }
    }
    cases
}

#[test]
fn many_queries_agree_with_the_reference() {
    let Some(mut device) = device() else { return };
    for (seed, Case { shape, queries, window }) in cases().into_iter().enumerate() {
        let mut layer = Layer::new(shape, seed as u64);
        let query = layer.queries(queries);
        let first_position = shape.tokens - queries;
        let mut pages = layer.page_slices();
        if let Some(window) = window {
            let needed = (first_position + 1).saturating_sub(window) / 256;
            pages[..needed].fill(&[]);
        }
        let job = ManyJob { geometry: &layer.geometry, queries: &query, first_position, window, pages: &pages };
        let room = || (vec![f32::NAN; query.len()], vec![f32::NAN; query.len() / shape.dim]);
        let ((mut expected, mut expected_lse), (mut output, mut lse)) = (room(), room());
        Reference.attend_many(&job, &mut expected, &mut expected_lse);
        device.attend_many(&job, &mut output, &mut lse);
        let double = |values: &[f32]| values.iter().map(|&x| f64::from(x)).collect::<Vec<f64>>();
        let name = format!("{shape:?}, {queries} queries, window {window:?}");
        assert_close(&name, &lse, &double(&expected_lse), 1e-4);
        assert_close(&name, &output, &double(&expected), 1e-4);
    }
}

#[test]
fn no_cut_changes_a_bit() {
    let Some(mut device) = device() else { return };
    for (row_type, dim, group) in [(RowType::F16, 128, 4), (RowType::Bf16, 64, 6), (RowType::F32, 64, 2), (RowType::Fp8, 96, 3)] {
        let tokens = 3 * SEGMENT_KEYS + 500;
        let mut layer = Layer::new(Shape { lanes: 3, group, dim, tokens, row_type }, 77);
        let query = layer.queries(30);
        let geometry = &layer.geometry;
        let pages = layer.page_slices();
        let a_query = 3 * group * dim;
        for window in [None, Some(SEGMENT_KEYS + 100)] {
            // By pieces of queries, on the device's own way.
            let mut by = |count: usize| {
                let mut results = (Vec::new(), Vec::new());
                for (index, queries) in query.chunks(count * a_query).enumerate() {
                    let (mut o, mut l) = (vec![0.0; queries.len()], vec![0.0; queries.len() / dim]);
                    let job = ManyJob { geometry, queries, first_position: tokens - 30 + index * count, window, pages: &pages };
                    device.attend_many(&job, &mut o, &mut l);
                    results.0.extend(o);
                    results.1.extend(l);
                }
                results
            };
            let whole = by(30);
            assert!(whole.0.iter().all(|x| x.is_finite()));
            for count in [1, 7] {
                assert!(whole == by(count), "{row_type:?}, window {window:?}: pieces of {count} queries");
            }
            assert!(
                whole == streamed(&mut device, &layer, &query, window),
                "{row_type:?}, window {window:?}: one lane and one segment a piece"
            );
            assert!(whole == resident(&mut device, &layer, &query, window), "{row_type:?}, window {window:?}: resident pages, one piece");
        }
    }
}

/// Pinned pages are copied many in a call, and large queries and results by several threads.
#[test]
fn large_pieces_over_pinned_pages_have_the_same_bits() {
    let Some(mut device) = device() else { return };
    let tokens = 3 * SEGMENT_KEYS + 77;
    let mut layer = Layer::new(Shape { lanes: 3, group: 4, dim: 128, tokens, row_type: RowType::F16 }, 21);
    let query = layer.queries(700);
    let page_bytes = layer.geometry.page_bytes();
    let mut pinned = PinnedBuffer::zeroed(device.parts().1.context(), layer.pages.len() * page_bytes).expect("pinned memory");
    // In another order than that of positions.
    for (page, room) in layer.pages.iter().rev().zip(pinned.chunks_exact_mut(page_bytes)) {
        room.copy_from_slice(page);
    }
    let pages: Vec<&[u8]> = pinned.chunks_exact(page_bytes).rev().collect();
    let mut by = |count: usize, pages: &[&[u8]]| {
        let (mut output, mut lse) = (vec![f32::NAN; query.len()], vec![f32::NAN; query.len() / 128]);
        let (unit, first_position) = (3 * 4 * 128, tokens - 700);
        let pieces = query.chunks(count * unit).zip(output.chunks_mut(count * unit)).zip(lse.chunks_mut(count * 12));
        for (index, ((queries, output), lse)) in pieces.enumerate() {
            let job = ManyJob { geometry: &layer.geometry, queries, first_position: first_position + index * count, window: None, pages };
            device.attend_many(&job, output, lse);
        }
        (output, lse)
    };
    let expected = by(20, &layer.page_slices());
    assert!(expected.0.iter().chain(&expected.1).all(|x| x.is_finite()));
    assert!(by(700, &pages) == expected, "one large piece over pinned pages");
    assert!(by(330, &pages) == expected, "three pieces over pinned pages");
}

fn at_the_end(device: &mut Cuda, layer: &Layer, query: &[f32], window: Option<usize>) -> (DeviceBuffer<f32>, Queries) {
    let count = query.len() / layer.geometry.heads.query_heads() / layer.shape.dim;
    let buffer = DeviceBuffer::from_slice(device.parts().1, query).expect("queries");
    let queries = Queries { address: buffer.address(), count, first_position: layer.shape.tokens - count, window };
    (buffer, queries)
}

/// In the smallest pieces that there are.
fn streamed(device: &mut Cuda, layer: &Layer, query: &[f32], window: Option<usize>) -> (Vec<f32>, Vec<f32>) {
    let (_query, queries) = at_the_end(device, layer, query, window);
    let (modules, stream) = device.parts();
    let mut streamed = Streamed::new(modules, stream, &layer.geometry, 1).expect("kernels");
    let output = DeviceBuffer::<f32>::zeroed(stream, query.len()).expect("output");
    let lse = DeviceBuffer::<f32>::zeroed(stream, query.len() / layer.shape.dim).expect("lse");
    let pages = layer.page_slices();
    // SAFETY: all buffers live until they are read, which waits for the stream.
    unsafe {
        let run = streamed.start(queries.keys(), &pages).expect("copies");
        run.attend(stream, queries, &layer.geometry.scales, output.address(), lse.address()).expect("attention");
    }
    fetch(stream, &output, &lse)
}

/// With all pages on the device, at addresses in no order, and blocks that walk the segments in turn.
fn resident(device: &mut Cuda, layer: &Layer, query: &[f32], window: Option<usize>) -> (Vec<f32>, Vec<f32>) {
    let (_query, queries) = at_the_end(device, layer, query, window);
    let (modules, stream) = device.parts();
    let pages: Vec<DeviceBuffer<u8>> = layer.pages.iter().rev().map(|page| DeviceBuffer::from_slice(stream, page).expect("page")).collect();
    let table: Vec<u64> = pages.iter().rev().map(DeviceBuffer::address).collect();
    let table = DeviceBuffer::from_slice(stream, &table).expect("table");
    let mut many = Many::new(modules, &layer.geometry).expect("kernels");
    let output = DeviceBuffer::<f32>::zeroed(stream, query.len()).expect("output");
    let lse = DeviceBuffer::<f32>::zeroed(stream, query.len() / layer.shape.dim).expect("lse");
    many.begin(stream, queries, &layer.geometry.scales).expect("begin");
    many.never_split();
    let piece = Piece { pages: table.address(), keys: 0..layer.shape.tokens, lanes: 0..layer.shape.lanes };
    // SAFETY: all buffers live until the results are read, which waits for the stream.
    unsafe {
        many.attend(stream, &piece).expect("attention");
        many.finish(stream, output.address(), lse.address()).expect("finish");
    }
    fetch(stream, &output, &lse)
}

fn fetch(stream: &cudarc::driver::CudaStream, output: &DeviceBuffer<f32>, lse: &DeviceBuffer<f32>) -> (Vec<f32>, Vec<f32>) {
    let (mut o, mut l) = (vec![0.0; output.len()], vec![0.0; lse.len()]);
    output.read(stream, 0, &mut o).expect("output");
    lse.read(stream, 0, &mut l).expect("lse");
    (o, l)
}
