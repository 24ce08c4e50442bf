//! The gRPC endpoints: one set of routes over the Unix socket and, if configured, TCP on loopback.

use std::sync::Arc;

use sluice_proto::v1::sluice_server::SluiceServer;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpListener;
use tokio::sync::{Semaphore, watch};
use tokio::task::JoinSet;
use tonic::service::Routes;
use tonic::transport::Server;
use tonic::transport::server::Connected;
use tonic_health::pb::health_server::{Health, HealthServer};
use tracing::error;

use super::ServeError;
use super::gate::Gate;
use super::listen::{self, Accepted, UnixSocket};
use super::stage::{self, Stage, StageBoard};
use crate::config::GrpcLimits;
use crate::engine::EngineHandle;
use crate::service::SluiceService;

/// Bytes of an HTTP/2 frame: large messages in few pieces.
const FRAME_BYTES: u32 = 256 << 10;

/// Bytes of the headers of one request.
const HEADER_BYTES: u32 = 16 << 10;

/// Open streams a connection may have, as a multiple of the requests at work: a Decode stream that waits for its client is no work.
const STREAMS_PER_REQUEST: u32 = 4;

/// Listening endpoints whose service opens later.
pub(super) struct Grpc {
    gate: Gate<SluiceServer<SluiceService>>,
}

/// Where the endpoints listen.
pub(super) struct Listeners {
    /// The Unix socket.
    pub(super) socket: UnixSocket,
    /// TCP on loopback.
    pub(super) tcp: Option<TcpListener>,
}

/// Serves health and reflection at once, and the service from [`Grpc::open`] on.
pub(super) fn start(
    limits: &GrpcLimits,
    listeners: Listeners,
    health: HealthServer<impl Health>,
    stage: &StageBoard,
    endpoints: &mut JoinSet<()>,
) -> Result<Grpc, ServeError> {
    let gate = Gate::closed();
    let routes = Routes::new(health).add_service(stage::reflection()?).add_service(gate.clone());
    let room = Arc::new(Semaphore::new(limits.connections));
    endpoints.spawn(endpoint(*limits, routes.clone(), listeners.socket.accept(Arc::clone(&room)), stage.watch()));
    if let Some(listener) = listeners.tcp {
        endpoints.spawn(endpoint(*limits, routes, listen::accept_tcp(listener, room), stage.watch()));
    }
    Ok(Grpc { gate })
}

impl Grpc {
    /// Lets requests through to the engine.
    pub(super) fn open(&self, engine: &EngineHandle, limits: &GrpcLimits, stage: &StageBoard) {
        let service = SluiceServer::new(SluiceService::new(engine.clone(), stage.watch()));
        let service = service.max_decoding_message_size(limits.message_bytes).max_encoding_message_size(limits.message_bytes);
        self.gate.open(service);
    }
}

async fn endpoint<T>(limits: GrpcLimits, routes: Routes, accepted: Accepted<T>, mut stage: watch::Receiver<Stage>)
where
    T: AsyncRead + AsyncWrite + Connected + Unpin + Send + 'static,
{
    let Accepted { stream, stop } = accepted;
    let stopping = async move {
        // An error means that the sender is gone, which is a stop as well.
        let _ = stage.wait_for(|stage| matches!(stage, Stage::Draining | Stage::Stopped)).await;
        stop.abort();
    };
    let mut server = Server::builder()
        .timeout(limits.request_timeout)
        .concurrency_limit_per_connection(limits.requests_per_connection as usize)
        .load_shed(true)
        .max_concurrent_streams(limits.requests_per_connection.saturating_mul(STREAMS_PER_REQUEST))
        .max_frame_size(FRAME_BYTES)
        .http2_max_header_list_size(HEADER_BYTES)
        .http2_keepalive_interval(Some(limits.keepalive_interval))
        .http2_keepalive_timeout(Some(limits.keepalive_timeout));
    if let Err(error) = server.add_routes(routes).serve_with_incoming_shutdown(stream, stopping).await {
        error!(%error, "a gRPC endpoint failed");
    }
}
