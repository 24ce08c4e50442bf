//! Attention of one query token over gathered rows.
//!
//! A lane's rows, listed ones first and then the exact range, form one list. It is cut into segments, whose length depends on the length
//! of the list alone; a segment is attended block by block with a running maximum, and the segments' partial results are merged in order.
//! So the result is a function of the list, not of threads or of where a row lies.

use std::ops::Range;

use super::element::Element;
use super::parts::Parts;
use super::simd::{Simd, Task, exp2};
use crate::device::{AttendJob, HotRows};
use crate::slot::CHUNK_TOKENS;

/// Rows of a block: their scores stay in the first-level cache between the two products.
const BLOCK: usize = 64;

/// How a lane's list is cut.
#[derive(Clone, Copy)]
pub(super) struct Segments {
    /// Rows of the list.
    pub(super) rows: usize,
    /// Rows of a segment.
    pub(super) length: usize,
    /// Segments, at least one.
    pub(super) count: usize,
}

impl Segments {
    /// About 64 segments, of 512 to 8,192 rows.
    pub(super) fn new(job: &AttendJob) -> Self {
        let rows = job.listed_per_lane + job.exact_to.saturating_sub(job.exact_from);
        let length = rows.div_ceil(64).next_multiple_of(BLOCK).clamp(512, 8192);
        Self { rows, length, count: rows.div_ceil(length).max(1) }
    }

    fn range(&self, segment: usize) -> Range<usize> {
        segment * self.length..((segment + 1) * self.length).min(self.rows)
    }
}

/// f32 elements of one head's partial result: maximum, sum, output (16 elements before it keep it aligned).
pub(super) fn partial_len(head_dim: usize) -> usize {
    16 + head_dim
}

/// One segment of one lane.
pub(super) struct AttendSegment<'a, E> {
    pub(super) job: &'a AttendJob<'a>,
    pub(super) lane: usize,
    pub(super) segments: Segments,
    pub(super) segment: usize,
    /// `[head of the lane][partial]`.
    pub(super) partials: &'a mut [f32],
    /// At least `group * BLOCK` f32 of working room.
    pub(super) scores: &'a mut Vec<f32>,
    pub(super) element: std::marker::PhantomData<E>,
}

impl<E: Element> Task for AttendSegment<'_, E> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let geometry = self.job.geometry;
        let (group, dim) = (geometry.heads.group(), geometry.head_dim);
        assert!(self.partials.len() == group * partial_len(dim) && dim.is_multiple_of(32));
        for partial in self.partials.chunks_exact_mut(partial_len(dim)) {
            partial.fill(0.0);
            partial[0] = f32::NEG_INFINITY;
        }
        self.scores.resize(group * BLOCK, 0.0);
        let rows = self.segments.range(self.segment);
        let mut current = BlockRows::find(self.job, self.lane, rows.start, rows.end);
        current.prefetch_all(simd, geometry.row_bytes());
        let lane_query = &self.job.query[self.lane * group * dim..(self.lane + 1) * group * dim];
        // The scale of the lane's keys is part of it; that of its values waits for the merged output.
        let scale = geometry.softmax_scale * std::f32::consts::LOG2_E * (E::FACTOR * geometry.scales.of(self.lane).key);
        while current.count > 0 {
            let next = BlockRows::find(self.job, self.lane, (current.first + BLOCK).min(rows.end), rows.end);
            // After the last block there is nothing to ask for; asking for what is here already costs nothing.
            let ahead = if next.count > 0 { &next.rows } else { &current.rows };
            let mut block = Block { query: lane_query, dim, rows: &current, ahead, scores: self.scores };
            let mut head = 0;
            while head < group {
                head += match group - head {
                    4.. => block.products::<S, E, 4, 4>(simd, head, scale),
                    2.. => block.products::<S, E, 2, 8>(simd, head, scale),
                    _ => block.products::<S, E, 1, 16>(simd, head, scale),
                };
            }
            for head in 0..group {
                let partial = &mut self.partials[head * partial_len(dim)..][..3];
                partial_softmax(simd, &mut self.scores[head * BLOCK..(head + 1) * BLOCK], current.count, partial);
            }
            let block = Block { query: lane_query, dim, rows: &current, ahead, scores: self.scores };
            let mut head = 0;
            while head < group {
                head += match group - head {
                    4.. => block.add_values::<S, E, 4>(simd, head, self.partials),
                    2.. => block.add_values::<S, E, 2>(simd, head, self.partials),
                    _ => block.add_values::<S, E, 1>(simd, head, self.partials),
                };
            }
            current = next;
        }
    }
}

/// Where the rows of a block lie. Places after `count` repeat the last row, so that all 64 can be read.
struct BlockRows {
    rows: [*const u8; BLOCK],
    first: usize,
    count: usize,
}

impl BlockRows {
    /// Rows `first..min(first + BLOCK, end)` of the lane's list.
    #[inline(always)]
    fn find(job: &AttendJob, lane: usize, first: usize, end: usize) -> Self {
        let count = BLOCK.min(end - first);
        let mut rows = [std::ptr::null(); BLOCK];
        for (index, row) in rows[..count].iter_mut().enumerate() {
            *row = row_of(job, lane, first + index).as_ptr();
        }
        if count > 0 {
            let last = rows[count - 1];
            rows[count..].fill(last);
        }
        Self { rows, first, count }
    }

    #[inline(always)]
    fn prefetch_all<S: Simd>(&self, simd: S, row_bytes: usize) {
        for row in &self.rows[..self.count] {
            for line in (0..row_bytes).step_by(64) {
                simd.prefetch(row.wrapping_add(line));
            }
        }
    }
}

/// The bytes of row `index` of a lane's list.
#[inline(always)]
fn row_of<'a>(job: &AttendJob<'a>, lane: usize, index: usize) -> &'a [u8] {
    let row_bytes = job.geometry.row_bytes();
    let position = if index < job.listed_per_lane {
        let at = lane * job.listed_per_lane + index;
        if let Some(hot) = job.hot
            && hot.slots[at] != HotRows::COLD
        {
            return &hot.rows[hot.slots[at] as usize * row_bytes..][..row_bytes];
        }
        job.listed[at] as usize
    } else {
        job.exact_from + index - job.listed_per_lane
    };
    &job.pages[position / CHUNK_TOKENS][job.geometry.row_offset(lane, position)..][..row_bytes]
}

/// One block of rows against the heads of a lane.
struct Block<'a> {
    /// `[head][dim]`.
    query: &'a [f32],
    dim: usize,
    rows: &'a BlockRows,
    /// The rows of the next block, which are asked for meanwhile: whole rows, a few lines between the steps of both products, so that
    /// memory is never idle, never asked for much at once, and finds the lines of a row together.
    ahead: &'a [*const u8; BLOCK],
    /// `[head][row]`: scores in log2, later softmax weights.
    scores: &'a mut [f32],
}

impl Block<'_> {
    /// Scores of `G` heads from `first` on, `R` rows at a time; `G * R` is 16. Returns `G`.
    #[inline(always)]
    fn products<S: Simd, E: Element, const G: usize, const R: usize>(&mut self, simd: S, first: usize, scale: f32) -> usize {
        let queries: [*const f32; G] = std::array::from_fn(|head| self.query[(first + head) * self.dim..][..self.dim].as_ptr());
        for start in (0..self.rows.count).step_by(R) {
            let rows: [*const u8; R] = std::array::from_fn(|row| self.rows.rows[start + row]);
            let mut sums = [simd.splat(0.0); 16];
            for channel in (0..self.dim).step_by(16) {
                if first == 0 && (E::BYTES > 1 || channel.is_multiple_of(32)) {
                    // The first half of the next block: all lines of R / 2 rows while the keys of R rows are read.
                    for row in &self.ahead[start / 2..start / 2 + R / 2] {
                        for line in (0..32 * E::BYTES).step_by(64) {
                            simd.prefetch(row.wrapping_add(channel * 2 * E::BYTES + line));
                        }
                    }
                }
                // SAFETY: a query has `dim` elements, and so has the key of a row; `channel` is below it, both being multiples of 16.
                unsafe {
                    let query: [S::Floats; G] = queries.map(|query| simd.load(query.add(channel)));
                    for (row, &key) in rows.iter().enumerate() {
                        let key = E::load(simd, key.add(channel * E::BYTES));
                        for head in 0..G {
                            sums[head * R + row] = simd.mul_add(query[head], key, sums[head * R + row]);
                        }
                    }
                }
            }
            let mut scores = [0.0f32; 16];
            // SAFETY: the array has 16 elements.
            unsafe { simd.store(scores.as_mut_ptr(), simd.mul(simd.sums(sums), simd.splat(scale))) };
            for head in 0..G {
                self.scores[(first + head) * BLOCK + start..][..R].copy_from_slice(&scores[head * R..(head + 1) * R]);
            }
        }
        G
    }

    /// Adds weighted values to the partial outputs of `G` heads from `first` on. Returns `G`.
    #[inline(always)]
    fn add_values<S: Simd, E: Element, const G: usize>(&self, simd: S, first: usize, partials: &mut [f32]) -> usize {
        let mut channel = 0;
        while channel + 64 <= self.dim {
            self.add_value_tile::<S, E, G, 4>(simd, first, channel, partials);
            channel += 64;
        }
        if channel < self.dim {
            self.add_value_tile::<S, E, G, 2>(simd, first, channel, partials);
        }
        G
    }

    /// `V` vectors of the values from `channel` on.
    #[inline(always)]
    fn add_value_tile<S: Simd, E: Element, const G: usize, const V: usize>(
        &self,
        simd: S,
        first: usize,
        channel: usize,
        partials: &mut [f32],
    ) {
        let stride = partial_len(self.dim);
        let partials = &mut partials[first * stride..(first + G) * stride];
        let offset = (self.dim + channel) * E::BYTES;
        let mut sums = [[simd.splat(0.0); V]; G];
        let weights: [&[f32; BLOCK]; G] = std::array::from_fn(|head| &self.scores.as_chunks::<BLOCK>().0[first + head]);
        // The second half of the next block: this tile's share of its rows, all lines of a row together.
        let (row_bytes, mut place, mut line) = (2 * self.dim * E::BYTES, BLOCK / 2 + channel * BLOCK / 2 / self.dim, 0);
        for (index, &row) in self.rows.rows[..self.rows.count].iter().enumerate() {
            if first == 0 && (V * E::BYTES >= 4 || index.is_multiple_of(2)) {
                let next = self.ahead[place % BLOCK];
                for _ in 0..(V * E::BYTES).div_ceil(4) {
                    simd.prefetch(next.wrapping_add(line));
                    line += 64;
                }
                if line >= row_bytes {
                    (place, line) = (place + 1, 0);
                }
            }
            // SAFETY: a row has `2 * dim` elements, and `channel + 16 * V` is at most `dim`.
            let value: [S::Floats; V] = std::array::from_fn(|v| unsafe { E::load(simd, row.add(offset + v * 16 * E::BYTES)) });
            for head in 0..G {
                let weight = simd.splat(weights[head][index]);
                for v in 0..V {
                    sums[head][v] = simd.mul_add(weight, value[v], sums[head][v]);
                }
            }
        }
        for (partial, sums) in partials.chunks_exact_mut(stride).zip(sums) {
            let keep = simd.splat(partial[2]);
            for (v, sum) in sums.into_iter().enumerate() {
                let to = partial[16 + channel + v * 16..][..16].as_mut_ptr();
                // SAFETY: 16 elements from `to` on.
                unsafe { simd.store(to, simd.mul_add(simd.load(to), keep, sum)) };
            }
        }
    }
}

/// Turns scores into weights under the running maximum; `partial` starts with the maximum and the sum, and gets in its third element the
/// factor by which what was summed before shrinks.
#[inline(always)]
fn partial_softmax<S: Simd>(simd: S, scores: &mut [f32], count: usize, partial: &mut [f32]) {
    scores[count..].fill(f32::NEG_INFINITY);
    let vectors = scores.as_chunks_mut::<16>().0;
    let mut largest = simd.splat(partial[0]);
    for vector in vectors.iter() {
        // SAFETY: 16 elements.
        largest = simd.max(largest, unsafe { simd.load(vector.as_ptr()) });
    }
    let largest = simd.largest(largest);
    let mut sum = simd.splat(0.0);
    for vector in vectors {
        // SAFETY: 16 elements.
        unsafe {
            let weight = exp2(simd, simd.sub(simd.load(vector.as_ptr()), simd.splat(largest)));
            sum = simd.add(sum, weight);
            simd.store(vector.as_mut_ptr(), weight);
        }
    }
    let keep = (partial[0] - largest).exp2();
    partial[1] = partial[1] * keep + simd.sum(sum);
    partial[0] = largest;
    partial[2] = keep;
}

/// Merges the partial results of one head, in order, into its output; returns its log-sum-exp.
pub(super) struct MergePartials<'a> {
    /// All partials: `[lane][segment][head of the lane][partial]`.
    pub(super) partials: &'a Parts<'a, f32>,
    /// Of the head's partial in its lane's first segment.
    pub(super) first: usize,
    /// From one segment to the next.
    pub(super) stride: usize,
    pub(super) segments: usize,
    /// What the values lack as a factor.
    pub(super) scale: f32,
    pub(super) output: &'a mut [f32],
}

impl Task for MergePartials<'_> {
    type Output = f32;

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) -> f32 {
        let dim = self.output.len();
        // SAFETY: partials are only read while they are merged.
        let partial = |segment: usize| unsafe {
            let first = self.first + segment * self.stride;
            &*self.partials.part(first..first + partial_len(dim))
        };
        let largest = (0..self.segments).map(|segment| partial(segment)[0]).fold(f32::NEG_INFINITY, f32::max);
        if largest == f32::NEG_INFINITY {
            self.output.fill(0.0);
            return f32::NEG_INFINITY;
        }
        self.output.fill(0.0);
        let mut total = 0.0f64;
        for segment in 0..self.segments {
            let partial = partial(segment);
            let keep = (partial[0] - largest).exp2();
            total += f64::from(partial[1]) * f64::from(keep);
            for (to, from) in self.output.as_chunks_mut::<16>().0.iter_mut().zip(partial[16..].as_chunks::<16>().0) {
                // SAFETY: 16 elements each.
                unsafe { simd.store(to.as_mut_ptr(), simd.mul_add(simd.load(from.as_ptr()), simd.splat(keep), simd.load(to.as_ptr()))) };
            }
        }
        let share = (1.0 / total) as f32 * self.scale;
        for to in self.output {
            *to *= share;
        }
        ((f64::from(largest) + total.log2()) * std::f64::consts::LN_2) as f32
    }
}
