//! What the endpoints answer before the engine exists and after it failed.

use std::path::Path;

use hyper_util::rt::TokioIo;
use sluice_proto::v1::StatsRequest;
use sluice_proto::v1::sluice_client::SluiceClient;
use tokio::net::UnixStream;
use tokio::task::JoinSet;
use tonic::Code;
use tonic::transport::{Channel, Endpoint};
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_check_response::ServingStatus;
use tonic_health::pb::health_client::HealthClient;

use super::stage::StageBoard;
use super::{SERVICE_NAME, Stage, grpc, listen};
use crate::config::ConfigFile;

async fn connect(socket: &Path) -> Channel {
    let socket = socket.to_owned();
    let connector = tower::service_fn(move |_| {
        let socket = socket.clone();
        async move { UnixStream::connect(socket).await.map(TokioIo::new) }
    });
    Endpoint::from_static("http://sluice.local").connect_with_connector(connector).await.expect("it listens")
}

#[tokio::test]
async fn health_follows_the_stage_and_requests_wait_outside_until_the_engine_exists() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("run/sluice.sock");
    let limits = ConfigFile::default().check().expect("defaults fit").grpc;
    let (reporter, health) = tonic_health::server::health_reporter();
    let board = StageBoard::new(reporter).await;
    let listeners = grpc::Listeners { socket: listen::UnixSocket::bind(&path).expect("bound"), tcp: None };
    let mut endpoints = JoinSet::new();
    let _closed = grpc::start(&limits, listeners, health, &board, &mut endpoints).expect("started");
    let channel = connect(&path).await;

    let status = SluiceClient::new(channel.clone()).stats(StatsRequest {}).await.expect_err("no engine yet");
    assert_eq!(status.code(), Code::Unavailable);
    assert!(status.message().contains("being prepared"), "{status}");
    let stages = [
        (Stage::Preparing, ServingStatus::NotServing),
        (Stage::Ready, ServingStatus::Serving),
        (Stage::Poisoned, ServingStatus::NotServing),
    ];
    for (stage, expected) in stages {
        board.set(stage).await;
        for service in ["", SERVICE_NAME] {
            let request = HealthCheckRequest { service: service.to_owned() };
            let reply = HealthClient::new(channel.clone()).check(request).await.expect("known").into_inner();
            assert_eq!(reply.status(), expected, "{stage:?} {service:?}");
        }
    }
    assert_eq!(*board.watch().borrow(), Stage::Poisoned);

    drop(channel);
    board.set(Stage::Draining).await;
    tokio::time::timeout(std::time::Duration::from_secs(20), endpoints.join_next()).await.expect("nothing holds the drain");
    assert!(!path.exists(), "the socket file goes when nothing is accepted any more");
}
