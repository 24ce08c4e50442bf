//! Two worker processes with half of the lanes each on one lease: together they are one worker with all lanes, to the bit.

mod support;

use std::collections::BTreeMap;
use std::io::{BufRead as _, BufReader, Write as _};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::Duration;

use sluice_client::{Attach, AttendMode, Client, Model, OpenOptions, Session, Step, StepOut};
use sluice_kernels::device::DeviceKind;
use sluice_kernels::label::{Calibration, LabelPlan, LaneCalibration, LayerCalibration};
use sluice_kernels::shape::LaneKind;
use sluice_proto::v1::{SequenceInfo, SequenceState};
use support::daemon::{Daemon, DaemonOptions, eventually, target_folder};
use support::rows::{path_hashes, query_of, rows_of, token_ids};
use support::{device, device_free_bytes, direct, lane_shape, options, register, sparse_settings, verify_rows};

/// Outputs and log-sum-exps as hexadecimal digits, by position and layer.
type Outputs = BTreeMap<(usize, usize), (String, String)>;

struct Worker {
    child: Child,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
    sequence: u64,
    generation: u64,
    length: usize,
}

impl Worker {
    /// Starts a worker of `lanes` that opens a sequence, or joins the one of another worker.
    fn start(daemon: &Daemon, lanes: [u16; 2], lease: Option<(u64, u64)>) -> Self {
        let mut command = Command::new(target_folder().join("examples/lane_worker"));
        let (sequence, generation) = lease.unwrap_or((0, 0));
        command.arg(daemon.socket()).arg("shared").args(lanes.map(|lane| lane.to_string()));
        command.args([sequence.to_string(), generation.to_string()]);
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().expect("start of the worker");
        let (input, output) = (child.stdin.take().expect("input"), child.stdout.take().expect("output"));
        let mut worker = Self { child, input, output: BufReader::new(output), sequence, generation, length: 0 };
        let ready = worker.line();
        let words: Vec<u64> = ready.strip_prefix("ready ").expect("ready").split(' ').map(|word| word.parse().expect("a number")).collect();
        (worker.sequence, worker.generation, worker.length) = (words[0], words[1], words[2] as usize);
        worker
    }

    fn line(&mut self) -> String {
        let mut line = String::new();
        self.output.read_line(&mut line).expect("a line of the worker");
        line.trim_end().to_owned()
    }

    fn order(&mut self, order: &str) {
        writeln!(self.input, "{order}").expect("the worker listens");
    }

    /// The answer to an order: outputs, and the line after them.
    fn answer(&mut self) -> (Outputs, String) {
        let mut outputs = Outputs::new();
        loop {
            let line = self.line();
            let words: Vec<&str> = line.split(' ').collect();
            let ["out", position, layer, output, lse] = words[..] else { return (outputs, line) };
            let number = |word: &str| word.parse::<usize>().expect("a number");
            outputs.insert((number(position), number(layer)), (output.to_owned(), lse.to_owned()));
        }
    }

    fn ask(&mut self, order: &str) -> String {
        self.order(order);
        self.answer().1
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Both do the same at the same time; answers their outputs joined by lanes.
fn both(low: &mut Worker, high: &mut Worker, order: &str, expected: &str) -> Outputs {
    low.order(order);
    high.order(order);
    let ((low, low_end), (high, high_end)) = (low.answer(), high.answer());
    assert_eq!((low_end.as_str(), high_end.as_str()), (expected, expected), "{order}");
    assert!(low.keys().eq(high.keys()));
    low.into_iter().zip(high.into_values()).map(|((at, (output, lse)), high)| (at, (output + &high.0, lse + &high.1))).collect()
}

/// Sparse steps of one session with all lanes, from its length on.
fn alone(session: &mut Session, ids: &[u32]) -> Outputs {
    let (shape, paths) = (lane_shape(), path_hashes(ids));
    let hex = |values: &[f32]| values.iter().map(|value| format!("{:08x}", value.to_bits())).collect::<String>();
    let mut outputs = Outputs::new();
    while session.length() < ids.len() {
        let position = session.length();
        session.begin(&ids[position..position + 1]).expect("begin");
        for (layer, layer_shape) in shape.layers.iter().enumerate() {
            let (queries, rows) = (query_of(position, layer, layer_shape), rows_of(&paths[position..position + 1], layer, &shape));
            let (mut output, mut lse) = (vec![f32::NAN; queries.len()], vec![f32::NAN; usize::from(layer_shape.query_heads)]);
            let step = Step { layer, first_position: position, queries: &queries, rows: Some(&rows), attend: AttendMode::Sparse };
            session.step(&step, StepOut { output: &mut output, log_sum_exp: &mut lse, report: None }).expect("step");
            outputs.insert((position, layer), (hex(&output), hex(&lse)));
        }
    }
    outputs
}

/// Registers the shape with a calibration that takes the channels in their order.
fn calibrated(client: &Client, name: &str) -> Model {
    let shape = lane_shape();
    let model = register(client, name, &shape);
    let lane = LaneCalibration { order: (0..64).collect(), magnitude: vec![1.0; 64], low: vec![-1.0; 64], high: vec![1.0; 64] };
    let selected = (0..shape.layers.len()).filter(|&layer| shape.layers[layer].kind == LaneKind::Selected);
    let layers = selected.map(|layer| LayerCalibration { layer: layer as u16, lanes: vec![lane.clone(); shape.layers[layer].lanes()] });
    let layers = layers.collect();
    let calibration = Calibration { version: 1, plan: LabelPlan::large(64), text_hash: String::new(), seed: 0, tokens: 1, layers };
    assert!(client.set_calibration(&model, &calibration).expect("calibration").accepted);
    model
}

fn listed(client: &Client, model: &Model, sequence: u64) -> SequenceInfo {
    let all = client.list(Some(model)).expect("list");
    all.into_iter().find(|info| info.sequence_id == sequence).expect("the sequence is listed")
}

fn refused(answer: &str, words: &[&str]) {
    assert!(answer.starts_with("refused FailedPrecondition "), "{answer}");
    assert!(words.iter().all(|word| answer.contains(word)), "{words:?} in {answer}");
}

#[test]
fn two_workers_with_half_of_the_lanes_are_one_with_all_of_them() {
    let daemon = Daemon::start(DaemonOptions::default());
    let client = daemon.client();
    let (shared, whole) = (calibrated(&client, "shared"), calibrated(&client, "whole"));
    let ids = token_ids(1, 1400);
    let mut low = Worker::start(&daemon, [0, 2], None);
    let sequence = low.sequence;
    assert_eq!(low.ask("text 1 0 1400"), "text 1400");

    // Until somebody writes the other lanes, nothing is whole, and whatever needs whole rows says so.
    assert_eq!(low.ask("fill 700"), "length 700");
    refused(&low.ask("fork 600"), &["lanes 2 to 3 have no worker", "first 0 tokens"]);
    refused(&low.ask("truncate 600"), &["lanes 2 to 3 have no worker", "first 0 tokens"]);
    let info = listed(&client, &shared, sequence);
    assert_eq!((info.committed_tokens, info.sealed_tokens), (0, 0));
    let lanes = |lanes| OpenOptions { lanes, ..options(direct(), sparse_settings()) };
    let overlapping = client.join(&shared, sequence, low.generation, &lanes(Some(1..3))).expect_err("lane 1 is taken");
    assert!(overlapping.to_string().contains("first_lane"), "{overlapping}");
    let stale = client.join(&shared, sequence, low.generation + 1, &lanes(Some(2..4))).expect_err("no such generation");
    assert_eq!(stale.code(), Some(tonic::Code::FailedPrecondition), "{stale}");
    client.join(&shared, sequence, low.generation, &lanes(None)).expect_err("a join without lanes");

    let mut high = Worker::start(&daemon, [2, 4], Some((sequence, low.generation)));
    assert_eq!((high.sequence, high.length), (sequence, 0));
    assert_eq!(high.ask("text 1 0 1400"), "text 1400");
    assert_eq!(high.ask("fill 700"), "length 700");
    eventually("two chunks are sealed", Duration::from_secs(10), || listed(&client, &shared, sequence).sealed_tokens == 512);

    let mut reference = client.open(&whole, &[], &options(direct(), sparse_settings())).expect("open");
    support::fill(&mut reference, &ids[..700]);
    let together = both(&mut low, &mut high, "decode 1000", "length 1000");
    assert_eq!(together.len(), 300 * lane_shape().layers.len());
    assert!(together == alone(&mut reference, &ids[..1000]), "outputs differ");

    // One truncates, after the other has given up its tokens; both go on with another text.
    refused(&low.ask("truncate 800"), &["1000 tokens are committed", "every worker lowers"]);
    assert_eq!(high.ask("begin 800"), "length 1000");
    assert!(high.ask("end done").contains("the other worker has not truncated"));
    assert!(high.ask("decode 1001").contains("end_truncate"));
    assert_eq!(low.ask("truncate 800"), "length 800");
    assert_eq!(high.ask("end done"), "length 800");
    reference.truncate(800).expect("truncate");
    let ids = [&ids[..800], &token_ids(2, 1400)[800..]].concat();
    both(&mut low, &mut high, "text 2 800 1400", "text 1400");
    let together = both(&mut low, &mut high, "decode 1300", "length 1300");
    assert!(together == alone(&mut reference, &ids[..1300]), "outputs differ after the truncation");

    // Both die, one of them ahead: what both have written is found again, by a single worker of all lanes.
    assert_eq!(low.ask("decode 1350"), "length 1350");
    let free = device_free_bytes();
    drop(low);
    assert_eq!(listed(&client, &shared, sequence).state(), SequenceState::Held, "one of its workers lives");
    drop(high);
    eventually("the sequence is parked", Duration::from_secs(10), || listed(&client, &shared, sequence).state() == SequenceState::Parked);
    if device() != DeviceKind::Cpu {
        // A context alone takes more than this.
        let given_back = || device_free_bytes() >= free + (200 << 20);
        eventually("the dead hold no memory of the GPU", Duration::from_secs(20), given_back);
    }
    let mut resumed = client.resume(&shared, sequence, &options(direct(), sparse_settings())).expect("resume");
    assert_eq!((resumed.length(), resumed.token_ids()), (1300, &ids[..1300]));
    assert!(verify_rows(&mut resumed, &path_hashes(&ids)) > 0);
    assert!(alone(&mut resumed, &ids) == alone(&mut reference, &ids), "outputs differ after the resume");
    resumed.close().expect("close");
    assert!(client.stats().expect("stats").sequences_held == 1, "only the reference is held");
    client
        .open(&shared, &[], &OpenOptions { lanes: Some(0..2), ..options(Attach::Stream, sparse_settings()) })
        .expect_err("lanes in Stream");
}

#[test]
fn a_worker_that_leaves_is_replaced_and_the_one_that_opened_ends_the_lease() {
    let daemon = Daemon::start(DaemonOptions::default());
    let client = daemon.client();
    let shared = calibrated(&client, "shared");
    let mut low = Worker::start(&daemon, [0, 2], None);
    let lease = (low.sequence, low.generation);
    let mut high = Worker::start(&daemon, [2, 4], Some(lease));
    both(&mut low, &mut high, "text 9 0 900", "text 900");
    both(&mut low, &mut high, "fill 300", "length 300");
    assert_eq!(high.ask("close"), "closed");
    assert_eq!(low.ask("fill 400"), "length 400");
    let mut high = Worker::start(&daemon, [2, 4], Some(lease));
    assert_eq!(high.length, 300, "it goes on where the last worker of its lanes was");
    assert_eq!(high.ask("text 9 0 900"), "text 900");
    both(&mut low, &mut high, "fill 600", "length 600");
    eventually("two chunks are sealed", Duration::from_secs(10), || listed(&client, &shared, lease.0).sealed_tokens == 512);
    assert_eq!(low.ask("close"), "closed");
    assert!(high.ask("fill 700").contains("lease"), "the lease has ended");
    let again = client.open(&shared, &token_ids(9, 900), &options(direct(), sparse_settings())).expect("open");
    assert_eq!(again.matched_tokens(), 512, "the chunks of both are found");
    again.close().expect("close");
}
