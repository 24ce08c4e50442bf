//! The contestants' steps, timed.

use std::sync::Arc;

use anyhow::{Context, Result};
use sluice_kernels::budget::{Budget, Settings};
use sluice_kernels::decoder::balance::{Balance, BlockBounds};
use sluice_kernels::device::cuda::batch::Batch;
use sluice_kernels::device::cuda::buffer::DeviceBuffer;
use sluice_kernels::device::cuda::jobs::POOL_BLOCK;
use sluice_kernels::device::cuda::probe::Probe;
use sluice_kernels::device::cuda::seat::Kept;
use sluice_kernels::device::cuda::timer::Timer;
use sluice_kernels::device::cuda::{CudaError, CudaStream};
use sluice_kernels::label::LabelPlan;

use super::Section;
use super::outcome::{Outcome, PartOutcome, StepOutcome};
use super::prefill::prefill;
use super::replay::{DrawnLanes, Hits, ReplayJob, Rule, replay_resized};
use super::scene::{Scene, SparsePlan};
use super::shared::shared;
use super::step_graphs::{StepGraphs, in_micro_batches};
use super::timed::timed;
use super::trace::KeyTrace;
use crate::report::show_progress;
use crate::statistics::median;

/// Bytes that the read probe reads at once: far more than the caches hold.
const READ_BYTES: usize = 4 << 30;
/// Weights of an 8B model in 16 bits, which every token reads.
const WEIGHT_BYTES: usize = 16_000_000_000;
/// Steps before those that are timed.
const WARM_UP: usize = 3;
/// Passes over all layers that parts are timed in.
const PART_ROUNDS: usize = 5;
/// Steps of a trace before those that are timed, and those that are timed at least.
const TRACE_WARM_UP: usize = 32;
const TRACE_ROUNDS: usize = 48;

/// The same where pools move between lanes, which they do before as well.
const MOVING_WARM_UP: usize = 64;

/// Pools of the lanes of a traced step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Pools {
    /// All as large as each other.
    Equal,
    /// Moving between lanes by measured misses, as a decoder moves them.
    Moving,
}

impl Pools {
    fn warm_up(self) -> usize {
        match self {
            Self::Equal => TRACE_WARM_UP,
            Self::Moving => MOVING_WARM_UP,
        }
    }
}

/// Kernels of a layer, in their order.
const PARTS: [&str; 4] = ["score", "select", "gather", "attend"];

/// Graphs of a step of one kind, and what they took, in milliseconds.
struct BatchWay {
    /// How the sequences go through the layers.
    name: String,
    step: StepGraphs,
    /// With the weights of each layer between it and the next.
    token: StepGraphs,
    steps: Vec<f64>,
    tokens: Vec<f64>,
    again: Vec<f64>,
}

impl BatchWay {
    fn new(batch: &Batch, probe: &Probe, weights: &DeviceBuffer<u8>, micro_batches: usize) -> Result<Self> {
        let slots = in_micro_batches(batch.shape().slots, micro_batches);
        let of_layer = |layer, _, stream: &Arc<CudaStream>| probe.read_part(stream, weights, layer, batch.layers());
        Ok(Self {
            name: if micro_batches > 1 { format!(", in {micro_batches} micro-batches") } else { String::new() },
            step: StepGraphs::capture_apart(batch, &slots, |_, _, _| Ok(()))?,
            token: StepGraphs::capture_apart(batch, &slots, of_layer)?,
            steps: Vec::new(),
            tokens: Vec::new(),
            again: Vec::new(),
        })
    }

    fn note(&mut self, batch: &Batch, counts: &[[u64; 2]]) {
        self.step.note(batch, counts);
        self.token.note(batch, counts);
    }
}

/// What the steps of a batch missed, whatever their way.
#[derive(Default)]
struct BatchMisses {
    steps: usize,
    missed: u64,
    selected: u64,
    /// Their gathers alone, in milliseconds.
    gathers: Vec<f64>,
}

/// Runs sections and gathers what they find.
pub struct Contest<'a> {
    scene: &'a Scene<'a>,
    trace: Option<&'a KeyTrace>,
    rounds: usize,
    gather_blocks: usize,
    /// What was found so far.
    pub outcome: Outcome,
}

impl<'a> Contest<'a> {
    /// Nothing found yet.
    ///
    /// # Errors
    /// Never so far.
    pub fn new(scene: &'a Scene<'a>, trace: Option<&'a KeyTrace>, rounds: usize, gather_blocks: usize) -> Result<Self> {
        let outcome = Outcome {
            gpu: scene.gpu.name.clone(),
            context_tokens: scene.context,
            layers: scene.shape.layers.len(),
            row_bytes: scene.geometry().row_bytes(),
            cache_bytes: (scene.shape.layers.len() * scene.context * scene.geometry().heads.lanes() * scene.geometry().row_bytes()) as u64,
            fill_s: scene.host.fill_s,
            register_s: scene.host.register_s,
            ..Outcome::default()
        };
        Ok(Self { scene, trace, rounds, gather_blocks, outcome })
    }

    /// Runs one section.
    ///
    /// # Errors
    /// Memory or a launch that is refused.
    pub fn run(&mut self, section: Section) -> Result<()> {
        show_progress(&format!("{section:?}"), 0, 1);
        match section {
            Section::Floors => self.floors(),
            Section::Dense => self.dense(),
            Section::Streamed => self.streamed(),
            Section::Parts => self.parts(),
            Section::Published => self.published(),
            Section::Cold => self.cold(),
            Section::Hot => self.hot(),
            Section::Trace => self.traced(),
            Section::Sweep => self.sweep(),
            Section::Token => self.tokens(),
            Section::Prefill => prefill(self.scene, self.rounds, &mut self.outcome),
            Section::Batch => self.batch(),
            Section::Shared => self.shared(),
        }
    }

    fn floors(&mut self) -> Result<()> {
        let scene = self.scene;
        let probe = Probe::new(scene.gpu, scene.compiler)?;
        let stream = scene.gpu.new_stream()?;
        let buffer = DeviceBuffer::<u8>::zeroed(&stream, READ_BYTES)?;
        let mut timer = Timer::new(&stream);
        let mut reads = Vec::new();
        let mut copies = Vec::new();
        for _ in 0..self.rounds.max(5) {
            let time = timed(&mut timer, || Ok(probe.read(&stream, &buffer)?))?;
            reads.push(READ_BYTES as f64 / time / 1e6);
        }
        for round in 0..self.rounds.max(5) {
            let (layer, mut bytes) = (round % scene.shape.layers.len(), 0);
            let time = timed(&mut timer, || {
                bytes = Probe::copy_plane(&stream, &buffer, &scene.host.rows, layer)?;
                Ok(())
            })?;
            copies.push(bytes as f64 / time / 1e6);
        }
        self.outcome.hbm_read_gb_per_s = median(&reads).unwrap_or(0.0);
        self.outcome.pinned_copy_gb_per_s = median(&copies).unwrap_or(0.0);
        Ok(())
    }

    fn dense(&mut self) -> Result<()> {
        for context in [self.scene.context, 32 << 10, 8 << 10] {
            if context > self.scene.context {
                continue;
            }
            let batch = self.scene.resident(context)?;
            let layers = batch.layers();
            let times = self.launches(&batch, || (0..layers).try_for_each(|layer| batch.enqueue_dense_layer(layer, 0..1)))?;
            self.outcome.steps.push(StepOutcome::new(&format!("dense, resident, {context}"), &times, None, batch.bytes()));
        }
        Ok(())
    }

    /// Milliseconds of launches of what `enqueue` puts on the batch's stream as a graph, after some that do not count.
    fn launches(&self, batch: &Batch, enqueue: impl FnOnce() -> Result<(), CudaError>) -> Result<Vec<f64>> {
        let graph = batch.capture(enqueue)?;
        let mut timer = Timer::new(batch.stream());
        let mut times = Vec::new();
        for round in 0..WARM_UP + self.rounds {
            let time = timed(&mut timer, || Ok(graph.launch()?))?;
            if round >= WARM_UP {
                times.push(time);
            }
        }
        Ok(times)
    }

    fn streamed(&mut self) -> Result<()> {
        let mut buffers = self.scene.streamed()?;
        let layers = self.scene.shape.layers.len();
        let mut timer = Timer::new(buffers.batch().stream());
        let mut times = Vec::new();
        for round in 0..1 + self.rounds.min(5) {
            let time = timed(&mut timer, || Ok(buffers.enqueue(layers)?))?;
            if round > 0 {
                times.push(time);
            }
        }
        let bytes = buffers.batch().bytes();
        self.outcome.steps.push(StepOutcome::new("whole cache streamed", &times, None, bytes));
        Ok(())
    }

    fn sparse(&self, denominator: u32, pool: f64, plan: LabelPlan) -> SparsePlan {
        let settings = settings(denominator);
        let count = settings.selected_tokens(self.scene.context);
        SparsePlan { plan, settings, kept: Kept::Pool((count as f64 * pool) as usize), gather_blocks: self.gather_blocks, trace_rows: None }
    }

    fn small(&self) -> LabelPlan {
        LabelPlan::small(self.scene.shape.layers[0].head_dim)
    }

    /// Kernels one by one, cold and hot.
    fn parts(&mut self) -> Result<()> {
        for denominator in [16, 64, 256] {
            let mut batch = self.scene.sparse(&self.sparse(denominator, 1.0, self.small()))?;
            for is_cold in [true, false] {
                self.time_parts(&mut batch, &format!("n/{denominator} {}", if is_cold { "cold" } else { "hot" }), is_cold)?;
            }
            self.time_parts_in_graphs(&batch, &format!("n/{denominator} hot, in a graph"), PARTS.len())?;
            drop(batch);
            // Without maps to look rows up in, and without victims, the same kernel is the top-k and nothing else.
            let everything = SparsePlan { kept: Kept::Everything, ..self.sparse(denominator, 1.0, self.small()) };
            self.time_parts_in_graphs(&self.scene.sparse(&everything)?, &format!("n/{denominator}, top-k alone, in a graph"), 2)?;
        }
        Ok(())
    }

    fn time_parts(&mut self, batch: &mut Batch, name: &str, is_cold: bool) -> Result<()> {
        let mut timer = Timer::new(batch.stream());
        let layers = batch.layers();
        let mut times = Vec::new();
        for _ in 0..PART_ROUNDS {
            if is_cold {
                batch.forget_hot_rows(0)?;
            }
            timer.mark()?;
            for layer in 0..layers {
                for part in 0..PARTS.len() {
                    batch.enqueue_part(layer, part)?;
                    timer.mark()?;
                }
            }
            // The first layer pays for what is not warm yet.
            times.extend(timer.take()?.into_iter().skip(PARTS.len()));
        }
        let geometry = batch.shape().geometry.clone();
        for (part, part_name) in PARTS.into_iter().enumerate() {
            let of_part: Vec<f64> = times.iter().skip(part).step_by(PARTS.len()).copied().collect();
            let layer_ms = median(&of_part).unwrap_or(0.0);
            let lanes = geometry.heads.lanes();
            let bytes = match part_name {
                "score" => Some(lanes * batch.shape().max_tokens * batch.shape().plan.label_bytes()),
                "gather" if name.ends_with("cold") => Some(lanes * batch.shape().max_count * geometry.row_bytes()),
                "attend" => Some(lanes * batch.shape().max_count * geometry.row_bytes()),
                _ => None,
            };
            self.outcome.parts.push(PartOutcome {
                contestant: name.to_owned(),
                part: part_name.to_owned(),
                layer_us: layer_ms * 1e3,
                gb_per_s: bytes.map(|bytes| bytes as f64 / layer_ms / 1e6),
            });
        }
        Ok(())
    }

    /// What each of the first `parts` kernels adds to a graph of all layers: without events between them, and with everything hot.
    fn time_parts_in_graphs(&mut self, batch: &Batch, name: &str, parts: usize) -> Result<()> {
        let layers = batch.layers();
        let label_bytes = batch.shape().geometry.heads.lanes() * batch.shape().max_tokens * batch.shape().plan.label_bytes();
        let mut before = 0.0;
        for (last, part) in PARTS.into_iter().enumerate().take(parts) {
            let parts_so_far = |layer| (0..=last).try_for_each(|part| batch.enqueue_part(layer, part));
            let times = self.launches(batch, || (0..layers).try_for_each(parts_so_far))?;
            let layer_ms = median(&times).unwrap_or(0.0) / layers as f64;
            let own_ms = layer_ms - before;
            before = layer_ms;
            self.outcome.parts.push(PartOutcome {
                contestant: name.to_owned(),
                part: part.to_owned(),
                layer_us: own_ms * 1e3,
                gb_per_s: (part == "score").then(|| label_bytes as f64 / own_ms / 1e6),
            });
        }
        Ok(())
    }

    fn published(&mut self) -> Result<()> {
        let channels = self.scene.shape.layers[0].head_dim / 16;
        let plan: LabelPlan = format!("{channels}@16").parse()?;
        self.steps("Double Sparsity as published, n/16", &self.sparse(16, 1.0, plan.clone()), true)?;
        self.steps("Double Sparsity as published, n/64", &self.sparse(64, 1.0, plan), true)
    }

    fn cold(&mut self) -> Result<()> {
        self.steps("cold, n/16", &self.sparse(16, 1.0, self.small()), true)?;
        self.steps("cold, n/64", &self.sparse(64, 1.0, self.small()), true)
    }

    fn hot(&mut self) -> Result<()> {
        self.steps("no misses, n/16", &self.sparse(16, 3.0, self.small()), false)?;
        self.steps("no misses, n/64", &self.sparse(64, 2.0, self.small()), false)
    }

    /// Hits and misses of recorded decode steps.
    fn traced(&mut self) -> Result<()> {
        let Some(trace) = self.trace else { return Ok(()) };
        for (denominator, pools) in [(16, [1.0, 2.0, 3.0]), (64, [1.0, 2.0, 4.0])] {
            for pool in pools {
                self.traced_steps(trace, denominator, pool, Pools::Equal)?;
            }
        }
        self.traced_steps(trace, 16, 3.0, Pools::Moving)?;
        self.traced_steps(trace, 64, 4.0, Pools::Moving)
    }

    /// More pools, for the plot of time against misses.
    fn sweep(&mut self) -> Result<()> {
        let Some(trace) = self.trace else { return Ok(()) };
        for (denominator, pools) in [(16, [1.25, 1.5, 2.5, 3.9]), (64, [1.5, 3.0, 6.0, 8.0])] {
            for pool in pools {
                self.traced_steps(trace, denominator, pool, Pools::Equal)?;
            }
        }
        Ok(())
    }

    fn traced_steps(&mut self, trace: &KeyTrace, denominator: u32, pool: f64, pools: Pools) -> Result<()> {
        let moved = if pools == Pools::Moving { ", moving" } else { "" };
        let name = format!("trace, n/{denominator}, pool of {pool}k{moved}");
        show_progress(&name, 0, 1);
        let sparse = SparsePlan { trace_rows: Some(trace.rows), ..self.sparse(denominator, pool, self.small()) };
        let mut batch = self.scene.sparse(&sparse)?;
        let drawn = DrawnLanes { layers: batch.layers(), lanes: batch.shape().geometry.heads.lanes() };
        let mut graphs = StepGraphs::capture(&batch)?;
        let mut timer = Timer::new(batch.stream());
        let (mut times, mut hits, mut sizes) = (Vec::new(), vec![Hits::default(); trace.layers], Vec::new());
        let mut balance = Balance::new(drawn.layers * drawn.lanes);
        let warm_up = pools.warm_up();
        let steps = (warm_up + self.rounds.max(TRACE_ROUNDS)).min(trace.steps);
        for step in 0..steps {
            set_trace(&mut batch, trace, step)?;
            let time = timed(&mut timer, || graphs.launch())?;
            let counts = batch.take_counters()?;
            graphs.note(&batch, &counts);
            for (index, counts) in counts.iter().enumerate().filter(|_| step >= warm_up) {
                let sum = &mut hits[index % trace.layers];
                sum.hits += counts[0];
                sum.selected += counts[0] + counts[1];
            }
            if step >= warm_up {
                times.push(time);
            }
            if pools == Pools::Moving {
                sizes.push(move_pools(&mut batch, &mut balance, &counts)?);
            }
        }
        // Offline, at the trace's own resolution.
        let run = batch.shape().max_tokens / trace.rows;
        let selected = batch.shape().max_count / run;
        let job = ReplayJob { selected, capacity: (selected as f64 * pool) as usize, rule: Rule::LowestKey, warm_up, steps };
        let sizes_at = |step: usize| Some(sizes.get(step)?.iter().map(|blocks| (blocks * POOL_BLOCK / run).max(selected)).collect());
        let offline = replay_resized(trace, &job, drawn, |step, _| sizes_at(step));
        let rates = |hits: &[Hits]| hits.iter().map(|hits| hits.rate()).collect::<Vec<f64>>();
        let (all_hits, all): (u64, u64) = hits.iter().fold((0, 0), |sum, hits| (sum.0 + hits.hits, sum.1 + hits.selected));
        let mut outcome = StepOutcome::new(&name, &times, Some(1.0 - all_hits as f64 / all.max(1) as f64), batch.bytes());
        outcome.hit_rate_by_source = rates(&hits);
        outcome.offline_hit_rate_by_source = rates(&offline);
        if let Some(blocks) = sizes.last() {
            let mean = |source: usize| blocks.iter().skip(source).step_by(trace.layers).map(|&blocks| blocks as f64).collect::<Vec<f64>>();
            let mean = |source: usize| mean(source).iter().sum::<f64>() / mean(source).len().max(1) as f64;
            outcome.pool_by_source =
                (0..trace.layers).map(|source| mean(source) * POOL_BLOCK as f64 / batch.shape().max_count as f64).collect();
        }
        self.outcome.steps.push(outcome);
        Ok(())
    }

    /// Sequences with a common prefix, whose labels are read for each or once for all.
    fn shared(&mut self) -> Result<()> {
        let plans = [("n/64", self.sparse(64, 2.0, self.small()))];
        shared(self.scene, &plans, self.rounds, &mut self.outcome)
    }

    /// A step of everybody, beside what the link and the kernels alone would take, and a whole token of everybody: in lockstep, as two
    /// micro-batches, which read the weights twice, and each sequence on its own.
    fn batch(&mut self) -> Result<()> {
        let Some(trace) = self.trace else { return Ok(()) };
        let sequences = self.scene.sequences;
        let probe = Probe::new(self.scene.gpu, self.scene.compiler)?;
        let weights = self.weights()?;
        for (denominator, pool) in [(16, 3.0), (64, 4.0)] {
            let sparse = SparsePlan { trace_rows: Some(trace.rows), ..self.sparse(denominator, pool, self.small()) };
            let mut batch = self.scene.sparse_batch(&sparse, sequences)?;
            let mut micro_batches = vec![1, 2, sequences];
            micro_batches.retain(|&count| count <= sequences);
            micro_batches.dedup();
            let mut ways = micro_batches.iter().map(|&count| BatchWay::new(&batch, &probe, &weights, count)).collect::<Result<Vec<_>>>()?;
            let mut timer = Timer::new(batch.stream());
            let mut found = BatchMisses::default();
            let turns = 2 * ways.len() + 1;
            let steps = (TRACE_WARM_UP + turns * self.rounds).min(trace.steps);
            for step in 0..steps {
                show_progress(&format!("batch of {sequences}, n/{denominator}"), step, steps);
                set_trace(&mut batch, trace, step)?;
                // Ways take turns, of a step and of a token, and then the gathers alone.
                let turn = step % turns;
                let (way, is_token) = (turn / 2, turn % 2 == 1);
                let time = match ways.get(way) {
                    Some(way) => timed(&mut timer, || if is_token { way.token.launch() } else { way.step.launch() })?,
                    None => gathers_alone(&batch, &mut timer)?,
                };
                let counts = batch.take_counters()?;
                ways.iter_mut().for_each(|way| way.note(&batch, &counts));
                if step < TRACE_WARM_UP {
                    continue;
                }
                found.steps += 1;
                found.missed += counts.iter().map(|counts| counts[1]).sum::<u64>();
                found.selected += counts.iter().map(|counts| counts[0] + counts[1]).sum::<u64>();
                let Some(way) = ways.get_mut(way) else {
                    found.gathers.push(time);
                    continue;
                };
                if is_token { &mut way.tokens } else { &mut way.steps }.push(time);
                // The same step again finds everything: what the kernels take without the link.
                way.again.push(timed(&mut timer, || way.step.launch_without_misses())?);
                batch.take_counters()?;
            }
            for way in &ways {
                self.add_batch(&format!("batch of {sequences}, trace, n/{denominator}, pool of {pool}k"), &batch, way, &found);
            }
        }
        Ok(())
    }

    fn add_batch(&mut self, name: &str, batch: &Batch, way: &BatchWay, found: &BatchMisses) {
        let missed_bytes = found.missed as f64 / found.steps.max(1) as f64 * batch.shape().geometry.row_bytes() as f64;
        let miss_ratio = found.missed as f64 / found.selected.max(1) as f64;
        let name = format!("{name}{}", way.name);
        let mut outcome = StepOutcome::new(&name, &way.steps, Some(miss_ratio), batch.bytes());
        outcome.link_ms = Some(missed_bytes / self.outcome.pinned_copy_gb_per_s / 1e6);
        outcome.gather_ms = median(&found.gathers);
        outcome.compute_ms = median(&way.again);
        self.outcome.steps.push(outcome);
        let token = StepOutcome::new(&format!("whole token: {name}, and weights"), &way.tokens, Some(miss_ratio), batch.bytes());
        self.outcome.steps.push(token);
    }

    /// As much as the weights of an 8B model in 16 bits, for any stream.
    fn weights(&self) -> Result<DeviceBuffer<u8>> {
        let stream = self.scene.gpu.new_stream()?;
        let weights = DeviceBuffer::zeroed(&stream, WEIGHT_BYTES)?;
        stream.synchronize()?;
        Ok(weights)
    }

    /// Attention and a pass over the weights of an 8B model in 16 bits, which a token needs besides.
    fn tokens(&mut self) -> Result<()> {
        let probe = Probe::new(self.scene.gpu, self.scene.compiler)?;
        let weights = self.weights()?;
        let dense = self.scene.resident(self.scene.context)?;
        let layers = dense.layers();
        let graph = dense.capture(|| (0..layers).try_for_each(|layer| dense.enqueue_dense_layer(layer, 0..1)))?;
        let mut timer = Timer::new(dense.stream());
        let mut times = Vec::new();
        for round in 0..WARM_UP + self.rounds {
            let time = timed(&mut timer, || {
                graph.launch()?;
                Ok(probe.read(dense.stream(), &weights)?)
            })?;
            if round >= WARM_UP {
                times.push(time);
            }
        }
        self.outcome.steps.push(StepOutcome::new("whole token: dense, resident, and weights", &times, None, dense.bytes()));
        drop((graph, dense));
        let Some(trace) = self.trace else { return Ok(()) };
        for (denominator, pool) in [(16, 3.0), (64, 4.0)] {
            let sparse = SparsePlan { trace_rows: Some(trace.rows), ..self.sparse(denominator, pool, self.small()) };
            let mut batch = self.scene.sparse(&sparse)?;
            let mut graphs = StepGraphs::capture(&batch)?;
            let mut timer = Timer::new(batch.stream());
            let mut times = Vec::new();
            for step in 0..(TRACE_WARM_UP + self.rounds).min(trace.steps) {
                set_trace(&mut batch, trace, step)?;
                let time = timed(&mut timer, || {
                    graphs.launch()?;
                    Ok(probe.read(batch.stream(), &weights)?)
                })?;
                let counts = batch.take_counters()?;
                graphs.note(&batch, &counts);
                if step >= TRACE_WARM_UP {
                    times.push(time);
                }
            }
            let name = format!("whole token: trace, n/{denominator}, pool of {pool}k, and weights");
            self.outcome.steps.push(StepOutcome::new(&name, &times, None, batch.bytes()));
        }
        Ok(())
    }

    /// Times whole steps, one graph launch each.
    fn steps(&mut self, name: &str, sparse: &SparsePlan, cold: bool) -> Result<()> {
        let mut batch = self.scene.sparse(sparse)?;
        let mut graphs = StepGraphs::capture(&batch)?;
        let mut timer = Timer::new(batch.stream());
        let (mut times, mut hits, mut misses) = (Vec::new(), 0, 0);
        for round in 0..WARM_UP + self.rounds {
            if cold {
                batch.forget_hot_rows(0)?;
            }
            let time = timed(&mut timer, || graphs.launch())?;
            let counts = batch.take_counters()?;
            graphs.note(&batch, &counts);
            if round >= WARM_UP {
                times.push(time);
                hits += counts.iter().map(|counts| counts[0]).sum::<u64>();
                misses += counts.iter().map(|counts| counts[1]).sum::<u64>();
            }
        }
        let ratio = misses as f64 / (hits + misses).max(1) as f64;
        self.outcome.steps.push(StepOutcome::new(name, &times, Some(ratio), batch.bytes()));
        Ok(())
    }
}

/// Keys of one step of the trace for everybody in the batch, each at a time of its own.
fn set_trace(batch: &mut Batch, trace: &KeyTrace, step: usize) -> Result<()> {
    let (layers, lanes, slots) = (batch.layers(), batch.shape().geometry.heads.lanes(), batch.shape().slots);
    for layer in 0..layers {
        for slot in 0..slots {
            // Sequences are lanes beyond those of the first one.
            let source = |lane| trace.lane_source(layer, slot * lanes + lane, slots * lanes, step);
            let keys: Vec<u16> = (0..lanes).flat_map(|lane| trace.keys(source(lane).1, source(lane).0)).copied().collect();
            batch.set_trace(layer, slot, &keys)?;
        }
    }
    Ok(())
}

/// Milliseconds of the gathers of all layers, each alone between events.
fn gathers_alone(batch: &Batch, timer: &mut Timer) -> Result<f64> {
    timer.mark()?;
    for layer in 0..batch.layers() {
        for part in 0..PARTS.len() {
            if part == 2 {
                timer.mark()?;
            }
            batch.enqueue_part(layer, part)?;
            if part == 2 {
                timer.mark()?;
            }
        }
    }
    // Between marks: what comes before a gather, the gather.
    Ok(timer.take()?.iter().skip(1).step_by(2).sum())
}

/// Moves hot places of the only sequence as a decoder does after a step with these counts. Answers with the blocks of every lane.
fn move_pools(batch: &mut Batch, balance: &mut Balance, counts: &[[u64; 2]]) -> Result<Vec<usize>> {
    let seat = Arc::clone(batch.seat(0).context("a seat")?);
    let bounds = BlockBounds { least: batch.shape().max_count.div_ceil(POOL_BLOCK), most: seat.most_pool_blocks() };
    balance.count(0, counts);
    let moves = balance.end_step(&seat.pool_blocks(), bounds);
    batch.move_blocks(0, &moves)?;
    Ok(seat.pool_blocks())
}

/// Settings of sparse steps.
fn settings(denominator: u32) -> Settings {
    Settings { budget: Budget::Ratio { numerator: 1, denominator, floor_tokens: 256, cap_tokens: 0 }, ..Settings::default() }
}
