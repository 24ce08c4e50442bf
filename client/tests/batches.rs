//! Batches of sessions of both ways: every session gets what it gets alone.

mod support;

use sluice_client::{Attach, AttendMode, BatchStep, Client, Model, OnlineCalibration, OpenOptions, Session, Step, StepOut};
use sluice_kernels::label::LabelPlan;
use sluice_kernels::shape::RowType;
use support::daemon::{Daemon, DaemonOptions};
use support::rows::{path_hashes, query_of, rows_of, token_ids};
use support::{ask, bits, decode, direct, fill, hybrid_shape, options, plain_shape, register, sparse_settings};

#[test]
fn a_batch_gives_what_its_steps_give_alone() {
    let daemon = Daemon::start(DaemonOptions::default());
    let client = daemon.client();
    let shape = plain_shape(RowType::F32);
    let model = register(&client, "batch", &shape);
    let mut sessions = Vec::new();
    for (index, attach) in [Attach::Stream, direct(), Attach::Stream, Attach::Stream, direct(), direct()].into_iter().enumerate() {
        let ids = token_ids(100 + index as u64, 150 + 200 * index);
        let mut session = client.open(&model, &ids, &options(attach, sparse_settings())).expect("open");
        fill(&mut session, &ids);
        sessions.push(session);
    }
    let layer = 1;
    let layer_shape = shape.layers[layer];
    let alone: Vec<_> = sessions.iter_mut().map(|session| ask(session, session.length() - 1, layer, AttendMode::Sparse)).collect();
    let queries: Vec<Vec<f32>> = sessions.iter().map(|session| query_of(session.length() - 1, layer, &layer_shape)).collect();
    let mut outputs = vec![(vec![0.0; queries[0].len()], vec![0.0; usize::from(layer_shape.query_heads)]); sessions.len()];
    let parts = sessions.iter_mut().zip(&queries).zip(&mut outputs);
    let mut batch: Vec<BatchStep<'_>> = parts
        .map(|((session, queries), (output, log_sum_exp))| {
            let first_position = session.length() - 1;
            let step = Step { layer, first_position, queries, rows: None, attend: AttendMode::Sparse };
            BatchStep { session, step, out: StepOut { output, log_sum_exp, report: None } }
        })
        .collect();
    // Two ask for a token that they do not have: they alone are refused.
    batch[2].step.first_position += 1;
    batch[4].step.first_position += 1;
    let results = client.step_batch(&mut batch);
    assert_eq!(results.iter().map(Result::is_ok).collect::<Vec<_>>(), [true, true, false, true, false, true]);
    for index in [0, 1, 3, 5] {
        assert_eq!(bits(&outputs[index].0), bits(&alone[index].0), "output of {index}");
        assert_eq!(bits(&outputs[index].1), bits(&alone[index].1), "log-sum-exp of {index}");
    }
}

/// One session of its own text.
fn filled(client: &Client, model: &Model, text: u64, tokens: usize, attach: Attach) -> (Session, Vec<u32>) {
    let ids = token_ids(text, tokens + 8);
    let mut session = client.open(model, &ids[..tokens], &options(attach, sparse_settings())).expect("open");
    fill(&mut session, &ids[..tokens]);
    (session, ids)
}

/// Makes the model's calibration known, by a session that sees queries.
fn calibrate(client: &Client, model: &Model) {
    let plan = LabelPlan::large(64);
    let calibrate = Some(OnlineCalibration { plan, tokens: 64 });
    let ids = token_ids(7, 80);
    let paths = path_hashes(&ids);
    let open = OpenOptions { calibrate, ..options(Attach::Stream, sparse_settings()) };
    let mut session = client.open(model, &ids, &open).expect("open");
    while session.length() < ids.len() {
        decode(&mut session, &ids, &paths, AttendMode::Dense).expect("a dense step");
    }
    session.close().expect("close");
}

/// Decodes one token of every session, all sessions together, layer after layer; outputs of all layers by session.
fn decode_together(client: &Client, sessions: &mut [(Session, Vec<u32>)]) -> Vec<Vec<f32>> {
    let shape = sessions[0].0.shape().clone();
    let paths: Vec<Vec<u64>> = sessions.iter().map(|(_, ids)| path_hashes(ids)).collect();
    for (session, ids) in &mut *sessions {
        let next = session.length();
        session.begin(&ids[next..next + 1]).expect("begin");
    }
    let mut all = vec![Vec::new(); sessions.len()];
    for (layer, layer_shape) in shape.layers.iter().enumerate() {
        let positions: Vec<usize> = sessions.iter().map(|(session, _)| session.length()).collect();
        let queries: Vec<Vec<f32>> = positions.iter().map(|&position| query_of(position, layer, layer_shape)).collect();
        let row = |(paths, &position): (&Vec<u64>, &usize)| rows_of(&paths[position..position + 1], layer, &shape);
        let rows: Vec<Vec<u8>> = paths.iter().zip(&positions).map(row).collect();
        let heads = usize::from(layer_shape.query_heads);
        let mut outs = vec![(vec![f32::NAN; queries[0].len()], vec![f32::NAN; heads]); sessions.len()];
        let mut batch = Vec::new();
        for (index, ((session, _), (output, log_sum_exp))) in sessions.iter_mut().zip(&mut outs).enumerate() {
            let (queries, rows) = (&queries[index], Some(&rows[index][..]));
            let step = Step { layer, first_position: positions[index], queries, rows, attend: AttendMode::Sparse };
            batch.push(BatchStep { session, step, out: StepOut { output, log_sum_exp, report: None } });
        }
        for result in client.step_batch(&mut batch) {
            result.expect("a step");
        }
        for (all, (output, log_sum_exp)) in all.iter_mut().zip(outs) {
            all.extend(output);
            all.extend(log_sum_exp);
        }
    }
    all
}

#[test]
fn tokens_that_are_decoded_together_are_those_decoded_alone() {
    let daemon = Daemon::start(DaemonOptions::default());
    let client = daemon.client();
    for shape in [plain_shape(RowType::F16), hybrid_shape(RowType::Fp8)] {
        let model = register(&client, &format!("together {:?}", shape.row_type), &shape);
        calibrate(&client, &model);
        let ways = || [direct(), Attach::Stream, direct(), direct(), Attach::Stream, Attach::Stream];
        let lengths = [700, 900, 40, 1000, 650, 300];
        let open =
            || ways().into_iter().zip(lengths).zip(20..).map(|((attach, tokens), text)| filled(&client, &model, text, tokens, attach));
        let mut together: Vec<_> = open().collect();
        let mut alone: Vec<_> = open().collect();
        for token in 0..5 {
            let outputs = decode_together(&client, &mut together);
            for (index, (session, ids)) in alone.iter_mut().enumerate() {
                let expected = decode(session, ids, &path_hashes(ids), AttendMode::Sparse).expect("a step alone");
                assert_eq!(bits(&outputs[index]), bits(&expected), "token {token} of session {index}, {:?}", shape.row_type);
            }
        }
        for (session, _) in together.into_iter().chain(alone) {
            session.close().expect("close");
        }
    }
}
