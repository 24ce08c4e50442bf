//! The client: models, sequences and numbers of one daemon.

use std::sync::Arc;

use sluice_kernels::budget::Settings;
use sluice_kernels::decoder::DeviceLimits;
use sluice_kernels::label::Calibration;
use sluice_proto::v1;

use crate::calibrate::OnlineCalibrator;
use crate::config::{ClientConfig, Endpoint};
use crate::connection::{Connection, Retry};
use crate::convert::{Model, ModelRegistration, model_spec, settings_in_force, wire_settings};
use crate::direct::DirectWay;
use crate::error::ClientError;
use crate::local::Local;
use crate::options::{Attach, OpenOptions};
use crate::session::{Core, Holding, Session, Way};
use crate::stream::StreamWay;

struct Shared {
    connection: Connection,
    /// What direct sessions of this process share: decoders and mapped segments.
    local: Local,
}

/// A connection to a daemon. Cheap to clone; sessions keep it alive.
#[derive(Clone)]
pub struct Client {
    shared: Arc<Shared>,
}

impl std::fmt::Debug for Client {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Client").field("endpoint", &self.shared.connection.endpoint).finish_non_exhaustive()
    }
}

/// The calibration that a model has after [`Client::set_calibration`].
#[derive(Clone, Debug, PartialEq)]
pub struct CalibrationInForce {
    /// The first one that was set.
    pub calibration: Calibration,
    /// Whether it is the one given.
    pub accepted: bool,
}

impl Client {
    /// Connects to a daemon at `/path`, `unix:/path` or `http://host:port`.
    ///
    /// # Errors
    /// No such address, or nobody answers there within the retries.
    pub fn connect(endpoint: &str, config: ClientConfig) -> Result<Self, ClientError> {
        let limits = DeviceLimits { device_bytes: config.device_bytes, hot_rows: 0 };
        let connection = Connection::open(Endpoint::parse(endpoint)?, config)?;
        let client = Self { shared: Arc::new(Shared { connection, local: Local::new(limits) }) };
        client.stats()?;
        Ok(client)
    }

    /// The bounds of this client.
    #[must_use]
    pub fn config(&self) -> &ClientConfig {
        &self.shared.connection.config
    }

    pub(crate) fn connection(&self) -> &Connection {
        &self.shared.connection
    }

    pub(crate) fn local(&self) -> &Local {
        &self.shared.local
    }

    /// Registers a model; registering the same again answers the same id.
    ///
    /// # Errors
    /// A shape, digest or calibration that the daemon refuses.
    pub fn register_model(&self, model: &ModelRegistration, calibration: Option<&Calibration>) -> Result<Model, ClientError> {
        let request = v1::RegisterModelRequest {
            model: Some(model_spec(model)),
            calibration_json: calibration.map(to_json).transpose()?.unwrap_or_default().into(),
            namespace: model.namespace.clone(),
        };
        let reply = self
            .connection()
            .call("RegisterModel", Retry::Idempotent, request, async |client, request| client.register_model(request).await)?;
        Ok(Model { id: reply.model_id, shape: Arc::new(model.shape.clone()), calibrated: reply.calibrated })
    }

    /// Removes a model that no sequence uses; answers the bytes freed.
    ///
    /// # Errors
    /// It is unknown, or sequences of it are held.
    pub fn unregister_model(&self, model: &Model) -> Result<u64, ClientError> {
        let request = v1::UnregisterModelRequest { model_id: model.id };
        let reply = self
            .connection()
            .call("UnregisterModel", Retry::Never, request, async |client, request| client.unregister_model(request).await)?;
        Ok(reply.freed_bytes)
    }

    /// Sets the calibration of a model that has none; the first one wins.
    ///
    /// # Errors
    /// It does not fit the model.
    pub fn set_calibration(&self, model: &Model, calibration: &Calibration) -> Result<CalibrationInForce, ClientError> {
        let request = v1::SetCalibrationRequest { model_id: model.id, calibration_json: to_json(calibration)?.into() };
        let reply = self
            .connection()
            .call("SetCalibration", Retry::Idempotent, request, async |client, request| client.set_calibration(request).await)?;
        let calibration = from_json("SetCalibrationResponse.calibration_json", &reply.calibration_json)?;
        Ok(CalibrationInForce { calibration, accepted: reply.accepted })
    }

    /// Opens a sequence over the longest known prefix of `token_ids`.
    ///
    /// # Errors
    /// An unknown model, options out of bounds, or no room.
    pub fn open(&self, model: &Model, token_ids: &[u32], options: &OpenOptions) -> Result<Session, ClientError> {
        let request = v1::OpenRequest { token_ids: token_ids.to_vec(), ..open_request(model, options) };
        let mut session = self.open_with(model, options, request)?;
        if session.core.token_ids.is_empty() {
            session.core.token_ids = token_ids[..session.core.matched.min(token_ids.len())].to_vec();
        }
        Ok(session)
    }

    /// Reopens a parked sequence, whose worker has died.
    ///
    /// # Errors
    /// It is unknown, held by a live worker, or of another model.
    pub fn resume(&self, model: &Model, sequence_id: u64, options: &OpenOptions) -> Result<Session, ClientError> {
        let request = v1::OpenRequest { resume_sequence_id: sequence_id, ..open_request(model, options) };
        let mut session = self.open_with(model, options, request)?;
        if let Way::Stream(way) = &mut session.way {
            way.measure(&session.core)?;
        }
        Ok(session)
    }

    /// Joins a sequence that another worker of this machine has opened, resumed or forked with lanes of its own, as the worker of
    /// `options.lanes`. Both numbers are those of the other worker's session. A chunk is sealed when the workers of all lanes have committed it;
    /// the lease ends with [`Session::close`] of the worker that opened it, or when all of its workers are dead.
    ///
    /// # Errors
    /// Options without lanes or not direct, a lease that is not in force, lanes that another worker has, another user's sequence.
    pub fn join(&self, model: &Model, sequence_id: u64, generation: u64, options: &OpenOptions) -> Result<Session, ClientError> {
        let (Some(_), Attach::Direct { device, threads }) = (&options.lanes, options.attach) else {
            return Err(ClientError::Unsupported { what: "join", needed: "Attach::Direct and lanes" });
        };
        let lease = v1::LeaseRef { sequence_id, generation };
        let mut core = Core {
            client: self.clone(),
            model: model.clone(),
            options: OpenOptions { calibrate: None, ..options.clone() },
            lease,
            // Settings, boot epoch and committed tokens come with the files.
            boot_epoch: 0,
            settings: Settings::default(),
            matched: 0,
            committed: 0,
            token_ids: Vec::new(),
            opaque: Vec::new(),
            run: None,
        };
        let way = Way::Direct(Box::new(DirectWay::attach(&mut core, device, threads)?));
        core.matched = core.committed;
        Ok(Session { core, way, calibrator: None, truncating: None, yielding: None, holding: Holding::Joined })
    }

    fn open_with(&self, model: &Model, options: &OpenOptions, request: v1::OpenRequest) -> Result<Session, ClientError> {
        if options.lanes.is_some() && options.attach == Attach::Stream {
            return Err(ClientError::Unsupported { what: "lanes", needed: "Attach::Direct" });
        }
        // A lost answer leaves a lease that nobody uses until this process ends; the daemon proves the end and takes it back.
        let reply = self.connection().call("Open", Retry::Idempotent, request, async |client, request| client.open(request).await)?;
        self.session(model, options, reply)
    }

    /// The session of an Open or Fork that was granted; a lease that cannot be attached is given back.
    pub(crate) fn session(&self, model: &Model, options: &OpenOptions, reply: v1::OpenResponse) -> Result<Session, ClientError> {
        let lease = reply.lease.ok_or_else(|| ClientError::protocol("OpenResponse", "lease is missing"))?;
        let attached = self.attached(model, options, reply, lease);
        if attached.is_err() {
            let request = v1::CloseRequest { lease: Some(lease) };
            let closed = self.connection().call("Close", Retry::Never, request, async |client, request| client.close(request).await);
            if let Err(error) = closed {
                tracing::warn!(sequence_id = lease.sequence_id, %error, "a lease that could not be attached was not given back");
            }
        }
        attached
    }

    fn attached(&self, model: &Model, options: &OpenOptions, reply: v1::OpenResponse, lease: v1::LeaseRef) -> Result<Session, ClientError> {
        let matched = reply.matched_tokens as usize;
        let mut core = Core {
            client: self.clone(),
            model: model.clone(),
            options: options.clone(),
            lease,
            boot_epoch: reply.boot_epoch,
            settings: settings_in_force(reply.settings)?,
            matched,
            committed: matched,
            token_ids: reply.token_ids,
            opaque: reply.opaque_state.to_vec(),
            run: None,
        };
        let way = match options.attach {
            Attach::Stream => Way::Stream(StreamWay::new(&core, reply.tokens_until_full)),
            Attach::Direct { device, threads } => Way::Direct(Box::new(DirectWay::attach(&mut core, device, threads)?)),
        };
        let calibrator = options.calibrate.as_ref().filter(|_| !model.calibrated);
        let calibrator = calibrator.map(|online| OnlineCalibrator::new(&core.model.shape, online));
        Ok(Session { core, way, calibrator, truncating: None, yielding: None, holding: Holding::Opened })
    }

    /// Held and parked sequences, of one model or of all.
    ///
    /// # Errors
    /// The daemon cannot be reached.
    pub fn list(&self, model: Option<&Model>) -> Result<Vec<v1::SequenceInfo>, ClientError> {
        let request = v1::ListRequest { model_id: model.map_or(0, |model| model.id) };
        let reply = self.connection().call("List", Retry::Idempotent, request, async |client, request| client.list(request).await)?;
        Ok(reply.sequences)
    }

    /// What the daemon holds, in numbers.
    ///
    /// # Errors
    /// The daemon cannot be reached.
    pub fn stats(&self) -> Result<v1::StatsResponse, ClientError> {
        self.connection().call("Stats", Retry::Idempotent, v1::StatsRequest {}, async |client, request| client.stats(request).await)
    }
}

fn open_request(model: &Model, options: &OpenOptions) -> v1::OpenRequest {
    v1::OpenRequest {
        model_id: model.id,
        extra_keys: options.extra_keys.iter().map(|key| key.clone().into()).collect(),
        settings: options.settings.as_ref().map(wire_settings),
        open_slots: options.open_slots,
        ..v1::OpenRequest::default()
    }
}

fn to_json(calibration: &Calibration) -> Result<Vec<u8>, ClientError> {
    serde_json::to_vec(calibration).map_err(|error| ClientError::protocol("calibration", error.to_string()))
}

pub(crate) fn from_json(what: &'static str, json: &[u8]) -> Result<Calibration, ClientError> {
    serde_json::from_slice(json).map_err(|error| ClientError::protocol(what, error.to_string()))
}
