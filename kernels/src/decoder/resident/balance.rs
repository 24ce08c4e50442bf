//! Which hot places move between the lanes of a sequence.
//!
//! Lanes begin with equal pools, but they differ in how often they miss (docs/results/replay.md). How a lane's misses depend on its pool is known
//! at one size only, so they are taken to fall exponentially from missing everything without a pool: with b blocks and m of s selected rows
//! missed, one block more saves m (1 - (m / s)^(1 / b)), and one less costs m ((s / m)^(1 / b) - 1). In the traces that ranks lanes as their
//! own curves do. Blocks go, one after the other, from who loses least by that to who gains most.

use std::cmp::{Ordering, Reverse};
use std::collections::BinaryHeap;

use crate::device::cuda::store::PoolMove;

/// Steps from one consideration to the next.
const EVERY: usize = 8;
/// What is left of older counts at the next consideration.
const KEPT: f64 = 0.8;
/// A block moves where it saves more than this times what it costs: the rows in it have to be fetched again, and counts are noisy.
const WORTH: f64 = 1.3;
/// One in so many blocks of the sequence moves at a time, at most, and of a lane.
const ONE_IN: usize = 8;

/// Use of a lane's hot places.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LaneUse {
    /// Blocks that it has.
    pub blocks: usize,
    /// Rows that it selected.
    pub selected: f64,
    /// Of them, those that were not hot.
    pub missed: f64,
}

/// Blocks of a lane.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlockBounds {
    /// At least, for the rows that it selects in a step.
    pub least: usize,
    /// At most.
    pub most: usize,
}

/// What a lane's misses would be with other pools.
#[derive(Clone, Copy, Debug)]
struct Forecast {
    missed: f64,
    /// What one block more leaves of them.
    factor: f64,
}

impl Forecast {
    fn of(lane: &LaneUse) -> Self {
        let selected = lane.selected.max(1.0);
        // A lane that missed nothing may miss something soon.
        let missed = lane.missed.clamp(0.5, selected);
        Self { missed, factor: (missed / selected).powf(1.0 / lane.blocks.max(1) as f64) }
    }

    fn with_more(self) -> Self {
        Self { missed: self.missed * self.factor, ..self }
    }

    fn with_less(self) -> Self {
        Self { missed: self.missed / self.factor, ..self }
    }

    fn gain(self) -> f64 {
        self.missed - self.with_more().missed
    }

    fn loss(self) -> f64 {
        self.with_less().missed - self.missed
    }
}

/// Numbers in their order.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Ordered(f64);

impl Eq for Ordered {}

impl PartialOrd for Ordered {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Ordered {
    fn cmp(&self, other: &Self) -> Ordering {
        self.0.total_cmp(&other.0)
    }
}

/// Moves of blocks between lanes that are worth it. No lane both gives and takes; of equal lanes the first one does.
#[must_use]
pub fn moves(lanes: &[LaneUse], bounds: BlockBounds) -> Vec<PoolMove> {
    let mut forecasts: Vec<Forecast> = lanes.iter().map(Forecast::of).collect();
    let mut blocks: Vec<usize> = lanes.iter().map(|lane| lane.blocks).collect();
    let least = |lane: usize| bounds.least.max(lanes[lane].blocks - lanes[lane].blocks / ONE_IN);
    let mut gains: BinaryHeap<(Ordered, Reverse<usize>)> =
        forecasts.iter().enumerate().map(|(lane, forecast)| (Ordered(forecast.gain()), Reverse(lane))).collect();
    let mut losses: BinaryHeap<Reverse<(Ordered, usize)>> =
        forecasts.iter().enumerate().map(|(lane, forecast)| Reverse((Ordered(forecast.loss()), lane))).collect();
    let most_moves = (blocks.iter().sum::<usize>() / ONE_IN).max(1);
    let mut moves = Vec::new();
    while moves.len() < most_moves {
        // A lane that cannot give, or take, any more leaves its heap.
        let (Some(&Reverse((Ordered(loss), from))), Some(&(Ordered(gain), Reverse(to)))) = (losses.peek(), gains.peek()) else { break };
        if blocks[from] <= least(from) || blocks[from] > lanes[from].blocks {
            losses.pop();
        } else if blocks[to] >= bounds.most || blocks[to] < lanes[to].blocks {
            gains.pop();
        } else if from == to || gain <= loss * WORTH {
            break;
        } else {
            moves.push(PoolMove { from, to });
            blocks[from] -= 1;
            blocks[to] += 1;
            forecasts[from] = forecasts[from].with_less();
            forecasts[to] = forecasts[to].with_more();
            losses.pop();
            losses.push(Reverse((Ordered(forecasts[from].loss()), from)));
            gains.pop();
            gains.push((Ordered(forecasts[to].gain()), Reverse(to)));
        }
    }
    moves
}

/// Counts of all lanes of a sequence, step by step, and the moves that follow from them.
#[derive(Clone, Debug)]
pub struct Balance {
    /// `[layer][lane]`: selected and missed rows, older ones by less.
    counts: Vec<[f64; 2]>,
    steps: usize,
}

impl Balance {
    /// Nothing counted yet for `lanes` lanes of all layers.
    #[must_use]
    pub fn new(lanes: usize) -> Self {
        Self { counts: vec![[0.0; 2]; lanes], steps: 0 }
    }

    /// Adds hits and misses of consecutive lanes.
    pub fn count(&mut self, first_lane: usize, counts: &[[u64; 2]]) {
        for (sum, [hits, misses]) in self.counts[first_lane..].iter_mut().zip(counts) {
            sum[0] += (hits + misses) as f64;
            sum[1] += *misses as f64;
        }
    }

    /// Ends a step; says which blocks move before the next one. `blocks` are those of every lane now.
    pub fn end_step(&mut self, blocks: &[usize], bounds: BlockBounds) -> Vec<PoolMove> {
        self.steps += 1;
        if !self.steps.is_multiple_of(EVERY) {
            return Vec::new();
        }
        let lanes: Vec<LaneUse> =
            self.counts.iter().zip(blocks).map(|(&[selected, missed], &blocks)| LaneUse { blocks, selected, missed }).collect();
        let moves = moves(&lanes, bounds);
        // Counts go on as if the pools had been what they are now.
        let mut forecasts: Vec<Forecast> = lanes.iter().map(Forecast::of).collect();
        for &PoolMove { from, to } in &moves {
            forecasts[from] = forecasts[from].with_less();
            forecasts[to] = forecasts[to].with_more();
        }
        for (sum, forecast) in self.counts.iter_mut().zip(forecasts) {
            *sum = [KEPT * sum[0], KEPT * forecast.missed];
        }
        moves
    }
}

#[cfg(test)]
mod tests {
    use rand::rngs::StdRng;
    use rand::{Rng, SeedableRng};

    use super::*;

    const WIDE: BlockBounds = BlockBounds { least: 1, most: 1000 };

    fn lane(blocks: usize, missed: f64) -> LaneUse {
        LaneUse { blocks, selected: 1000.0, missed }
    }

    #[test]
    fn the_lane_that_misses_least_gives_to_the_one_that_misses_most() {
        let moves = moves(&[lane(10, 100.0), lane(10, 300.0), lane(10, 10.0), lane(10, 150.0)], WIDE);
        assert!(!moves.is_empty() && moves.iter().all(|at| *at == PoolMove { from: 2, to: 1 }), "{moves:?}");
    }

    #[test]
    fn lanes_alike_keep_their_places() {
        assert_eq!(moves(&[lane(10, 100.0); 8], WIDE), vec![]);
        // What noise would do.
        let alike: Vec<LaneUse> = (0..8).map(|index| lane(10, 100.0 + f64::from(index))).collect();
        assert_eq!(moves(&alike, WIDE), vec![]);
        assert_eq!(moves(&[lane(10, 1000.0); 3], WIDE), vec![], "nothing is hot yet");
        assert_eq!(moves(&[lane(10, 0.0); 3], WIDE), vec![], "everything is hot");
        assert_eq!(moves(&[], WIDE), vec![]);
    }

    #[test]
    fn no_lane_goes_below_what_it_selects_or_above_what_it_can_number() {
        let lanes = [lane(40, 400.0), lane(40, 1.0), lane(40, 2.0)];
        // Blocks that lanes 1 and 2 give; lane 0 takes them.
        let given = |bounds: BlockBounds| {
            let moves = moves(&lanes, bounds);
            assert!(moves.iter().all(|at| at.to == 0 && at.from > 0), "{moves:?}");
            [1, 2].map(|lane| moves.iter().filter(|at| at.from == lane).count())
        };
        assert_eq!(given(BlockBounds { least: 40, most: 100 }), [0, 0]);
        assert_eq!(given(BlockBounds { least: 38, most: 100 }), [2, 2]);
        assert_eq!(given(BlockBounds { least: 1, most: 43 }), [3, 0]);
        assert_eq!(given(BlockBounds { least: 1, most: 100 }), [5, 5], "an eighth of a lane at a time");
        let many = [vec![lane(40, 400.0)], vec![lane(4, 1.0); 6]].concat();
        assert_eq!(moves(&many, BlockBounds { least: 1, most: 100 }), vec![], "small lanes have no eighth");
    }

    #[test]
    fn a_step_counts_until_its_turn_comes_and_less_later() {
        let bounds = BlockBounds { least: 1, most: 100 };
        let mut balance = Balance::new(4);
        let mut given = Vec::new();
        for _ in 0..EVERY {
            balance.count(0, &[[600, 400], [990, 10]]);
            balance.count(2, &[[990, 10], [600, 400]]);
            given.push(balance.end_step(&[10; 4], bounds).len());
        }
        assert!(given[..EVERY - 1].iter().all(|&count| count == 0) && given[EVERY - 1] == 2, "{given:?}");
        // The other way round now: what was counted before the moves is outvoted in the end.
        let mut turned = None;
        for step in 0..20 * EVERY {
            balance.count(0, &[[990, 10], [600, 400], [600, 400], [990, 10]]);
            let moves = balance.end_step(&[10; 4], bounds);
            if turned.is_none() && moves.iter().any(|at| at.from == 0 || at.from == 3) {
                turned = Some(step);
            }
        }
        assert!(turned.is_some_and(|step| step > EVERY), "{turned:?}");
    }

    /// Misses of a lane with `blocks` blocks.
    #[derive(Clone, Copy)]
    struct Curve {
        selected: f64,
        blocks: f64,
    }

    impl Curve {
        fn missed(self, blocks: usize) -> f64 {
            self.selected * (-(blocks as f64) / self.blocks).exp()
        }
    }

    /// The least misses that any division of `total` blocks leaves, by trying all for lane after lane.
    fn best(curves: &[Curve], bounds: BlockBounds, total: usize) -> f64 {
        // Least misses of the lanes so far with so many blocks between them.
        let mut least = vec![f64::INFINITY; total + 1];
        least[0] = 0.0;
        for &curve in curves {
            let mut with = vec![f64::INFINITY; total + 1];
            for before in 0..=total {
                for own in bounds.least..=bounds.most.min(total - before) {
                    with[before + own] = with[before + own].min(least[before] + curve.missed(own));
                }
            }
            least = with;
        }
        least[total]
    }

    #[test]
    fn moving_comes_near_the_best_division() {
        let mut rng = StdRng::seed_from_u64(11);
        for case in 0..60 {
            let count = rng.random_range(2..7);
            let bounds = BlockBounds { least: rng.random_range(1..6), most: rng.random_range(30..60) };
            let each = rng.random_range(16..30);
            let curves: Vec<Curve> =
                (0..count).map(|_| Curve { selected: rng.random_range(500.0..1500.0), blocks: rng.random_range(3.0..25.0) }).collect();
            let mut blocks = vec![each; count];
            for _ in 0..200 {
                let lanes: Vec<LaneUse> = curves
                    .iter()
                    .zip(&blocks)
                    .map(|(curve, &blocks)| LaneUse { blocks, selected: curve.selected, missed: curve.missed(blocks) })
                    .collect();
                let moves = moves(&lanes, bounds);
                assert!(moves.len() <= (count * each / ONE_IN).max(1), "case {case}: bounded");
                for PoolMove { from, to } in moves {
                    blocks[from] -= 1;
                    blocks[to] += 1;
                }
                assert_eq!(blocks.iter().sum::<usize>(), count * each, "case {case}");
                assert!(blocks.iter().all(|blocks| (bounds.least..=bounds.most).contains(blocks)), "case {case}: {blocks:?}");
            }
            let missed: f64 = curves.iter().zip(&blocks).map(|(curve, &blocks)| curve.missed(blocks)).sum();
            let equal: f64 = curves.iter().map(|curve| curve.missed(each)).sum();
            let best = best(&curves, bounds, count * each);
            // A lane of fewer than eight blocks keeps them, and what is not worth a third more stays where it is.
            assert!(
                missed <= equal && missed - best <= 0.06 * best + 0.25 * (equal - best),
                "case {case}: {missed}, best {best}, equal {equal}"
            );
        }
    }
}
