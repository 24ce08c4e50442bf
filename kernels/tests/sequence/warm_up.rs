//! Warming up brings what the prompt's last queries select, and never changes a result.

use sluice_kernels::decoder::{Attend, Decoder, StepRequest};
use sluice_kernels::device::open;
use sluice_kernels::sequence::Sequence;

use crate::support::{TestDaemon, calibration, shape_of};
use crate::{SPARSE, append, everything, query, stepped};

/// A dense step of the last tokens of a prompt, as prefill performs it.
fn prompt(decoder: &mut Decoder, sequence: &mut Sequence, layer: usize, positions: std::ops::Range<usize>) {
    let queries: Vec<f32> = positions.clone().flat_map(|position| query(sequence, layer, position)).collect();
    let heads = sequence.part(layer).geometry.heads.query_heads();
    let (mut output, mut lse) = (vec![0.0; queries.len()], vec![0.0; positions.len() * heads]);
    let (first_position, attend) = (positions.start, Attend::Dense);
    let mut request = StepRequest { sequence, first_position, queries: &queries, attend, output: &mut output, lse: &mut lse };
    decoder.step_one(layer, &mut request).expect("a dense step");
}

/// Rows fetched until the layer is warm.
fn warm_up(decoder: &mut Decoder, sequence: &mut Sequence, layer: usize) -> u64 {
    let mut fetched = 0;
    loop {
        let warmed = decoder.warm_up(layer, sequence).expect("everything is there");
        fetched += warmed.fetched_rows;
        if warmed.is_done {
            return fetched;
        }
    }
}

#[test]
fn the_first_step_finds_what_the_last_queries_selected() {
    for (kind, row_type) in everything() {
        let shape = shape_of(row_type);
        let run = |is_warmed: bool| {
            let mut decoder = Decoder::new(open(kind, 2).expect("device"));
            let mut daemon = TestDaemon::new(shape.clone(), Some(calibration(&shape)), 16);
            let mut sequence = daemon.attach(SPARSE, None, 0);
            sequence.set_hot_rows(700);
            append(&mut sequence, 0..2600);
            daemon.seal();
            daemon.refresh(&mut sequence);
            let (mut fetched, mut results) = (0, Vec::new());
            for layer in 0..3 {
                prompt(&mut decoder, &mut sequence, layer, 2590..2600);
                fetched += if is_warmed { warm_up(&mut decoder, &mut sequence, layer) } else { 0 };
                // Queries 2596 to 2599 were kept; 2595 was not.
                for position in [2596, 2599, 2595] {
                    let (output, report) = stepped(&mut decoder, &mut sequence, layer, position, Attend::Sparse);
                    results.push((position, layer, output, report.hot_rows, report.selected_rows));
                }
            }
            let left = decoder.warm_up(0, &mut sequence).expect("everything is there");
            assert_eq!(left.is_done, is_warmed, "queries are used once");
            (fetched, results)
        };
        let ((none, cold), (fetched, warm)) = (run(false), run(true));
        assert!(none == 0 && fetched > 0, "{kind}, {row_type:?}: {fetched} rows fetched");
        for (cold, warm) in cold.iter().zip(&warm) {
            assert!(cold.2 == warm.2, "{kind}, {row_type:?}: layer {} at {}", warm.1, warm.0);
            if warm.0 != 2595 && warm.1 != 1 {
                assert_eq!(warm.3, warm.4, "{kind}, {row_type:?}: layer {} at {}: all is hot", warm.1, warm.0);
            }
        }
        assert!(cold[0].3 < cold[0].4, "{kind}: the first step misses otherwise");
    }
}
