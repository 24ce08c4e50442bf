//! The result of a stress run: figures, table, JSON and plot.

use anyhow::{Result, anyhow};
use serde_json::{Map, Value, json};

use crate::generator::GENERATOR_NAME;
use crate::report::{Plot, Series, Table};
use crate::statistics::{Interval, Spread, bootstrap_median, median, spread};
use crate::stress::messages::{DenseSample, RatioOutcome, SparseSample, WorkerOutcome};
use crate::stress::options::StressOptions;

/// The daemon's side of a run.
#[derive(Clone, Debug)]
pub struct DaemonOutcome {
    /// Version of the daemon.
    pub version: String,
    /// Device of its decoder.
    pub device: String,
    /// Largest anonymous resident memory seen during the run.
    pub rss_anon_peak_bytes: u64,
    /// Bytes of labels in shared memory.
    pub label_bytes: u64,
    /// Bytes of rows in the arena.
    pub arena_used_bytes: u64,
    /// Open descriptors at the end.
    pub open_descriptors: u64,
}

/// Everything about a run.
#[derive(Debug)]
pub struct StressOutcome {
    /// What was asked for.
    pub options: StressOptions,
    /// What the worker measured.
    pub worker: WorkerOutcome,
    /// What the daemon took.
    pub daemon: DaemonOutcome,
    /// Seconds from start to end.
    pub total_seconds: f64,
}

/// Figures of dense steps.
struct Dense {
    ms: Spread,
    floor_ms: Spread,
    read: f64,
    memory: f64,
    /// Time over what the read rate of the same moment allows.
    to_floor: Interval,
}

/// Figures of one ratio.
struct Sparse {
    ms: Spread,
    floor_ms: Spread,
    /// Time over floor, pair by pair.
    to_floor: Interval,
    gather: f64,
    label_read: f64,
    bytes: f64,
    parts_ms: [f64; 3],
    recall: f64,
    mass: f64,
    mass_bound: f64,
}

const RESAMPLES: usize = 2000;

fn figures_missing() -> anyhow::Error {
    anyhow!("no steps were measured")
}

impl Dense {
    fn of(samples: &[DenseSample], seed: u64) -> Option<Self> {
        let all = |of: &dyn Fn(&DenseSample) -> f64| samples.iter().map(of).collect::<Vec<_>>();
        let rate = |sample: &DenseSample| sample.row_bytes as f64 / sample.ms / 1e6;
        Some(Self {
            ms: spread(&all(&|sample| sample.ms))?,
            floor_ms: spread(&all(&|sample| sample.row_bytes as f64 / sample.read_gb_per_s / 1e6))?,
            read: median(&all(&rate))?,
            memory: median(&all(&|sample| sample.read_gb_per_s))?,
            to_floor: bootstrap_median(&all(&|sample| sample.read_gb_per_s / rate(sample)), RESAMPLES, seed)?,
        })
    }
}

impl Sparse {
    fn of(outcome: &RatioOutcome, seed: u64) -> Option<Self> {
        let all = |of: &dyn Fn(&SparseSample) -> f64| outcome.steps.iter().map(of).collect::<Vec<_>>();
        let middle = |of: &dyn Fn(&SparseSample) -> f64| median(&all(of));
        let mean = |of: fn(&crate::stress::recall::Kept) -> f64| outcome.kept.iter().map(of).sum::<f64>() / outcome.kept.len() as f64;
        Some(Self {
            ms: spread(&all(&|sample| sample.ms))?,
            floor_ms: spread(&all(&SparseSample::floor_ms))?,
            to_floor: bootstrap_median(&all(&|sample| sample.ms / sample.floor_ms()), RESAMPLES, seed)?,
            gather: middle(&|sample| sample.gather_gb_per_s)?,
            label_read: middle(&|sample| sample.label_read_gb_per_s)?,
            bytes: middle(&|sample| (sample.row_bytes + sample.label_bytes) as f64)?,
            parts_ms: [middle(&|sample| sample.score_ms)?, middle(&|sample| sample.select_ms)?, middle(&|sample| sample.attend_ms)?],
            recall: mean(|kept| kept.recall),
            mass: mean(|kept| kept.mass),
            mass_bound: mean(|kept| kept.mass_bound),
        })
    }
}

impl StressOutcome {
    fn dense(&self) -> Result<Dense> {
        Dense::of(&self.worker.dense, self.options.workload.seed).ok_or_else(figures_missing)
    }

    fn sparse(&self) -> Result<Vec<Sparse>> {
        let all = self.worker.sparse.iter().map(|outcome| Sparse::of(outcome, self.options.workload.seed).ok_or_else(figures_missing));
        all.collect()
    }

    /// The object for standard output; keys are described at [`StressOptions`].
    ///
    /// # Errors
    /// Nothing was measured.
    pub fn json(&self) -> Result<Value> {
        let dense = self.dense()?;
        let runs: Vec<Map<String, Value>> =
            self.sparse()?.iter().zip(&self.worker.sparse).map(|(sparse, outcome)| run_json(sparse, outcome, &dense)).collect();
        let mut object = runs.first().cloned().ok_or_else(figures_missing)?;
        for part in [self.shape_json(), self.daemon_json(), self.rates_json()?, dense_json(&dense)] {
            object.extend(part.as_object().cloned().unwrap_or_default());
        }
        object.insert("runs".to_owned(), json!(runs));
        Ok(Value::Object(object))
    }

    fn shape_json(&self) -> Value {
        let (options, workload) = (&self.options, &self.options.workload);
        json!({
            "generator": GENERATOR_NAME, "seed": workload.seed, "context_tokens": workload.context.0, "layers": workload.layers,
            "kv_heads": workload.kv_heads, "query_heads": workload.query_heads, "head_dim": workload.head_dim, "row_type": workload.row_type,
            "label_plan": workload.plan().to_string(), "label_bytes_per_row": workload.plan().label_bytes(), "batch": options.batch,
            "steps": options.steps, "attach": options.attach, "device": workload.device, "threads": workload.threads(),
            "total_seconds": self.total_seconds,
        })
    }

    fn daemon_json(&self) -> Value {
        let daemon = &self.daemon;
        json!({
            // Labels and open slots lie in shared memory, so nothing has to be subtracted from the anonymous memory.
            "daemon_overhead_bytes": daemon.rss_anon_peak_bytes, "daemon_version": daemon.version, "daemon_device": daemon.device,
            "label_bytes": daemon.label_bytes, "arena_used_bytes": daemon.arena_used_bytes, "open_descriptors": daemon.open_descriptors,
        })
    }

    fn rates_json(&self) -> Result<Value> {
        let WorkerOutcome { fill, prefill, seal_seconds, reopen, fork_ms, close_ms, .. } = &self.worker;
        let open_ms = spread(&reopen.open_ms).ok_or_else(figures_missing)?;
        Ok(json!({
            "fill_tokens_per_s": fill.tokens as f64 / fill.seconds, "fill_gb_per_s": fill.bytes as f64 / fill.seconds / 1e9,
            "append_gb_per_s": fill.bytes as f64 / fill.append_seconds / 1e9, "seal_wait_ms": seal_seconds * 1e3,
            "prefill_tokens": prefill.tokens, "prefill_tokens_per_s": prefill.tokens as f64 / prefill.seconds,
            "prefill_gflop_per_s": self.prefill_flop() / prefill.seconds / 1e9,
            "second_open_tokens": reopen.tokens, "second_open_appended_tokens": reopen.appended_tokens,
            "second_open_ms": open_ms.median, "second_open_worst_ms": open_ms.worst, "fork_ms": fork_ms, "close_ms": close_ms,
        }))
    }

    /// Multiplications and additions of q.k and of the weighted sum of values.
    fn prefill_flop(&self) -> f64 {
        let options = &self.options.workload;
        let per_row = 4.0 * f64::from(options.head_dim) * f64::from(options.query_heads) * f64::from(options.layers);
        per_row * self.worker.prefill.tokens as f64 * options.context.0 as f64
    }

    /// Tables for people.
    ///
    /// # Errors
    /// Nothing was measured.
    pub fn table(&self) -> Result<String> {
        let (dense, sparse) = (self.dense()?, self.sparse()?);
        let mut steps =
            Table::new(["step", "ms (best, worst)", "floor ms (best)", "x floor (95 %)", "GB/step", "x dense", "recall", "mass (bound)"]);
        let dense_bytes = self.worker.dense.first().map_or(0, |sample| sample.row_bytes) as f64;
        steps.row([
            "dense".to_owned(),
            format!("{:.1} ({:.1}, {:.1})", dense.ms.median, dense.ms.best, dense.ms.worst),
            format!("{:.1} ({:.1})", dense.floor_ms.median, dense.floor_ms.best),
            interval_text(&dense.to_floor),
            format!("{:.3}", dense_bytes / 1e9),
            "1.0".to_owned(),
            "1".to_owned(),
            "1".to_owned(),
        ]);
        for (sparse, outcome) in sparse.iter().zip(&self.worker.sparse) {
            steps.row([
                format!("k = n x {}", outcome.ratio),
                format!("{:.1} ({:.1}, {:.1})", sparse.ms.median, sparse.ms.best, sparse.ms.worst),
                format!("{:.1} ({:.1})", sparse.floor_ms.median, sparse.floor_ms.best),
                interval_text(&sparse.to_floor),
                format!("{:.3}", sparse.bytes / 1e9),
                format!("{:.1}", dense.ms.median / sparse.ms.median),
                format!("{:.3}", sparse.recall),
                format!("{:.3} ({:.3})", sparse.mass, sparse.mass_bound),
            ]);
        }
        Ok(format!("{}\n\n{steps}\n{}\n{}", self.title(), self.memory_table(&dense, &sparse), self.rest_table()?))
    }

    fn title(&self) -> String {
        let StressOptions { workload, batch, attach, .. } = &self.options;
        format!("{}; batch {batch}, {attach:?}; {:.0} s in all", workload.title(), self.total_seconds)
    }

    fn memory_table(&self, dense: &Dense, sparse: &[Sparse]) -> Table {
        let mut table = Table::new(["memory, all threads", "GB/s"]);
        table.row(["sequential read of the rows".to_owned(), format!("{:.1}", dense.memory)]);
        table.row(["read by dense steps".to_owned(), format!("{:.1}", dense.read)]);
        for (sparse, outcome) in sparse.iter().zip(&self.worker.sparse) {
            table.row([format!("gather of sorted rows at {}", outcome.ratio), format!("{:.1}", sparse.gather)]);
            table.row([format!("read of labels beside {}", outcome.ratio), format!("{:.1}", sparse.label_read)]);
            let [score, select, attend] = sparse.parts_ms;
            table.row([format!("step at {}: score, select, attend ms", outcome.ratio), format!("{score:.1}, {select:.1}, {attend:.1}")]);
        }
        table
    }

    fn rest_table(&self) -> Result<Table> {
        let WorkerOutcome { fill, prefill, seal_seconds, reopen, fork_ms, close_ms, .. } = &self.worker;
        let open = spread(&reopen.open_ms).ok_or_else(figures_missing)?;
        let mut table = Table::new(["what", "measured"]);
        let rate = |bytes: u64, seconds: f64| bytes as f64 / seconds / 1e9;
        let mut row = |what: &str, measured: String| table.row([what.to_owned(), measured]);
        let filled = format!("{:.0} tokens/s, {:.2} GB/s", fill.tokens as f64 / fill.seconds, rate(fill.bytes, fill.seconds));
        row("fill: generate, append and seal", filled);
        row("time inside append", format!("{:.2} GB/s", rate(fill.bytes, fill.append_seconds)));
        row("last row until all sealed", format!("{:.0} ms", seal_seconds * 1e3));
        let prefilled = prefill.tokens as f64 / prefill.seconds;
        let flop = self.prefill_flop() / prefill.seconds / 1e9;
        row("prefill of the last piece, dense", format!("{} tokens, {prefilled:.1} tokens/s, {flop:.0} GFLOP/s", prefill.tokens));
        let opened = format!("{:.1} ms (worst {:.1}), {} appended", open.median, open.worst, reopen.appended_tokens);
        row(&format!("second open of {} tokens", reopen.tokens), opened);
        row("fork; close", format!("{fork_ms:.1} ms; {close_ms:.1} ms"));
        row("daemon: anonymous memory, peak", format!("{:.1} MiB", self.daemon.rss_anon_peak_bytes as f64 / f64::from(1 << 20)));
        row("daemon: arena used; labels", format!("{} MiB; {} MiB", self.daemon.arena_used_bytes >> 20, self.daemon.label_bytes >> 20));
        Ok(table)
    }

    /// Time of every step and of its floor.
    #[must_use]
    pub fn plot(&self) -> Plot {
        let series = |name: String, values: &mut dyn Iterator<Item = f64>| Series {
            name,
            points: values.enumerate().map(|(index, value)| (index as f64, value)).collect(),
        };
        let dense = &self.worker.dense;
        let mut lines = vec![
            series("dense".to_owned(), &mut dense.iter().map(|sample| sample.ms)),
            series("dense: read floor".to_owned(), &mut dense.iter().map(|sample| sample.row_bytes as f64 / sample.read_gb_per_s / 1e6)),
        ];
        for outcome in &self.worker.sparse {
            lines.push(series(format!("k = n x {}", outcome.ratio), &mut outcome.steps.iter().map(|sample| sample.ms)));
            lines.push(series(format!("{}: gather floor", outcome.ratio), &mut outcome.steps.iter().map(SparseSample::floor_ms)));
        }
        Plot {
            title: format!(
                "{} tokens, {} layers, {:?}: time of a step",
                self.options.workload.context, self.options.workload.layers, self.options.attach
            ),
            x_label: "step".to_owned(),
            y_label: "milliseconds".to_owned(),
            series: lines,
        }
    }
}

fn interval_text(interval: &Interval) -> String {
    format!("{:.2} ({:.2} to {:.2})", interval.median, interval.low, interval.high)
}

fn dense_json(dense: &Dense) -> Value {
    json!({
        "dense_step_ms": dense.ms.median, "dense_step_best_ms": dense.ms.best, "dense_step_worst_ms": dense.ms.worst,
        "dense_floor_ms": dense.floor_ms.median, "dense_floor_best_ms": dense.floor_ms.best, "dense_read_gb_per_s": dense.read,
        "memory_read_gb_per_s": dense.memory, "dense_to_floor": dense.to_floor,
    })
}

fn run_json(sparse: &Sparse, outcome: &RatioOutcome, dense: &Dense) -> Map<String, Value> {
    let [score, select, attend] = sparse.parts_ms;
    let value = json!({
        "budget_ratio": outcome.ratio.value(), "budget": outcome.ratio.to_string(), "selected_tokens": outcome.selected_tokens,
        "sparse_step_ms": sparse.ms.median, "sparse_step_best_ms": sparse.ms.best,
        "sparse_step_worst_ms": sparse.ms.worst, "sparse_floor_ms": sparse.floor_ms.median, "sparse_floor_best_ms": sparse.floor_ms.best,
        "sparse_to_floor": sparse.to_floor, "dense_to_sparse": dense.ms.median / sparse.ms.median, "gather_gb_per_s": sparse.gather,
        "label_read_gb_per_s": sparse.label_read, "recall": sparse.recall, "mass_kept": sparse.mass, "mass_bound": sparse.mass_bound,
        "bytes_per_step": sparse.bytes, "score_ms": score, "select_ms": select, "attend_ms": attend,
    });
    value.as_object().cloned().unwrap_or_default()
}
