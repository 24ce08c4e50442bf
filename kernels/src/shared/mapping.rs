//! A bounds-checked shared mapping of a file.

use std::fs::File;
use std::ops::Range;
use std::sync::atomic::AtomicU64;

use memmap2::{MmapOptions, MmapRaw};

use crate::shared::SharedError;

/// Bytes of a page of the operating system, and the alignment of everything in shared files.
pub const PAGE_BYTES: u64 = 4096;

/// A mapping shared with other processes.
///
/// Contract of the readers: [`Mapping::bytes`] hands out plain slices of memory that another process can write. That is sound only because
/// the protocol above publishes a range (board, committed words: release and acquire) before anyone reads it, and nobody writes a published
/// range again until its readers are gone (slot reuse after completed steps). A holder that breaks the protocol in its own open slots
/// damages its own results only: the daemon does not map them.
pub struct Mapping {
    raw: MmapRaw,
    writable: bool,
}

impl std::fmt::Debug for Mapping {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Mapping").field("len", &self.raw.len()).field("writable", &self.writable).finish()
    }
}

impl Mapping {
    /// Maps the first `bytes` of a file for reading; a store through it would fault.
    ///
    /// # Errors
    /// The file is shorter than `bytes`, or cannot be mapped.
    pub fn read_only(what: &'static str, file: &File, bytes: u64) -> Result<Self, SharedError> {
        check_length(what, file, bytes)?;
        let raw = MmapOptions::new().len(bytes as usize).map_raw_read_only(file);
        let raw = raw.map_err(|source| SharedError::Io { action: "map read-only", path: what.to_owned(), source })?;
        Ok(Self { raw, writable: false })
    }

    /// Maps the first `bytes` of a file for reading and writing.
    ///
    /// # Errors
    /// The file is shorter than `bytes`, or cannot be mapped.
    pub fn writable(what: &'static str, file: &File, bytes: u64) -> Result<Self, SharedError> {
        check_length(what, file, bytes)?;
        let raw = MmapOptions::new().len(bytes as usize).map_raw(file);
        let raw = raw.map_err(|source| SharedError::Io { action: "map writable", path: what.to_owned(), source })?;
        Ok(Self { raw, writable: true })
    }

    /// Bytes mapped.
    #[must_use]
    pub fn len(&self) -> usize {
        self.raw.len()
    }

    /// First byte, to register with a device.
    pub(crate) fn address(&self) -> *const u8 {
        self.raw.as_ptr()
    }

    /// Never: an empty file is not mapped.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Asks for huge pages, where the operating system allows them for shared memory.
    pub fn advise_huge_pages(&self) {
        // Advice only: where it is refused (LIMITS.md says where), small pages serve.
        let _ = self.raw.advise(memmap2::Advice::HugePage);
    }

    /// Published bytes of the mapping; see the contract on [`Mapping`].
    #[must_use]
    #[inline]
    pub fn bytes(&self, range: Range<usize>) -> &[u8] {
        assert!(range.start <= range.end && range.end <= self.len(), "{range:?} outside a mapping of {} bytes", self.len());
        // SAFETY: the range lies in the mapping, which lives as long as `self`; by the contract above nobody writes it meanwhile.
        unsafe { std::slice::from_raw_parts(self.raw.as_ptr().add(range.start), range.end - range.start) }
    }

    /// Copies bytes into a part of the mapping that is not published yet.
    ///
    /// # Panics
    /// Outside the mapping, or when it is read-only: both are errors of the caller.
    #[inline]
    pub fn write(&self, offset: usize, bytes: &[u8]) {
        assert!(self.writable, "write through a read-only mapping");
        assert!(offset <= self.len() && bytes.len() <= self.len() - offset, "{} bytes at {offset} outside {}", bytes.len(), self.len());
        // SAFETY: the target lies in the writable mapping, and by the contract no slice of an unpublished range is alive, so they do not overlap.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), self.raw.as_mut_ptr().add(offset), bytes.len()) }
    }

    /// An unpublished part of the mapping to fill in place, e.g. by `pread`.
    ///
    /// # Panics
    /// Outside the mapping, or when it is read-only.
    pub fn fill<R>(&self, range: Range<usize>, fill: impl FnOnce(&mut [u8]) -> R) -> R {
        assert!(self.writable, "fill through a read-only mapping");
        assert!(range.start <= range.end && range.end <= self.len(), "{range:?} outside a mapping of {} bytes", self.len());
        // SAFETY: the range lies in the writable mapping; it is unpublished and owned by the caller (one slot, one filler), so no other
        // slice of it is alive in this process, and no other process touches a slot that no table names.
        fill(unsafe { std::slice::from_raw_parts_mut(self.raw.as_mut_ptr().add(range.start), range.end - range.start) })
    }

    /// The 64-bit word at word index `index`. Only loads are allowed through a read-only mapping.
    #[must_use]
    #[inline]
    pub fn word(&self, index: usize) -> &AtomicU64 {
        assert!((index + 1) * 8 <= self.len(), "word {index} outside a mapping of {} bytes", self.len());
        // SAFETY: mappings start at a page, so the word is aligned and inside; every access to words, in every process, is atomic.
        unsafe { &*self.raw.as_ptr().cast::<AtomicU64>().add(index) }
    }

    /// Maps every page now, with `threads` threads, so that no step takes a page fault.
    pub fn populate(&self, threads: usize) {
        let pages = self.len().div_ceil(PAGE_BYTES as usize);
        let share = pages.div_ceil(threads.max(1)).max(1);
        std::thread::scope(|scope| {
            for first in (0..pages).step_by(share) {
                scope.spawn(move || {
                    for page in first..(first + share).min(pages) {
                        // An atomic load touches the page without claiming anything about its content.
                        let _ = self.word(page * (PAGE_BYTES as usize / 8)).load(std::sync::atomic::Ordering::Relaxed);
                    }
                });
            }
        });
    }
}

fn check_length(what: &'static str, file: &File, bytes: u64) -> Result<(), SharedError> {
    let metadata = file.metadata().map_err(|source| SharedError::Io { action: "inspect", path: what.to_owned(), source })?;
    if bytes == 0 || metadata.len() < bytes {
        return Err(SharedError::TooShort { what, actual_bytes: metadata.len(), needed_bytes: bytes.max(1) });
    }
    Ok(())
}

/// Rounds up to a whole page.
#[must_use]
pub fn page_align(bytes: u64) -> u64 {
    bytes.next_multiple_of(PAGE_BYTES)
}
