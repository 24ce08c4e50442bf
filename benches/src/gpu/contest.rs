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
use super::scene::{Scene, SparsePlan};
use crate::report::show_progress;
use crate::statistics::median;

/// Bytes that the read probe reads at once: far more than the caches hold.
const READ_BYTES: usize = 4 << 30;
/// Steps before those that are timed.
const WARM_UP: usize = 3;
/// Rows of an attention block in sparse and in dense steps.
const SPARSE_BLOCK_ROWS: usize = 128;
const DENSE_BLOCK_ROWS: usize = 2048;
const GATHER_BLOCKS: usize = 16;

/// Runs sections and gathers what they find.
pub struct Contest<'a> {
    scene: &'a Scene<'a>,
    rounds: usize,
    /// What was found so far.
    pub outcome: Outcome,
}

impl<'a> Contest<'a> {
    /// Nothing found yet.
    ///
    /// # Errors
    /// Never so far.
    pub fn new(scene: &'a Scene<'a>, rounds: usize) -> Result<Self> {
        let outcome = Outcome {
            gpu: scene.gpu.name.clone(),
            context_tokens: scene.context,
            layers: scene.shape.layers.len(),
            cache_bytes: (scene.shape.layers.len() * scene.context * scene.geometry().heads.lanes() * scene.geometry().row_bytes()) as u64,
            fill_s: scene.host.fill_s,
            register_s: scene.host.register_s,
            ..Outcome::default()
        };
        Ok(Self { scene, rounds, outcome })
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
            let block_rows = if context > 64 << 10 { DENSE_BLOCK_ROWS } else { 256 };
            let batch = self.scene.resident(context, block_rows)?;
            let layers = batch.shape().layers;
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
        let mut buffers = self.scene.streamed(DENSE_BLOCK_ROWS)?;
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
        SparsePlan {
            plan,
            settings,
            pool: (count as f64 * pool) as usize,
            gather_blocks: GATHER_BLOCKS,
            block_rows: SPARSE_BLOCK_ROWS,
            trace_rows: None,
        }
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
        const NAMES: [&str; 6] = ["append", "score", "select", "victims", "gather", "attend"];
        let mut timer = Timer::new(batch.stream());
        let layers = batch.shape().layers;
        timer.mark()?;
        for layer in 0..layers {
            for part in 0..NAMES.len() {
                batch.enqueue_part(layer, part)?;
                timer.mark()?;
            }
        }
        let times = timer.take()?;
        let geometry = batch.shape().geometry;
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

    /// Times whole steps, one graph launch each.
    fn steps(&mut self, name: &str, sparse: &SparsePlan, cold: bool) -> Result<()> {
        let mut batch = self.scene.sparse(sparse)?;
        let layers = batch.shape().layers;
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
            let (hit, miss) = batch.take_counters(0)?;
            if round >= WARM_UP {
                times.push(time);
                (hits, misses) = (hits + hit, misses + miss);
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
