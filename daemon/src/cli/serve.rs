//! `sluice serve`.

use anyhow::Result;
use clap::Args;
use tracing::info;

use super::{ConfigOptions, Format, logging};
use crate::server::{self, Reachable};

/// Arguments of `sluice serve`.
#[derive(Args, Debug)]
pub(super) struct ServeArguments {
    /// How the one line on stdout is printed that says that the daemon is ready, and where.
    #[arg(long, value_enum, default_value = "table")]
    format: Format,
    #[command(flatten)]
    options: ConfigOptions,
}

/// Serves until SIGTERM or SIGINT.
pub(super) fn run(arguments: &ServeArguments) -> Result<()> {
    let config = arguments.options.load()?;
    logging::start(&config.log)?;
    info!(version = env!("CARGO_PKG_VERSION"), config = serde_json::to_string(&config.written)?, "starting");
    let format = arguments.format;
    server::serve(config, |reachable| announce(format, reachable))?;
    Ok(())
}

fn announce(format: Format, reachable: &Reachable) {
    match format {
        Format::Json => println!("{}", serde_json::json!({ "ready": reachable })),
        Format::Table => {
            let Reachable { socket, tcp, http } = reachable;
            let tcp = tcp.map(|address| format!(", grpc {address}")).unwrap_or_default();
            let http = http.map(|address| format!(", metrics http://{address}/metrics")).unwrap_or_default();
            println!("ready: socket {}{tcp}{http}", socket.display());
        }
    }
}
