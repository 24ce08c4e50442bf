//! What a GPU bench found.

use std::path::Path;

use anyhow::Result;
use serde::Serialize;
use sluice_kernels::device::cuda::seat::DeviceBytes;

use crate::report::{Format, Plot, Series, Table};
use crate::statistics::spread;

/// Times of one contestant's steps.
#[derive(Clone, Debug, Serialize)]
pub struct StepOutcome {
    /// Contestant.
    pub name: String,
    /// Median of all steps.
    pub step_ms: f64,
    /// Best step.
    pub best_ms: f64,
    /// Worst step.
    pub worst_ms: f64,
    /// Part of the selected rows that were not hot.
    pub miss_ratio: Option<f64>,
    /// By lane of the trace, the part of the selected rows that were hot.
    pub hit_rate_by_source: Vec<f64>,
    /// The same of an offline replay in plain code.
    pub offline_hit_rate_by_source: Vec<f64>,
    /// By lane of the trace, the mean pool at the end in selected rows; empty where pools stay equal.
    pub pool_by_source: Vec<f64>,
    /// What the missing rows take at the speed of the pinned copy.
    pub link_ms: Option<f64>,
    /// Median of their gathers alone, between events.
    pub gather_ms: Option<f64>,
    /// The same steps when nothing is missing.
    pub compute_ms: Option<f64>,
    /// Device memory of the contestant, in bytes.
    pub gpu_bytes: u64,
    /// Of it, by what it is for.
    pub bytes: DeviceBytes,
}

impl StepOutcome {
    /// Of the times of `times`.
    #[must_use]
    pub fn new(name: &str, times: &[f64], miss_ratio: Option<f64>, bytes: DeviceBytes) -> Self {
        let spread = spread(times).unwrap_or(crate::statistics::Spread { best: 0.0, median: 0.0, worst: 0.0 });
        let (step_ms, best_ms, worst_ms) = (spread.median, spread.best, spread.worst);
        Self {
            name: name.to_owned(),
            step_ms,
            best_ms,
            worst_ms,
            miss_ratio,
            hit_rate_by_source: Vec::new(),
            offline_hit_rate_by_source: Vec::new(),
            pool_by_source: Vec::new(),
            link_ms: None,
            gather_ms: None,
            compute_ms: None,
            gpu_bytes: bytes.total(),
            bytes,
        }
    }
}

/// Time of one kernel, over all layers of a step.
#[derive(Clone, Debug, Serialize)]
pub struct PartOutcome {
    /// Contestant.
    pub contestant: String,
    /// Kernel.
    pub part: String,
    /// Median over layers and rounds, in microseconds a layer.
    pub layer_us: f64,
    /// What it reads or writes, in GB/s of its floor's memory, where that is the question.
    pub gb_per_s: Option<f64>,
}

/// Everything.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Outcome {
    /// GPU.
    pub gpu: String,
    /// Tokens.
    pub context_tokens: usize,
    /// Layers.
    pub layers: usize,
    /// Bytes of a row: a key and a value.
    pub row_bytes: usize,
    /// Bytes of the cache.
    pub cache_bytes: u64,
    /// Filling host memory.
    pub fill_s: f64,
    /// Registering it.
    pub register_s: f64,
    /// Read rate of device memory.
    pub hbm_read_gb_per_s: f64,
    /// Copy rate of the link.
    pub pinned_copy_gb_per_s: f64,
    /// Steps.
    pub steps: Vec<StepOutcome>,
    /// Kernels.
    pub parts: Vec<PartOutcome>,
}

impl Outcome {
    /// Plots the steps' times against their misses.
    ///
    /// # Errors
    /// A file that cannot be written.
    pub fn plot(&self, path: &Path) -> Result<()> {
        let points = |of: &str| {
            let mut points: Vec<(f64, f64)> = self
                .steps
                .iter()
                .filter(|step| !step.name.contains("batch of"))
                .filter(|step| step.name.ends_with(of) || step.name.contains(&format!("{of},")))
                .filter_map(|step| Some((100.0 * step.miss_ratio?, step.step_ms)))
                .collect();
            points.sort_by(|a, b| a.0.total_cmp(&b.0));
            points
        };
        let mut series = vec![
            Series { name: "k = n/16".to_owned(), points: points("n/16") },
            Series { name: "k = n/64".to_owned(), points: points("n/64") },
        ];
        for step in self.steps.iter().filter(|step| step.name.ends_with(&self.context_tokens.to_string()) || step.name.contains("streamed"))
        {
            series.push(Series { name: step.name.clone(), points: vec![(0.0, step.step_ms), (100.0, step.step_ms)] });
        }
        series.retain(|series| !series.points.is_empty());
        let title = format!("decode step, {} tokens, {} layers, {}", self.context_tokens, self.layers, self.gpu);
        Plot { title, x_label: "selected rows that were not hot, %".to_owned(), y_label: "ms a step".to_owned(), series }.write_svg(path)
    }

    /// Prints it.
    ///
    /// # Errors
    /// Never in practice: JSON of plain data.
    pub fn show(&self, format: Format) -> Result<()> {
        if format == Format::Json {
            println!("{}", serde_json::to_string(self)?);
            return Ok(());
        }
        println!(
            "{}: {} tokens, {} layers, cache {:.1} GiB on the host",
            self.gpu,
            self.context_tokens,
            self.layers,
            gib(self.cache_bytes)
        );
        println!("filled in {:.1} s, registered in {:.1} s", self.fill_s, self.register_s);
        println!("device memory reads {:.0} GB/s, pinned copy {:.1} GB/s\n", self.hbm_read_gb_per_s, self.pinned_copy_gb_per_s);
        let mut table = Table::new(["step", "ms, median (best, worst)", "misses", "GPU GiB", "part of the cache"]);
        for step in &self.steps {
            table.row([
                step.name.clone(),
                format!("{:.3} ({:.3}, {:.3})", step.step_ms, step.best_ms, step.worst_ms),
                step.miss_ratio.map_or(String::new(), |ratio| format!("{:.1} %", 100.0 * ratio)),
                format!("{:.2}", gib(step.gpu_bytes)),
                format!("1/{:.1}", self.cache_bytes as f64 / step.gpu_bytes as f64),
            ]);
        }
        println!("{table}");
        for step in self.steps.iter().filter(|step| !step.hit_rate_by_source.is_empty()) {
            let rates = |rates: &[f64]| rates.iter().map(|rate| format!("{rate:.3}")).collect::<Vec<_>>().join(" ");
            let pools = if step.pool_by_source.is_empty() { String::new() } else { format!(", pools {}", rates(&step.pool_by_source)) };
            println!("{}: hits {}, offline {}{pools}", step.name, rates(&step.hit_rate_by_source), rates(&step.offline_hit_rate_by_source));
        }
        for step in &self.steps {
            if let (Some(link), Some(gather), Some(compute)) = (step.link_ms, step.gather_ms, step.compute_ms) {
                println!(
                    "{}: missing rows {link:.3} ms by the pinned copy, {gather:.3} ms as gathers alone; without misses {compute:.3} ms",
                    step.name
                );
            }
        }
        let mut table = Table::new(["contestant", "part", "us a layer", "GB/s"]);
        for part in &self.parts {
            let rate = part.gb_per_s.map_or(String::new(), |rate| format!("{rate:.1}"));
            table.row([part.contestant.clone(), part.part.clone(), format!("{:.1}", part.layer_us), rate]);
        }
        println!("{table}");
        Ok(())
    }
}

fn gib(bytes: u64) -> f64 {
    bytes as f64 / f64::from(1 << 30)
}
