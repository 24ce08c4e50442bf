//! Creating files in the arena folder: tmpfs, mode 0600, allocated before use.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use rustix::fs::FallocateFlags;

use crate::shared::SharedError;

/// Creates a file of `bytes` with mode 0600 and allocates all of it, with `threads` threads: a full tmpfs is an error here, never a
/// SIGBUS at a later touch. The new file reads as zeros.
///
/// # Errors
/// It exists already, or the file system has no room.
pub fn create_allocated(path: &Path, bytes: u64, threads: usize) -> Result<File, SharedError> {
    let file = OpenOptions::new().read(true).write(true).create_new(true).mode(0o600).open(path);
    let file = file.map_err(SharedError::io("create", path))?;
    let allocated = allocate(&file, bytes, threads.max(1) as u64);
    if let Err(source) = allocated {
        // The half-made file must not stay behind and hold memory.
        let _ = std::fs::remove_file(path);
        return Err(SharedError::io("allocate", path)(source));
    }
    Ok(file)
}

/// Opens an existing file for reading and writing.
///
/// # Errors
/// It cannot be opened.
pub fn open_writable(path: &Path) -> Result<File, SharedError> {
    OpenOptions::new().read(true).write(true).open(path).map_err(SharedError::io("open", path))
}

/// Opens an existing file for reading only: the descriptor to hand to a holder.
///
/// # Errors
/// It cannot be opened.
pub fn open_read_only(path: &Path) -> Result<File, SharedError> {
    File::open(path).map_err(SharedError::io("open read-only", path))
}

fn allocate(file: &File, bytes: u64, threads: u64) -> std::io::Result<()> {
    file.set_len(bytes)?;
    let share = bytes.div_ceil(threads).next_multiple_of(1 << 21);
    if bytes <= share {
        return Ok(rustix::fs::fallocate(file, FallocateFlags::empty(), 0, bytes)?);
    }
    std::thread::scope(|scope| {
        let parts = (0..bytes).step_by(share as usize).map(|first| {
            let length = share.min(bytes - first);
            scope.spawn(move || rustix::fs::fallocate(file, FallocateFlags::empty(), first, length))
        });
        let parts: Vec<_> = parts.collect();
        for part in parts {
            part.join().map_err(|_| std::io::Error::other("allocation thread panicked"))??;
        }
        Ok(())
    })
}
