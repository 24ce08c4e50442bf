//! What a stress run does beside its workload.

use anyhow::Result;
use serde::{Deserialize, Serialize};
use sluice_kernels::slot::CHUNK_TOKENS;

use crate::units::TokenCount;
use crate::workload::{Workload, within};

/// How the worker reaches its rows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum AttachKind {
    /// Over shared memory; the worker decodes.
    Direct,
    /// Over gRPC; the daemon decodes.
    Stream,
}

/// Starts a daemon and a separate worker process, fills a long sequence with the generator `drifting-clusters`, prefills its last piece,
/// decodes, forks and closes. Times of steps stand beside floors that are measured interleaved with them, over the same memory.
///
/// JSON keys: `context_tokens`, `layers`, `budget_ratio`, `dense_step_ms`, `sparse_step_ms`, `sparse_floor_ms`, `dense_read_gb_per_s`,
/// `memory_read_gb_per_s`, `gather_gb_per_s`, `recall`, `bytes_per_step`, `daemon_overhead_bytes`, `attach`, and more beside them. With
/// several ratios these are the figures of the first; `runs` has one object for each ratio. Times are medians over the steps (keys
/// that end in `_best_ms` and `_worst_ms`: smallest and largest), one step being one token in all layers, in milliseconds; GB are 1e9 bytes.
#[derive(Clone, Debug, clap::Args, Serialize, Deserialize)]
pub struct StressOptions {
    /// Shape and context.
    #[command(flatten)]
    pub workload: Workload,
    /// Sequences that decode together; they share the filled context.
    #[arg(long, default_value_t = 1)]
    pub batch: usize,
    /// Decode steps of each kind: dense, and every ratio.
    #[arg(long, default_value_t = 40)]
    pub steps: usize,
    /// How the worker reaches its rows.
    #[arg(long, value_enum, default_value_t = AttachKind::Direct)]
    pub attach: AttachKind,
    /// Tokens of the last piece, which is prefilled with dense attention of all its queries.
    #[arg(long, default_value_t = 32, value_name = "TOKENS")]
    pub prefill_tokens: usize,
    /// Steps of each ratio at which the selection is compared with exact scores.
    #[arg(long, default_value_t = 4, value_name = "STEPS")]
    pub recall_steps: usize,
    /// Prompt that is opened again; no more than the context counts.
    #[arg(long, default_value = "128Ki", value_name = "TOKENS")]
    pub reopen: TokenCount,
}

impl StressOptions {
    /// Opens of the same prompt that are timed.
    pub const REOPENS: usize = 20;

    /// Checks the flags against each other.
    ///
    /// # Errors
    /// The first flag out of bounds.
    pub fn check(&self) -> Result<()> {
        within("batch", self.batch, 1, 64)?;
        within("steps", self.steps, 1, 100_000)?;
        within("prefill-tokens", self.prefill_tokens, 1, CHUNK_TOKENS)?;
        within("recall-steps", self.recall_steps, 1, self.steps)?;
        within("reopen", self.reopen.0, CHUNK_TOKENS, 1 << 24)?;
        self.workload.check()
    }

    /// Tokens of the prompt that is opened again.
    #[must_use]
    pub fn reopen_tokens(&self) -> usize {
        self.reopen.0.min(self.workload.context.0) / CHUNK_TOKENS * CHUNK_TOKENS
    }

    /// Sequences that live at the same time: a batch of dense ones and one of each ratio, the filled one, a fork and one opened again.
    #[must_use]
    pub fn sequences(&self) -> usize {
        self.batch * (1 + self.workload.ratio.len()) + 3
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        options: StressOptions,
    }

    #[test]
    fn bounds_are_named() {
        let parse = |flags: &[&str]| Line::try_parse_from(["stress"].iter().chain(flags)).map(|line| line.options);
        let options = parse(&["--context", "8Ki", "--batch", "2", "--attach", "stream"]).expect("flags");
        options.check().expect("within bounds");
        assert_eq!((options.sequences(), options.reopen_tokens(), options.attach), (9, 8192, AttachKind::Stream));
        for (flags, part) in [
            (["--batch", "65"], "--batch: 65 is outside 1 to 64"),
            (["--recall-steps", "41"], "--recall-steps: 41 is outside 1 to 40"),
            (["--reopen", "255"], "--reopen: 255 is outside 256"),
            (["--context", "1000"], "--context: 1000 is outside 1024"),
        ] {
            let error = format!("{:#}", parse(&flags).expect("parses").check().expect_err(part));
            assert!(error.contains(part), "{error}");
        }
        assert!(parse(&["--attach", "rdma"]).is_err());
    }
}
