//! Listeners: a Unix socket with mode 0600, TCP on loopback, and connections that are counted.

use std::fs::{DirBuilder, File, OpenOptions, Permissions};
use std::io;
use std::os::unix::fs::{DirBuilderExt as _, FileTypeExt as _, MetadataExt as _, OpenOptionsExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use rustix::fs::FlockOperation;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream, UnixListener, UnixStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::server::Connected;
use tracing::warn;

use super::ServeError;

/// Wait after a failed accept (usually: no descriptor left), so that it does not spin.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// A Unix socket and the lock that proves it is ours.
#[derive(Debug)]
pub(super) struct UnixSocket {
    listener: UnixListener,
    file: SocketFile,
}

/// The socket's name in the file system, which goes with the daemon.
#[derive(Debug)]
struct SocketFile {
    path: PathBuf,
    // Held as long as the name; a socket file beside a free lock is stale.
    _lock: File,
}

impl UnixSocket {
    /// Binds `path` with mode 0600. A socket file that a dead daemon left is replaced.
    pub(super) fn bind(path: &Path) -> Result<Self, ServeError> {
        let at = |source| ServeError::Socket { path: path.to_owned(), source };
        prepare_folder(path)?;
        let lock = lock(path)?;
        match std::fs::symlink_metadata(path) {
            Ok(metadata) if metadata.file_type().is_socket() => std::fs::remove_file(path).map_err(at)?,
            Ok(_) => return Err(ServeError::NotASocket { path: path.to_owned() }),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(at(error)),
        }
        // Bound under another name first: nobody can connect before the mode is right.
        let unnamed = path.with_extension(format!("{}.new", std::process::id()));
        let listener = UnixListener::bind(&unnamed).map_err(at)?;
        std::fs::set_permissions(&unnamed, Permissions::from_mode(0o600)).map_err(at)?;
        std::fs::rename(&unnamed, path).map_err(at)?;
        Ok(Self { listener, file: SocketFile { path: path.to_owned(), _lock: lock } })
    }

    /// Connections from now on.
    pub(super) fn accept(self, room: Arc<Semaphore>) -> Accepted<UnixStream> {
        let (sender, receiver) = mpsc::channel(1);
        let Self { listener, file } = self;
        let task = tokio::spawn(async move {
            // The name goes with the task: nobody connects to a daemon that no longer accepts.
            let _file = file;
            loop {
                let accepted = listener.accept().await.map(|(stream, _)| stream);
                if !pass_on(accepted, &room, &sender).await {
                    return;
                }
            }
        });
        Accepted { stream: ReceiverStream::new(receiver), stop: task.abort_handle() }
    }
}

/// Connections of a TCP listener.
pub(super) fn accept_tcp(listener: TcpListener, room: Arc<Semaphore>) -> Accepted<TcpStream> {
    let (sender, receiver) = mpsc::channel(1);
    let task = tokio::spawn(async move {
        loop {
            let accepted = listener.accept().await.and_then(|(stream, _)| stream.set_nodelay(true).map(|()| stream));
            if !pass_on(accepted, &room, &sender).await {
                return;
            }
        }
    });
    Accepted { stream: ReceiverStream::new(receiver), stop: task.abort_handle() }
}

/// Accepted connections, and the way to accept no more.
pub(super) struct Accepted<T> {
    /// The connections.
    pub(super) stream: ReceiverStream<io::Result<Counted<T>>>,
    /// Closes the listener.
    pub(super) stop: tokio::task::AbortHandle,
}

/// Says whether there is anybody left to pass connections to.
async fn pass_on<T>(accepted: io::Result<T>, room: &Arc<Semaphore>, sender: &mpsc::Sender<io::Result<Counted<T>>>) -> bool {
    match accepted {
        Ok(stream) => match Arc::clone(room).try_acquire_owned() {
            Ok(place) => sender.send(Ok(Counted { stream, _place: place })).await.is_ok(),
            Err(_) => {
                warn!("connection closed at once: limits.connections are open");
                true
            }
        },
        Err(error) => {
            warn!(%error, "accept failed");
            tokio::time::sleep(ACCEPT_PAUSE).await;
            true
        }
    }
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        if let Err(error) = std::fs::remove_file(&self.path) {
            warn!(path = %self.path.display(), %error, "socket file not removed");
        }
    }
}

fn prepare_folder(path: &Path) -> Result<(), ServeError> {
    let folder = path.parent().unwrap_or(Path::new("/"));
    let at = |source| ServeError::Socket { path: path.to_owned(), source };
    DirBuilder::new().recursive(true).mode(0o700).create(folder).map_err(at)?;
    let owner = std::fs::metadata(folder).map_err(at)?.uid();
    let user = rustix::process::geteuid().as_raw();
    if owner == user || owner == 0 { Ok(()) } else { Err(ServeError::ForeignFolder { folder: folder.to_owned(), owner, user }) }
}

fn lock(path: &Path) -> Result<File, ServeError> {
    let mut name = path.as_os_str().to_owned();
    name.push(".lock");
    let at = |source| ServeError::Socket { path: path.to_owned(), source };
    let file = OpenOptions::new().read(true).write(true).create(true).truncate(false).mode(0o600).open(name).map_err(at)?;
    match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(file),
        Err(rustix::io::Errno::WOULDBLOCK) => Err(ServeError::AlreadyServed { path: path.to_owned() }),
        Err(error) => Err(at(error.into())),
    }
}

/// A connection that takes one of the places of `limits.connections`.
pub(super) struct Counted<T> {
    stream: T,
    _place: OwnedSemaphorePermit,
}

impl<T: Connected> Connected for Counted<T> {
    type ConnectInfo = T::ConnectInfo;

    fn connect_info(&self) -> T::ConnectInfo {
        self.stream.connect_info()
    }
}

impl<T: AsyncRead + Unpin> AsyncRead for Counted<T> {
    fn poll_read(mut self: Pin<&mut Self>, context: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(context, buffer)
    }
}

impl<T: AsyncWrite + Unpin> AsyncWrite for Counted<T> {
    fn poll_write(mut self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(context, bytes)
    }

    fn poll_write_vectored(mut self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[io::IoSlice<'_>]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(context, bytes)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}
