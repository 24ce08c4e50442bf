//! Key traces: the file, how lanes draw from it, and making one out of a recording.

use std::fs::File;
use std::path::Path;
use std::process::Command;

use serde_json::Value;
use sluice_bench::generator::Random;
use sluice_bench::gpu::trace::{KeyTrace, SourceLane, TraceError, TraceOrigin};
use sluice_kernels::label::{Calibrator, LabelPlan};
use sluice_kernels::recording::{RecordingHeader, RecordingWriter};
use sluice_kernels::shape::{LaneKind, LayerShape, ModelShape, RowType};

fn origin(layers: u16) -> TraceOrigin {
    TraceOrigin {
        model: "none".to_owned(),
        layers: (0..layers).map(|layer| SourceLane { layer, lane: 0 }).collect(),
        first_position: 900,
        plan: LabelPlan::small(64),
        text_hash: String::new(),
        calibration_hash: "ab".to_owned(),
        command: "by hand".to_owned(),
    }
}

fn trace(rows: usize, steps: usize, layers: u16) -> KeyTrace {
    let mut random = Random::new(&[7, rows as u64, steps as u64]);
    let keys = (0..rows * steps * usize::from(layers)).map(|_| random.bits() as u16).collect();
    KeyTrace::new(origin(layers), rows, steps, keys).expect("within bounds")
}

fn file(trace: &KeyTrace) -> Vec<u8> {
    let mut bytes = Vec::new();
    trace.write_to(&mut bytes).expect("memory takes everything");
    bytes
}

#[test]
fn a_trace_survives_its_file() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("keys");
    let written = trace(512, 5, 3);
    written.write(&path).expect("writes");
    let read = KeyTrace::read(&path).expect("reads");
    assert_eq!(read, written);
    assert_eq!((read.rows, read.steps, read.layers), (512, 5, 3));
    // By the description of the format: `[step][layer][row]`, u16, little-endian, behind the line.
    let bytes = std::fs::read(&path).expect("the file");
    let keys = &bytes[bytes.iter().position(|&byte| byte == b'\n').expect("a line") + 1..];
    assert_eq!(keys.len(), 2 * 5 * 3 * 512);
    for (step, layer, row) in [(0, 0, 0), (1, 0, 0), (0, 1, 0), (4, 2, 511), (3, 1, 77)] {
        let at = 2 * ((step * 3 + layer) * 512 + row);
        assert_eq!(read.keys(step, layer)[row], u16::from(keys[at]) | u16::from(keys[at + 1]) << 8);
    }
}

/// The error of a file whose header was changed and whose keys were not.
fn refused(from: &str, to: &str) -> String {
    let bytes = file(&trace(256, 2, 1));
    let end = bytes.iter().position(|&byte| byte == b'\n').expect("a line");
    let line = String::from_utf8(bytes[..end].to_vec()).expect("JSON");
    assert!(line.contains(from), "{line}");
    let changed = [line.replace(from, to).as_bytes(), &bytes[end..]].concat();
    KeyTrace::read_from(changed.as_slice()).expect_err(to).to_string()
}

#[test]
fn hostile_files_are_refused_by_name() {
    for (from, to, part) in [
        ("sluice-keys", "sluice-recording", "\"sluice-recording\" version 1"),
        ("\"version\":1", "\"version\":2", "version 2, this build reads"),
        ("\"rows\":256", "\"rows\":255", "rows: 255, expected a power of two"),
        ("\"rows\":256", "\"rows\":128", "rows: 128"),
        ("\"rows\":256", "\"rows\":33554432", "rows: 33554432"),
        ("\"rows\":256", "\"rows\":-1", "header"),
        ("\"rows\":256", "\"rows\":512", "key bytes: 1024, expected 2048"),
        ("\"steps\":2", "\"steps\":1", "steps: 1, expected 2 to"),
        ("\"steps\":2", "\"steps\":18446744073709551615", "steps: 18446744073709551615"),
        ("\"rows\":256,\"steps\":2", "\"rows\":16777216,\"steps\":65536", "key bytes: 2199023255552, expected at most"),
        ("[{\"layer\":0,\"lane\":0}]", "[]", "layers: 0, expected 1 to"),
        ("\"lane\":0}]", "\"lane\":0},{\"layer\":1,\"lane\":0}]", "key bytes: 1024, expected 2048"),
        ("\"rows\":256", "\"rows\":256,\"more\":0", "unknown field"),
    ] {
        let error = refused(from, to);
        assert!(error.contains(part), "{to}: {error}");
    }
    let bytes = file(&trace(256, 2, 1));
    let long = [&bytes[..], &[0]].concat();
    let error = KeyTrace::read_from(long.as_slice()).expect_err("one byte too many").to_string();
    assert!(error.contains("key bytes: 1025, expected 1024"), "{error}");
    assert!(matches!(KeyTrace::read_from([].as_slice()), Err(TraceError::Header(_))));
    assert!(matches!(KeyTrace::read(Path::new("/nowhere/keys")), Err(TraceError::Io(_))));
}

#[test]
fn no_file_makes_the_reader_panic() {
    let bytes = file(&trace(256, 2, 2));
    for length in (0..bytes.len()).step_by(3) {
        assert!(KeyTrace::read_from(&bytes[..length]).is_err(), "cut at {length}");
    }
    let header = bytes.iter().position(|&byte| byte == b'\n').expect("a line") + 1;
    for at in 0..header {
        for byte in [0, b'9', b'"', b'}', b'\n', 0xff] {
            let mut changed = bytes.clone();
            changed[at] = byte;
            if let Ok(read) = KeyTrace::read_from(changed.as_slice()) {
                assert_eq!(read.keys(1, 1).len(), read.rows, "byte {byte} at {at}");
            }
        }
    }
    assert!(KeyTrace::new(origin(2), 256, 2, vec![0; 1023]).is_err());
}

#[test]
fn lanes_draw_in_equal_parts_and_consecutive_steps() {
    let trace = trace(256, 160, 3);
    let (layers, lanes, period) = (32, 8, 2 * 159);
    let mut served = [0; 3];
    let mut starts = vec![Vec::new(); 3];
    for (layer, lane) in (0..layers).flat_map(|layer| (0..lanes).map(move |lane| (layer, lane))) {
        let (source, first) = trace.lane_source(layer, lane, lanes, 0);
        served[source] += 1;
        let mut visits = [0; 160];
        let mut last = first;
        for step in 0..period {
            let (same, at) = trace.lane_source(layer, lane, lanes, step);
            assert_eq!(same, source, "a lane keeps its layer");
            assert!(step == 0 || at.abs_diff(last) == 1, "layer {layer}, lane {lane}: {last} to {at} in step {step}");
            visits[at] += 1;
            last = at;
        }
        assert_eq!(trace.lane_source(layer, lane, lanes, period), (source, first));
        // There and back: every step twice, the ends once.
        assert!((visits[0], visits[159]) == (1, 1) && visits[1..159].iter().all(|&visits| visits == 2), "{visits:?}");
        starts[source].push((first, trace.lane_source(layer, lane, lanes, 1).1));
    }
    served.sort_unstable();
    assert_eq!(served, [85, 85, 86]);
    for starts in &mut starts {
        // Each quarter of the trace is where about a quarter of a layer's lanes start, and no two lanes run alike.
        for quarter in 0..4 {
            let within = starts.iter().filter(|(first, _)| first / 40 == quarter).count();
            assert!((17..=26).contains(&within), "{within} lanes start in quarter {quarter}");
        }
        let lanes = starts.len();
        starts.sort_unstable();
        starts.dedup();
        assert_eq!(starts.len(), lanes, "lanes of one layer start at times of their own");
    }
}

#[test]
fn a_longer_lane_has_the_keys_in_runs() {
    let trace = trace(256, 3, 2);
    let mut long = vec![0; 256 * 16];
    trace.stretch((1, 2), &mut long);
    assert!(long.iter().enumerate().all(|(row, &key)| key == trace.keys(2, 1)[row / 16]));
    let mut same = vec![0; 256];
    trace.stretch((0, 0), &mut same);
    assert_eq!(same, trace.keys(0, 0));
}

const TOKENS: usize = 600;
const STEPS: usize = 4;
const DIM: usize = 64;
const HEADS: usize = 4;
const LANES: usize = 2;

/// Queries `[token][head][channel]` and keys `[token][lane][channel]` of the full-attention layer, about as large as a model's.
fn attention() -> (Vec<f32>, Vec<f32>) {
    let mut random = Random::new(&[11]);
    let mut draw = |count: usize| (0..count).map(|_| (random.bits() as u16 as f32 / 65_536.0 - 0.5) * 3.0).collect::<Vec<f32>>();
    (draw(TOKENS * HEADS * DIM), draw(TOKENS * LANES * DIM))
}

fn shape() -> ModelShape {
    let selected = LayerShape {
        kind: LaneKind::Selected,
        query_heads: HEADS as u16,
        kv_heads: LANES as u16,
        head_dim: DIM as u16,
        softmax_scale: 0.125,
    };
    let window = LayerShape { kind: LaneKind::Window { tokens: 64 }, ..selected };
    ModelShape::unscaled(RowType::F16, vec![window, selected])
}

fn record(path: &Path, selected: &[Vec<u32>]) {
    let header = RecordingHeader {
        format: "sluice-recording".to_owned(),
        version: 1,
        model: "random".to_owned(),
        text_hash: "cd".to_owned(),
        seed: 1,
        shape: shape(),
    };
    let (queries, keys) = attention();
    let mut writer = RecordingWriter::new(File::create(path).expect("a file"), &header).expect("header");
    for (first, tokens) in [(0, 500), (500, 97), (597, 3)] {
        let part = |values: &[f32], width: usize| values[first * width..(first + tokens) * width].to_vec();
        let (queries, keys) = (part(&queries, HEADS * DIM), part(&keys, LANES * DIM));
        writer.attention(1, first as u64, tokens as u64, &queries, &keys).expect("a block");
    }
    writer.selection(1, (TOKENS - 2) as u64, selected).expect("a block");
    writer.finish().expect("the end");
}

fn make(folder: &Path, more: &[&str]) -> Result<Value, String> {
    let path = |name: &str| folder.join(name).to_string_lossy().into_owned();
    let output = Command::new(env!("CARGO_BIN_EXE_sluice-bench"))
        .args(["trace", "--recording", &path("recording"), "--calibration", &path("calibration"), "--out", &path("keys")])
        .args(["--exact-tokens", "64", "--format", "json"])
        .args(more)
        .output()
        .expect("sluice-bench starts");
    let error = String::from_utf8_lossy(&output.stderr).into_owned();
    if output.status.success() { Ok(serde_json::from_slice(&output.stdout).expect("JSON")) } else { Err(error) }
}

/// Sum over the lane's heads of the softmax over the first `rows` keys, in f64.
fn importance(step: usize, lane: usize, rows: usize) -> Vec<f64> {
    let (queries, keys) = attention();
    let mut sum = vec![0.0; rows];
    for head in 2 * lane..2 * lane + 2 {
        let query = &queries[((TOKENS - STEPS + step) * HEADS + head) * DIM..][..DIM];
        let dot = |row: usize| -> f64 {
            let key = &keys[(row * LANES + lane) * DIM..][..DIM];
            query.iter().zip(key).map(|(&q, &k)| f64::from(q) * f64::from(k)).sum()
        };
        let weights: Vec<f64> = (0..rows).map(|row| (0.125 * dot(row)).exp()).collect();
        let total: f64 = weights.iter().sum();
        sum.iter_mut().zip(&weights).for_each(|(sum, weight)| *sum += weight / total);
    }
    sum
}

/// First `sinks` rows, then rows by descending key, equal keys by position.
fn selection(keys: &[u16], count: usize, sinks: usize) -> Vec<u32> {
    let mut order: Vec<usize> = (sinks..keys.len()).collect();
    order.sort_by_key(|&row| (u16::MAX - keys[row], row));
    let mut rows: Vec<u32> = (0..sinks).chain(order.into_iter().take(count - sinks)).map(|row| row as u32).collect();
    rows.sort_unstable();
    rows
}

#[test]
fn a_recording_becomes_the_keys_that_decode_steps_have() {
    let folder = tempfile::tempdir().expect("a folder");
    let plan: LabelPlan = "64@8".parse().expect("a plan");
    let (queries, keys) = attention();
    let mut calibrator = Calibrator::new(&shape(), &plan, "ef", 1);
    calibrator.add(1, &keys, Some(&queries));
    let calibration = serde_json::to_vec(&calibrator.finish().expect("tokens")).expect("JSON");
    std::fs::write(folder.path().join("calibration"), calibration).expect("a file");

    record(&folder.path().join("recording"), &[(0..40).collect(), (100..140).collect()]);
    let report = make(folder.path(), &["--steps", "4"]).expect("a trace");
    // The first step is token 596: (597 - 64) / 256 = 2 whole chunks before the horizon.
    assert_eq!((report["rows"].as_u64(), report["steps"].as_u64(), report["first_position"].as_u64()), (Some(512), Some(4), Some(596)));
    assert_eq!(report["layers"], serde_json::json!(["1.0", "1.1"]));
    assert_eq!((report["selections"].as_u64(), report["selections_equal"].as_u64()), (Some(2), Some(0)), "made up");
    let trace = KeyTrace::read(&folder.path().join("keys")).expect("reads");
    assert_eq!((trace.origin.text_hash.as_str(), trace.origin.calibration_hash.as_str()), ("cd", "ef"));
    for (step, lane) in (0..STEPS).flat_map(|step| (0..LANES).map(move |lane| (step, lane))) {
        for (row, (&key, exact)) in trace.keys(step, lane).iter().zip(importance(step, lane, 512)).enumerate() {
            // A key is the upper bits of the importance's f32, counted from 2^-121.
            let keyed = f64::from(f32::from_bits((u32::from(key) << 14) + (6 << 23)));
            assert!((keyed / exact).ln().abs() < 0.1, "step {step}, lane {lane}, row {row}: {keyed}, exact {exact}");
        }
    }

    record(&folder.path().join("recording"), &[0, 1].map(|lane| selection(trace.keys(STEPS - 2, lane), 40, 4)));
    let report = make(folder.path(), &["--steps", "4"]).expect("a trace");
    assert_eq!((report["selections"].as_u64(), report["selections_equal"].as_u64()), (Some(2), Some(2)));
    for (steps, part) in
        [("1", "--steps: 1 is outside 2"), ("601", "--steps: 601 is outside 2 to 600"), ("500", "no chunk before the horizon")]
    {
        let error = make(folder.path(), &["--steps", steps]).expect_err(part);
        assert!(error.contains(part), "{error}");
    }
    std::fs::write(folder.path().join("calibration"), "{}").expect("a file");
    assert!(make(folder.path(), &[]).expect_err("no calibration").contains("--calibration"));
}
