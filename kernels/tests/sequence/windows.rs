//! Sliding-window layers: whatever happened to the sequence, a device that keeps their rows gives what one gives that has just been told of them.

use sluice_kernels::decoder::{Attend, Decoder, DeviceLimits, StepError, StepRequest};
use sluice_kernels::device::{DeviceKind, open};
use sluice_kernels::sequence::Sequence;

use crate::support::{TestDaemon, device_kinds, rows, shape, shape_of};
use crate::{SPARSE, append, everything, plain_attention, query, step};

/// The window layer of the model; its window has 300 rows.
const LAYER: usize = 1;

/// Appends rows that belong `apart` positions further on, so that no row is what was in its place before.
fn append_others(sequence: &mut Sequence, positions: std::ops::Range<usize>, apart: usize) {
    let shape = sequence.shape().clone();
    for layer in 0..shape.layers.len() {
        let lanes = sequence.part(layer).lanes;
        let others = positions.start + apart..positions.end + apart;
        sequence.append(layer, positions.start, &rows(&shape, layer, lanes, others)).expect("append");
    }
    sequence.write_tokens(positions.start, &vec![7; positions.len()]).expect("token ids");
    assert_eq!(sequence.commit(), positions.end);
}

/// Steps at a position, of a sequence that a device may know, and of a new holder of the same rows.
fn check(decoder: &mut Decoder, daemon: &TestDaemon, sequence: &mut Sequence, position: usize, what: &str) {
    let kept = step(decoder, sequence, LAYER, position, Attend::Sparse);
    let mut holder = daemon.attach(SPARSE, None, 0);
    daemon.refresh(&mut holder);
    let anew = step(decoder, &mut holder, LAYER, position, Attend::Sparse);
    assert_eq!(kept, anew, "{what}, at {position}");
}

#[test]
fn kept_windows_follow_the_sequence() {
    for (kind, row_type) in everything() {
        let shape = shape_of(row_type);
        let mut decoder = Decoder::new(open(kind, 2).expect("device"));
        let mut daemon = TestDaemon::new(shape.clone(), None, 8);
        let mut sequence = daemon.attach(SPARSE, None, 0);
        let name = format!("{kind}, {row_type:?}");
        append(&mut sequence, 0..100);
        for position in 0..700 {
            if position >= 100 {
                append(&mut sequence, position..position + 1);
            }
            let output = step(&mut decoder, &mut sequence, LAYER, position, Attend::Sparse);
            if position % 50 == 49 {
                check(&mut decoder, &daemon, &mut sequence, position, &format!("{name}: token by token"));
                let plain = plain_attention(&shape, LAYER, (position + 1).saturating_sub(300), position);
                for (given, expected) in output.iter().zip(&plain) {
                    assert!((given - expected).abs() < 2e-3, "{name}, at {position}: {given} instead of {expected}");
                }
            }
        }
        // A prompt's piece that no step has seen, chunks that move, and a query behind the newest.
        append(&mut sequence, 700..1100);
        check(&mut decoder, &daemon, &mut sequence, 1099, &format!("{name}: after a piece"));
        assert_eq!(daemon.seal(), 4);
        daemon.refresh(&mut sequence);
        check(&mut decoder, &daemon, &mut sequence, 1099, &format!("{name}: after sealing"));
        check(&mut decoder, &daemon, &mut sequence, 730, &format!("{name}: an older token"));
        check(&mut decoder, &daemon, &mut sequence, 1099, &format!("{name}: the newest again"));
        // Other rows in the place of those that the device has: part of a chunk, and a whole window.
        for (apart, length, end) in [(5000, 1080, 1101), (9000, 1030, 1500)] {
            sequence.begin_truncate(length).expect("truncate");
            sequence.truncated(length);
            daemon.refresh(&mut sequence);
            append_others(&mut sequence, length..end, apart);
            check(&mut decoder, &daemon, &mut sequence, end - 1, &format!("{name}: after a truncation to {length}"));
            check(&mut decoder, &daemon, &mut sequence, length, &format!("{name}: the first after a truncation to {length}"));
        }
        // Rows that a device brings ahead are those that it brings for a step.
        let mut holder = daemon.attach(SPARSE, None, 0);
        daemon.refresh(&mut holder);
        assert!(decoder.warm_up(LAYER, &mut holder).expect("rows").is_done);
        let expected = step(&mut decoder, &mut sequence, LAYER, 1499, Attend::Sparse);
        assert_eq!(step(&mut decoder, &mut holder, LAYER, 1499, Attend::Sparse), expected, "{name}: warmed up");
    }
}

#[test]
fn windows_are_charged_and_refused_like_everything_else() {
    for kind in device_kinds() {
        let page_bytes = 256 * 2 * 64 * 2;
        let daemon = TestDaemon::new(shape(), None, 8);
        let mut sequence = daemon.attach(SPARSE, None, 0);
        append(&mut sequence, 0..900);
        // A byte less than the window's three pages.
        let limits = DeviceLimits { device_bytes: 3 * page_bytes - 1, hot_rows: 0 };
        let mut small = Decoder::new(open(kind, 2).expect("device")).with_limits(limits);
        let mut large = Decoder::new(open(kind, 2).expect("device"));
        if matches!(kind, DeviceKind::Cuda { .. }) {
            let queries = query(&sequence, LAYER, 899);
            let (mut output, mut lse, attend) = (vec![0.0; queries.len()], vec![0.0; 2], Attend::Sparse);
            let (output, lse) = (&mut output[..], &mut lse[..]);
            let request = StepRequest { sequence: &mut sequence, first_position: 899, queries: &queries, attend, output, lse };
            let refused = small.step(LAYER, &mut [request]).pop().expect("an answer").expect_err("too little memory");
            assert!(matches!(&refused, StepError::Device(error) if error.is_exhausted()), "{refused}");
            assert_eq!(small.device_bytes().total(), 0, "nothing is kept of it");
            step(&mut large, &mut sequence, LAYER, 899, Attend::Sparse);
            assert_eq!(large.device_bytes().tail, 3 * page_bytes, "the pages that a window reaches into");
            sequence.forget_device_state();
            assert_eq!(large.device_bytes().tail, 0, "given back");
        } else {
            step(&mut small, &mut sequence, LAYER, 899, Attend::Sparse);
            assert_eq!(small.device_bytes().total(), 0, "{kind} has no memory of its own");
        }
    }
}
