//! Rows as they travel: `[lane][token][row]`, a row being key then value in the model's row type, little-endian.

use std::ops::Range;

use sluice_kernels::rows::{PackJob, pack_rows};
use sluice_kernels::shape::ModelShape;

/// Encodes keys and values of some lanes of a layer into rows. `keys` and `values` are `[token][lane][head_dim]`; `rows` is replaced by
/// `[lane][token][row bytes]`.
///
/// # Panics
/// The lengths of keys and values differ, or are no whole number of tokens: an error of the caller.
pub fn encode_rows(shape: &ModelShape, layer: usize, lanes: Range<usize>, keys: &[f32], values: &[f32], rows: &mut Vec<u8>) {
    let (of_layer, scales) = (&shape.layers[layer], shape.scales_of(layer).part(lanes.clone()));
    let (lanes, head_dim, row_type) = (lanes.len(), usize::from(of_layer.head_dim), shape.row_type);
    let job = PackJob { keys, values, lanes, head_dim, row_type, scales: &scales };
    rows.resize(job.tokens() * lanes * of_layer.row_bytes(row_type), 0);
    pack_rows(&job, rows);
}

/// f32 values as little-endian bytes.
pub(crate) fn f32_bytes(values: &[f32]) -> Vec<u8> {
    bytemuck::cast_slice(values).to_vec()
}

/// Little-endian bytes into f32 values of the same count.
pub(crate) fn read_f32(bytes: &[u8], values: &mut [f32]) {
    for (value, bytes) in values.iter_mut().zip(bytes.chunks_exact(4)) {
        *value = f32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
    }
}

#[cfg(test)]
mod tests {
    use sluice_kernels::rows::read_elements;
    use sluice_kernels::scales::RowScale;
    use sluice_kernels::shape::{LaneKind, LayerShape, RowType};

    use super::*;

    #[test]
    fn rows_are_lane_major_with_key_before_value() {
        let layer = LayerShape { kind: LaneKind::Selected, query_heads: 3, kv_heads: 3, head_dim: 64, softmax_scale: 0.125 };
        // Two tokens, two lanes: key channel c of (token t, lane l) is 1000 t + 100 l + c, its value the negative of that.
        let keys: Vec<f32> = (0..256).map(|i| (1000 * (i / 128) + 100 * (i / 64 % 2) + i % 64) as f32).collect();
        let values: Vec<f32> = keys.iter().map(|key| -key).collect();
        for row_type in [RowType::F32, RowType::F16, RowType::Bf16, RowType::Fp8] {
            let mut shape = ModelShape::unscaled(row_type, vec![layer]);
            if row_type == RowType::Fp8 {
                // The first lane is not encoded: its scales would leave nothing of the numbers.
                let scale = |lane: usize| RowScale { key: [1e-9, 3.0, 5.0][lane], value: [1e-9, 4.0, 6.0][lane] };
                shape.scales = vec![(0..3).map(scale).collect::<Vec<_>>().into()];
            }
            let mut rows = vec![7];
            encode_rows(&shape, 0, 1..3, &keys, &values, &mut rows);
            assert_eq!(rows.len(), 2 * 2 * layer.row_bytes(row_type));
            let at = |lane: usize, token: usize, channel: usize| {
                let (element, scale) = (row_type.element_bytes(), shape.scales_of(0).of(lane + 1));
                let first = ((lane * 2 + token) * 128 + channel) * element;
                let mut number = [0.0];
                read_elements(row_type, &rows[first..first + element], if channel < 64 { scale.key } else { scale.value }, &mut number);
                number[0]
            };
            // Exact in f16 and f32; bf16 keeps 8 bits, e4m3 four.
            let tolerance = match row_type {
                RowType::F32 | RowType::F16 => 0.0,
                RowType::Bf16 => 1.0 / 256.0,
                RowType::Fp8 => 1.0 / 16.0,
            };
            for (number, expected) in [(at(1, 0, 3), 103.0), (at(1, 0, 64 + 3), -103.0), (at(0, 1, 63), 1063.0)] {
                assert!((number - expected).abs() <= tolerance * expected.abs(), "{row_type:?}: {number}, expected {expected}");
            }
        }
    }
}
