//! Rows as doubles and attention in two passes.

use half::{bf16, f16};

use crate::device::{AttendJob, HotRows, LayerGeometry, ManyJob};
use crate::rows::e4m3;
use crate::scales::RowScale;
use crate::shape::RowType;
use crate::slot::CHUNK_TOKENS;

/// A key and a value.
pub(super) type Row = (Vec<f64>, Vec<f64>);

/// The row of (`lane`, absolute `position`) in its page.
pub(super) fn read_row(geometry: &LayerGeometry, page: &[u8], lane: usize, position: usize) -> Row {
    let row_bytes = geometry.row_bytes();
    let index = lane * CHUNK_TOKENS + position % CHUNK_TOKENS;
    read_bytes(geometry, lane, &page[index * row_bytes..(index + 1) * row_bytes])
}

fn read_bytes(geometry: &LayerGeometry, lane: usize, bytes: &[u8]) -> Row {
    let mut values: Vec<f64> = match geometry.row_type {
        RowType::F32 => bytes.chunks_exact(4).map(|b| f64::from(f32::from_le_bytes([b[0], b[1], b[2], b[3]]))).collect(),
        RowType::F16 => bytes.chunks_exact(2).map(|b| f16::from_le_bytes([b[0], b[1]]).to_f64()).collect(),
        RowType::Bf16 => bytes.chunks_exact(2).map(|b| bf16::from_le_bytes([b[0], b[1]]).to_f64()).collect(),
        RowType::Fp8 => {
            let RowScale { key, value } = geometry.scales.of(lane);
            let scale = |index: usize| if index < geometry.head_dim { key } else { value };
            bytes.iter().enumerate().map(|(index, &code)| f64::from(e4m3::value_of(code, scale(index)))).collect()
        }
    };
    let value = values.split_off(geometry.head_dim);
    (values, value)
}

/// All rows that a lane attends, in position order.
pub(super) fn listed_and_exact(job: &AttendJob, lane: usize) -> Vec<Row> {
    let geometry = job.geometry;
    let listed = (0..job.listed_per_lane).map(|index| {
        let at = lane * job.listed_per_lane + index;
        if let Some(hot) = job.hot
            && hot.slots[at] != HotRows::COLD
        {
            let first = hot.slots[at] as usize * geometry.row_bytes();
            return read_bytes(geometry, lane, &hot.rows[first..first + geometry.row_bytes()]);
        }
        let position = job.listed[at] as usize;
        read_row(geometry, job.pages[position / CHUNK_TOKENS], lane, position)
    });
    let exact = (job.exact_from..job.exact_to).map(|position| read_row(geometry, job.pages[position / CHUNK_TOKENS], lane, position));
    listed.chain(exact).collect()
}

/// Rows `0..end` of a lane; rows before every window may be missing and read as empty.
pub(super) fn rows_of_lane(job: &ManyJob, lane: usize, end: usize) -> Vec<Row> {
    let rows = (0..end).map(|position| match job.pages[position / CHUNK_TOKENS] {
        [] => (Vec::new(), Vec::new()),
        page => read_row(job.geometry, page, lane, position),
    });
    rows.collect()
}

/// Softmax attention of one query head: output and log-sum-exp of the scaled scores.
pub(super) fn two_pass(query: &[f32], rows: &[Row], scale: f32) -> (Vec<f64>, f64) {
    let dot = |key: &[f64]| {
        assert_eq!(key.len(), query.len(), "a row that is needed lies in an empty page");
        query.iter().zip(key).map(|(&q, k)| f64::from(q) * k).sum::<f64>() * f64::from(scale)
    };
    let scores: Vec<f64> = rows.iter().map(|(key, _)| dot(key)).collect();
    let largest = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let total: f64 = scores.iter().map(|score| (score - largest).exp()).sum();
    let mut output = vec![0.0; query.len()];
    for (score, (_, value)) in scores.iter().zip(rows) {
        let weight = (score - largest).exp() / total;
        for (sum, v) in output.iter_mut().zip(value) {
            *sum += weight * v;
        }
    }
    (output, if rows.is_empty() { f64::NEG_INFINITY } else { largest + total.ln() })
}
