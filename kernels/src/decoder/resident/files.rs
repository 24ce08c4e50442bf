//! Files with rows that this process has registered with the device, by the numbers that kernels know them by.

use std::sync::{Arc, Weak};

use crate::device::cuda::batch::MAX_SEGMENTS;
use crate::device::cuda::buffer::HostAccess;
use crate::device::cuda::host::{HostFile, HostSegment};
use crate::device::cuda::{CudaError, Gpu};

/// Registered files; a number is free again when nobody holds its file.
#[derive(Default)]
pub(super) struct Files {
    known: Vec<Weak<HostSegment>>,
}

impl Files {
    /// Files that somebody holds, by their numbers.
    pub(super) fn known(&self) -> Vec<(usize, Arc<HostSegment>)> {
        self.known.iter().enumerate().filter_map(|(number, segment)| Some((number, segment.upgrade()?))).collect()
    }

    /// The number of a file, which is registered at its first use. Registering takes long (LIMITS.md), so callers do it between steps.
    ///
    /// # Errors
    /// A registration that the driver refuses, or more files than kernels have numbers for.
    pub(super) fn number(&mut self, gpu: &Gpu, file: &HostFile) -> Result<(usize, Arc<HostSegment>), CudaError> {
        if let Some(found) = self.known().into_iter().find(|(_, segment)| segment.file().is_same(file)) {
            return Ok(found);
        }
        let free = self.known.iter().position(|segment| segment.strong_count() == 0).unwrap_or(self.known.len());
        if free == MAX_SEGMENTS {
            return Err(CudaError::Bound { field: "registered files", value: free as u64 + 1, low: 0, high: MAX_SEGMENTS as u64 });
        }
        // Rows are written by the processor; the device only reads them.
        let segment = Arc::new(HostSegment::register(gpu, file.clone(), HostAccess::Read)?);
        let known = Arc::downgrade(&segment);
        if free == self.known.len() {
            self.known.push(known);
        } else {
            self.known[free] = known;
        }
        Ok((free, segment))
    }
}
