//! Stream and Direct are one decoder over one memory: their results are equal to the bit, and dense ones agree with a naive f64 oracle.

mod support;

use std::time::Duration;

use rustix::process::Signal;
use sluice_client::{Attach, AttendMode, Client, OnlineCalibration, OpenOptions, Session, Step, StepOut, StepReport};
use sluice_kernels::budget::{Budget, Settings};
use sluice_kernels::device::DeviceKind;
use sluice_kernels::label::LabelPlan;
use sluice_kernels::shape::{LaneKind, ModelShape, RowType};
use support::daemon::{Daemon, DaemonOptions};
use support::oracle::{assert_close, dense};
use support::rows::{path_hashes, query_of, rows_of, token_ids};
use support::{
    ask, bits, decode, device, direct, fill, hybrid_shape, options, plain_shape, register, sparse_settings, tolerance, verify_rows,
};

/// Opens with online calibration and fills the prompt by dense steps, which the calibration sees.
fn calibrated(client: &sluice_client::Client, model: &sluice_client::Model, attach: Attach, ids: &[u32]) -> Session {
    let plan = LabelPlan::large(64);
    let calibrate = Some(OnlineCalibration { plan, tokens: 64 });
    let opened = client.open(model, ids, &OpenOptions { calibrate, ..options(attach, sparse_settings()) });
    let mut session = opened.expect("open");
    let paths = path_hashes(ids);
    let shape = session.shape().clone();
    while session.length() < ids.len() {
        let positions = session.length()..ids.len().min(session.length() + 50);
        session.begin(&ids[positions.clone()]).expect("begin");
        for (layer, layer_shape) in shape.layers.iter().enumerate() {
            let queries: Vec<f32> = positions.clone().flat_map(|position| query_of(position, layer, layer_shape)).collect();
            let rows = rows_of(&paths[positions.clone()], layer, &shape);
            let mut output = vec![0.0; queries.len()];
            let mut log_sum_exp = vec![0.0; positions.len() * usize::from(layer_shape.query_heads)];
            let step = Step { layer, first_position: positions.start, queries: &queries, rows: Some(&rows), attend: AttendMode::Dense };
            session.step(&step, StepOut { output: &mut output, log_sum_exp: &mut log_sum_exp, report: None }).expect("step");
        }
    }
    session
}

fn every_answer(session: &mut Session, from: usize) -> Vec<u32> {
    let layers = session.shape().layers.len();
    let mut all = Vec::new();
    for position in (from..session.length()).step_by(17) {
        for layer in 0..layers {
            for attend in [AttendMode::Sparse, AttendMode::Dense] {
                let (output, log_sum_exp) = ask(session, position, layer, attend);
                all.extend(bits(&output));
                all.extend(bits(&log_sum_exp));
            }
        }
    }
    all
}

#[test]
fn stream_and_direct_are_equal_to_the_bit_and_the_daemon_may_be_stopped() {
    let daemon = Daemon::start(DaemonOptions::default());
    let client = daemon.client();
    for row_type in [RowType::F16, RowType::F32, RowType::Bf16, RowType::Fp8] {
        let model = register(&client, &format!("ways {row_type:?}"), &plain_shape(row_type));
        let ids = token_ids(1, 1500);
        let paths = path_hashes(&ids);
        let mut stream = calibrated(&client, &model, Attach::Stream, &ids[..1400]);
        stream.wait_sealed(1280, Duration::from_secs(20)).expect("sealed");
        let mut direct = client.open(&model, &ids[..1400], &options(direct(), sparse_settings())).expect("open");
        assert_eq!(direct.matched_tokens() / 256, 5, "chunks of the prompt that were sealed");
        fill(&mut direct, &ids[..1400]);
        let streamed: Vec<Vec<u32>> =
            (1400..1500).map(|_| bits(&decode(&mut stream, &ids, &paths, AttendMode::Sparse).expect("stream"))).collect();
        // All that the direct session does from here on, it does without the daemon.
        daemon.signal(Signal::STOP);
        let directly: Vec<Vec<u32>> =
            (1400..1500).map(|_| bits(&decode(&mut direct, &ids, &paths, AttendMode::Sparse).expect("direct"))).collect();
        let answers = every_answer(&mut direct, 1100);
        let verified = verify_rows(&mut direct, &paths);
        daemon.signal(Signal::CONT);
        assert_eq!(streamed, directly);
        assert_eq!(every_answer(&mut stream, 1100), answers);
        // The selection is a real one: far fewer rows than there are, and the right ones.
        let all = 1500 * 3;
        assert!(verified > 3 * 64 && verified < all / 3, "{verified} rows of {all} attended");
        stream.close().expect("close");
        direct.close().expect("close");
    }
}

#[test]
fn dense_and_k_of_everything_agree_with_the_oracle() {
    let daemon = Daemon::start(DaemonOptions::default());
    let client = daemon.client();
    for row_type in [RowType::F16, RowType::Fp8] {
        agrees_with_the_oracle(&client, &hybrid_shape(row_type));
    }
}

fn agrees_with_the_oracle(client: &Client, shape: &ModelShape) {
    let model = register(client, &format!("oracle {:?}", shape.row_type), shape);
    let ids = token_ids(2, 700);
    let paths = path_hashes(&ids);
    let everything =
        Settings { budget: Budget::Ratio { numerator: 1, denominator: 1, floor_tokens: 0, cap_tokens: 0 }, ..sparse_settings() };
    let mut made = calibrated(client, &model, Attach::Stream, &ids);
    for attach in [Attach::Stream, direct()] {
        let mut session = client.open(&model, &ids, &options(attach, everything)).expect("open");
        fill(&mut session, &ids);
        for position in [0, 63, 255, 256, 300, 511, 512, 699] {
            for layer in 0..shape.layers.len() {
                // Rows of a window are kept near the end of the sequence only.
                if matches!(shape.layers[layer].kind, LaneKind::Window { .. }) && position < 600 {
                    continue;
                }
                let (expected, expected_lse) = dense(&paths, position, layer, shape);
                for attend in [AttendMode::Sparse, AttendMode::Dense] {
                    let (output, log_sum_exp) = ask(&mut session, position, layer, attend);
                    assert_close(&format!("{attach:?} {attend:?} output of layer {layer} at {position}"), &output, &expected, tolerance());
                    assert_close("log-sum-exp", &log_sum_exp, &expected_lse, tolerance());
                }
            }
        }
        assert_eq!(verify_rows(&mut session, &paths), 700 * 4, "k of everything attends every row");
        session.close().expect("close");
    }
    made.wait_sealed(512, Duration::from_secs(10)).expect("sealed");
    made.close().expect("close");
}

#[test]
fn a_warm_session_finds_the_rows_of_its_first_step() {
    let daemon = Daemon::start(DaemonOptions::default());
    let client = daemon.client();
    let model = register(&client, "warm", &plain_shape(RowType::F16));
    let ids = token_ids(5, 1400);
    let made = calibrated(&client, &model, Attach::Stream, &ids);
    let mut session = client.open(&model, &ids, &OpenOptions { hot_rows: 300, ..options(direct(), sparse_settings()) }).expect("open");
    fill(&mut session, &ids);
    let step = |session: &mut Session, layer: usize, positions: std::ops::Range<usize>, attend: AttendMode| {
        let layer_shape = session.shape().layers[layer];
        let queries: Vec<f32> = positions.clone().flat_map(|position| query_of(position, layer, &layer_shape)).collect();
        let mut output = vec![0.0; queries.len()];
        let mut log_sum_exp = vec![0.0; positions.len() * usize::from(layer_shape.query_heads)];
        let mut report = StepReport::default();
        let step = Step { layer, first_position: positions.start, queries: &queries, rows: None, attend };
        let out = StepOut { output: &mut output, log_sum_exp: &mut log_sum_exp, report: Some(&mut report) };
        session.step(&step, out).expect("step");
        report
    };
    for layer in 0..2 {
        step(&mut session, layer, 1380..1400, AttendMode::Dense);
    }
    assert!(session.warm_up().expect("warm") > 0, "rows are fetched");
    for layer in 0..2 {
        let report = step(&mut session, layer, 1399..1400, AttendMode::Sparse);
        assert!(report.selected_rows > 0 && report.hot_rows == report.selected_rows, "{report:?}");
        // A GPU does not tell the parts of a step apart.
        let is_fused = device() != DeviceKind::Cpu;
        assert!((report.fused_ns > 0) == is_fused && (report.score_ns > 0) != is_fused, "{report:?}");
    }
    assert_eq!(session.warm_up().expect("nothing to do"), 0);
    session.close().expect("close");
    made.close().expect("close");
}
