//! The server around the engine: sockets, health, limits, start and stop.
//!
//! [`serve`] is the daemon's life in order: check the room, listen (health says NOT_SERVING), start the engine, serve, drain, stop.

mod gate;
mod grpc;
mod listen;
mod room;
mod signals;
mod stage;
#[cfg(test)]
mod tests;

use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use serde::Serialize;
use thiserror::Error;
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tracing::{error, info, warn};

use crate::config::{ByteCount, Config};
use crate::engine::EngineError;
use crate::engine::EngineState;
use crate::engine::{Counters, Engine, EngineHandle};
use crate::{http, metrics};

pub use room::RoomError;
use stage::StageBoard;
pub use stage::{SERVICE_NAME, Stage};

/// Time between lines of progress.
const PROGRESS: Duration = Duration::from_secs(1);

/// Where a ready daemon can be reached.
#[derive(Clone, Debug, Serialize)]
pub struct Reachable {
    /// Unix socket of the gRPC service.
    pub socket: PathBuf,
    /// gRPC over TCP.
    pub tcp: Option<SocketAddr>,
    /// Metrics and health over HTTP.
    pub http: Option<SocketAddr>,
}

/// Why the daemon did not start, or did not end well.
#[derive(Debug, Error)]
pub enum ServeError {
    /// The machine does not fit the configuration.
    #[error(transparent)]
    Room(#[from] RoomError),
    /// The Unix socket cannot be made.
    #[error("listen.socket {}: {source}", path.display())]
    Socket {
        /// Its path.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// Something else has the socket's name.
    #[error("listen.socket {}: a file that is no socket is in the way", path.display())]
    NotASocket {
        /// Its path.
        path: PathBuf,
    },
    /// Another daemon serves there.
    #[error("listen.socket {}: another daemon serves there (its lock is held)", path.display())]
    AlreadyServed {
        /// Its path.
        path: PathBuf,
    },
    /// Somebody else could replace the socket.
    #[error("listen.socket: folder {} belongs to user {owner}, this is user {user}; name a folder of your own", folder.display())]
    ForeignFolder {
        /// The folder.
        folder: PathBuf,
        /// Its owner.
        owner: u32,
        /// The daemon's user.
        user: u32,
    },
    /// A TCP address cannot be had.
    #[error("{field} {address}: {source}; name another address, or `off`")]
    Tcp {
        /// `listen.tcp` or `listen.http`
        field: &'static str,
        /// The address.
        address: SocketAddr,
        /// What the system said.
        source: io::Error,
    },
    /// The engine did not start.
    #[error(transparent)]
    Engine(#[from] EngineError),
    /// The engine failed while it served.
    #[error("the engine failed while it served; its last words are in the log")]
    Poisoned,
    /// The descriptors of the wire cannot be shown.
    #[error("reflection: {0}")]
    Reflection(String),
    /// Metrics cannot be shown.
    #[error("metrics: {0}")]
    Metrics(#[from] prometheus::Error),
    /// A signal handler or the runtime.
    #[error("{what}: {source}")]
    System {
        /// What was attempted.
        what: &'static str,
        /// What the system said.
        source: io::Error,
    },
}

/// Runs the daemon until a signal stops it. `announce` is called once, when requests are served.
///
/// # Errors
/// Why it did not start, or that the engine failed while it served.
pub fn serve(config: Config, announce: impl FnOnce(&Reachable)) -> Result<(), ServeError> {
    let system = |what| move |source| ServeError::System { what, source };
    room::check(&config)?;
    let runtime = tokio::runtime::Builder::new_multi_thread().thread_name("sluice-grpc").enable_all().build();
    let runtime = runtime.map_err(system("starting the runtime"))?;
    let result = runtime.block_on(live(config, announce));
    // Streams that outlived the drain, and a start that was interrupted, are not waited for.
    runtime.shutdown_background();
    result
}

async fn live(config: Config, announce: impl FnOnce(&Reachable)) -> Result<(), ServeError> {
    let mut signals = signals::Signals::catch().map_err(|source| ServeError::System { what: "catching signals", source })?;
    let (reporter, health) = tonic_health::server::health_reporter();
    let stage = StageBoard::new(reporter).await;
    let counters = Arc::new(Counters::default());
    let socket = listen::UnixSocket::bind(&config.listen.socket)?;
    let tcp = bind("listen.tcp", config.listen.tcp).await?;
    let web = bind("listen.http", config.listen.http).await?;
    let address = |listener: &Option<TcpListener>| listener.as_ref().and_then(|listener| listener.local_addr().ok());
    let reachable = Reachable { socket: config.listen.socket.clone(), tcp: address(&tcp), http: address(&web) };

    if let Some(listener) = web {
        // Not drained: it shows the drain, and goes when the daemon has stopped.
        tokio::spawn(http_endpoint(listener, metrics::registry(Arc::clone(&counters))?, stage.watch()));
    }
    let mut endpoints = JoinSet::new();
    let grpc = grpc::start(&config.grpc, grpc::Listeners { socket, tcp }, health, &stage, &mut endpoints)?;

    let arena = config.engine.arena_dir.clone();
    let started = tokio::task::spawn_blocking(move || Engine::start(config.engine, counters));
    let engine = tokio::select! {
        started = started => joined(started)??,
        never = log_progress(arena) => match never {},
        () = signals.next() => {
            info!("stopped before the arena was ready");
            return Ok(());
        }
    };
    grpc.open(&engine, &config.grpc, &stage);
    stage.set(Stage::Ready).await;
    info!(?reachable, "serving");
    announce(&reachable);

    let failure = tokio::select! {
        () = signals.next() => None,
        () = failed(&engine) => {
            error!("the engine failed; nothing is served any more, restart the daemon");
            stage.set(Stage::Poisoned).await;
            signals.next().await;
            Some(ServeError::Poisoned)
        }
    };
    signals.exit_at_next();
    stop(&engine, &stage, endpoints, config.drain).await;
    failure.map_or(Ok(()), Err)
}

/// Drains: no new connections or requests, time for streams to finish, then the engine writes down what it holds.
async fn stop(engine: &EngineHandle, stage: &StageBoard, mut endpoints: JoinSet<()>, drain: Duration) {
    info!(drain_seconds = drain.as_secs(), "draining; one more signal exits at once");
    stage.set(Stage::Draining).await;
    stage.end_watches().await;
    let drained = async { while endpoints.join_next().await.is_some() {} };
    if tokio::time::timeout(drain, drained).await.is_err() {
        warn!("streams were still open at the end of limits.drain_seconds; they are cut");
    }
    if let Err(error) = engine.shutdown().await {
        error!(%error, "the engine did not stop well");
    }
    stage.set(Stage::Stopped).await;
    info!("stopped");
}

/// Says how far the arena is, until the engine has started.
async fn log_progress(folder: PathBuf) -> std::convert::Infallible {
    let begin = std::time::Instant::now();
    loop {
        let bytes = room::folder_bytes(&folder).unwrap_or_default();
        info!(folder = %folder.display(), held = %ByteCount(bytes), seconds = begin.elapsed().as_secs(), "preparing the arena");
        tokio::time::sleep(PROGRESS).await;
    }
}

/// Returns when the engine can no longer be used.
async fn failed(engine: &EngineHandle) {
    // An error means that the engine thread is gone without a word, which is a failure as well.
    let _ = engine.state().wait_for(|state| *state != EngineState::Ready).await;
}

async fn bind(field: &'static str, address: Option<SocketAddr>) -> Result<Option<TcpListener>, ServeError> {
    let Some(address) = address else { return Ok(None) };
    TcpListener::bind(address).await.map(Some).map_err(|source| ServeError::Tcp { field, address, source })
}

async fn http_endpoint(listener: TcpListener, registry: prometheus::Registry, stage: watch::Receiver<Stage>) {
    if let Err(error) = http::serve(listener, registry, stage).await {
        error!(%error, "the HTTP endpoint failed");
    }
}

fn joined<T>(result: Result<T, tokio::task::JoinError>) -> Result<T, ServeError> {
    result.map_err(|error| ServeError::System { what: "starting the engine", source: io::Error::other(error) })
}
