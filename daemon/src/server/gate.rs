//! A gRPC service that answers UNAVAILABLE until the real one exists, so that health can be asked while the arena is prepared.

use std::convert::Infallible;
use std::sync::{Arc, OnceLock};
use std::task::{Context, Poll};

use tonic::Status;
use tonic::body::Body;
use tonic::codegen::{BoxFuture, Service, http};
use tonic::server::NamedService;

/// The place of a service that opens later.
pub(super) struct Gate<S> {
    service: Arc<OnceLock<S>>,
}

impl<S> Gate<S> {
    /// A closed gate.
    pub(super) fn closed() -> Self {
        Self { service: Arc::new(OnceLock::new()) }
    }

    /// Lets requests through to `service`. Opening it again changes nothing.
    pub(super) fn open(&self, service: S) {
        // A gate opens once; who comes second finds it open with the first service.
        let _ = self.service.set(service);
    }
}

impl<S> Clone for Gate<S> {
    fn clone(&self) -> Self {
        Self { service: Arc::clone(&self.service) }
    }
}

impl<S: NamedService> NamedService for Gate<S> {
    const NAME: &'static str = S::NAME;
}

impl<S> Service<http::Request<Body>> for Gate<S>
where
    S: Service<http::Request<Body>, Response = http::Response<Body>, Error = Infallible> + Clone,
    S::Future: Send + 'static,
{
    type Response = http::Response<Body>;
    type Error = Infallible;
    type Future = BoxFuture<Self::Response, Infallible>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        // Generated services are always ready.
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: http::Request<Body>) -> Self::Future {
        match self.service.get() {
            Some(service) => Box::pin(service.clone().call(request)),
            None => Box::pin(async { Ok(Status::unavailable("the arena is being prepared; ask health, then try again").into_http()) }),
        }
    }
}
