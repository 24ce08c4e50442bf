use proptest::prelude::*;
use sluice_kernels::device::SelectJob;

use crate::all_devices;

/// Sinks, then the highest keys one by one, the first of equal ones.
fn naive(keys: &[u16], count: usize, sinks: usize) -> Vec<u32> {
    let mut taken: Vec<bool> = (0..keys.len()).map(|row| row < sinks).collect();
    for _ in sinks..count {
        let mut best: Option<usize> = None;
        for row in 0..keys.len() {
            if !taken[row] && best.is_none_or(|best| keys[row] > keys[best]) {
                best = Some(row);
            }
        }
        taken[best.expect("a row is left")] = true;
    }
    (0..keys.len()).filter(|&row| taken[row]).map(|row| row as u32).collect()
}

fn check(lanes: &[Vec<u16>], count: usize, sinks: usize) {
    let rows = lanes[0].len();
    let keys: Vec<u16> = lanes.concat();
    let expected: Vec<u32> = lanes.iter().flat_map(|keys| naive(keys, count, sinks)).collect();
    for mut device in all_devices() {
        let mut positions = vec![u32::MAX; lanes.len() * count];
        device.select(&SelectJob { keys: &keys, lanes: lanes.len(), rows, count, sinks }, &mut positions);
        assert_eq!(positions, expected, "{}: {count} of {rows}, {sinks} sinks", device.name());
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn selects_what_repeated_search_selects(
        rows in 1usize..700, top in prop::sample::select(vec![0u16, 1, 3, 40, 1000, u16::MAX]), seed in any::<u64>(),
        count in any::<prop::sample::Index>(), sinks in any::<prop::sample::Index>(),
    ) {
        let mut state = seed;
        let mut key = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            ((state >> 33) % (u64::from(top) + 1)) as u16 + if top < 1000 && seed % 2 == 0 { u16::MAX - top } else { 0 }
        };
        let lanes: Vec<Vec<u16>> = (0..3).map(|_| (0..rows).map(|_| key()).collect()).collect();
        let count = count.index(rows + 1);
        check(&lanes, count, sinks.index(count + 1));
    }
}

#[test]
fn selects_everything_and_nothing() {
    let lanes = vec![(0..512).map(|row| row as u16 * 17 % 256).collect::<Vec<u16>>(); 2];
    check(&lanes, 512, 4);
    check(&lanes, 512, 512);
    check(&lanes, 0, 0);
    check(&lanes, 4, 4);
}

/// As [`naive`], fast enough for long lanes.
fn by_sorting(keys: &[u16], count: usize, sinks: usize) -> Vec<u32> {
    let mut rest: Vec<(i32, u32)> = (sinks..keys.len()).map(|row| (-i32::from(keys[row]), row as u32)).collect();
    rest.sort_unstable();
    let mut picked: Vec<u32> = (0..sinks as u32).chain(rest[..count - sinks].iter().map(|&(_, row)| row)).collect();
    picked.sort_unstable();
    picked
}

/// The key of a row.
type Key = Box<dyn Fn(usize) -> u16>;

#[test]
fn long_lanes_are_selected_exactly_whatever_their_keys() {
    let hash = |row: usize| ((row as u64).wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 40) as u32;
    let kinds: [(&str, Key); 7] = [
        ("spread", Box::new(move |row| hash(row) as u16)),
        ("few values", Box::new(move |row| (hash(row) % 5) as u16 * 9000)),
        ("all equal", Box::new(|_| 777)),
        ("rising", Box::new(|row| (row / 2) as u16)),
        ("every eighth vector low", Box::new(move |row| if row / 32 % 8 == 0 { 0 } else { 1000 + (hash(row) % 1000) as u16 })),
        ("every eighth vector high", Box::new(move |row| if row / 32 % 8 == 0 { u16::MAX } else { (hash(row) % 1000) as u16 })),
        ("clustered", Box::new(move |row| (hash(row / 300) % 40_000) as u16 + (hash(row) % 3000) as u16)),
    ];
    for (name, key) in kinds {
        let rows = 40_961;
        let keys: Vec<u16> = (0..rows).map(key).collect();
        for (count, sinks) in [(1, 0), (5, 4), (640, 4), (2560, 3), (20_000, 0), (40_960, 7), (40_961, 4)] {
            let expected = by_sorting(&keys, count, sinks);
            for mut device in all_devices() {
                let mut positions = vec![u32::MAX; count];
                device.select(&SelectJob { keys: &keys, lanes: 1, rows, count, sinks }, &mut positions);
                assert!(positions == expected, "{}: {name}, {count} with {sinks} sinks", device.name());
            }
        }
    }
}

#[test]
fn parts_of_a_lane_of_any_length_make_one_list() {
    // Blocks of the CUDA device have one part of a lane each: of less than a tile of rows, of two tiles that they keep, and of more than they keep.
    let hash = |row: usize| (row as u32).wrapping_mul(2_654_435_761) >> 9;
    for rows in [5000, 20_000, 70_000, 300_000, 600_000] {
        let keys: Vec<u16> = (0..rows).map(|row| (hash(row / 16) % 40_000) as u16 + (hash(row) % 3) as u16).collect();
        for (count, sinks) in [(rows / 64, 4), (rows / 3, 0)] {
            let expected = by_sorting(&keys, count, sinks);
            for mut device in all_devices() {
                let mut positions = vec![u32::MAX; count];
                device.select(&SelectJob { keys: &keys, lanes: 1, rows, count, sinks }, &mut positions);
                assert!(positions == expected, "{}: {count} of {rows}", device.name());
            }
        }
    }
}
