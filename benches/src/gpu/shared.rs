//! What it buys that the labels of chunks which several sequences have in common are read once for all of them.

use std::ops::Range;

use anyhow::{Context, Result, ensure};
use sluice_kernels::device::cuda::CudaError;
use sluice_kernels::device::cuda::batch::Batch;
use sluice_kernels::device::cuda::cut::Cut;
use sluice_kernels::device::cuda::joint::{Joins, most_members};
use sluice_kernels::device::cuda::timer::Timer;
use sluice_kernels::slot::CHUNK_TOKENS;

use super::outcome::{Outcome, PartOutcome, StepOutcome};
use super::scene::{Scene, SparsePlan};
use super::timed::timed;
use crate::report::show_progress;
use crate::statistics::median;

/// Puts one layer of some slots on the batch's stream.
type Enqueue = fn(&Batch, usize, Range<usize>) -> Result<(), CudaError>;

/// Launches of each graph before those that are timed.
const WARM_UP: usize = 3;

/// Times scores, and steps without misses, of two sequences and more that have the scene's prefix in common: each scored alone, and all jointly,
/// in turns.
///
/// # Errors
/// Memory or a launch that is refused, or sequences that are not joined.
pub fn shared(scene: &Scene<'_>, plans: &[(&str, SparsePlan)], rounds: usize, outcome: &mut Outcome) -> Result<()> {
    let most = most_members(scene.geometry().heads.group()).min(scene.sequences);
    for (members, (name, plan)) in (2..=most).flat_map(|members| plans.iter().map(move |plan| (members, plan))) {
        show_progress(&format!("{members} sequences with a common prefix"), members, most);
        let mut batch = scene.sparse_batch(plan, members)?;
        let joins = batch.joins_of(0..members);
        let tokens = scene.common * CHUNK_TOKENS;
        let graph_of =
            |batch: &Batch, enqueue: Enqueue| batch.capture(|| (0..batch.layers()).try_for_each(|layer| enqueue(batch, layer, 0..members)));
        let mut times = [Vec::new(), Vec::new(), Vec::new(), Vec::new()];
        let graphs = {
            let separate = (graph_of(&batch, Batch::enqueue_scores)?, graph_of(&batch, whole_layer)?);
            batch.join(joins.clone())?;
            batch.send_states()?;
            let joint = (graph_of(&batch, Batch::enqueue_scores)?, graph_of(&batch, whole_layer)?);
            [separate.0, joint.0, separate.1, joint.1]
        };
        ensure!(joins != Joins::default(), "--common-prefix: {tokens} tokens join nobody");
        let mut timer = Timer::new(batch.stream());
        for round in 0..WARM_UP + rounds {
            for (graph, times) in graphs.iter().zip(&mut times) {
                let time = timed(&mut timer, || Ok(graph.launch()?))?;
                if round >= WARM_UP {
                    times.push(time);
                }
            }
        }
        let ways = ["each alone", "jointly"];
        let name = format!("{members} sequences, {tokens} tokens in common, {name}");
        for (way, times) in ways.iter().zip(&times[..2]) {
            let layer_us = median(times).context("times")? * 1e3 / batch.layers() as f64;
            outcome.parts.push(PartOutcome { contestant: format!("{name}, {way}"), part: "score".to_owned(), layer_us, gb_per_s: None });
        }
        for (way, times) in ways.iter().zip(&times[2..]) {
            outcome.steps.push(StepOutcome::new(&format!("no misses: {name}, {way}"), times, Some(0.0), batch.bytes()));
        }
    }
    Ok(())
}

/// A layer as it is where nothing is missed.
fn whole_layer(batch: &Batch, layer: usize, slots: Range<usize>) -> Result<(), CudaError> {
    batch.enqueue_layer(layer, slots, Cut::Whole)
}
