//! SIGTERM and SIGINT: the first asks to drain, the second exits at once.

use std::io;

use tokio::signal::unix::{Signal, SignalKind, signal};
use tracing::warn;

/// Exit status after a second signal: 128 + SIGTERM, as a shell would say it.
const EXIT_AT_ONCE: i32 = 143;

/// The signals that ask to stop.
pub(super) struct Signals {
    terminate: Signal,
    interrupt: Signal,
}

impl Signals {
    /// Catches them from now on.
    pub(super) fn catch() -> io::Result<Self> {
        Ok(Self { terminate: signal(SignalKind::terminate())?, interrupt: signal(SignalKind::interrupt())? })
    }

    /// Waits for the next one.
    pub(super) async fn next(&mut self) {
        tokio::select! {
            _ = self.terminate.recv() => {}
            _ = self.interrupt.recv() => {}
        }
    }

    /// From now on one more signal ends the process, whatever it is doing.
    pub(super) fn exit_at_next(mut self) {
        tokio::spawn(async move {
            self.next().await;
            warn!("second signal: exiting at once");
            std::process::exit(EXIT_AT_ONCE);
        });
    }
}
