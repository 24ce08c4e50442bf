//! The side socket: descriptors of shared files, by SCM_RIGHTS (Unix, SOCK_SEQPACKET, one message a packet).

use std::fs::File;
use std::io::{Error as IoError, ErrorKind};
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::time::Duration;

use prost::Message;
use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendFlags, SocketAddrUnix, SocketFlags, SocketType,
};
use sluice_proto::v1::side_reply::Reply;
use sluice_proto::v1::side_request::Request;
use sluice_proto::v1::{AttachFiles, AttachHello, SegmentFiles, SegmentRequest, SideReply, SideRequest};

use crate::error::ClientError;

/// Largest message: a model shape of 1024 layers fits.
const MESSAGE_BYTES_MAX: usize = 1 << 18;
/// Most descriptors of one message.
const DESCRIPTORS_MAX: usize = 4;

/// What an attachment is given.
#[derive(Debug)]
pub(crate) struct Attached {
    pub(crate) side: SideSocket,
    pub(crate) files: AttachFiles,
    pub(crate) board: File,
    pub(crate) open: File,
}

/// One segment's files.
#[derive(Debug)]
pub(crate) struct SegmentReply {
    pub(crate) files: SegmentFiles,
    pub(crate) rows: File,
    pub(crate) labels: Option<File>,
}

/// An open connection to the side socket; it belongs to one lease.
#[derive(Debug)]
pub(crate) struct SideSocket {
    socket: OwnedFd,
    buffer: Vec<u8>,
    /// Segment that was asked for without waiting.
    asked: Option<u32>,
}

impl SideSocket {
    /// Connects and hands over the ticket; answers what the lease's files are, and the board and the open slots.
    pub(crate) fn attach(path: &str, ticket: &[u8], limit: Duration) -> Result<Attached, ClientError> {
        let failed = |action| move |source: rustix::io::Errno| ClientError::SideSocket { action, source: source.into() };
        let socket =
            rustix::net::socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None).map_err(failed("create"))?;
        set_socket_timeout(&socket, Timeout::Recv, Some(limit)).map_err(failed("set receive timeout"))?;
        set_socket_timeout(&socket, Timeout::Send, Some(limit)).map_err(failed("set send timeout"))?;
        let address = SocketAddrUnix::new(path).map_err(failed("read address"))?;
        rustix::net::connect(&socket, &address).map_err(failed("connect"))?;
        let mut side = Self { socket, buffer: vec![0; MESSAGE_BYTES_MAX], asked: None };
        let hello = Request::Hello(AttachHello { ticket: ticket.to_vec().into() });
        side.send(hello)?;
        let (reply, descriptors) = side.reply(RecvFlags::empty())?;
        let Reply::Files(files) = reply else {
            return Err(ClientError::protocol("AttachHello", "the reply names no files"));
        };
        let [board, open] = take::<2>("AttachFiles", descriptors)?;
        Ok(Attached { side, files, board, open })
    }

    /// Asks for a segment and waits for it.
    pub(crate) fn segment(&mut self, segment: u32) -> Result<SegmentReply, ClientError> {
        if let Some(asked) = self.asked.take() {
            let reply = self.segment_reply(asked, RecvFlags::empty())?;
            if asked == segment {
                return Ok(reply);
            }
        }
        self.send(Request::Segment(SegmentRequest { segment }))?;
        self.segment_reply(segment, RecvFlags::empty())
    }

    /// Asks for a segment, or looks whether the answer has come; never waits.
    pub(crate) fn poll_segment(&mut self, segment: u32) -> Result<Option<SegmentReply>, ClientError> {
        let Some(asked) = self.asked else {
            self.send(Request::Segment(SegmentRequest { segment }))?;
            self.asked = Some(segment);
            return Ok(None);
        };
        match self.segment_reply(asked, RecvFlags::DONTWAIT) {
            Err(ClientError::SideSocket { source, .. }) if source.kind() == ErrorKind::WouldBlock => Ok(None),
            other => {
                self.asked = None;
                other.map(Some)
            }
        }
    }

    fn segment_reply(&mut self, segment: u32, flags: RecvFlags) -> Result<SegmentReply, ClientError> {
        let (reply, descriptors) = self.reply(flags)?;
        let Reply::Segment(files) = reply else {
            return Err(ClientError::protocol("SegmentRequest", "the reply is of another kind"));
        };
        if files.segment != segment {
            return Err(ClientError::protocol("SegmentFiles.segment", format!("{} given, {segment} asked for", files.segment)));
        }
        if files.has_labels {
            let [rows, labels] = take::<2>("SegmentFiles", descriptors)?;
            Ok(SegmentReply { files, rows, labels: Some(labels) })
        } else {
            let [rows] = take::<1>("SegmentFiles", descriptors)?;
            Ok(SegmentReply { files, rows, labels: None })
        }
    }

    fn send(&self, request: Request) -> Result<(), ClientError> {
        let bytes = SideRequest { request: Some(request) }.encode_to_vec();
        let failed = |source: IoError| ClientError::SideSocket { action: "send", source };
        let sent = retry_interrupted(|| rustix::net::send(&self.socket, &bytes, SendFlags::NOSIGNAL)).map_err(failed)?;
        if sent == bytes.len() { Ok(()) } else { Err(failed(IoError::new(ErrorKind::WriteZero, "a packet was cut short"))) }
    }

    fn reply(&mut self, flags: RecvFlags) -> Result<(Reply, Vec<OwnedFd>), ClientError> {
        let (length, descriptors) = self.receive(flags)?;
        let reply = SideReply::decode(&self.buffer[..length]).map_err(|error| ClientError::protocol("SideReply", error.to_string()))?;
        match reply.reply {
            Some(Reply::Error(error)) => {
                Err(ClientError::Refused { call: "side socket", code: tonic::Code::from_i32(error.code), message: error.message })
            }
            Some(reply) => Ok((reply, descriptors)),
            None => Err(ClientError::protocol("SideReply", "an empty reply")),
        }
    }

    fn receive(&mut self, flags: RecvFlags) -> Result<(usize, Vec<OwnedFd>), ClientError> {
        let failed = |source: IoError| ClientError::SideSocket { action: "receive", source };
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(DESCRIPTORS_MAX))];
        let mut ancillary = RecvAncillaryBuffer::new(&mut space);
        let mut parts = [std::io::IoSliceMut::new(&mut self.buffer)];
        let socket = &self.socket;
        let received = retry_interrupted(|| rustix::net::recvmsg(socket, &mut parts, &mut ancillary, flags | RecvFlags::CMSG_CLOEXEC))
            .map_err(failed)?;
        let mut descriptors = Vec::new();
        for message in ancillary.drain() {
            if let RecvAncillaryMessage::ScmRights(rights) = message {
                descriptors.extend(rights);
            }
        }
        if received.flags.contains(ReturnFlags::TRUNC) {
            return Err(ClientError::protocol("SideReply", format!("longer than {MESSAGE_BYTES_MAX} bytes")));
        }
        if received.bytes == 0 {
            return Err(failed(IoError::new(ErrorKind::UnexpectedEof, "the daemon closed the side socket")));
        }
        Ok((received.bytes, descriptors))
    }
}

fn retry_interrupted<T>(mut call: impl FnMut() -> rustix::io::Result<T>) -> Result<T, IoError> {
    loop {
        match call() {
            Err(rustix::io::Errno::INTR) => {}
            other => return other.map_err(IoError::from),
        }
    }
}

fn take<const COUNT: usize>(what: &'static str, descriptors: Vec<OwnedFd>) -> Result<[File; COUNT], ClientError> {
    let given = descriptors.len();
    let files: Vec<File> = descriptors.into_iter().map(File::from).collect();
    files.try_into().map_err(|_| ClientError::protocol(what, format!("{given} descriptors came, {COUNT} expected")))
}
