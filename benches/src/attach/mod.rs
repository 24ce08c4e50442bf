//! `sluice-bench attach`: what the ways to attach cost, on the same rows in the same run.
//!
//! Three ways to perform the same step: a session that is directly attached to a daemon; the kernels alone over the same segments, in this
//! process, without daemon and client library; and a session over gRPC, for which the daemon's decoder works. The three take turns, step
//! by step, each as often before as behind each other one, and their answers must be equal to the bit. Right before its step each way asks
//! for the previous token again, untimed: what is compared are steps that follow one another, with compute threads that are awake.

mod holder;

use std::fmt::Write as _;
use std::path::PathBuf;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context as _, Result, anyhow, ensure};
use serde_json::{Value, json};
use sluice_client::{Attach, AttendMode, Session, Step, StepOut};
use sluice_kernels::slot::CHUNK_TOKENS;

use crate::context::LongContext;
use crate::daemon::LocalDaemon;
use crate::floors::ArenaView;
use crate::report::{Format, Plot, Series, Table, show_progress};
use crate::statistics::{Interval, bootstrap_median, median};
use crate::units::Ratio;
use crate::workload::{Workload, within};
use holder::Holder;

/// Times the same decode steps directly attached, with the decoder alone, and over gRPC, in turns; the first ratio counts.
///
/// JSON keys: `context_tokens`, `layers`, `budget_ratio`, `steps`, `direct_step_ms`, `in_process_step_ms`, `stream_step_ms` (medians),
/// `direct_to_in_process`, `stream_to_direct` (medians of the ratios of neighbouring steps, each with `low` and `high`: its 95 % bounds).
#[derive(Clone, Debug, clap::Args)]
pub struct AttachOptions {
    /// Shape and context.
    #[command(flatten)]
    pub workload: Workload,
    /// Steps of each way.
    #[arg(long, default_value_t = 200)]
    pub steps: usize,
    /// Write when every directly attached step began and ended, in seconds since the epoch, a line a step: `strace -f -ttt` then shows what
    /// it asks of the operating system.
    #[arg(long)]
    pub step_times: Option<PathBuf>,
}

/// Row and query of one token in one layer.
struct LayerInput {
    layer: usize,
    rows: Vec<u8>,
    query: Vec<f32>,
}

/// One token of a step.
struct Token<'a> {
    /// Its id while its rows are new; `None`: the rows are there and only asked for.
    new: Option<u32>,
    position: usize,
    inputs: &'a [LayerInput],
}

/// The three ways, in the order of the samples.
const WAYS: [&str; 3] = ["direct", "in process", "stream"];
/// Each way as often first, second and third, and as often behind each of the others: what one leaves in the caches serves the next.
const ORDERS: [[usize; 3]; 6] = [[0, 1, 2], [1, 2, 0], [2, 0, 1], [2, 1, 0], [0, 2, 1], [1, 0, 2]];
/// Between two ways, so that threads that still spin for the one do not slow the other down.
const PAUSE: Duration = Duration::from_millis(1);
/// Steps that are not counted.
const WARM_UP: usize = 4;
const RESAMPLES: usize = 4000;

/// Carries out the comparison and writes its result to standard output.
///
/// # Errors
/// Flags out of bounds, a daemon that fails, or ways that answer differently.
pub fn run(options: &AttachOptions) -> Result<()> {
    let workload = &options.workload;
    workload.check()?;
    within("steps", options.steps, 1, (Workload::OPEN_SLOTS as usize - 1) * CHUNK_TOKENS - WARM_UP)?;
    let ratio = *workload.ratio.first().ok_or_else(|| anyhow!("--ratio: one is needed"))?;
    eprintln!("start the daemon");
    let daemon = LocalDaemon::start(&workload.daemon(4, options.steps + WARM_UP))?;
    let context = LongContext::start(workload.clone(), &daemon.socket(), |stage, done, total| {
        show_progress(stage, done, total);
        Ok(())
    })?;
    let samples = measure(options, &context, &daemon, ratio)?;
    drop(context);
    daemon.stop()?;
    let outcome = Outcome { options, ratio, samples };
    if let Some(path) = &workload.plot {
        outcome.plot().write_svg(path)?;
    }
    match workload.format {
        Format::Table => println!("{}", outcome.table()?),
        Format::Json => println!("{}", serde_json::to_string(&outcome.json()?)?),
    }
    Ok(())
}

/// Milliseconds of every step, by way.
type Samples = Vec<[f64; 3]>;

fn measure(options: &AttachOptions, context: &LongContext, daemon: &LocalDaemon, ratio: Ratio) -> Result<Samples> {
    let settings = options.workload.settings(ratio);
    let mut filled = context.open_new(settings, context.direct())?;
    context.fill(&mut filled, context.ids.len())?;
    context.wait_sealed(&mut filled)?;
    let (shape, plan) = (options.workload.shape(), options.workload.plan());
    let view = ArenaView::open(daemon.arena(), filled.sequence_id(), context.ids.len() / CHUNK_TOKENS, &shape, &plan)?;
    let folder = tempfile::Builder::new().prefix("sluice-bench-").tempdir_in(&options.workload.arena_parent)?;
    let mut holder = Holder::new(folder.path(), context, &view, settings)?;
    let mut direct = context.open_known(settings, context.direct())?;
    let mut stream = context.open_known(settings, Attach::Stream)?;
    touch(context, &mut direct)?;
    touch(context, &mut stream)?;
    view.populate(options.workload.threads());
    let mut samples = Samples::new();
    let mut times = String::new();
    let mut previous = inputs_of(context, context.ids.len() - 1);
    for index in 0..options.steps + WARM_UP {
        show_progress("steps", index, options.steps + WARM_UP);
        let position = context.ids.len() + index;
        let inputs = inputs_of(context, position);
        let again = Token { new: None, position: position - 1, inputs: &previous };
        let token = Token { new: Some(context.generator.token_ids(position..position + 1)[0]), position, inputs: &inputs };
        let mut sample = [0.0; 3];
        let mut answers: [Vec<Vec<f32>>; 3] = std::array::from_fn(|_| inputs.iter().map(|input| vec![0.0; input.query.len()]).collect());
        for way in ORDERS[index % ORDERS.len()] {
            std::thread::sleep(PAUSE);
            let answers = &mut answers[way];
            let mut step = |token: &Token<'_>| match way {
                0 => session_step(&mut direct, token, answers),
                1 => holder.step(token, answers),
                _ => session_step(&mut stream, token, answers),
            };
            step(&again)?;
            let (began, begin) = (SystemTime::now(), Instant::now());
            step(&token)?;
            let took = begin.elapsed();
            sample[way] = took.as_secs_f64() * 1e3;
            if way == 0 {
                let began = began.duration_since(UNIX_EPOCH)?;
                writeln!(times, "{:.6} {:.6}", began.as_secs_f64(), (began + took).as_secs_f64())?;
            }
        }
        ensure!(answers[0] == answers[1] && answers[0] == answers[2], "step {index}: the three ways answer differently");
        if index >= WARM_UP {
            samples.push(sample);
        }
        previous = inputs;
    }
    if let Some(path) = &options.step_times {
        std::fs::write(path, times).with_context(|| format!("--step-times: {}", path.display()))?;
    }
    for session in [filled, direct, stream] {
        session.close()?;
    }
    Ok(samples)
}

fn inputs_of(context: &LongContext, position: usize) -> Vec<LayerInput> {
    let input = |layer| {
        let mut rows = vec![0; context.generator.rows_bytes(layer, 1)];
        context.generator.fill_rows(layer, position..position + 1, &mut rows);
        LayerInput { layer, rows, query: context.generator.query(layer, position, 0) }
    };
    (0..context.layers()).map(input).collect()
}

/// Reads every row once, so that no step takes the first page fault of a mapping.
fn touch(context: &LongContext, session: &mut Session) -> Result<()> {
    let position = context.ids.len() - 1;
    for layer in 0..context.layers() {
        let query = context.generator.query(layer, position, 1);
        let (mut output, mut lse) = (vec![0.0; query.len()], vec![0.0; query.len() / usize::from(context.workload.head_dim)]);
        let step = Step { layer, first_position: position, queries: &query, rows: None, attend: AttendMode::Dense };
        session.step(&step, StepOut { output: &mut output, log_sum_exp: &mut lse, report: None })?;
    }
    Ok(())
}

fn session_step(session: &mut Session, token: &Token<'_>, answers: &mut [Vec<f32>]) -> Result<()> {
    if let Some(id) = token.new {
        session.begin(&[id])?;
    }
    for (input, output) in token.inputs.iter().zip(answers) {
        let mut lse = vec![0.0; usize::from(session.shape().layers[input.layer].query_heads)];
        let (layer, queries, rows) = (input.layer, input.query.as_slice(), token.new.map(|_| input.rows.as_slice()));
        let step = Step { layer, first_position: token.position, queries, rows, attend: AttendMode::Sparse };
        session.step(&step, StepOut { output, log_sum_exp: &mut lse, report: None })?;
    }
    Ok(())
}

struct Outcome<'a> {
    options: &'a AttachOptions,
    ratio: Ratio,
    samples: Samples,
}

impl Outcome<'_> {
    fn of_way(&self, way: usize) -> Vec<f64> {
        self.samples.iter().map(|sample| sample[way]).collect()
    }

    fn medians(&self) -> Result<[f64; 3]> {
        let of = |way| median(&self.of_way(way)).ok_or_else(|| anyhow!("no steps"));
        Ok([of(0)?, of(1)?, of(2)?])
    }

    fn quotient(&self, of: usize, by: usize) -> Result<Interval> {
        let quotients: Vec<f64> = self.samples.iter().map(|sample| sample[of] / sample[by]).collect();
        bootstrap_median(&quotients, RESAMPLES, self.options.workload.seed).ok_or_else(|| anyhow!("no steps"))
    }

    fn json(&self) -> Result<Value> {
        let [direct, in_process, stream] = self.medians()?;
        let workload = &self.options.workload;
        Ok(json!({
            "context_tokens": workload.context.0, "layers": workload.layers, "budget_ratio": self.ratio.value(),
            "device": workload.device, "threads": workload.threads(), "seed": workload.seed, "steps": self.samples.len(),
            "direct_step_ms": direct, "in_process_step_ms": in_process, "stream_step_ms": stream,
            "direct_to_in_process": self.quotient(0, 1)?, "stream_to_direct": self.quotient(2, 0)?,
        }))
    }

    fn table(&self) -> Result<String> {
        let mut table = Table::new(["way", "ms, median", "over the decoder alone (95 %)"]);
        for (way, (name, ms)) in WAYS.iter().zip(self.medians()?).enumerate() {
            let Interval { low, median, high } = self.quotient(way, 1)?;
            table.row([(*name).to_owned(), format!("{ms:.2}"), format!("{median:.4} ({low:.4} to {high:.4})")]);
        }
        let workload = &self.options.workload;
        Ok(format!("{}; k = n x {}, {} steps of each way in turns\n\n{table}", workload.title(), self.ratio, self.samples.len()))
    }

    fn plot(&self) -> Plot {
        let series = WAYS.iter().enumerate().map(|(way, name)| Series {
            name: (*name).to_owned(),
            points: self.of_way(way).into_iter().enumerate().map(|(index, ms)| (index as f64, ms)).collect(),
        });
        Plot {
            title: format!("{} tokens, k = n x {}: time of a step by way to attach", self.options.workload.context, self.ratio),
            x_label: "step".to_owned(),
            y_label: "milliseconds".to_owned(),
            series: series.collect(),
        }
    }
}
