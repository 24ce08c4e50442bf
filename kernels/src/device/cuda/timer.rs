//! Times on the device's own clock.

use std::sync::Arc;

use cudarc::driver::{CudaEvent, CudaStream, sys};

use super::error::{CudaError, Doing};

/// Marks on a stream, and the times between them. About half a microsecond each.
pub struct Timer {
    stream: Arc<CudaStream>,
    marks: Vec<CudaEvent>,
}

impl Timer {
    /// No marks yet.
    #[must_use]
    pub fn new(stream: &Arc<CudaStream>) -> Self {
        Self { stream: Arc::clone(stream), marks: Vec::new() }
    }

    /// Enqueues a mark.
    ///
    /// # Errors
    /// An event that the driver refuses.
    pub fn mark(&mut self) -> Result<(), CudaError> {
        let event = self.stream.record_event(Some(sys::CUevent_flags::CU_EVENT_DEFAULT)).doing("recording an event")?;
        self.marks.push(event);
        Ok(())
    }

    /// Milliseconds between neighbouring marks, after waiting for the last; the marks are forgotten.
    ///
    /// # Errors
    /// A failure of the device.
    pub fn take(&mut self) -> Result<Vec<f64>, CudaError> {
        self.stream.synchronize().doing("waiting for events")?;
        let times = self.marks.windows(2).map(|pair| pair[0].elapsed_ms(&pair[1]).map(f64::from).doing("reading events"));
        let times = times.collect::<Result<_, _>>()?;
        self.marks.clear();
        Ok(times)
    }
}
