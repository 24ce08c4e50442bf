//! `sluice status` against a real daemon.

use std::path::Path;
use std::process::{Command, Output};

use serde_json::Value;
use sluice_proto::v1::sluice_client::SluiceClient;
use sluice_proto::v1::{AttentionKind, LayerSpec, ModelSpec, OpenRequest, RegisterModelRequest, RotaryLayout, RowType};

use crate::support::Place;

fn status(socket: &Path, format: &str) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_sluice"));
    command.env_clear().args(["status", "--format", format, "--socket"]).arg(socket);
    command.output().expect("the binary starts")
}

fn text(bytes: Vec<u8>) -> String {
    String::from_utf8(bytes).expect("UTF-8")
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn status_shows_the_sequences_that_are_held() {
    let place = Place::new();
    let daemon = place.serve(&[]);
    let mut client = SluiceClient::new(daemon.channel().await);
    let layer = LayerSpec { attention: AttentionKind::MhaGqa.into(), query_heads: 2, kv_heads: 1, head_dim: 64, ..LayerSpec::default() };
    let model = ModelSpec {
        name: "shown".to_owned(),
        weights_digest: vec![1].into(),
        row_type: RowType::Bf16.into(),
        rotary_layout: RotaryLayout::HalfSplit.into(),
        layers: vec![layer],
    };
    let request = RegisterModelRequest { model: Some(model), namespace: "tenant-7".to_owned(), ..RegisterModelRequest::default() };
    let model_id = client.register_model(request).await.expect("registered").into_inner().model_id;
    let request = OpenRequest { model_id, token_ids: vec![1, 2, 3], ..OpenRequest::default() };
    let lease = client.open(request).await.expect("opened").into_inner().lease.expect("a lease");

    let output = status(&place.socket(), "json");
    let report: Value = serde_json::from_slice(&output.stdout).unwrap_or_else(|_| panic!("{}", text(output.stderr)));
    assert_eq!((&report["models"], &report["sequences_held"]), (&Value::from(1), &Value::from(1)));
    assert_eq!(report["arena_capacity_bytes"], 64 << 20);
    assert_eq!(report["prefix_miss_tokens"], 3);
    assert!(report["open_slot_bytes"].as_u64().expect("a number") > 0);
    let sequence = &report["sequences"][0];
    assert_eq!(sequence["sequence_id"], lease.sequence_id);
    assert_eq!(sequence["generation"], lease.generation);
    assert_eq!((&sequence["namespace"], &sequence["state"]), (&Value::from("tenant-7"), &Value::from("held")));
    assert_eq!(sequence["holder_pid"], std::process::id());

    let table = text(status(&place.socket(), "table").stdout);
    for word in ["1 held, 0 parked", "64 MiB used", "tenant-7", "stream", "0 of 3 tokens (0.0 %)"] {
        assert!(table.contains(word), "{word} is not in\n{table}");
    }
}

#[test]
fn status_without_a_daemon_says_what_to_do() {
    let place = Place::new();
    let output = status(&place.socket(), "table");
    let said = text(output.stderr);
    assert!(!output.status.success() && output.stdout.is_empty());
    assert!(said.contains("no daemon answers at") && said.contains("sluice serve"), "{said}");
}
