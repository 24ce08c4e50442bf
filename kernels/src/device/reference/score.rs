//! Importance of every row of a lane, from decoded codes.

use crate::device::ScoreJob;
use crate::label::decode;
use crate::slot::CHUNK_TOKENS;

/// The importance of each row: over the lane's heads, the sum of the linear exponentials of the scores less the sample's log-sum-exp.
pub(super) fn importance(job: &ScoreJob, lane: usize) -> Vec<f64> {
    let rows = job.labels.len() * CHUNK_TOKENS;
    let mut sum = vec![0.0; rows];
    let lane_bytes = CHUNK_TOKENS * job.coder.plan.label_bytes();
    let decoded = |page: &&[u8]| decode(&job.coder.plan, &page[lane * lane_bytes..(lane + 1) * lane_bytes]);
    let codes: Vec<u16> = job.labels.iter().flat_map(decoded).collect();
    let scale = f64::from(job.geometry.softmax_scale) / std::f64::consts::LN_2;
    for head in job.geometry.heads.heads_of(lane) {
        let query = &job.query[head * job.geometry.head_dim..(head + 1) * job.geometry.head_dim];
        let factors = channel_factors(job, lane, query);
        let score = |row: &[u16]| row.iter().zip(&factors).map(|(&code, factor)| f64::from(code) * factor).sum::<f64>();
        let scores: Vec<f64> = codes.chunks_exact(factors.len()).map(|row| scale * score(row)).collect();
        let log_sum = sampled_log_sum(&scores);
        for (sum, score) in sum.iter_mut().zip(&scores) {
            *sum += linear_exponential((score - log_sum).clamp(-126.0, 7.0));
        }
    }
    sum
}

/// The logarithm to base 2 of the sum of `2^score` over the sample, each row counted as often as it stands for.
fn sampled_log_sum(scores: &[f64]) -> f64 {
    let chunks = scores.len() / CHUNK_TOKENS;
    let stride = match chunks {
        0..=64 => 1,
        65..=128 => 2,
        129..=256 => 4,
        257..=512 => 8,
        _ => 16,
    };
    let weight = |row: usize| {
        let (chunk, block) = (row / CHUNK_TOKENS, row % CHUNK_TOKENS / 16);
        if chunk == 0 || chunk == chunks - 1 {
            1.0
        } else if block % stride == 5 * chunk % stride {
            stride as f64
        } else {
            0.0
        }
    };
    let sampled = || scores.iter().enumerate().filter(|&(row, _)| weight(row) > 0.0);
    let largest = sampled().map(|(_, &score)| score).fold(f64::NEG_INFINITY, f64::max);
    largest + sampled().map(|(row, score)| weight(row) * (score - largest).exp2()).sum::<f64>().log2()
}

/// 2^y at whole numbers, straight lines between.
fn linear_exponential(y: f64) -> f64 {
    let whole = y.floor();
    2f64.powi(whole as i32) * (1.0 + y - whole)
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

/// The key of an importance by its definition: 512 steps of mantissa in each binade from 2^-121 to 2^7.
pub(super) fn key(importance: f64) -> u16 {
    if importance >= 128.0 {
        return u16::MAX;
    }
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
