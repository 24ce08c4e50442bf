//! The command line: one file per command.

mod calibrate;
mod config;
mod logging;
mod options;
mod serve;
mod status;

use std::process::ExitCode;

use clap::{Parser, Subcommand, ValueEnum};

pub use options::ConfigOptions;

/// Holds every KV cache of this machine outside the GPU and serves sparse decode over it.
#[derive(Debug, Parser)]
#[command(name = "sluice", version, arg_required_else_help = true)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run the daemon until SIGTERM (which drains) or a second one (which exits at once).
    Serve(serve::ServeArguments),
    /// Show what a running daemon holds: sequences, chunks, bytes, hits.
    Status(status::StatusArguments),
    /// Make a calibration file from recorded queries and keys.
    Calibrate(calibrate::CalibrateArguments),
    /// Print the effective configuration: defaults < file < environment < flags.
    Config(config::ConfigArguments),
}

/// How a command prints.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Format {
    /// For people.
    Table,
    /// For scripts.
    Json,
}

/// Runs the command that the process was started with.
#[must_use]
pub fn run() -> ExitCode {
    let result = match Arguments::parse().command {
        Command::Serve(arguments) => serve::run(&arguments),
        Command::Status(arguments) => status::run(&arguments),
        Command::Calibrate(arguments) => calibrate::run(&arguments),
        Command::Config(arguments) => config::run(&arguments),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("sluice: {error:#}");
            ExitCode::FAILURE
        }
    }
}
