//! Window layers on the device: a ring of pages gives the bits that copying all rows of the window gives.

use std::ops::Range;

use sluice_kernels::device::cuda::compile::Compiler;
use sluice_kernels::device::cuda::window::{Attended, RingShape, Rings, WindowShape, WindowStep};
use sluice_kernels::device::cuda::{CudaError, Gpu};
use sluice_kernels::device::{AttendJob, Device};
use sluice_kernels::shape::RowType;

use crate::data::{Layer, Shape, assert_close, naive};
use crate::{SharedGpu, asked_for_cuda};

/// Results of attending rows that are copied for it.
fn copied(layer: &Layer, query: &[f32], span: &Range<usize>) -> (Vec<f32>, Vec<f32>) {
    let pages = layer.page_slices();
    let job = AttendJob {
        geometry: &layer.geometry,
        query,
        pages: &pages,
        listed: &[],
        listed_per_lane: 0,
        exact_from: span.start,
        exact_to: span.end,
        hot: None,
    };
    let (mut output, mut lse) = (vec![f32::NAN; query.len()], vec![f32::NAN; query.len() / layer.shape.dim]);
    SharedGpu.attend(&job, &mut output, &mut lse);
    (output, lse)
}

/// The rows of a position, `[lane][row_bytes]`.
fn row(layer: &Layer, position: usize) -> Vec<u8> {
    let geometry = &layer.geometry;
    let of_lane = |lane: usize| layer.pages[position / 256][geometry.row_offset(lane, position)..][..geometry.row_bytes()].to_vec();
    (0..layer.shape.lanes).flat_map(of_lane).collect()
}

/// Rings of two layers, of which the second is used; they know nothing of rows before `first`, nor from there on.
fn rings(gpu: &Gpu, step: &WindowStep, layer: &Layer, window: usize, first: usize) -> Rings {
    let shape = RingShape { geometry: layer.geometry.unscaled(), layers: 2, chunks: RingShape::chunks_of(window) };
    let rings = Rings::new(gpu, shape).expect("rings");
    let from = (first + 1).saturating_sub(window) / 256;
    for chunk in from..first.div_ceil(256) {
        let mut page = layer.pages[chunk].clone();
        for (lane, position) in (0..layer.shape.lanes).flat_map(|lane| (chunk * 256..chunk * 256 + 256).map(move |at| (lane, at))) {
            if position >= first {
                page[layer.geometry.row_offset(lane, position)..][..layer.geometry.row_bytes()].fill(0xFF);
            }
        }
        rings.write(step.stream(), 1, chunk, &page).expect("a page");
    }
    rings
}

#[test]
fn windows_in_rings_have_the_bits_of_windows_that_are_copied() {
    if !asked_for_cuda() {
        return;
    }
    let (gpu, compiler) = (Gpu::open(0).expect("a GPU"), Compiler::find().expect("NVRTC"));
    let cases = [
        (Shape { lanes: 2, group: 2, dim: 64, tokens: 1600, row_type: RowType::F16 }, 300),
        (Shape { lanes: 16, group: 2, dim: 128, tokens: 1600, row_type: RowType::Bf16 }, 1024),
        (Shape { lanes: 1, group: 4, dim: 256, tokens: 1600, row_type: RowType::F16 }, 512),
        (Shape { lanes: 3, group: 1, dim: 96, tokens: 1600, row_type: RowType::Fp8 }, 257),
        (Shape { lanes: 2, group: 3, dim: 64, tokens: 1600, row_type: RowType::F32 }, 1),
        (Shape { lanes: 1, group: 8, dim: 128, tokens: 1600, row_type: RowType::Fp8 }, 4096),
    ];
    for (seed, (shape, window)) in cases.into_iter().enumerate() {
        let mut layer = Layer::new(shape, 300 + seed as u64);
        let stream = gpu.new_stream().expect("a stream");
        let scales = [layer.geometry.scales.clone(), layer.geometry.scales.clone()];
        let of_steps = WindowShape { geometry: layer.geometry.clone(), slots: 3, max_rows: window };
        let mut step = WindowStep::new(&gpu, &compiler, &stream, &of_steps, &scales).expect("a step");
        // Three sequences go on from different lengths, past the ends of chunks and around their rings.
        let firsts = [0, 250, 1023];
        let of_sequences: Vec<Rings> = firsts.iter().map(|&first| rings(&gpu, &step, &layer, window, first)).collect();
        for number in 0..560 {
            let spans = firsts.map(|first| (first + number + 1).saturating_sub(window)..first + number + 1);
            let query = layer.queries(1);
            for (slot, span) in spans.iter().enumerate() {
                let (values, rows) = step.input(slot);
                values.copy_from_slice(&query);
                rows.copy_from_slice(&row(&layer, span.end - 1));
            }
            let attended: Vec<Attended<'_>> =
                of_sequences.iter().zip(&spans).map(|(rings, span)| Attended { rings, span: span.clone() }).collect();
            step.perform(1, &attended).expect("a step");
            if number % 40 > 2 {
                continue;
            }
            for (slot, span) in spans.iter().enumerate() {
                let (output, lse) = step.result(slot);
                let expected = copied(&layer, &query, span);
                assert!(output == expected.0 && lse == expected.1, "{shape:?}, window {window}: sequence {slot} at {span:?}");
                let head = number % (shape.lanes * shape.group);
                let rows: Vec<usize> = span.clone().collect();
                let (plain, plain_lse, _) = naive(&layer, &query[head * shape.dim..][..shape.dim], head / shape.group, &rows);
                assert_close("output", &output[head * shape.dim..][..shape.dim], &plain, 1e-4);
                assert_close("log-sum-exp", &lse[head..=head], &[plain_lse], 1e-4);
            }
        }
        let too_many = Attended { rings: &of_sequences[0], span: 0..window + 1 };
        assert!(matches!(step.perform(1, &[too_many]), Err(CudaError::Bound { field: "attended rows", .. })));
    }
}
