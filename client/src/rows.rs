//! Rows as they travel: `[lane][token][row]`, a row being key then value in the model's row type, little-endian.

use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};
use sluice_kernels::shape::{LayerShape, RowType};

/// Encodes keys and values into rows. `keys` and `values` are `[token][lane][head_dim]`; `rows` is replaced by `[lane][token][row bytes]`.
///
/// # Panics
/// The lengths of keys and values differ, or are no whole number of tokens: an error of the caller.
pub fn encode_rows(layer: &LayerShape, row_type: RowType, keys: &[f32], values: &[f32], rows: &mut Vec<u8>) {
    let (lanes, channels) = (layer.lanes(), usize::from(layer.head_dim));
    let token_values = lanes * channels;
    assert!(keys.len() == values.len() && keys.len().is_multiple_of(token_values), "{} keys, {} values", keys.len(), values.len());
    let tokens = keys.len() / token_values;
    rows.clear();
    rows.reserve(tokens * lanes * layer.row_bytes(row_type));
    for lane in 0..lanes {
        for token in 0..tokens {
            let first = token * token_values + lane * channels;
            encode(row_type, &keys[first..first + channels], rows);
            encode(row_type, &values[first..first + channels], rows);
        }
    }
}

/// Appends values in the row type. Rows are little-endian, as every machine that Sluice serves.
fn encode(row_type: RowType, values: &[f32], bytes: &mut Vec<u8>) {
    const PART: usize = 64;
    for part in values.chunks(PART) {
        match row_type {
            RowType::F32 => bytes.extend_from_slice(bytemuck::cast_slice(part)),
            RowType::F16 => {
                let mut halves = [f16::ZERO; PART];
                halves[..part.len()].convert_from_f32_slice(part);
                bytes.extend_from_slice(bytemuck::cast_slice(&halves[..part.len()]));
            }
            RowType::Bf16 => {
                let mut halves = [bf16::ZERO; PART];
                halves[..part.len()].convert_from_f32_slice(part);
                bytes.extend_from_slice(bytemuck::cast_slice(&halves[..part.len()]));
            }
        }
    }
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
    use sluice_kernels::shape::LaneKind;

    use super::*;

    #[test]
    fn rows_are_lane_major_with_key_before_value() {
        let layer = LayerShape { kind: LaneKind::Selected, query_heads: 2, kv_heads: 2, head_dim: 64, softmax_scale: 0.125 };
        // Two tokens, two lanes: key channel c of (token t, lane l) is 1000 t + 100 l + c, its value the negative of that.
        let keys: Vec<f32> = (0..256).map(|i| (1000 * (i / 128) + 100 * (i / 64 % 2) + i % 64) as f32).collect();
        let values: Vec<f32> = keys.iter().map(|key| -key).collect();
        for row_type in [RowType::F32, RowType::F16, RowType::Bf16] {
            let mut rows = vec![7];
            encode_rows(&layer, row_type, &keys, &values, &mut rows);
            assert_eq!(rows.len(), 2 * 2 * layer.row_bytes(row_type));
            let at = |lane: usize, token: usize, channel: usize| {
                let element = row_type.element_bytes();
                let first = ((lane * 2 + token) * 128 + channel) * element;
                let bytes = &rows[first..first + element];
                match row_type {
                    RowType::F32 => f32::from_le_bytes(bytes.try_into().expect("4 bytes")),
                    RowType::F16 => half::f16::from_le_bytes(bytes.try_into().expect("2 bytes")).to_f32(),
                    RowType::Bf16 => half::bf16::from_le_bytes(bytes.try_into().expect("2 bytes")).to_f32(),
                }
            };
            // Exact in f16 and f32; bf16 keeps 8 bits.
            let tolerance = if row_type == RowType::Bf16 { 4.0 } else { 0.0 };
            assert!((at(1, 0, 3) - 103.0).abs() <= tolerance);
            assert!((at(1, 0, 64 + 3) + 103.0).abs() <= tolerance);
            assert!((at(0, 1, 63) - 1063.0).abs() <= tolerance);
        }
    }
}
