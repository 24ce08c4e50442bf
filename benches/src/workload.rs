//! The workload that benches share: the shape of a model, the length of its context, and the daemon that holds it.

use std::path::PathBuf;
use std::str::FromStr;

use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};
use sluice_kernels::budget::Settings;
use sluice_kernels::device::DeviceKind;
use sluice_kernels::label::{LabelPlan, PlanError};
use sluice_kernels::shape::{LaneKind, LayerShape, ModelShape, RowType};
use sluice_kernels::slot::CHUNK_TOKENS;

use crate::daemon::DaemonSpec;
use crate::generator::generated_shape;
use crate::report::Format;
use crate::units::{Ratio, TokenCount};

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
    /// Eight bits, e4m3, with a static scale for each lane.
    Fp8,
}

impl From<RowTypeName> for RowType {
    fn from(name: RowTypeName) -> Self {
        match name {
            RowTypeName::F32 => Self::F32,
            RowTypeName::F16 => Self::F16,
            RowTypeName::Bf16 => Self::Bf16,
            RowTypeName::Fp8 => Self::Fp8,
        }
    }
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

/// Shape, context and environment of a run.
#[derive(Clone, Debug, clap::Args, Serialize, Deserialize)]
pub struct Workload {
    /// Tokens of the sequence, a multiple of 256, such as 256Ki.
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
    /// Seed of rows, queries and probes.
    #[arg(long, default_value_t = 1)]
    pub seed: u64,
    /// Device of the decoder: cpu or reference.
    #[arg(long, default_value = "cpu")]
    pub device: DeviceKind,
    /// Threads of the decoder and of the probes; 0: all cores.
    #[arg(long, default_value_t = 0)]
    pub threads: usize,
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

/// `value` of a flag must lie between two bounds.
pub(crate) fn within(flag: &str, value: usize, low: usize, high: usize) -> Result<()> {
    ensure!((low..=high).contains(&value), "--{flag}: {value} is outside {low} to {high}");
    Ok(())
}

impl Workload {
    /// Open slots of a sequence that is filled; the others take the daemon's default, which is fewer.
    pub const OPEN_SLOTS: u32 = 8;
    /// Rows that every budget has at least.
    pub const FLOOR_TOKENS: u32 = 256;

    /// Checks the flags against each other.
    ///
    /// # Errors
    /// The first flag out of bounds.
    pub fn check(&self) -> Result<()> {
        within("context", self.context.0, 4 * CHUNK_TOKENS, 1 << 24)?;
        ensure!(self.context.0.is_multiple_of(CHUNK_TOKENS), "--context: {} is not a multiple of {CHUNK_TOKENS}", self.context.0);
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
        generated_shape(self.row_type.into(), vec![layer; usize::from(self.layers)])
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

    /// Bytes of one token's rows in all layers.
    #[must_use]
    pub fn token_bytes(&self) -> u64 {
        let shape = self.shape();
        shape.layers.iter().map(|layer| (layer.lanes() * layer.row_bytes(shape.row_type)) as u64).sum()
    }

    /// Bytes of the largest message: the rows that one query selects in a layer, or the default of 64 MiB.
    #[must_use]
    pub fn message_bytes(&self) -> usize {
        let selected = self.ratio.iter().map(|&ratio| self.settings(ratio).selected_tokens(2 * self.context.0)).max().unwrap_or(0);
        let rows = selected as u64 * self.token_bytes() / u64::from(self.layers);
        (rows as usize).clamp(64 << 20, 1 << 30)
    }

    /// A daemon for this context and `sequences` sequences over it that each grow by `steps` tokens.
    #[must_use]
    pub fn daemon(&self, sequences: usize, steps: usize) -> DaemonSpec {
        let chunk_bytes = CHUNK_TOKENS as u64 * self.token_bytes();
        let chunks = self.context.0 / CHUNK_TOKENS + sequences * (steps / CHUNK_TOKENS + 2);
        let arena_bytes = chunks as u64 * chunk_bytes;
        let row_bytes = self.token_bytes() / u64::from(self.layers) / u64::from(self.kv_heads);
        // Header page, token ids and opaque state of open slots lie beside the rows.
        let open_bytes = sequences as u64 * (u64::from(Self::OPEN_SLOTS) * chunk_bytes + (1 << 20));
        DaemonSpec {
            binary: self.sluice_bin.clone(),
            arena_parent: self.arena_parent.clone(),
            arena_bytes,
            label_bytes: arena_bytes / row_bytes * self.plan().label_bytes() as u64,
            open_bytes,
            sequence_tokens: (self.context.0 + steps + 1024) as u64,
            message_bytes: self.message_bytes() as u64,
            device: self.device,
            threads: self.threads(),
        }
    }

    /// One line about it.
    #[must_use]
    pub fn title(&self) -> String {
        let Self { context, layers, kv_heads, query_heads, head_dim, row_type, device, seed, .. } = self;
        let (plan, threads) = (self.plan(), self.threads());
        format!(
            "{context} tokens, {layers} layers, {kv_heads} kv heads, {query_heads} query heads, d = {head_dim}, {row_type:?} rows, labels {plan} ({} B), device {device}, {threads} threads, seed {seed}",
            plan.label_bytes()
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        workload: Workload,
    }

    fn parse(flags: &[&str]) -> Result<Workload, clap::Error> {
        Line::try_parse_from(["bench"].iter().chain(flags)).map(|line| line.workload)
    }

    #[test]
    fn the_main_job_needs_no_flags() {
        let workload = parse(&[]).expect("defaults");
        workload.check().expect("defaults are within bounds");
        assert_eq!(workload.context.0, 262_144);
        assert_eq!(workload.token_bytes(), 4 * 8 * 512);
        assert_eq!(workload.plan().label_bytes(), 16);
        assert_eq!(workload.settings(workload.ratio[1]).selected_tokens(262_144), 4096);
        let daemon = workload.daemon(6, 40);
        assert!(daemon.arena_bytes > 4 << 30 && daemon.arena_bytes < 5 << 30, "{daemon:?}");
        assert_eq!(daemon.label_bytes, daemon.arena_bytes / 32);
        assert!(daemon.open_bytes > 6 * 8 * 256 * workload.token_bytes());
    }

    #[test]
    fn flags_are_taken_and_bounds_named() {
        let workload = parse(&["--context", "8Ki", "--ratio", "1/8", "--label", "8@8", "--row-type", "f32"]).expect("flags");
        workload.check().expect("within bounds");
        assert_eq!((workload.ratio.len(), workload.token_bytes()), (1, 4 * 8 * 1024));
        assert_eq!(workload.plan().label_bytes(), 8);
        for (flags, part) in [
            (["--context", "512"], "--context: 512 is outside 1024"),
            (["--context", "1025"], "--context: 1025 is not a multiple of 256"),
            (["--threads", "257"], "--threads: 257 is outside 0 to 256"),
            (["--head-dim", "100"], "head_dim: 100"),
            (["--query-heads", "30"], "30 query heads on 8 kv heads"),
            (["--label", "200@4"], "--label: label plan: 200 channels"),
        ] {
            let error = format!("{:#}", parse(&flags).expect("parses").check().expect_err(part));
            assert!(error.contains(part), "{error}");
        }
        for flags in [["--ratio", "2/1"], ["--context", "many"], ["--device", "cuda:x"], ["--label", "tiny"]] {
            assert!(parse(&flags).is_err(), "{flags:?}");
        }
    }
}
