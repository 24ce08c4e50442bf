//! `sluice-bench stress` and `attach` from outside, against the real daemon, on a context that fits a test.
//!
//! The daemon's binary is `SLUICE_BIN`, or `sluice` beside `sluice-bench`.

use std::process::{Command, Output};

use serde_json::Value;

const SHAPE: [&str; 12] =
    ["--context", "4Ki", "--layers", "2", "--kv-heads", "2", "--query-heads", "6", "--head-dim", "64", "--threads", "2"];

fn bench(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_sluice-bench")).args(arguments).output().expect("sluice-bench starts")
}

fn json(output: &Output) -> Value {
    let (out, errors) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{errors}");
    assert_eq!(out.lines().count(), 1, "one object on standard output: {out}");
    assert!(errors.contains("fill") && errors.contains("steps") | errors.contains("decode"), "progress on standard error: {errors}");
    serde_json::from_str(&out).expect("JSON")
}

fn stress(attach: &str) -> Value {
    let mut arguments = vec!["stress", "--attach", attach, "--steps", "4", "--prefill-tokens", "8", "--recall-steps", "2"];
    arguments.extend(["--ratio", "1/16", "--ratio", "1/4", "--format", "json"]);
    arguments.extend(SHAPE);
    json(&bench(&arguments))
}

#[test]
fn both_ways_report_the_same_selection_and_bytes() {
    let reports = ["direct", "stream"].map(stress);
    for (report, attach) in reports.iter().zip(["direct", "stream"]) {
        assert_eq!(report["attach"], attach);
        assert_eq!(report["context_tokens"], 4096);
        assert_eq!(report["layers"], 2);
        assert_eq!(report["budget_ratio"], 0.0625);
        assert_eq!(report["second_open_appended_tokens"], 0);
        // Sealed: the context once (4096 tokens x 2 layers x 2 lanes x 256 B), however many sequences opened it, and nothing else.
        assert_eq!(report["arena_used_bytes"], 4096 * 2 * 2 * 256);
        let positive = ["dense_step_ms", "sparse_step_ms", "sparse_floor_ms", "dense_read_gb_per_s", "memory_read_gb_per_s"];
        for key in positive.iter().chain(&["gather_gb_per_s", "daemon_overhead_bytes", "second_open_ms", "fork_ms"]) {
            assert!(report[key].as_f64().is_some_and(|value| value > 0.0), "{key}: {}", report[key]);
        }
        let runs = report["runs"].as_array().expect("runs");
        // Lengths 4097 to 4100: horizon 3840, 257 to 260 newest rows, k = 257 or 1025; labels of 8 bytes; two layers of two lanes.
        for (run, selected) in runs.iter().zip([257.0, 1025.0]) {
            let rows = 4.0 * (selected + 258.5) * 256.0;
            assert_eq!(run["bytes_per_step"].as_f64(), Some(rows + 4.0 * 3840.0 * 8.0));
        }
        assert!(runs[1]["mass_kept"].as_f64() > runs[0]["mass_kept"].as_f64(), "four times the rows keep more");
    }
    for run in 0..2 {
        for key in ["recall", "mass_kept", "mass_bound"] {
            let [direct, stream] = reports.each_ref().map(|report| report["runs"][run][key].as_f64().expect(key));
            assert!((direct - stream).abs() < 1e-12, "{key}: {direct} direct, {stream} stream");
            assert!((0.3..=1.0).contains(&direct), "{key}: {direct}");
        }
    }
}

#[test]
fn the_ways_to_attach_are_compared_step_by_step() {
    let folder = tempfile::tempdir().expect("a folder");
    let plot = folder.path().join("attach.svg");
    let mut arguments = vec!["attach", "--steps", "12", "--format", "json", "--plot", plot.to_str().expect("UTF-8")];
    arguments.extend(SHAPE);
    let report = json(&bench(&arguments));
    assert_eq!(report["steps"], 12);
    for key in ["direct_to_in_process", "stream_to_direct"] {
        let bound = |end: &str| report[key][end].as_f64().expect("a bound");
        assert!(bound("low") <= bound("median") && bound("median") <= bound("high"), "{}", report[key]);
    }
    assert!(std::fs::read_to_string(plot).expect("the plot").contains("in process"));
}

#[test]
fn what_cannot_be_done_ends_with_a_reason_and_no_output() {
    let cases: [(&[&str], &str); 4] = [
        (&["stress", "--context", "1000"], "--context: 1000"),
        (&["stress", "--head-dim", "100"], "head_dim: 100"),
        (&["attach", "--steps", "0"], "--steps: 0"),
        (&["stress", "--context", "4Ki", "--sluice-bin", "/nowhere/sluice"], "/nowhere/sluice"),
    ];
    for (arguments, reason) in cases {
        let output = bench(arguments);
        assert!(!output.status.success() && output.stdout.is_empty(), "{arguments:?}");
        let errors = String::from_utf8_lossy(&output.stderr);
        assert!(errors.contains(reason), "{errors}");
    }
}
