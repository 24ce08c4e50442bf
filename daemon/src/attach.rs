//! The side socket: hands descriptors of shared files to direct workers (Unix, `SOCK_SEQPACKET`, `SCM_RIGHTS`).
//!
//! One thread serves all connections and waits for none: a worker that does not read its answers is cut off.

use std::collections::HashMap;
use std::fs::File;
use std::io::IoSlice;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use prost::Message;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::{
    AddressFamily, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketAddrUnix, SocketFlags, SocketType,
};
use sluice_kernels::slot::SlotClass;
use sluice_proto::v1;
use sluice_proto::v1::side_reply::Reply;
use sluice_proto::v1::side_request::Request;

use crate::engine::command::{HolderFiles, HolderSegment, LeaseKey, Peer};
use crate::engine::{EngineError, EngineHandle, EngineState};
use crate::status::wire;

/// Largest request: a ticket or a segment number.
const REQUEST_BYTES_MAX: usize = 1024;
/// Connections that wait to be accepted.
const BACKLOG: i32 = 64;
/// How often the thread looks whether the engine still serves.
const LOOK: Timespec = Timespec { tv_sec: 0, tv_nsec: 200_000_000 };

/// A connection; it belongs to one lease once a ticket was redeemed.
struct Connection {
    socket: OwnedFd,
    lease: Option<LeaseKey>,
}

/// Binds the side socket with mode 0600 and serves it until the engine stops.
///
/// # Errors
/// The socket cannot be made.
pub fn start(engine: EngineHandle) -> Result<(), EngineError> {
    let path = engine.config().side_socket.clone();
    let listener = listen(&path)
        .map_err(|error| EngineError::invalid("side_socket", format!("{}: {error}", path.display()), "paths that can be bound"))?;
    let most = engine.config().side_connections_max;
    let mut server = SideServer { engine, listener, connections: HashMap::new(), most };
    let spawned = std::thread::Builder::new().name("sluice-side".to_owned()).spawn(move || {
        server.run();
        // The name goes with the thread: nobody connects to a daemon that no longer answers.
        let _ = std::fs::remove_file(&path);
    });
    spawned.map(|_| ()).map_err(|error| EngineError::Internal(format!("start the side socket thread: {error}")))
}

fn listen(path: &Path) -> std::io::Result<OwnedFd> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let listener = rustix::net::socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)?;
    // Bound under another name first: nobody can connect before the mode is right. The arena folder's lock has shown that we are alone.
    let unnamed = path.with_extension(format!("{}.new", std::process::id()));
    let _ = std::fs::remove_file(&unnamed);
    rustix::net::bind(&listener, &SocketAddrUnix::new(&unnamed)?)?;
    std::fs::set_permissions(&unnamed, std::fs::Permissions::from_mode(0o600))?;
    rustix::net::listen(&listener, BACKLOG)?;
    std::fs::rename(&unnamed, path)?;
    Ok(listener)
}

struct SideServer {
    engine: EngineHandle,
    listener: OwnedFd,
    connections: HashMap<RawFd, Connection>,
    most: usize,
}

impl SideServer {
    fn run(&mut self) {
        let state = self.engine.state();
        while *state.borrow() == EngineState::Ready {
            for ready in self.wait() {
                if ready == self.listener.as_raw_fd() {
                    self.accept();
                } else if !self.serve(ready) {
                    self.connections.remove(&ready);
                }
            }
        }
    }

    /// Descriptors with something to read.
    fn wait(&self) -> Vec<RawFd> {
        let sockets = self.connections.values().map(|connection| connection.socket.as_fd());
        let mut polled: Vec<PollFd<'_>> =
            std::iter::once(self.listener.as_fd()).chain(sockets).map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN)).collect();
        if poll(&mut polled, Some(&LOOK)).is_err() {
            return Vec::new();
        }
        polled.iter().filter(|polled| !polled.revents().is_empty()).map(|polled| polled.as_fd().as_raw_fd()).collect()
    }

    fn accept(&mut self) {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let Ok(socket) = rustix::net::accept_with(&self.listener, flags) else { return };
        if self.connections.len() >= self.most {
            tracing::warn!(most = self.most, "side connection closed at once: side_connections_max are open");
            return;
        }
        self.connections.insert(socket.as_raw_fd(), Connection { socket, lease: None });
    }

    /// Answers one request; `false` ends the connection.
    fn serve(&mut self, descriptor: RawFd) -> bool {
        let Some(connection) = self.connections.get_mut(&descriptor) else { return false };
        let mut buffer = [0; REQUEST_BYTES_MAX];
        let length = match rustix::net::recv(&connection.socket, &mut buffer, RecvFlags::TRUNC) {
            Ok((_, length)) => length,
            Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => return true,
            Err(_) => return false,
        };
        if length == 0 {
            return false;
        }
        let request = buffer.get(..length).and_then(|bytes| v1::SideRequest::decode(bytes).ok()).and_then(|request| request.request);
        let answered = match request {
            Some(Request::Hello(hello)) => hello_reply(&self.engine, connection, &hello.ticket),
            Some(Request::Segment(request)) => segment_reply(&self.engine, connection.lease, request.segment),
            None => Err(EngineError::invalid("request", format!("{length} bytes"), "a SideRequest of at most 1024 bytes")),
        };
        let (reply, files) = match answered {
            Ok((reply, files)) => (reply, files),
            Err(error) => (Reply::Error(wire(error.refusal(), error.to_string())), Vec::new()),
        };
        send(&connection.socket, reply, &files)
    }
}

type Answer = Result<(Reply, Vec<File>), EngineError>;

fn hello_reply(engine: &EngineHandle, connection: &mut Connection, ticket: &[u8]) -> Answer {
    let bound = "16 bytes";
    let ticket = ticket.try_into().map_err(|_| EngineError::invalid("ticket", format!("{} bytes", ticket.len()), bound))?;
    let peer = rustix::net::sockopt::socket_peercred(&connection.socket);
    let peer = peer.map_err(|error| EngineError::Internal(format!("read the peer's credentials: {error}")))?;
    let peer = Peer::Local { pid: peer.pid.as_raw_nonzero().get(), uid: peer.uid.as_raw() };
    let HolderFiles { lease, board, open, shape, open_slots, table_chunks, committed, writer, .. } =
        engine.redeem_blocking(ticket, peer)?;
    connection.lease = Some(lease);
    let shape_json = serde_json::to_string(&*shape).map_err(|error| EngineError::Internal(error.to_string()))?;
    let boot_epoch = engine.boot_epoch();
    let reply = v1::AttachFiles { boot_epoch, shape_json, open_slots, table_chunks, committed_tokens: committed, writer };
    Ok((Reply::Files(reply), vec![board, open]))
}

fn segment_reply(engine: &EngineHandle, lease: Option<LeaseKey>, segment: u32) -> Answer {
    let needed = "send AttachHello first";
    let lease = lease.ok_or(EngineError::State { what: "connection", id: 0, state: "without a lease".to_owned(), needed })?;
    let HolderSegment { id, slots, class, rows, labels } = engine.segment_blocking(lease, segment)?;
    let window_class = class == SlotClass::Window;
    let label_set = labels.as_ref().map_or(0, |(label_set, _)| *label_set);
    let reply = v1::SegmentFiles { segment: id, slots, window_class, has_labels: labels.is_some(), label_set };
    let files = std::iter::once(rows).chain(labels.map(|(_, file)| file)).collect();
    Ok((Reply::Segment(reply), files))
}

/// Sends one packet; `false` when it does not go out at once and whole.
fn send(socket: &OwnedFd, reply: Reply, files: &[File]) -> bool {
    let bytes = v1::SideReply { reply: Some(reply) }.encode_to_vec();
    let descriptors: Vec<BorrowedFd<'_>> = files.iter().map(AsFd::as_fd).collect();
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(2))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !descriptors.is_empty() && !control.push(SendAncillaryMessage::ScmRights(&descriptors)) {
        return false;
    }
    let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
    matches!(rustix::net::sendmsg(socket, &[IoSlice::new(&bytes)], &mut control, flags), Ok(sent) if sent == bytes.len())
}
