//! Recall: what a selection found of what exact scores would have chosen.
//!
//! The truth is computed from keys that the generator makes again, chunk by chunk: neither the stored rows nor a device is asked.

use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};

use sluice_kernels::shape::LayerShape;
use sluice_kernels::slot::CHUNK_TOKENS;

use crate::generator::Generator;

/// One query token of one layer, and the rows among which a lane selects.
#[derive(Clone, Copy)]
pub struct RecallJob<'a> {
    /// Source of the keys.
    pub generator: &'a Generator,
    /// Layer of the model.
    pub layer: usize,
    /// Its shape.
    pub shape: LayerShape,
    /// `[query_head][head_dim]`.
    pub query: &'a [f32],
    /// Rows before the horizon.
    pub rows: usize,
}

/// What a selection kept.
#[derive(Clone, Copy, Debug, Default, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct Kept {
    /// Rows of the exact top-k that were selected, over k.
    pub recall: f64,
    /// Importance of the selected rows over that of all rows.
    pub mass: f64,
    /// The same for the exact top-k: what no selection of this size can exceed.
    pub mass_bound: f64,
}

/// Compares the selected positions of every lane (`[lane]`, ascending, below `rows`) with the exact top-k of the same size; means over lanes.
/// The importance of a row is the sum over the lane's query heads of softmax(q.k), the softmax taken over the rows before the horizon.
#[must_use]
pub fn kept(job: &RecallJob<'_>, selected: &[Vec<u32>], threads: usize) -> Kept {
    let next = AtomicUsize::new(0);
    let total = Mutex::new(Kept::default());
    let work = || {
        while let Some((lane, selected)) = next_of(&next, selected) {
            let kept = lane_kept(&importance(job, lane), selected);
            let mut total = total.lock().unwrap_or_else(PoisonError::into_inner);
            total.recall += kept.recall;
            total.mass += kept.mass;
            total.mass_bound += kept.mass_bound;
        }
    };
    std::thread::scope(|scope| {
        for _ in 1..threads.min(selected.len()) {
            scope.spawn(work);
        }
        work();
    });
    let Kept { recall, mass, mass_bound } = total.into_inner().unwrap_or_else(PoisonError::into_inner);
    let lanes = selected.len() as f64;
    Kept { recall: recall / lanes, mass: mass / lanes, mass_bound: mass_bound / lanes }
}

fn next_of<'a>(next: &AtomicUsize, lanes: &'a [Vec<u32>]) -> Option<(usize, &'a [u32])> {
    let lane = next.fetch_add(1, Ordering::Relaxed);
    Some((lane, lanes.get(lane)?.as_slice()))
}

fn lane_kept(importance: &[f64], selected: &[u32]) -> Kept {
    let best = top_k(importance, selected.len());
    let mut chosen = vec![false; importance.len()];
    for &position in selected {
        chosen[position as usize] = true;
    }
    let total: f64 = importance.iter().sum();
    let mass = |positions: &[u32]| positions.iter().map(|&position| importance[position as usize]).sum::<f64>() / total;
    let found = best.iter().filter(|&&position| chosen[position as usize]).count();
    Kept { recall: found as f64 / selected.len().max(1) as f64, mass: mass(selected), mass_bound: mass(&best) }
}

/// Importance of every row before the horizon in one lane.
fn importance(job: &RecallJob<'_>, lane: usize) -> Vec<f64> {
    let channels = usize::from(job.shape.head_dim);
    let heads: Vec<&[f32]> = job.shape.heads().heads_of(lane).map(|head| &job.query[head * channels..(head + 1) * channels]).collect();
    let mut scores = vec![0.0; heads.len() * job.rows];
    let mut keys = vec![0.0; CHUNK_TOKENS * channels];
    for first in (0..job.rows).step_by(CHUNK_TOKENS) {
        score_chunk(job, lane, first..job.rows.min(first + CHUNK_TOKENS), &heads, &mut keys, &mut scores);
    }
    let mut importance = vec![0.0; job.rows];
    for scores in scores.chunks_exact(job.rows.max(1)) {
        let highest = scores.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let sum: f64 = scores.iter().map(|&score| f64::from((score - highest).exp())).sum();
        for (importance, &score) in importance.iter_mut().zip(scores) {
            *importance += f64::from((score - highest).exp()) / sum;
        }
    }
    importance
}

fn score_chunk(job: &RecallJob<'_>, lane: usize, rows: Range<usize>, heads: &[&[f32]], keys: &mut [f32], scores: &mut [f32]) {
    let channels = usize::from(job.shape.head_dim);
    let keys = &mut keys[..rows.len() * channels];
    job.generator.fill_keys(job.layer, lane, rows.clone(), keys);
    for (head, query) in heads.iter().enumerate() {
        let scores = &mut scores[head * job.rows..][rows.clone()];
        for (score, key) in scores.iter_mut().zip(keys.chunks_exact(channels)) {
            *score = job.shape.softmax_scale * dot(query, key);
        }
    }
}

/// In sixteen partial sums, so that the compiler may use vectors.
fn dot(a: &[f32], b: &[f32]) -> f32 {
    let mut sums = [0.0; 16];
    for (a, b) in a.as_chunks::<16>().0.iter().zip(b.as_chunks::<16>().0) {
        for ((sum, a), b) in sums.iter_mut().zip(a).zip(b) {
            *sum += a * b;
        }
    }
    sums.iter().sum()
}

/// The `count` positions of highest importance; ties go to the lower position. In no order.
fn top_k(importance: &[f64], count: usize) -> Vec<u32> {
    let mut order: Vec<u32> = (0..importance.len() as u32).collect();
    let by_rank = |a: &u32, b: &u32| importance[*b as usize].total_cmp(&importance[*a as usize]).then(a.cmp(b));
    if count < order.len() {
        order.select_nth_unstable_by(count, by_rank);
        order.truncate(count);
    }
    order
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::generator::Random;
    use half::f16;
    use sluice_kernels::shape::{LaneKind, ModelShape, RowType};

    #[test]
    fn top_k_equals_a_full_sort() {
        let mut random = Random::new(&[5]);
        for round in 0..200 {
            let importance: Vec<f64> = (0..1 + round % 37).map(|_| random.below(9) as f64).collect();
            for count in 0..=importance.len() {
                let mut naive: Vec<u32> = (0..importance.len() as u32).collect();
                naive.sort_by(|a, b| importance[*b as usize].total_cmp(&importance[*a as usize]).then(a.cmp(b)));
                naive.truncate(count);
                let mut fast = top_k(&importance, count);
                naive.sort_unstable();
                fast.sort_unstable();
                assert_eq!(fast, naive, "{count} of {importance:?}");
            }
        }
    }

    /// Importance from the stored bytes of whole rows, in double precision, without any function of this module.
    fn naive_importance(rows: &[u8], shape: &LayerShape, query: &[f32], lane: usize, count: usize) -> Vec<f64> {
        let (channels, group) = (usize::from(shape.head_dim), usize::from(shape.query_heads / shape.kv_heads));
        let mut importance = vec![0.0; count];
        for head in lane * group..(lane + 1) * group {
            let mut weights = Vec::new();
            for token in 0..count {
                let row = &rows[(lane * count + token) * channels * 4..];
                let element = |channel: usize| f64::from(f16::from_le_bytes([row[2 * channel], row[2 * channel + 1]]).to_f32());
                let score: f64 = (0..channels).map(|channel| f64::from(query[head * channels + channel]) * element(channel)).sum();
                weights.push((score / (channels as f64).sqrt()).exp());
            }
            let sum: f64 = weights.iter().sum();
            importance.iter_mut().zip(weights).for_each(|(importance, weight)| *importance += weight / sum);
        }
        importance
    }

    #[test]
    fn recall_and_mass_equal_a_naive_count() {
        let shape = LayerShape { kind: LaneKind::Selected, query_heads: 6, kv_heads: 2, head_dim: 64, softmax_scale: 0.125 };
        let generator = Generator::new(&ModelShape::unscaled(RowType::F16, vec![shape; 2]), 21);
        let rows = 600;
        let mut stored = vec![0; generator.rows_bytes(1, rows)];
        generator.fill_rows(1, 0..rows, &mut stored);
        let query = generator.query(1, rows, 0);
        let selected: Vec<Vec<u32>> = (0..2).map(|lane| (0..rows as u32).filter(|row| (row * 7 + lane) % 11 < 3).collect()).collect();
        let mut expected = Kept::default();
        for (lane, selected) in selected.iter().enumerate() {
            let importance = naive_importance(&stored, &shape, &query, lane, rows);
            let mut order: Vec<u32> = (0..rows as u32).collect();
            order.sort_by(|a, b| importance[*b as usize].total_cmp(&importance[*a as usize]));
            let best = &order[..selected.len()];
            expected.recall += selected.iter().filter(|row| best.contains(row)).count() as f64 / selected.len() as f64 / 2.0;
            expected.mass += selected.iter().map(|&row| importance[row as usize]).sum::<f64>() / 3.0 / 2.0;
            expected.mass_bound += best.iter().map(|&row| importance[row as usize]).sum::<f64>() / 3.0 / 2.0;
        }
        let job = RecallJob { generator: &generator, layer: 1, shape, query: &query, rows };
        for threads in [1, 2, 5] {
            let kept = kept(&job, &selected, threads);
            assert!((kept.recall - expected.recall).abs() < 0.006, "{kept:?} {expected:?}");
            assert!((kept.mass - expected.mass).abs() < 1e-5, "{kept:?} {expected:?}");
            assert!((kept.mass_bound - expected.mass_bound).abs() < 1e-5, "{kept:?} {expected:?}");
        }
        let all: Vec<Vec<u32>> = vec![(0..rows as u32).collect(); 2];
        let whole = kept(&job, &all, 2);
        assert!((whole.recall - 1.0).abs() < 1e-12 && (whole.mass - 1.0).abs() < 1e-9, "{whole:?}");
    }
}
