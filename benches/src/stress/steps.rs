//! Decode steps, dense and sparse, interleaved with the floors of the memory that they read.

use std::ops::Range;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use sluice_client::{AttendMode, BatchStep, Session, Step, StepOut, StepReport};
use sluice_kernels::budget::Settings;
use sluice_kernels::slot::CHUNK_TOKENS;

use crate::context::LongContext;
use crate::floors::{ArenaView, GatherLists};
use crate::stress::messages::{DenseSample, RatioOutcome, SparseSample};
use crate::stress::recall::{Kept, RecallJob, kept};
use crate::stress::worker::Bench;
use crate::units::Ratio;

/// Rows and queries of one layer.
pub(super) struct StepInput {
    rows: Vec<u8>,
    /// By sequence of the batch: `[query][query_head][head_dim]`.
    queries: Vec<Vec<f32>>,
}

impl StepInput {
    /// A run of tokens of one sequence.
    pub(super) fn of_run(context: &LongContext, layer: usize, run: Range<usize>) -> Self {
        let mut rows = vec![0; context.generator.rows_bytes(layer, run.len())];
        context.generator.fill_rows(layer, run.clone(), &mut rows);
        Self { rows, queries: vec![run.flat_map(|position| context.generator.query(layer, position, 0)).collect()] }
    }

    /// One token of every sequence of a batch.
    fn of_batch(bench: &Bench, layer: usize, position: usize) -> Self {
        let mut rows = vec![0; bench.context.generator.rows_bytes(layer, 1)];
        bench.context.generator.fill_rows(layer, position..position + 1, &mut rows);
        let query = |sequence: usize| bench.context.generator.query(layer, position, sequence as u64);
        Self { rows, queries: (0..bench.options.batch).map(query).collect() }
    }
}

/// Room for the answers of a batch.
struct Answers {
    output: Vec<f32>,
    log_sum_exp: Vec<f32>,
}

impl Answers {
    fn for_queries(session: &Session, layer: usize, values: usize) -> Self {
        let head_dim = usize::from(session.shape().layers[layer].head_dim);
        Self { output: vec![0.0; values], log_sum_exp: vec![0.0; values / head_dim] }
    }
}

/// One layer of the prefill of a run.
pub(super) fn prefill_layer(session: &mut Session, layer: usize, first_position: usize, input: &StepInput) -> Result<()> {
    let queries = &input.queries[0];
    let mut answers = Answers::for_queries(session, layer, queries.len());
    let step = Step { layer, first_position, queries, rows: Some(&input.rows), attend: AttendMode::Dense };
    session.step(&step, StepOut { output: &mut answers.output, log_sum_exp: &mut answers.log_sum_exp, report: None })?;
    ensure!(answers.output.iter().all(|value| value.is_finite()), "layer {layer}: the prefill answers values that are not finite");
    Ok(())
}

/// The sparse answer to a query whose rows are stored.
pub(super) fn answer(session: &mut Session, layer: usize, position: usize, query: &[f32]) -> Result<Vec<f32>> {
    let mut answers = Answers::for_queries(session, layer, query.len());
    let step = Step { layer, first_position: position, queries: query, rows: None, attend: AttendMode::Sparse };
    session.step(&step, StepOut { output: &mut answers.output, log_sum_exp: &mut answers.log_sum_exp, report: None })?;
    Ok(answers.output)
}

/// The context in the arena, mapped by this process too.
pub(super) fn view(bench: &Bench, sequence_id: u64) -> Result<ArenaView> {
    (bench.context.progress)("map", 0, 1)?;
    let (workload, chunks) = (&bench.options.workload, bench.context.ids.len() / CHUNK_TOKENS);
    let view = ArenaView::open(&bench.arena, sequence_id, chunks, &workload.shape(), &workload.plan()).context("map the arena")?;
    view.populate(workload.threads());
    Ok(view)
}

/// The stage in which selections are compared with exact scores.
pub(super) const COMPARE: &str = "compare";

/// Sequences over the context that decode: a batch of dense ones, and one for each ratio.
pub(super) struct Groups {
    dense: Vec<Session>,
    sparse: Vec<SparseGroup>,
}

struct SparseGroup {
    ratio: Ratio,
    settings: Settings,
    sessions: Vec<Session>,
    lists: GatherLists,
    steps: Vec<SparseSample>,
    kept: Vec<Kept>,
}

impl Groups {
    /// Opens all of them; nothing of the context is appended again.
    pub(super) fn open(bench: &Bench) -> Result<Self> {
        let batch = |settings: Settings| {
            (0..bench.options.batch).map(|_| bench.context.open_known(settings, bench.attach())).collect::<Result<Vec<_>>>()
        };
        let dense = batch(Settings::dense())?;
        let sparse = bench.options.workload.ratio.iter().map(|&ratio| {
            let settings = bench.options.workload.settings(ratio);
            let (rows, count) = (settings.horizon(bench.context.ids.len()), settings.selected_tokens(bench.context.ids.len()));
            let lists = GatherLists::random(bench.context.model.shape(), rows, count, bench.options.workload.seed);
            Ok(SparseGroup { ratio, settings, sessions: batch(settings)?, lists, steps: Vec::new(), kept: Vec::new() })
        });
        Ok(Self { dense, sparse: sparse.collect::<Result<_>>()? })
    }

    /// Steps of all groups in turn, each beside the probe of what it reads.
    pub(super) fn measure(&mut self, bench: &Bench, view: &ArenaView) -> Result<(Vec<DenseSample>, Vec<RatioOutcome>)> {
        let (options, context) = (&bench.options, bench.context.ids.len());
        let threads = options.workload.threads();
        self.warm_up(bench)?;
        let mut dense = Vec::with_capacity(options.steps);
        for index in 0..options.steps {
            (bench.context.progress)("decode", index, options.steps)?;
            let position = context + index;
            let input: Vec<StepInput> = (0..bench.context.layers()).map(|layer| StepInput::of_batch(bench, layer, position)).collect();
            let token = bench.context.generator.token_ids(position..position + 1)[0];
            let read_gb_per_s = view.read_rows(threads).gb_per_s();
            let (ms, report) = step(bench, &mut self.dense, token, position, &input, AttendMode::Dense)?;
            dense.push(DenseSample { ms, row_bytes: report.row_bytes, read_gb_per_s });
            for group in &mut self.sparse {
                group.measure(bench, view, token, position, &input)?;
            }
        }
        for index in 0..options.recall_steps {
            // After all times are taken: the daemon's memory is no longer watched, because whole selections are asked for now.
            (bench.context.progress)(COMPARE, index, options.recall_steps)?;
            for group in &mut self.sparse {
                group.compare(bench, context + index * options.steps / options.recall_steps)?;
            }
        }
        let outcome = |group: &mut SparseGroup| RatioOutcome {
            ratio: group.ratio,
            selected_tokens: group.settings.selected_tokens(context + options.steps),
            steps: std::mem::take(&mut group.steps),
            kept: std::mem::take(&mut group.kept),
        };
        Ok((dense, self.sparse.iter_mut().map(outcome).collect()))
    }

    /// Touches every page and every buffer once: dense and sparse answers over stored rows of all sequences.
    fn warm_up(&mut self, bench: &Bench) -> Result<()> {
        let position = bench.context.ids.len() - 1;
        let total = self.dense.len() + self.sparse.iter().map(|group| group.sessions.len()).sum::<usize>();
        let sessions = self.dense.iter_mut().chain(self.sparse.iter_mut().flat_map(|group| &mut group.sessions));
        for (index, session) in sessions.enumerate() {
            (bench.context.progress)("warm up", index, total)?;
            for layer in 0..bench.context.layers() {
                let query = bench.context.generator.query(layer, position, 1);
                for attend in [AttendMode::Dense, AttendMode::Sparse] {
                    let mut answers = Answers::for_queries(session, layer, query.len());
                    let step = Step { layer, first_position: position, queries: &query, rows: None, attend };
                    session.step(&step, StepOut { output: &mut answers.output, log_sum_exp: &mut answers.log_sum_exp, report: None })?;
                }
            }
        }
        Ok(())
    }

    /// One sparse sequence, to fork.
    pub(super) fn any_sparse(&mut self) -> &mut Session {
        &mut self.sparse[0].sessions[0]
    }

    /// All sequences, to close.
    pub(super) fn into_sessions(self) -> impl Iterator<Item = Session> {
        self.dense.into_iter().chain(self.sparse.into_iter().flat_map(|group| group.sessions))
    }
}

impl SparseGroup {
    fn measure(&mut self, bench: &Bench, view: &ArenaView, token: u32, position: usize, input: &[StepInput]) -> Result<()> {
        let threads = bench.options.workload.threads();
        let gather_gb_per_s = view.gather(&self.lists, threads)?.gb_per_s();
        let label_read_gb_per_s = view.read_labels(threads).gb_per_s();
        let (ms, report) = step(bench, &mut self.sessions, token, position, input, AttendMode::Sparse)?;
        let milliseconds = |nanoseconds: u64| nanoseconds as f64 / 1e6;
        self.steps.push(SparseSample {
            ms,
            row_bytes: report.row_bytes,
            label_bytes: report.label_bytes,
            score_ms: milliseconds(report.score_ns),
            select_ms: milliseconds(report.select_ns),
            attend_ms: milliseconds(report.gather_ns + report.attend_ns),
            gather_gb_per_s,
            label_read_gb_per_s,
        });
        Ok(())
    }

    /// Compares the selection of a step that was done, in one layer, with exact scores.
    fn compare(&mut self, bench: &Bench, position: usize) -> Result<()> {
        let layer = self.kept.len() % bench.context.layers();
        let query = &bench.context.generator.query(layer, position, 0);
        let rows = self.settings.horizon(position + 1);
        let lanes = self.sessions[0].rows(layer, position, query)?;
        let selected = lanes.iter().map(|lane| lane.positions.iter().map(|&at| at as u32).filter(|&at| (at as usize) < rows).collect());
        let selected: Vec<Vec<u32>> = selected.collect();
        let expected = self.settings.selected_tokens(position + 1);
        ensure!(selected.iter().all(|lane| lane.len() == expected), "layer {layer}: not {expected} rows selected in every lane");
        let job = RecallJob { generator: &bench.context.generator, layer, shape: bench.context.model.shape().layers[layer], query, rows };
        self.kept.push(kept(&job, &selected, bench.options.workload.threads()));
        Ok(())
    }
}

/// One token of every sequence of a group in all layers: milliseconds, and what it cost.
fn step(
    bench: &Bench,
    sessions: &mut [Session],
    token: u32,
    position: usize,
    input: &[StepInput],
    attend: AttendMode,
) -> Result<(f64, StepReport)> {
    let values = input.iter().map(|input| input.queries[0].len()).max().unwrap_or(0);
    let mut answers: Vec<Answers> = sessions.iter().map(|session| Answers::for_queries(session, 0, values)).collect();
    let mut reports = vec![StepReport::default(); sessions.len()];
    let begin = Instant::now();
    for session in &mut *sessions {
        session.begin(&[token])?;
    }
    for (layer, input) in input.iter().enumerate() {
        let parts = sessions.iter_mut().zip(&input.queries).zip(answers.iter_mut().zip(&mut reports));
        let mut batch: Vec<BatchStep<'_>> = parts
            .map(|((session, queries), (answers, report))| BatchStep {
                session,
                step: Step { layer, first_position: position, queries, rows: Some(&input.rows), attend },
                out: StepOut { output: &mut answers.output, log_sum_exp: &mut answers.log_sum_exp, report: Some(report) },
            })
            .collect();
        for result in bench.context.client.step_batch(&mut batch) {
            result.with_context(|| format!("layer {layer} at {position}"))?;
        }
    }
    let ms = begin.elapsed().as_secs_f64() * 1e3;
    ensure!(sessions.iter().all(|session| session.length() == position + 1), "a step at {position} was not committed");
    let mut total = StepReport::default();
    reports.into_iter().for_each(|report| total += report);
    Ok((ms, total))
}
