//! `sluice-bench replay`: what a pool of hot rows would hit in a key trace, in plain code that shares nothing with the kernels.

use std::cmp::Reverse;
use std::collections::{HashMap, HashSet};
use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use clap::Args;
use serde::Serialize;
use serde_json::json;
use sluice_kernels::decoder::balance::{Balance, BlockBounds};

use super::trace::KeyTrace;
use crate::report::{Format, Table, show_progress};
use crate::units::Ratio;
use crate::workload::within;

/// Replays a key trace against pools of hot rows: in every step a lane selects its k rows of highest key, finds some of them in its pool,
/// and fetches the others into it.
///
/// JSON keys: `trace`, `rows`, `steps`, `warm_up`, `drawn_layers`, `drawn_lanes`, and `results`, one object for each ratio, pool and rule:
/// `ratio`, `pool` (in k), `rule`, `selected` (k), `hit_rate` (mean over the recorded lanes), `hit_rate_by_layer`, and with `--moving-rows`
/// `pool_by_layer` (in k, at the end).
#[derive(Args, Debug)]
pub struct ReplayArguments {
    /// Trace made by `sluice-bench trace`.
    #[arg(long, value_name = "FILE")]
    trace: PathBuf,
    /// Rows that a lane selects, as a part of all; may be repeated.
    #[arg(long, default_values = ["1/16", "1/64"])]
    ratio: Vec<Ratio>,
    /// Rows of a lane's pool, in k; may be repeated.
    #[arg(long, default_values_t = [1, 2, 3, 4])]
    pool: Vec<usize>,
    /// Steps that are not counted.
    #[arg(long, default_value_t = 32, value_name = "STEPS")]
    warm_up: usize,
    /// Replay the lanes that a model of so many layers draws from the trace, instead of the recorded ones; 0: the recorded ones.
    #[arg(long, default_value_t = 0, value_name = "LAYERS")]
    drawn_layers: usize,
    /// Lanes of each of those layers.
    #[arg(long, default_value_t = 8, value_name = "LANES")]
    drawn_lanes: usize,
    /// Rows of the blocks that move between the pools of drawn lanes by measured misses; 0: pools stay equal.
    #[arg(long, default_value_t = 0, value_name = "ROWS")]
    moving_rows: usize,
    /// Table or JSON on standard output.
    #[arg(long, value_enum, default_value_t = Format::Table)]
    format: Format,
}

/// Which rows a full pool drops, always among those that the step did not select.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Rule {
    /// Rows of lowest key in the current step; of equal keys the highest position first.
    LowestKey,
    /// Rows whose last selection is longest ago; of those the highest position first.
    LeastRecentlyUsed,
}

impl Rule {
    /// Every rule.
    pub const ALL: [Self; 2] = [Self::LowestKey, Self::LeastRecentlyUsed];

    fn name(self) -> &'static str {
        match self {
            Self::LowestKey => "lowest key",
            Self::LeastRecentlyUsed => "least recently used",
        }
    }
}

/// One lane's pool.
#[derive(Clone, Debug)]
pub struct Pool {
    /// Rows that a step selects.
    selected: usize,
    /// Rows that it holds at most; at least `selected`.
    capacity: usize,
    rule: Rule,
    /// The step of its last selection, by row.
    held: HashMap<usize, usize>,
    steps: usize,
}

impl Pool {
    /// An empty pool of `capacity` rows for steps that select `selected`. Panics where a step's rows do not fit in.
    #[must_use]
    pub fn new(selected: usize, capacity: usize, rule: Rule) -> Self {
        assert!(selected <= capacity, "{selected} rows in a pool of {capacity}");
        Self { selected, capacity, rule, held: HashMap::new(), steps: 0 }
    }

    /// Makes the pool larger or smaller. A smaller one forgets a like share of its rows, whatever their keys: those that happen to lie in what
    /// it gives away. Panics where a step's rows do not fit in.
    pub fn resize(&mut self, capacity: usize) {
        assert!(self.selected <= capacity, "{} rows in a pool of {capacity}", self.selected);
        if capacity < self.capacity {
            let keep = self.held.len() * capacity / self.capacity;
            let mut rows: Vec<usize> = self.held.keys().copied().collect();
            // As good as chance, and the same each time.
            rows.sort_unstable_by_key(|&row| ((row + self.steps) as u32).wrapping_mul(0x9E37_79B9));
            for row in &rows[keep..] {
                self.held.remove(row);
            }
        }
        self.capacity = capacity;
    }

    /// Performs a step over all rows' keys; says how many of the selected rows were held.
    pub fn step(&mut self, keys: &[u16]) -> usize {
        let selected: HashSet<usize> = highest(keys, self.selected).into_iter().collect();
        let hits = selected.iter().filter(|row| self.held.contains_key(row)).count();
        let after = self.held.len() + selected.len() - hits;
        let mut others: Vec<usize> = self.held.keys().copied().filter(|row| !selected.contains(row)).collect();
        match self.rule {
            Rule::LowestKey => others.sort_unstable_by_key(|&row| (keys[row], Reverse(row))),
            Rule::LeastRecentlyUsed => others.sort_unstable_by_key(|row| (self.held[row], Reverse(*row))),
        }
        for row in &others[..after.saturating_sub(self.capacity)] {
            self.held.remove(row);
        }
        self.held.extend(selected.into_iter().map(|row| (row, self.steps)));
        self.steps += 1;
        hits
    }
}

/// The `count` rows of highest key, of equal keys the lowest positions.
fn highest(keys: &[u16], count: usize) -> Vec<usize> {
    let mut rows: Vec<usize> = (0..keys.len()).collect();
    let order = |&row: &usize| (Reverse(keys[row]), row);
    if count < rows.len() {
        rows.select_nth_unstable_by_key(count, order);
        rows.truncate(count);
    }
    rows
}

/// What is replayed.
#[derive(Clone, Copy, Debug)]
pub struct ReplayJob {
    /// Rows that a step selects, at least 1.
    pub selected: usize,
    /// Rows of a lane's pool, at least `selected`.
    pub capacity: usize,
    /// What a full pool drops.
    pub rule: Rule,
    /// Steps that are not counted.
    pub warm_up: usize,
    /// Steps in all, more than `warm_up`.
    pub steps: usize,
}

/// Layers and lanes of a model that draws from a trace.
#[derive(Clone, Copy, Debug)]
pub struct DrawnLanes {
    /// Layers of the model.
    pub layers: usize,
    /// Lanes of each.
    pub lanes: usize,
}

/// Hits and selected rows.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Hits {
    /// Selected rows that were held.
    pub hits: u64,
    /// Selected rows.
    pub selected: u64,
}

impl Hits {
    fn add(&mut self, job: &ReplayJob, step: usize, hits: usize) {
        if step >= job.warm_up {
            self.hits += hits as u64;
            self.selected += job.selected as u64;
        }
    }

    /// Hits over selected rows; 0 where nothing was selected.
    #[must_use]
    pub fn rate(self) -> f64 {
        self.hits as f64 / self.selected.max(1) as f64
    }
}

/// Replays the recorded lanes from the first step on: hits by recorded lane. `job.steps` is at most the trace's.
#[must_use]
pub fn replay(trace: &KeyTrace, job: &ReplayJob) -> Vec<Hits> {
    let mut counted = vec![Hits::default(); trace.layers];
    for (layer, counted) in counted.iter_mut().enumerate() {
        let mut pool = Pool::new(job.selected, job.capacity, job.rule);
        for step in 0..job.steps {
            let hits = pool.step(trace.keys(step, layer));
            counted.add(job, step, hits);
        }
    }
    counted
}

/// Replays the lanes that a model draws from the trace ([`KeyTrace::lane_source`]): hits by recorded lane. Stretching a lane in runs changes
/// none of its hits while k and pool are stretched as well, so the recorded rows are replayed as they are.
#[must_use]
pub fn replay_drawn(trace: &KeyTrace, job: &ReplayJob, drawn: DrawnLanes) -> Vec<Hits> {
    replay_resized(trace, job, drawn, |_, _| None)
}

/// The same with pools that change their sizes: after each step `resize` is told its number and the hits and misses of all drawn lanes,
/// `[layer][lane]`, and may give a size for each. Stretching rows in runs changes no hits while the sizes are stretched as well.
#[must_use]
pub fn replay_resized(
    trace: &KeyTrace,
    job: &ReplayJob,
    drawn: DrawnLanes,
    mut resize: impl FnMut(usize, &[[u64; 2]]) -> Option<Vec<usize>>,
) -> Vec<Hits> {
    let mut counted = vec![Hits::default(); trace.layers];
    let mut pools = vec![Pool::new(job.selected, job.capacity, job.rule); drawn.layers * drawn.lanes];
    for step in 0..job.steps {
        show_progress("replay, step", step, job.steps);
        let source = |index: usize| trace.lane_source(index / drawn.lanes, index % drawn.lanes, drawn.lanes, step);
        let hits = on_all_cores(&mut pools, |index, pool| pool.step(trace.keys(source(index).1, source(index).0)));
        hits.iter().enumerate().for_each(|(index, &hits)| counted[source(index).0].add(job, step, hits));
        let counts: Vec<[u64; 2]> = hits.iter().map(|&hits| [hits as u64, (job.selected - hits) as u64]).collect();
        for (pool, capacity) in pools.iter_mut().zip(resize(step, &counts).into_iter().flatten()) {
            pool.resize(capacity);
        }
    }
    counted
}

/// Pools of whole blocks, which move between lanes as a decoder moves them.
struct Balanced {
    balance: Balance,
    blocks: Vec<usize>,
    bounds: BlockBounds,
    block_rows: usize,
    selected: usize,
}

impl Balanced {
    fn new(job: &ReplayJob, drawn: DrawnLanes, block_rows: usize) -> Self {
        let (lanes, block_rows) = (drawn.layers * drawn.lanes, block_rows.max(1));
        let least = job.selected.div_ceil(block_rows);
        Self {
            balance: Balance::new(lanes),
            blocks: vec![job.capacity.div_ceil(block_rows); lanes],
            bounds: BlockBounds { least, most: usize::MAX },
            block_rows,
            selected: job.selected,
        }
    }

    fn whole_blocks(&self, job: ReplayJob) -> ReplayJob {
        ReplayJob { capacity: job.capacity.next_multiple_of(self.block_rows), ..job }
    }

    fn end_step(&mut self, counts: &[[u64; 2]]) -> Option<Vec<usize>> {
        self.balance.count(0, counts);
        let moves = self.balance.end_step(&self.blocks, self.bounds);
        for at in &moves {
            self.blocks[at.from] -= 1;
            self.blocks[at.to] += 1;
        }
        (!moves.is_empty()).then(|| self.blocks.iter().map(|blocks| blocks * self.block_rows).collect())
    }

    /// Mean pools, in k, by recorded lane.
    fn mean_pools(&self, recorded: usize) -> Vec<f64> {
        let of = |layer: usize| self.blocks.iter().skip(layer).step_by(recorded);
        let mean = |layer: usize| of(layer).sum::<usize>() as f64 / of(layer).count().max(1) as f64;
        (0..recorded).map(|layer| mean(layer) * self.block_rows as f64 / self.selected as f64).collect()
    }
}

/// What `work` says of each item and its index.
fn on_all_cores<T: Send, R: Send>(items: &mut [T], work: impl Fn(usize, &mut T) -> R + Sync) -> Vec<R> {
    let threads = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    let each = items.len().div_ceil(threads).max(1);
    let work = &work;
    std::thread::scope(|scope| {
        let of_chunk = |(chunk, items): (usize, &mut [T])| {
            items.iter_mut().enumerate().map(|(index, item)| work(chunk * each + index, item)).collect::<Vec<R>>()
        };
        let threads: Vec<_> = items.chunks_mut(each).enumerate().map(|chunk| scope.spawn(move || of_chunk(chunk))).collect();
        threads.into_iter().flat_map(|thread| thread.join().expect("a replay does not panic")).collect()
    })
}

/// One line of the result.
#[derive(Serialize)]
struct Outcome {
    ratio: String,
    pool: usize,
    rule: Rule,
    selected: usize,
    hit_rate: f64,
    hit_rate_by_layer: Vec<f64>,
    pool_by_layer: Vec<f64>,
}

/// Carries out the command.
///
/// # Errors
/// A trace that cannot be read, or flags out of bounds.
pub fn run(arguments: &ReplayArguments) -> Result<()> {
    let trace = KeyTrace::read(&arguments.trace).with_context(|| format!("--trace {}", arguments.trace.display()))?;
    within("warm-up", arguments.warm_up, 0, trace.steps - 1)?;
    within("drawn-layers", arguments.drawn_layers, 0, 4096)?;
    within("drawn-lanes", arguments.drawn_lanes, 1, 4096)?;
    within("moving-rows", arguments.moving_rows, 0, trace.rows)?;
    ensure!(arguments.moving_rows == 0 || arguments.drawn_layers > 0, "--moving-rows: lanes are drawn by --drawn-layers");
    let mut outcomes = Vec::new();
    for &ratio in &arguments.ratio {
        for &pool in &arguments.pool {
            within("pool", pool, 1, trace.rows)?;
            outcomes.extend(Rule::ALL.map(|rule| outcome(arguments, &trace, ratio, pool, rule)));
        }
    }
    ensure!(!outcomes.is_empty(), "--ratio, --pool: nothing to replay");
    match arguments.format {
        Format::Json => println!(
            "{}",
            json!({
                "trace": trace.origin, "rows": trace.rows, "steps": trace.steps, "warm_up": arguments.warm_up,
                "drawn_layers": arguments.drawn_layers, "drawn_lanes": arguments.drawn_lanes, "moving_rows": arguments.moving_rows,
                "results": outcomes,
            })
        ),
        Format::Table => print_table(&trace, &outcomes),
    }
    Ok(())
}

fn outcome(arguments: &ReplayArguments, trace: &KeyTrace, ratio: Ratio, pool: usize, rule: Rule) -> Outcome {
    let selected = (trace.rows as u64 * u64::from(ratio.numerator)).div_ceil(u64::from(ratio.denominator)) as usize;
    let job = ReplayJob { selected, capacity: pool * selected, rule, warm_up: arguments.warm_up, steps: trace.steps };
    let drawn = DrawnLanes { layers: arguments.drawn_layers, lanes: arguments.drawn_lanes };
    let mut balanced = Balanced::new(&job, drawn, arguments.moving_rows);
    let hits = match (drawn.layers, arguments.moving_rows) {
        (0, _) => replay(trace, &job),
        (_, 0) => replay_drawn(trace, &job, drawn),
        _ => replay_resized(trace, &balanced.whole_blocks(job), drawn, |_, counts| balanced.end_step(counts)),
    };
    let pool_by_layer = if arguments.moving_rows > 0 { balanced.mean_pools(trace.layers) } else { Vec::new() };
    let hit_rate_by_layer: Vec<f64> = hits.iter().map(|hits| hits.rate()).collect();
    // Of fewer drawn lanes than recorded ones, some recorded lane serves none.
    let served = hits.iter().filter(|hits| hits.selected > 0).count().max(1);
    let hit_rate = hit_rate_by_layer.iter().sum::<f64>() / served as f64;
    Outcome { ratio: ratio.to_string(), pool, rule, selected, hit_rate, hit_rate_by_layer, pool_by_layer }
}

fn print_table(trace: &KeyTrace, outcomes: &[Outcome]) {
    let layers: Vec<String> = trace.origin.layers.iter().map(ToString::to_string).collect();
    let by_layer = format!("hits in {}", layers.join(" / "));
    let mut table = Table::new(["k", "pool", "dropped", "hits", &by_layer]);
    for outcome in outcomes {
        let Outcome { ratio, pool, rule, selected, hit_rate, hit_rate_by_layer, pool_by_layer } = outcome;
        let rates: Vec<String> = hit_rate_by_layer.iter().map(|rate| format!("{rate:.3}")).collect();
        let pools: Vec<String> = pool_by_layer.iter().map(|pool| format!("{pool:.2}")).collect();
        table.row([
            format!("n x {ratio} = {selected}"),
            if pools.is_empty() { format!("{pool} k") } else { format!("{pool} k: {}", pools.join(" / ")) },
            rule.name().to_owned(),
            format!("{hit_rate:.3}"),
            rates.join(" / "),
        ]);
    }
    print!("{table}");
}
