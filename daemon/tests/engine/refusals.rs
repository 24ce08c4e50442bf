//! Bad input: every refusal names field, value and bound, and changes nothing.

use crate::support::{append_work, check_rows, config, open, open_request, peer, register, registration, send, shape, start, tokens};
use sluice_daemon::decode::{Answer, StepWork};
use sluice_daemon::engine::command::{Attach, Fork, LeaseKey, Peer, RegisterModel};
use sluice_daemon::engine::counters::Refusal;
use sluice_daemon::engine::{EngineConfig, EngineError, EngineHandle};
use sluice_kernels::budget::{Budget, Settings};

struct Case {
    what: &'static str,
    /// Parts of the message: field, value, bound.
    says: &'static [&'static str],
    refusal: Refusal,
    result: Result<(), (Refusal, String)>,
}

fn of<T>(result: Result<T, EngineError>) -> Result<(), (Refusal, String)> {
    result.map(|_| ()).map_err(|error| (error.refusal(), error.to_string()))
}

fn check(cases: Vec<Case>) {
    for Case { what, says, refusal, result } in cases {
        let Err((found, message)) = result else { panic!("{what}: accepted") };
        assert_eq!(found, refusal, "{what}: {message}");
        for part in says {
            assert!(message.contains(part), "{what}: {message:?} does not say {part:?}");
        }
    }
}

async fn opening(engine: &EngineHandle, model: u64) -> Vec<Case> {
    let base = || open_request(model, &tokens(10, 1));
    let bad = Refusal::InvalidArgument;
    let mut cases = Vec::new();
    let mut add = |what, says, refusal, result| cases.push(Case { what, says, refusal, result });
    add("unknown model", &["model_id", "999"], Refusal::NotFound, of(engine.open(open_request(999, &[])).await));
    let long = open_request(model, &tokens(16 * 1024 + 1, 1));
    add("too many tokens", &["token_ids", "16385", "16384"], bad, of(engine.open(long).await));
    let mut request = base();
    request.extra_keys = vec![Vec::new(); 17];
    add("too many keys", &["extra_keys", "17", "16"], bad, of(engine.open(request).await));
    let mut request = base();
    request.extra_keys = vec![vec![0; 257]];
    add("a long key", &["extra_keys", "257", "256"], bad, of(engine.open(request).await));
    for open_slots in [1, 4097] {
        let mut request = base();
        request.open_slots = open_slots;
        add("open slots", &["open_slots", "2 to 4096"], bad, of(engine.open(request).await));
    }
    let settings = [
        (Settings { exact_tokens: 63, ..Settings::default() }, &["exact_tokens", "63", "64 to 65536"] as &[_]),
        (Settings { sink_tokens: 65, ..Settings::default() }, &["sink_tokens", "65", "0 to 64"]),
        (
            Settings { budget: Budget::Ratio { numerator: 3, denominator: 2, floor_tokens: 0, cap_tokens: 0 }, ..Settings::default() },
            &["budget", "3/2"],
        ),
    ];
    for (settings, says) in settings {
        let mut request = base();
        request.settings = Some(settings);
        add("settings", says, bad, of(engine.open(request).await));
    }
    let mut request = base();
    request.resume = Some(12345);
    add("resume of nothing", &["resume_sequence_id", "12345"], Refusal::NotFound, of(engine.open(request).await));
    let mut request = base();
    request.holder_pid = 1 << 30;
    add("no such process", &["holder_pid", "1073741824"], Refusal::PermissionDenied, of(engine.open(request).await));
    let mut request = base();
    (request.holder_pid, request.peer) = (1, Peer::Remote);
    add("a remote peer's process", &["holder_pid", "Unix socket"], Refusal::PermissionDenied, of(engine.open(request).await));
    cases
}

#[tokio::test(flavor = "multi_thread")]
async fn open_refuses_by_field_and_leaves_nothing() {
    let folder = tempfile::tempdir().expect("a folder");
    let engine = start(config(folder.path()));
    let model = register(&engine, &shape(None)).await;
    let before = engine.stats().await.expect("stats");
    check(opening(&engine, model).await);
    assert_eq!(engine.stats().await.expect("stats"), before);
    let files = std::fs::read_dir(folder.path().join("arena")).expect("arena").count();
    assert_eq!(files, 1, "the journal alone");
}

#[tokio::test(flavor = "multi_thread")]
async fn leases_positions_and_lanes_are_checked() {
    let folder = tempfile::tempdir().expect("a folder");
    let engine = start(config(folder.path()));
    let shape = shape(None);
    let model = register(&engine, &shape).await;
    let prompt = tokens(300, 1);
    let lease = open(&engine, model, &prompt).await.lease;
    crate::support::append(&engine, lease, &shape, &prompt, 0).await;
    let stale = LeaseKey { generation: 7, ..lease };
    let nobody = LeaseKey { sequence: 777, generation: 1 };
    let fork = |lease, position| Fork { lease, position, open_slots: 0, holder_pid: 0, peer: peer() };
    let lanes = |lease, lanes| Attach { lease, lanes: Some(lanes) };
    let decoder = engine.decoder().expect("a decoder");
    let mut cases = Vec::new();
    let mut add = |what, says, refusal, result| cases.push(Case { what, says, refusal, result });
    let (bad, stated) = (Refusal::InvalidArgument, Refusal::FailedPrecondition);
    add("stale fork", &["generation", "7", "1"], stated, of(engine.fork(fork(stale, 0)).await));
    add("unknown fork", &["sequence_id", "777"], Refusal::NotFound, of(engine.fork(fork(nobody, 0)).await));
    add("fork beyond", &["position", "301", "300"], bad, of(engine.fork(fork(lease, 301)).await));
    add("truncate beyond", &["position", "301", "300"], bad, of(decoder.truncate(lease, 301).await));
    add("stale close", &["generation"], stated, of(engine.close(stale).await));
    add("attach after stream", &["decoded by the daemon"], stated, of(engine.attach(lanes(lease, 0..1)).await));
    add("unregister while held", &["model", "held"], stated, of(engine.unregister_model(model).await));
    let direct = open(&engine, model, &[]).await.lease;
    add("lanes of unequal layers", &["lane_count", "kv_heads"], bad, of(engine.attach(lanes(direct, 0..1)).await));
    check(cases);
    check_rows(&engine, lease, &shape, &prompt).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn registrations_are_checked() {
    let folder = tempfile::tempdir().expect("a folder");
    let engine = start(config(folder.path()));
    let shape = shape(None);
    let mut cases = Vec::new();
    let mut add = |what, says, refusal, result| cases.push(Case { what, says, refusal, result });
    let bad = Refusal::InvalidArgument;
    let mut request = registration(&shape);
    request.name = String::new();
    add("no name", &["model.name", "0", "1 to 256"], bad, of(engine.register_model(request).await));
    let mut request = registration(&shape);
    request.weights_digest = vec![0; 65];
    add("a long digest", &["weights_digest", "65", "1 to 64"], bad, of(engine.register_model(request).await));
    let mut request = registration(&shape);
    request.namespace = "n".repeat(129);
    add("a long namespace", &["namespace", "129", "1 to 128"], bad, of(engine.register_model(request).await));
    let mut request = registration(&shape);
    request.shape.layers[0].head_dim = 80;
    add("head_dim", &["head_dim", "80", "64, 96, 128, 256"], bad, of(engine.register_model(request).await));
    let mut request = registration(&shape);
    request.calibration_json = b"{}".to_vec();
    add("calibration", &["calibration_json"], bad, of(engine.register_model(request).await));
    register(&engine, &shape).await;
    let mut request = registration(&shape);
    request.shape.layers.pop();
    add("another shape", &["model.name", "another shape"], Refusal::AlreadyExists, of(engine.register_model(request).await));
    check(cases);
    assert_eq!(engine.stats().await.expect("stats").models, 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn steps_are_checked_before_anything_is_stored() {
    let folder = tempfile::tempdir().expect("a folder");
    let engine = start(config(folder.path()));
    let shape = shape(Some(600));
    let model = register(&engine, &shape).await;
    let prompt = tokens(100, 1);
    let lease = open(&engine, model, &prompt).await.lease;
    crate::support::append(&engine, lease, &shape, &prompt, 0).await;
    let longer = tokens(101, 1);
    let good = || append_work(lease, &shape, &longer, 100, 0);
    let query = || StepWork {
        answer: Answer::Sparse,
        first_position: 99,
        count: Some(1),
        queries: vec![0; 4 * 64 * 4].into(),
        rows: Vec::new().into(),
        token_ids: Vec::new(),
        ..good()
    };
    let infinite = [&[0, 0x7c], &good().rows[2..]].concat();
    let long = tokens(100 + 1025, 1);
    let works = vec![
        ("layer", StepWork { layer: 3, ..good() }, &["layer", "3", "0 to 2"] as &[_]),
        ("a gap", StepWork { first_position: 101, ..good() }, &["first_position", "101", "100"]),
        ("a repetition", StepWork { first_position: 99, ..good() }, &["first_position", "99", "100"]),
        ("half a row", StepWork { rows: good().rows.slice(..100), ..good() }, &["rows", "100 bytes"]),
        ("an infinite row", StepWork { rows: infinite.into(), ..good() }, &["rows", "element 0", "finite"]),
        ("no ids", StepWork { token_ids: Vec::new(), ..good() }, &["token_ids", "0", "1"]),
        ("longer than the open slots", append_work(lease, &shape, &long, 100, 0), &["rows", "1125", "1024"]),
        ("no query", StepWork { count: Some(0), ..query() }, &["query_count", "0", "1 to 4096"]),
        ("a short query", StepWork { queries: vec![0; 8].into(), ..query() }, &["queries", "8 bytes", "1024 bytes"]),
        ("a query that is not finite", StepWork { queries: [0, 0, 0xc0, 0x7f].repeat(256).into(), ..query() }, &["queries", "value 0"]),
        ("a query beyond", StepWork { first_position: 100, ..query() }, &["first_position", "101", "100"]),
        ("two queries for rows", StepWork { answer: Answer::Rows, count: Some(2), ..query() }, &["query_count", "2"]),
    ];
    let mut cases = Vec::new();
    for (what, work, says) in works {
        let result = send(&engine, work).await.map(|_| ()).map_err(|error| (error.refusal(), error.to_string()));
        cases.push(Case { what, says, refusal: Refusal::InvalidArgument, result });
    }
    check(cases);
    crate::support::append(&engine, lease, &shape, &longer, 100).await;
    check_rows(&engine, lease, &shape, &longer).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_arena_refuses_new_prompts_and_sheds_what_nobody_holds() {
    let folder = tempfile::tempdir().expect("a folder");
    let mut limits = config(folder.path());
    // One slot of this model takes 192 KiB of rows: 20 of them.
    limits.arena_bytes = 20 * 192 * 1024;
    let engine = start(limits);
    let shape = shape(None);
    let model = register(&engine, &shape).await;
    let mut last = None;
    for seed in 0..6 {
        let prompt = tokens(256 * 8, seed);
        let lease = open(&engine, model, &prompt).await.lease;
        crate::support::append(&engine, lease, &shape, &prompt, 0).await;
        check_rows(&engine, lease, &shape, &prompt).await;
        engine.close(lease).await.expect("closed");
        last = Some(prompt);
    }
    assert!(engine.counters().shed_chunks.get() >= 28, "48 chunks went through 20 slots");
    let last = last.expect("a prompt");
    let held = open(&engine, model, &last).await;
    assert_eq!(held.matched_tokens, 2048, "what was used last is still there");
    let refused = of(engine.open(open_request(model, &tokens(256 * 12, 99))).await);
    check(vec![Case { what: "too much", says: &["arena_bytes", "16", "12"], refusal: Refusal::ResourceExhausted, result: refused }]);
    check_rows(&engine, held.lease, &shape, &last).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_poisoned_engine_answers_with_one_clear_code() {
    let folder = tempfile::tempdir().expect("a folder");
    let engine = start(config(folder.path()));
    let model = register(&engine, &shape(None)).await;
    crate::support::crash(engine.clone()).await;
    let cases = vec![
        Case { what: "open", says: &["restarted"], refusal: Refusal::Unavailable, result: of(engine.open(open_request(model, &[])).await) },
        Case { what: "list", says: &["restarted"], refusal: Refusal::Unavailable, result: of(engine.list(None).await) },
        Case {
            what: "register",
            says: &["restarted"],
            refusal: Refusal::Unavailable,
            result: of(engine.register_model(registration(&shape(None))).await),
        },
    ];
    check(cases);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_batch_is_of_one_model_and_rows_fit_a_message() {
    let folder = tempfile::tempdir().expect("a folder");
    let engine = start(EngineConfig { message_bytes_max: 100 << 10, ..config(folder.path()) });
    let shape = shape(None);
    let model = register(&engine, &shape).await;
    let other = engine.register_model(RegisterModel { name: "other".to_owned(), ..registration(&shape) }).await.expect("registered").model;
    let prompt = tokens(300, 1);
    let mut leases = Vec::new();
    for model in [model, other, model] {
        let opened = open(&engine, model, &prompt).await;
        crate::support::append(&engine, opened.lease, &shape, &prompt, opened.matched_tokens as usize).await;
        leases.push(opened.lease);
    }
    let ask = |lease, answer, position| StepWork {
        lease,
        layer: 0,
        answer,
        first_position: position,
        count: Some(1),
        queries: vec![0; 4 * 64 * 4].into(),
        rows: Vec::new().into(),
        token_ids: Vec::new(),
    };
    let batch = leases.iter().map(|&lease| ask(lease, Answer::Sparse, 299)).collect();
    let results = engine.decoder().expect("a decoder").steps(batch).await.expect("answered");
    let refused: Vec<String> = results.into_iter().map(|result| result.map_or_else(|error| error.to_string(), |_| String::new())).collect();
    let expected = format!("steps.lease.sequence_id: {} is outside sequences of one model", leases[1].sequence);
    assert_eq!(refused, [String::new(), expected, String::new()]);

    // Without a calibration all rows are selected: two lanes of 256 bytes and a position.
    send(&engine, ask(leases[0], Answer::Rows, 189)).await.expect("190 rows of two lanes fit into 100 KiB");
    let result = send(&engine, ask(leases[0], Answer::Rows, 199)).await.map(|_| ()).map_err(|error| (error.refusal(), error.to_string()));
    let says = &["rows of ANSWER_ROWS", "106400 bytes", "101376 bytes a message", "limits.message_bytes"];
    check(vec![Case { what: "rows over the limit", says, refusal: Refusal::InvalidArgument, result }]);
}

#[tokio::test(flavor = "multi_thread")]
async fn opaque_state_is_bounded_and_a_direct_holder_stores_its_own() {
    let folder = tempfile::tempdir().expect("a folder");
    let engine = start(config(folder.path()));
    let model = register(&engine, &shape(None)).await;
    let lease = open(&engine, model, &[]).await.lease;
    engine.store_opaque(lease, vec![7; 4072]).await.expect("it fits");
    let says = &["state", "4073 bytes", "0 to 4072 bytes"];
    let result = of(engine.store_opaque(lease, vec![7; 4073]).await);
    let mut cases = vec![Case { what: "too long", says, refusal: Refusal::InvalidArgument, result }];
    engine.attach(Attach { lease, lanes: None }).await.expect("a ticket");
    let result = of(engine.store_opaque(lease, vec![7]).await);
    cases.push(Case { what: "direct", says: &["attached directly"], refusal: Refusal::FailedPrecondition, result });
    check(cases);
}
