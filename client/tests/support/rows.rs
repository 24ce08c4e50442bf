//! Rows that are only hashes of where they belong: (path of token ids, position, layer, lane, channel). Whoever reads a row can say
//! whether it is the right one. Every value is a multiple of 1/64 in -1..1; of fp8 rows, a multiple of 1/16 times the scale of its lane.

use sluice_kernels::scales::RowScale;
use sluice_kernels::shape::{LaneKind, LayerShape, ModelShape, RowType};

use super::e4m3::e4m3_code;

/// The finaliser of SplitMix64.
pub fn mix(mut z: u64) -> u64 {
    z = z.wrapping_add(0x9E37_79B9_7F4A_7C15);
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

/// One hash per position, of all token ids up to it.
pub fn path_hashes(token_ids: &[u32]) -> Vec<u64> {
    let mut hash = 0;
    let step = |&id: &u32| {
        hash = mix(hash ^ u64::from(id));
        hash
    };
    token_ids.iter().map(step).collect()
}

fn fraction(hash: u64) -> f32 {
    ((hash % 129) as f32 - 64.0) / 64.0
}

/// Key, then value, of one lane at one position, as they are stored.
pub fn row_values(path: u64, layer: usize, lane: usize, shape: &ModelShape) -> Vec<f32> {
    let scaled = |(index, number): (usize, f32)| {
        let scale = shape.scales_of(layer).of(lane);
        number * if index < usize::from(shape.layers[layer].head_dim) { scale.key } else { scale.value }
    };
    numbers(path, layer, lane, shape).into_iter().enumerate().map(scaled).collect()
}

/// The row before it is scaled: numbers that its elements have exactly.
fn numbers(path: u64, layer: usize, lane: usize, shape: &ModelShape) -> Vec<f32> {
    let seed = mix(path ^ (layer as u64) << 32 ^ (lane as u64) << 48);
    let number = |channel| match shape.row_type {
        RowType::Fp8 => ((mix(seed ^ channel) % 33) as f32 - 16.0) / 16.0,
        _ => fraction(mix(seed ^ channel)),
    };
    (0..2 * u64::from(shape.layers[layer].head_dim)).map(number).collect()
}

/// Scales for the lanes of fp8 rows, each lane's its own.
pub fn scaled(mut shape: ModelShape) -> ModelShape {
    let scale = |layer: usize, lane: usize| RowScale { key: 0.9 - 0.21 * lane as f32, value: 0.7 + 0.1 * (layer + 3 * lane) as f32 };
    let of_layer = |(layer, shape): (usize, &LayerShape)| (0..shape.lanes()).map(|lane| scale(layer, lane)).collect::<Vec<_>>().into();
    if shape.row_type == RowType::Fp8 {
        shape.scales = shape.layers.iter().enumerate().map(of_layer).collect();
    }
    shape
}

/// The bytes of that row.
pub fn row_bytes(path: u64, layer: usize, lane: usize, shape: &ModelShape) -> Vec<u8> {
    let values = numbers(path, layer, lane, shape);
    match shape.row_type {
        RowType::F32 => values.iter().flat_map(|value| value.to_le_bytes()).collect(),
        RowType::F16 => values.iter().flat_map(|&value| half::f16::from_f32(value).to_le_bytes()).collect(),
        RowType::Bf16 => values.iter().flat_map(|&value| half::bf16::from_f32(value).to_le_bytes()).collect(),
        RowType::Fp8 => values.iter().map(|&value| e4m3_code(value)).collect(),
    }
}

/// Rows of consecutive positions of one layer, `[lane][position][row]`.
pub fn rows_of(paths: &[u64], layer: usize, shape: &ModelShape) -> Vec<u8> {
    let lanes = 0..shape.layers[layer].lanes();
    lanes.flat_map(|lane| paths.iter().flat_map(move |&path| row_bytes(path, layer, lane, shape))).collect()
}

/// The query of a position: `[query_head][head_dim]`.
pub fn query_of(position: usize, layer: usize, layer_shape: &LayerShape) -> Vec<f32> {
    let seed = mix(0x51 ^ (position as u64) << 8 ^ (layer as u64) << 40);
    let values = u64::from(layer_shape.query_heads) * u64::from(layer_shape.head_dim);
    (0..values).map(|index| fraction(mix(seed ^ index))).collect()
}

/// A layer of full attention.
pub fn selected(query_heads: u16, kv_heads: u16, head_dim: u16) -> LayerShape {
    let softmax_scale = 1.0 / f32::from(head_dim).sqrt();
    LayerShape { kind: LaneKind::Selected, query_heads, kv_heads, head_dim, softmax_scale }
}

/// A sliding-window layer.
pub fn window(tokens: u32, query_heads: u16, kv_heads: u16, head_dim: u16) -> LayerShape {
    LayerShape { kind: LaneKind::Window { tokens }, ..selected(query_heads, kv_heads, head_dim) }
}

/// Deterministic token ids.
pub fn token_ids(seed: u64, count: usize) -> Vec<u32> {
    (0..count as u64).map(|index| (mix(seed ^ mix(index)) % 50_000) as u32).collect()
}
