//! Pinned memory between the device and memory of callers, which is not pinned: several threads copy parts of it while the link copies others.

use std::sync::Arc;

use cudarc::driver::{CudaContext, CudaEvent, CudaStream};

use super::buffer::{DeviceBuffer, PinnedBuffer};
use super::error::{CudaError, Doing};

/// Parts under way, each copied by a thread of its own where it is large.
const PARTS: usize = 8;
/// Floats of a part, at most.
const PART: usize = 512 << 10;
/// Floats that one thread copies sooner than another could be started.
const ONE_THREAD: usize = 64 << 10;

/// Room for the parts under way.
pub struct Staging {
    context: Arc<CudaContext>,
    parts: Vec<Part>,
}

struct Part {
    room: PinnedBuffer<f32>,
    /// The last copy from or to the room.
    copied: CudaEvent,
}

impl Staging {
    /// Without room yet.
    ///
    /// # Errors
    /// An event that the driver refuses.
    pub fn new(context: &Arc<CudaContext>) -> Result<Self, CudaError> {
        let part = |_| Ok(Part { room: PinnedBuffer::zeroed(context, 0)?, copied: context.new_event(None).doing("making an event")? });
        Ok(Self { context: Arc::clone(context), parts: (0..PARTS).map(part).collect::<Result<_, CudaError>>()? })
    }

    /// Makes room for parts of so many floats.
    fn fit(&mut self, floats: usize) -> Result<(), CudaError> {
        for part in &mut self.parts {
            if part.room.len() < floats {
                part.room = PinnedBuffer::zeroed(&self.context, floats.next_power_of_two())?;
            }
        }
        Ok(())
    }

    /// Copies `values` to the beginning of a buffer. They have been read when this returns, and are there when the stream has passed this point.
    ///
    /// # Errors
    /// A copy that the driver refuses, or an earlier failure of the device.
    pub fn upload(&mut self, stream: &CudaStream, values: &[f32], to: &DeviceBuffer<f32>) -> Result<(), CudaError> {
        let each = part_of(values.len());
        self.fit(each)?;
        let work = |part: &mut Part, first: usize, values: &[f32]| -> Result<(), CudaError> {
            part.copied.synchronize().doing("waiting for a copy to the device")?;
            part.room[..values.len()].copy_from_slice(values);
            // SAFETY: the room is used again only after its event, and freeing pinned memory waits for the device.
            unsafe { to.write_async(stream, first, &part.room[..values.len()]) }?;
            part.copied.record(stream).doing("marking a copy")
        };
        for (round, values) in values.chunks(PARTS * each).enumerate() {
            let parts = self.parts.iter_mut().zip(values.chunks(each)).enumerate();
            let jobs = parts.map(|(index, (part, values))| move || work(part, (round * PARTS + index) * each, values));
            in_threads(jobs, each > ONE_THREAD)?;
        }
        Ok(())
    }

    /// Copies the beginning of a buffer into `values`, after all earlier work of the stream, and waits for it.
    ///
    /// # Errors
    /// A copy that the driver refuses, or an earlier failure of the device.
    pub fn download(&mut self, stream: &CudaStream, from: &DeviceBuffer<f32>, values: &mut [f32]) -> Result<(), CudaError> {
        let each = part_of(values.len());
        self.fit(each)?;
        for (round, values) in values.chunks_mut(PARTS * each).enumerate() {
            for (index, part) in self.parts.iter_mut().enumerate().take(values.len().div_ceil(each)) {
                let len = (values.len() - index * each).min(each);
                // SAFETY: the room is read only after its event, and freeing pinned memory waits for the device.
                unsafe { from.read_async(stream, (round * PARTS + index) * each, &mut part.room[..len]) }?;
                part.copied.record(stream).doing("marking a copy")?;
            }
            let parts = self.parts.iter().zip(values.chunks_mut(each));
            let jobs = parts.map(|(part, values)| {
                move || -> Result<(), CudaError> {
                    part.copied.synchronize().doing("waiting for results")?;
                    values.copy_from_slice(&part.room[..values.len()]);
                    Ok(())
                }
            });
            in_threads(jobs, each > ONE_THREAD)?;
        }
        Ok(())
    }
}

/// Floats of a part of `floats`.
fn part_of(floats: usize) -> usize {
    floats.div_ceil(PARTS).clamp(1, PART)
}

/// Runs all jobs, in threads of their own where that `pays`.
fn in_threads<J>(mut jobs: impl Iterator<Item = J>, pays: bool) -> Result<(), CudaError>
where
    J: FnOnce() -> Result<(), CudaError> + Send,
{
    if !pays {
        return jobs.try_for_each(|job| job());
    }
    std::thread::scope(|scope| {
        let threads: Vec<_> = jobs.map(|job| scope.spawn(job)).collect();
        threads.into_iter().try_for_each(|thread| thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
    })
}
