//! Rows of many tokens from the device to open slots on the host.

use std::sync::Arc;

use rand::SeedableRng;
use rand::rngs::StdRng;
use rand::seq::SliceRandom;
use sluice_kernels::device::cuda::append::{Appender, BufferRows};
use sluice_kernels::device::cuda::batch::{Batch, BatchLayer, BatchShape};
use sluice_kernels::device::cuda::buffer::{DeviceBuffer, HostAccess};
use sluice_kernels::device::cuda::compile::Compiler;
use sluice_kernels::device::cuda::host::{HostFile, HostPart, HostRows, HostSegment};
use sluice_kernels::device::cuda::seat::{Kept, Seat, SeatShape};
use sluice_kernels::device::cuda::{CudaError, Gpu};
use sluice_kernels::device::reference::Reference;
use sluice_kernels::device::{Device, LabelJob};
use sluice_kernels::label::{LabelCoder, LabelPlan};
use sluice_kernels::layout::ClassLayout;
use sluice_kernels::shape::{LaneKind, LayerShape, ModelShape, RowType};
use sluice_kernels::shared::segment::{Access, Segment};
use sluice_kernels::slot::SlotClass;

use crate::asked_for_cuda;
use crate::data::{Layer, Shape};

const TAIL_CHUNKS: usize = 3;
/// What lies in open slots before.
const BEFORE: u8 = 0xA5;

/// A batch of one growing sequence of two layers, and the file that it grows in.
struct Growing {
    batch: Batch,
    host: HostRows,
    places: Vec<u32>,
}

fn model(layers: &[Layer]) -> ModelShape {
    let shape = layers[0].shape;
    let of_layer = LayerShape {
        kind: LaneKind::Selected,
        query_heads: (shape.lanes * shape.group) as u16,
        kv_heads: shape.lanes as u16,
        head_dim: shape.dim as u16,
        softmax_scale: layers[0].geometry.softmax_scale,
    };
    let scales = layers.iter().flat_map(Layer::model_scales).collect();
    ModelShape { row_type: shape.row_type, layers: vec![of_layer; layers.len()], scales }
}

fn growing(gpu: &Gpu, compiler: &Compiler, layers: &[Layer], coders: &[LabelCoder]) -> Growing {
    let (geometry, plan, chunks) = (layers[0].geometry.unscaled(), coders[0].plan.clone(), layers[0].pages.len());
    let layout = Arc::new(ClassLayout::new(&model(layers), SlotClass::Selected));
    let slots = chunks as u32 + 2;
    let file = tempfile::tempfile_in("/dev/shm").expect("a file");
    file.set_len(layout.segment_bytes(slots)).expect("room");
    let segment = Segment::map(0, slots, Arc::clone(&layout), &file, Access::Writable).expect("a mapping");
    for plane in &layout.planes {
        (0..slots).for_each(|slot| segment.fill_page(plane, slot, |page| page.fill(BEFORE)));
    }
    let registered = HostSegment::register(gpu, HostFile::Sealed(Arc::new(segment)), HostAccess::Write).expect("a registration");
    let host = HostRows::new(layout, vec![registered]);
    let mut places: Vec<u32> = (0..slots).collect();
    places.shuffle(&mut StdRng::seed_from_u64(5));
    places.truncate(chunks);
    let shape = BatchShape {
        geometry: geometry.clone(),
        plan: plan.clone(),
        slots: 1,
        max_tokens: chunks * 256,
        max_count: 0,
        max_entries: TAIL_CHUNKS * 256,
        gather_blocks: 8,
        trace_rows: None,
    };
    let page_bytes = geometry.page_bytes() as u64;
    let of_layer = |(plane, coder): (usize, _)| BatchLayer {
        coder,
        scales: layers[plane].geometry.scales.clone(),
        host: HostPart::whole(plane, page_bytes),
    };
    let of_layers: Vec<BatchLayer<'_>> = coders.iter().enumerate().map(of_layer).collect();
    let stream = gpu.new_stream().expect("a stream");
    let mut batch = Batch::new(gpu, compiler, &stream, &shape, &of_layers).expect("a batch");
    batch.set_host(&host).expect("planes");
    let seat = SeatShape { geometry, plan, layers: layers.len(), max_tokens: chunks * 256, kept: Kept::Pool(0), tail_chunks: TAIL_CHUNKS };
    let seat = Arc::new(Seat::new(gpu, batch.stream(), &seat).expect("a seat"));
    batch.sit(0, &seat).expect("seated");
    Growing { batch, host, places }
}

/// Rows of tokens as a model makes them, `[token][lane][row]`, taken from pages.
fn rows(layer: &Layer, tokens: std::ops::Range<usize>) -> Vec<u8> {
    let geometry = &layer.geometry;
    let row = |token: usize, lane: usize| &layer.pages[token / 256][geometry.row_offset(lane, token)..][..geometry.row_bytes()];
    tokens.flat_map(|token| (0..layer.shape.lanes).flat_map(move |lane| row(token, lane).to_vec())).collect()
}

/// The page of a chunk when the first `written` tokens of the sequence are there.
fn expected_page(layer: &Layer, chunk: usize, written: usize) -> Vec<u8> {
    let mut page = vec![BEFORE; layer.pages[chunk].len()];
    for token in chunk * 256..written.clamp(chunk * 256, chunk * 256 + 256) {
        for lane in 0..layer.shape.lanes {
            let at = layer.geometry.row_offset(lane, token);
            page[at..at + layer.geometry.row_bytes()].copy_from_slice(&layer.pages[chunk][at..at + layer.geometry.row_bytes()]);
        }
    }
    page
}

fn check(gpu: &Gpu, compiler: &Compiler, shape: Shape, pieces: &[usize]) {
    let plan: LabelPlan = if shape.dim == 64 { "8@4+16@2" } else { "16@4+32@2" }.parse().expect("a plan");
    let mut layers: Vec<Layer> = (0..2).map(|layer| Layer::new(shape, 90 + layer)).collect();
    let coders: Vec<LabelCoder> = layers.iter_mut().map(|layer| layer.coder(&plan)).collect();
    let Growing { batch, mut host, places } = growing(gpu, compiler, &layers, &coders);
    let mut appender = Appender::new(gpu, compiler, &batch, 0).expect("an appender");
    let mut first = 0;
    // Mostly the next piece follows at once, and overwrites pages that are on their way.
    for pieces in pieces.chunks(3) {
        let mut buffers = Vec::new();
        for &tokens in pieces {
            let of_layer = |layer: &Layer| DeviceBuffer::from_slice(batch.stream(), &rows(layer, first..first + tokens)).expect("rows");
            buffers.push((first..first + tokens, layers.iter().map(of_layer).collect::<Vec<_>>()));
            first += tokens;
        }
        let pieces = buffers.iter().flat_map(|(tokens, buffers)| {
            let places = &places[tokens.start / 256..tokens.end.div_ceil(256)];
            buffers.iter().enumerate().map(move |(layer, rows)| BufferRows { layer, first_position: tokens.start, rows, places })
        });
        appender.append_buffers(&batch, &mut host, pieces).expect("rows that fit");
        for (plane, layer) in layers.iter().enumerate() {
            for (chunk, &place) in places.iter().enumerate() {
                assert!(
                    host.page(plane, place) == expected_page(layer, chunk, first),
                    "{shape:?}: chunk {chunk} of layer {plane} at {first}"
                );
            }
        }
    }
    assert_eq!(first, shape.tokens, "pieces of the whole");
    let seat = batch.seat(0).expect("a seat");
    for (index, (layer, coder)) in layers.iter().zip(&coders).enumerate() {
        let geometry = &layer.geometry;
        for chunk in 0..shape.tokens / 256 {
            let mut expected = vec![0; shape.lanes * 256 * plan.label_bytes()];
            Reference.label(&LabelJob { geometry, page: &layer.pages[chunk], coder }, &mut expected);
            assert!(seat.read_labels(batch.stream(), index, chunk).expect("labels") == expected, "{shape:?}: labels of chunk {chunk}");
        }
    }
}

#[test]
fn pieces_reach_open_slots_and_get_labels() {
    if !asked_for_cuda() {
        return;
    }
    let (gpu, compiler) = (Gpu::open(0).expect("a GPU"), Compiler::find().expect("NVRTC"));
    let shape = |lanes, dim, row_type, pieces: &[usize]| Shape { lanes, group: 2, dim, tokens: pieces.iter().sum(), row_type };
    let odd: &[usize] = &[512, 512, 100, 156, 1, 511, 257, 300, 44, 7];
    for (lanes, dim, row_type) in [(3, 128, RowType::F16), (2, 64, RowType::F32), (1, 128, RowType::Fp8), (8, 128, RowType::Bf16)] {
        check(&gpu, &compiler, shape(lanes, dim, row_type, odd), odd);
    }
}

#[test]
fn rows_without_room_are_refused() {
    if !asked_for_cuda() {
        return;
    }
    let (gpu, compiler) = (Gpu::open(0).expect("a GPU"), Compiler::find().expect("NVRTC"));
    let mut layers = vec![Layer::new(Shape { lanes: 2, group: 2, dim: 64, tokens: 1280, row_type: RowType::F16 }, 3)];
    let coders = vec![layers[0].coder(&"8@4+16@2".parse().expect("a plan"))];
    let Growing { batch, mut host, places } = growing(&gpu, &compiler, &layers, &coders);
    let mut appender = Appender::new(&gpu, &compiler, &batch, 0).expect("an appender");
    let mut refused = |first: usize, tokens: usize, places: &[u32]| {
        let buffer = DeviceBuffer::zeroed(batch.stream(), tokens * 2 * layers[0].geometry.row_bytes()).expect("rows");
        let rows = BufferRows { layer: 0, first_position: first, rows: &buffer, places };
        appender.append_buffers(&batch, &mut host, [rows]).expect_err("no room")
    };
    assert!(matches!(refused(1200, 100, &places[4..]), CudaError::Bound { field: "end of the rows", value: 1300, .. }));
    assert!(matches!(refused(0, 800, &places[..4]), CudaError::Bound { field: "chunks of the rows", value: 4, .. }));
    assert!(matches!(refused(0, 100, &[7 << 16]), CudaError::NoHostRows));
}
