//! One connection to the daemon: a runtime, a channel that reconnects by itself, and unary calls with bounded retries.

use std::error::Error as _;
use std::time::Duration;

use hyper_util::rt::TokioIo;
use parking_lot::Mutex;
use sluice_proto::v1::sluice_client::SluiceClient;
use tokio::net::UnixStream;
use tokio::runtime::{Builder, Runtime};
use tonic::transport::Channel;
use tonic::{Code, Request, Response, Status};
use tower::service_fn;

use crate::config::{ClientConfig, Endpoint};
use crate::decode_stream::DecodeStream;
use crate::error::ClientError;

/// Whether a call may be sent again when its answer was lost.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Retry {
    /// Doing it twice is the same as doing it once.
    Idempotent,
    /// It is sent at most once.
    Never,
}

/// The connection that a client and its sessions share.
pub(crate) struct Connection {
    /// Taken when the last handle goes.
    runtime: Option<Runtime>,
    pub(crate) config: ClientConfig,
    pub(crate) endpoint: Endpoint,
    client: SluiceClient<Channel>,
    /// The Decode stream in use; a broken one is replaced at the next request.
    decode: Mutex<Option<DecodeStream>>,
}

impl Connection {
    pub(crate) fn open(endpoint: Endpoint, config: ClientConfig) -> Result<Self, ClientError> {
        config.check()?;
        // One worker thread: it carries bytes between sockets and waiting callers, and answers keepalives while no call is made.
        let runtime = Builder::new_multi_thread().worker_threads(1).thread_name("sluice-client").enable_all().build();
        let runtime = runtime.map_err(|source| ClientError::SideSocket { action: "start runtime", source })?;
        let channel = channel(&endpoint, &config, &runtime)?;
        let bytes = config.message_bytes_max;
        let client = SluiceClient::new(channel).max_decoding_message_size(bytes).max_encoding_message_size(bytes);
        Ok(Self { runtime: Some(runtime), config, endpoint, client, decode: Mutex::new(None) })
    }

    fn runtime(&self) -> &Runtime {
        self.runtime.as_ref().expect("the runtime is taken in drop only")
    }

    /// Runs a future to its end on this thread, the runtime's thread moving the bytes.
    pub(crate) fn block_on<T>(&self, future: impl Future<Output = T>) -> T {
        self.runtime().block_on(future)
    }

    /// Runs a future in the background, as long as the connection lives.
    pub(crate) fn spawn<T: Send + 'static>(&self, future: impl Future<Output = T> + Send + 'static) -> tokio::task::JoinHandle<T> {
        self.runtime().spawn(future)
    }

    pub(crate) fn client(&self) -> SluiceClient<Channel> {
        self.client.clone()
    }

    /// One unary call with deadline and bounded retries. A retry happens only when the transport failed, never on a refusal.
    pub(crate) fn call<Q: Clone, A>(
        &self,
        name: &'static str,
        retry: Retry,
        request: Q,
        send: impl AsyncFn(&mut SluiceClient<Channel>, Request<Q>) -> Result<Response<A>, Status>,
    ) -> Result<A, ClientError> {
        let limit = self.config.rpc_deadline;
        let mut attempt = 0;
        loop {
            let answer = self.block_on(async {
                let mut message = Request::new(request.clone());
                message.set_timeout(limit);
                tokio::time::timeout(limit, send(&mut self.client(), message)).await
            });
            let status = match answer {
                Err(_) => return Err(ClientError::Deadline { call: name, limit }),
                Ok(Ok(answer)) => return Ok(answer.into_inner()),
                Ok(Err(status)) => status,
            };
            if !is_transport(&status) {
                return Err(refused(name, &status, limit));
            }
            if retry == Retry::Never || attempt == self.config.retries_max {
                return Err(ClientError::Unreachable { call: name, attempts: attempt + 1, message: describe(&status) });
            }
            std::thread::sleep(self.config.backoff(attempt));
            attempt += 1;
        }
    }

    /// The Decode stream, opened anew when there is none or when it has broken.
    pub(crate) fn decode_stream(&self) -> DecodeStream {
        let mut current = self.decode.lock();
        match current.as_ref().filter(|stream| !stream.is_broken()) {
            Some(stream) => stream.clone(),
            None => current.insert(DecodeStream::open(self)).clone(),
        }
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            // Background closes get a moment; the runtime is not waited for beyond it.
            runtime.shutdown_timeout(Duration::from_millis(200));
        }
    }
}

fn channel(endpoint: &Endpoint, config: &ClientConfig, runtime: &Runtime) -> Result<Channel, ClientError> {
    let uri = match endpoint {
        // The host of the URI is not used: the connector knows the path.
        Endpoint::Unix(_) => "http://sluice.local",
        Endpoint::Tcp(uri) => uri,
    };
    let target = tonic::transport::Endpoint::from_shared(uri.to_owned()).map_err(|_| ClientError::Endpoint { text: uri.to_owned() })?;
    let target = target
        .connect_timeout(config.connect_timeout)
        .http2_keep_alive_interval(Duration::from_secs(20))
        .keep_alive_timeout(Duration::from_secs(20))
        .initial_stream_window_size(4 << 20)
        .initial_connection_window_size(16 << 20);
    // Channels spawn their connection task on the runtime they are made in.
    let _guard = runtime.enter();
    Ok(match endpoint {
        Endpoint::Tcp(_) => target.connect_lazy(),
        Endpoint::Unix(path) => {
            let path = path.clone();
            target.connect_with_connector_lazy(service_fn(move |_| {
                let path = path.clone();
                async move { UnixStream::connect(path).await.map(TokioIo::new) }
            }))
        }
    })
}

/// Whether the transport failed, so that the daemon may never have seen the call. A status that the daemon sent has no source.
pub(crate) fn is_transport(status: &Status) -> bool {
    status.code() == Code::Unavailable || status.source().is_some()
}

/// The refusal as an error.
pub(crate) fn refused(call: &'static str, status: &Status, limit: Duration) -> ClientError {
    match status.code() {
        Code::DeadlineExceeded => ClientError::Deadline { call, limit },
        code => ClientError::Refused { call, code, message: status.message().to_owned() },
    }
}

/// A status with the causes beneath it.
pub(crate) fn describe(status: &Status) -> String {
    let mut text = format!("{:?}: {}", status.code(), status.message());
    let mut source = status.source();
    while let Some(cause) = source {
        text.push_str(": ");
        text.push_str(&cause.to_string());
        source = cause.source();
    }
    text
}
