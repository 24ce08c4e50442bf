use sluice_kernels::label::{Calibrator, LabelPlan};
use sluice_kernels::shape::{LaneKind, LayerShape, ModelShape, RowType};

use crate::data::{Layer, Shape};

fn model() -> ModelShape {
    let layer = |kind| LayerShape { kind, query_heads: 6, kv_heads: 2, head_dim: 64, softmax_scale: 0.125 };
    ModelShape::unscaled(RowType::F16, vec![layer(LaneKind::Window { tokens: 32 }), layer(LaneKind::Selected)])
}

#[test]
fn statistics_are_those_of_all_tokens_however_they_are_cut() {
    let mut layer = Layer::new(Shape { lanes: 2, group: 3, dim: 64, tokens: 1000, row_type: RowType::F32 }, 1);
    let queries = layer.queries(1000);
    let plan = LabelPlan::small(64);
    let mut results = Vec::new();
    for piece in [1000, 1, 333] {
        let mut calibrator = Calibrator::new(&model(), &plan, "text", 9);
        for (keys, queries) in layer.keys.chunks(piece * 128).zip(queries.chunks(piece * 384)) {
            calibrator.add(0, keys, Some(queries));
            calibrator.add(1, keys, Some(queries));
        }
        results.push(calibrator.finish().expect("tokens were added"));
    }
    assert!(results[0] == results[1] && results[0] == results[2]);
    let calibration = &results[0];
    calibration.check(&model()).expect("it fits its model");
    assert_eq!((calibration.tokens, calibration.seed, calibration.text_hash.as_str()), (1000, 9, "text"));
    for lane in 0..2 {
        let entry = &calibration.layers[0].lanes[lane];
        for channel in 0..64 {
            let mut sum = 0.0f64;
            for token in 0..1000 {
                for head in lane * 3..lane * 3 + 3 {
                    sum += f64::from((queries[(token * 6 + head) * 64 + channel] * layer.key(token, lane)[channel]).abs());
                }
            }
            let mean = sum / 1000.0;
            assert!((f64::from(entry.magnitude[channel]) - mean).abs() < 1e-4 * mean, "lane {lane}, channel {channel}");
            // Five of a thousand keys lie below the low end, five above the high end.
            let below = (0..1000).filter(|&token| layer.key(token, lane)[channel] < entry.low[channel]).count();
            let above = (0..1000).filter(|&token| layer.key(token, lane)[channel] > entry.high[channel]).count();
            assert_eq!((below, above), (5, 5), "lane {lane}, channel {channel}");
        }
        let falls = |pair: &[u16]| entry.magnitude[usize::from(pair[0])] >= entry.magnitude[usize::from(pair[1])];
        assert!(entry.order.windows(2).all(falls), "lane {lane}");
    }
}

#[test]
fn without_queries_keys_count_and_ties_go_to_the_lower_channel() {
    let mut calibrator = Calibrator::new(&model(), &LabelPlan::large(64), "", 0);
    assert_eq!(calibrator.finish(), None);
    // Lane 0: channel c has magnitude c % 8, so every magnitude is shared by eight channels. Lane 1: one constant.
    for _ in 0..10 {
        let keys: Vec<f32> = (0..128).map(|at| if at < 64 { -((at % 8) as f32) } else { 2.0 }).collect();
        calibrator.add(1, &keys, None);
    }
    let calibration = calibrator.finish().expect("tokens were added");
    calibration.check(&model()).expect("constant channels get a range too");
    let mut expected: Vec<u16> = (0..64).collect();
    expected.sort_by_key(|channel| (7 - channel % 8, *channel));
    assert_eq!(calibration.layers[0].lanes[0].order, expected);
    assert_eq!(calibration.layers[0].lanes[1].order, (0..64).collect::<Vec<u16>>());
}

#[test]
fn quantiles_of_a_long_text_come_from_a_bounded_sample() {
    let mut calibrator = Calibrator::new(&model(), &LabelPlan::small(64), "", 5);
    let mut layer = Layer::new(Shape { lanes: 2, group: 1, dim: 64, tokens: 20_000, row_type: RowType::F32 }, 2);
    calibrator.add(1, &layer.keys, None);
    let calibration = calibrator.finish().expect("tokens were added");
    assert!(!layer.queries(1).is_empty());
    for lane in 0..2 {
        let entry = &calibration.layers[0].lanes[lane];
        for channel in 0..64 {
            let outside =
                (0..20_000).filter(|&token| !(entry.low[channel]..=entry.high[channel]).contains(&layer.key(token, lane)[channel])).count();
            // 200 are expected; a sample of 2,048 tokens misses that by a factor of a few at most.
            assert!((40..600).contains(&outside), "lane {lane}, channel {channel}: {outside} outside");
        }
    }
}
