//! The plain reference: one thread, double precision, no cleverness. It shares no function with any other device.

mod attend;
mod score;

use super::{AttendJob, Device, LabelJob, ManyJob, ScoreJob, SelectJob};
use crate::label::{encode, quantise};
use crate::slot::CHUNK_TOKENS;

/// The reference device.
#[derive(Clone, Copy, Debug, Default)]
pub struct Reference;

impl Device for Reference {
    fn name(&self) -> &str {
        "reference"
    }

    fn label(&mut self, job: &LabelJob, out: &mut [u8]) {
        let plan = &job.coder.plan;
        let lane_bytes = CHUNK_TOKENS * plan.label_bytes();
        assert_eq!(out.len(), job.coder.lanes.len() * lane_bytes);
        let widths: Vec<u8> = plan.groups().iter().flat_map(|group| vec![group.bits; usize::from(group.channels)]).collect();
        for (lane, coder) in job.coder.lanes.iter().enumerate() {
            let mut codes = Vec::new();
            for token in 0..CHUNK_TOKENS {
                let (key, _) = attend::read_row(job.geometry, job.page, lane, token);
                for (kept, &channel) in coder.channels.iter().enumerate() {
                    codes.push(quantise(key[usize::from(channel)] as f32, coder.low[kept], coder.step[kept], widths[kept]));
                }
            }
            encode(plan, &codes, &mut out[lane * lane_bytes..(lane + 1) * lane_bytes]);
        }
    }

    fn score(&mut self, job: &ScoreJob, keys: &mut [u16]) {
        let rows = job.labels.len() * CHUNK_TOKENS;
        assert_eq!(keys.len(), job.geometry.heads.lanes() * rows);
        for lane in 0..job.geometry.heads.lanes() {
            let importance = score::importance(job, lane);
            for (row, value) in importance.into_iter().enumerate() {
                keys[lane * rows + row] = score::key(value);
            }
        }
    }

    fn select(&mut self, job: &SelectJob, positions: &mut [u32]) {
        assert_eq!(job.keys.len(), job.lanes * job.rows);
        assert_eq!(positions.len(), job.lanes * job.count);
        for lane in 0..job.lanes {
            let keys = &job.keys[lane * job.rows..(lane + 1) * job.rows];
            let mut order: Vec<u32> = (0..job.rows as u32).collect();
            let rank = |&row: &u32| (row as usize >= job.sinks, u16::MAX - keys[row as usize], row);
            order.sort_by_key(rank);
            order.truncate(job.count);
            order.sort_unstable();
            positions[lane * job.count..(lane + 1) * job.count].copy_from_slice(&order);
        }
    }

    fn attend(&mut self, job: &AttendJob, output: &mut [f32], lse: &mut [f32]) {
        let geometry = job.geometry;
        for head in 0..geometry.heads.query_heads() {
            let lane = head / geometry.heads.group();
            let query = &job.query[head * geometry.head_dim..(head + 1) * geometry.head_dim];
            let rows = attend::listed_and_exact(job, lane);
            let (out, log_sum) = attend::two_pass(query, &rows, geometry.softmax_scale);
            for (to, from) in output[head * geometry.head_dim..].iter_mut().zip(out) {
                *to = from as f32;
            }
            lse[head] = log_sum as f32;
        }
    }

    fn attend_many(&mut self, job: &ManyJob, output: &mut [f32], lse: &mut [f32]) {
        let geometry = job.geometry;
        let (heads, dim) = (geometry.heads.query_heads(), geometry.head_dim);
        let queries = job.queries.len() / (heads * dim);
        for lane in 0..geometry.heads.lanes() {
            let rows = attend::rows_of_lane(job, lane, job.first_position + queries);
            for query in 0..queries {
                let position = job.first_position + query;
                let from = job.window.map_or(0, |window| (position + 1).saturating_sub(window));
                for head in geometry.heads.heads_of(lane) {
                    let at = query * heads + head;
                    let (out, log_sum) =
                        attend::two_pass(&job.queries[at * dim..(at + 1) * dim], &rows[from..=position], geometry.softmax_scale);
                    for (to, value) in output[at * dim..].iter_mut().zip(out) {
                        *to = value as f32;
                    }
                    lse[at] = log_sum as f32;
                }
            }
        }
    }

    fn mass_kept(&mut self, job: &AttendJob) -> Vec<f32> {
        let geometry = job.geometry;
        let kept = (0..geometry.heads.query_heads()).map(|head| {
            let lane = head / geometry.heads.group();
            let query = &job.query[head * geometry.head_dim..(head + 1) * geometry.head_dim];
            let dense = AttendJob { listed: &[], listed_per_lane: 0, exact_from: 0, hot: None, ..*job };
            let (_, kept) = attend::two_pass(query, &attend::listed_and_exact(job, lane), geometry.softmax_scale);
            let (_, all) = attend::two_pass(query, &attend::listed_and_exact(&dense, lane), geometry.softmax_scale);
            (kept - all).exp() as f32
        });
        kept.collect()
    }
}
