//! What a stress run does: flags, and what follows from them.

use std::path::PathBuf;
use std::str::FromStr;

use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};
use sluice_kernels::budget::Settings;
use sluice_kernels::device::DeviceKind;
use sluice_kernels::label::{LabelPlan, PlanError};
use sluice_kernels::shape::{LaneKind, LayerShape, ModelShape, RowType};
use sluice_kernels::slot::CHUNK_TOKENS;

use crate::report::Format;
use crate::units::{Ratio, TokenCount};

/// How the worker reaches its rows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum AttachKind {
    /// Over shared memory; the worker decodes.
    Direct,
    /// Over gRPC; the daemon decodes.
    Stream,
}

/// Element type of rows, as a flag.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RowTypeName {
    /// IEEE binary32.
    F32,
    /// IEEE binary16.
    F16,
    /// bfloat16.
    Bf16,
}

/// A label plan by name or by groups.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LabelChoice {
    /// 1/32 of a 16-bit row.
    Small,
    /// 1/16 of a 16-bit row.
    Large,
    /// Groups of channels, such as `16@4+32@2`.
    Plan(LabelPlan),
}

impl FromStr for LabelChoice {
    type Err = PlanError;

    fn from_str(text: &str) -> Result<Self, PlanError> {
        Ok(match text {
            "small" => Self::Small,
            "large" => Self::Large,
            _ => Self::Plan(text.parse()?),
        })
    }
}

impl LabelChoice {
    /// The plan for keys of `head_dim` channels.
    #[must_use]
    pub fn plan(&self, head_dim: u16) -> LabelPlan {
        match self {
            Self::Small => LabelPlan::small(head_dim),
            Self::Large => LabelPlan::large(head_dim),
            Self::Plan(plan) => plan.clone(),
        }
    }
}

/// Starts a daemon and a separate worker process, fills a long sequence with the generator `drifting-clusters`, prefills its last piece,
/// decodes, forks and closes. Times of steps stand beside floors that are measured interleaved with them, over the same memory.
///
/// JSON keys: `context_tokens`, `layers`, `budget_ratio`, `dense_step_ms`, `sparse_step_ms`, `sparse_floor_ms`, `dense_read_gb_per_s`,
/// `memory_read_gb_per_s`, `gather_gb_per_s`, `recall`, `bytes_per_step`, `daemon_overhead_bytes`, `attach`, and more beside them. With
/// several ratios these are the figures of the first; `runs` has one object for each ratio. Times are medians over the steps (worst: keys
/// that end in `_worst_ms`), one step being one token in all layers, in milliseconds; GB are 1e9 bytes.
#[derive(Clone, Debug, clap::Args, Serialize, Deserialize)]
pub struct StressOptions {
    /// Tokens of the sequence, such as 256Ki.
    #[arg(long, default_value = "256Ki", value_name = "TOKENS")]
    pub context: TokenCount,
    /// Attention layers, all of them full attention.
    #[arg(long, default_value_t = 4)]
    pub layers: u16,
    /// Key/value heads a layer.
    #[arg(long, default_value_t = 8)]
    pub kv_heads: u16,
    /// Query heads a layer.
    #[arg(long, default_value_t = 32)]
    pub query_heads: u16,
    /// Channels of a key: 64, 96, 128 or 256.
    #[arg(long, default_value_t = 128)]
    pub head_dim: u16,
    /// Element type of rows.
    #[arg(long, value_enum, default_value_t = RowTypeName::F16)]
    pub row_type: RowTypeName,
    /// Tokens that a lane selects in a step, as a part of the length; may be repeated.
    #[arg(long, default_values = ["1/16", "1/64"])]
    pub ratio: Vec<Ratio>,
    /// Label plan: small, large, or groups such as 16@4+32@2.
    #[arg(long, default_value = "small", value_name = "PLAN")]
    pub label: LabelChoice,
    /// Sequences that decode together; they share the filled context.
    #[arg(long, default_value_t = 1)]
    pub batch: usize,
    /// Decode steps of each kind: dense, and every ratio.
    #[arg(long, default_value_t = 40)]
    pub steps: usize,
    /// Seed of rows, queries and probes.
    #[arg(long, default_value_t = 1)]
    pub seed: u64,
    /// How the worker reaches its rows.
    #[arg(long, value_enum, default_value_t = AttachKind::Direct)]
    pub attach: AttachKind,
    /// Device of the decoder: cpu or reference.
    #[arg(long, default_value = "cpu")]
    pub device: DeviceKind,
    /// Threads of the decoder and of the probes; 0: all cores.
    #[arg(long, default_value_t = 0)]
    pub threads: usize,
    /// Tokens of the last piece, which is prefilled with dense attention of all its queries.
    #[arg(long, default_value_t = 32, value_name = "TOKENS")]
    pub prefill_tokens: usize,
    /// Steps of each ratio at which the selection is compared with exact scores.
    #[arg(long, default_value_t = 4, value_name = "STEPS")]
    pub recall_steps: usize,
    /// Prompt that is opened again; no more than the context counts.
    #[arg(long, default_value = "128Ki", value_name = "TOKENS")]
    pub reopen: TokenCount,
    /// Table or JSON on standard output.
    #[arg(long, value_enum, default_value_t = Format::Table)]
    pub format: Format,
    /// Also write a plot of all steps to this SVG file.
    #[arg(long, value_name = "FILE")]
    pub plot: Option<PathBuf>,
    /// The daemon's binary [default: sluice beside this binary].
    #[arg(long, env = "SLUICE_BIN", value_name = "PATH")]
    pub sluice_bin: Option<PathBuf>,
    /// Folder in which the private arena folder is made; a tmpfs.
    #[arg(long, default_value = "/dev/shm", value_name = "FOLDER")]
    pub arena_parent: PathBuf,
}

impl StressOptions {
    /// Opens of the same prompt that are timed.
    pub const REOPENS: usize = 20;
    /// Open slots of every sequence.
    pub const OPEN_SLOTS: u32 = 8;
    /// Rows that every budget has at least.
    pub const FLOOR_TOKENS: u32 = 256;

    /// Checks the flags against each other.
    ///
    /// # Errors
    /// The first flag out of bounds.
    pub fn check(&self) -> Result<()> {
        let within = |flag: &str, value: usize, low: usize, high: usize| {
            ensure!((low..=high).contains(&value), "--{flag}: {value} is outside {low} to {high}");
            Ok(())
        };
        within("context", self.context.0, 4 * CHUNK_TOKENS, 1 << 24)?;
        within("batch", self.batch, 1, 64)?;
        within("steps", self.steps, 1, 100_000)?;
        within("prefill-tokens", self.prefill_tokens, 1, CHUNK_TOKENS)?;
        within("recall-steps", self.recall_steps, 0, self.steps)?;
        within("reopen", self.reopen.0, 1, 1 << 24)?;
        within("threads", self.threads, 0, 256)?;
        self.shape().check().context("shape")?;
        self.plan().check(self.head_dim).context("--label")
    }

    /// The model's shape.
    #[must_use]
    pub fn shape(&self) -> ModelShape {
        let layer = LayerShape {
            kind: LaneKind::Selected,
            query_heads: self.query_heads,
            kv_heads: self.kv_heads,
            head_dim: self.head_dim,
            softmax_scale: f32::from(self.head_dim).sqrt().recip(),
        };
        let row_type = match self.row_type {
            RowTypeName::F32 => RowType::F32,
            RowTypeName::F16 => RowType::F16,
            RowTypeName::Bf16 => RowType::Bf16,
        };
        ModelShape { row_type, layers: vec![layer; usize::from(self.layers)] }
    }

    /// The label plan.
    #[must_use]
    pub fn plan(&self) -> LabelPlan {
        self.label.plan(self.head_dim)
    }

    /// Threads of decoder and probes.
    #[must_use]
    pub fn threads(&self) -> usize {
        let all = || std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
        if self.threads == 0 { all() } else { self.threads }
    }

    /// Settings of steps at a ratio.
    #[must_use]
    pub fn settings(&self, ratio: Ratio) -> Settings {
        Settings { budget: ratio.budget(Self::FLOOR_TOKENS), ..Settings::default() }
    }

    /// Tokens of the prompt that is opened again.
    #[must_use]
    pub fn reopen_tokens(&self) -> usize {
        self.reopen.0.min(self.context.0) / CHUNK_TOKENS * CHUNK_TOKENS
    }

    /// Bytes of one token's rows in all layers.
    #[must_use]
    pub fn token_bytes(&self) -> u64 {
        let shape = self.shape();
        shape.layers.iter().map(|layer| (layer.lanes() * layer.row_bytes(shape.row_type)) as u64).sum()
    }

    /// Sequences that live at the same time: a batch of dense ones and one of each ratio, the filled one, a fork and one opened again.
    #[must_use]
    pub fn sequences(&self) -> usize {
        self.batch * (1 + self.ratio.len()) + 3
    }

    /// Bytes of rows that the run may seal: the context, and what every sequence adds to it.
    #[must_use]
    pub fn arena_bytes(&self) -> u64 {
        let grown = self.steps.div_ceil(CHUNK_TOKENS) + 1;
        let chunks = self.context.0.div_ceil(CHUNK_TOKENS) + self.sequences() * grown;
        (chunks * CHUNK_TOKENS) as u64 * self.token_bytes()
    }

    /// Bytes of the open slots of all sequences.
    #[must_use]
    pub fn open_bytes(&self) -> u64 {
        let slots = self.sequences() as u64 * u64::from(Self::OPEN_SLOTS);
        // Header page, token ids and opaque state beside the rows.
        slots * (CHUNK_TOKENS as u64 * self.token_bytes()) + self.sequences() as u64 * (1 << 20)
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

    fn parse(flags: &[&str]) -> Result<StressOptions, clap::Error> {
        Line::try_parse_from(["stress"].iter().chain(flags)).map(|line| line.options)
    }

    #[test]
    fn the_main_job_needs_no_flags() {
        let options = parse(&[]).expect("defaults");
        options.check().expect("defaults are within bounds");
        assert_eq!(options.context.0, 262_144);
        assert_eq!(options.token_bytes(), 4 * 8 * 512);
        assert_eq!(options.plan().label_bytes(), 16);
        assert_eq!(options.settings(options.ratio[1]).selected_tokens(262_144), 4096);
        assert_eq!(options.reopen_tokens(), 131_072);
        assert!(options.arena_bytes() > 4 << 30 && options.arena_bytes() < 5 << 30);
    }

    #[test]
    fn flags_are_taken_and_bounds_named() {
        let flags = ["--context", "8Ki", "--ratio", "1/8", "--label", "8@8", "--attach", "stream", "--row-type", "f32"];
        let options = parse(&flags).expect("flags");
        options.check().expect("within bounds");
        assert_eq!((options.ratio.len(), options.token_bytes(), options.reopen_tokens()), (1, 4 * 8 * 1024, 8192));
        assert_eq!(options.plan().label_bytes(), 8);
        for (flags, part) in [
            (["--context", "512"], "--context: 512 is outside 1024"),
            (["--batch", "65"], "--batch: 65 is outside 1 to 64"),
            (["--head-dim", "100"], "head_dim: 100"),
            (["--query-heads", "30"], "30 query heads on 8 kv heads"),
            (["--label", "200@4"], "--label: label plan: 200 channels"),
            (["--recall-steps", "41"], "--recall-steps: 41 is outside 0 to 40"),
        ] {
            let error = format!("{:#}", parse(&flags).expect("parses").check().expect_err(part));
            assert!(error.contains(part), "{error}");
        }
        for flags in [["--ratio", "2/1"], ["--context", "many"], ["--device", "cuda"], ["--attach", "rdma"]] {
            assert!(parse(&flags).is_err(), "{flags:?}");
        }
    }
}
