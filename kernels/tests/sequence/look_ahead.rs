//! Looking ahead brings rows, and never changes a result.

use sluice_kernels::decoder::{Attend, Decoder, LookAhead, StepError, StepReport};
use sluice_kernels::device::open;
use sluice_kernels::sequence::Sequence;

use crate::support::{TestDaemon, calibration, shape_of};
use crate::{SPARSE, append, everything, query, rows, stepped};

/// What a sequence is told before its steps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Told {
    Nothing,
    TheQuery,
    AnotherQuery,
}

/// Outputs and reports of steps of both full-attention layers, with rows of the step's own token written as late as a model writes them.
fn decode(decoder: &mut Decoder, sequence: &mut Sequence, told: Told) -> (Vec<Vec<f32>>, Vec<(LookAhead, StepReport)>) {
    let shape = sequence.shape().clone();
    let (mut outputs, mut reports) = (Vec::new(), Vec::new());
    for position in 2600..2606 {
        for layer in 0..3 {
            let asked = if told == Told::AnotherQuery { position + 1000 } else { position };
            let ahead = match told {
                Told::TheQuery | Told::AnotherQuery if layer != 1 => decoder
                    .look_ahead(layer, sequence, position, &query(sequence, layer, asked))
                    .expect("rows before the horizon are there"),
                _ => LookAhead::default(),
            };
            let of_token = rows(&shape, layer, sequence.part(layer).lanes, position..position + 1);
            sequence.append(layer, position, &of_token).expect("append");
            let (output, report) = stepped(decoder, sequence, layer, position, Attend::Sparse);
            outputs.push(output);
            if layer != 1 {
                reports.push((ahead, report));
            }
        }
        sequence.write_tokens(position, &[position as u32]).expect("token ids");
        assert_eq!(sequence.commit(), position + 1);
    }
    (outputs, reports)
}

#[test]
fn results_never_change_and_a_right_prediction_leaves_no_misses() {
    for (kind, row_type) in everything() {
        let shape = shape_of(row_type);
        let run = |told: Told| {
            let mut decoder = Decoder::new(open(kind, 2).expect("device"));
            let mut daemon = TestDaemon::new(shape.clone(), Some(calibration(&shape)), 16);
            let mut sequence = daemon.attach(SPARSE, None, 0);
            sequence.set_hot_rows(200);
            append(&mut sequence, 0..2600);
            // Some chunks lie in the arena, with the daemon's labels, others in open slots.
            daemon.seal();
            daemon.refresh(&mut sequence);
            decode(&mut decoder, &mut sequence, told)
        };
        let (expected, alone) = run(Told::Nothing);
        assert!(alone.iter().any(|(_, step)| step.hot_rows < step.selected_rows), "{kind}: steps miss rows");
        for told in [Told::TheQuery, Told::AnotherQuery] {
            let (outputs, reports) = run(told);
            assert!(outputs == expected, "{kind}, {row_type:?}, told {told:?}");
            for (ahead, step) in reports {
                assert_eq!(ahead.predicted_rows, step.selected_rows, "{kind}: as many rows are expected as selected");
                assert!(ahead.fetched_rows <= ahead.predicted_rows);
                if told == Told::TheQuery {
                    assert_eq!(step.hot_rows, step.selected_rows, "{kind}, {row_type:?}: everything is there");
                }
            }
        }
    }
}

#[test]
fn what_looking_ahead_fetches_is_what_the_step_would_have_missed() {
    for (kind, row_type) in everything() {
        let shape = shape_of(row_type);
        let mut decoder = Decoder::new(open(kind, 2).expect("device"));
        let daemon = TestDaemon::new(shape.clone(), Some(calibration(&shape)), 16);
        let mut sequence = daemon.attach(SPARSE, None, 0);
        sequence.set_hot_rows(2600);
        append(&mut sequence, 0..2600);
        let cold = stepped(&mut decoder, &mut sequence, 0, 2599, Attend::Sparse).1;
        assert_eq!(cold.hot_rows, 0, "{kind}");
        let same = query(&sequence, 0, 2599);
        let ahead = decoder.look_ahead(0, &mut sequence, 2599, &same).expect("a prediction");
        assert_eq!(ahead, LookAhead { predicted_rows: cold.selected_rows, fetched_rows: 0 }, "{kind}: the step has brought them");
        let other = query(&sequence, 0, 17);
        let ahead = decoder.look_ahead(0, &mut sequence, 2599, &other).expect("a prediction");
        assert!(ahead.fetched_rows > 0 && ahead.fetched_rows < ahead.predicted_rows, "{kind}: {ahead:?}, some rows are common");
        let again = decoder.look_ahead(0, &mut sequence, 2599, &other).expect("a prediction");
        assert_eq!(again.fetched_rows, 0, "{kind}");
    }
}

#[test]
fn predictions_that_do_not_fit_are_refused() {
    for (kind, row_type) in everything() {
        let shape = shape_of(row_type);
        let mut decoder = Decoder::new(open(kind, 1).expect("device"));
        let daemon = TestDaemon::new(shape.clone(), Some(calibration(&shape)), 16);
        let mut sequence = daemon.attach(SPARSE, None, 0);
        append(&mut sequence, 0..700);
        let mut values = query(&sequence, 0, 699);
        let refused = decoder.look_ahead(1, &mut sequence, 699, &values).expect_err("a window layer");
        assert!(matches!(refused, StepError::NotSelected { layer: 1 }), "{refused}");
        let refused = decoder.look_ahead(0, &mut sequence, 699, &values[1..]).expect_err("a value is missing");
        assert!(matches!(refused, StepError::Length { field: "query", given: 255, expected: 256 }), "{refused}");
        let refused = decoder.look_ahead(0, &mut sequence, 1100, &values).expect_err("rows are missing");
        assert!(matches!(refused, StepError::NotWritten { layer: 0, end: 1024, written: 700 }), "{refused}");
        values[3] = f32::NAN;
        let refused = decoder.look_ahead(0, &mut sequence, 699, &values).expect_err("not finite");
        assert!(matches!(refused, StepError::NotFinite { index: 3 }), "{refused}");
        assert!(matches!(decoder.look_ahead(9, &mut sequence, 699, &[]), Err(StepError::Sequence(_))));
    }
}
