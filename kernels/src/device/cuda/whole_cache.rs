//! Exact attention over rows that do not fit the device: a layer's rows are copied to one of two buffers while the other is attended.

use std::sync::Arc;

use cudarc::driver::{CudaEvent, CudaStream};

use super::batch::Batch;
use super::buffer::copy;
use super::error::{CudaError, Doing};
use super::host::HostRows;
use super::open::Gpu;

/// A batch of two layers, which are the two buffers, and the copies into them.
pub struct DoubleBuffer {
    batch: Batch,
    host: Arc<HostRows>,
    copies: Arc<CudaStream>,
    copied: [CudaEvent; 2],
    attended: [CudaEvent; 2],
}

impl DoubleBuffer {
    /// `batch` has two layers whose tail has room for all rows of `host` in a layer.
    ///
    /// # Errors
    /// Too little room; streams or events that the driver refuses.
    pub fn new(gpu: &Gpu, batch: Batch, host: Arc<HostRows>) -> Result<Self, CudaError> {
        assert_eq!(batch.layers(), 2, "two buffers");
        let tail = batch.seat(0).map_or(0, |seat| seat.shape().tail_chunks);
        let room = (tail * batch.shape().geometry.page_bytes()) as u64;
        let bytes = host.pieces(0).iter().map(|piece| piece.1).sum();
        if bytes > room {
            return Err(CudaError::Bound { field: "bytes of a layer", value: bytes, low: 0, high: room });
        }
        let event = || gpu.context.new_event(None).doing("making an event");
        let copies = gpu.context.new_stream().doing("making a stream")?;
        Ok(Self { batch, host, copies, copied: [event()?, event()?], attended: [event()?, event()?] })
    }

    /// The batch.
    #[must_use]
    pub fn batch(&mut self) -> &mut Batch {
        &mut self.batch
    }

    /// Enqueues the copy of the rows of `layers` layers and the attention over them, overlapped.
    ///
    /// # Errors
    /// A copy or launch that the driver refuses.
    pub fn enqueue(&self, layers: usize) -> Result<(), CudaError> {
        for event in &self.attended {
            event.record(self.batch.stream()).doing("recording an event")?;
        }
        for layer in 0..layers {
            let buffer = layer % 2;
            self.copies.wait(&self.attended[buffer]).doing("waiting for a buffer")?;
            let Some(mut to) = self.batch.seat(0).map(|seat| seat.tail_address(buffer)) else { return Ok(()) };
            for (from, bytes) in self.host.pieces(layer) {
                // SAFETY: the pieces are registered while `host` lives, fit the buffer (checked in `new`), and it is not being attended.
                unsafe { copy(&self.copies, to, from, bytes)? };
                to += bytes;
            }
            self.copied[buffer].record(&self.copies).doing("recording an event")?;
            self.batch.stream().wait(&self.copied[buffer]).doing("waiting for a copy")?;
            self.batch.enqueue_dense_layer(buffer, 0..1)?;
            self.attended[buffer].record(self.batch.stream()).doing("recording an event")?;
        }
        Ok(())
    }
}
