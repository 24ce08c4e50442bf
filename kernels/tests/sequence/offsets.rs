//! Rows that lie beyond 4 GiB in their file are the same rows: where one lies is 64 bits wide on every device.
//!
//! Files are as long as that and take memory where they are touched. A GPU registers all of a file that it reads: 4.3 GiB at a time.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use sluice_kernels::decoder::{Attend, Decoder};
use sluice_kernels::device::open;
use sluice_kernels::sequence::Sequence;
use sluice_kernels::shape::{LaneKind, LayerShape, ModelShape, RowType};

use crate::support::{TestDaemon, calibration, device_kinds, rows};
use crate::{SPARSE, all_layers, append, plain_attention, stepped};

/// Slots of the long files. The first layer's pages have 2 MiB, so those of slots from 2,048 on begin beyond 4 GiB; the other layers' pages,
/// of 64 KiB, all do.
const SLOTS: u32 = 2064;
const PAGES: [(usize, u64); 2] = [(0, 2 << 20), (2, 64 << 10)];
const FAR: u64 = 1 << 32;
const TOKENS: usize = 1500;

fn shape() -> Arc<ModelShape> {
    let layer = |kind, lanes| LayerShape { kind, query_heads: 2 * lanes, kv_heads: lanes, head_dim: 64, softmax_scale: 0.125 };
    let layers = vec![layer(LaneKind::Selected, 32), layer(LaneKind::Window { tokens: 300 }, 1), layer(LaneKind::Selected, 1)];
    Arc::new(ModelShape { row_type: RowType::F16, layers, scales: Vec::new() })
}

/// A sequence in a file of so many open slots, whose chunks are sealed to segments of so many slots, as many as may be.
fn grown(open_slots: u32, segment_slots: u32) -> (TestDaemon, Sequence) {
    let shape = shape();
    let mut daemon = TestDaemon::new(Arc::clone(&shape), Some(calibration(&shape)), open_slots);
    daemon.segment_slots = segment_slots;
    let mut sequence = daemon.attach(SPARSE, None, 0);
    append(&mut sequence, 0..TOKENS);
    (daemon, sequence)
}

/// The page of a whole chunk at an offset of a file.
fn assert_page(file: &File, at: u64, layer: usize, chunk: usize) {
    let shape = shape();
    let expected = rows(&shape, layer, 0..shape.layers[layer].lanes(), chunk * 256..(chunk + 1) * 256);
    let mut page = vec![0; expected.len()];
    file.read_exact_at(&mut page, at).expect("a page of the file");
    assert!(page == expected, "layer {layer}, chunk {chunk}: its page lies at {at}");
}

/// What steps give, sparse ones with rows kept between them and dense ones.
fn steps(decoder: &mut Decoder, sequence: &mut Sequence) -> Vec<Vec<f32>> {
    let mut outputs = Vec::new();
    for hot_rows in [0, 120] {
        sequence.set_hot_rows(hot_rows);
        for position in [1310, 1480, TOKENS - 1] {
            outputs.extend(all_layers(decoder, sequence, position, Attend::Sparse));
            outputs.extend(all_layers(decoder, sequence, position, Attend::Dense));
        }
    }
    outputs
}

/// What the far sequence gives on every device is what the near one gives, and what a plain softmax gives.
fn assert_same(near: &mut Sequence, far: &mut Sequence) {
    let shape = shape();
    let plain = [0, 2].map(|layer| plain_attention(&shape, layer, 0, TOKENS - 1));
    for kind in device_kinds() {
        let mut decoder = Decoder::new(open(kind, 2).expect("device"));
        let expected = steps(&mut decoder, near);
        near.forget_device_state();
        assert!(steps(&mut decoder, far) == expected, "{kind}");
        for (layer, plain) in [0, 2].into_iter().zip(&plain) {
            let (output, _) = stepped(&mut decoder, far, layer, TOKENS - 1, Attend::Dense);
            let furthest = output.iter().zip(plain).map(|(given, expected)| (given - expected).abs()).fold(0.0, f32::max);
            assert!(furthest < 2e-3, "{kind}, layer {layer}: {furthest} from the plain softmax");
        }
        for (layer, lanes) in [(0, 32), (2, 1)] {
            let queries: Vec<f32> = (0..lanes * 2 * 64).map(|index| ((index * 37 % 101) as f32 - 50.0) / 25.0).collect();
            for (lane, picked) in decoder.rows(layer, far, TOKENS - 1, &queries).expect("rows").into_iter().enumerate() {
                assert!(picked.positions.iter().any(|&position| position < 1024), "{kind}: some are selected");
                for (&position, row) in picked.positions.iter().zip(picked.rows.chunks_exact(256)) {
                    let stored = rows(&shape, layer, lane..lane + 1, position as usize..position as usize + 1);
                    assert!(row == stored, "{kind}: row {position} of layer {layer}, lane {lane}");
                }
            }
        }
        // Registered files are let go of before the next device takes some.
        far.forget_device_state();
        decoder.sweep();
    }
}

#[test]
fn rows_beyond_4_gib_of_a_segment_are_the_rows_that_were_sealed() {
    let (mut near_daemon, mut near) = grown(8, 16);
    let (mut daemon, mut far) = grown(8, SLOTS);
    for (daemon, sequence) in [(&mut near_daemon, &mut near), (&mut daemon, &mut far)] {
        assert_eq!(daemon.seal(), 5);
        daemon.refresh(sequence);
    }
    let file = File::open(daemon.path("segment-0")).expect("the segment");
    let mut plane_at = 0;
    for (layer, page_bytes) in PAGES {
        for chunk in 0..5 {
            let at = plane_at + u64::from(SLOTS - 1 - chunk as u32) * page_bytes;
            assert!(at >= FAR, "chunk {chunk} of layer {layer} lies at {at}");
            assert_page(&file, at, layer, chunk);
        }
        plane_at += u64::from(SLOTS) * page_bytes;
    }
    assert_same(&mut near, &mut far);
}

#[test]
fn rows_beyond_4_gib_of_the_open_slots_are_the_rows_that_were_appended() {
    let (_near_daemon, mut near) = grown(8, 16);
    let (daemon, mut far) = grown(SLOTS, 16);
    let file = File::open(daemon.path("open")).expect("the open slots");
    // The planes are the end of the file: the window layer's comes last, and has pages like layer 2's.
    let (layer, page_bytes) = PAGES[1];
    let plane_at = file.metadata().expect("its length").len() - 2 * u64::from(SLOTS) * page_bytes;
    assert!(plane_at >= FAR, "layer {layer} lies at {plane_at}");
    for chunk in 0..5 {
        assert_page(&file, plane_at + chunk as u64 * page_bytes, layer, chunk);
        assert_page(&file, plane_at + (u64::from(SLOTS) + chunk as u64) * page_bytes, 1, chunk);
    }
    assert_same(&mut near, &mut far);
}
