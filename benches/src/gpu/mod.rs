//! `sluice-bench gpu`: a decode step over a cache that does not lie on the GPU, beside its peers and its floors, in one run.

pub mod contest;
pub mod host;
pub mod outcome;
pub mod prefill;
pub mod recorded;
pub mod replay;
pub mod scene;
pub mod shared;
mod step_graphs;
mod timed;
pub mod trace;

use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use clap::Args;
use sluice_kernels::device::cuda::Gpu;
use sluice_kernels::device::cuda::compile::Compiler;
use sluice_kernels::shape::{LaneKind, LayerShape, ModelShape};
use sluice_kernels::slot::CHUNK_TOKENS;

use self::contest::Contest;
use self::host::HostCache;
use self::scene::Scene;
use self::trace::KeyTrace;
use crate::generator::{Generator, generated_shape};
use crate::report::{Format, show_progress};
use crate::units::TokenCount;
use crate::workload::RowTypeName;

/// Parts of the bench.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Section {
    /// Rates of memory and link.
    Floors,
    /// Kernels one by one.
    Parts,
    /// Dense attention over a resident cache.
    Dense,
    /// The whole cache streamed each step.
    Streamed,
    /// Published Double Sparsity: every selected row fetched again, 16-bit labels.
    Published,
    /// Sparse steps without hot rows.
    Cold,
    /// Sparse steps without misses.
    Hot,
    /// Sparse steps with the hits of a trace.
    Trace,
    /// The same with more sizes of the pool, for the plot of time against misses.
    Sweep,
    /// A whole token: a step and a pass over the weights of an 8B model.
    Token,
    /// Pieces of a prompt over a prefix on the host, and the rows that they append.
    Prefill,
    /// `--sequences` in one batch, in lockstep and as micro-batches; only when asked for.
    Batch,
    /// Two sequences and more with a common prefix, each scored alone and all jointly; only when asked for.
    Shared,
}

/// Times a decode step on the GPU at long context, with the cache in host memory: parts, peers and floors, side by side.
#[derive(Args, Debug)]
pub struct GpuOptions {
    /// Tokens of the sequence, a multiple of 256, such as 256Ki.
    #[arg(long, default_value = "256Ki", value_name = "TOKENS")]
    context: TokenCount,
    /// Attention layers.
    #[arg(long, default_value_t = 32)]
    layers: u16,
    /// Key/value heads a layer.
    #[arg(long, default_value_t = 8)]
    kv_heads: u16,
    /// Query heads a layer.
    #[arg(long, default_value_t = 32)]
    query_heads: u16,
    /// Channels of a key: 64, 96, 128 or 256.
    #[arg(long, default_value_t = 128)]
    head_dim: u16,
    /// Element type of rows.
    #[arg(long, value_enum, default_value_t = RowTypeName::F16)]
    row_type: RowTypeName,
    /// Sequences on the host, each of the context's length.
    #[arg(long, default_value_t = 1)]
    sequences: usize,
    /// First tokens that all sequences have in common: a multiple of 256; the last chunk is each one's own.
    #[arg(long, default_value = "0", value_name = "TOKENS")]
    common_prefix: TokenCount,
    /// Number of the GPU.
    #[arg(long, default_value_t = 0)]
    ordinal: u32,
    /// Steps that are timed of each contestant.
    #[arg(long, default_value_t = 20)]
    rounds: usize,
    /// Blocks of the gather.
    #[arg(long, default_value_t = 128)]
    gather_blocks: usize,
    /// Only these sections; all by default.
    #[arg(long, value_enum, value_delimiter = ',')]
    only: Vec<Section>,
    /// Key trace of a real model (`sluice-bench trace`), to replay with hot rows.
    #[arg(long, value_name = "FILE")]
    trace: Option<PathBuf>,
    /// Also write plots of the steps to SVG files beside this name.
    #[arg(long, value_name = "FILE")]
    plot: Option<PathBuf>,
    /// Seed of rows and queries.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Table or JSON on standard output.
    #[arg(long, value_enum, default_value_t = Format::Table)]
    format: Format,
}

impl GpuOptions {
    fn shape(&self) -> ModelShape {
        let layer = LayerShape {
            kind: LaneKind::Selected,
            query_heads: self.query_heads,
            kv_heads: self.kv_heads,
            head_dim: self.head_dim,
            softmax_scale: f32::from(self.head_dim).sqrt().recip(),
        };
        generated_shape(self.row_type.into(), vec![layer; usize::from(self.layers)])
    }

    fn wants(&self, section: Section) -> bool {
        if self.only.is_empty() { !matches!(section, Section::Batch | Section::Shared) } else { self.only.contains(&section) }
    }
}

/// Runs the bench.
///
/// # Errors
/// Flags out of bounds, a GPU or compiler that is not there, memory that is refused.
pub fn run(options: &GpuOptions) -> Result<()> {
    let context = options.context.0;
    ensure!(
        context.is_multiple_of(CHUNK_TOKENS) && context >= 4 * CHUNK_TOKENS,
        "--context: {context} is not a multiple of 256 from 1024 on"
    );
    ensure!((1..=100_000).contains(&options.rounds), "--rounds: {} is outside 1 to 100000", options.rounds);
    ensure!((1..=64).contains(&options.sequences), "--sequences: {} is outside 1 to 64", options.sequences);
    let (chunks, common) = (context / CHUNK_TOKENS, options.common_prefix.0 / CHUNK_TOKENS);
    ensure!(
        options.common_prefix.0.is_multiple_of(CHUNK_TOKENS) && common <= chunks,
        "--common-prefix: {} is not a multiple of 256 up to --context",
        options.common_prefix.0
    );
    let common = common.min(chunks - 1);
    let shape = options.shape();
    shape.check().context("shape")?;
    let gpu = Gpu::open(options.ordinal)?;
    let compiler = Compiler::find()?;
    let generator = Generator::new(&shape, options.seed);
    let threads = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    show_progress("filling host memory", 0, 1);
    let host = HostCache::fill(&gpu, &shape, &generator, common + options.sequences * (chunks - common), options.seed, threads)?;
    let sequences = options.sequences;
    let scene = Scene { gpu: &gpu, compiler: &compiler, shape: &shape, generator: &generator, host: &host, context, sequences, common };
    let trace = options.trace.as_deref().map(KeyTrace::read).transpose()?;
    let mut contest = Contest::new(&scene, trace.as_ref(), options.rounds, options.gather_blocks)?;
    let sections = [
        Section::Floors,
        Section::Dense,
        Section::Streamed,
        Section::Parts,
        Section::Published,
        Section::Cold,
        Section::Hot,
        Section::Trace,
        Section::Sweep,
        Section::Token,
        Section::Prefill,
        Section::Batch,
        Section::Shared,
    ];
    for section in sections {
        if options.wants(section) {
            contest.run(section)?;
        }
    }
    if let Some(plot) = &options.plot {
        contest.outcome.plot(plot)?;
    }
    contest.outcome.show(options.format)
}
