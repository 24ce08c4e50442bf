//! `sluice-bench`: workloads of Sluice. Results go to standard output, progress to standard error.

use anyhow::Result;
use clap::{Parser, Subcommand};

#[derive(Parser)]
#[command(name = "sluice-bench", version, about)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Continue a prompt with a real model.
    #[cfg(feature = "model")]
    Generate(sluice_bench::generate::GenerateArguments),
}

fn main() -> Result<()> {
    match Arguments::parse().command {
        #[cfg(feature = "model")]
        Command::Generate(arguments) => sluice_bench::generate::run(&arguments),
    }
}
