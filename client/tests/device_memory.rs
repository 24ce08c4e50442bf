//! What the daemon's decoder takes of a GPU: told by its metrics, given back, and bounded. On the CPU it takes nothing.

mod support;

use std::time::Duration;

use sluice_client::{Attach, AttendMode, Client, ClientError, Model, Session, Step, StepOut, StepReport};
use sluice_kernels::device::DeviceKind;
use sluice_kernels::label::{Calibration, LabelPlan, LaneCalibration, LayerCalibration};
use sluice_kernels::shape::{LaneKind, ModelShape, RowType};
use support::daemon::{Daemon, DaemonOptions, eventually};
use support::rows::{query_of, selected, token_ids, window};
use support::{bits, device, fill, options, register, sparse_settings};

const KINDS: [&str; 5] = ["labels", "hot_rows", "maps", "newest_rows", "workspace"];
const PATIENCE: Duration = Duration::from_secs(20);

/// Whether a GPU is under test; says so where none is.
fn on_a_gpu() -> bool {
    let asked = device() != DeviceKind::Cpu;
    if !asked {
        eprintln!("NOT COVERED: GPU memory of the daemon's decoder; SLUICE_TEST_DEVICES=cuda asks for it");
    }
    asked
}

fn shape() -> ModelShape {
    ModelShape::unscaled(RowType::F16, vec![selected(4, 2, 64), window(300, 2, 1, 64), selected(2, 1, 64)])
}

/// A model whose full-attention layers are calibrated.
fn calibrated(client: &Client) -> Model {
    let shape = shape();
    let model = register(client, "device memory", &shape);
    let lane = LaneCalibration { order: (0..64).collect(), magnitude: vec![1.0; 64], low: vec![-1.0; 64], high: vec![1.0; 64] };
    let layers = shape.layers.iter().enumerate().filter(|(_, layer)| layer.kind == LaneKind::Selected);
    let layers = layers.map(|(layer, shape)| LayerCalibration { layer: layer as u16, lanes: vec![lane.clone(); shape.lanes()] }).collect();
    let calibration = Calibration { version: 1, plan: LabelPlan::large(64), text_hash: String::new(), seed: 0, tokens: 1, layers };
    assert!(client.set_calibration(&model, &calibration).expect("calibration").accepted);
    model
}

/// A session of a text of its own that the daemon decodes.
fn opened(client: &Client, model: &Model, text: u64) -> Session {
    let ids = token_ids(text, 1500);
    let mut session = client.open(model, &ids, &options(Attach::Stream, sparse_settings())).expect("open");
    fill(&mut session, &ids);
    session
}

/// A step of the last token in every layer: outputs, and what it cost.
fn step(session: &mut Session) -> Result<(Vec<Vec<u32>>, StepReport), ClientError> {
    let (mut outputs, mut costs) = (Vec::new(), StepReport::default());
    let first_position = session.length() - 1;
    for (layer, layer_shape) in shape().layers.iter().enumerate() {
        let queries = query_of(first_position, layer, layer_shape);
        let (mut output, mut log_sum_exp) = (vec![f32::NAN; queries.len()], vec![f32::NAN; usize::from(layer_shape.query_heads)]);
        let step = Step { layer, first_position, queries: &queries, rows: None, attend: AttendMode::Sparse };
        let mut report = StepReport::default();
        session.step(&step, StepOut { output: &mut output, log_sum_exp: &mut log_sum_exp, report: Some(&mut report) })?;
        costs += report;
        outputs.push(bits(&output));
    }
    Ok((outputs, costs))
}

/// Bytes by kind.
fn held(daemon: &Daemon) -> [u64; 5] {
    let metrics = daemon.metrics();
    KINDS.map(|kind| metrics[&format!("sluice_device_memory_bytes{{kind=\"{kind}\"}}")] as u64)
}

/// Waits until the metrics, which follow the decoder a few times a second, say `condition`.
fn reaches(daemon: &Daemon, what: &str, condition: impl Fn([u64; 5]) -> bool) {
    eventually(what, PATIENCE, || condition(held(daemon)));
}

/// Bytes by kind once the metrics have followed what was done before.
fn settled(daemon: &Daemon) -> [u64; 5] {
    std::thread::sleep(Duration::from_millis(600));
    held(daemon)
}

fn sum_of(metric: &str, daemon: &Daemon) -> f64 {
    daemon.metrics()[metric]
}

#[test]
fn memory_goes_up_with_sequences_and_down_with_them() {
    let on_a_gpu = on_a_gpu();
    let daemon = Daemon::start(DaemonOptions::default());
    let client = daemon.client();
    let model = calibrated(&client);
    assert_eq!(held(&daemon), [0; 5], "nothing is taken before a step");
    let mut first = opened(&client, &model, 1);
    let (_, costs) = step(&mut first).expect("a step");
    assert!(costs.selected_rows > 0, "the step was sparse");
    let parts = [costs.score_ns, costs.select_ns, costs.attend_ns];
    let counted = |part: &str| sum_of(&format!("sluice_step_part_seconds_sum{{part=\"{part}\"}}"), &daemon);
    if !on_a_gpu {
        assert!(parts.iter().all(|&part| part > 0) && costs.fused_ns == 0, "the CPU tells the parts of a step apart: {costs:?}");
        assert!(["score", "select", "attend"].iter().all(|part| counted(part) > 0.0) && counted("fused") == 0.0);
        assert_eq!(settled(&daemon), [0; 5], "the CPU has no memory of its own");
        return;
    }
    assert!(costs.fused_ns > 0 && parts == [0; 3], "a GPU does not: {costs:?}");
    assert!(counted("fused") * 1e9 >= costs.fused_ns as f64 && ["score", "select", "gather"].iter().all(|part| counted(part) == 0.0));

    let one = settled(&daemon);
    assert!(one.iter().all(|&bytes| bytes > 0), "{one:?}");
    let mut second = opened(&client, &model, 2);
    step(&mut second).expect("a step");
    // Hot rows, maps and newest rows are a sequence's own; labels come in slabs, and steps share their room, but for small tables.
    let two = settled(&daemon);
    assert_eq!((two[0], two[1], two[2], two[3]), (one[0], 2 * one[1], 2 * one[2], 2 * one[3]), "{one:?}, {two:?}");
    let tables = two[4] - one[4];
    assert!(tables < 4096, "{one:?}, {two:?}");
    second.close().expect("close");
    reaches(&daemon, "memory of one sequence again", |held| held == one);
    first.close().expect("close");
    reaches(&daemon, "the room of steps alone", |held| held == [0, 0, 0, 0, one[4] - tables]);
    let mut again = opened(&client, &model, 3);
    step(&mut again).expect("a step");
    reaches(&daemon, "as much as the first time", |held| held == one);
}

#[test]
fn a_sequence_beyond_the_budget_is_refused_and_changes_nothing() {
    if !on_a_gpu() {
        return;
    }
    let enough = {
        let daemon = Daemon::start(DaemonOptions::default());
        let client = daemon.client();
        let mut session = opened(&client, &calibrated(&client), 1);
        step(&mut session).expect("a step");
        settled(&daemon).iter().sum::<u64>()
    };
    let settings = vec![("decode.device_bytes", (enough + 4096).to_string())];
    let daemon = Daemon::start(DaemonOptions { settings, ..DaemonOptions::default() });
    let client = daemon.client();
    let model = calibrated(&client);
    let mut first = opened(&client, &model, 1);
    let (expected, _) = step(&mut first).expect("room for one");
    let one = settled(&daemon);
    assert_eq!(one.iter().sum::<u64>(), enough, "{one:?}");
    let mut second = opened(&client, &model, 2);
    let refused = step(&mut second).expect_err("no room for two");
    assert_eq!(refused.code().map(i32::from), Some(8), "RESOURCE_EXHAUSTED: {refused}");
    assert!(refused.to_string().contains(&format!("of {} are in use", enough + 4096)), "{refused}");
    assert_eq!(settled(&daemon), one, "nothing is kept of what was refused");
    assert_eq!(step(&mut first).expect("a step").0, expected, "the one that was admitted goes on");
    first.close().expect("close");
    eventually("room for the second", PATIENCE, || step(&mut second).is_ok());
}
