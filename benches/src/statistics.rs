//! Medians, and how sure they are.

use crate::generator::Random;

/// Best, median and worst of a number of measurements.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Spread {
    /// Smallest value: what it takes when nothing else runs.
    pub best: f64,
    /// Middle value; of an even number the mean of the two in the middle.
    pub median: f64,
    /// Largest value.
    pub worst: f64,
}

/// Smallest, median and largest of `values`; `None` of none.
#[must_use]
pub fn spread(values: &[f64]) -> Option<Spread> {
    let worst = values.iter().copied().max_by(f64::total_cmp)?;
    let best = values.iter().copied().min_by(f64::total_cmp)?;
    Some(Spread { best, median: median(values)?, worst })
}

/// Middle value; of an even number the mean of the two in the middle; `None` of none.
#[must_use]
pub fn median(values: &[f64]) -> Option<f64> {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let middle = sorted.len() / 2;
    let upper = *sorted.get(middle)?;
    Some(if sorted.len().is_multiple_of(2) { f64::midpoint(sorted[middle - 1], upper) } else { upper })
}

/// A median with the bounds between which it lies with 95 % confidence.
#[derive(Clone, Copy, Debug, PartialEq, serde::Serialize)]
pub struct Interval {
    /// 2.5 % quantile of the resampled medians.
    pub low: f64,
    /// The median itself.
    pub median: f64,
    /// 97.5 % quantile of the resampled medians.
    pub high: f64,
}

/// Percentile bootstrap of the median (Efron, 1979) with `resamples` resamples; `None` of no values.
#[must_use]
pub fn bootstrap_median(values: &[f64], resamples: usize, seed: u64) -> Option<Interval> {
    let middle = median(values)?;
    let mut random = Random::new(&[seed, values.len() as u64]);
    let mut drawn = vec![0.0; values.len()];
    let mut medians: Vec<f64> = (0..resamples.max(1))
        .filter_map(|_| {
            drawn.fill_with(|| values[random.below(values.len())]);
            median(&drawn)
        })
        .collect();
    medians.sort_by(f64::total_cmp);
    let at = |quantile: f64| medians[((medians.len() - 1) as f64 * quantile).round() as usize];
    Some(Interval { low: at(0.025), median: middle, high: at(0.975) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_is_the_middle_and_the_worst_the_largest() {
        assert_eq!(spread(&[]), None);
        assert_eq!(spread(&[3.0]), Some(Spread { best: 3.0, median: 3.0, worst: 3.0 }));
        assert_eq!(spread(&[9.0, 1.0, 2.0]), Some(Spread { best: 1.0, median: 2.0, worst: 9.0 }));
        assert_eq!(spread(&[4.0, 1.0, 9.0, 2.0]), Some(Spread { best: 1.0, median: 3.0, worst: 9.0 }));
    }

    #[test]
    fn the_bootstrap_covers_the_true_median_of_most_samples() {
        let mut covered = 0;
        for sample in 0..100 {
            let mut random = Random::new(&[sample]);
            let values: Vec<f64> = (0..80).map(|_| 5.0 + f64::from(random.normal())).collect();
            let interval = bootstrap_median(&values, 300, sample).expect("values");
            assert!(interval.low <= interval.median && interval.median <= interval.high);
            assert!(interval.high - interval.low < 1.0, "{interval:?}");
            covered += usize::from(interval.low <= 5.0 && 5.0 <= interval.high);
        }
        assert!((88..=100).contains(&covered), "95 % intervals covered the median {covered} times of 100");
        assert_eq!(bootstrap_median(&[], 10, 0), None);
    }
}
