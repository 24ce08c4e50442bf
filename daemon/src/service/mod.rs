//! The gRPC service `sluice.v1`: messages in, commands out, answers back. Nothing is decided here.

mod convert;
mod streams;

use sluice_proto::v1;
use sluice_proto::v1::sluice_server::Sluice;
use tokio::sync::watch;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::server::UdsConnectInfo;
use tonic::{Request, Response, Status, Streaming};

use crate::engine::command::{Attach, Opened, Peer};
use crate::engine::counters::Refusal;
use crate::engine::{EngineError, EngineHandle};
use crate::server::Stage;

/// The service.
#[derive(Clone, Debug)]
pub struct SluiceService {
    engine: EngineHandle,
    started: std::time::Instant,
    stage: watch::Receiver<Stage>,
}

impl SluiceService {
    /// A service over an engine. Limits are the engine's and the server's; streams that idle end when `stage` says that the daemon stops.
    #[must_use]
    pub fn new(engine: EngineHandle, stage: watch::Receiver<Stage>) -> Self {
        Self { engine, started: std::time::Instant::now(), stage }
    }

    /// Counts a refusal of the service itself; the engine counts its own.
    fn checked<T>(&self, converted: Result<T, EngineError>) -> Result<T, Status> {
        converted.map_err(|error| {
            self.engine.counters().refused(error.refusal()).add(1);
            error.into()
        })
    }

    fn opened(&self, opened: Opened) -> v1::OpenResponse {
        v1::OpenResponse {
            boot_epoch: self.engine.boot_epoch(),
            lease: Some(convert::lease_ref(opened.lease)),
            matched_tokens: opened.matched_tokens,
            settings: Some(convert::wire_settings(&opened.settings)),
            opaque_state: opened.opaque_state.into(),
            token_ids: opened.token_ids,
            tokens_until_full: opened.tokens_until_full,
        }
    }
}

/// The process at the other end, where the socket proves one.
fn peer_of<T>(request: &Request<T>) -> Peer {
    let credentials = request.extensions().get::<UdsConnectInfo>().and_then(|info| info.peer_cred);
    match credentials.and_then(|credentials| Some((credentials.pid()?, credentials.uid()))) {
        Some((pid, uid)) if pid > 0 => Peer::Local { pid, uid },
        _ => Peer::Remote,
    }
}

#[tonic::async_trait]
impl Sluice for SluiceService {
    type DecodeStream = ReceiverStream<Result<v1::DecodeResponse, Status>>;

    async fn register_model(&self, request: Request<v1::RegisterModelRequest>) -> Result<Response<v1::RegisterModelResponse>, Status> {
        let request = self.checked(convert::register_model(request.into_inner()))?;
        let registered = self.engine.register_model(request).await?;
        let (model_id, calibrated) = (registered.model, registered.calibrated);
        Ok(Response::new(v1::RegisterModelResponse { boot_epoch: self.engine.boot_epoch(), model_id, calibrated }))
    }

    async fn unregister_model(
        &self,
        request: Request<v1::UnregisterModelRequest>,
    ) -> Result<Response<v1::UnregisterModelResponse>, Status> {
        let freed_bytes = self.engine.unregister_model(request.into_inner().model_id).await?;
        Ok(Response::new(v1::UnregisterModelResponse { boot_epoch: self.engine.boot_epoch(), freed_bytes }))
    }

    async fn set_calibration(&self, request: Request<v1::SetCalibrationRequest>) -> Result<Response<v1::SetCalibrationResponse>, Status> {
        let request = request.into_inner();
        let in_force = self.engine.set_calibration(request.model_id, request.calibration_json.to_vec()).await?;
        let (calibration_json, accepted) = (in_force.json.into(), in_force.accepted);
        Ok(Response::new(v1::SetCalibrationResponse { boot_epoch: self.engine.boot_epoch(), calibration_json, accepted }))
    }

    async fn open(&self, request: Request<v1::OpenRequest>) -> Result<Response<v1::OpenResponse>, Status> {
        let peer = peer_of(&request);
        let default = self.engine.config().settings_default;
        let request = self.checked(convert::open(request.into_inner(), peer, &default))?;
        let opened = self.engine.open(request).await?;
        Ok(Response::new(self.opened(opened)))
    }

    async fn append(&self, request: Request<Streaming<v1::AppendRequest>>) -> Result<Response<v1::AppendResponse>, Status> {
        let appended = streams::append(&self.engine, request.into_inner()).await?;
        Ok(Response::new(appended))
    }

    async fn decode(&self, request: Request<Streaming<v1::DecodeRequest>>) -> Result<Response<Self::DecodeStream>, Status> {
        Ok(Response::new(streams::decode(self.engine.clone(), request.into_inner(), self.stage.clone())))
    }

    async fn fork(&self, request: Request<v1::ForkRequest>) -> Result<Response<v1::OpenResponse>, Status> {
        let peer = peer_of(&request);
        let request = self.checked(convert::fork(&request.into_inner(), peer))?;
        let opened = self.engine.fork(request).await?;
        Ok(Response::new(self.opened(opened)))
    }

    async fn truncate(&self, request: Request<v1::TruncateRequest>) -> Result<Response<v1::TruncateResponse>, Status> {
        let request = request.into_inner();
        let lease = self.checked(convert::lease(request.lease.as_ref()))?;
        let committed_tokens = self.engine.decoder()?.truncate(lease, request.position).await?;
        Ok(Response::new(v1::TruncateResponse { boot_epoch: self.engine.boot_epoch(), committed_tokens }))
    }

    async fn store_opaque(&self, request: Request<v1::StoreOpaqueRequest>) -> Result<Response<v1::StoreOpaqueResponse>, Status> {
        let request = request.into_inner();
        let lease = self.checked(convert::lease(request.lease.as_ref()))?;
        self.engine.store_opaque(lease, request.state.to_vec()).await?;
        Ok(Response::new(v1::StoreOpaqueResponse { boot_epoch: self.engine.boot_epoch() }))
    }

    async fn close(&self, request: Request<v1::CloseRequest>) -> Result<Response<v1::CloseResponse>, Status> {
        let lease = self.checked(convert::lease(request.into_inner().lease.as_ref()))?;
        self.engine.close(lease).await?;
        Ok(Response::new(v1::CloseResponse { boot_epoch: self.engine.boot_epoch() }))
    }

    async fn list(&self, request: Request<v1::ListRequest>) -> Result<Response<v1::ListResponse>, Status> {
        let model = Some(request.into_inner().model_id).filter(|&id| id != 0);
        let sequences = self.engine.list(model).await?.into_iter().map(convert::sequence_info).collect();
        Ok(Response::new(v1::ListResponse { boot_epoch: self.engine.boot_epoch(), sequences }))
    }

    async fn stats(&self, _request: Request<v1::StatsRequest>) -> Result<Response<v1::StatsResponse>, Status> {
        let stats = self.engine.stats().await?;
        Ok(Response::new(convert::stats(&self.engine, &stats, self.started.elapsed())))
    }

    async fn attach(&self, request: Request<v1::AttachRequest>) -> Result<Response<v1::AttachResponse>, Status> {
        let request = request.into_inner();
        let lease = self.checked(convert::lease(request.lease.as_ref()))?;
        let end = request.first_lane.checked_add(request.lane_count);
        let end = self.checked(end.ok_or_else(|| EngineError::invalid("lane_count", request.lane_count, "the model's lanes")))?;
        let lanes = (request.lane_count > 0).then_some(request.first_lane..end);
        let attached = self.engine.attach(Attach { lease, lanes }).await?;
        let label_set = attached.calibration.as_ref().map_or(0, |&(label_set, _)| label_set);
        let unknown = attached.calibration.filter(|&(label_set, _)| label_set != request.known_label_set);
        let calibration = unknown.map(|(_, calibration)| serde_json::to_vec(&*calibration)).transpose();
        let calibration = calibration.map_err(|error| Status::internal(error.to_string()))?;
        Ok(Response::new(v1::AttachResponse {
            boot_epoch: self.engine.boot_epoch(),
            ticket: attached.ticket.to_vec().into(),
            side_socket: self.engine.config().side_socket.display().to_string(),
            layout_version: sluice_kernels::shared::LAYOUT_VERSION,
            writer: attached.writer,
            calibration_json: calibration.unwrap_or_default().into(),
            label_set,
            settings: Some(convert::wire_settings(&attached.settings)),
        }))
    }
}

/// Counts and makes a refusal that only the service knows.
fn refuse(engine: &EngineHandle, refusal: Refusal, message: String) -> v1::Error {
    engine.counters().refused(refusal).add(1);
    crate::status::wire(refusal, message)
}
