//! The server around the engine, as a real process: sockets, health, reflection, limits, start and stop.

use std::os::unix::fs::{FileTypeExt as _, PermissionsExt as _};
use std::process::{Command, Stdio};

use crate::support::{PATIENCE, Place, channel, ended};
use rustix::process::Signal;
use sluice_proto::v1::sluice_client::SluiceClient;
use sluice_proto::v1::{DecodeRequest, ModelSpec, RegisterModelRequest, StatsRequest};
use tokio_stream::StreamExt as _;
use tonic::{Code, Streaming};
use tonic_health::pb::health_check_response::ServingStatus;
use tonic_health::pb::health_client::HealthClient;
use tonic_health::pb::{HealthCheckRequest, HealthCheckResponse};
use tonic_reflection::pb::v1::server_reflection_client::ServerReflectionClient;
use tonic_reflection::pb::v1::server_reflection_request::MessageRequest;
use tonic_reflection::pb::v1::server_reflection_response::MessageResponse;
use tonic_reflection::pb::v1::{ServerReflectionRequest, ServerReflectionResponse};

const SERVICE: &str = "sluice.v1.Sluice";

async fn watch_health(channel: tonic::transport::Channel) -> Streaming<HealthCheckResponse> {
    let request = HealthCheckRequest { service: SERVICE.to_owned() };
    HealthClient::new(channel).watch(request).await.expect("a watch").into_inner()
}

async fn next_health(watch: &mut Streaming<HealthCheckResponse>) -> ServingStatus {
    let next = tokio::time::timeout(PATIENCE, watch.next()).await.expect("in time");
    next.expect("open").expect("a status").status()
}

async fn ask_reflection(channel: tonic::transport::Channel, question: MessageRequest) -> MessageResponse {
    let request = ServerReflectionRequest { host: String::new(), message_request: Some(question) };
    let mut replies =
        ServerReflectionClient::new(channel).server_reflection_info(tokio_stream::once(request)).await.expect("a stream").into_inner();
    let ServerReflectionResponse { message_response, .. } = replies.next().await.expect("a reply").expect("a reply");
    message_response.expect("a message")
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_ready_daemon_answers_health_stats_and_http() {
    let place = Place::new();
    let daemon = place.serve(&[]);
    for service in ["", SERVICE] {
        let request = HealthCheckRequest { service: service.to_owned() };
        let reply = HealthClient::new(daemon.channel().await).check(request).await.expect("known").into_inner();
        assert_eq!(reply.status(), ServingStatus::Serving, "{service:?}");
    }
    let stats = SluiceClient::new(daemon.channel().await).stats(StatsRequest {}).await.expect("served").into_inner();
    assert_ne!(stats.boot_epoch, 0);
    let health = daemon.http("/health").await;
    assert!(health.starts_with("HTTP/1.1 200") && health.ends_with("serving\n"), "{health}");
    assert!(daemon.http("/nothing").await.starts_with("HTTP/1.1 404"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_socket_and_its_folder_are_private() {
    let place = Place::new();
    let _daemon = place.serve(&[]);
    let socket = std::fs::metadata(place.socket()).expect("there");
    assert!(socket.file_type().is_socket());
    assert_eq!(socket.permissions().mode() & 0o777, 0o600);
    let folder = std::fs::metadata(place.socket().parent().expect("a folder")).expect("there");
    assert_eq!(folder.permissions().mode() & 0o777, 0o700);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn reflection_describes_the_service() {
    let place = Place::new();
    let daemon = place.serve(&[]);
    let listed = ask_reflection(daemon.channel().await, MessageRequest::ListServices(String::new())).await;
    let MessageResponse::ListServicesResponse(listed) = listed else { panic!("{listed:?}") };
    let names: Vec<String> = listed.service.into_iter().map(|service| service.name).collect();
    assert!(names.iter().any(|name| name == SERVICE), "{names:?}");
    assert!(names.iter().any(|name| name == "grpc.health.v1.Health"), "{names:?}");
    let file = ask_reflection(daemon.channel().await, MessageRequest::FileContainingSymbol(SERVICE.to_owned())).await;
    let MessageResponse::FileDescriptorResponse(file) = file else { panic!("{file:?}") };
    let bytes = file.file_descriptor_proto.concat();
    for word in ["RegisterModelRequest", "SequenceStep", "log_sum_exp"] {
        assert!(bytes.windows(word.len()).any(|window| window == word.as_bytes()), "{word}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn tcp_serves_on_loopback_only() {
    let place = Place::new();
    let daemon = place.serve(&["--tcp", "127.0.0.1:0"]);
    let address = format!("http://{}", daemon.ready["tcp"].as_str().expect("an address"));
    let mut client = SluiceClient::connect(address).await.expect("connected");
    client.stats(StatsRequest {}).await.expect("served over TCP");
    drop(daemon);
    let refused = place.refused(&["--tcp", "0.0.0.0:7070"]);
    assert!(refused.contains("listen.tcp: 0.0.0.0:7070 is not a loopback address") && refused.contains("TLS"), "{refused}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn streams_that_idle_do_not_hold_up_a_drain() {
    let place = Place::new();
    // Far longer than anybody waits here: what ends the daemon is that nothing is at work.
    let mut daemon = place.serve(&["--set", "limits.drain_seconds=3600"]);
    let mut watch = watch_health(daemon.channel().await).await;
    assert_eq!(next_health(&mut watch).await, ServingStatus::Serving);
    let mut client = SluiceClient::new(daemon.channel().await);
    let (requests, receiver) = tokio::sync::mpsc::channel::<DecodeRequest>(1);
    let mut replies = client.decode(tokio_stream::wrappers::ReceiverStream::new(receiver)).await.expect("a stream").into_inner();
    requests.send(DecodeRequest::default()).await.expect("sent");
    let reply = replies.message().await.expect("a reply").expect("a reply");
    assert!(reply.results[0].error.is_some(), "a request without steps is refused in its reply");
    daemon.signal(Signal::TERM);
    let ended = replies.message().await.expect_err("the stream is ended");
    assert_eq!(ended.code(), tonic::Code::Unavailable, "{ended}");
    assert!(ended.message().contains("stopping"), "{ended}");
    assert_eq!(next_health(&mut watch).await, ServingStatus::NotServing);
    assert!(watch.message().await.expect("no failure").is_none(), "the watch ends");
    let (status, log) = daemon.ended();
    assert_eq!(status.code(), Some(0), "{log}");
    assert!(!log.contains("they are cut"), "{log}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sigterm_drains_and_exits_zero() {
    let place = Place::new();
    let mut daemon = place.serve(&["--set", "limits.drain_seconds=1"]);
    let mut watch = watch_health(daemon.channel().await).await;
    assert_eq!(next_health(&mut watch).await, ServingStatus::Serving);
    daemon.signal(Signal::TERM);
    assert_eq!(next_health(&mut watch).await, ServingStatus::NotServing, "an open stream goes on and learns of the drain");
    let begin = std::time::Instant::now();
    while channel(&place.socket()).await.is_ok() {
        assert!(begin.elapsed() < PATIENCE, "new connections are still taken");
    }
    let (status, log) = daemon.ended();
    assert_eq!(status.code(), Some(0), "{log}");
    assert!(log.contains("draining") && log.contains("stopped"), "{log}");
    assert!(!place.socket().exists(), "the socket file goes with the daemon");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sigterm_without_streams_does_not_wait_for_the_drain_budget() {
    let place = Place::new();
    let mut daemon = place.serve(&["--set", "limits.drain_seconds=3600"]);
    let idle = daemon.channel().await;
    daemon.signal(Signal::TERM);
    let (status, log) = daemon.ended();
    assert_eq!(status.code(), Some(0), "{log}");
    drop(idle);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_second_sigterm_exits_at_once() {
    let place = Place::new();
    let mut daemon = place.serve(&["--set", "limits.drain_seconds=3600"]);
    let mut watch = watch_health(daemon.channel().await).await;
    assert_eq!(next_health(&mut watch).await, ServingStatus::Serving);
    daemon.signal(Signal::TERM);
    assert_eq!(next_health(&mut watch).await, ServingStatus::NotServing);
    assert!(daemon.child.try_wait().expect("a child").is_none(), "the open stream holds the drain");
    daemon.signal(Signal::TERM);
    let (status, log) = daemon.ended();
    assert_eq!(status.code(), Some(143), "{log}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_oversized_message_is_refused_and_the_daemon_goes_on() {
    let place = Place::new();
    let daemon = place.serve(&["--set", "limits.message_bytes=64KiB"]);
    let mut client = SluiceClient::new(daemon.channel().await);
    let model = ModelSpec { name: "m".repeat(100 << 10), ..ModelSpec::default() };
    let request = RegisterModelRequest { model: Some(model), ..RegisterModelRequest::default() };
    let status = client.register_model(request).await.expect_err("too large");
    assert_eq!(status.code(), Code::OutOfRange, "{status}");
    assert!(status.message().contains("65536"), "names the bound: {status}");
    let stats = client.stats(StatsRequest {}).await.expect("the connection goes on").into_inner();
    assert_eq!(stats.models, 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stale_socket_is_replaced_and_a_live_one_is_not() {
    let place = Place::new();
    let mut daemon = place.serve(&[]);
    let refused = place.refused(&[]);
    assert!(refused.contains("another daemon serves there"), "{refused}");
    SluiceClient::new(daemon.channel().await).stats(StatsRequest {}).await.expect("the first one goes on");
    daemon.signal(Signal::KILL);
    daemon.ended();
    assert!(place.socket().exists(), "a killed daemon leaves its socket file");
    let daemon = place.serve(&[]);
    SluiceClient::new(daemon.channel().await).stats(StatsRequest {}).await.expect("the new one serves");
    drop(daemon);
    std::fs::remove_file(place.socket()).expect("removed");
    std::fs::write(place.socket(), "precious").expect("written");
    let refused = place.refused(&[]);
    assert!(refused.contains("no socket is in the way"), "{refused}");
    assert_eq!(std::fs::read_to_string(place.socket()).expect("kept"), "precious");
}

#[test]
fn a_machine_without_room_is_refused_with_the_fix() {
    let place = Place::new();
    let refused = place.refused(&["--arena-bytes", "512TiB"]);
    assert!(refused.contains("tmpfs has room for") && refused.contains("mount -o remount,size="), "{refused}");
    let disk = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("a folder");
    let refused = place.refused(&["--arena", disk.path().to_str().expect("UTF-8")]);
    assert!(refused.contains("not on a tmpfs") && refused.contains("mount -t tmpfs"), "{refused}");
    let (status, refused) = ended(&mut limited(&place.command(&[]), "ulimit -n 64").spawn().expect("starts"));
    assert!(!status.success() && refused.contains("open files") && refused.contains("ulimit"), "{refused}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_low_soft_limit_is_raised() {
    let place = Place::new();
    let mut child = limited(&place.command(&[]), "ulimit -Sn 64; ulimit -Hn 4096").spawn().expect("starts");
    let deadline = std::time::Instant::now() + PATIENCE;
    while channel(&place.socket()).await.is_err() {
        assert!(std::time::Instant::now() < deadline);
        tokio::time::sleep(std::time::Duration::from_millis(5)).await;
    }
    child.kill().expect("killed");
    child.wait().expect("reaped");
}

/// The same command under these limits of the shell.
fn limited(command: &Command, limits: &str) -> Command {
    let mut shell = Command::new("/bin/sh");
    shell.arg("-c").arg(format!("{limits}; exec \"$0\" \"$@\"")).arg(command.get_program()).args(command.get_args());
    shell.stdout(Stdio::piped()).stderr(Stdio::piped());
    shell
}
