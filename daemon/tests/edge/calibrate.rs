//! `sluice calibrate` over recordings whose important channels are known beforehand.

use std::path::Path;
use std::process::{Command, Output};

use serde_json::Value;
use sluice_kernels::recording::{FORMAT, RecordingHeader, RecordingWriter, VERSION};
use sluice_kernels::shape::{LaneKind, LayerShape, ModelShape, RowType};

const HEAD_DIM: usize = 64;
const QUERY_HEADS: usize = 4;
const LANES: usize = 2;
const TOKENS: usize = 300;

fn shape() -> ModelShape {
    let layer = |kind| LayerShape { kind, query_heads: 4, kv_heads: 2, head_dim: 64, softmax_scale: 0.125 };
    ModelShape::unscaled(RowType::F16, vec![layer(LaneKind::Window { tokens: 128 }), layer(LaneKind::Selected)])
}

/// A number in (-1, 1) that every place of a tensor has for itself.
fn noise(place: usize) -> f32 {
    let mut x = place as u64 + 0x1234_5678;
    x = (x ^ (x >> 33)).wrapping_mul(0xff51_afd7_ed55_8ccd);
    x = (x ^ (x >> 33)).wrapping_mul(0xc4ce_b9fe_1a85_ec53);
    ((x >> 40) as f32 / (1 << 23) as f32) - 1.0
}

/// How much louder a channel of a lane is: lane 0 rises with the channel, lane 1 falls.
fn loudness(lane: usize, channel: usize) -> f32 {
    let rank = if lane == 0 { channel } else { HEAD_DIM - 1 - channel };
    1.25_f32.powi(rank as i32)
}

fn keys() -> Vec<f32> {
    let at = |index: usize| noise(index) * loudness(index / HEAD_DIM % LANES, index % HEAD_DIM);
    (0..TOKENS * LANES * HEAD_DIM).map(at).collect()
}

fn queries() -> Vec<f32> {
    (0..TOKENS * QUERY_HEADS * HEAD_DIM).map(|index| noise(index + 7_000_000)).collect()
}

/// Records the full-attention layer in blocks of `block` tokens, with what must be passed over between them.
fn record(path: &Path, block: usize) {
    let header = RecordingHeader {
        format: FORMAT.to_owned(),
        version: VERSION,
        model: "test".to_owned(),
        text_hash: "abc123".to_owned(),
        seed: 5,
        shape: shape(),
    };
    let mut writer = RecordingWriter::new(Vec::new(), &header).expect("memory");
    let (queries, keys) = (queries(), keys());
    let (query_row, key_row) = (QUERY_HEADS * HEAD_DIM, LANES * HEAD_DIM);
    for first in (0..TOKENS).step_by(block) {
        let last = (first + block).min(TOKENS);
        let (queries, keys) = (&queries[first * query_row..last * query_row], &keys[first * key_row..last * key_row]);
        let silent = vec![0.5; queries.len()];
        writer.attention(0, first as u64, (last - first) as u64, &silent, &vec![0.5; keys.len()]).expect("memory");
        writer.attention(1, first as u64, (last - first) as u64, queries, keys).expect("memory");
        writer.selection(1, last as u64, &[vec![0, 3], vec![]]).expect("memory");
    }
    std::fs::write(path, writer.finish().expect("memory")).expect("written");
}

fn calibrate(recording: &Path, output: &Path, more: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_sluice"));
    command.arg("calibrate").arg(recording).arg("--output").arg(output).args(["--format", "json"]).args(more);
    command.output().expect("the binary starts")
}

fn read(path: &Path) -> Value {
    serde_json::from_slice(&std::fs::read(path).expect("written")).expect("JSON")
}

#[test]
fn the_loudest_channels_come_first_and_ranges_cover_their_keys() {
    let folder = tempfile::tempdir().expect("a folder");
    let (recording, output) = (folder.path().join("r"), folder.path().join("c.json"));
    record(&recording, 64);
    let run = calibrate(&recording, &output, &[]);
    assert!(run.status.success(), "{}", String::from_utf8_lossy(&run.stderr));
    let summary: Value = serde_json::from_slice(&run.stdout).expect("JSON");
    assert_eq!(summary["tokens"], 300);
    assert_eq!(summary["plan"], "8@4+16@2");
    let calibration = read(&output);
    assert_eq!((&calibration["text_hash"], &calibration["seed"]), (&Value::from("abc123"), &Value::from(5)));
    assert_eq!(calibration["layers"].as_array().expect("a list").len(), 1, "window layers are not calibrated");
    assert_eq!(calibration["layers"][0]["layer"], 1);
    let lane = |lane: usize| &calibration["layers"][0]["lanes"][lane];
    // A step of 1.25 is far above the noise of 300 tokens for channels some ranks apart.
    let rank = |lane_index: usize, channel: usize| {
        let order = lane(lane_index)["order"].as_array().expect("a list");
        order.iter().position(|entry| entry == channel).expect("a permutation")
    };
    assert!(rank(0, 63) < 3 && rank(0, 0) > 60 && rank(0, 40) < rank(0, 34), "{}", lane(0)["order"]);
    assert!(rank(1, 0) < 3 && rank(1, 63) > 60 && rank(1, 20) < rank(1, 26), "{}", lane(1)["order"]);
    let expected_mean = mean_product(1, 10);
    let mean = lane(1)["magnitude"][10].as_f64().expect("a number");
    assert!((mean / expected_mean - 1.0).abs() < 1e-4, "{mean} instead of {expected_mean}");
    let column: Vec<f32> = keys().into_iter().skip(HEAD_DIM + 10).step_by(LANES * HEAD_DIM).collect();
    let (low, high) = (lane(1)["low"][10].as_f64().expect("low") as f32, lane(1)["high"][10].as_f64().expect("high") as f32);
    let outside = column.iter().filter(|&&value| value < low || value > high).count();
    assert!(outside <= 4 && low < 0.0 && high > 0.0, "{outside} of 300 keys outside {low} to {high}");
}

/// The statistic by its definition, in f64.
fn mean_product(lane: usize, channel: usize) -> f64 {
    let (queries, keys) = (queries(), keys());
    let mut sum = 0.0;
    for token in 0..TOKENS {
        let key = f64::from(keys[(token * LANES + lane) * HEAD_DIM + channel]);
        for head in lane * 2..lane * 2 + 2 {
            sum += (f64::from(queries[(token * QUERY_HEADS + head) * HEAD_DIM + channel]) * key).abs();
        }
    }
    sum / TOKENS as f64
}

#[test]
fn the_result_does_not_depend_on_how_the_recording_was_cut() {
    let folder = tempfile::tempdir().expect("a folder");
    let mut files = Vec::new();
    for block in [1, 64, 300] {
        let (recording, output) = (folder.path().join("r"), folder.path().join(format!("{block}.json")));
        record(&recording, block);
        assert!(calibrate(&recording, &output, &["--plan", "32@4", "--seed", "9"]).status.success());
        files.push(std::fs::read(output).expect("written"));
    }
    assert!(files[0] == files[1] && files[1] == files[2]);
}

#[test]
fn what_cannot_be_used_is_refused_and_nothing_is_written() {
    let folder = tempfile::tempdir().expect("a folder");
    let (recording, output) = (folder.path().join("r"), folder.path().join("c.json"));
    record(&recording, 100);
    let good = std::fs::read(&recording).expect("written");
    let refuse = |bytes: &[u8], more: &[&str], expected: &str| {
        std::fs::write(&recording, bytes).expect("written");
        let run = calibrate(&recording, &output, more);
        let text = String::from_utf8(run.stderr).expect("UTF-8");
        assert!(!run.status.success() && text.contains(expected), "{expected}: {text}");
        assert!(!output.exists() && std::fs::read_dir(folder.path()).expect("a folder").count() == 1, "{expected}: something was written");
    };
    refuse(&good, &["--plan", "80@4"], "80 channels in all, head_dim is 64");
    refuse(&good, &["--plan", "tiny"], "\"tiny\": expected small, large, or groups");
    refuse(&good[..good.len() - 1], &[], "recording: ");
    refuse(b"{}\n", &[], "recording.header");
    let text = |bytes: &[u8], from: &str, to: &str| {
        let line = bytes.iter().position(|&byte| byte == b'\n').expect("a line");
        let header = String::from_utf8(bytes[..line].to_vec()).expect("UTF-8").replace(from, to);
        [header.as_bytes(), &bytes[line..]].concat()
    };
    refuse(&text(&good, "\"version\":1", "\"version\":2"), &[], "version 2, this build reads");
    refuse(&text(&good, "\"head_dim\":64", "\"head_dim\":96"), &[], "recording.block[0].payload_bytes");
    let mut infinite = good.clone();
    let place = good.iter().position(|&byte| byte == b'\n').expect("a line") + 1 + 32;
    infinite[place..place + 4].copy_from_slice(&f32::INFINITY.to_le_bytes());
    refuse(&infinite, &[], "recording.block[0].queries: inf at element 0, expected finite numbers");
}
