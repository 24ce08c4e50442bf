use std::collections::BTreeMap;

use proptest::prelude::*;
use sluice_kernels::device::{AttendJob, HotRows};
use sluice_kernels::hot::{HotCounts, HotFetch, HotPool};
use sluice_kernels::shape::RowType;

use crate::all_devices;
use crate::data::{Layer, Shape};

/// The rule in the pool's documentation, replayed on plain sets: which positions are hot.
struct Replay {
    capacity: usize,
    hot: Vec<u32>,
    counts: HotCounts,
}

impl Replay {
    fn step(&mut self, selected: &[u32], keys: &[u16]) {
        let missing: Vec<u32> = selected.iter().copied().filter(|row| !self.hot.contains(row)).collect();
        self.counts.misses += missing.len() as u64;
        self.counts.hits += (selected.len() - missing.len()) as u64;
        for row in missing {
            if self.hot.len() == self.capacity {
                let unselected = self.hot.iter().copied().filter(|row| !selected.contains(row));
                let Some(victim) = unselected.min_by_key(|&row| (keys[row as usize], u32::MAX - row)) else { break };
                self.hot.retain(|&row| row != victim);
            }
            if self.capacity > 0 {
                self.hot.push(row);
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn any_hot_state_counts_as_a_replay_does_and_changes_no_bit(seed in any::<u64>(), capacity in 0usize..90, count in 1usize..60) {
        let mut layer = Layer::new(Shape { lanes: 2, group: 2, dim: 64, tokens: 600, row_type: RowType::F16 }, seed);
        let mut pool = HotPool::new(2, capacity, layer.geometry.row_bytes());
        let mut replays = [(); 2].map(|()| Replay { capacity, hot: Vec::new(), counts: HotCounts::default() });
        let mut devices = all_devices();
        for step in 0..8u32 {
            // Neighbouring steps select much the same: rows below a bound that moves.
            let listed = layer.listed(count, (80 + 40 * step as usize).min(512));
            let keys: Vec<u16> = (0..512u32).map(|row| ((row ^ step).wrapping_mul(2_654_435_761) >> 25) as u16).collect();
            let query = layer.queries(1);
            let pages = layer.page_slices();
            let mut slots = vec![0; 2 * count];
            for lane in 0..2 {
                let (listed, slots) = (&listed[lane * count..(lane + 1) * count], &mut slots[lane * count..(lane + 1) * count]);
                pool.resolve(lane, listed, &keys, &HotFetch { geometry: &layer.geometry, pages: &pages }, slots);
                replays[lane].step(listed, &keys);
                let hot: BTreeMap<u32, ()> = replays[lane].hot.iter().map(|&row| (row, ())).collect();
                for (row, slot) in listed.iter().zip(slots) {
                    prop_assert_eq!(*slot != HotRows::COLD, hot.contains_key(row), "lane {}, row {}", lane, row);
                }
            }
            let both = replays.each_ref().map(|replay| replay.counts);
            let sum = HotCounts { hits: both[0].hits + both[1].hits, misses: both[0].misses + both[1].misses };
            prop_assert_eq!(pool.counts(), sum);
            let cold = AttendJob {
                geometry: &layer.geometry, query: &query, pages: &pages, listed: &listed, listed_per_lane: count, exact_from: 512, exact_to: 600, hot: None,
            };
            let warm = AttendJob { hot: Some(HotRows { slots: &slots, rows: pool.rows() }), ..cold };
            let device = &mut devices[step as usize % 4];
            let mut run = |job: &AttendJob| {
                let (mut output, mut lse) = (vec![0.0; 256], vec![0.0; 4]);
                device.attend(job, &mut output, &mut lse);
                (output, lse)
            };
            prop_assert_eq!(run(&cold), run(&warm));
        }
    }
}

#[test]
fn truncating_forgets_rows_at_and_after_the_new_length() {
    let layer = Layer::new(Shape { lanes: 1, group: 1, dim: 64, tokens: 256, row_type: RowType::F32 }, 4);
    let pages = layer.page_slices();
    let fetch = HotFetch { geometry: &layer.geometry, pages: &pages };
    let mut pool = HotPool::new(1, 4, layer.geometry.row_bytes());
    let mut slots = [0; 4];
    pool.resolve(0, &[3, 9, 10, 200], &[0; 256], &fetch, &mut slots);
    pool.truncate(10);
    pool.resolve(0, &[3, 9, 10, 11], &[0; 256], &fetch, &mut slots);
    assert_eq!(pool.counts(), HotCounts { hits: 2, misses: 6 });
    assert!(slots.iter().all(|&slot| slot != HotRows::COLD));
    let row_bytes = layer.geometry.row_bytes();
    for (position, slot) in [3usize, 9, 10, 11].into_iter().zip(slots) {
        assert_eq!(pool.rows()[slot as usize * row_bytes..][..row_bytes], pages[0][position * row_bytes..][..row_bytes], "row {position}");
    }
}
