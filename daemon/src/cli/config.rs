//! `sluice config`.

use anyhow::Result;
use clap::{Args, ValueEnum};

use super::ConfigOptions;

/// Arguments of `sluice config`.
#[derive(Args, Debug)]
pub(super) struct ConfigArguments {
    /// The TOML form may be saved and given back with --config.
    #[arg(long, value_enum, default_value = "toml")]
    format: ConfigFormat,
    #[command(flatten)]
    options: ConfigOptions,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum ConfigFormat {
    Toml,
    Json,
}

/// Prints the effective configuration.
pub(super) fn run(arguments: &ConfigArguments) -> Result<()> {
    let config = arguments.options.load()?;
    match arguments.format {
        ConfigFormat::Toml => print!("{}", toml::to_string(&config.written)?),
        ConfigFormat::Json => println!("{}", serde_json::to_string_pretty(&config.written)?),
    }
    Ok(())
}
