//! Slots that were freed and used again under an old holder: it may be refused, it must never be shown another's rows.

mod support;

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use sluice_client::{Attach, AttendMode, Client, Model, Session, Step, StepOut};
use sluice_kernels::budget::Settings;
use sluice_kernels::shape::{ModelShape, RowType};
use support::daemon::{Daemon, DaemonOptions};
use support::oracle::dense;
use support::rows::{mix, path_hashes, query_of, token_ids};
use support::{decode, direct, fill, hybrid_shape, options, register, verify_rows};

/// Uses every free slot again and again with rows of other texts.
fn churn(client: &Client, model: &Model, stop: &AtomicBool) -> u64 {
    let mut opened = 0;
    while !stop.load(Ordering::Relaxed) {
        let ids = token_ids(1000 + opened, 600);
        let attach = if opened % 2 == 0 { direct() } else { Attach::Stream };
        let mut session = match client.open(model, &ids, &options(attach, Settings::dense())) {
            Ok(session) => session,
            // The old holder has taken the room: it will let go of some of it.
            Err(error) if error.code() == Some(tonic::Code::ResourceExhausted) => {
                std::thread::sleep(Duration::from_millis(2));
                continue;
            }
            Err(error) => panic!("open: {error}"),
        };
        fill(&mut session, &ids);
        session.close().expect("close");
        opened += 1;
    }
    opened
}

/// Asks the window layer at `position`; answers whether it was refused. What is answered must be right.
fn probe(session: &mut Session, paths: &[u64], position: usize, shape: &ModelShape) -> bool {
    let layer = 1;
    let layer_shape = &shape.layers[layer];
    let queries = query_of(position, layer, layer_shape);
    let mut output = vec![0.0; queries.len()];
    let mut log_sum_exp = vec![0.0; usize::from(layer_shape.query_heads)];
    let step = Step { layer, first_position: position, queries: &queries, rows: None, attend: AttendMode::Dense };
    if session.step(&step, StepOut { output: &mut output, log_sum_exp: &mut log_sum_exp, report: None }).is_err() {
        return true;
    }
    let (expected, expected_lse) = dense(paths, position, layer, shape);
    support::oracle::assert_close(&format!("window at {position} of {}", session.length()), &output, &expected, 2e-5);
    support::oracle::assert_close("log-sum-exp", &log_sum_exp, &expected_lse, 2e-5);
    false
}

#[test]
fn an_old_holder_is_never_shown_a_slot_that_was_used_again() {
    let shape = hybrid_shape(RowType::F16);
    // A dozen chunks: what is not held is shed at once.
    let chunk: usize = shape.layers.iter().map(|layer| layer.lanes() * layer.row_bytes(shape.row_type) * 256).sum();
    let daemon = Daemon::start(DaemonOptions { arena_bytes: 16 * chunk as u64, segment_bytes: 256 << 10, ..DaemonOptions::default() });
    let client = daemon.client();
    let model = register(&client, "stale", &shape);
    let stop = AtomicBool::new(false);
    let ids = token_ids(1, 2000);
    let paths = path_hashes(&ids);
    let mut session = client.open(&model, &[], &options(direct(), Settings::dense())).expect("open");
    let (refused, answered) = std::thread::scope(|scope| {
        let other = scope.spawn(|| churn(&client, &model, &stop));
        let (mut refused, mut answered) = (0, 0);
        for round in 0..40 {
            // Grow past a chunk, then look far back: the daemon has let go of window rows that this session has mapped.
            let end = (session.length() + 150).min(1700);
            fill(&mut session, &ids[..end]);
            for token in 0..3 {
                let length = session.length();
                let decoded = decode(&mut session, &ids, &paths, AttendMode::Dense);
                decoded.unwrap_or_else(|error| panic!("round {round}: token {length}: {error}"));
                let length = session.length();
                for look in 0..8 {
                    let position = mix(round * 100 + token * 10 + look) as usize % length;
                    match probe(&mut session, &paths, position, &shape) {
                        true => refused += 1,
                        false => answered += 1,
                    }
                }
            }
            verify_rows(&mut session, &paths);
            if session.length() > 1500 {
                // Back to a place whose window rows are kept (the daemon names it otherwise), and on from there.
                let position = session.length() - 40;
                session.truncate(position).expect("truncate within the open slots");
            }
            if round % 13 == 12 {
                session.truncate(0).expect("truncate to nothing");
            }
        }
        stop.store(true, Ordering::Relaxed);
        let opened = other.join().expect("the other user of the arena");
        assert!(opened > 10, "only {opened} sequences used slots again");
        (refused, answered)
    });
    println!("{answered} looks back answered rightly, {refused} refused");
    assert!(answered > 100, "{answered} answered");
    session.close().expect("close");
}
