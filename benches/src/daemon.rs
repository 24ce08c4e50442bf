//! A daemon of one's own: started for a run, with a private arena and socket, stopped and cleaned up after it.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail, ensure};
use rustix::process::{Pid, Signal, kill_process};
use sluice_client::{Client, ClientConfig};
use sluice_kernels::device::DeviceKind;
use tempfile::TempDir;

/// What the daemon of a run must be able to hold.
#[derive(Clone, Debug)]
pub struct DaemonSpec {
    /// Its binary; none: `sluice` beside the running binary.
    pub binary: Option<PathBuf>,
    /// Folder on a tmpfs in which the arena folder is made.
    pub arena_parent: PathBuf,
    /// Bytes of rows of sealed chunks.
    pub arena_bytes: u64,
    /// Bytes of labels beside them; only checked against the free memory.
    pub label_bytes: u64,
    /// Bytes of open slots.
    pub open_bytes: u64,
    /// Tokens of the longest sequence.
    pub sequence_tokens: u64,
    /// Bytes of the largest message.
    pub message_bytes: u64,
    /// Device of the daemon's decoder.
    pub device: DeviceKind,
    /// Its threads.
    pub threads: usize,
}

/// A running daemon. Dropping it kills it.
#[derive(Debug)]
pub struct LocalDaemon {
    child: Child,
    sockets: TempDir,
    arena: TempDir,
}

/// Longest wait for a daemon to serve, and for it to end.
const PATIENCE: Duration = Duration::from_secs(60);

impl LocalDaemon {
    /// Starts a daemon and waits until it serves.
    ///
    /// # Errors
    /// No binary, too little free memory, or a daemon that ends or does not serve within a minute.
    pub fn start(spec: &DaemonSpec) -> Result<Self> {
        let binary = find_binary(spec.binary.as_deref())?;
        check_memory(spec)?;
        let sockets = tempfile::Builder::new().prefix("sluice-bench-").tempdir().context("folder for the sockets")?;
        let arena = tempfile::Builder::new().prefix("sluice-bench-").tempdir_in(&spec.arena_parent);
        let arena = arena.with_context(|| format!("arena folder in {}", spec.arena_parent.display()))?;
        // An empty file, so that the machine's own configuration does not decide what is measured.
        let config = sockets.path().join("sluice.toml");
        std::fs::write(&config, "").with_context(|| format!("write {}", config.display()))?;
        let mut command = Command::new(&binary);
        for (key, _) in std::env::vars_os().filter(|(key, _)| key.to_string_lossy().starts_with("SLUICE__")) {
            command.env_remove(key);
        }
        command.arg("serve").arg("--config").arg(&config).arg("--socket").arg(sockets.path().join("sluice.sock"));
        command.arg("--arena").arg(arena.path()).args(["--tcp", "off", "--http", "off", "--log", "warn"]);
        command.args(["--arena-bytes", &spec.arena_bytes.to_string(), "--device", &spec.device.to_string()]);
        command.args(["--threads", &spec.threads.to_string()]);
        for (key, value) in [
            ("arena.open_bytes", spec.open_bytes),
            ("limits.sequence_tokens", spec.sequence_tokens),
            ("limits.message_bytes", spec.message_bytes),
            ("seal.threads", spec.threads.min(2) as u64),
        ] {
            command.arg("--set").arg(format!("{key}={value}"));
        }
        let child = command.stdin(Stdio::null()).stdout(Stdio::null()).spawn();
        let child = child.with_context(|| format!("start {}", binary.display()))?;
        let mut daemon = Self { child, sockets, arena };
        daemon.wait_until_it_serves()?;
        Ok(daemon)
    }

    fn wait_until_it_serves(&mut self) -> Result<()> {
        let (begin, socket) = (Instant::now(), self.socket());
        let endpoint = socket.to_str().ok_or_else(|| anyhow!("{}: not UTF-8", socket.display()))?;
        let mut last = anyhow!("no socket");
        while begin.elapsed() < PATIENCE {
            if let Some(status) = self.child.try_wait()? {
                bail!("the daemon ended at its start: {status}");
            }
            if socket.exists() {
                match Client::connect(endpoint, ClientConfig::default()).and_then(|client| client.stats()) {
                    Ok(_) => return Ok(()),
                    Err(error) => last = error.into(),
                }
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        Err(last.context("the daemon does not serve"))
    }

    /// Its gRPC socket.
    #[must_use]
    pub fn socket(&self) -> PathBuf {
        self.sockets.path().join("sluice.sock")
    }

    /// Its arena folder.
    #[must_use]
    pub fn arena(&self) -> &Path {
        self.arena.path()
    }

    /// Its process.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Asks it to end (SIGTERM) and waits.
    ///
    /// # Errors
    /// It does not end within a minute, or ends with a failure.
    pub fn stop(mut self) -> Result<()> {
        let pid = i32::try_from(self.child.id()).ok().and_then(Pid::from_raw).ok_or_else(|| anyhow!("the daemon has no process id"))?;
        kill_process(pid, Signal::TERM).context("SIGTERM to the daemon")?;
        let begin = Instant::now();
        loop {
            if let Some(status) = self.child.try_wait()? {
                ensure!(status.success(), "the daemon ended with {status}");
                return Ok(());
            }
            ensure!(begin.elapsed() < PATIENCE, "the daemon did not end within {PATIENCE:?} of SIGTERM");
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

impl Drop for LocalDaemon {
    fn drop(&mut self) {
        // After `stop` both do nothing; otherwise something failed already and is reported.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Anonymous resident memory of a process, in bytes: `RssAnon` of /proc. Shared memory, such as rows and labels, is not part of it.
///
/// # Errors
/// The process is gone.
pub fn rss_anon_bytes(pid: u32) -> Result<u64> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).with_context(|| format!("status of process {pid}"))?;
    let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:"));
    let kib = line.and_then(|line| line.trim().strip_suffix(" kB")).and_then(|count| count.trim().parse::<u64>().ok());
    kib.map(|kib| kib * 1024).ok_or_else(|| anyhow!("process {pid}: no RssAnon in its status"))
}

fn find_binary(given: Option<&Path>) -> Result<PathBuf> {
    if let Some(given) = given {
        ensure!(given.is_file(), "--sluice-bin: {} is not a file", given.display());
        return Ok(given.to_owned());
    }
    let own = std::env::current_exe().context("path of this binary")?;
    let beside = own.with_file_name("sluice");
    ensure!(
        beside.is_file(),
        "{} is not there: build it (cargo build --release), or name it with --sluice-bin or SLUICE_BIN",
        beside.display()
    );
    Ok(beside)
}

fn check_memory(spec: &DaemonSpec) -> Result<()> {
    let parent = &spec.arena_parent;
    let stat = rustix::fs::statvfs(parent).with_context(|| format!("free memory of {}", parent.display()))?;
    let (free, needed) = (stat.f_bavail * stat.f_frsize, spec.arena_bytes + spec.label_bytes + spec.open_bytes);
    ensure!(
        free >= needed,
        "{}: {} MiB free, {} MiB needed (arena, labels and open slots); ask for a smaller --context, or give a larger tmpfs with --arena-parent",
        parent.display(),
        free >> 20,
        needed >> 20
    );
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn anonymous_memory_grows_with_the_heap_and_not_with_shared_memory() {
        let before = rss_anon_bytes(std::process::id()).expect("own status");
        let held = vec![1_u8; 64 << 20];
        let after = rss_anon_bytes(std::process::id()).expect("own status");
        assert!(after >= before + (60 << 20), "{before} {after}");
        assert_eq!(held.iter().step_by(4096).map(|&byte| u64::from(byte)).sum::<u64>(), 64 << 8);
        assert!(rss_anon_bytes(u32::MAX).is_err());
    }

    #[test]
    fn what_cannot_work_is_refused_before_anything_starts() {
        let spec = DaemonSpec {
            binary: Some("/nowhere/sluice".into()),
            arena_parent: "/dev/shm".into(),
            arena_bytes: 1 << 60,
            label_bytes: 0,
            open_bytes: 0,
            sequence_tokens: 1024,
            message_bytes: 1 << 26,
            device: DeviceKind::Cpu,
            threads: 1,
        };
        let error = LocalDaemon::start(&spec).expect_err("no such binary").to_string();
        assert!(error.contains("--sluice-bin: /nowhere/sluice"), "{error}");
        let error = LocalDaemon::start(&DaemonSpec { binary: Some("/proc/self/exe".into()), ..spec }).expect_err("too large").to_string();
        assert!(error.contains("MiB needed"), "{error}");
    }
}
