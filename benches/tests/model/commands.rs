//! The commands of `sluice-bench` that run a model, as a script calls them.

use std::fs::File;
use std::io::BufReader;
use std::process::Command;

use serde_json::Value;
use sluice_bench::model::input::hash_tokens;
use sluice_bench::model::{CALIBRATION_SEED, Model, Weights, calibrate};
use sluice_kernels::label::{Calibrator, LabelPlan};
use sluice_kernels::recording::{Block, RecordingReader};
use sluice_kernels::shape::RowType;

use crate::support::{random_ids, reference, tiny, write_ids};

fn bench() -> Command {
    Command::new(env!("CARGO_BIN_EXE_sluice-bench"))
}

fn json(command: &mut Command) -> Value {
    let output = command.output().expect("sluice-bench runs");
    assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).expect("one JSON object")
}

#[test]
fn perplexity_dense_and_sparse() {
    let folder = tempfile::tempdir().expect("a folder");
    let gguf = tiny("gemma3", 31, folder.path());
    let ids = random_ids(800);
    let (text, calibration) = (write_ids(folder.path(), "text.json", &ids), write_ids(folder.path(), "other.json", &random_ids(300)));
    let expected = reference(&gguf, &ids, &[0]).losses;
    let expected = expected[expected.len() - 100..].iter().sum::<f64>() / 100.0;
    let plot = folder.path().join("plot.svg");
    let common = |command: &mut Command| {
        command.arg("perplexity").arg("--gguf").arg(&gguf).arg("--ids").arg(&text).args(["--tokens", "800", "--scored", "100"]);
        command.args(["--format", "json"]);
    };
    let mut command = bench();
    common(&mut command);
    let dense = json(command.arg("--dense"));
    let number = |report: &Value, key: &str| report[key].as_f64().unwrap_or_else(|| panic!("{key} in {report}"));
    assert!((number(&dense, "dense_nll") - expected).abs() < 1e-3, "{dense}, by the independent implementation {expected}");
    assert_eq!((dense["tokens"].as_u64(), dense["scored_tokens"].as_u64()), (Some(800), Some(100)));
    assert!(dense["sparse_nll"].is_null() && number(&dense, "tokens_per_s") > 0.0);

    let mut command = bench();
    common(&mut command);
    command.arg("--calibrate-on").arg(&calibration).args(["--attach", "process", "--ratio", "1", "--exact-tokens", "64"]);
    let all = json(command.arg("--plot").arg(&plot));
    assert!((number(&all, "sparse_nll") - number(&all, "dense_nll")).abs() < 2e-3, "{all}");
    assert_eq!(all["dense_nll"], dense["dense_nll"]);
    assert!((number(&all["mass_kept"], "5") - 1.0).abs() < 1e-3, "{all}");
    assert_eq!(
        (all["label_bytes_per_row"].as_u64(), all["budget_ratio"].as_f64(), all["attach"].as_str()),
        (Some(8), Some(1.0), Some("process"))
    );
    assert!(std::fs::read_to_string(&plot).expect("a plot").contains("Sluice"));

    let mut command = bench();
    common(&mut command);
    command.arg("--calibrate-on").arg(&calibration).args(["--attach", "process", "--ratio", "1/16", "--exact-tokens", "64"]);
    let sparse = json(command.args(["--floor-tokens", "16", "--label", "8@2"]));
    assert!(number(&sparse["mass_kept"], "5") < 0.999, "{sparse}");
    assert!(number(&sparse, "added_nll").abs() > 1e-6, "{sparse}");
    assert_eq!(sparse["label_bytes_per_row"].as_u64(), Some(2));
    assert!(number(&sparse, "bytes_per_token") < number(&all, "bytes_per_token"));
}

/// A dense recording holds the queries and keys of every token, so that calibrating from it equals calibrating on the text.
#[test]
fn a_recording_calibrates_like_the_text_itself() {
    let folder = tempfile::tempdir().expect("a folder");
    let gguf = tiny("gemma3", 32, folder.path());
    let ids = random_ids(600);
    let text = write_ids(folder.path(), "text.json", &ids);
    let out = folder.path().join("recording");
    let mut command = bench();
    command.arg("record").arg("--gguf").arg(&gguf).arg("--ids").arg(&text).args(["--tokens", "600"]).arg("--out").arg(&out);
    assert!(command.status().expect("sluice-bench runs").success());
    let model = Model::load(&gguf, Weights::F32).expect("the model");
    let mut reader = RecordingReader::new(BufReader::new(File::open(&out).expect("a recording"))).expect("a header");
    assert_eq!(reader.header().shape, model.shape(RowType::F16).expect("a shape"));
    assert_eq!(reader.header().text_hash, hash_tokens(&ids));
    let plan = LabelPlan::large(64);
    let mut calibrator = Calibrator::new(&reader.header().shape, &plan, &reader.header().text_hash, CALIBRATION_SEED);
    let mut next = 0;
    while let Some(block) = reader.next_block().expect("a block") {
        let Block::Attention { layer, first_position, queries, keys } = block else { panic!("a selection of a dense run") };
        assert_eq!((layer, first_position), (5, next), "the one full-attention layer, without gaps");
        next += (keys.len() / 128) as u64;
        calibrator.add(5, &keys, Some(&queries));
    }
    assert_eq!(next, 600);
    let direct = calibrate(&model, &plan, &ids, &mut |_| ()).expect("a calibration");
    assert_eq!(calibrator.finish().expect("a calibration"), direct.labels);
}

#[test]
fn a_trace_holds_what_decode_steps_selected() {
    let folder = tempfile::tempdir().expect("a folder");
    let gguf = tiny("qwen2", 33, folder.path());
    let text = write_ids(folder.path(), "text.json", &random_ids(700));
    let calibration = write_ids(folder.path(), "other.json", &random_ids(200));
    let out = folder.path().join("recording");
    let mut command = bench();
    command
        .arg("record")
        .arg("--gguf")
        .arg(&gguf)
        .arg("--ids")
        .arg(&text)
        .args(["--tokens", "700", "--decode", "3"])
        .arg("--out")
        .arg(&out);
    command.arg("--calibrate-on").arg(&calibration).args(["--attach", "process", "--exact-tokens", "64", "--floor-tokens", "16"]);
    assert!(command.status().expect("sluice-bench runs").success());
    let mut reader = RecordingReader::new(BufReader::new(File::open(&out).expect("a recording"))).expect("a header");
    let mut selections = Vec::new();
    while let Some(block) = reader.next_block().expect("a block") {
        if let Block::Selection { layer, position, lanes } = block {
            // 700 tokens, 64 of them exact: the horizon is 512, and 700 / 16 rounded up are selected before it.
            assert_eq!(lanes.len(), 2);
            for lane in &lanes {
                assert_eq!(lane.len(), 44);
                assert_eq!(lane[..4], [0, 1, 2, 3], "the first tokens are always selected");
                assert!(lane.is_sorted_by(|left, right| left < right) && lane[43] < 512, "{lane:?}");
            }
            assert_ne!(lanes[0], lanes[1]);
            selections.push((position, layer));
        }
    }
    let expected: Vec<(u64, u16)> = (697..700).flat_map(|position| (0..3).map(move |layer| (position, layer))).collect();
    assert_eq!(selections, expected);
}

#[test]
fn looking_ahead_is_counted_in_rows() {
    let folder = tempfile::tempdir().expect("a folder");
    let gguf = tiny("gemma3", 35, folder.path());
    let text = write_ids(folder.path(), "text.json", &random_ids(1100));
    let model = Model::load(&gguf, Weights::F32).expect("the model");
    let plan = LabelPlan::large(64);
    let labels = calibrate(&model, &plan, &random_ids(300), &mut |_| ()).expect("a calibration").labels;
    let calibration = folder.path().join("calibration.json");
    std::fs::write(&calibration, serde_json::to_vec(&labels).expect("JSON")).expect("a file");
    let mut command = bench();
    command.arg("look-ahead").arg("--gguf").arg(&gguf).arg("--ids").arg(&text).args(["--tokens", "1100", "--steps", "9", "--warm-up", "2"]);
    command.arg("--calibration").arg(&calibration).args(["--pool", "1", "--pool", "3", "--ratio", "1/8", "--format", "json"]);
    let found = json(&mut command);
    // 1,100 tokens, 256 of them exact: the horizon is 768, of which at least 256 are selected.
    assert_eq!((found["steps"].as_u64(), found["selected"].as_u64(), &found["layers"]), (Some(7), Some(256), &serde_json::json!([5])));
    let agreement = found["agreement"][0].as_f64().expect("a number");
    assert!(agreement > 256.0 / 768.0 && agreement < 1.0, "better than chance: {found}");
    for outcome in found["outcomes"].as_array().expect("one of each pool") {
        let [missed, after, ahead, extra] =
            ["missed", "missed_after", "ahead", "extra"].map(|key| outcome[key][0].as_f64().expect("a number"));
        assert!(missed > 0.0 && ahead > 0.0 && (after + ahead - missed - extra).abs() < 1e-9, "{outcome}");
        if outcome["pool"] == 1 {
            // A pool of k holds what was predicted, and nothing else; there are two lanes.
            assert!((after - 512.0 * (1.0 - agreement)).abs() < 1e-6, "{outcome}, {agreement}");
        }
    }
}

#[test]
fn bad_flags_are_refused_by_name() {
    let folder = tempfile::tempdir().expect("a folder");
    let gguf = tiny("qwen2", 34, folder.path());
    let text = write_ids(folder.path(), "text.json", &random_ids(50));
    let cases: [(&[&str], &str); 5] = [
        (&["--tokens", "51", "--scored", "5", "--dense"], "--tokens: 51, the text has 50"),
        (&["--tokens", "50", "--scored", "50", "--dense"], "--scored: 50 is outside 1 to 49"),
        (&["--tokens", "50", "--scored", "5", "--dense", "--block", "0"], "--block: 0"),
        (&["--tokens", "50", "--scored", "5", "--attach", "process"], "--calibrate-on: missing"),
        (&["--tokens", "50", "--scored", "5", "--endpoint", "/nowhere/sluice.sock", "--dense", "--text", "a"], "cannot be used with"),
    ];
    for (flags, word) in cases {
        let output = bench().arg("perplexity").arg("--gguf").arg(&gguf).arg("--ids").arg(&text).args(flags).output().expect("runs");
        let error = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(!output.status.success() && error.contains(word), "{flags:?}: {error}");
    }
}
