//! How long the device takes.

use anyhow::Result;
use sluice_kernels::device::cuda::timer::Timer;

/// Milliseconds of what `work` puts on the timer's stream.
pub(super) fn timed(timer: &mut Timer, work: impl FnOnce() -> Result<()>) -> Result<f64> {
    timer.mark()?;
    work()?;
    timer.mark()?;
    Ok(timer.take()?[0])
}
