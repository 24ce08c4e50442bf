//! Labels on the device: the pages of a chunk in every layer, taken from slabs, and held by every seat that has the chunk.

use std::any::Any;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use cudarc::driver::CudaStream;
use parking_lot::Mutex;

use super::buffer::DeviceBuffer;
use super::error::CudaError;
use super::open::Gpu;

/// What a slab consists of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SlabShape {
    /// Layers.
    pub layers: usize,
    /// Chunks that there is room for.
    pub chunks: usize,
    /// Bytes of a chunk's labels in a layer: `lanes x 256 x label_bytes`.
    pub page_bytes: usize,
}

impl SlabShape {
    /// From a layer's labels to the next layer's of the same chunk, in bytes.
    #[must_use]
    pub fn layer_bytes(&self) -> u64 {
        (self.chunks * self.page_bytes) as u64
    }

    /// Bytes of a slab.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.layers as u64 * self.layer_bytes()
    }
}

/// Device memory for the labels of some chunks, `[layer][chunk]`.
#[derive(Debug)]
pub struct LabelSlab {
    shape: SlabShape,
    memory: DeviceBuffer<u8>,
    free: Mutex<Vec<usize>>,
    /// Kept for as long as the memory.
    _charge: Box<dyn Any + Send + Sync>,
}

impl LabelSlab {
    /// Allocates a slab; `charge` is what its bytes were admitted with.
    ///
    /// # Errors
    /// Memory that the device does not have.
    pub fn new(gpu: &Gpu, shape: SlabShape, charge: impl Any + Send + Sync) -> Result<Arc<Self>, CudaError> {
        let memory = DeviceBuffer::uninitialised(&gpu.context, shape.bytes() as usize)?;
        let free = Mutex::new((0..shape.chunks).rev().collect());
        Ok(Arc::new(Self { shape, memory, free, _charge: Box::new(charge) }))
    }

    /// A place that nobody holds.
    #[must_use]
    pub fn take(self: &Arc<Self>) -> Option<LabelPage> {
        let at = self.free.lock().pop()?;
        Some(LabelPage { slab: Arc::clone(self), at, made: (0..self.shape.layers).map(|_| AtomicBool::new(false)).collect() })
    }
}

/// Room for the labels of one chunk in every layer. It is free for another chunk when its last holder is gone.
#[derive(Debug)]
pub struct LabelPage {
    slab: Arc<LabelSlab>,
    at: usize,
    /// By layer: whether the labels are there.
    made: Vec<AtomicBool>,
}

impl LabelPage {
    /// Device address of the chunk's labels in a layer.
    #[must_use]
    pub fn address(&self, layer: usize) -> u64 {
        let SlabShape { chunks, page_bytes, .. } = self.slab.shape;
        self.slab.memory.address_of((layer * chunks + self.at) * page_bytes)
    }

    /// What its slab consists of.
    #[must_use]
    pub fn slab_shape(&self) -> SlabShape {
        self.slab.shape
    }

    /// Copies labels of a layer here: `page_bytes`.
    ///
    /// # Safety
    /// They stay as they are until the stream has passed this point.
    ///
    /// # Errors
    /// A copy that the driver refuses.
    pub unsafe fn write_async(&self, stream: &CudaStream, layer: usize, labels: &[u8]) -> Result<(), CudaError> {
        let SlabShape { chunks, page_bytes, .. } = self.slab.shape;
        assert_eq!(labels.len(), page_bytes, "bytes of a label page");
        // SAFETY: the caller's promise.
        unsafe { self.slab.memory.write_async(stream, (layer * chunks + self.at) * page_bytes, labels) }
    }

    /// The labels of a layer. Waits.
    ///
    /// # Errors
    /// A failed copy.
    pub fn read(&self, stream: &CudaStream, layer: usize) -> Result<Vec<u8>, CudaError> {
        let SlabShape { chunks, page_bytes, .. } = self.slab.shape;
        let mut labels = vec![0; page_bytes];
        self.slab.memory.read(stream, (layer * chunks + self.at) * page_bytes, &mut labels)?;
        Ok(labels)
    }

    /// Whether the labels of a layer are there.
    #[must_use]
    pub fn is_made(&self, layer: usize) -> bool {
        self.made[layer].load(Ordering::Acquire)
    }

    /// Notes that the labels of a layer are there.
    pub fn note_made(&self, layer: usize) {
        self.made[layer].store(true, Ordering::Release);
    }
}

impl Drop for LabelPage {
    fn drop(&mut self) {
        self.slab.free.lock().push(self.at);
    }
}
