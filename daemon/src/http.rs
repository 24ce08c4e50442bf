//! `/metrics` and `/health` over HTTP, on loopback.

use axum::Router;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::IntoResponse;
use axum::routing::get;
use prometheus::Registry;
use tokio::net::TcpListener;
use tokio::sync::watch;

use crate::metrics;
use crate::server::Stage;

#[derive(Clone)]
struct Shown {
    registry: Registry,
    stage: watch::Receiver<Stage>,
}

/// Serves until `stage` says that the daemon has stopped.
///
/// # Errors
/// What the listener answers.
pub async fn serve(listener: TcpListener, registry: Registry, stage: watch::Receiver<Stage>) -> std::io::Result<()> {
    let mut stopped = stage.clone();
    let routes = Router::new().route("/metrics", get(show_metrics)).route("/health", get(show_health));
    let app = routes.with_state(Shown { registry, stage });
    let stop = async move {
        // An error means that the sender is gone, which is a stop as well.
        let _ = stopped.wait_for(|stage| *stage == Stage::Stopped).await;
    };
    axum::serve(listener, app).with_graceful_shutdown(stop).await
}

async fn show_metrics(State(shown): State<Shown>) -> impl IntoResponse {
    match metrics::text(&shown.registry) {
        Ok(text) => (StatusCode::OK, [(header::CONTENT_TYPE, metrics::TEXT_CONTENT_TYPE)], text),
        Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, [(header::CONTENT_TYPE, "text/plain")], format!("{error}\n")),
    }
}

async fn show_health(State(shown): State<Shown>) -> impl IntoResponse {
    let stage = *shown.stage.borrow();
    let status = if stage == Stage::Ready { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    (status, format!("{}\n", stage.as_str()))
}
