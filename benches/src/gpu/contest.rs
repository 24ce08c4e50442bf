//! The contestants' steps, timed.

use anyhow::Result;
use sluice_kernels::budget::{Budget, Settings};
use sluice_kernels::device::cuda::batch::Batch;
use sluice_kernels::device::cuda::buffer::DeviceBuffer;
use sluice_kernels::device::cuda::probe::Probe;
use sluice_kernels::device::cuda::timer::Timer;
use sluice_kernels::label::LabelPlan;

use super::Section;
use super::outcome::{Outcome, PartOutcome, StepOutcome};
use super::replay::{DrawnLanes, Hits, ReplayJob, Rule, replay_drawn};
use super::scene::{Scene, SparsePlan};
use super::trace::KeyTrace;
use crate::report::show_progress;
use crate::statistics::median;

/// Bytes that the read probe reads at once: far more than the caches hold.
const READ_BYTES: usize = 4 << 30;
/// Steps before those that are timed.
const WARM_UP: usize = 3;
/// Steps of a trace before those that are timed, and those that are timed at least.
const TRACE_WARM_UP: usize = 32;
const TRACE_ROUNDS: usize = 48;

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
        }
    }

    fn floors(&mut self) -> Result<()> {
        let scene = self.scene;
        let probe = Probe::new(scene.gpu, scene.compiler)?;
        let stream = scene.gpu.new_stream()?;
        let buffer = DeviceBuffer::<u8>::zeroed(&scene.gpu.context, READ_BYTES)?;
        let mut timer = Timer::new(&stream);
        let mut reads = Vec::new();
        let mut copies = Vec::new();
        for _ in 0..self.rounds.max(5) {
            timer.mark()?;
            probe.read(&stream, &buffer)?;
            timer.mark()?;
            reads.push(READ_BYTES as f64 / timer.take()?[0] / 1e6);
        }
        for round in 0..self.rounds.max(5) {
            timer.mark()?;
            let bytes = Probe::copy_plane(&stream, &buffer, &scene.host.rows, round % scene.shape.layers.len())?;
            timer.mark()?;
            copies.push(bytes as f64 / timer.take()?[0] / 1e6);
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
            let graph = batch.capture(|| (0..layers).try_for_each(|layer| batch.enqueue_dense_layer(layer)))?;
            let mut timer = Timer::new(batch.stream());
            let mut times = Vec::new();
            for round in 0..WARM_UP + self.rounds {
                timer.mark()?;
                graph.launch()?;
                timer.mark()?;
                let time = timer.take()?[0];
                if round >= WARM_UP {
                    times.push(time);
                }
            }
            self.outcome.steps.push(StepOutcome::new(&format!("dense, resident, {context}"), &times, None, batch.bytes()));
        }
        Ok(())
    }

    fn streamed(&mut self) -> Result<()> {
        let mut buffers = self.scene.streamed()?;
        let layers = self.scene.shape.layers.len();
        let mut timer = Timer::new(buffers.batch().stream());
        let mut times = Vec::new();
        for round in 0..1 + self.rounds.min(5) {
            timer.mark()?;
            buffers.enqueue(layers)?;
            timer.mark()?;
            let time = timer.take()?[0];
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
        SparsePlan { plan, settings, pool: (count as f64 * pool) as usize, gather_blocks: self.gather_blocks, trace_rows: None }
    }

    fn small(&self) -> LabelPlan {
        LabelPlan::small(self.scene.shape.layers[0].head_dim)
    }

    /// Kernels one by one, cold and hot.
    fn parts(&mut self) -> Result<()> {
        for denominator in [16, 64, 256] {
            let mut batch = self.scene.sparse(&self.sparse(denominator, 1.0, self.small()))?;
            for cold in [true, false] {
                if cold {
                    batch.forget_hot_rows(0)?;
                }
                self.time_parts(&batch, &format!("n/{denominator} {}", if cold { "cold" } else { "hot" }))?;
            }
        }
        Ok(())
    }

    fn time_parts(&mut self, batch: &Batch, name: &str) -> Result<()> {
        const NAMES: [&str; 5] = ["score", "select", "victims", "gather", "attend"];
        let mut timer = Timer::new(batch.stream());
        let layers = batch.layers();
        timer.mark()?;
        for layer in 0..layers {
            for part in 0..NAMES.len() {
                batch.enqueue_part(layer, part)?;
                timer.mark()?;
            }
        }
        let times = timer.take()?;
        let geometry = batch.shape().geometry.clone();
        for (part, part_name) in NAMES.into_iter().enumerate() {
            // The first layer pays for what is not warm yet.
            let of_part: Vec<f64> = times.iter().skip(NAMES.len()).skip(part).step_by(NAMES.len()).copied().collect();
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
        for (denominator, pools) in [(16, [1, 2, 3]), (64, [1, 2, 4])] {
            for pool in pools {
                self.traced_steps(trace, denominator, pool)?;
            }
        }
        Ok(())
    }

    fn traced_steps(&mut self, trace: &KeyTrace, denominator: u32, pool: usize) -> Result<()> {
        let name = format!("trace, n/{denominator}, pool of {pool}k");
        show_progress(&name, 0, 1);
        let sparse = SparsePlan { trace_rows: Some(trace.rows), ..self.sparse(denominator, pool as f64, self.small()) };
        let mut batch = self.scene.sparse(&sparse)?;
        let (layers, lanes) = (batch.layers(), batch.shape().geometry.heads.lanes());
        let graph = batch.capture(|| (0..layers).try_for_each(|layer| batch.enqueue_layer(layer)))?;
        let mut timer = Timer::new(batch.stream());
        let (mut times, mut hits) = (Vec::new(), vec![Hits::default(); trace.layers]);
        let steps = (TRACE_WARM_UP + self.rounds.max(TRACE_ROUNDS)).min(trace.steps);
        for step in 0..steps {
            for layer in 0..layers {
                let source = |lane| trace.lane_source(layer, lane, lanes, step);
                let keys: Vec<u16> = (0..lanes).flat_map(|lane| trace.keys(source(lane).1, source(lane).0)).copied().collect();
                batch.set_trace(layer, 0, &keys)?;
            }
            timer.mark()?;
            graph.launch()?;
            timer.mark()?;
            let time = timer.take()?[0];
            for (index, counts) in batch.take_counters()?.into_iter().enumerate() {
                if step >= TRACE_WARM_UP {
                    let sum = &mut hits[index % trace.layers];
                    sum.hits += counts[0];
                    sum.selected += counts[0] + counts[1];
                }
            }
            if step >= TRACE_WARM_UP {
                times.push(time);
            }
        }
        // Offline, at the trace's own resolution.
        let selected = batch.shape().max_count * trace.rows / batch.shape().max_tokens;
        let job = ReplayJob { selected, capacity: selected * pool, rule: Rule::LowestKey, warm_up: TRACE_WARM_UP, steps };
        let offline = replay_drawn(trace, &job, DrawnLanes { layers, lanes });
        let rates = |hits: &[Hits]| hits.iter().map(|hits| hits.rate()).collect::<Vec<f64>>();
        let (all_hits, all): (u64, u64) = hits.iter().fold((0, 0), |sum, hits| (sum.0 + hits.hits, sum.1 + hits.selected));
        let mut outcome = StepOutcome::new(&name, &times, Some(1.0 - all_hits as f64 / all.max(1) as f64), batch.bytes());
        outcome.hit_rate_by_source = rates(&hits);
        outcome.offline_hit_rate_by_source = rates(&offline);
        self.outcome.steps.push(outcome);
        Ok(())
    }

    /// Times whole steps, one graph launch each.
    fn steps(&mut self, name: &str, sparse: &SparsePlan, cold: bool) -> Result<()> {
        let mut batch = self.scene.sparse(sparse)?;
        let layers = batch.layers();
        let graph = batch.capture(|| (0..layers).try_for_each(|layer| batch.enqueue_layer(layer)))?;
        let mut timer = Timer::new(batch.stream());
        let (mut times, mut hits, mut misses) = (Vec::new(), 0, 0);
        for round in 0..WARM_UP + self.rounds {
            if cold {
                batch.forget_hot_rows(0)?;
            }
            timer.mark()?;
            graph.launch()?;
            timer.mark()?;
            let time = timer.take()?[0];
            let counts = batch.take_counters()?;
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

/// Settings of sparse steps.
fn settings(denominator: u32) -> Settings {
    Settings { budget: Budget::Ratio { numerator: 1, denominator, floor_tokens: 256, cap_tokens: 0 }, ..Settings::default() }
}
