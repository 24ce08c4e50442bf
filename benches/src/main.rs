//! `sluice-bench`: workloads of Sluice. Results go to standard output, progress to standard error.

use anyhow::Result;
use clap::{Parser, Subcommand};
use sluice_bench::gpu::{self, recorded, replay};
use sluice_bench::{attach, stress};

#[derive(Parser)]
#[command(name = "sluice-bench", version, about)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Fill a long sequence through a daemon, decode it dense and sparse, and compare with what the memory allows.
    Stress(stress::StressOptions),
    /// Time the same decode steps three ways: directly attached, with the decoder alone, and over gRPC.
    Attach(attach::AttachOptions),
    /// Time decode steps of a GPU over a cache in host memory, beside dense attention over a resident cache.
    Gpu(gpu::GpuOptions),
    /// Make a trace of importance keys from a recording of a real model.
    Trace(recorded::TraceArguments),
    /// Say what pools of hot rows would hit in a key trace.
    Replay(replay::ReplayArguments),
    /// Be the worker of a stress run: orders and results are JSON lines on standard input and output.
    #[command(hide = true)]
    StressWorker,
    /// Continue a prompt with a real model.
    #[cfg(feature = "model")]
    Generate(sluice_bench::generate::GenerateArguments),
    /// Score a text with a real model, with dense attention and through Sluice.
    #[cfg(feature = "model")]
    Perplexity(sluice_bench::perplexity::PerplexityArguments),
    /// Record queries, keys and selections of a real model.
    #[cfg(feature = "model")]
    Record(sluice_bench::record::RecordArguments),
    /// Say what looking ahead, by queries that the layer before predicts, buys beyond a pool of hot rows.
    #[cfg(feature = "model")]
    LookAhead(sluice_bench::look_ahead::LookAheadArguments),
}

fn main() -> Result<()> {
    match Arguments::parse().command {
        Command::Stress(options) => stress::run(&options),
        Command::Attach(options) => attach::run(&options),
        Command::Gpu(options) => gpu::run(&options),
        Command::Trace(arguments) => recorded::run(&arguments),
        Command::Replay(arguments) => replay::run(&arguments),
        Command::StressWorker => stress::worker::run(),
        #[cfg(feature = "model")]
        Command::Generate(arguments) => sluice_bench::generate::run(&arguments),
        #[cfg(feature = "model")]
        Command::Perplexity(arguments) => sluice_bench::perplexity::run(&arguments),
        #[cfg(feature = "model")]
        Command::Record(arguments) => sluice_bench::record::run(&arguments),
        #[cfg(feature = "model")]
        Command::LookAhead(arguments) => sluice_bench::look_ahead::run(&arguments),
    }
}
