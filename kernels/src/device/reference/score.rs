//! Importance of every row of a lane, from decoded codes.

use crate::device::ScoreJob;
use crate::label::decode;
use crate::slot::CHUNK_TOKENS;

/// The importance of each row: the sum over the lane's heads of the softmax of the label scores.
pub(super) fn importance(job: &ScoreJob, lane: usize) -> Vec<f64> {
    let rows = job.labels.len() * CHUNK_TOKENS;
    let mut sum = vec![0.0; rows];
    let lane_bytes = CHUNK_TOKENS * job.coder.plan.label_bytes();
    let decoded = |page: &&[u8]| decode(&job.coder.plan, &page[lane * lane_bytes..(lane + 1) * lane_bytes]);
    let codes: Vec<u16> = job.labels.iter().flat_map(decoded).collect();
    for head in job.geometry.heads.heads_of(lane) {
        let query = &job.query[head * job.geometry.head_dim..(head + 1) * job.geometry.head_dim];
        let factors = channel_factors(job, lane, query);
        let score = |row: &[u16]| row.iter().zip(&factors).map(|(&code, factor)| f64::from(code) * factor).sum::<f64>();
        let scores: Vec<f64> = codes.chunks_exact(factors.len()).map(|row| f64::from(job.geometry.softmax_scale) * score(row)).collect();
        let largest = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let total: f64 = scores.iter().map(|score| (score - largest).exp()).sum();
        for (sum, score) in sum.iter_mut().zip(&scores) {
            *sum += (score - largest).exp() / total;
        }
    }
    sum
}

/// By kept channel, integer weight times unit, by the definition of `HeadWeights`.
fn channel_factors(job: &ScoreJob, lane: usize, query: &[f32]) -> Vec<f64> {
    let coder = &job.coder.lanes[lane];
    let mut factors = Vec::new();
    for group in job.coder.plan.groups() {
        let first = factors.len();
        let products: Vec<f32> =
            (first..first + usize::from(group.channels)).map(|c| query[usize::from(coder.channels[c])] * coder.step[c]).collect();
        let largest = products.iter().map(|w| w.abs()).fold(0.0, f32::max);
        for w in products {
            let weight = if largest < 1e-30 { 0.0 } else { (w * (127.0 / largest) + 0.5).floor() };
            factors.push(f64::from(weight) * f64::from(largest / 127.0));
        }
    }
    factors
}

/// The key of an importance by its definition: 512 steps of mantissa in each binade from 2^-121.
pub(super) fn key(importance: f64) -> u16 {
    if importance < 2f64.powi(-121) {
        return 0;
    }
    let mut binade = importance.log2().floor() as i32;
    // The logarithm may round across a power of two.
    if 2f64.powi(binade) > importance {
        binade -= 1;
    } else if 2f64.powi(binade + 1) <= importance {
        binade += 1;
    }
    let mantissa = importance / 2f64.powi(binade) - 1.0;
    ((binade + 121) * 512 + (mantissa * 512.0).floor() as i32) as u16
}
