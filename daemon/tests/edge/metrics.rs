//! Every metric moves when the daemon does what it counts.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use crate::support::{Daemon, PATIENCE, Place};
use sluice_kernels::label::{Calibration, LabelPlan, LaneCalibration, LayerCalibration};
use sluice_kernels::shape::{LaneKind, LayerShape, ModelShape, RowType as RowTypeOfRows};
use sluice_kernels::shared::open::{OpenLayout, OpenSlots};
use sluice_kernels::slot::SlotClass;
use sluice_proto::v1::sluice_client::SluiceClient;
use sluice_proto::v1::{
    Answer, AppendRequest, AttachRequest, AttentionKind, Budget, CloseRequest, DecodeRequest, LayerSpec, LeaseRef, ModelSpec, OpenRequest,
    RegisterModelRequest, RotaryLayout, RowType, SequenceStep, StepSettings,
};
use tokio_stream::StreamExt as _;
use tonic::Code;
use tonic::transport::Channel;

type Client = SluiceClient<Channel>;

const LAYERS: usize = 2;
const QUERY_HEADS: usize = 4;
const LANES: usize = 2;
const HEAD_DIM: usize = 64;
/// f32 keys and values.
const ROW_BYTES: usize = 2 * HEAD_DIM * 4;
const CHUNK: usize = 256;
/// Bytes of a chunk over all layers.
const CHUNK_BYTES: usize = LAYERS * LANES * CHUNK * ROW_BYTES;
/// Room for 16 chunks.
const ARENA: &str = "arena.capacity_bytes=8MiB";

/// The samples of a scrape by name and labels.
async fn scrape(daemon: &Daemon) -> HashMap<String, f64> {
    let text = daemon.http("/metrics").await;
    let (head, body) = text.split_once("\r\n\r\n").expect("a reply");
    assert!(head.starts_with("HTTP/1.1 200") && head.contains("text/plain; version=0.0.4"), "{head}");
    let samples = body.lines().filter(|line| !line.is_empty() && !line.starts_with('#'));
    samples.filter_map(|line| line.rsplit_once(' ')).map(|(name, value)| (name.to_owned(), value.parse().expect("a number"))).collect()
}

/// Waits until `name` is `expected`.
async fn reaches(daemon: &Daemon, name: &str, expected: f64) {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let samples = scrape(daemon).await;
        let value = samples.get(name).copied();
        if value == Some(expected) {
            return;
        }
        assert!(Instant::now() < deadline, "{name} is {value:?}, expected {expected}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

/// Waits until `name` is above `bound`; gives its value.
async fn exceeds(daemon: &Daemon, name: &str, bound: f64) -> f64 {
    let deadline = Instant::now() + PATIENCE;
    loop {
        match scrape(daemon).await.get(name) {
            Some(&value) if value > bound => return value,
            value => assert!(Instant::now() < deadline, "{name} is {value:?}, expected more than {bound}"),
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

fn calibration() -> Vec<u8> {
    let lane = LaneCalibration {
        order: (0..HEAD_DIM as u16).collect(),
        magnitude: vec![1.0; HEAD_DIM],
        low: vec![-1.0; HEAD_DIM],
        high: vec![1.0; HEAD_DIM],
    };
    let layers = (0..LAYERS as u16).map(|layer| LayerCalibration { layer, lanes: vec![lane.clone(); LANES] }).collect();
    let plan = LabelPlan::small(HEAD_DIM as u16);
    serde_json::to_vec(&Calibration { version: 1, plan, text_hash: String::new(), seed: 0, tokens: 1, layers }).expect("JSON")
}

fn layer_spec(attention: AttentionKind) -> LayerSpec {
    LayerSpec {
        attention: attention.into(),
        query_heads: QUERY_HEADS as u32,
        kv_heads: LANES as u32,
        head_dim: HEAD_DIM as u32,
        ..LayerSpec::default()
    }
}

fn registration(attention: AttentionKind) -> RegisterModelRequest {
    let model = ModelSpec {
        name: "metrics".to_owned(),
        weights_digest: vec![1].into(),
        row_type: RowType::F32.into(),
        rotary_layout: RotaryLayout::None.into(),
        layers: vec![layer_spec(attention); LAYERS],
    };
    RegisterModelRequest { model: Some(model), calibration_json: calibration().into(), ..RegisterModelRequest::default() }
}

/// Numbers in (-1, 1), as bytes.
fn rows(count: usize, seed: usize) -> Vec<u8> {
    let number = |place: usize| ((place * 2_654_435_761 + seed * 40_503) % 65_521) as f32 / 32_760.5 - 1.0;
    (0..count * ROW_BYTES / 4).flat_map(|place| number(place).to_le_bytes()).collect()
}

fn open_request(model_id: u64, tokens: &[u32]) -> OpenRequest {
    let budget = Budget { dense: false, numerator: 1, denominator: 16, floor_tokens: 0, cap_tokens: 0 };
    let settings = StepSettings { budget: Some(budget), exact_tokens: 64, sink_tokens: 4 };
    OpenRequest { model_id, token_ids: tokens.to_vec(), settings: Some(settings), open_slots: 4, ..OpenRequest::default() }
}

async fn open(client: &mut Client, model_id: u64, tokens: &[u32]) -> LeaseRef {
    client.open(open_request(model_id, tokens)).await.expect("opened").into_inner().lease.expect("a lease")
}

async fn append(client: &mut Client, lease: LeaseRef, tokens: &[u32]) {
    for (run, ids) in tokens.chunks(CHUNK).enumerate() {
        let message = |layer: usize| AppendRequest {
            lease: Some(lease),
            layer: layer as u32,
            first_position: (run * CHUNK) as u64,
            rows: rows(ids.len() * LANES, tokens[0] as usize + 10 * run + layer).into(),
            token_ids: if layer == 0 { ids.to_vec() } else { Vec::new() },
        };
        client.append(tokio_stream::iter((0..LAYERS).map(message).collect::<Vec<_>>())).await.expect("appended");
    }
}

/// The same query again at the last position, in both layers.
async fn decode(client: &mut Client, lease: LeaseRef, tokens: usize) {
    ask(client, lease, tokens - 1..tokens, Answer::Output).await;
}

/// The same query at every position, in both layers.
async fn ask(client: &mut Client, lease: LeaseRef, positions: std::ops::Range<usize>, answer: Answer) {
    let values = positions.len() * QUERY_HEADS * HEAD_DIM;
    let queries: Vec<u8> = (0..values).flat_map(|place| ((place % (QUERY_HEADS * HEAD_DIM) % 7) as f32 - 3.0).to_le_bytes()).collect();
    let step = SequenceStep {
        lease: Some(lease),
        first_position: positions.start as u64,
        query_count: positions.len() as u32,
        queries: queries.into(),
        ..SequenceStep::default()
    };
    let request = |layer: usize| DecodeRequest {
        request_id: layer as u64,
        layer: layer as u32,
        answer: answer.into(),
        steps: vec![step.clone()],
        report: false,
    };
    let requests: Vec<DecodeRequest> = (0..LAYERS).map(request).collect();
    let mut replies = client.decode(tokio_stream::iter(requests)).await.expect("a stream").into_inner();
    for _ in 0..LAYERS {
        let reply = replies.next().await.expect("a reply").expect("a reply");
        assert_eq!(reply.results[0].error, None);
    }
}

async fn close(client: &mut Client, lease: LeaseRef) {
    client.close(CloseRequest { lease: Some(lease) }).await.expect("closed");
}

async fn start(place: &Place) -> (Daemon, Client, u64) {
    let daemon = place.serve(&["--set", ARENA, "--set", "arena.segment_bytes=1MiB", "--set", "decode.hot_bytes=1MiB"]);
    let mut client = SluiceClient::new(daemon.channel().await);
    let model = client.register_model(registration(AttentionKind::MhaGqa)).await.expect("registered").into_inner().model_id;
    (daemon, client, model)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn storage_metrics_follow_a_sequence_from_open_to_close() {
    let place = Place::new();
    let (daemon, mut client, model) = start(&place).await;
    let version = format!("sluice_build_info{{version=\"{}\"}}", env!("CARGO_PKG_VERSION"));
    reaches(&daemon, &version, 1.0).await;
    reaches(&daemon, "sluice_models", 1.0).await;
    reaches(&daemon, "sluice_arena_capacity_bytes", f64::from(8 << 20)).await;
    reaches(&daemon, "sluice_sequences{state=\"held\"}", 0.0).await;

    let tokens: Vec<u32> = (0..4 * CHUNK as u32).collect();
    let lease = open(&mut client, model, &tokens).await;
    reaches(&daemon, "sluice_sequences{state=\"held\"}", 1.0).await;
    reaches(&daemon, "sluice_leases{attach=\"stream\"}", 0.0).await;
    reaches(&daemon, "sluice_prefix_tokens_total{result=\"miss\"}", tokens.len() as f64).await;
    exceeds(&daemon, "sluice_memory_bytes{kind=\"open_slots\"}", 4.0 * CHUNK_BYTES as f64 - 1.0).await;
    append(&mut client, lease, &tokens).await;
    reaches(&daemon, "sluice_leases{attach=\"stream\"}", 1.0).await;
    reaches(&daemon, "sluice_appended_tokens_total", tokens.len() as f64).await;
    reaches(&daemon, "sluice_sealed_tokens_total", tokens.len() as f64).await;
    reaches(&daemon, "sluice_chunks{state=\"held\"}", 4.0).await;
    reaches(&daemon, "sluice_memory_bytes{kind=\"rows\"}", 4.0 * CHUNK_BYTES as f64).await;
    exceeds(&daemon, "sluice_memory_bytes{kind=\"labels\"}", 0.0).await;
    reaches(&daemon, "sluice_seal_seconds_count", 4.0).await;
    exceeds(&daemon, "sluice_seal_seconds_sum", 0.0).await;
    exceeds(&daemon, "sluice_journal_commit_seconds_count", 0.0).await;

    close(&mut client, lease).await;
    reaches(&daemon, "sluice_sequences{state=\"held\"}", 0.0).await;
    reaches(&daemon, "sluice_leases{attach=\"stream\"}", 0.0).await;
    reaches(&daemon, "sluice_chunks{state=\"held\"}", 0.0).await;
    reaches(&daemon, "sluice_chunks{state=\"cached\"}", 4.0).await;
    reaches(&daemon, "sluice_memory_bytes{kind=\"open_slots\"}", 0.0).await;
    let again = open(&mut client, model, &tokens).await;
    reaches(&daemon, "sluice_prefix_tokens_total{result=\"hit\"}", tokens.len() as f64).await;
    reaches(&daemon, "sluice_chunks{state=\"held\"}", 4.0).await;
    close(&mut client, again).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn equal_chunks_are_counted_once_and_cold_ones_are_shed() {
    let place = Place::new();
    let (daemon, mut client, model) = start(&place).await;
    let tokens: Vec<u32> = (0..2 * CHUNK as u32).collect();
    let (first, second) = (open(&mut client, model, &tokens).await, open(&mut client, model, &tokens).await);
    append(&mut client, first, &tokens).await;
    reaches(&daemon, "sluice_sealed_tokens_total", tokens.len() as f64).await;
    append(&mut client, second, &tokens).await;
    reaches(&daemon, "sluice_deduplicated_chunks_total", 2.0).await;
    reaches(&daemon, "sluice_chunks{state=\"held\"}", 2.0).await;
    close(&mut client, first).await;
    close(&mut client, second).await;
    reaches(&daemon, "sluice_chunks{state=\"cached\"}", 2.0).await;
    // 2 + 5 chunks of cache leave no room for 12 more among 16.
    for first in [500_000, 1_000_000] {
        let chunks = if first == 500_000 { 5 } else { 12 };
        let tokens: Vec<u32> = (first..first + chunks * CHUNK as u32).collect();
        reaches(&daemon, "sluice_shed_chunks_total", 0.0).await;
        let lease = open(&mut client, model, &tokens).await;
        append(&mut client, lease, &tokens).await;
        reaches(&daemon, "sluice_chunks{state=\"held\"}", f64::from(chunks)).await;
        close(&mut client, lease).await;
    }
    reaches(&daemon, "sluice_shed_chunks_total", 3.0).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn step_metrics_follow_the_decoder() {
    const PARTS: [&str; 4] = ["score", "select", "gather", "attend"];
    let place = Place::new();
    let (daemon, mut client, model) = start(&place).await;
    let tokens: Vec<u32> = (0..1100).collect();
    let lease = open(&mut client, model, &tokens).await;
    append(&mut client, lease, &tokens).await;
    reaches(&daemon, "sluice_sealed_tokens_total", 1024.0).await;
    reaches(&daemon, "sluice_step_seconds_count", 0.0).await;
    decode(&mut client, lease, tokens.len()).await;
    // The horizon lies at 1024, so k = ceil(1100 / 16) = 69 rows of each lane of each layer, none of them hot.
    let selected = (69 * LANES * LAYERS) as f64;
    reaches(&daemon, "sluice_selected_rows_total", selected).await;
    reaches(&daemon, "sluice_hot_rows_total{result=\"miss\"}", selected).await;
    reaches(&daemon, "sluice_hot_rows_total{result=\"hit\"}", 0.0).await;
    reaches(&daemon, "sluice_step_seconds_count", LAYERS as f64).await;
    exceeds(&daemon, "sluice_step_seconds_sum", 0.0).await;
    for part in PARTS {
        reaches(&daemon, &format!("sluice_step_part_seconds_count{{part=\"{part}\"}}"), LAYERS as f64).await;
        exceeds(&daemon, &format!("sluice_step_part_seconds_sum{{part=\"{part}\"}}"), 0.0).await;
    }
    reaches(&daemon, "sluice_step_seconds_bucket{le=\"+Inf\"}", LAYERS as f64).await;
    let rows = exceeds(&daemon, "sluice_read_bytes_total{kind=\"rows\"}", 0.0).await;
    let labels = exceeds(&daemon, "sluice_read_bytes_total{kind=\"labels\"}", 0.0).await;
    assert!(labels >= (1024 * 8 * LANES * LAYERS) as f64, "{labels} bytes of labels: 8 for each row before the horizon");

    decode(&mut client, lease, tokens.len()).await;
    reaches(&daemon, "sluice_hot_rows_total{result=\"hit\"}", selected).await;
    reaches(&daemon, "sluice_hot_rows_total{result=\"miss\"}", selected).await;
    exceeds(&daemon, "sluice_read_bytes_total{kind=\"rows\"}", rows).await;
    exceeds(&daemon, "sluice_read_bytes_total{kind=\"labels\"}", labels).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_last_queries_of_a_prompt_make_rows_hot_before_the_first_step() {
    let place = Place::new();
    let (daemon, mut client, model) = start(&place).await;
    let tokens: Vec<u32> = (0..1100).collect();
    let lease = open(&mut client, model, &tokens).await;
    append(&mut client, lease, &tokens).await;
    reaches(&daemon, "sluice_warmed_rows_total", 0.0).await;
    ask(&mut client, lease, 1080..1100, Answer::OutputDense).await;
    // The queries are alike, so what the first of them selects is all there is to fetch.
    let selected = (69 * LANES * LAYERS) as f64;
    reaches(&daemon, "sluice_warmed_rows_total", selected).await;
    decode(&mut client, lease, tokens.len()).await;
    reaches(&daemon, "sluice_hot_rows_total{result=\"hit\"}", selected).await;
    reaches(&daemon, "sluice_hot_rows_total{result=\"miss\"}", 0.0).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn refusals_are_counted_by_their_reason() {
    let place = Place::new();
    let (daemon, mut client, model) = start(&place).await;
    let lease = open(&mut client, model, &[1, 2, 3]).await;
    let stale = LeaseRef { generation: lease.generation + 1, ..lease };
    let refused = |reason: &str| format!("sluice_refused_requests_total{{reason=\"{reason}\"}}");
    for reason in ["failed_precondition", "not_found", "invalid_argument", "already_exists", "unimplemented", "resource_exhausted"] {
        reaches(&daemon, &refused(reason), 0.0).await;
    }

    let status = client.close(CloseRequest { lease: Some(stale) }).await.expect_err("stale");
    assert_eq!(status.code(), Code::FailedPrecondition, "{status}");
    reaches(&daemon, &refused("failed_precondition"), 1.0).await;

    let status = client.open(open_request(model + 999, &[1])).await.expect_err("no such model");
    assert_eq!(status.code(), Code::NotFound, "{status}");
    reaches(&daemon, &refused("not_found"), 1.0).await;

    let mut request = open_request(model, &[1]);
    request.open_slots = 5000;
    let status = client.open(request).await.expect_err("out of bounds");
    assert_eq!(status.code(), Code::InvalidArgument, "{status}");
    reaches(&daemon, &refused("invalid_argument"), 1.0).await;

    let mut other = registration(AttentionKind::MhaGqa);
    other.model.as_mut().expect("a model").layers.push(layer_spec(AttentionKind::MhaGqa));
    other.calibration_json = Vec::new().into();
    let status = client.register_model(other).await.expect_err("another shape");
    assert_eq!(status.code(), Code::AlreadyExists, "{status}");
    reaches(&daemon, &refused("already_exists"), 1.0).await;

    let status = client.register_model(registration(AttentionKind::Mla)).await.expect_err("not built");
    assert_eq!(status.code(), Code::Unimplemented, "{status}");
    reaches(&daemon, &refused("unimplemented"), 1.0).await;

    let mut request = open_request(model, &[1]);
    request.open_slots = 4096;
    let status = client.open(request).await.expect_err("more open slots than memory");
    assert_eq!(status.code(), Code::ResourceExhausted, "{status}");
    reaches(&daemon, &refused("resource_exhausted"), 1.0).await;
    reaches(&daemon, "sluice_sequences{state=\"held\"}", 1.0).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_dead_holder_is_counted_and_its_sequence_parked() {
    let place = Place::new();
    let (daemon, mut client, model) = start(&place).await;
    let mut holder = std::process::Command::new("sleep").arg("600").spawn().expect("a process");
    let request = OpenRequest { holder_pid: holder.id(), ..open_request(model, &[1, 2, 3]) };
    client.open(request).await.expect("opened");
    reaches(&daemon, "sluice_sequences{state=\"held\"}", 1.0).await;
    reaches(&daemon, "sluice_dead_leases_total", 0.0).await;
    holder.kill().expect("killed");
    holder.wait().expect("reaped");
    reaches(&daemon, "sluice_dead_leases_total", 1.0).await;
    reaches(&daemon, "sluice_sequences{state=\"held\"}", 0.0).await;
    reaches(&daemon, "sluice_sequences{state=\"parked\"}", 1.0).await;
}

/// The open slots of a sequence as one of its workers maps them; `writer` 1 and up are nobody's in these tests.
fn open_slots(place: &Place, sequence: u64, shape: &ModelShape, writer: usize) -> OpenSlots {
    let path = place.arena().join(format!("open-{sequence}"));
    let file = std::fs::OpenOptions::new().read(true).write(true).open(path).expect("open slots");
    OpenSlots::map(&file, OpenLayout::new(shape, 4).expect("a layout"), writer).expect("mapped")
}

fn shape(kinds: [LaneKind; LAYERS]) -> ModelShape {
    let layer = |kind| LayerShape {
        kind,
        query_heads: QUERY_HEADS as u16,
        kv_heads: LANES as u16,
        head_dim: HEAD_DIM as u16,
        softmax_scale: 0.125,
    };
    ModelShape::unscaled(RowTypeOfRows::F32, kinds.map(layer).to_vec())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn direct_leases_and_chunks_that_cannot_be_sealed_are_counted() {
    let place = Place::new();
    let (daemon, mut client, model) = start(&place).await;
    let tokens: Vec<u32> = (0..CHUNK as u32 - 1).collect();
    let lease = open(&mut client, model, &tokens).await;
    append(&mut client, lease, &tokens).await;
    // Its worker writes rows that are not numbers behind the daemon's back, and commits them.
    let shape = shape([LaneKind::Selected; LAYERS]);
    let slots = open_slots(&place, lease.sequence_id, &shape, 0);
    let class = slots.layout().class(SlotClass::Selected).clone();
    slots.write_rows(SlotClass::Selected, &class.planes[1], 0, 0, CHUNK - 1, &f32::NAN.to_le_bytes().repeat(2 * HEAD_DIM));
    reaches(&daemon, "sluice_refused_chunks_total", 0.0).await;
    slots.set_committed(CHUNK as u64);
    reaches(&daemon, "sluice_refused_chunks_total", 1.0).await;
    close(&mut client, lease).await;

    let lease = open(&mut client, model, &[]).await;
    reaches(&daemon, "sluice_leases{attach=\"direct\"}", 0.0).await;
    client.attach(AttachRequest { lease: Some(lease), ..AttachRequest::default() }).await.expect("a ticket");
    reaches(&daemon, "sluice_leases{attach=\"direct\"}", 1.0).await;
    close(&mut client, lease).await;
    reaches(&daemon, "sluice_leases{attach=\"direct\"}", 0.0).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn slots_in_limbo_are_counted_until_the_step_is_over() {
    let place = Place::new();
    let (daemon, mut client, _) = start(&place).await;
    let mut request = registration(AttentionKind::MhaGqa);
    request.calibration_json = Vec::new().into();
    let spec = request.model.as_mut().expect("a model");
    spec.name = "windowed".to_owned();
    spec.layers[1].window_tokens = 300;
    let model = client.register_model(request).await.expect("registered").into_inner().model_id;
    let lease = open(&mut client, model, &[]).await;
    let shape = shape([LaneKind::Selected, LaneKind::Window { tokens: 300 }]);
    let slots = open_slots(&place, lease.sequence_id, &shape, 1);
    slots.start_step();
    // A window of 300 tokens and a run of four open slots need the last six of twelve chunks.
    append(&mut client, lease, &(0..12 * CHUNK as u32).collect::<Vec<u32>>()).await;
    reaches(&daemon, "sluice_limbo_slots", 6.0).await;
    slots.complete_step();
    reaches(&daemon, "sluice_limbo_slots", 0.0).await;
    close(&mut client, lease).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn damaged_chunks_and_files_made_ahead_are_counted() {
    let place = Place::new();
    let (mut daemon, mut client, model) = start(&place).await;
    reaches(&daemon, "sluice_memory_bytes{kind=\"spare_slots\"}", 0.0).await;
    let tokens: Vec<u32> = (0..4 * CHUNK as u32).collect();
    let lease = open(&mut client, model, &tokens).await;
    exceeds(&daemon, "sluice_memory_bytes{kind=\"spare_slots\"}", 4.0 * CHUNK_BYTES as f64).await;
    append(&mut client, lease, &tokens).await;
    close(&mut client, lease).await;
    daemon.signal(rustix::process::Signal::KILL);
    daemon.ended();
    let rows = place.arena().join("seg-0.rows");
    let mut bytes = std::fs::read(&rows).expect("rows");
    bytes[100] ^= 1;
    std::fs::write(&rows, bytes).expect("written");

    let daemon = place.serve(&["--set", ARENA, "--set", "arena.segment_bytes=1MiB"]);
    let mut client = SluiceClient::new(daemon.channel().await);
    reaches(&daemon, "sluice_quarantined_chunks_total", 0.0).await;
    let again = client.open(open_request(model, &tokens)).await.expect("opened").into_inner();
    assert_eq!(again.matched_tokens, 0, "the first chunk is damaged");
    reaches(&daemon, "sluice_quarantined_chunks_total", 1.0).await;
}
