//! Spare files of open slots: allocated ahead by a thread of low priority, so that an Open or a fork does not wait until its memory is zeroed.
//!
//! A spare is nothing but zeros: whichever sequence takes it renames it and writes the header. The journal knows none of them; a daemon that
//! stops deletes them, and what a killed one leaves is deleted at the next start.

use std::collections::VecDeque;
use std::fs::File;
use std::path::{Path, PathBuf};

use sluice_kernels::shared::SharedError;
use sluice_kernels::shared::folder::{create_allocated, open_writable};

use crate::engine::error::EngineError;
use crate::engine::model::Folder;
use crate::engine::state::Engine;
use crate::seal::{Job, SpareJob};

/// Name of the thread that makes spares.
pub(crate) const THREAD: &str = "sluice-spares";

/// Lets every other thread go first: an Open that finds no spare makes its own file, so nothing waits for this thread, and zeroing memory
/// beside an Open would only slow that down.
pub(crate) fn step_back() {
    if let Err(error) = rustix::process::setpriority_process(Some(rustix::thread::gettid()), 19) {
        tracing::debug!(%error, "the thread of spare files keeps its priority");
    }
}

/// A file that waits for its sequence.
#[derive(Debug)]
struct Spare {
    path: PathBuf,
    bytes: u64,
}

/// Spare files, ready ones in the order they were made, and those in the making.
#[derive(Debug, Default)]
pub(crate) struct Spares {
    ready: VecDeque<Spare>,
    /// Sizes in the making.
    making: Vec<u64>,
    next: u64,
}

impl Spares {
    /// Bytes of all of them.
    pub(crate) fn bytes(&self) -> u64 {
        self.ready.iter().map(|spare| spare.bytes).chain(self.making.iter().copied()).sum()
    }

    fn count(&self) -> usize {
        self.ready.len() + self.making.len()
    }

    fn has(&self, bytes: u64) -> bool {
        self.making.contains(&bytes) || self.ready.iter().any(|spare| spare.bytes == bytes)
    }

    /// Deletes the oldest ready one of another size than `kept`; `false` without one.
    fn drop_oldest(&mut self, kept: Option<u64>) -> bool {
        let Some(at) = self.ready.iter().position(|spare| Some(spare.bytes) != kept) else { return false };
        if let Some(spare) = self.ready.remove(at) {
            delete(&spare.path);
        }
        true
    }
}

impl Engine {
    /// A zeroed file of `bytes` at `path`: a spare when there is one, a new one otherwise.
    ///
    /// # Errors
    /// The arena folder has no room.
    pub(crate) fn open_slot_file(&mut self, path: &Path, bytes: u64) -> Result<File, EngineError> {
        while let Some(at) = self.spares.ready.iter().position(|spare| spare.bytes == bytes) {
            let Some(spare) = self.spares.ready.remove(at) else { break };
            match std::fs::rename(&spare.path, path) {
                Ok(()) => return Ok(open_writable(path)?),
                Err(error) => {
                    tracing::warn!(path = %spare.path.display(), %error, "a spare file of open slots is lost");
                    delete(&spare.path);
                }
            }
        }
        Ok(create_allocated(path, bytes, 1)?)
    }

    /// Has spares of the size that was wanted last made, as far as their number and the bytes of open slots allow.
    pub(crate) fn plan_spares(&mut self, bytes: u64) {
        let most = self.config.spare_files;
        if most == 0 {
            return;
        }
        loop {
            if self.spares.count() >= most && (self.spares.has(bytes) || !self.spares.drop_oldest(Some(bytes))) {
                return;
            }
            if self.open_bytes() + self.spares.bytes() + bytes > self.config.open_bytes_max {
                return;
            }
            let path = self.folder.spare(self.spares.next);
            self.spares.next += 1;
            self.spares.making.push(bytes);
            self.planned.push_back(Job::Spare(SpareJob { path, bytes }));
        }
    }

    /// Takes up a spare that its thread has made.
    pub(crate) fn spare_made(&mut self, job: SpareJob, made: Result<(), SharedError>) {
        if let Some(at) = self.spares.making.iter().position(|&bytes| bytes == job.bytes) {
            self.spares.making.swap_remove(at);
        }
        match made {
            Ok(()) => {
                self.spares.ready.push_back(Spare { path: job.path, bytes: job.bytes });
                // An Open may have been promised its bytes meanwhile, or the last model may have gone.
                self.spare_bytes_for(0);
                if self.models.is_empty() {
                    self.drop_spares();
                }
            }
            Err(error) => tracing::warn!(%error, bytes = job.bytes, "cannot make a spare file of open slots"),
        }
    }

    /// Gives up the ready spares: a model is gone, and other models' next Opens have their own made again.
    pub(crate) fn drop_spares(&mut self) {
        while self.spares.drop_oldest(None) {}
    }

    /// Gives up spares until `bytes` more fit into the open slots' share of memory, or none is left; a spare of just that size stays, because
    /// it will be taken.
    pub(crate) fn spare_bytes_for(&mut self, bytes: u64) {
        let taken = if self.spares.ready.iter().any(|spare| spare.bytes == bytes) { bytes } else { 0 };
        while self.open_bytes() + self.spares.bytes() + bytes - taken > self.config.open_bytes_max {
            if !self.spares.drop_oldest(Some(bytes)) && !self.spares.drop_oldest(None) {
                return;
            }
        }
    }
}

/// Deletes every spare of an engine that has stopped, those included that were in the making.
pub(crate) fn delete_all(folder: &Folder) {
    let Ok(entries) = std::fs::read_dir(folder.path()) else { return };
    for path in entries.flatten().map(|entry| entry.path()) {
        if path.file_name().and_then(|name| name.to_str()).is_some_and(|name| name.starts_with("spare-")) {
            delete(&path);
        }
    }
}

/// Deletes a file that no journal names.
fn delete(path: &Path) {
    if let Err(error) = std::fs::remove_file(path) {
        tracing::warn!(path = %path.display(), %error, "cannot delete a spare file of open slots");
    }
}
