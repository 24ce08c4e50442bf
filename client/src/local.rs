//! What the direct sessions of one process share: decoders by device, mapped segments, and the calibrations of models.

use std::collections::HashMap;
use std::fs::File;
use std::os::unix::fs::MetadataExt;
use std::sync::{Arc, Weak};

use parking_lot::Mutex;
use sluice_kernels::decoder::{Decoder, DeviceLimits};
use sluice_kernels::device::{self, DeviceKind};
use sluice_kernels::label::Calibration;
use sluice_kernels::shared::segment::{LabelSegment, Segment};

use crate::error::ClientError;

/// Device and inode: the same file as long as somebody maps it.
type FileKey = (u64, u64);

/// A decoder that sessions take turns with. A lock that nobody else holds costs no system call.
pub(crate) type SharedDecoder = Arc<Mutex<Decoder>>;

/// Shared by all direct sessions of a client.
#[derive(Default)]
pub(crate) struct Local {
    limits: DeviceLimits,
    decoders: Mutex<HashMap<(DeviceKind, usize), SharedDecoder>>,
    rows: Mutex<HashMap<FileKey, Weak<Segment>>>,
    labels: Mutex<HashMap<(FileKey, u64), Weak<LabelSegment>>>,
    /// By model.
    calibrations: Mutex<HashMap<u64, Known>>,
}

/// A calibration as a daemon has answered it. Label sets are numbered by a daemon's arena, so another boot's number proves nothing.
#[derive(Clone)]
pub(crate) struct Known {
    pub(crate) boot_epoch: u64,
    pub(crate) label_set: u64,
    pub(crate) calibration: Arc<Calibration>,
}

impl Local {
    /// Nothing yet; decoders will have these limits.
    pub(crate) fn new(limits: DeviceLimits) -> Self {
        Self { limits, ..Self::default() }
    }

    /// The decoder of a device with so many threads, opened at its first use. A GPU has one whatever the threads: a file can be registered
    /// with it once.
    pub(crate) fn decoder(&self, kind: DeviceKind, threads: usize) -> Result<SharedDecoder, ClientError> {
        let threads = if matches!(kind, DeviceKind::Cuda { .. }) { 1 } else { threads };
        let mut decoders = self.decoders.lock();
        if let Some(decoder) = decoders.get(&(kind, threads)) {
            return Ok(Arc::clone(decoder));
        }
        let decoder = Arc::new(Mutex::new(Decoder::new(device::open(kind, threads)?).with_limits(self.limits)));
        decoders.insert((kind, threads), Arc::clone(&decoder));
        Ok(decoder)
    }

    /// The calibration of a model that this boot of the daemon has answered already.
    pub(crate) fn calibration(&self, model: u64, boot_epoch: u64) -> Option<Known> {
        self.calibrations.lock().get(&model).filter(|known| known.boot_epoch == boot_epoch).cloned()
    }

    /// Remembers a model's calibration.
    pub(crate) fn keep_calibration(&self, model: u64, known: Known) {
        self.calibrations.lock().insert(model, known);
    }

    /// A segment's rows: the mapping that another session holds, or a new one.
    pub(crate) fn rows(&self, file: &File, map: impl FnOnce() -> Result<Segment, ClientError>) -> Result<Arc<Segment>, ClientError> {
        once(&mut self.rows.lock(), key(file)?, map)
    }

    /// A segment's labels of one label set.
    pub(crate) fn labels(
        &self,
        file: &File,
        label_set: u64,
        map: impl FnOnce() -> Result<LabelSegment, ClientError>,
    ) -> Result<Arc<LabelSegment>, ClientError> {
        once(&mut self.labels.lock(), (key(file)?, label_set), map)
    }
}

fn key(file: &File) -> Result<FileKey, ClientError> {
    let metadata = file.metadata().map_err(|source| ClientError::SideSocket { action: "inspect segment", source })?;
    Ok((metadata.dev(), metadata.ino()))
}

fn once<K: std::hash::Hash + Eq, M>(
    known: &mut HashMap<K, Weak<M>>,
    key: K,
    map: impl FnOnce() -> Result<M, ClientError>,
) -> Result<Arc<M>, ClientError> {
    if let Some(mapped) = known.get(&key).and_then(Weak::upgrade) {
        return Ok(mapped);
    }
    known.retain(|_, mapped| mapped.strong_count() > 0);
    let mapped = Arc::new(map()?);
    known.insert(key, Arc::downgrade(&mapped));
    Ok(mapped)
}
