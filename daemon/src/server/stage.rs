//! What the daemon is doing, and how gRPC health shows it.

use sluice_proto::FILE_DESCRIPTOR_SET;
use tokio::sync::watch;
use tonic_health::ServingStatus;
use tonic_health::server::HealthReporter;

use super::ServeError;

/// Full name of the gRPC service.
pub const SERVICE_NAME: &str = "sluice.v1.Sluice";

/// What the daemon is doing. Only [`Stage::Ready`] serves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    /// The arena is not ready yet.
    Preparing,
    /// Requests are served.
    Ready,
    /// A part of the engine failed; nothing is served any more.
    Poisoned,
    /// Asked to stop: streams may finish.
    Draining,
    /// Gone in a moment.
    Stopped,
}

impl Stage {
    /// The stage in one word or two.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Preparing => "preparing",
            Self::Ready => "serving",
            Self::Poisoned => "poisoned",
            Self::Draining => "draining",
            Self::Stopped => "stopped",
        }
    }
}

/// The stage of this daemon, shown by gRPC health and by whoever watches.
pub(super) struct StageBoard {
    sender: watch::Sender<Stage>,
    reporter: HealthReporter,
}

impl StageBoard {
    /// A board that shows [`Stage::Preparing`].
    pub(super) async fn new(reporter: HealthReporter) -> Self {
        let board = Self { sender: watch::Sender::new(Stage::Preparing), reporter };
        board.set(Stage::Preparing).await;
        board
    }

    /// Shows `stage`; health answers by it when this returns.
    pub(super) async fn set(&self, stage: Stage) {
        let serving = if stage == Stage::Ready { ServingStatus::Serving } else { ServingStatus::NotServing };
        self.reporter.set_service_status("", serving).await;
        self.reporter.set_service_status(SERVICE_NAME, serving).await;
        self.sender.send_replace(stage);
    }

    /// Ends the streams of those who watch health, after they have been told the last status: they would hold up a drain.
    pub(super) async fn end_watches(&self) {
        let mut reporter = self.reporter.clone();
        reporter.clear_service_status("").await;
        reporter.clear_service_status(SERVICE_NAME).await;
    }

    /// Changes from now on.
    pub(super) fn watch(&self) -> watch::Receiver<Stage> {
        self.sender.subscribe()
    }
}

/// The reflection service over the wire's own descriptors and those of health.
pub(super) fn reflection()
-> Result<tonic_reflection::server::v1::ServerReflectionServer<impl tonic_reflection::server::v1::ServerReflection>, ServeError> {
    tonic_reflection::server::Builder::configure()
        .register_encoded_file_descriptor_set(FILE_DESCRIPTOR_SET)
        .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
        .build_v1()
        .map_err(|error| ServeError::Reflection(error.to_string()))
}
