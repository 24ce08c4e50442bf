//! A holder's view of a sequence: what it reads, and what a step gives, does not depend on where rows lie.

#[path = "sequence/look_ahead.rs"]
mod look_ahead;
#[path = "sequence/offsets.rs"]
mod offsets;
mod support;
#[path = "sequence/warm_up.rs"]
mod warm_up;
#[path = "sequence/windows.rs"]
mod windows;

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use sluice_kernels::bound::Bound;
use sluice_kernels::budget::{Budget, Settings};
use sluice_kernels::decoder::{Attend, Decoder, DeviceLimits, StepError, StepReport, StepRequest};
use sluice_kernels::device::{DeviceKind, open};
use sluice_kernels::sequence::{Sequence, SequenceError};
use sluice_kernels::shape::{ModelShape, RowType};
use sluice_kernels::slot::SlotClass;
use support::{ROW_TYPES, TestDaemon, calibration, device_kinds, rows, set_scales, shape, shape_of, stored, value};

const SPARSE: Settings =
    Settings { budget: Budget::Ratio { numerator: 1, denominator: 16, floor_tokens: 48, cap_tokens: 0 }, exact_tokens: 64, sink_tokens: 4 };

fn append(sequence: &mut Sequence, positions: std::ops::Range<usize>) {
    let shape = sequence.shape().clone();
    for layer in 0..shape.layers.len() {
        let lanes = sequence.part(layer).lanes;
        sequence.append(layer, positions.start, &rows(&shape, layer, lanes, positions.clone())).expect("append");
    }
    let ids: Vec<u32> = positions.clone().map(|position| position as u32).collect();
    sequence.write_tokens(positions.start, &ids).expect("token ids");
    assert_eq!(sequence.commit(), positions.end);
}

fn step(decoder: &mut Decoder, sequence: &mut Sequence, layer: usize, position: usize, attend: Attend) -> Vec<f32> {
    stepped(decoder, sequence, layer, position, attend).0
}

fn report(decoder: &mut Decoder, sequence: &mut Sequence, layer: usize, position: usize, attend: Attend) -> StepReport {
    stepped(decoder, sequence, layer, position, attend).1
}

/// Output and log-sum-exps, and the costs, of a query that is a hash of its position.
fn stepped(decoder: &mut Decoder, sequence: &mut Sequence, layer: usize, position: usize, attend: Attend) -> (Vec<f32>, StepReport) {
    let heads = sequence.part(layer).geometry.heads.query_heads();
    let queries = query(sequence, layer, position);
    let (mut output, mut lse) = (vec![0.0; heads * 64], vec![0.0; heads]);
    let mut request = StepRequest { sequence, first_position: position, queries: &queries, attend, output: &mut output, lse: &mut lse };
    let report = decoder.step_one(layer, &mut request).expect("step");
    output.extend(lse);
    (output, report)
}

fn query(sequence: &Sequence, layer: usize, position: usize) -> Vec<f32> {
    let part = sequence.part(layer);
    let first_head = part.lanes.start * part.geometry.heads.group();
    let values = part.geometry.heads.query_heads() * 64;
    (0..values).map(|index| value(90 + layer, first_head + index / 64, position, index % 64)).collect()
}

fn all_layers(decoder: &mut Decoder, sequence: &mut Sequence, position: usize, attend: Attend) -> Vec<Vec<f32>> {
    (0..3).map(|layer| step(decoder, sequence, layer, position, attend)).collect()
}

#[test]
fn a_step_gives_the_same_bits_before_and_after_sealing() {
    for (kind, row_type) in everything() {
        let mut decoder = Decoder::new(open(kind, 2).expect("device"));
        let shape = shape_of(row_type);
        let mut daemon = TestDaemon::new(shape.clone(), Some(calibration(&shape)), 16);
        let mut sequence = daemon.attach(SPARSE, None, 0);
        append(&mut sequence, 0..2900);
        let sparse = all_layers(&mut decoder, &mut sequence, 2899, Attend::Sparse);
        let dense = all_layers(&mut decoder, &mut sequence, 2899, Attend::Dense);
        assert_eq!(sequence.sealed_chunks(), 0);
        assert_eq!(daemon.seal(), 11);
        daemon.refresh(&mut sequence);
        assert_eq!(sequence.sealed_chunks(), 11);
        assert_eq!(all_layers(&mut decoder, &mut sequence, 2899, Attend::Sparse), sparse, "{kind}");
        assert_eq!(all_layers(&mut decoder, &mut sequence, 2899, Attend::Dense), dense, "{kind}");
        assert_ne!(sparse[0], dense[0], "the budget leaves something out");
        assert_eq!(sparse[1], dense[1], "window layers are always exact");
    }
}

#[test]
fn everything_in_the_budget_is_dense() {
    for kind in support::device_kinds() {
        let mut decoder = Decoder::new(open(kind, 2).expect("device"));
        let daemon = TestDaemon::new(shape(), Some(calibration(&shape())), 16);
        let mut sequence = daemon.attach(Settings { budget: Budget::Dense, ..SPARSE }, None, 0);
        append(&mut sequence, 0..1500);
        let sparse = all_layers(&mut decoder, &mut sequence, 1499, Attend::Sparse);
        assert_eq!(sparse, all_layers(&mut decoder, &mut sequence, 1499, Attend::Dense));
    }
}

#[test]
fn dense_attention_equals_a_plain_softmax_over_the_rows() {
    for (kind, row_type) in everything() {
        let mut decoder = Decoder::new(open(kind, 2).expect("device"));
        let shape = shape_of(row_type);
        let mut daemon = TestDaemon::new(shape.clone(), None, 4);
        let mut sequence = daemon.attach(SPARSE, None, 0);
        append(&mut sequence, 0..700);
        daemon.seal();
        daemon.refresh(&mut sequence);
        for (layer, first) in [(0, 0), (1, 400), (2, 0)] {
            let output = step(&mut decoder, &mut sequence, layer, 699, Attend::Dense);
            let expected = plain_attention(&shape, layer, first, 699);
            for (given, expected) in output.iter().zip(&expected) {
                assert!((given - expected).abs() < 2e-3, "{kind}, layer {layer}: {given} instead of {expected}");
            }
        }
    }
}

/// Every device with every type of rows.
fn everything() -> Vec<(DeviceKind, RowType)> {
    device_kinds().into_iter().flat_map(|kind| ROW_TYPES.map(|row_type| (kind, row_type))).collect()
}

fn plain_attention(shape: &ModelShape, layer: usize, first: usize, position: usize) -> Vec<f32> {
    let heads = usize::from(shape.layers[layer].query_heads);
    let stored = |lane: usize, row: usize, element: usize| stored(shape, layer, lane, row, element).1;
    let mut output = Vec::new();
    for head in 0..heads {
        let lane = head / 2;
        let query = |channel: usize| f64::from(value(90 + layer, head, position, channel));
        let scores: Vec<f64> =
            (first..=position).map(|row| (0..64).map(|c| query(c) * stored(lane, row, c)).sum::<f64>() * 0.125).collect();
        let total: f64 = scores.iter().map(|score| score.exp()).sum();
        for channel in 0..64 {
            let sum: f64 = scores.iter().zip(first..).map(|(score, row)| score.exp() * stored(lane, row, 64 + channel)).sum();
            output.push((sum / total) as f32);
        }
    }
    output
}

#[test]
fn workers_with_half_of_the_lanes_each_give_the_whole() {
    for (kind, row_type) in everything() {
        let mut shape = shape_of(row_type).as_ref().clone();
        let calibration = calibration(&shape);
        shape.layers[1].kv_heads = 2;
        set_scales(&mut shape);
        let daemon = TestDaemon::new(shape.into(), Some(calibration), 16);
        let mut whole = daemon.attach(SPARSE, None, 0);
        let mut halves = [daemon.attach(SPARSE, Some(0..1), 1), daemon.attach(SPARSE, Some(1..2), 2)];
        append(&mut whole, 0..1300);
        let mut decoder = Decoder::new(open(kind, 1).expect("device"));
        for half in &mut halves {
            append(half, 0..1300);
        }
        for layer in 0..3 {
            let all = step(&mut decoder, &mut whole, layer, 1299, Attend::Sparse);
            let heads = whole.part(layer).geometry.heads.query_heads();
            let [low, high] = halves.each_mut().map(|half| step(&mut decoder, half, layer, 1299, Attend::Sparse));
            let values = heads / 2 * 64;
            assert_eq!(all[..heads * 64], [&low[..values], &high[..values]].concat(), "{kind}, {row_type:?}");
            assert_eq!(all[heads * 64..], [&low[values..], &high[values..]].concat(), "{kind}, {row_type:?}");
        }
    }
}

#[test]
fn full_open_slots_refuse_until_the_daemon_has_sealed() {
    let mut daemon = TestDaemon::new(shape(), None, 3);
    let mut sequence = daemon.attach(SPARSE, None, 0);
    append(&mut sequence, 0..3 * 256);
    assert_eq!(sequence.tokens_until_full(), 0);
    let row = rows(&shape(), 0, 0..2, 768..769);
    let refused = sequence.append(0, 768, &row).expect_err("no place");
    assert!(matches!(refused, SequenceError::OpenSlotsFull { full_at: 768, sealed_tokens: 0, wanted: 769 }), "{refused}");
    daemon.seal();
    daemon.refresh(&mut sequence);
    append(&mut sequence, 768..3 * 256 + 700);
}

#[test]
fn bad_input_is_refused_and_changes_nothing() {
    let mut decoder = Decoder::new(open(DeviceKind::Cpu, 1).expect("device"));
    let daemon = TestDaemon::new(shape(), None, 4);
    let mut sequence = daemon.attach(SPARSE, None, 0);
    append(&mut sequence, 0..10);
    let row = rows(&shape(), 0, 0..2, 10..11);
    let refusals = [
        sequence.append(0, 11, &row).expect_err("gap").to_string(),
        sequence.append(0, 9, &row).expect_err("overlap").to_string(),
        sequence.append(3, 10, &row).expect_err("layer").to_string(),
        sequence.append(0, 10, &row[1..]).expect_err("bytes").to_string(),
        sequence.write_tokens(12, &[1]).expect_err("token gap").to_string(),
    ];
    assert_eq!(refusals[0], "first_position: 11, but the next row of layer 0 is 10");
    assert_eq!(refusals[2], "layer: 3 is outside 0 to 2");
    assert_eq!(refusals[3], "rows: 511 bytes, a positive multiple of 512 expected");
    let mut broken = row.clone();
    broken[300..302].copy_from_slice(&half::f16::NAN.to_le_bytes());
    let refused = sequence.append(0, 10, &broken).expect_err("not finite");
    assert!(matches!(refused, SequenceError::NotFinite { layer: 0, element: 150 }), "{refused}");
    let fp8_shape = shape_of(RowType::Fp8);
    let fp8_daemon = TestDaemon::new(fp8_shape.clone(), None, 4);
    let mut fp8 = fp8_daemon.attach(SPARSE, None, 0);
    let mut broken = rows(&fp8_shape, 0, 0..2, 0..1);
    broken[150] = 0xFF;
    let refused = fp8.append(0, 0, &broken).expect_err("not a number");
    assert!(matches!(refused, SequenceError::NotFinite { layer: 0, element: 150 }), "{refused}");
    let queries = vec![1.0; 256];
    let (mut output, mut lse) = (vec![0.0; 256], vec![0.0; 4]);
    let sequence_ref = &mut sequence;
    let mut request = StepRequest {
        sequence: sequence_ref,
        first_position: 10,
        queries: &queries,
        attend: Attend::Sparse,
        output: &mut output,
        lse: &mut lse,
    };
    let refused = decoder.step_one(0, &mut request).expect_err("no row yet");
    assert!(matches!(refused, StepError::NotWritten { layer: 0, end: 11, written: 10 }), "{refused}");
    append(&mut sequence, 10..20);
}

#[test]
fn rows_of_a_step_are_the_rows_that_were_stored() {
    for kind in support::device_kinds() {
        let mut decoder = Decoder::new(open(kind, 2).expect("device"));
        let mut daemon = TestDaemon::new(shape(), Some(calibration(&shape())), 6);
        let mut sequence = daemon.attach(SPARSE, None, 0);
        append(&mut sequence, 0..1400);
        daemon.seal();
        daemon.refresh(&mut sequence);
        let query: Vec<f32> = (0..256).map(|index| value(7, index / 64, 3, index % 64)).collect();
        let lanes = decoder.rows(0, &mut sequence, 1399, &query).expect("rows");
        assert_eq!(lanes.len(), 2);
        for (lane, picked) in lanes.iter().enumerate() {
            let horizon = SPARSE.horizon(1400);
            assert_eq!(picked.positions.len(), SPARSE.selected_tokens(1400) + 1400 - horizon);
            assert!(picked.positions.is_sorted() && picked.positions[..4] == [0, 1, 2, 3]);
            for (index, &position) in picked.positions.iter().enumerate() {
                let stored = rows(&shape(), 0, lane..lane + 1, position as usize..position as usize + 1);
                assert_eq!(picked.rows[index * 256..(index + 1) * 256], stored);
            }
        }
    }
}

#[test]
fn opaque_state_survives_whole() {
    let daemon = TestDaemon::new(shape(), None, 2);
    let sequence = daemon.attach(SPARSE, None, 0);
    assert_eq!(daemon.open.opaque().expect("read"), None);
    for state in [&b"first"[..], b"second, longer", b""] {
        sequence.open().store_opaque(state).expect("store");
        assert_eq!(daemon.open.opaque().expect("read").as_deref(), Some(state));
    }
    assert!(sequence.open().store_opaque(&[0; 5000]).is_err());
}

#[test]
fn truncation_forgets_what_follows() {
    let daemon = TestDaemon::new(shape(), None, 8);
    let mut sequence = daemon.attach(SPARSE, None, 0);
    append(&mut sequence, 0..900);
    sequence.begin_truncate(300).expect("truncate");
    assert_eq!(daemon.open.words().expect("words").committed[0], 300);
    sequence.abort_truncate();
    assert_eq!(daemon.open.words().expect("words").committed[0], 900);
    sequence.begin_truncate(300).expect("truncate");
    sequence.truncated(300);
    assert_eq!((sequence.committed(), sequence.written(2)), (300, 300));
    append(&mut sequence, 300..310);
    assert!(matches!(sequence.begin_truncate(311), Err(SequenceError::Bound(Bound { value: 311, high: 310, .. }))));
}

#[test]
fn hot_rows_never_change_a_result() {
    for (kind, row_type) in everything() {
        let mut decoder = Decoder::new(open(kind, 2).expect("device"));
        let shape = shape_of(row_type);
        let mut daemon = TestDaemon::new(shape.clone(), Some(calibration(&shape)), 6);
        let mut sequence = daemon.attach(SPARSE, None, 0);
        append(&mut sequence, 0..1500);
        daemon.seal();
        daemon.refresh(&mut sequence);
        let cold: Vec<_> = (1400..1410).map(|at| step(&mut decoder, &mut sequence, 0, at, Attend::Sparse)).collect();
        sequence.set_hot_rows(120);
        for (at, cold) in (1400..1410).zip(&cold) {
            assert_eq!(&step(&mut decoder, &mut sequence, 0, at, Attend::Sparse), cold, "{kind} at {at}");
        }
        let repeated = report(&mut decoder, &mut sequence, 0, 1409, Attend::Sparse);
        assert_eq!(repeated.selected_rows, 2 * SPARSE.selected_tokens(1410) as u64);
        assert_eq!(repeated.hot_rows, repeated.selected_rows, "{kind}: the same step again finds everything");
        let other = report(&mut decoder, &mut sequence, 0, 1300, Attend::Sparse);
        assert!(other.hot_rows < other.selected_rows, "{kind}: another query does not");
        assert_eq!(report(&mut decoder, &mut sequence, 1, 1409, Attend::Sparse).selected_rows, 0, "window layers have none");
    }
}

#[test]
fn window_rows_that_were_taken_away_are_refused_even_by_an_old_holder() {
    let mut decoder = Decoder::new(open(DeviceKind::Cpu, 1).expect("device"));
    let mut daemon = TestDaemon::new(shape(), None, 16);
    let mut sequence = daemon.attach(SPARSE, None, 0);
    append(&mut sequence, 0..1500);
    daemon.seal();
    daemon.refresh(&mut sequence);
    let before = step(&mut decoder, &mut sequence, 1, 700, Attend::Dense);
    let slot = daemon.board.slot(SlotClass::Window, 1).expect("the window slot of chunk 1");
    daemon.board.set_slot(SlotClass::Window, 1, None);
    let queries = vec![0.5; 128];
    let (mut output, mut lse) = (vec![0.0; 128], vec![0.0; 2]);
    let attend = Attend::Dense;
    let mut request =
        StepRequest { sequence: &mut sequence, first_position: 700, queries: &queries, attend, output: &mut output, lse: &mut lse };
    let refused = decoder.step_one(1, &mut request).expect_err("the window of token 700 reaches into chunk 1");
    assert!(matches!(refused, StepError::Sequence(SequenceError::WindowGone { layer: 1, chunk: 1 })), "{refused}");
    // Later tokens do not need it, and a daemon that has the rows again may give them back.
    step(&mut decoder, &mut sequence, 1, 1400, Attend::Dense);
    daemon.board.set_slot(SlotClass::Window, 1, Some(slot));
    assert_eq!(step(&mut decoder, &mut sequence, 1, 700, Attend::Dense), before);
}

#[test]
fn a_sparse_step_equals_a_plain_softmax_over_the_rows_it_names() {
    for (kind, row_type) in everything() {
        let mut decoder = Decoder::new(open(kind, 2).expect("device"));
        let shape = shape_of(row_type);
        let daemon = TestDaemon::new(shape.clone(), Some(calibration(&shape)), 8);
        let mut sequence = daemon.attach(SPARSE, None, 0);
        append(&mut sequence, 0..1400);
        let query: Vec<f32> = (0..256).map(|index| value(90, index / 64, 1399, index % 64)).collect();
        let named = decoder.rows(0, &mut sequence, 1399, &query).expect("rows");
        let output = step(&mut decoder, &mut sequence, 0, 1399, Attend::Sparse);
        for head in 0..4 {
            let positions: Vec<usize> = named[head / 2].positions.iter().map(|&position| position as usize).collect();
            assert_eq!(positions.last(), Some(&1399), "the newest row is always attended");
            let expected = plain_head(&shape, head, 1399, &positions);
            for (given, expected) in output[head * 64..(head + 1) * 64].iter().zip(&expected) {
                assert!((given - expected).abs() < 5e-4, "{kind}, head {head}: {given} instead of {expected}");
            }
        }
    }
}

/// A query head of layer 0.
fn plain_head(shape: &ModelShape, head: usize, position: usize, rows: &[usize]) -> Vec<f32> {
    let stored = |row: usize, element: usize| stored(shape, 0, head / 2, row, element).1;
    let query = |channel: usize| f64::from(value(90, head, position, channel));
    let scores: Vec<f64> = rows.iter().map(|&row| (0..64).map(|c| query(c) * stored(row, c)).sum::<f64>() * 0.125).collect();
    let total: f64 = scores.iter().map(|score| score.exp()).sum();
    let sum = |channel: usize| scores.iter().zip(rows).map(|(score, &row)| score.exp() * stored(row, 64 + channel)).sum::<f64>();
    (0..64).map(|channel| (sum(channel) / total) as f32).collect()
}

/// What a device keeps between steps, in whatever order things happened, gives the bits of a device that keeps nothing.
#[test]
fn state_that_outlives_a_step_never_changes_a_bit() {
    for kind in support::device_kinds() {
        for seed in 0..3 {
            let mut rng = StdRng::seed_from_u64(seed);
            let mut decoder = Decoder::new(open(kind, 2).expect("device"));
            let mut daemon = TestDaemon::new(shape(), Some(calibration(&shape())), 5);
            let mut sequence = daemon.attach(SPARSE, None, 0);
            append(&mut sequence, 0..700);
            let (mut steps, mut hot) = (0, 0);
            while steps < 60 {
                let committed = sequence.committed();
                match rng.random_range(0..10) {
                    0 => {
                        let count = rng.random_range(1..300).min(sequence.tokens_until_full());
                        if count > 0 && committed + count < 7000 {
                            append(&mut sequence, committed..committed + count);
                        }
                    }
                    1 => {
                        daemon.seal();
                        daemon.refresh(&mut sequence);
                    }
                    2 => {
                        let position = rng.random_range(sequence.sealed_chunks() * 256..=committed).max(600);
                        if position < committed {
                            sequence.begin_truncate(position).expect("truncate");
                            sequence.truncated(position);
                            daemon.refresh(&mut sequence);
                        }
                    }
                    _ => {
                        if sequence.tokens_until_full() > 0 && committed < 7000 {
                            append(&mut sequence, committed..committed + 1);
                        }
                        let position = sequence.committed() - 1 - if rng.random_bool(0.2) { rng.random_range(0..400) } else { 0 };
                        let attend = if rng.random_bool(0.2) { Attend::Dense } else { Attend::Sparse };
                        for layer in 0..3 {
                            let (kept, costs) = stepped(&mut decoder, &mut sequence, layer, position, attend);
                            hot += costs.hot_rows;
                            if rng.random_bool(0.2) {
                                // Whatever was kept is dropped.
                                sequence.set_hot_rows([0, 100, 300][rng.random_range(0..3)]);
                                let anew = step(&mut decoder, &mut sequence, layer, position, attend);
                                assert_eq!(kept, anew, "{kind}, seed {seed}: layer {layer} at {position}, {attend:?}");
                            }
                        }
                        steps += 1;
                    }
                }
            }
            assert!(hot > 0, "{kind}: some rows were hot");
        }
    }
}

#[test]
fn a_device_without_room_refuses_and_nothing_changes() {
    for kind in device_kinds() {
        let limits = DeviceLimits { device_bytes: 1 << 20, hot_rows: 0 };
        let mut small = Decoder::new(open(kind, 2).expect("device")).with_limits(limits);
        let mut large = Decoder::new(open(kind, 2).expect("device"));
        let daemon = TestDaemon::new(shape(), Some(calibration(&shape())), 16);
        let mut sequence = daemon.attach(SPARSE, None, 0);
        append(&mut sequence, 0..1500);
        if matches!(kind, DeviceKind::Cuda { .. }) {
            let queries = vec![0.5; 256];
            let (mut output, mut lse) = (vec![0.0; 256], vec![0.0; 4]);
            let (sequence, attend) = (&mut sequence, Attend::Sparse);
            let mut request = StepRequest { sequence, first_position: 1499, queries: &queries, attend, output: &mut output, lse: &mut lse };
            let refused = small.step_one(0, &mut request).expect_err("too little memory");
            assert!(matches!(&refused, StepError::Device(error) if error.is_exhausted()), "{refused}");
            assert!(refused.to_string().contains("of 1048576 are in use"), "{refused}");
            assert_eq!(small.device_bytes().total(), 0, "nothing is kept of it");
            step(&mut large, sequence, 0, 1499, Attend::Sparse);
            assert!(large.device_bytes().total() > 1 << 20);
            sequence.forget_device_state();
            large.sweep();
            let left = large.device_bytes();
            assert_eq!(left.total(), left.workspace, "a sequence that is gone holds nothing");
        } else {
            step(&mut small, &mut sequence, 0, 1499, Attend::Sparse);
            assert_eq!(small.device_bytes().total(), 0, "{kind} has no memory of its own");
        }
    }
}
