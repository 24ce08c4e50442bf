//! Exact causal attention of many query tokens: tiles of queries against tiles of keys, with a running maximum.
//!
//! In a tile the queries of all heads of a lane are columns, `column = query * group + head`, and lie transposed, so that both products
//! (keys x queries, weights x values) are plain matrix products with contiguous right sides, and the softmax over keys runs across
//! vectors instead of within them. Key tiles lie at fixed multiples of their length, so a query's result does not depend on the
//! queries beside it.

use std::marker::PhantomData;
use std::ops::Range;

use super::element::Element;
use super::product::{Left, product};
use super::simd::{Simd, Task, exp2};
use crate::device::ManyJob;
use crate::slot::CHUNK_TOKENS;

/// Keys of a tile; two tiles make a chunk.
const KEYS: usize = 128;

/// Columns of a query tile, before rounding up to whole registers.
const COLUMNS: usize = 256;

/// Query tokens of a tile, for a lane of `group` heads.
pub(super) fn queries_a_tile(group: usize) -> usize {
    (COLUMNS / group).max(1)
}

/// Working room of one thread.
#[derive(Default)]
pub(super) struct Room {
    /// `[channel][column]`.
    queries: Vec<f32>,
    /// `[key][channel]`.
    keys: Vec<f32>,
    values: Vec<f32>,
    /// `[key][column]`.
    scores: Vec<f32>,
    /// `[column][channel]`.
    output: Vec<f32>,
    /// `[column]`.
    maxima: Vec<f32>,
    sums: Vec<f32>,
    keep: Vec<f32>,
}

/// Takes a query token, a query head, its output and its log-sum-exp.
pub(super) type Write<'a> = dyn Fn(usize, usize, &[f32], f32) + 'a;

/// One tile of queries of one lane.
pub(super) struct QueryTile<'a, E> {
    pub(super) job: &'a ManyJob<'a>,
    pub(super) lane: usize,
    /// First query token of the tile and how many.
    pub(super) first: usize,
    pub(super) count: usize,
    pub(super) room: &'a mut Room,
    pub(super) write: &'a Write<'a>,
    pub(super) element: PhantomData<E>,
}

impl<E: Element> Task for QueryTile<'_, E> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(mut self, simd: S) {
        let (job, group, dim) = (self.job, self.job.geometry.heads.group(), self.job.geometry.head_dim);
        let columns = (self.count * group).next_multiple_of(32);
        self.prepare(columns);
        let position = |query: usize| job.first_position + self.first + query;
        let from = |query: usize| job.window.map_or(0, |window| (position(query) + 1).saturating_sub(window));
        let end = position(self.count - 1) + 1;
        for tile in from(0) / KEYS..end.div_ceil(KEYS) {
            let first_key = tile * KEYS;
            let keys = from(0).max(first_key)..end.min(first_key + KEYS);
            load_keys::<S, E>(simd, job, self.lane, keys, self.room);
            let room = &mut *self.room;
            product::<S, false>(simd, Left { values: &room.keys, row: dim, column: 1 }, &room.queries, &mut room.scores, dim, columns);
            for query in 0..self.count {
                // The columns of a query see keys `from..=position` only.
                let hidden_before = from(query).clamp(first_key, first_key + KEYS) - first_key;
                let hidden_after = (position(query) + 1).clamp(first_key, first_key + KEYS) - first_key;
                for key in (0..hidden_before).chain(hidden_after..KEYS) {
                    room.scores[key * columns + query * group..][..group].fill(f32::NEG_INFINITY);
                }
            }
            softmax_columns(simd, room, columns);
            for (output, &keep) in room.output.chunks_exact_mut(dim).zip(&room.keep) {
                if keep != 1.0 {
                    for to in output {
                        *to *= keep;
                    }
                }
            }
            let left = Left { values: &room.scores, row: 1, column: columns };
            product::<S, true>(simd, left, &room.values, &mut room.output, KEYS, dim);
        }
        self.finish();
    }
}

impl<E: Element> QueryTile<'_, E> {
    /// Transposes and scales the queries (by the scale of the lane's keys as well), and empties the sums.
    #[inline(always)]
    fn prepare(&mut self, columns: usize) {
        let geometry = self.job.geometry;
        let (heads, group, dim) = (geometry.heads.query_heads(), geometry.heads.group(), geometry.head_dim);
        let scale = geometry.softmax_scale * std::f32::consts::LOG2_E * (E::FACTOR * geometry.scales.of(self.lane).key);
        let room = &mut *self.room;
        room.queries.clear();
        room.queries.resize(dim * columns, 0.0);
        for query in 0..self.count {
            for (member, head) in geometry.heads.heads_of(self.lane).enumerate() {
                let from = &self.job.queries[((self.first + query) * heads + head) * dim..][..dim];
                for (channel, &x) in from.iter().enumerate() {
                    room.queries[channel * columns + query * group + member] = x * scale;
                }
            }
        }
        room.keys.resize(KEYS * dim, 0.0);
        room.values.resize(KEYS * dim, 0.0);
        room.scores.resize(KEYS * columns, 0.0);
        room.output.clear();
        room.output.resize(columns * dim, 0.0);
        room.maxima.clear();
        room.maxima.resize(columns, f32::NEG_INFINITY);
        room.sums.clear();
        room.sums.resize(columns, 0.0);
        room.keep.resize(columns, 0.0);
    }

    #[inline(always)]
    fn finish(self) {
        let (group, dim) = (self.job.geometry.heads.group(), self.job.geometry.head_dim);
        let scale = E::FACTOR * self.job.geometry.scales.of(self.lane).value;
        for column in 0..self.count * group {
            let output = &mut self.room.output[column * dim..(column + 1) * dim];
            let sum = self.room.sums[column];
            for to in output.iter_mut() {
                *to = *to / sum * scale;
            }
            let lse = (self.room.maxima[column] + sum.log2()) * std::f32::consts::LN_2;
            (self.write)(self.first + column / group, self.lane * group + column % group, output, lse);
        }
    }
}

/// Converts the rows of a key tile; places of rows that no query of the tile sees become zero.
#[inline(always)]
fn load_keys<S: Simd, E: Element>(simd: S, job: &ManyJob, lane: usize, keys: Range<usize>, room: &mut Room) {
    let (dim, row_bytes) = (job.geometry.head_dim, job.geometry.row_bytes());
    let page = job.pages[keys.start / CHUNK_TOKENS];
    let rows = &page[job.geometry.row_offset(lane, keys.start)..][..keys.len() * row_bytes];
    let places = keys.start % KEYS..keys.start % KEYS + keys.len();
    for (to, from) in [(&mut room.keys, 0), (&mut room.values, dim)] {
        to[..places.start * dim].fill(0.0);
        to[places.end * dim..].fill(0.0);
        for (row, to) in rows.chunks_exact(row_bytes).zip(to[places.start * dim..].chunks_exact_mut(dim)) {
            for channel in (0..dim).step_by(16) {
                // SAFETY: the row has `2 * dim` elements and `to` has `dim`, a multiple of 16.
                unsafe { simd.store(to.as_mut_ptr().add(channel), E::load(simd, row.as_ptr().add((from + channel) * E::BYTES))) };
            }
        }
    }
}

/// Scores to weights, column by column, under each column's running maximum.
#[inline(always)]
fn softmax_columns<S: Simd>(simd: S, room: &mut Room, columns: usize) {
    for first in (0..columns).step_by(16) {
        let scores = room.scores[first..].as_mut_ptr();
        let [maxima, sums, keep] = [&mut room.maxima, &mut room.sums, &mut room.keep].map(|values| values[first..first + 16].as_mut_ptr());
        assert!(room.scores.len() == KEYS * columns);
        // SAFETY: `scores` has KEYS rows of `columns`, of which 16 begin at `first`; the others have 16 elements from `first` on.
        unsafe {
            let before = simd.load(maxima);
            let mut largest = before;
            for key in 0..KEYS {
                largest = simd.max(simd.load(scores.add(key * columns)), largest);
            }
            // A column that has seen no key yet keeps `-inf`, and a finite stand-in keeps the differences numbers.
            let reference = simd.max(largest, simd.splat(f32::MIN));
            let mut sum = simd.splat(0.0);
            for key in 0..KEYS {
                let weight = exp2(simd, simd.sub(simd.load(scores.add(key * columns)), reference));
                sum = simd.add(sum, weight);
                simd.store(scores.add(key * columns), weight);
            }
            let shrink = exp2(simd, simd.sub(before, reference));
            simd.store(maxima, largest);
            simd.store(keep, shrink);
            simd.store(sums, simd.mul_add(simd.load(sums), shrink, sum));
        }
    }
}
