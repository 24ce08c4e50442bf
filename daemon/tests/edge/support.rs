//! A real `sluice serve` process and gRPC clients of it.

use std::io::{BufRead as _, BufReader, Read as _};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use hyper_util::rt::TokioIo;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use tempfile::TempDir;
use tokio::net::UnixStream;
use tonic::transport::{Channel, Endpoint};

/// Longest wait for anything that a daemon should do at once.
pub(crate) const PATIENCE: Duration = Duration::from_secs(20);

/// A folder on tmpfs for the arena, and the sockets in it.
pub(crate) struct Place {
    folder: TempDir,
}

impl Place {
    pub(crate) fn new() -> Self {
        Self { folder: tempfile::Builder::new().prefix("sluice-edge-").tempdir_in("/dev/shm").expect("a folder in /dev/shm") }
    }

    pub(crate) fn socket(&self) -> PathBuf {
        self.folder.path().join("run/sluice.sock")
    }

    pub(crate) fn arena(&self) -> PathBuf {
        self.folder.path().join("arena")
    }

    /// `sluice serve` here, with a small arena; `more` flags win.
    pub(crate) fn command(&self, more: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_sluice"));
        command.env_clear().args(["serve", "--format", "json", "--set", "listen.http=127.0.0.1:0", "--set", "arena.capacity_bytes=64MiB"]);
        command.args(["--set", "arena.segment_bytes=8MiB", "--set", "arena.open_bytes=64MiB", "--set", "limits.sequences=32"]);
        command.arg("--socket").arg(self.socket());
        command.arg("--set").arg(format!("arena.folder={}", self.folder.path().join("arena").display()));
        command.args(more).stdout(Stdio::piped()).stderr(Stdio::piped());
        command
    }

    /// Starts it and waits until it is ready.
    pub(crate) fn serve(&self, more: &[&str]) -> Daemon {
        let mut child = self.command(more).spawn().expect("the binary starts");
        let mut line = String::new();
        BufReader::new(child.stdout.take().expect("piped")).read_line(&mut line).expect("a line");
        let Ok(ready) = serde_json::from_str::<Value>(&line) else {
            panic!("not ready: {line:?}, {}", log_of(&mut child));
        };
        Daemon { child, ready: ready["ready"].clone(), socket: self.socket() }
    }

    /// Starts one that refuses to serve; gives what it says.
    pub(crate) fn refused(&self, more: &[&str]) -> String {
        let mut child = self.command(more).spawn().expect("the binary starts");
        let (status, log) = ended(&mut child);
        assert!(!status.success(), "{log}");
        log
    }
}

/// A ready daemon; killed when the test is done with it.
pub(crate) struct Daemon {
    pub(crate) child: Child,
    /// Its ready line.
    pub(crate) ready: Value,
    socket: PathBuf,
}

impl Daemon {
    pub(crate) async fn channel(&self) -> Channel {
        channel(&self.socket).await.expect("it answers")
    }

    pub(crate) fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.child), signal).expect("the process exists");
    }

    /// Waits for the end of the process; gives its status and its log.
    pub(crate) fn ended(&mut self) -> (ExitStatus, String) {
        ended(&mut self.child)
    }

    /// The text at `path` of its HTTP endpoint, with the status line.
    pub(crate) async fn http(&self, path: &str) -> String {
        use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
        let address = self.ready["http"].as_str().expect("an address");
        let mut stream = tokio::net::TcpStream::connect(address).await.expect("connected");
        let request = format!("GET {path} HTTP/1.1\r\nhost: sluice\r\nconnection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).await.expect("sent");
        let mut text = String::new();
        stream.read_to_string(&mut text).await.expect("UTF-8");
        text
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        // It may have ended already, which is what most tests want.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

pub(crate) async fn channel(socket: &Path) -> Result<Channel, tonic::transport::Error> {
    let socket = socket.to_owned();
    let connector = tower::service_fn(move |_| {
        let socket = socket.clone();
        async move { UnixStream::connect(socket).await.map(TokioIo::new) }
    });
    Endpoint::from_static("http://sluice.local").connect_with_connector(connector).await
}

/// Waits for the end of a process; gives its status and its log.
pub(crate) fn ended(child: &mut Child) -> (ExitStatus, String) {
    let deadline = Instant::now() + PATIENCE;
    while Instant::now() < deadline {
        if let Some(status) = child.try_wait().expect("a child of this process") {
            return (status, log_of(child));
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    child.kill().expect("killed");
    panic!("still running after {PATIENCE:?}: {}", log_of(child));
}

fn log_of(child: &mut Child) -> String {
    let mut log = String::new();
    if let Some(mut stderr) = child.stderr.take() {
        stderr.read_to_string(&mut log).expect("UTF-8");
    }
    log
}
