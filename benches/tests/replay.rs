//! Replays of key traces against pools of hot rows.

use std::process::Command;

use serde_json::Value;
use sluice_bench::generator::Random;
use sluice_bench::gpu::replay::{DrawnLanes, Hits, Pool, ReplayJob, Rule, replay, replay_drawn, replay_resized};
use sluice_bench::gpu::trace::{KeyTrace, SourceLane, TraceOrigin};
use sluice_kernels::label::LabelPlan;

fn trace(rows: usize, steps: usize, layers: u16, key: impl Fn(usize, usize, usize) -> u16) -> KeyTrace {
    let origin = TraceOrigin {
        model: "none".to_owned(),
        layers: (0..layers).map(|layer| SourceLane { layer, lane: 0 }).collect(),
        first_position: 0,
        plan: LabelPlan::small(64),
        text_hash: String::new(),
        calibration_hash: String::new(),
        command: String::new(),
    };
    let key = &key;
    let of_step = |step| (0..usize::from(layers)).flat_map(move |layer| (0..rows).map(move |row| key(step, layer, row)));
    KeyTrace::new(origin, rows, steps, (0..steps).flat_map(of_step).collect()).expect("within bounds")
}

#[test]
fn a_case_computed_by_hand() {
    // Two of six rows are selected, three are held. What is held after each step, by lowest key and by last selection:
    let steps: [[u16; 6]; 5] = [
        [5, 1, 4, 0, 3, 2], // selects 0 2; holds 0 2 and 0 2.
        [1, 6, 2, 0, 5, 3], // selects 1 4; drops 0 (key 1 < 2) and 2 (both of step 0, 2 is behind 0): holds 1 2 4 and 0 1 4.
        [0, 0, 8, 7, 0, 0], // selects 2 3: a hit on 2 and none; drops 4 of 1 4 (equal keys), and 0 then 4: holds 1 2 3 and 1 2 3.
        [0, 7, 0, 0, 7, 7], // selects 1 4, the first two of equal keys: a hit each; drops 3 (behind 2): holds 1 2 4 and 1 2 4.
        [9, 9, 1, 0, 2, 0], // selects 0 1: a hit each on 1; drops 2 (key 1 < 2, and step 2 < 3): holds 0 1 4.
    ];
    for (rule, expected) in [(Rule::LowestKey, [0, 0, 1, 1, 1]), (Rule::LeastRecentlyUsed, [0, 0, 0, 1, 1])] {
        let mut pool = Pool::new(2, 3, rule);
        assert_eq!(steps.map(|keys| pool.step(&keys)), expected, "{rule:?}");
        assert_eq!(pool.step(&[0, 0, 0, 0, 9, 8]), 1, "{rule:?}: 4 is held, 5 never was");
    }
}

#[test]
fn a_pool_that_gives_rows_away_forgets_a_like_share_of_them() {
    let mut pool = Pool::new(16, 48, Rule::LowestKey);
    let keys = |first: usize| (0..256).map(|row| u16::from((first..first + 16).contains(&row))).collect::<Vec<u16>>();
    let sets = [0, 100, 200].map(keys);
    let all_hits = |pool: &mut Pool| sets.iter().map(|keys| pool.step(keys)).sum::<usize>();
    assert_eq!((all_hits(&mut pool), all_hits(&mut pool)), (0, 48));
    pool.resize(96);
    assert_eq!(all_hits(&mut pool), 48, "a larger pool forgets nothing");
    // A third of the rows goes, and what is missed comes back in place of the lowest keys, of which all but the step's own are equal.
    pool.resize(64);
    let hits: Vec<usize> = sets.iter().map(|keys| pool.step(keys)).collect();
    assert_eq!(hits.iter().sum::<usize>(), 32, "{hits:?}");
    assert!(hits.iter().all(|hits| (6..16).contains(hits)), "by chance from all sets: {hits:?}");
    assert_eq!(all_hits(&mut pool), 48, "64 rows hold them all");
    pool.resize(16);
    assert!(pool.step(&sets[0]) < 16 && pool.step(&sets[0]) == 16, "room for one set, and chance chose which rows stay");
}

#[test]
fn pools_that_move_follow_the_misses() {
    // Layer 0 goes round three sets of 16 rows, layer 1 stays where it is. Pools of two sets are one too few, and one too many.
    let keys = trace(256, 160, 2, |step, layer, row| {
        let first = if layer == 0 { 40 * (step % 3) } else { 200 };
        u16::from((first..first + 16).contains(&row))
    });
    let job = ReplayJob { selected: 16, capacity: 32, rule: Rule::LowestKey, warm_up: 120, steps: 160 };
    let drawn = DrawnLanes { layers: 2, lanes: 1 };
    let equal = replay_drawn(&keys, &job, drawn);
    assert!(equal[0].rate() < 0.7 && equal[1].rate() == 1.0, "{equal:?}");
    // By hand, after step 99.
    let resized = replay_resized(&keys, &job, drawn, |step, counts| {
        assert!(counts.len() == 2 && counts.iter().all(|counts| counts[0] + counts[1] == 16), "{counts:?}");
        (step == 99).then(|| vec![48, 16])
    });
    assert!(resized.iter().all(|hits| hits.rate() == 1.0), "{resized:?}");
    // By the command, as a decoder moves them.
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("keys");
    keys.write(&path).expect("writes");
    let run = |rows: &str| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_sluice-bench"));
        let command = command.args(["replay", "--ratio", "1/16", "--pool", "2", "--warm-up", "120", "--drawn-layers", "2"]);
        let output = command.args(["--drawn-lanes", "1", "--format", "json", "--moving-rows", rows, "--trace"]).arg(&path).output();
        let report: Value = serde_json::from_slice(&output.expect("sluice-bench starts").stdout).expect("JSON");
        report["results"][0].clone()
    };
    assert_eq!(run("0")["hit_rate_by_layer"], serde_json::json!([equal[0].rate(), 1.0]));
    let moved = run("1");
    assert!(moved["hit_rate_by_layer"][0].as_f64() > Some(0.95) && moved["hit_rate_by_layer"][1].as_f64() > Some(0.95), "{moved}");
    let pools = [0, 1].map(|layer| moved["pool_by_layer"][layer].as_f64().expect("a pool"));
    assert!(pools[0] >= 3.0 - 1.0 / 16.0 && pools[1] >= 1.0 && pools[0] + pools[1] == 4.0, "{moved}");
}

#[test]
fn hits_are_counted_by_layer_and_after_the_warm_up() {
    // Layer 0: the four best rows move on by one each step. Layer 1: they stay.
    let moving = trace(256, 5, 2, |step, layer, row| {
        let first = if layer == 0 { step } else { 100 };
        u16::from((first..first + 4).contains(&row)) * 1000
    });
    for rule in Rule::ALL {
        let job = ReplayJob { selected: 4, capacity: 4, rule, warm_up: 1, steps: 5 };
        assert_eq!(replay(&moving, &job), [Hits { hits: 12, selected: 16 }, Hits { hits: 16, selected: 16 }]);
        let from_the_start = replay(&moving, &ReplayJob { warm_up: 0, ..job });
        assert_eq!(from_the_start, [Hits { hits: 12, selected: 20 }, Hits { hits: 16, selected: 20 }]);
        assert_eq!(from_the_start[0].rate(), 0.6);
        // There and back over five steps is eight steps; with all rows held from a first round on, there are no misses left.
        let round = ReplayJob { selected: 4, capacity: 256, rule, warm_up: 8, steps: 16 };
        let drawn = replay_drawn(&moving, &round, DrawnLanes { layers: 3, lanes: 3 });
        assert_eq!(drawn, [Hits { hits: 5 * 32, selected: 5 * 32 }, Hits { hits: 4 * 32, selected: 4 * 32 }]);
    }
}

#[test]
fn runs_of_equal_keys_hit_as_the_rows_that_they_stretch() {
    let mut random = Random::new(&[3]);
    // Few different keys, so that ties decide often.
    let keys: Vec<Vec<u16>> = (0..40).map(|_| (0..256).map(|_| (random.bits() % 13) as u16).collect()).collect();
    let short = trace(256, 40, 1, |step, _, row| keys[step][row]);
    for rule in Rule::ALL {
        let (mut pool, mut stretched) = (Pool::new(16, 40, rule), Pool::new(16 * 8, 40 * 8, rule));
        let mut long = vec![0; 256 * 8];
        let mut total = 0;
        for step in 0..40 {
            short.stretch((0, step), &mut long);
            let hits = pool.step(short.keys(step, 0));
            assert_eq!(stretched.step(&long), 8 * hits, "{rule:?}, step {step}");
            total += hits;
        }
        assert!(total > 40, "{total} hits");
    }
}

#[test]
fn the_command_prints_every_ratio_pool_and_rule() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("keys");
    let moving = trace(256, 6, 2, |step, layer, row| u16::from((step * layer..step * layer + 16).contains(&row)));
    moving.write(&path).expect("writes");
    let run = |more: &[&str]| {
        let command = Command::new(env!("CARGO_BIN_EXE_sluice-bench")).args(["replay", "--trace"]).arg(&path).args(more).output();
        let output = command.expect("sluice-bench starts");
        (
            output.status.success(),
            String::from_utf8_lossy(if output.status.success() { &output.stdout } else { &output.stderr }).into_owned(),
        )
    };
    let (_, text) = run(&["--ratio", "1/16", "--pool", "1", "--pool", "2", "--warm-up", "2", "--format", "json"]);
    let report: Value = serde_json::from_str(&text).expect("JSON");
    let results = report["results"].as_array().expect("results");
    assert_eq!(results.len(), 4);
    for result in results {
        // Layer 1 moves by a row a step: 15 of 16 selected rows are known.
        assert_eq!((result["selected"].as_u64(), result["hit_rate"].as_f64()), (Some(16), Some(0.968_75)), "{result}");
        assert_eq!(result["hit_rate_by_layer"], serde_json::json!([1.0, 0.9375]));
    }
    assert_eq!((&results[1]["rule"], &results[2]["pool"]), (&"least_recently_used".into(), &2.into()));
    let (_, table) = run(&["--warm-up", "2"]);
    assert!(table.contains("| n x 1/16 = 16 | 1 k  | lowest key ") && table.contains("0.969 | 1.000 / 0.938"), "{table}");
    let bounds: [(&[&str], &str); 2] =
        [(&["--warm-up", "2", "--pool", "0"], "--pool: 0 is outside"), (&["--warm-up", "6"], "--warm-up: 6 is outside 0 to 5")];
    for (more, part) in bounds {
        let (passed, error) = run(more);
        assert!(!passed && error.contains(part), "{error}");
    }
}
