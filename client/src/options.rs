//! How a sequence is opened and attached.

use std::ops::Range;

use sluice_kernels::budget::Settings;
use sluice_kernels::device::DeviceKind;
use sluice_kernels::label::LabelPlan;

/// How a session reaches its rows. The results of both ways are equal to the bit on the same device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Attach {
    /// Everything by gRPC: the daemon's decoder performs the steps.
    Stream,
    /// Shared memory: this process performs the steps, without the daemon (same machine, Unix socket).
    Direct {
        /// Device of this process.
        device: DeviceKind,
        /// Compute threads of the device, the caller's own included. One thread: no system call in a step.
        threads: usize,
    },
}

/// Calibration from the first prompt: the session accumulates q and k of its steps and sets the calibration when it has seen enough.
#[derive(Clone, Debug)]
pub struct OnlineCalibration {
    /// The label plan of the calibration.
    pub plan: LabelPlan,
    /// Tokens to accumulate, at least 1.
    pub tokens: usize,
}

/// Options of [`crate::Client::open`], [`crate::Client::resume`] and of every fork of the session.
#[derive(Clone, Debug)]
pub struct OpenOptions {
    /// The way to attach.
    pub attach: Attach,
    /// Settings of steps; `None`: the daemon's defaults.
    pub settings: Option<Settings>,
    /// Further key parts of the prefix: adapter, image digests. At most 16 of at most 256 bytes.
    pub extra_keys: Vec<Vec<u8>>,
    /// Growing chunks that may be unsealed, 2 to 4096; 0: the daemon's default. A run may have `(open_slots - 1) * 256 + 1` tokens.
    pub open_slots: u32,
    /// Lanes of every layer that this session writes and attends (direct only); `None`: all.
    pub lanes: Option<Range<u16>>,
    /// Hot rows that a lane keeps (direct only; in Stream it is the daemon's configuration); 0: none on the CPU, three times the rows of a
    /// step on a GPU.
    pub hot_rows: usize,
    /// Calibration from the first prompt, for a model that has none.
    pub calibrate: Option<OnlineCalibration>,
}

impl Default for OpenOptions {
    fn default() -> Self {
        Self { attach: Attach::Stream, settings: None, extra_keys: Vec::new(), open_slots: 0, lanes: None, hot_rows: 0, calibrate: None }
    }
}
