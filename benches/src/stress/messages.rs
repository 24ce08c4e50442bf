//! What parent and worker tell each other: one JSON object a line.

use std::io::{BufRead, Write};
use std::path::PathBuf;

use anyhow::{Context, Result, anyhow, ensure};
use serde::{Deserialize, Serialize};

use crate::context::FillOutcome;
use crate::stress::options::StressOptions;
use crate::stress::recall::Kept;
use crate::units::Ratio;

/// Parent to worker, once.
#[derive(Debug, Serialize, Deserialize)]
pub struct Order {
    /// What to do.
    pub options: StressOptions,
    /// The daemon's gRPC socket.
    pub socket: PathBuf,
    /// Its arena folder, for the floors.
    pub arena: PathBuf,
}

/// Worker to parent.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Event {
    /// So much of a stage is done.
    Progress {
        /// What is going on.
        stage: String,
        /// Units done.
        done: usize,
        /// Units in all.
        total: usize,
    },
    /// The end.
    Done(Box<WorkerOutcome>),
    /// It could not be done.
    Failed(String),
}

/// Everything that the worker measured.
#[derive(Debug, Serialize, Deserialize)]
pub struct WorkerOutcome {
    /// Filling all but the last piece.
    pub fill: FillOutcome,
    /// The last piece.
    pub prefill: PrefillOutcome,
    /// Seconds from the last row until everything was sealed.
    pub seal_seconds: f64,
    /// Opening a known prompt.
    pub reopen: ReopenOutcome,
    /// Dense steps.
    pub dense: Vec<DenseSample>,
    /// Sparse steps by ratio.
    pub sparse: Vec<RatioOutcome>,
    /// A fork in the middle of a chunk.
    pub fork_ms: f64,
    /// A close, mean of all.
    pub close_ms: f64,
}

/// Dense attention of many queries over the whole context.
#[derive(Debug, Serialize, Deserialize)]
pub struct PrefillOutcome {
    /// Query tokens.
    pub tokens: usize,
    /// Seconds in all layers.
    pub seconds: f64,
}

/// Opening a prompt that is there already.
#[derive(Debug, Serialize, Deserialize)]
pub struct ReopenOutcome {
    /// Tokens of the prompt.
    pub tokens: usize,
    /// Tokens that would have had to be appended, most of all opens.
    pub appended_tokens: usize,
    /// Every open, with everything that attaching takes.
    pub open_ms: Vec<f64>,
}

/// A dense step and the read rate beside it.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct DenseSample {
    /// Milliseconds of the step.
    pub ms: f64,
    /// Bytes of rows it read.
    pub row_bytes: u64,
    /// Sequential read rate of the same rows, all threads.
    pub read_gb_per_s: f64,
}

/// Steps at one ratio.
#[derive(Debug, Serialize, Deserialize)]
pub struct RatioOutcome {
    /// The ratio.
    pub ratio: Ratio,
    /// Rows that a lane selected at the last step.
    pub selected_tokens: usize,
    /// All steps.
    pub steps: Vec<SparseSample>,
    /// The selection against exact scores, at some steps.
    pub kept: Vec<Kept>,
}

/// A sparse step and the rates beside it.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct SparseSample {
    /// Milliseconds of the step.
    pub ms: f64,
    /// Bytes of rows it read.
    pub row_bytes: u64,
    /// Bytes of labels it read.
    pub label_bytes: u64,
    /// Milliseconds of scoring.
    pub score_ms: f64,
    /// Milliseconds of choosing.
    pub select_ms: f64,
    /// Milliseconds of gathering and attending.
    pub attend_ms: f64,
    /// Gather rate of as many random sorted rows, all threads.
    pub gather_gb_per_s: f64,
    /// Sequential read rate of the labels, all threads.
    pub label_read_gb_per_s: f64,
}

impl SparseSample {
    /// What the rates allow for the bytes of this step, in milliseconds: rows / gather rate + labels / read rate.
    #[must_use]
    pub fn floor_ms(&self) -> f64 {
        (self.row_bytes as f64 / self.gather_gb_per_s + self.label_bytes as f64 / self.label_read_gb_per_s) / 1e6
    }
}

/// Writes one message as a line.
///
/// # Errors
/// The other side is gone.
pub fn send<T: Serialize>(to: &mut impl Write, message: &T) -> Result<()> {
    let mut line = serde_json::to_string(message)?;
    line.push('\n');
    to.write_all(line.as_bytes()).and_then(|()| to.flush()).context("write to the other process")
}

/// Reads one message.
///
/// # Errors
/// The other side is gone, or its line is no message.
pub fn receive<T: for<'a> Deserialize<'a>>(from: &mut impl BufRead) -> Result<T> {
    let mut line = String::new();
    let bytes = from.read_line(&mut line).context("read from the other process")?;
    ensure!(bytes > 0, "the other process ended");
    serde_json::from_str(&line).map_err(|error| anyhow!("not a message ({error}): {}", line.trim_end()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_travel_as_lines() {
        let mut pipe = Vec::new();
        send(&mut pipe, &Event::Progress { stage: "fill\n\"it\"".to_owned(), done: 3, total: 7 }).expect("sent");
        send(&mut pipe, &Event::Failed("no".to_owned())).expect("sent");
        assert_eq!(pipe.iter().filter(|&&byte| byte == b'\n').count(), 2);
        let mut from = pipe.as_slice();
        assert!(matches!(receive(&mut from), Ok(Event::Progress { stage, done: 3, total: 7 }) if stage == "fill\n\"it\""));
        assert!(matches!(receive(&mut from), Ok(Event::Failed(text)) if text == "no"));
        let error = receive::<Event>(&mut from).expect_err("the end").to_string();
        assert!(error.contains("ended"), "{error}");
        assert!(receive::<Event>(&mut "{\"done\":".as_bytes()).is_err());
    }

    #[test]
    fn the_floor_is_rows_over_gather_plus_labels_over_read() {
        let sample = SparseSample {
            ms: 0.0,
            row_bytes: 268_435_456,
            label_bytes: 134_217_728,
            score_ms: 0.0,
            select_ms: 0.0,
            attend_ms: 0.0,
            gather_gb_per_s: 13.421_772_8,
            label_read_gb_per_s: 26.843_545_6,
        };
        assert!((sample.floor_ms() - 25.0).abs() < 1e-9);
    }
}
