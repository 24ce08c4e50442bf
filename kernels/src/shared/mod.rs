//! Shared memory: the files through which daemon and holders meet.
//!
//! The daemon creates every file in its arena folder. [`segment`]s hold sealed chunks, the [`board`] tells a holder where they are,
//! [`open`] slots are where a holder's chunks grow. A holder maps segments and board read-only and its open slots writable; the daemon
//! maps segments and board writable and **never maps open slots that a worker may write**, because their holder could truncate the file
//! under it: it reads them with `pread`. What a holder writes is never trusted.

pub mod board;
pub mod folder;
pub mod mapping;
pub mod open;
pub mod record;
pub mod segment;

use thiserror::Error;

use crate::bound::Bound;

/// Version of the shared layout: board words, open-slot header, planes.
pub const LAYOUT_VERSION: u32 = 2;

/// A shared file that cannot be used.
#[derive(Debug, Error)]
pub enum SharedError {
    /// The operating system refused.
    #[error("{action} {path}: {source}")]
    Io {
        /// What was attempted.
        action: &'static str,
        /// File.
        path: String,
        /// Its answer.
        source: std::io::Error,
    },
    /// A file is shorter than its layout.
    #[error("{what}: the file has {actual_bytes} bytes, its layout needs {needed_bytes}")]
    TooShort {
        /// Which file.
        what: &'static str,
        /// Bytes of the file.
        actual_bytes: u64,
        /// Bytes of the layout.
        needed_bytes: u64,
    },
    /// Another program's file, or another version's.
    #[error("{what}: layout {magic:#x} version {version}, this build reads {expected_magic:#x} version {expected_version}")]
    Layout {
        /// Which file.
        what: &'static str,
        /// Magic number found.
        magic: u64,
        /// Version found.
        version: u64,
        /// Magic number expected.
        expected_magic: u64,
        /// Version expected.
        expected_version: u64,
    },
    /// An argument out of its bound.
    #[error(transparent)]
    Bound(#[from] Bound),
}

impl SharedError {
    pub(crate) fn io(action: &'static str, path: &std::path::Path) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.display().to_string();
        move |source| Self::Io { action, path, source }
    }
}
