//! Pages of rows to label pages.

use std::sync::Arc;

use bytemuck::{Pod, Zeroable};
use cudarc::driver::CudaStream;

use super::buffer::DeviceBuffer;
use super::compile::Compiler;
use super::error::CudaError;
use super::module::{Grid, Kernel, Module, Source, Specialisation};
use super::open::Gpu;
use crate::device::LayerGeometry;
use crate::label::LabelCoder;
use crate::scales::RowScale;

/// Tokens and threads of a block of label.cu.
const TOKENS: usize = 32;
const THREADS: usize = 128;

/// The job of label.cu.
#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
pub(super) struct LabelLaunch {
    pages: u64,
    labels: u64,
    channels: u64,
    low: u64,
    reciprocal: u64,
    scales: u64,
    lanes: u32,
    page_count: u32,
}

/// The labels of one layer: its kernel, and what its coder says as device tables.
#[derive(Debug)]
pub struct Labeller {
    kernel: Kernel,
    lanes: usize,
    channels: DeviceBuffer<u16>,
    low: DeviceBuffer<f32>,
    reciprocal: DeviceBuffer<f32>,
    step: DeviceBuffer<f32>,
    scales: DeviceBuffer<RowScale>,
}

impl Labeller {
    /// Compiles the kernel and copies the tables.
    ///
    /// # Errors
    /// What the compiler or the driver says.
    pub fn new(
        gpu: &Gpu,
        compiler: &Compiler,
        stream: &Arc<CudaStream>,
        geometry: &LayerGeometry,
        coder: &LabelCoder,
    ) -> Result<Self, CudaError> {
        let module = Module::load(gpu, compiler, Source::Label, &Specialisation::labels(geometry, &coder.plan))?;
        Self::with_module(&module, stream, geometry, coder)
    }

    /// The same with a module that was loaded for the layer's shape and plan.
    ///
    /// # Errors
    /// What the driver says.
    pub fn with_module(module: &Module, stream: &Arc<CudaStream>, geometry: &LayerGeometry, coder: &LabelCoder) -> Result<Self, CudaError> {
        let channels: Vec<u16> = coder.lanes.iter().flat_map(|lane| lane.channels.iter().copied()).collect();
        let low: Vec<f32> = coder.lanes.iter().flat_map(|lane| lane.low.iter().copied()).collect();
        let step: Vec<f32> = coder.lanes.iter().flat_map(|lane| lane.step.iter().copied()).collect();
        let reciprocal: Vec<f32> = coder.lanes.iter().flat_map(|lane| lane.step.iter().map(|step| 1.0 / step)).collect();
        assert_eq!(channels.len(), geometry.heads.lanes() * coder.plan.channels(), "channels of all lanes");
        Ok(Self {
            kernel: module.kernel("label_pages", 0)?,
            lanes: geometry.heads.lanes(),
            channels: DeviceBuffer::from_slice(stream, &channels)?,
            low: DeviceBuffer::from_slice(stream, &low)?,
            reciprocal: DeviceBuffer::from_slice(stream, &reciprocal)?,
            step: DeviceBuffer::from_slice(stream, &step)?,
            scales: DeviceBuffer::from_slice(stream, &geometry.lane_scales())?,
        })
    }

    /// Address of the kept channels, u16 `[lane][channels]`.
    #[must_use]
    pub fn channels(&self) -> u64 {
        self.channels.address()
    }

    /// Address of the differences between neighbouring codes, f32 `[lane][channels]`.
    #[must_use]
    pub fn steps(&self) -> u64 {
        self.step.address()
    }

    /// Address of the lanes' scales, [`RowScale`] `[lane]`.
    #[must_use]
    pub fn scales(&self) -> u64 {
        self.scales.address()
    }

    /// Enqueues the labels of `count` pages. `pages` and `labels` are the addresses of device tables of `count` addresses each: of pages of
    /// rows, `lanes x 256 x row_bytes`, and of label pages, `lanes x 256 x label_bytes`.
    ///
    /// # Safety
    /// Tables and pages are valid device addresses until the stream has passed this point, and the label pages are used by nobody else.
    ///
    /// # Errors
    /// A launch that the driver refuses.
    pub unsafe fn launch(&self, stream: &CudaStream, pages: u64, labels: u64, count: usize) -> Result<(), CudaError> {
        let job = LabelLaunch {
            pages,
            labels,
            channels: self.channels.address(),
            low: self.low.address(),
            reciprocal: self.reciprocal.address(),
            scales: self.scales.address(),
            lanes: self.lanes as u32,
            page_count: count as u32,
        };
        let blocks = count * self.lanes * (crate::slot::CHUNK_TOKENS / TOKENS);
        // SAFETY: the tables of this value are whole, the rest is the caller's promise.
        unsafe { self.kernel.launch(stream, Grid { blocks: [blocks, 1, 1], threads: THREADS }, &job) }
    }
}
