//! Bad input over the wire: one clear status that names field, value and bound; nothing changed, nothing leaked.

mod support;

use sluice_client::{Attach, AttendMode, Client, ClientError, Stats};
use sluice_kernels::budget::Settings;
use sluice_kernels::shape::{ModelShape, RowType};
use sluice_proto::v1::sluice_client::SluiceClient;
use sluice_proto::v1::{self, Answer};
use support::daemon::{Daemon, DaemonOptions};
use support::rows::{path_hashes, query_of, rows_of, selected, token_ids};
use support::{ask, bits, decode, fill, options, plain_shape, register, verify_rows};
use tokio::runtime::Runtime;
use tonic::transport::Channel;
use tonic::{Code, Status};

/// A client without any library, so that nothing is checked before it is sent.
struct Raw {
    runtime: Runtime,
    client: SluiceClient<Channel>,
}

impl Raw {
    fn connect(daemon: &Daemon) -> Self {
        let runtime = Runtime::new().expect("runtime");
        let path = daemon.socket();
        let connector = tower::service_fn(move |_| {
            let path = path.clone();
            async move { tokio::net::UnixStream::connect(path).await.map(hyper_util::rt::TokioIo::new) }
        });
        let endpoint = tonic::transport::Endpoint::from_static("http://sluice.local");
        let channel = runtime.block_on(endpoint.connect_with_connector(connector)).expect("connect");
        let client = SluiceClient::new(channel).max_encoding_message_size(1 << 30).max_decoding_message_size(1 << 30);
        Self { runtime, client }
    }

    fn call<A>(&self, send: impl AsyncFnOnce(&mut SluiceClient<Channel>) -> Result<tonic::Response<A>, Status>) -> Result<A, Status> {
        let mut client = self.client.clone();
        self.runtime.block_on(send(&mut client)).map(tonic::Response::into_inner)
    }

    /// One Decode message; a refusal inside the reply counts as its status.
    fn decode(&self, request: v1::DecodeRequest) -> Result<v1::DecodeResponse, Status> {
        let mut client = self.client.clone();
        self.runtime.block_on(async {
            let mut replies = client.decode(tokio_stream::once(request)).await?.into_inner();
            let reply = replies.message().await?.ok_or_else(|| Status::unknown("no reply"))?;
            match reply.results.first().and_then(|result| result.error.clone()) {
                Some(error) => Err(Status::new(Code::from_i32(error.code), error.message)),
                None => Ok(reply),
            }
        })
    }
}

/// One bad input: what it is, what it must be answered with.
struct Case {
    name: &'static str,
    answer: Result<(), Status>,
    code: Code,
    /// Words of the message: field, value, bound.
    words: &'static [&'static str],
}

impl Case {
    fn check(&self) -> Option<String> {
        let Err(status) = &self.answer else { return Some(format!("{}: accepted", self.name)) };
        let missing: Vec<_> = self.words.iter().filter(|word| !status.message().contains(**word)).collect();
        let wrong = status.code() != self.code || !missing.is_empty();
        wrong.then(|| {
            format!("{}: {:?} {:?}, expected {:?}, words missing: {missing:?}", self.name, status.code(), status.message(), self.code)
        })
    }
}

fn case<A>(name: &'static str, answer: Result<A, Status>, code: Code, words: &'static [&'static str]) -> Case {
    Case { name, answer: answer.map(|_| ()), code, words }
}

fn layer(head_dim: u32) -> v1::LayerSpec {
    v1::LayerSpec { attention: 1, query_heads: 4, kv_heads: 2, head_dim, ..v1::LayerSpec::default() }
}

/// A layer of fp8 rows with scales for its two lanes.
fn scaled(key_scales: &[f32], value_scales: &[f32]) -> v1::LayerSpec {
    v1::LayerSpec { key_scales: key_scales.to_vec(), value_scales: value_scales.to_vec(), ..layer(64) }
}

fn fp8(layer: v1::LayerSpec) -> v1::ModelSpec {
    v1::ModelSpec { row_type: v1::RowType::F8E4m3.into(), ..spec(vec![layer]) }
}

fn spec(layers: Vec<v1::LayerSpec>) -> v1::ModelSpec {
    v1::ModelSpec { name: "bad".to_owned(), weights_digest: vec![9].into(), row_type: 1, rotary_layout: 1, layers }
}

fn models(raw: &Raw) -> Vec<Case> {
    let register = |spec: v1::ModelSpec| {
        raw.call(async |client| client.register_model(v1::RegisterModelRequest { model: Some(spec), ..Default::default() }).await)
    };
    let bad = Code::InvalidArgument;
    let unknown =
        |status: Result<v1::OpenResponse, Status>| case("open of an unknown model", status, Code::NotFound, &["model_id", "987654"]);
    vec![
        case("head_dim", register(spec(vec![layer(65)])), bad, &["head_dim", "65", "64, 96, 128, 256"]),
        case("no layers", register(spec(Vec::new())), bad, &["layers", "0", "1024"]),
        case("heads", register(spec(vec![v1::LayerSpec { query_heads: 5, ..layer(64) }])), bad, &["5 query heads", "2 kv heads"]),
        case("scale", register(spec(vec![v1::LayerSpec { softmax_scale: f32::NAN, ..layer(64) }])), bad, &["softmax_scale", "NaN"]),
        case("row type", register(v1::ModelSpec { row_type: 0, ..spec(vec![layer(64)]) }), bad, &["row_type"]),
        case("row type beyond", register(v1::ModelSpec { row_type: 5, ..spec(vec![layer(64)]) }), bad, &["row_type", "5", "1 to 4"]),
        case("no scales", register(fp8(layer(64))), bad, &["key_scales", "0", "2 in layers[0]"]),
        case("a scale too few", register(fp8(scaled(&[1.0, 1.0], &[1.0]))), bad, &["value_scales", "1", "2 in layers[0]"]),
        case("scales of f32 rows", register(spec(vec![scaled(&[1.0, 1.0], &[])])), bad, &["key_scales", "2", "0 in layers[0]"]),
        case("scale zero", register(fp8(scaled(&[1.0, 0.0], &[1.0, 1.0]))), bad, &["layers[0].key_scales[1]", "0", "1e-30 to 1e30"]),
        case("scale below zero", register(fp8(scaled(&[1.0, 1.0], &[-1.0, 1.0]))), bad, &["layers[0].value_scales[0]", "-1", "1e-30"]),
        case("scale infinite", register(fp8(scaled(&[f32::INFINITY, 1.0], &[1.0, 1.0]))), bad, &["key_scales[0]", "inf", "1e30"]),
        case("scale no number", register(fp8(scaled(&[1.0, 1.0], &[1.0, f32::NAN]))), bad, &["value_scales[1]", "NaN", "1e30"]),
        case("name", register(v1::ModelSpec { name: "x".repeat(300), ..spec(vec![layer(64)]) }), bad, &["name", "300", "256"]),
        case(
            "digest",
            register(v1::ModelSpec { weights_digest: vec![0; 65].into(), ..spec(vec![layer(64)]) }),
            bad,
            &["weights_digest", "65", "64"],
        ),
        case("latent attention", register(spec(vec![v1::LayerSpec { attention: 2, ..layer(64) }])), Code::Unimplemented, &["attention"]),
        unknown(raw.call(async |client| client.open(v1::OpenRequest { model_id: 987_654, ..Default::default() }).await)),
    ]
}

fn opens(raw: &Raw, model_id: u64) -> Vec<Case> {
    let open = |request: v1::OpenRequest| raw.call(async |client| client.open(v1::OpenRequest { model_id, ..request }).await);
    let bad = Code::InvalidArgument;
    let settings = |settings: v1::StepSettings| open(v1::OpenRequest { settings: Some(settings), ..Default::default() });
    let budget = |budget: v1::Budget| settings(v1::StepSettings { budget: Some(budget), exact_tokens: 256, sink_tokens: 0 });
    vec![
        case("exact tokens", settings(v1::StepSettings { exact_tokens: 63, ..Default::default() }), bad, &["exact_tokens", "63", "64"]),
        case("sinks", settings(v1::StepSettings { sink_tokens: 65, exact_tokens: 256, budget: None }), bad, &["sink_tokens", "65", "64"]),
        case("ratio", budget(v1::Budget { numerator: 3, denominator: 2, ..Default::default() }), bad, &["3", "2"]),
        case("open slots", open(v1::OpenRequest { open_slots: 5000, ..Default::default() }), bad, &["open_slots", "5000", "4096"]),
        case(
            "extra keys",
            open(v1::OpenRequest { extra_keys: vec![vec![0; 257].into()], ..Default::default() }),
            bad,
            &["extra_keys", "257", "256"],
        ),
        case("too long", open(v1::OpenRequest { token_ids: vec![1; 5000], ..Default::default() }), bad, &["token_ids", "5000", "4096"]),
        case("resume of nothing", open(v1::OpenRequest { resume_sequence_id: 4242, ..Default::default() }), Code::NotFound, &["4242"]),
    ]
}

/// What a good step of the sequence would be: layer 0 of its next token.
fn good_step(lease: v1::LeaseRef, ids: &[u32], position: usize) -> v1::SequenceStep {
    let shape = plain_shape(RowType::F32);
    let paths = path_hashes(ids);
    v1::SequenceStep {
        lease: Some(lease),
        first_position: position as u64,
        query_count: 1,
        queries: query_of(position, 0, &shape.layers[0]).iter().flat_map(|value| value.to_le_bytes()).collect::<Vec<u8>>().into(),
        rows: rows_of(&paths[position..position + 1], 0, &shape).into(),
        token_ids: vec![ids[position]],
    }
}

fn steps(raw: &Raw, lease: v1::LeaseRef, ids: &[u32], position: usize) -> Vec<Case> {
    let good = good_step(lease, ids, position);
    let send = |layer: u32, answer: Answer, step: v1::SequenceStep| {
        raw.decode(v1::DecodeRequest { request_id: 7, layer, answer: answer.into(), steps: vec![step], report: false })
    };
    let output = |step: v1::SequenceStep| send(0, Answer::Output, step);
    let bad = Code::InvalidArgument;
    let with_value = |bytes: &[u8], value: f32| {
        let mut bytes = bytes.to_vec();
        bytes[4 * 70..4 * 71].copy_from_slice(&value.to_le_bytes());
        bytes.into()
    };
    let stale = v1::LeaseRef { generation: lease.generation + 1, ..lease };
    let nobody = v1::LeaseRef { sequence_id: 777_777, ..lease };
    let at = |first_position: u64| v1::SequenceStep { first_position, ..good.clone() };
    let rows = |rows: prost::bytes::Bytes| v1::SequenceStep { rows, ..good.clone() };
    let queries = |queries: prost::bytes::Bytes| v1::SequenceStep { queries, ..good.clone() };
    let twice =
        v1::DecodeRequest { layer: 0, answer: Answer::Output.into(), steps: vec![good.clone(), good.clone()], ..Default::default() };
    vec![
        case("layer", send(9, Answer::Output, good.clone()), bad, &["layer", "9", "1"]),
        case("no answer", send(0, Answer::Unspecified, good.clone()), bad, &["answer"]),
        case("gap", output(at(position as u64 + 1)), bad, &["first_position", "501", "500"]),
        case("repetition", output(at(position as u64 - 1)), bad, &["first_position", "499", "500"]),
        case("far away", output(at(u64::MAX)), bad, &["first_position"]),
        case("NaN in a row", output(rows(with_value(&good.rows, f32::NAN))), bad, &["rows", "finite"]),
        case("infinity in a row", output(rows(with_value(&good.rows, f32::INFINITY))), bad, &["rows", "finite"]),
        case("NaN in a query", output(queries(with_value(&good.queries, f32::NAN))), bad, &["queries", "finite"]),
        case("half a row", output(rows(good.rows.slice(..good.rows.len() - 4))), bad, &["rows"]),
        case("half a query", output(queries(good.queries.slice(..good.queries.len() - 4))), bad, &["queries"]),
        case("no token id", output(v1::SequenceStep { token_ids: Vec::new(), ..good.clone() }), bad, &["token_ids", "0", "1"]),
        case("too many ids", output(v1::SequenceStep { token_ids: vec![1, 2], ..good.clone() }), bad, &["token_ids", "2", "1"]),
        case("query count", output(v1::SequenceStep { query_count: 5000, ..good.clone() }), bad, &["query_count", "5000", "4096"]),
        case("no rows there", output(v1::SequenceStep { rows: Vec::new().into(), ..at(position as u64) }), bad, &["first_position", "500"]),
        case("stale lease", output(v1::SequenceStep { lease: Some(stale), ..good.clone() }), Code::FailedPrecondition, &["generation"]),
        case("no such sequence", output(v1::SequenceStep { lease: Some(nobody), ..good.clone() }), Code::NotFound, &["777777"]),
        case("no lease", output(v1::SequenceStep { lease: None, ..good.clone() }), bad, &["lease"]),
        case("one sequence twice", raw.decode(twice), bad, &["steps"]),
        case(
            "rows of two queries",
            send(0, Answer::Rows, v1::SequenceStep { query_count: 2, rows: Vec::new().into(), ..good.clone() }),
            bad,
            &["query_count"],
        ),
    ]
}

fn histories(raw: &Raw, lease: v1::LeaseRef, untouched: v1::LeaseRef) -> Vec<Case> {
    let stale = Some(v1::LeaseRef { generation: lease.generation + 3, ..lease });
    let (lease, position) = (Some(lease), 501);
    let bad = Code::InvalidArgument;
    let fork = raw.call(async |client| client.fork(v1::ForkRequest { lease, position, ..Default::default() }).await);
    let truncate = raw.call(async |client| client.truncate(v1::TruncateRequest { lease, position }).await);
    let old = raw.call(async |client| client.truncate(v1::TruncateRequest { lease: stale, position: 0 }).await);
    let close = raw.call(async |client| client.close(v1::CloseRequest { lease: stale }).await);
    let lanes = v1::AttachRequest { lease: Some(untouched), first_lane: 1, lane_count: 2, known_label_set: 0 };
    let lanes = raw.call(async |client| client.attach(lanes).await);
    let streamed = raw.call(async |client| client.attach(v1::AttachRequest { lease, ..Default::default() }).await);
    let calibrate = |json: &str| {
        let calibration_json = json.as_bytes().to_vec().into();
        raw.call(async move |client| client.set_calibration(v1::SetCalibrationRequest { model_id: 1, calibration_json }).await)
    };
    vec![
        case("fork beyond the end", fork, bad, &["position", "501", "500"]),
        case("truncate beyond the end", truncate, bad, &["position", "501", "500"]),
        case("truncate by a stale lease", old, Code::FailedPrecondition, &["generation"]),
        case("close by a stale lease", close, Code::FailedPrecondition, &["generation"]),
        case("lane out of range", lanes, bad, &["lane", "3", "2"]),
        case("attach of a sequence that the daemon decodes", streamed, Code::FailedPrecondition, &["decoded by the daemon"]),
        case("calibration that is no JSON", calibrate("{"), bad, &["calibration"]),
    ]
}

fn calibrations(client: &Client, model: &sluice_client::Model) {
    use sluice_kernels::label::{Calibration, LabelPlan, LaneCalibration, LayerCalibration};
    let lane = |channels: u16| LaneCalibration {
        order: (0..channels).collect(),
        magnitude: vec![1.0; usize::from(channels)],
        low: vec![-1.0; usize::from(channels)],
        high: vec![1.0; usize::from(channels)],
    };
    let layers = |channels: u16| {
        vec![
            LayerCalibration { layer: 0, lanes: vec![lane(channels), lane(channels)] },
            LayerCalibration { layer: 1, lanes: vec![lane(channels)] },
        ]
    };
    let good = Calibration { version: 1, plan: LabelPlan::large(64), text_hash: String::new(), seed: 0, tokens: 1, layers: layers(64) };
    let mut range = good.clone();
    range.layers[1].lanes[0].low[3] = 2.0;
    let cases = [
        (Calibration { layers: layers(32), ..good.clone() }, ["order", "32", "64"]),
        (Calibration { version: 2, ..good.clone() }, ["version", "2", "1"]),
        (Calibration { layers: layers(64)[..1].to_vec(), ..good.clone() }, ["layers", "[0]", "[0, 1]"]),
        (range, ["channel 3", "2 to 1", "low must be below high"]),
    ];
    for (calibration, words) in cases {
        let refused = client.set_calibration(model, &calibration).expect_err("a calibration that does not fit");
        let text = refused.to_string();
        assert_eq!(refused.code(), Some(Code::InvalidArgument), "{text}");
        assert!(words.iter().all(|word| text.contains(word)), "{text}: {words:?} expected");
    }
}

fn held(stats: &Stats) -> [u64; 8] {
    let Stats { models, sequences_held, sequences_parked, chunks, chunks_held, open_slot_bytes, appended_tokens, label_bytes, .. } = *stats;
    [models, sequences_held, sequences_parked, chunks, chunks_held, open_slot_bytes, appended_tokens, label_bytes]
}

#[test]
fn bad_input_is_named_and_changes_nothing() {
    let settings = vec![("limits.sequence_tokens", "4096".to_owned()), ("limits.message_bytes", (1 << 20).to_string())];
    let daemon = Daemon::start(DaemonOptions { settings, ..DaemonOptions::default() });
    let client = daemon.client();
    let raw = Raw::connect(&daemon);
    let shape = plain_shape(RowType::F32);
    let model = register(&client, "good", &shape);
    let ids = token_ids(3, 600);
    let paths = path_hashes(&ids);
    let mut session = client.open(&model, &ids[..500], &options(Attach::Stream, Settings::dense())).expect("open");
    fill(&mut session, &ids[..500]);
    session.wait_sealed(256, std::time::Duration::from_secs(10)).expect("sealed");
    let lease = v1::LeaseRef { sequence_id: session.sequence_id(), generation: session.generation() };
    // A sequence that nobody has used yet, of a model whose layers have two lanes each.
    let even = ModelShape::unscaled(RowType::F32, vec![selected(2, 2, 64), selected(4, 2, 64)]);
    let model_id = register(&client, "even", &even).id();
    let untouched = raw.call(async |client| client.open(v1::OpenRequest { model_id, ..Default::default() }).await).expect("open");
    let untouched = untouched.lease.expect("lease");
    let before = client.stats().expect("stats");
    let expected = ask(&mut session, 499, 0, AttendMode::Dense);

    let mut cases = models(&raw);
    cases.extend(opens(&raw, model.id()));
    cases.extend(steps(&raw, lease, &ids, 500));
    cases.extend(histories(&raw, lease, untouched));
    let wrong: Vec<String> = cases.iter().filter_map(Case::check).collect();
    assert!(wrong.is_empty(), "{} of {}:\n{}", wrong.len(), cases.len(), wrong.join("\n"));
    calibrations(&client, &model);
    oversized(&client, &raw, lease);

    let after = client.stats().expect("stats");
    assert_eq!(held(&after), held(&before), "models, held, parked, chunks, chunks held, open slot bytes, appended tokens, label bytes");
    assert!(
        after.open_descriptors <= before.open_descriptors + 1,
        "{} descriptors, {} before",
        after.open_descriptors,
        before.open_descriptors
    );
    let now = ask(&mut session, 499, 0, AttendMode::Dense);
    assert_eq!(bits(&now.0), bits(&expected.0), "the sequence answers as before");
    decode(&mut session, &ids, &paths, AttendMode::Sparse).expect("the next token");
    assert_eq!(verify_rows(&mut session, &paths), 501 * 3);
    session.close().expect("close");
}

/// A message above the limit ends its call with a clear word, and nothing else.
fn oversized(client: &Client, raw: &Raw, lease: v1::LeaseRef) {
    let append =
        v1::AppendRequest { lease: Some(lease), layer: 0, first_position: 500, rows: vec![0; 2 << 20].into(), token_ids: Vec::new() };
    let refused = raw.call(async |client| client.append(tokio_stream::once(append)).await).expect_err("2 MiB of 1 MiB");
    assert!(matches!(refused.code(), Code::OutOfRange | Code::ResourceExhausted), "{refused:?}");
    assert!(refused.message().contains("1048576"), "{}", refused.message());
    client.stats().expect("the daemon serves on");
}

#[test]
fn the_library_refuses_what_cannot_be_sent() {
    let daemon = Daemon::start(DaemonOptions::default());
    let client = daemon.client();
    let model = register(&client, "library", &plain_shape(RowType::F32));
    for attach in [Attach::Stream, support::direct()] {
        let ids = token_ids(4, 300);
        let mut session = client.open(&model, &ids, &options(attach, Settings::dense())).expect("open");
        fill(&mut session, &ids);
        let refusals = [
            session.begin(&[]).expect_err("no tokens"),
            session.begin(&[1; 2000]).expect_err("longer than the open slots"),
            session.append(0, 300, &[0; 1024]).expect_err("no run"),
            session.truncate(301).expect_err("beyond the end"),
            session.rows(7, 0, &[]).expect_err("no such layer"),
        ];
        for refusal in &refusals {
            assert!(matches!(refusal, ClientError::Input { .. }), "{refusal}");
        }
        assert!(refusals[3].to_string().contains("position: 301"), "{}", refusals[3]);
        session.begin(&[1]).expect("begin");
        let mut bad = vec![0u8; 2 * 512];
        bad[..4].copy_from_slice(&f32::NAN.to_le_bytes());
        let refused = session.append(0, 300, &bad).expect_err("not finite");
        assert!(refused.to_string().contains("finite"), "{refused}");
        session.append(0, 300, &vec![0; 2 * 512]).expect("the same place takes good rows");
        session.truncate(300).expect("drops the unfinished run");
        assert_eq!(verify_rows(&mut session, &path_hashes(&ids)), 300 * 3);
        session.close().expect("close");
    }
}
