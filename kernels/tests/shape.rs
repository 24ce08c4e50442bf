//! Shapes as files have them, and shapes that are refused.

use proptest::prelude::*;
use sluice_kernels::scales::{LaneScales, RowScale};
use sluice_kernels::shape::{LaneKind, LayerShape, ModelShape, RowType, ShapeError};

const LAYER: LayerShape = LayerShape { kind: LaneKind::Selected, query_heads: 4, kv_heads: 2, head_dim: 64, softmax_scale: 0.125 };

fn fp8(scales: Vec<Vec<RowScale>>) -> ModelShape {
    ModelShape { row_type: RowType::Fp8, layers: vec![LAYER; 2], scales: scales.into_iter().map(LaneScales::from).collect() }
}

#[test]
fn a_shape_without_scales_is_written_as_before_there_were_any() {
    let shape = ModelShape::unscaled(RowType::Bf16, vec![LAYER]);
    let layer = r#"{"kind":"selected","query_heads":4,"kv_heads":2,"head_dim":64,"softmax_scale":0.125}"#;
    let text = format!(r#"{{"row_type":"bf16","layers":[{layer}]}}"#);
    assert_eq!(serde_json::to_string(&shape).expect("JSON"), text, "chunk names hang on it");
    assert_eq!(serde_json::from_str::<ModelShape>(&text).expect("a shape"), shape);
}

proptest! {
    #[test]
    fn scales_come_back_to_the_bit(numbers in prop::collection::vec(prop::num::f32::NORMAL | prop::num::f32::POSITIVE, 8)) {
        let lane = |pair: &[f32]| RowScale { key: pair[0], value: pair[1] };
        let shape = fp8(numbers.chunks(4).map(|layer| layer.chunks(2).map(lane).collect()).collect());
        let text = serde_json::to_string(&shape).expect("JSON");
        prop_assert!(text.contains(r#""row_type":"f8_e4m3""#) && text.contains(r#""scales":[[{"key":"#), "{}", text);
        prop_assert_eq!(serde_json::from_str::<ModelShape>(&text).expect("a shape"), shape);
    }
}

#[test]
fn scales_have_bounds_and_belong_to_fp8_rows() {
    let good = RowScale { key: 1e-30, value: 1e30 };
    fp8(vec![vec![good; 2]; 2]).check().expect("scales at their bounds");
    let refused = |shape: ModelShape| shape.check().expect_err("refused");
    let layers = refused(fp8(vec![vec![good; 2]]));
    assert_eq!(layers, ShapeError::ScaledLayers { count: 1, expected: 2, layers: 2, row_type: RowType::Fp8 });
    let unwanted = refused(ModelShape { row_type: RowType::F16, ..fp8(vec![vec![good; 2]; 2]) });
    assert_eq!(unwanted, ShapeError::ScaledLayers { count: 2, expected: 0, layers: 2, row_type: RowType::F16 });
    let lanes = refused(fp8(vec![vec![good; 2], vec![good; 3]]));
    assert_eq!(lanes, ShapeError::ScaledLanes { layer: 1, count: 3, lanes: 2 });
    for bad in [0.0, -1.0, 1e-31, 1e31, f32::NAN, f32::INFINITY] {
        let key = refused(fp8(vec![vec![good, RowScale { key: bad, ..good }], vec![good; 2]]));
        assert_eq!(key, ShapeError::RowScale { layer: 0, field: "key_scales", lane: 1, value: bad.to_string() });
        let value = refused(fp8(vec![vec![good; 2], vec![RowScale { value: bad, ..good }, good]]));
        assert_eq!(value.to_string(), format!("layers[1].value_scales[0]: {bad} is outside 1e-30 to 1e30"));
    }
}
