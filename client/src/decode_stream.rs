//! The bidirectional Decode stream of a client: requests by id, replies matched to their callers.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use parking_lot::Mutex;
use sluice_proto::v1::{DecodeRequest, DecodeResponse};
use tokio::sync::{mpsc, oneshot};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Status, Streaming};

use crate::connection::{Connection, describe, is_transport};
use crate::error::ClientError;

/// How a request on the stream failed.
pub(crate) enum StreamFailure {
    /// The stream ended before the reply; whether the request was carried out is unknown.
    Broken(String),
    /// The daemon ended the stream with a refusal.
    Refused {
        /// gRPC status code.
        code: Code,
        /// The daemon's words.
        message: String,
    },
    /// No reply in time.
    Deadline,
}

impl StreamFailure {
    pub(crate) fn into_error(self, connection: &Connection) -> ClientError {
        match self {
            Self::Broken(message) => ClientError::Unreachable { call: "Decode", attempts: 1, message },
            Self::Refused { code, message } => ClientError::Refused { call: "Decode", code, message },
            Self::Deadline => ClientError::Deadline { call: "Decode", limit: connection.config.rpc_deadline },
        }
    }
}

type Reply = Result<DecodeResponse, (Code, String, bool)>;

struct Shared {
    /// Callers waiting for a reply, by request id. The bound is the request channel's: each waiting caller holds one place of it.
    waiting: Mutex<HashMap<u64, oneshot::Sender<Reply>>>,
    next_id: AtomicU64,
    broken: AtomicBool,
}

/// One stream. Cheap to clone; it ends when the last clone is dropped or the daemon ends it.
#[derive(Clone)]
pub(crate) struct DecodeStream {
    requests: mpsc::Sender<DecodeRequest>,
    shared: Arc<Shared>,
}

impl DecodeStream {
    pub(crate) fn open(connection: &Connection) -> Self {
        let (requests, receiver) = mpsc::channel(connection.config.stream_in_flight);
        let waiting = Mutex::new(HashMap::new());
        let shared = Arc::new(Shared { waiting, next_id: AtomicU64::new(1), broken: AtomicBool::new(false) });
        let (mut client, reader) = (connection.client(), Arc::clone(&shared));
        connection.spawn(async move {
            let end = match client.decode(ReceiverStream::new(receiver)).await {
                Ok(replies) => read_replies(replies.into_inner(), &reader).await,
                Err(status) => status,
            };
            reader.fail_all(&end);
        });
        Self { requests, shared }
    }

    pub(crate) fn is_broken(&self) -> bool {
        self.shared.broken.load(Ordering::Acquire) || self.requests.is_closed()
    }

    /// Sends one request and waits for its reply. The request id is chosen here.
    pub(crate) fn request(&self, connection: &Connection, mut request: DecodeRequest) -> Result<DecodeResponse, StreamFailure> {
        let id = self.shared.next_id.fetch_add(1, Ordering::Relaxed);
        request.request_id = id;
        let (sender, receiver) = oneshot::channel();
        self.shared.waiting.lock().insert(id, sender);
        if self.is_broken() {
            // The reader may have failed everybody before this caller was listed.
            self.shared.waiting.lock().remove(&id);
            return Err(StreamFailure::Broken("the stream has ended".to_owned()));
        }
        let reply = connection.block_on(async {
            tokio::time::timeout(connection.config.rpc_deadline, async {
                self.requests.send(request).await.map_err(|_| StreamFailure::Broken("the stream has ended".to_owned()))?;
                receiver.await.map_err(|_| StreamFailure::Broken("the stream's reader is gone".to_owned()))
            })
            .await
        });
        self.shared.waiting.lock().remove(&id);
        match reply {
            Err(_) => {
                // A reply that comes later must not be taken for another's: the stream is given up.
                self.shared.broken.store(true, Ordering::Release);
                Err(StreamFailure::Deadline)
            }
            Ok(Err(failure)) => Err(failure),
            Ok(Ok(Ok(reply))) => Ok(reply),
            Ok(Ok(Err((_, message, true)))) => Err(StreamFailure::Broken(message)),
            Ok(Ok(Err((code, message, false)))) => Err(StreamFailure::Refused { code, message }),
        }
    }
}

async fn read_replies(mut replies: Streaming<DecodeResponse>, shared: &Shared) -> Status {
    loop {
        match replies.message().await {
            Ok(Some(reply)) => {
                let caller = shared.waiting.lock().remove(&reply.request_id);
                if let Some(caller) = caller {
                    // A caller that has given up is no error.
                    let _ = caller.send(Ok(reply));
                }
            }
            Ok(None) => return Status::unavailable("the daemon ended the stream"),
            Err(status) => return status,
        }
    }
}

impl Shared {
    fn fail_all(&self, status: &Status) {
        self.broken.store(true, Ordering::Release);
        let callers: Vec<_> = self.waiting.lock().drain().collect();
        for (_, caller) in callers {
            let _ = caller.send(Err((status.code(), describe(status), is_transport(status))));
        }
    }
}
