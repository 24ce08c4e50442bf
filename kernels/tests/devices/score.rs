use sluice_kernels::device::{LabelJob, ScoreJob};
use sluice_kernels::label::{LabelCoder, LabelPlan};
use sluice_kernels::shape::RowType;

use crate::data::{Layer, Shape};
use crate::{all_devices, cpu};

/// Keys of all lanes, from the definitions alone: quantised keys against the integer query, the sample's sum, linear exponentials, sum over heads.
fn expected_keys(layer: &Layer, coder: &LabelCoder, query: &[f32]) -> Vec<u16> {
    let Shape { lanes, group, dim, tokens, .. } = layer.shape;
    let mut keys = Vec::new();
    for lane in 0..lanes {
        let mut importance = vec![0.0f64; tokens];
        for head in lane * group..(lane + 1) * group {
            let q = &query[head * dim..(head + 1) * dim];
            let mut scores = vec![0.0f64; tokens];
            let mut kept = 0;
            for part in coder.plan.groups() {
                let range = kept..kept + usize::from(part.channels);
                kept = range.end;
                let w = |c: usize| q[usize::from(coder.lanes[lane].channels[c])] * coder.lanes[lane].step[c];
                let m = range.clone().map(|c| w(c).abs()).fold(0.0f32, f32::max);
                for (token, score) in scores.iter_mut().enumerate() {
                    for c in range.clone() {
                        let x = layer.key(token, lane)[usize::from(coder.lanes[lane].channels[c])];
                        let top = ((1u32 << part.bits) - 1) as f32;
                        let code = ((x - coder.lanes[lane].low[c]) * (1.0 / coder.lanes[lane].step[c]) + 0.5).floor().clamp(0.0, top);
                        let weight = (w(c) * (127.0 / m) + 0.5).floor();
                        *score += f64::from(m / 127.0) * f64::from(weight) * f64::from(code) * f64::from(layer.geometry.softmax_scale);
                    }
                }
            }
            let normaliser = sampled_sum(&scores);
            for (importance, score) in importance.iter_mut().zip(&scores) {
                let y = (score * std::f64::consts::LOG2_E - normaliser).clamp(-126.0, 7.0);
                let below = 2f64.powf(y.floor());
                *importance += below + below * y.fract().rem_euclid(1.0);
            }
        }
        for value in importance {
            let bits = (value.clamp(2f64.powi(-121), 127.999_99) as f32).to_bits();
            keys.push(((bits >> 14) - (6 << 9)) as u16);
        }
    }
    keys
}

/// Logarithm to base 2 of a head's sum of exponentials over the sample.
fn sampled_sum(scores: &[f64]) -> f64 {
    let chunks = scores.len() / 256;
    let mut stride = 1;
    while stride < 16 && chunks > 64 * stride {
        stride *= 2;
    }
    let top = scores.iter().fold(f64::MIN, |top, &score| top.max(score));
    let mut sum = 0.0;
    for (chunk, scores) in scores.chunks(256).enumerate() {
        let all: f64 = scores.iter().map(|score| (score - top).exp()).sum();
        let some = scores.chunks(16).skip(5 * chunk % stride).step_by(stride).flatten();
        let some: f64 = some.map(|score| (score - top).exp()).sum();
        sum += if chunk == 0 || chunk == chunks - 1 { all } else { stride as f64 * some };
    }
    top / std::f64::consts::LN_2 + sum.log2()
}

fn labels_of(layer: &Layer, coder: &LabelCoder) -> Vec<Vec<u8>> {
    let mut device = sluice_kernels::device::reference::Reference;
    let label = |page: &Vec<u8>| {
        let mut labels = vec![0; layer.shape.lanes * 256 * coder.plan.label_bytes()];
        sluice_kernels::device::Device::label(&mut device, &LabelJob { geometry: &layer.geometry, page, coder }, &mut labels);
        labels
    };
    layer.pages.iter().map(label).collect()
}

#[test]
fn keys_are_within_one_step_of_the_definition() {
    let cases = [
        ("16@4+32@2", 2, 4, 128, 1024),
        ("64@4", 3, 2, 128, 512),
        ("8@16+8@8+16@4+24@2", 2, 3, 64, 768),
        ("8@2", 1, 1, 64, 256),
        ("24@2", 2, 7, 96, 512),
        ("16@16", 1, 8, 256, 4608),
        // Samples of one block in 2, 4, 8 and 16.
        ("16@4", 1, 2, 64, 65 * 256),
        ("16@4", 1, 1, 64, 130 * 256),
        ("8@4+8@2", 1, 3, 32, 257 * 256),
        ("8@4", 1, 4, 32, 600 * 256),
    ];
    for (seed, (plan, lanes, group, dim, tokens)) in cases.into_iter().enumerate() {
        let plan: LabelPlan = plan.parse().expect("a plan");
        let mut layer = Layer::new(Shape { lanes, group, dim, tokens, row_type: RowType::F16 }, 100 + seed as u64);
        let (coder, query) = (layer.coder(&plan), layer.queries(1));
        let labels = labels_of(&layer, &coder);
        let labels: Vec<&[u8]> = labels.iter().map(Vec::as_slice).collect();
        let expected = expected_keys(&layer, &coder, &query);
        for mut device in all_devices() {
            let mut keys = vec![0; lanes * tokens];
            device.score(&ScoreJob { geometry: &layer.geometry, query: &query, labels: &labels, coder: &coder }, &mut keys);
            for (index, (&got, &expected)) in keys.iter().zip(&expected).enumerate() {
                assert!(got.abs_diff(expected) <= 1, "{}: {plan}, key {index} is {got}, expected {expected}", device.name());
            }
        }
        let distinct: std::collections::HashSet<u16> = expected.iter().copied().collect();
        assert!(distinct.len() > 100, "{plan}: the keys tell rows apart: {} distinct", distinct.len());
    }
}

#[test]
fn keys_do_not_depend_on_threads() {
    let plan: LabelPlan = "16@4+32@2".parse().expect("a plan");
    for lanes in [1, 3] {
        let mut layer = Layer::new(Shape { lanes, group: 4, dim: 64, tokens: 5120, row_type: RowType::F16 }, 7);
        let (coder, query) = (layer.coder(&plan), layer.queries(1));
        let labels = labels_of(&layer, &coder);
        let labels: Vec<&[u8]> = labels.iter().map(Vec::as_slice).collect();
        for level in sluice_kernels::device::cpu::Level::available() {
            let keys = [1, 2, 3].map(|threads| {
                let mut keys = vec![0; lanes * 5120];
                cpu(level, threads)
                    .score(&ScoreJob { geometry: &layer.geometry, query: &query, labels: &labels, coder: &coder }, &mut keys);
                keys
            });
            assert!(keys[0] == keys[1] && keys[0] == keys[2], "{level:?}, {lanes} lanes");
        }
    }
}

#[test]
fn a_query_of_zeros_makes_all_rows_alike() {
    let plan: LabelPlan = "16@4+8@16".parse().expect("a plan");
    let mut layer = Layer::new(Shape { lanes: 1, group: 2, dim: 64, tokens: 512, row_type: RowType::F32 }, 3);
    let coder = layer.coder(&plan);
    let labels = labels_of(&layer, &coder);
    let labels: Vec<&[u8]> = labels.iter().map(Vec::as_slice).collect();
    for mut device in all_devices() {
        let mut keys = vec![0; 512];
        let query = [0.0; 128];
        device.score(&ScoreJob { geometry: &layer.geometry, query: &query, labels: &labels, coder: &coder }, &mut keys);
        // Two heads of 1/512 each make 2^-8, 113 binades above 2^-121.
        assert!(keys.iter().all(|&key| key.abs_diff(113 * 512) <= 1), "{}: {:?}", device.name(), &keys[..4]);
    }
}

#[test]
fn a_row_that_the_sample_missed_has_the_largest_key_and_changes_no_other() {
    let plan: LabelPlan = "8@4".parse().expect("a plan");
    // 66 chunks: of chunk 3 the sample has the odd blocks.
    let mut layer = Layer::new(Shape { lanes: 1, group: 1, dim: 32, tokens: 66 * 256, row_type: RowType::F32 }, 5);
    let coder = layer.coder(&plan);
    let keys_with_needle = |row: usize, device: &mut dyn sluice_kernels::device::Device| {
        let mut codes = vec![0; 66 * 256 * 8];
        codes[(3 * 256 + row) * 8..][..8].fill(15);
        let mut labels = vec![0; 66 * 256 * 4];
        for (codes, labels) in codes.chunks(256 * 8).zip(labels.chunks_mut(256 * 4)) {
            sluice_kernels::label::encode(&plan, codes, labels);
        }
        let labels: Vec<&[u8]> = labels.chunks(256 * 4).collect();
        let mut keys = vec![0; 66 * 256];
        device.score(&ScoreJob { geometry: &layer.geometry, query: &[100.0; 32], labels: &labels, coder: &coder }, &mut keys);
        let needle = keys.remove(3 * 256 + row);
        (needle, keys)
    };
    for mut device in all_devices() {
        let (needle, others) = keys_with_needle(5, device.as_mut());
        assert_eq!(needle, u16::MAX, "{}", device.name());
        // 1/16,896 is 2^-14.044, on the line from 2^-15 to 2^-14 at 0.956.
        let expected = 106 * 512 + 489;
        assert!(others.iter().all(|&key| key.abs_diff(expected) <= 1), "{}: {:?}", device.name(), &others[..4]);
        // Sampled, it stands for two, and leaves nothing to the others.
        let (needle, others) = keys_with_needle(16 + 5, device.as_mut());
        assert!(needle.abs_diff(120 * 512) <= 1, "{}: {needle}", device.name());
        assert!(others.iter().all(|&key| key == 0), "{}: {:?}", device.name(), &others[..4]);
    }
}
