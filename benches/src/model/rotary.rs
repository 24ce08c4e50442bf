//! Rotary position embedding (RoFormer, arXiv 2104.09864, section 3.2) of queries and keys.

use rayon::prelude::*;

use super::config::{RotaryBase, RotaryLayout};

/// The angles of one kind of layer.
pub(crate) struct Rotary {
    layout: RotaryLayout,
    /// Radians a position, for each of the d/2 pairs.
    frequencies: Vec<f64>,
}

/// Cosines and sines of consecutive positions: `[token][d/2]` each.
pub(crate) struct Angles {
    layout: RotaryLayout,
    pairs: usize,
    cosines: Vec<f32>,
    sines: Vec<f32>,
}

impl Rotary {
    /// Frequencies of a head of `head_dim` channels; `divisors` stretch single pairs (Llama 3.1), empty for none.
    pub(crate) fn new(layout: RotaryLayout, rotary: RotaryBase, head_dim: usize, divisors: &[f32]) -> Self {
        let pairs = head_dim / 2;
        let frequency = |pair: usize| {
            let stretch = divisors.get(pair).map_or(1.0, |&divisor| f64::from(divisor));
            f64::from(rotary.base).powf(-(pair as f64) / pairs as f64) / (f64::from(rotary.divisor) * stretch)
        };
        Self { layout, frequencies: (0..pairs).map(frequency).collect() }
    }

    /// The angles of positions `first .. first + tokens`, computed in f64: in f32 a position of 16,384 is off by a thousandth of a radian.
    pub(crate) fn angles(&self, first: usize, tokens: usize) -> Angles {
        let pairs = self.frequencies.len();
        let radians = (0..tokens).flat_map(|token| self.frequencies.iter().map(move |frequency| (first + token) as f64 * frequency));
        let (sines, cosines) = radians.map(|angle| (angle.sin() as f32, angle.cos() as f32)).unzip();
        Angles { layout: self.layout, pairs, cosines, sines }
    }
}

impl Angles {
    /// Turns `rows` (`[token][head][d]`, `heads` a token) in place.
    pub(crate) fn turn(&self, rows: &mut [f32], heads: usize) {
        let pairs = self.pairs;
        rows.par_chunks_mut(heads * 2 * pairs).enumerate().with_min_len(8).for_each(|(token, row)| {
            let cosines = &self.cosines[token * pairs..][..pairs];
            let sines = &self.sines[token * pairs..][..pairs];
            for head in row.chunks_exact_mut(2 * pairs) {
                match self.layout {
                    RotaryLayout::Halves => turn_halves(head, cosines, sines),
                    RotaryLayout::Pairs => turn_pairs(head, cosines, sines),
                }
            }
        });
    }
}

fn turn_halves(head: &mut [f32], cosines: &[f32], sines: &[f32]) {
    let (low, high) = head.split_at_mut(cosines.len());
    for (((x, y), cosine), sine) in low.iter_mut().zip(high).zip(cosines).zip(sines) {
        (*x, *y) = (*x * cosine - *y * sine, *y * cosine + *x * sine);
    }
}

fn turn_pairs(head: &mut [f32], cosines: &[f32], sines: &[f32]) {
    for ((pair, cosine), sine) in head.chunks_exact_mut(2).zip(cosines).zip(sines) {
        let (x, y) = (pair[0], pair[1]);
        (pair[0], pair[1]) = (x * cosine - y * sine, y * cosine + x * sine);
    }
}
