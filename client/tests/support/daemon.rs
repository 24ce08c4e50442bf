//! The real daemon process: started, stopped, killed and started again.

use std::collections::HashMap;
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use sluice_client::{Client, ClientConfig};
use sluice_kernels::device::DeviceKind;
use tempfile::TempDir;

/// How a test wants its daemon. Everything is small, so that slots are reused soon.
#[derive(Clone, Debug)]
pub struct DaemonOptions {
    pub arena_bytes: u64,
    pub segment_bytes: u64,
    pub open_bytes: u64,
    pub device: DeviceKind,
    pub settings: Vec<(&'static str, String)>,
}

impl Default for DaemonOptions {
    fn default() -> Self {
        Self { arena_bytes: 64 << 20, segment_bytes: 4 << 20, open_bytes: 256 << 20, device: super::device(), settings: Vec::new() }
    }
}

/// A daemon process with folders of its own.
pub struct Daemon {
    child: Option<Child>,
    /// Where its metrics are.
    http: String,
    arena: TempDir,
    run: TempDir,
    options: DaemonOptions,
}

/// The binary under test: `SLUICE_BIN`, or the one beside the test executable.
fn binary() -> PathBuf {
    if let Some(path) = std::env::var_os("SLUICE_BIN") {
        return PathBuf::from(path);
    }
    let path = target_folder().join("sluice");
    assert!(path.exists(), "{} does not exist: build it with `cargo build --release -p sluice-daemon`, or set SLUICE_BIN", path.display());
    path
}

/// The folder of the profile that this test was built in.
pub fn target_folder() -> PathBuf {
    let test = std::env::current_exe().expect("path of the test executable");
    test.parent().and_then(Path::parent).expect("target/<profile>/deps").to_owned()
}

impl Daemon {
    pub fn start(options: DaemonOptions) -> Self {
        let folder = |at: &str| tempfile::Builder::new().prefix("sluice-test-").tempdir_in(at).expect("folder for the daemon");
        let mut daemon = Self { child: None, http: String::new(), arena: folder("/dev/shm"), run: folder("/tmp"), options };
        daemon.spawn();
        daemon
    }

    pub fn spawn(&mut self) {
        let mut command = Command::new(binary());
        command.arg("serve").arg("--socket").arg(self.socket()).arg("--arena").arg(self.arena_folder()).args([
            "--http",
            "127.0.0.1:0",
            "--format",
            "json",
        ]);
        command.args(["--device", &self.options.device.to_string(), "--threads", "1"]);
        let sizes = [
            ("arena.capacity_bytes", self.options.arena_bytes.to_string()),
            ("arena.segment_bytes", self.options.segment_bytes.to_string()),
            ("arena.open_bytes", self.options.open_bytes.to_string()),
            ("seal.poll_microseconds", "200".to_owned()),
            ("seal.lease_poll_milliseconds", "20".to_owned()),
        ];
        for (key, value) in sizes.into_iter().chain(self.options.settings.iter().cloned()) {
            command.arg("--set").arg(format!("{key}={value}"));
        }
        command.args(["--log", &std::env::var("SLUICE_TEST_LOG").unwrap_or_else(|_| "warn".to_owned())]);
        let mut child = command.stdout(Stdio::piped()).spawn().expect("start of the daemon");
        let mut line = String::new();
        BufReader::new(child.stdout.take().expect("piped")).read_line(&mut line).expect("what the daemon says when it is ready");
        self.child = Some(child);
        let ready: serde_json::Value = serde_json::from_str(&line).expect("a ready daemon");
        ready["ready"]["http"].as_str().expect("an address").clone_into(&mut self.http);
    }

    /// The samples of its metrics by name and labels.
    pub fn metrics(&self) -> HashMap<String, f64> {
        let mut stream = TcpStream::connect(&self.http).expect("the daemon's metrics");
        stream.write_all(b"GET /metrics HTTP/1.1\r\nhost: sluice\r\nconnection: close\r\n\r\n").expect("a request");
        let mut text = String::new();
        stream.read_to_string(&mut text).expect("UTF-8");
        let (head, body) = text.split_once("\r\n\r\n").expect("a reply");
        assert!(head.starts_with("HTTP/1.1 200"), "{head}");
        let samples = body.lines().filter(|line| !line.starts_with('#')).filter_map(|line| line.rsplit_once(' '));
        samples.map(|(name, value)| (name.to_owned(), value.parse().expect("a number"))).collect()
    }

    pub fn socket(&self) -> PathBuf {
        self.run.path().join("s.sock")
    }

    pub fn arena_folder(&self) -> PathBuf {
        self.arena.path().join("arena")
    }

    pub fn process(&self) -> Pid {
        Pid::from_child(self.child.as_ref().expect("a running daemon"))
    }

    pub fn signal(&self, signal: Signal) {
        kill_process(self.process(), signal).expect("signal to the daemon");
    }

    /// SIGKILL, and the end of the process.
    pub fn kill(&mut self) {
        if let Some(mut child) = self.child.take() {
            child.kill().expect("kill of the daemon");
            child.wait().expect("end of the daemon");
        }
    }

    /// A client with short waits.
    pub fn client(&self) -> Client {
        self.client_with(quick())
    }

    pub fn client_with(&self, config: ClientConfig) -> Client {
        let begin = Instant::now();
        loop {
            match Client::connect(&self.socket().display().to_string(), config.clone()) {
                Ok(client) => return client,
                Err(error) => assert!(begin.elapsed() < Duration::from_secs(20), "the daemon does not come up: {error}"),
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Descriptors that the daemon has open, seen from outside.
    pub fn descriptors(&self) -> Vec<String> {
        let folder = format!("/proc/{}/fd", self.process().as_raw_nonzero());
        let entries = std::fs::read_dir(folder).expect("descriptors of the daemon");
        let target = |entry: std::io::Result<std::fs::DirEntry>| std::fs::read_link(entry.ok()?.path()).ok();
        entries.filter_map(target).map(|path| path.display().to_string()).collect()
    }

    /// Names of the files of the arena folder.
    pub fn arena_files(&self) -> Vec<String> {
        let entries = std::fs::read_dir(self.arena_folder()).expect("the arena folder");
        let mut names: Vec<String> = entries.flatten().map(|entry| entry.file_name().to_string_lossy().into_owned()).collect();
        names.sort();
        names
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        if let Some(mut child) = self.child.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// Waits that suit a test.
pub fn quick() -> ClientConfig {
    ClientConfig {
        connect_timeout: Duration::from_secs(2),
        rpc_deadline: Duration::from_secs(20),
        slot_wait: Duration::from_secs(20),
        retries_max: 40,
        retry_backoff: Duration::from_millis(10),
        ..ClientConfig::default()
    }
}

/// Waits until `condition` holds.
pub fn eventually(what: &str, limit: Duration, mut condition: impl FnMut() -> bool) {
    let begin = Instant::now();
    while !condition() {
        assert!(begin.elapsed() < limit, "{what}: not within {limit:?}");
        std::thread::sleep(Duration::from_millis(5));
    }
}
