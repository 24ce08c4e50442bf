use proptest::prelude::*;
use sluice_kernels::device::ManyJob;
use sluice_kernels::device::cpu::Level;
use sluice_kernels::shape::RowType;

use crate::data::{Layer, ROW_TYPES, Shape, assert_close, naive};
use crate::{all_devices, cpu};

fn check(layer: &mut Layer, queries: usize, window: Option<usize>) {
    let Shape { lanes, group, dim, tokens, .. } = layer.shape;
    let first_position = tokens - queries;
    let query = layer.queries(queries);
    let mut pages = layer.page_slices();
    if let Some(window) = window {
        let needed = (first_position + 1).saturating_sub(window) / 256;
        pages[..needed].fill(&[]);
    }
    let (mut expected, mut expected_lse) = (Vec::new(), Vec::new());
    for index in 0..queries {
        let position = first_position + index;
        let rows: Vec<usize> = (0..=position).filter(|row| window.is_none_or(|window| row + window > position)).collect();
        for head in 0..lanes * group {
            let (output, lse, _) = naive(layer, &query[(index * lanes * group + head) * dim..][..dim], head / group, &rows);
            expected.extend(output);
            expected_lse.push(lse);
        }
    }
    let job = ManyJob { geometry: &layer.geometry, queries: &query, first_position, window, pages: &pages };
    for mut device in all_devices() {
        let (mut output, mut lse) = (vec![f32::NAN; expected.len()], vec![f32::NAN; expected_lse.len()]);
        device.attend_many(&job, &mut output, &mut lse);
        assert_close(device.name(), &output, &expected, 1e-4);
        assert_close(device.name(), &lse, &expected_lse, 1e-4);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]

    #[test]
    fn each_query_attends_its_own_past(
        seed in any::<u64>(), lanes in 1usize..3, group in prop::sample::select(vec![1usize, 2, 3, 4, 8]),
        dim in prop::sample::select(vec![64usize, 96, 128, 256]), tokens in 1usize..700, queries in any::<prop::sample::Index>(),
        row_type in prop::sample::select(ROW_TYPES.to_vec()), window in prop::option::of(1usize..400),
    ) {
        let queries = 1 + queries.index(tokens.min(90));
        check(&mut Layer::new(Shape { lanes, group, dim, tokens, row_type }, seed), queries, window);
    }
}

#[test]
fn a_whole_prompt_spans_tiles_of_queries_and_keys() {
    check(&mut Layer::new(Shape { lanes: 1, group: 4, dim: 64, tokens: 400, row_type: RowType::F16 }, 1), 400, None);
    check(&mut Layer::new(Shape { lanes: 2, group: 1, dim: 64, tokens: 600, row_type: RowType::F16 }, 2), 600, Some(130));
}

#[test]
fn the_bits_do_not_depend_on_neighbours_nor_threads() {
    let mut layer = Layer::new(Shape { lanes: 2, group: 4, dim: 96, tokens: 800, row_type: RowType::Bf16 }, 3);
    let queries = layer.queries(300);
    let pages = layer.page_slices();
    for level in Level::available() {
        for window in [None, Some(200)] {
            let run = |threads: usize, piece: usize| {
                let (mut output, mut lse) = (Vec::new(), Vec::new());
                let mut device = cpu(level, threads);
                for (index, queries) in queries.chunks(piece * 8 * 96).enumerate() {
                    let (mut o, mut l) = (vec![0.0; queries.len()], vec![0.0; queries.len() / 96]);
                    let job = ManyJob { geometry: &layer.geometry, queries, first_position: 500 + index * piece, window, pages: &pages };
                    device.attend_many(&job, &mut o, &mut l);
                    output.extend(o);
                    lse.extend(l);
                }
                (output, lse)
            };
            let whole = run(1, 300);
            assert_eq!(whole, run(2, 300), "{level:?}: threads");
            assert_eq!(whole, run(3, 7), "{level:?}: pieces of 7 queries");
        }
    }
}
