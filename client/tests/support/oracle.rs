//! Dense attention over hashed rows in f64, as plainly as it can be written. It shares nothing with the kernels.

use sluice_kernels::shape::{LaneKind, ModelShape};

use super::rows::{query_of, row_values};

/// Output `[query_head][head_dim]` and log-sum-exp `[query_head]` of the query of `position`.
pub fn dense(paths: &[u64], position: usize, layer: usize, shape: &ModelShape) -> (Vec<f64>, Vec<f64>) {
    let layer_shape = &shape.layers[layer];
    let query = query_of(position, layer, layer_shape);
    let channels = usize::from(layer_shape.head_dim);
    let heads = usize::from(layer_shape.query_heads);
    let group = heads / usize::from(layer_shape.kv_heads);
    let first = match layer_shape.kind {
        LaneKind::Selected => 0,
        LaneKind::Window { tokens } => (position + 1).saturating_sub(tokens as usize),
    };
    let mut output = Vec::new();
    let mut log_sum_exp = Vec::new();
    for head in 0..heads {
        let rows: Vec<Vec<f32>> = (first..=position).map(|at| row_values(paths[at], layer, head / group, shape)).collect();
        let score = |row: &Vec<f32>| {
            let products = (0..channels).map(|c| f64::from(query[head * channels + c]) * f64::from(row[c]));
            products.sum::<f64>() * f64::from(layer_shape.softmax_scale)
        };
        let scores: Vec<f64> = rows.iter().map(score).collect();
        let highest = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let weights: Vec<f64> = scores.iter().map(|score| (score - highest).exp()).collect();
        let sum: f64 = weights.iter().sum();
        for c in 0..channels {
            let weighted: f64 = rows.iter().zip(&weights).map(|(row, weight)| weight * f64::from(row[channels + c])).sum();
            output.push(weighted / sum);
        }
        log_sum_exp.push(highest + sum.ln());
    }
    (output, log_sum_exp)
}

/// Fails unless the values agree within an absolute tolerance.
pub fn assert_close(what: &str, given: &[f32], expected: &[f64], tolerance: f64) {
    assert_eq!(given.len(), expected.len(), "{what}: count");
    for (index, (&given, &expected)) in given.iter().zip(expected).enumerate() {
        assert!((f64::from(given) - expected).abs() <= tolerance, "{what}[{index}]: {given}, expected {expected}");
    }
}
