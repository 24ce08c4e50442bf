//! Proof that a holder's process is alive or dead: a pidfd, and the start time that tells a reused pid apart.

use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, pidfd_open};
use serde::{Deserialize, Serialize};

/// Who a process is, in a form that survives the daemon.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessId {
    /// Process id.
    pub pid: i32,
    /// Start time in clock ticks since boot, field 22 of `/proc/<pid>/stat`.
    pub start_ticks: u64,
}

/// A process that holds a lease.
#[derive(Debug)]
pub struct Process {
    /// Who it is.
    pub id: ProcessId,
    pidfd: OwnedFd,
}

impl Process {
    /// Takes hold of a running process of user `uid`.
    ///
    /// # Errors
    /// Why it cannot hold a lease.
    pub fn open(pid: i32, uid: u32) -> Result<Self, &'static str> {
        let handle = Pid::from_raw(pid).ok_or("is not a process id")?;
        let pidfd = pidfd_open(handle, PidfdFlags::empty()).map_err(|_| "does not exist")?;
        let owner = std::fs::metadata(format!("/proc/{pid}")).map_err(|_| "does not exist")?.uid();
        if owner != uid {
            return Err("belongs to another user");
        }
        let start_ticks = start_ticks(pid).ok_or("does not exist")?;
        let process = Self { id: ProcessId { pid, start_ticks }, pidfd };
        if process.is_dead() { Err("has ended") } else { Ok(process) }
    }

    /// Finds a process again after a daemon restart; `None` is the proof that it has ended.
    #[must_use]
    pub fn reopen(id: ProcessId) -> Option<Self> {
        // The pidfd comes first: it pins the pid, so that the start time read next belongs to the process it refers to.
        let pidfd = pidfd_open(Pid::from_raw(id.pid)?, PidfdFlags::empty()).ok()?;
        let process = Self { id, pidfd };
        (start_ticks(id.pid)? == id.start_ticks && !process.is_dead()).then_some(process)
    }

    /// Whether the process has ended.
    #[must_use]
    pub fn is_dead(&self) -> bool {
        let mut fds = [PollFd::new(&self.pidfd, PollFlags::IN)];
        let now = Timespec { tv_sec: 0, tv_nsec: 0 };
        matches!(poll(&mut fds, Some(&now)), Ok(1))
    }
}

fn start_ticks(pid: i32) -> Option<u64> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The command name may contain anything, so fields are counted behind its last parenthesis; field 3 follows it.
    let (_, fields) = stat.rsplit_once(')')?;
    fields.split_ascii_whitespace().nth(19)?.parse().ok()
}

/// The boot id of this machine: shared memory does not survive a change of it.
#[must_use]
pub fn boot_id() -> String {
    let id = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
    id.trim().to_owned()
}
