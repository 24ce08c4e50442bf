//! Copies across the link on streams of their own, beside the kernels of another.

use std::sync::Arc;

use cudarc::driver::{CudaContext, CudaEvent, CudaStream, sys};

use super::buffer::copy;
use super::error::{CudaError, Doing};

/// Streams of copies: while one ends its copies the other begins the next.
const STREAMS: usize = 2;
/// The first driver that takes many copies in one call.
const TOGETHER_FROM: i32 = 13_000;

/// A copy between device memory and pinned host memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Copy {
    pub(super) to: u64,
    pub(super) from: u64,
    pub(super) bytes: usize,
}

/// How copies are handed to the driver.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Calls {
    /// Many at a time: each of 512 copies of 1 MiB takes 3.5 us longer where they are enqueued one by one, on one stream or on three.
    Together,
    OneByOne,
}

/// The streams.
pub(super) struct Copies {
    streams: Vec<Arc<CudaStream>>,
    calls: Calls,
    turn: usize,
}

/// A point that all streams pass.
pub(super) struct Copied {
    events: Vec<CudaEvent>,
}

impl Copies {
    /// Streams without work.
    pub(super) fn new(context: &Arc<CudaContext>) -> Result<Self, CudaError> {
        let mut version = 0;
        // SAFETY: `version` outlives the call.
        unsafe { sys::cuDriverGetVersion(&raw mut version) }.result().doing("asking for the driver's version")?;
        let calls = if version >= TOGETHER_FROM { Calls::Together } else { Calls::OneByOne };
        let streams = (0..STREAMS).map(|_| context.new_stream().doing("making a stream"));
        Ok(Self { streams: streams.collect::<Result<_, _>>()?, calls, turn: 0 })
    }

    /// Later copies wait for `event`.
    pub(super) fn follow(&self, event: &CudaEvent) -> Result<(), CudaError> {
        self.streams.iter().try_for_each(|stream| stream.wait(event).doing("waiting for a kernel"))
    }

    /// Enqueues copies that may run in any order.
    ///
    /// # Safety
    /// Both sides of every copy are valid until they have been waited for, and nobody else uses what is written.
    ///
    /// # Errors
    /// A copy that the driver refuses.
    pub(super) unsafe fn enqueue(&mut self, copies: &[Copy]) -> Result<(), CudaError> {
        if self.calls == Calls::Together && copies.len() > 1 {
            // SAFETY: the caller's promise.
            return unsafe { together(self.next(), copies) };
        }
        for one in copies {
            // SAFETY: the caller's promise.
            unsafe { copy(self.next(), one.to, one.from, one.bytes as u64) }?;
        }
        Ok(())
    }

    /// The stream of what comes next.
    pub(super) fn next(&mut self) -> &Arc<CudaStream> {
        self.turn += 1;
        &self.streams[self.turn % self.streams.len()]
    }

    /// A point that no stream has passed yet, to be marked again and again.
    pub(super) fn point(&self) -> Result<Copied, CudaError> {
        let event = |stream: &Arc<CudaStream>| stream.context().new_event(None).doing("making an event");
        Ok(Copied { events: self.streams.iter().map(event).collect::<Result<_, _>>()? })
    }

    /// Puts `point` behind all copies so far.
    pub(super) fn mark(&self, point: &Copied) -> Result<(), CudaError> {
        let mut pairs = point.events.iter().zip(&self.streams);
        pairs.try_for_each(|(event, stream)| event.record(stream).doing("marking copies"))
    }

    /// Waits for all copies, where nobody can be told of a failure: the next call tells.
    pub(super) fn settle(&self) {
        self.streams.iter().for_each(|stream| stream.context().record_err(stream.synchronize()));
    }

    /// Waits for all copies.
    pub(super) fn wait(&self) -> Result<(), CudaError> {
        self.streams.iter().try_for_each(|stream| stream.synchronize().doing("waiting for copies"))
    }
}

impl Drop for Copies {
    /// What copies are on their way to stays until they are done. A failure of the device is told by the next call.
    fn drop(&mut self) {
        self.settle();
    }
}

impl Copied {
    /// `stream` goes on when the copies before the point are done.
    pub(super) fn wait_on(&self, stream: &CudaStream) -> Result<(), CudaError> {
        self.events.iter().try_for_each(|event| stream.wait(event).doing("waiting for copies"))
    }
}

/// All copies in one call.
unsafe fn together(stream: &CudaStream, copies: &[Copy]) -> Result<(), CudaError> {
    let mut to: Vec<u64> = copies.iter().map(|copy| copy.to).collect();
    let mut from: Vec<u64> = copies.iter().map(|copy| copy.from).collect();
    let mut bytes: Vec<usize> = copies.iter().map(|copy| copy.bytes).collect();
    let anywhere = sys::CUmemLocation { type_: sys::CUmemLocationType::CU_MEM_LOCATION_TYPE_INVALID, id: 0 };
    let mut attributes = sys::CUmemcpyAttributes {
        srcAccessOrder: sys::CUmemcpySrcAccessOrder::CU_MEMCPY_SRC_ACCESS_ORDER_STREAM,
        srcLocHint: anywhere,
        dstLocHint: anywhere,
        flags: 0,
    };
    let mut first_of_attributes = 0;
    stream.context().bind_to_thread().doing("entering the context")?;
    // SAFETY: the lists have as many entries as said and outlive the call, which copies them; the ranges are the caller's promise.
    let result = unsafe {
        sys::cuMemcpyBatchAsync_v2(
            to.as_mut_ptr(),
            from.as_mut_ptr(),
            bytes.as_mut_ptr(),
            copies.len(),
            &raw mut attributes,
            &raw mut first_of_attributes,
            1,
            stream.cu_stream(),
        )
    };
    result.result().doing("copying across the link")
}
