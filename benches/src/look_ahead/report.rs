//! What looking ahead buys, in rows.

use anyhow::Result;
use serde::Serialize;

use super::replayed::{Counts, Replayed};
use crate::report::{Format, Table};

/// Rows a step and layer, by layer, with one size of the pool.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Outcome {
    /// Rows of a lane's pool, in selected rows.
    pool: usize,
    /// Rows that steps miss without looking ahead.
    missed: Vec<f64>,
    /// Rows that they miss with it.
    missed_after: Vec<f64>,
    /// Rows that looking ahead fetches.
    ahead: Vec<f64>,
    /// Rows fetched in all, beyond those fetched without looking ahead.
    extra: Vec<f64>,
}

impl Outcome {
    pub(super) fn new(pool: usize, alone: &Replayed, ahead: &Replayed) -> Self {
        let a_step = |of: &Replayed, rows: fn(&Counts) -> u64| -> Vec<f64> {
            of.counts.iter().map(|counts| rows(counts) as f64 / of.steps as f64).collect()
        };
        let missed = a_step(alone, |counts| counts.missed);
        let fetched = a_step(ahead, |counts| counts.missed + counts.ahead);
        Self {
            pool,
            extra: fetched.iter().zip(&missed).map(|(with, without)| with - without).collect(),
            missed_after: a_step(ahead, |counts| counts.missed),
            ahead: a_step(ahead, |counts| counts.ahead),
            missed,
        }
    }
}

/// Everything.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Found {
    /// Tokens of the text.
    pub(super) tokens: usize,
    /// Steps that count.
    pub(super) steps: usize,
    /// Rows that a lane selects at the end.
    pub(super) selected: usize,
    /// Full-attention layers.
    pub(super) layers: Vec<usize>,
    /// Label plan.
    pub(super) plan: String,
    /// By layer, the part of the truly selected rows that the predicted query selects.
    pub(super) agreement: Vec<f64>,
    pub(super) outcomes: Vec<Outcome>,
}

impl Found {
    pub(super) fn show(&self, format: Format) -> Result<()> {
        if format == Format::Json {
            println!("{}", serde_json::to_string(self)?);
            return Ok(());
        }
        let layers: Vec<String> = self.layers.iter().map(ToString::to_string).collect();
        println!(
            "{} tokens, the last {} of them steps that count, {} rows selected, labels {}; layers {}",
            self.tokens,
            self.steps,
            self.selected,
            self.plan,
            layers.join(" / ")
        );
        let agreement: Vec<String> = self.agreement.iter().map(|part| format!("{part:.3}")).collect();
        println!("rows selected by the predicted query too: {:.3} ({})\n", mean(&self.agreement), agreement.join(" / "));
        let mut table = Table::new(["pool", "misses a step without", "with", "fetched ahead", "extra rows fetched"]);
        for outcome in &self.outcomes {
            let Outcome { pool, missed, missed_after, ahead, extra } = outcome;
            table.row([format!("{pool} k"), rows(missed), rows(missed_after), rows(ahead), rows(extra)]);
        }
        print!("{table}");
        Ok(())
    }
}

fn rows(by_layer: &[f64]) -> String {
    let each: Vec<String> = by_layer.iter().map(|rows| format!("{rows:.0}")).collect();
    format!("{:.0} ({})", mean(by_layer), each.join(" / "))
}

fn mean(values: &[f64]) -> f64 {
    values.iter().sum::<f64>() / values.len().max(1) as f64
}
