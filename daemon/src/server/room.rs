//! Is there room? Checked before anything is made, so that the daemon does not die of a full tmpfs hours later.

use std::fs::DirBuilder;
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _};
use std::path::Path;

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use thiserror::Error;
use tracing::info;

use crate::config::{ByteCount, Config};

/// `f_type` of a tmpfs.
const TMPFS_MAGIC: u64 = 0x0102_1994;

/// Descriptors beside those of segments, sequences and connections: journal, sockets, event queues, logs.
const OTHER_DESCRIPTORS: u64 = 64;

/// A machine that does not fit the configuration, and what to do about it.
#[derive(Debug, Error)]
pub enum RoomError {
    /// The folder cannot be used.
    #[error("arena.folder {folder}: {source}")]
    Folder {
        /// The folder.
        folder: String,
        /// What the system said.
        source: std::io::Error,
    },
    /// Disk instead of memory.
    #[error(
        "arena.folder {folder} is not on a tmpfs; name a folder in /dev/shm, or mount one: mount -t tmpfs -o size={size} tmpfs {folder}"
    )]
    NotTmpfs {
        /// The folder.
        folder: String,
        /// Size that fits.
        size: u64,
    },
    /// The tmpfs is too small.
    #[error(
        "arena.folder {folder}: the tmpfs has room for {room}, {needed} are configured (arena.capacity_bytes + arena.open_bytes + labels); lower them, or enlarge it: mount -o remount,size={size} {mount} (in a container: --shm-size)"
    )]
    TmpfsTooSmall {
        /// The folder.
        folder: String,
        /// Free bytes and those that the arena has already.
        room: ByteCount,
        /// Bytes needed.
        needed: ByteCount,
        /// Size that fits.
        size: u64,
        /// Where the tmpfs is mounted.
        mount: String,
    },
    /// The machine has too little memory.
    #[error("memory: {room} are available ({source_of_limit}), {needed} are configured; lower arena.capacity_bytes and arena.open_bytes")]
    Memory {
        /// Bytes available.
        room: ByteCount,
        /// Bytes needed.
        needed: ByteCount,
        /// Who says so.
        source_of_limit: &'static str,
    },
    /// A resource limit is too low.
    #[error("rlimit {name}: at most {limit}, {needed} are needed; {fix}")]
    Limit {
        /// Which.
        name: &'static str,
        /// Its hard limit.
        limit: u64,
        /// Value needed.
        needed: u64,
        /// What to do.
        fix: String,
    },
}

/// Checks memory, tmpfs and resource limits; raises soft limits where the hard limit allows it.
pub(super) fn check(config: &Config) -> Result<(), RoomError> {
    let engine = &config.engine;
    let folder = &engine.arena_dir;
    let at = |source| RoomError::Folder { folder: folder.display().to_string(), source };
    DirBuilder::new().recursive(true).mode(0o700).create(folder).map_err(at)?;
    // The large label plan takes 1/16 of a 16-bit row.
    let needed = engine.arena_bytes + engine.arena_bytes / 16 + engine.open_bytes_max;
    let held = folder_bytes(folder).map_err(at)?;
    check_tmpfs(folder, needed, held)?;
    for (source_of_limit, available) in [("MemAvailable", memory_available()), ("cgroup memory.max", cgroup_available())] {
        let Some(available) = available else { continue };
        if available + held < needed {
            return Err(RoomError::Memory { room: ByteCount(available + held), needed: ByteCount(needed), source_of_limit });
        }
    }
    check_limits(config)
}

fn check_tmpfs(folder: &Path, needed: u64, held: u64) -> Result<(), RoomError> {
    let at = |source: rustix::io::Errno| RoomError::Folder { folder: folder.display().to_string(), source: source.into() };
    let shown = folder.display().to_string();
    if rustix::fs::statfs(folder).map_err(at)?.f_type as u64 != TMPFS_MAGIC {
        return Err(RoomError::NotTmpfs { folder: shown, size: needed });
    }
    let stat = rustix::fs::statvfs(folder).map_err(at)?;
    let free = stat.f_bavail * stat.f_frsize;
    // A tmpfs without a size limit counts no blocks.
    if stat.f_blocks == 0 || free + held >= needed {
        return Ok(());
    }
    let used = (stat.f_blocks - stat.f_bavail) * stat.f_frsize;
    let size = used.saturating_sub(held) + needed;
    let (room, needed) = (ByteCount(free + held), ByteCount(needed));
    Err(RoomError::TmpfsTooSmall { folder: shown, room, needed, size, mount: mount_of(folder) })
}

fn check_limits(config: &Config) -> Result<(), RoomError> {
    let engine = &config.engine;
    let segments = engine.arena_bytes.div_ceil(engine.segment_bytes);
    // A sequence: open slots, board, pidfd. A segment: rows and labels.
    let descriptors = 3 * engine.max_sequences as u64
        + 2 * segments
        + config.grpc.connections as u64
        + engine.side_connections_max as u64
        + OTHER_DESCRIPTORS;
    raise(Resource::Nofile, "open files (-n)", descriptors)?;
    raise(Resource::Fsize, "file size (-f, counted in blocks)", engine.segment_bytes)?;
    raise(Resource::As, "virtual memory (-v, counted in KiB)", engine.arena_bytes + engine.arena_bytes / 16 + (1 << 30))
}

fn raise(resource: Resource, name: &'static str, needed: u64) -> Result<(), RoomError> {
    let fits = |limit: Option<u64>| limit.is_none_or(|limit| limit >= needed);
    let Rlimit { current, maximum } = getrlimit(resource);
    if fits(current) {
        return Ok(());
    }
    let fix = || "raise it (ulimit, or Limit... in the systemd unit), or lower limits.sequences and arena.capacity_bytes".to_owned();
    if !fits(maximum) || setrlimit(resource, Rlimit { current: Some(needed), maximum }).is_err() {
        return Err(RoomError::Limit { name, limit: maximum.unwrap_or(u64::MAX), needed, fix: fix() });
    }
    info!(name, from = current, to = needed, "soft limit raised");
    Ok(())
}

/// Bytes that the files of an earlier daemon hold already.
pub(super) fn folder_bytes(folder: &Path) -> std::io::Result<u64> {
    let mut bytes = 0;
    for entry in std::fs::read_dir(folder)? {
        bytes += entry?.metadata()?.blocks() * 512;
    }
    Ok(bytes)
}

fn mount_of(folder: &Path) -> String {
    let device = |path: &Path| std::fs::metadata(path).map(|metadata| metadata.dev()).ok();
    let here = device(folder);
    let mount = folder.ancestors().take_while(|ancestor| device(ancestor) == here).last();
    mount.unwrap_or(folder).display().to_string()
}

fn memory_available() -> Option<u64> {
    let meminfo = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    Some(line.trim().strip_suffix(" kB")?.trim().parse::<u64>().ok()? << 10)
}

fn cgroup_available() -> Option<u64> {
    let read = |name: &str| std::fs::read_to_string(Path::new("/sys/fs/cgroup").join(name)).ok()?.trim().parse::<u64>().ok();
    Some(read("memory.max")?.saturating_sub(read("memory.current")?))
}
