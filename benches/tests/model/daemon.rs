//! The worker with a real daemon, in processes of their own. Needs the binary `sluice`: beside `sluice-bench`, or named by SLUICE_BIN.

use std::path::Path;
use std::process::Command;

use serde_json::Value;
use sluice_bench::daemon::{DaemonSpec, LocalDaemon};
use sluice_bench::model::{AttentionLayers, Hidden, Model, Phase, Pieces, ServedLayers, SessionSteps, Weights};
use sluice_client::{Attach, Client, ClientConfig, ModelRegistration, OpenOptions, RotaryLayout, Session};
use sluice_kernels::device::DeviceKind;
use sluice_kernels::shape::RowType;

use crate::support::{gemma, kept_ids, prefill, random_ids, tiny, write_ids};

fn perplexity(gguf: &Path, folder: &Path, flags: &[&str]) -> Value {
    let mut command = Command::new(env!("CARGO_BIN_EXE_sluice-bench"));
    command.arg("perplexity").arg("--gguf").arg(gguf).args(["--tokens", "1500", "--scored", "60", "--format", "json"]);
    command.arg("--ids").arg(write_ids(folder, "text.json", &random_ids(1500)));
    command.arg("--calibrate-on").arg(write_ids(folder, "other.json", &random_ids(400)));
    let output = command.args(["--exact-tokens", "64", "--floor-tokens", "16"]).args(flags).output().expect("sluice-bench runs");
    assert!(output.status.success(), "{flags:?}: {}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).expect("one JSON object")
}

/// A model with window layers through both ways to attach, and with the daemon stopped after the open: the numbers of this process
/// alone, to the bit. The text is longer than the open slots hold, so chunks are sealed and read back, except where the daemon is stopped.
#[test]
fn both_ways_and_a_stopped_daemon_give_the_same_bits() {
    let folder = tempfile::tempdir().expect("a folder");
    let gguf = tiny("gemma3", 41, folder.path());
    let alone = perplexity(&gguf, folder.path(), &["--attach", "process"]);
    assert_ne!(alone["sparse_nll"], alone["dense_nll"], "nothing was left out");
    let ways: [&[&str]; 4] = [
        &["--attach", "direct"],
        &["--attach", "direct", "--hot-rows", "300"],
        &["--attach", "stream"],
        &["--attach", "direct", "--stop-daemon"],
    ];
    for flags in ways {
        let report = perplexity(&gguf, folder.path(), flags);
        for key in ["sparse_nll", "added_nll", "token_change_p99", "mass_kept", "label_bytes_per_row"] {
            assert_eq!(report[key], alone[key], "{key} with {flags:?}");
        }
    }
}

fn open(client: &Client, model: &Model, prompt: &[u32], attach: Attach) -> Session {
    let registration = ModelRegistration {
        name: "gemma".to_owned(),
        weights_digest: model.digest().to_vec(),
        shape: model.shape(RowType::F16).expect("a shape"),
        rotary: RotaryLayout::HalfSplit,
        namespace: String::new(),
    };
    let registered = client.register_model(&registration, None).expect("a model");
    client.open(&registered, prompt, &OpenOptions { attach, open_slots: 8, ..OpenOptions::default() }).expect("a session")
}

/// Logits of the token after the prompt, and how many of its tokens were held already.
fn next_logits(client: &Client, model: &Model, prompt: &[u32], attach: Attach) -> (usize, Vec<f32>) {
    let session = open(client, model, prompt, attach);
    let matched = session.matched_tokens();
    let shape = model.shape(RowType::F16).expect("a shape");
    let mut layers = ServedLayers::new(shape, Box::new(SessionSteps::new(session)), None);
    let mut last: Option<Hidden> = None;
    let mut each = |hidden: Hidden| {
        last = Some(hidden.last());
        Ok(())
    };
    model.forward_pieces(&prompt[matched..], prefill(512), &mut layers, &mut each).expect("prefill");
    let logits = model.logits(&last.expect("a last token")).expect("logits");
    // A few more tokens, so that the sequence goes on behind the shared prefix.
    let steps = Pieces { tokens: 1, phase: Phase::Decode };
    model.forward_pieces(&prompt[..4], steps, &mut layers, &mut |_| Ok(())).expect("steps");
    assert_eq!(layers.position(), prompt.len() + 4);
    (matched, logits)
}

/// A second open of a prompt goes on from the held prefix, window layers included, with the bits of the first run.
#[test]
fn a_prefix_hit_of_a_real_model_gives_the_same_bits() {
    let spec = DaemonSpec {
        binary: std::env::var_os("SLUICE_BIN")
            .map(Into::into)
            .or_else(|| Some(Path::new(env!("CARGO_BIN_EXE_sluice-bench")).with_file_name("sluice"))),
        arena_parent: "/dev/shm".into(),
        arena_bytes: 1 << 30,
        label_bytes: 0,
        open_bytes: 1 << 30,
        sequence_tokens: 1 << 15,
        message_bytes: 1 << 26,
        device: DeviceKind::Cpu,
        threads: 2,
    };
    let daemon = LocalDaemon::start(&spec).expect("a daemon");
    let client = Client::connect(daemon.socket().to_str().expect("utf-8"), ClientConfig::default()).expect("a client");
    let model = Model::load(&gemma(), Weights::F32).expect("the model");
    // Two whole prefill pieces and 100 tokens: the second run starts where a piece of the first did.
    let prompt = &kept_ids("vim-manual-16k.ids.json")[..1124];
    let direct = Attach::Direct { device: DeviceKind::Cpu, threads: 2 };
    let (matched, first) = next_logits(&client, &model, prompt, direct);
    assert_eq!(matched, 0);
    for attach in [direct, Attach::Stream] {
        let (matched, again) = next_logits(&client, &model, prompt, attach);
        assert_eq!(matched, 1024, "{attach:?}");
        assert!(again.iter().map(|logit| logit.to_bits()).eq(first.iter().map(|logit| logit.to_bits())), "{attach:?}: other logits");
    }
    daemon.stop().expect("the daemon ends");
}
