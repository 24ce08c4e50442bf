//! The daemon is killed while it labels what is sealed: afterwards the calibration is in force or it is not, never something between.

mod support;

use std::time::Duration;

use sluice_client::{AttendMode, Client, Model};
use sluice_kernels::label::{Calibration, LabelPlan, LaneCalibration, LayerCalibration};
use sluice_kernels::shape::RowType;
use support::daemon::{Daemon, DaemonOptions};
use support::rows::token_ids;
use support::{ask, bits, direct, fill, options, plain_shape, register, sparse_settings};

const TOKENS: usize = 3000;

fn calibration() -> Calibration {
    let shape = plain_shape(RowType::F16);
    let lane = LaneCalibration { order: (0..64).collect(), magnitude: vec![1.0; 64], low: vec![-1.0; 64], high: vec![1.0; 64] };
    let layer = |layer: usize| LayerCalibration { layer: layer as u16, lanes: vec![lane.clone(); shape.layers[layer].lanes()] };
    let layers = (0..shape.layers.len()).map(layer).collect();
    Calibration { version: 1, plan: LabelPlan::large(64), text_hash: String::new(), seed: 0, tokens: 1, layers }
}

/// Registers a model without a calibration and leaves a prompt of it sealed.
fn sealed(client: &Client, name: &str) -> Model {
    let model = register(client, name, &plain_shape(RowType::F16));
    let ids = token_ids(3, TOKENS);
    let mut session = client.open(&model, &ids, &options(direct(), sparse_settings())).expect("open");
    fill(&mut session, &ids);
    session.wait_sealed(TOKENS, Duration::from_secs(20)).expect("sealed");
    session.close().expect("close");
    model
}

/// What sparse steps over the sealed prompt answer.
fn answers(client: &Client, model: &Model) -> Vec<Vec<u32>> {
    let ids = token_ids(3, TOKENS);
    let mut session = client.open(model, &ids, &options(direct(), sparse_settings())).expect("open");
    assert_eq!(session.matched_tokens(), TOKENS / 256 * 256);
    let positions = (1000..TOKENS / 256 * 256).step_by(333);
    let answers = positions.flat_map(|position| [0, 1].map(|layer| bits(&ask(&mut session, position, layer, AttendMode::Sparse).0)));
    let answers = answers.collect();
    session.close().expect("close");
    answers
}

#[test]
fn a_calibration_is_in_force_or_not_whenever_the_daemon_is_killed() {
    let mut daemon = Daemon::start(DaemonOptions::default());
    let client = daemon.client();
    let calibration = calibration();
    let reference = sealed(&client, "undisturbed");
    let dense = answers(&client, &reference);
    assert!(client.set_calibration(&reference, &calibration).expect("calibration").accepted);
    let expected = answers(&client, &reference);
    assert_ne!(dense, expected, "a calibration makes steps select");
    let mut in_force = 0;
    for micros in [0, 300, 700, 1000, 1500, 2000, 3000, 5000, 8000] {
        let model = sealed(&client, &format!("killed after {micros} us"));
        let setting = {
            let (client, model, calibration) = (client.clone(), model.clone(), calibration.clone());
            std::thread::spawn(move || client.set_calibration(&model, &calibration))
        };
        std::thread::sleep(Duration::from_micros(micros));
        daemon.kill();
        daemon.spawn();
        // What was asked for is asked again by itself, and what is in force is what was asked for.
        let set = setting.join().expect("joined").expect("the calibration is set in the end");
        assert_eq!((set.accepted, &set.calibration), (true, &calibration), "after {micros} us");
        let registered = register(&client, &format!("killed after {micros} us"), &plain_shape(RowType::F16));
        in_force += usize::from(registered.calibrated());
        assert!(answers(&client, &model) == expected, "killed after {micros} us: other answers");
    }
    assert_eq!(in_force, 9, "it stays in force");
}

#[test]
fn without_being_asked_again_a_killed_calibration_leaves_dense_steps_or_selecting_ones() {
    let mut daemon = Daemon::start(DaemonOptions::default());
    let client = daemon.client();
    let calibration = calibration();
    let reference = sealed(&client, "undisturbed");
    let dense = answers(&client, &reference);
    client.set_calibration(&reference, &calibration).expect("calibration");
    let selecting = answers(&client, &reference);
    for micros in [300, 1000, 2000, 4000] {
        let name = format!("killed after {micros} us");
        let model = sealed(&client, &name);
        let impatient = daemon.client_with(sluice_client::ClientConfig { retries_max: 0, ..support::daemon::quick() });
        let setting = {
            let (model, calibration) = (model.clone(), calibration.clone());
            std::thread::spawn(move || impatient.set_calibration(&model, &calibration).is_ok())
        };
        std::thread::sleep(Duration::from_micros(micros));
        daemon.kill();
        let answered = setting.join().expect("joined");
        daemon.spawn();
        drop(daemon.client());
        let calibrated = register(&client, &name, &plain_shape(RowType::F16)).calibrated();
        assert!(calibrated || !answered, "an answered calibration is kept");
        let found = answers(&client, &model);
        assert!(found == if calibrated { selecting.clone() } else { dense.clone() }, "killed after {micros} us, calibrated: {calibrated}");
    }
}
