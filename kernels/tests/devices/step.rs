use sluice_kernels::device::{AttendJob, LabelJob, ScoreJob, SelectJob, StepJob, StepResult};
use sluice_kernels::label::LabelPlan;
use sluice_kernels::shape::RowType;

use crate::all_devices;
use crate::data::{Layer, Shape};

#[test]
fn a_step_is_its_verbs_one_after_the_other() {
    for (lanes, count, sinks) in [(1, 100, 4), (2, 77, 0), (3, 1024, 4), (8, 65, 65)] {
        let plan: LabelPlan = "16@4+16@2".parse().expect("a plan");
        let mut layer = Layer::new(Shape { lanes, group: 2, dim: 64, tokens: 1400, row_type: RowType::F16 }, lanes as u64);
        let (coder, query) = (layer.coder(&plan), layer.queries(1));
        let (pages, geometry, query) = (layer.page_slices(), &layer.geometry, &query[..]);
        for mut device in all_devices() {
            let mut labels = vec![vec![0; lanes * 256 * plan.label_bytes()]; 4];
            for (labels, page) in labels.iter_mut().zip(&pages) {
                device.label(&LabelJob { geometry, page, coder: &coder }, labels);
            }
            let labels: Vec<&[u8]> = labels.iter().map(Vec::as_slice).collect();
            let room = || (vec![0; lanes * count], vec![0.0; lanes * 2 * 64], vec![0.0; lanes * 2]);
            let (mut positions, mut output, mut lse) = room();
            let job = StepJob { geometry, query, labels: &labels, coder: &coder, pages: &pages, count, sinks, exact_to: 1400 };
            device.step(&job, StepResult { positions: &mut positions, output: &mut output, lse: &mut lse });

            let mut keys = vec![0; lanes * 1024];
            device.score(&ScoreJob { geometry, query, labels: &labels, coder: &coder }, &mut keys);
            let (mut expected, mut expected_output, mut expected_lse) = room();
            device.select(&SelectJob { keys: &keys, lanes, rows: 1024, count, sinks }, &mut expected);
            let listed = &expected;
            let attend =
                AttendJob { geometry, query, pages: &pages, listed, listed_per_lane: count, exact_from: 1024, exact_to: 1400, hot: None };
            device.attend(&attend, &mut expected_output, &mut expected_lse);
            assert_eq!(positions, expected, "{}", device.name());
            assert_eq!((output, lse), (expected_output, expected_lse), "{}", device.name());
        }
    }
}

#[test]
fn a_step_before_the_first_horizon_is_exact() {
    let plan: LabelPlan = "8@4".parse().expect("a plan");
    let mut layer = Layer::new(Shape { lanes: 2, group: 2, dim: 64, tokens: 300, row_type: RowType::F16 }, 2);
    let (coder, query) = (layer.coder(&plan), layer.queries(1));
    let pages = layer.page_slices();
    for mut device in all_devices() {
        let (mut output, mut lse) = (vec![0.0; 256], vec![0.0; 4]);
        let job = StepJob {
            geometry: &layer.geometry,
            query: &query,
            labels: &[],
            coder: &coder,
            pages: &pages,
            count: 0,
            sinks: 0,
            exact_to: 300,
        };
        device.step(&job, StepResult { positions: &mut [], output: &mut output, lse: &mut lse });
        let rows: Vec<usize> = (0..300).collect();
        for head in 0..4 {
            let (expected, expected_lse, _) = crate::data::naive(&layer, &query[head * 64..(head + 1) * 64], head / 2, &rows);
            crate::data::assert_close(device.name(), &output[head * 64..(head + 1) * 64], &expected, 1e-4);
            crate::data::assert_close(device.name(), &lse[head..=head], &[expected_lse], 1e-4);
        }
    }
}
