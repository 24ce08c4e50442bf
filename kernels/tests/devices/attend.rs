use proptest::prelude::*;
use sluice_kernels::device::cpu::Level;
use sluice_kernels::device::{AttendJob, HotRows};
use sluice_kernels::shape::RowType;

use crate::data::{Layer, ROW_TYPES, Shape, assert_close, naive};
use crate::{all_devices, cpu};

/// What a lane attends, in the model's words.
fn rows_of(job: &AttendJob, lane: usize) -> Vec<usize> {
    let listed = &job.listed[lane * job.listed_per_lane..(lane + 1) * job.listed_per_lane];
    listed.iter().map(|&row| row as usize).chain(job.exact_from..job.exact_to).collect()
}

fn check(layer: &Layer, job: &AttendJob) {
    let Shape { lanes, group, dim, .. } = layer.shape;
    let (mut expected, mut expected_lse, mut expected_mass) = (Vec::new(), Vec::new(), Vec::new());
    for head in 0..lanes * group {
        let query = &job.query[head * dim..(head + 1) * dim];
        let rows = rows_of(job, head / group);
        let (output, lse, _) = naive(layer, query, head / group, &rows);
        let all: Vec<usize> = (0..job.exact_to).collect();
        let shares = naive(layer, query, head / group, &all).2;
        expected.extend(output);
        expected_lse.push(lse);
        expected_mass.push(rows.iter().map(|&row| shares[row]).sum::<f64>());
    }
    for mut device in all_devices() {
        let (mut output, mut lse) = (vec![f32::NAN; lanes * group * dim], vec![f32::NAN; lanes * group]);
        device.attend(job, &mut output, &mut lse);
        assert_close(device.name(), &output, &expected, 1e-4);
        assert_close(device.name(), &lse, &expected_lse, 1e-4);
        let mass = device.mass_kept(job);
        assert_close(device.name(), &mass, &expected_mass, 1e-4);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn attends_the_listed_and_the_exact_rows(
        seed in any::<u64>(), lanes in 1usize..4, group in prop::sample::select(vec![1usize, 2, 3, 4, 5, 7, 8, 16]),
        dim in prop::sample::select(vec![64usize, 96, 128, 256]), tokens in 1usize..1200,
        row_type in prop::sample::select(ROW_TYPES.to_vec()), a in any::<prop::sample::Index>(), b in any::<prop::sample::Index>(),
    ) {
        let mut layer = Layer::new(Shape { lanes, group, dim, tokens, row_type }, seed);
        let query = layer.queries(1);
        let exact_from = a.index(tokens + 1);
        // At least one row is attended.
        let least = usize::from(exact_from == tokens);
        let listed_per_lane = least + b.index(exact_from + 1 - least);
        let listed = layer.listed(listed_per_lane, exact_from);
        let pages = layer.page_slices();
        check(&layer, &AttendJob {
            geometry: &layer.geometry, query: &query, pages: &pages, listed: &listed, listed_per_lane, exact_from, exact_to: tokens, hot: None,
        });
    }
}

#[test]
fn attends_long_lists_of_many_segments() {
    let mut layer = Layer::new(Shape { lanes: 2, group: 4, dim: 64, tokens: 9000, row_type: RowType::F16 }, 5);
    let query = layer.queries(1);
    let listed = layer.listed(3000, 8448);
    let pages = layer.page_slices();
    let job = AttendJob {
        geometry: &layer.geometry,
        query: &query,
        pages: &pages,
        listed: &listed,
        listed_per_lane: 3000,
        exact_from: 8448,
        exact_to: 9000,
        hot: None,
    };
    check(&layer, &job);
}

#[test]
fn scores_far_apart_neither_overflow_nor_vanish() {
    let mut layer = Layer::new(Shape { lanes: 1, group: 2, dim: 64, tokens: 700, row_type: RowType::F32 }, 6);
    let query: Vec<f32> = layer.queries(1).iter().map(|q| q * 40.0).collect();
    let pages = layer.page_slices();
    let job = AttendJob {
        geometry: &layer.geometry,
        query: &query,
        pages: &pages,
        listed: &[],
        listed_per_lane: 0,
        exact_from: 0,
        exact_to: 700,
        hot: None,
    };
    let (output, lse, _) = naive(&layer, &query[..64], 0, &(0..700).collect::<Vec<_>>());
    for mut device in all_devices() {
        let (mut got, mut got_lse) = (vec![0.0; 128], vec![0.0; 2]);
        device.attend(&job, &mut got, &mut got_lse);
        assert_close(device.name(), &got[..64], &output, 1e-3);
        assert_close(device.name(), &got_lse[..1], &[lse], 1e-6 * lse.abs().max(100.0));
    }
}

#[test]
fn nothing_to_attend_gives_zero_and_no_mass() {
    let mut layer = Layer::new(Shape { lanes: 2, group: 3, dim: 96, tokens: 10, row_type: RowType::Bf16 }, 8);
    let query = layer.queries(1);
    let pages = layer.page_slices();
    for mut device in all_devices() {
        let (mut output, mut lse) = (vec![f32::NAN; 6 * 96], vec![f32::NAN; 6]);
        let job = AttendJob {
            geometry: &layer.geometry,
            query: &query,
            pages: &pages,
            listed: &[],
            listed_per_lane: 0,
            exact_from: 5,
            exact_to: 5,
            hot: None,
        };
        device.attend(&job, &mut output, &mut lse);
        assert!(output.iter().all(|&x| x == 0.0) && lse.iter().all(|&x| x == f32::NEG_INFINITY), "{}", device.name());
    }
}

#[test]
fn pages_that_are_not_needed_may_be_missing() {
    let mut layer = Layer::new(Shape { lanes: 2, group: 2, dim: 64, tokens: 1024, row_type: RowType::F16 }, 9);
    let query = layer.queries(1);
    let listed: Vec<u32> = [300u32, 301, 511].repeat(2);
    let whole = layer.page_slices();
    let mut pages = whole.clone();
    (pages[0], pages[2]) = (&[], &[]);
    for mut device in all_devices() {
        let mut results = Vec::new();
        for pages in [&whole, &pages] {
            let (mut output, mut lse) = (vec![0.0; 256], vec![0.0; 4]);
            let job = AttendJob {
                geometry: &layer.geometry,
                query: &query,
                pages,
                listed: &listed,
                listed_per_lane: 3,
                exact_from: 768,
                exact_to: 1000,
                hot: None,
            };
            device.attend(&job, &mut output, &mut lse);
            results.push((output, lse));
        }
        assert_eq!(results[0], results[1], "{}", device.name());
    }
}

#[test]
fn the_bits_do_not_depend_on_threads_nor_on_what_is_listed_and_what_exact() {
    let mut layer = Layer::new(Shape { lanes: 3, group: 6, dim: 128, tokens: 3000, row_type: RowType::F16 }, 10);
    let query = layer.queries(1);
    let pages = layer.page_slices();
    let everything: Vec<u32> = (0..2560).collect::<Vec<u32>>().repeat(3);
    for level in Level::available() {
        let mut results = Vec::new();
        for threads in [1, 2, 3] {
            for (listed, listed_per_lane) in [(&everything[..], 2560), (&[][..], 0)] {
                let (mut output, mut lse) = (vec![0.0; 18 * 128], vec![0.0; 18]);
                let job = AttendJob {
                    geometry: &layer.geometry,
                    query: &query,
                    pages: &pages,
                    listed,
                    listed_per_lane,
                    exact_from: listed_per_lane,
                    exact_to: 3000,
                    hot: None,
                };
                cpu(level, threads).attend(&job, &mut output, &mut lse);
                results.push((output, lse));
            }
        }
        assert!(results.iter().all(|result| *result == results[0]), "{level:?}");
    }
}

#[test]
fn the_bits_do_not_depend_on_hot_copies() {
    let mut layer = Layer::new(Shape { lanes: 2, group: 4, dim: 64, tokens: 1500, row_type: RowType::F16 }, 11);
    let query = layer.queries(1);
    let listed = layer.listed(200, 1024);
    let pages = layer.page_slices();
    let row_bytes = layer.geometry.row_bytes();
    // Every third listed row is hot, in slots that go backwards.
    let hot: Vec<usize> = (0..400).filter(|index| index % 3 == 0).collect();
    let mut slots = vec![HotRows::COLD; 400];
    let mut rows = vec![0; hot.len() * row_bytes];
    for (order, &index) in hot.iter().enumerate() {
        let slot = hot.len() - 1 - order;
        let position = listed[index] as usize;
        let from = ((index / 200) * 256 + position % 256) * row_bytes;
        rows[slot * row_bytes..(slot + 1) * row_bytes].copy_from_slice(&pages[position / 256][from..from + row_bytes]);
        slots[index] = slot as u32;
    }
    for mut device in all_devices() {
        let mut run = |hot: Option<HotRows>| {
            let (mut output, mut lse) = (vec![0.0; 512], vec![0.0; 8]);
            let job = AttendJob {
                geometry: &layer.geometry,
                query: &query,
                pages: &pages,
                listed: &listed,
                listed_per_lane: 200,
                exact_from: 1024,
                exact_to: 1500,
                hot,
            };
            device.attend(&job, &mut output, &mut lse);
            (output, lse)
        };
        let (cold, warm) = (run(None), run(Some(HotRows { slots: &slots, rows: &rows })));
        assert_eq!(cold, warm);
        let mut wrong = rows.clone();
        wrong.rotate_left(row_bytes);
        assert_ne!(cold, run(Some(HotRows { slots: &slots, rows: &wrong })), "the copies are what is read");
    }
}
