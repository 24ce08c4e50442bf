//! How much of a device's memory steps may use, and what is in use.

use std::sync::Arc;

use parking_lot::Mutex;

use crate::device::cuda::CudaError;
use crate::device::cuda::seat::DeviceBytes;

/// Bounds of a decoder's device memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DeviceLimits {
    /// Bytes of the device that sequences and steps may take; 0: nine tenths of what is free at the first use.
    pub device_bytes: u64,
    /// Hot rows of a lane; 0: three times as many as a lane selects. Always at least as many as it selects.
    pub hot_rows: usize,
}

/// Device memory in use, by what it is for.
#[derive(Debug)]
pub(super) struct Ledger {
    limit: u64,
    used: Mutex<DeviceBytes>,
}

impl Ledger {
    pub(super) fn new(limit: u64) -> Arc<Self> {
        Arc::new(Self { limit, used: Mutex::new(DeviceBytes::default()) })
    }

    /// What is in use.
    pub(super) fn used(&self) -> DeviceBytes {
        *self.used.lock()
    }

    /// Admits `bytes`, until the charge is dropped.
    ///
    /// # Errors
    /// More than the limit leaves.
    pub(super) fn charge(self: &Arc<Self>, bytes: DeviceBytes) -> Result<Charge, CudaError> {
        let mut used = self.used.lock();
        if used.total() + bytes.total() > self.limit {
            return Err(CudaError::Budget { wanted: bytes.total(), used: used.total(), limit: self.limit });
        }
        *used += bytes;
        Ok(Charge { ledger: Arc::clone(self), bytes })
    }
}

/// Admitted bytes.
#[derive(Debug)]
pub(super) struct Charge {
    ledger: Arc<Ledger>,
    bytes: DeviceBytes,
}

impl Drop for Charge {
    fn drop(&mut self) {
        *self.ledger.used.lock() -= self.bytes;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_are_admitted_up_to_the_limit_and_given_back() {
        let ledger = Ledger::new(100);
        let bytes = |labels, tail| DeviceBytes { labels, tail, ..DeviceBytes::default() };
        let first = ledger.charge(bytes(40, 20)).expect("room");
        let error = ledger.charge(bytes(41, 0)).expect_err("too much");
        assert!(matches!(error, CudaError::Budget { wanted: 41, used: 60, limit: 100 }), "{error}");
        let second = ledger.charge(bytes(40, 0)).expect("exactly the rest");
        assert_eq!(ledger.used(), bytes(80, 20));
        drop(first);
        assert_eq!(ledger.used(), bytes(40, 0));
        drop(second);
        assert_eq!(ledger.used().total(), 0);
    }
}
