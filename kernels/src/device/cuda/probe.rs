//! What the device's memory and the link allow.

use std::sync::Arc;

use bytemuck::{Pod, Zeroable};
use cudarc::driver::CudaStream;

use super::buffer::{DeviceBuffer, copy};
use super::compile::Compiler;
use super::error::{CudaError, Doing};
use super::host::HostRows;
use super::module::{Grid, Kernel, Module, Source, Specialisation};
use super::open::Gpu;
use crate::shape::RowType;

const THREADS: usize = 512;

/// The job of probe.cu.
#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
pub(super) struct ReadJob {
    from: u64,
    sink: u64,
    pieces: u64,
}

/// Reads and copies of plain memory.
pub struct Probe {
    read: Kernel,
    sink: DeviceBuffer<u32>,
    processors: usize,
}

impl Probe {
    /// Compiles the probe.
    ///
    /// # Errors
    /// What the compiler or the driver says.
    pub fn new(gpu: &Gpu, compiler: &Compiler) -> Result<Self, CudaError> {
        // The probe knows no rows; the options are those that its header needs.
        let rows = Specialisation { head_dim: 64, row_type: RowType::F16, group: 1, plan: None, replays_trace: false };
        let module = Module::load(gpu, compiler, Source::Probe, &rows)?;
        let read = module.kernel("read_all", 0)?;
        Ok(Self { read, sink: DeviceBuffer::uninitialised(&gpu.context, 1)?, processors: gpu.processors as usize })
    }

    /// Enqueues a read of every byte of device memory at `address`.
    ///
    /// # Safety
    /// The range is readable by the device until the stream has passed this point.
    ///
    /// # Errors
    /// A launch that the driver refuses.
    pub unsafe fn read_range(&self, stream: &CudaStream, address: u64, bytes: u64) -> Result<(), CudaError> {
        let job = ReadJob { from: address, sink: self.sink.address(), pieces: bytes / 16 };
        // SAFETY: the caller's promise.
        unsafe { self.read.launch(stream, Grid { blocks: [self.processors * 4, 1, 1], threads: THREADS }, &job) }
    }

    /// Enqueues a read of every byte of a buffer.
    ///
    /// # Errors
    /// A launch that the driver refuses.
    pub fn read(&self, stream: &CudaStream, buffer: &DeviceBuffer<u8>) -> Result<(), CudaError> {
        // SAFETY: freeing a buffer waits for the device.
        unsafe { self.read_range(stream, buffer.address(), buffer.bytes() as u64) }
    }

    /// Enqueues a read of part `part` of `parts` of a buffer, which are equally long but for less than 16 bytes each.
    ///
    /// # Errors
    /// A launch that the driver refuses.
    pub fn read_part(&self, stream: &CudaStream, buffer: &DeviceBuffer<u8>, part: usize, parts: usize) -> Result<(), CudaError> {
        assert!(part < parts, "part {part} of {parts}");
        let bytes = buffer.bytes() / parts / 16 * 16;
        // SAFETY: freeing a buffer waits for the device.
        unsafe { self.read_range(stream, buffer.address_of(part * bytes), bytes as u64) }
    }

    /// Enqueues copies of a host plane's pieces to a buffer, one after the other from its beginning, as far as they fit.
    ///
    /// # Errors
    /// A copy that the driver refuses.
    pub fn copy_plane(stream: &Arc<CudaStream>, to: &DeviceBuffer<u8>, host: &HostRows, plane: usize) -> Result<u64, CudaError> {
        let mut done = 0;
        for (from, bytes) in host.pieces(plane) {
            let bytes = bytes.min(to.bytes() as u64 - done);
            // SAFETY: the piece is registered while `host` lives, which its owner keeps past the stream; freeing the buffer waits.
            unsafe { copy(stream, to.address() + done, from, bytes)? };
            done += bytes;
        }
        stream.synchronize().doing("copying across the link")?;
        Ok(done)
    }

    /// Copies the beginning of device memory over all pieces of all planes of `host`, which is registered for writing, and waits. The rows
    /// there are gone then.
    ///
    /// # Errors
    /// Memory that the device does not have, or a copy that the driver refuses.
    pub fn copy_to_host(stream: &Arc<CudaStream>, from: &DeviceBuffer<u8>, host: &HostRows, planes: usize) -> Result<u64, CudaError> {
        let mut done = 0;
        for (to, bytes) in (0..planes).flat_map(|plane| host.pieces(plane)) {
            let bytes = bytes.min(from.bytes() as u64);
            // SAFETY: the piece is registered while `host` lives and the buffer is borrowed, both until the stream has been waited for.
            unsafe { copy(stream, to, from.address(), bytes)? };
            done += bytes;
        }
        stream.synchronize().doing("copying across the link")?;
        Ok(done)
    }
}
