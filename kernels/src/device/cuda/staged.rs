//! The CUDA device for jobs in host memory.

use std::sync::Arc;

use cudarc::driver::CudaStream;

use super::buffer::DeviceBuffer;
use super::compile::Compiler;
use super::error::{CudaError, Doing};
use super::label::Labeller;
use super::many::Queries;
use super::module::{Modules, Source, Specialisation};
use super::open::Gpu;
use super::streamed::{PIECE_BYTES, Streamed};
use crate::device::{LabelJob, LayerGeometry, ManyJob};

/// Shapes of layers whose halves for streaming are kept.
const KEPT_SHAPES: usize = 4;

/// The CUDA device for jobs in host memory: each verb copies its job to the device, runs the kernels of the resident decode step, and copies
/// the results back.
pub struct Cuda {
    name: String,
    modules: Modules,
    stream: Arc<CudaStream>,
    streamed: Vec<(LayerGeometry, Streamed)>,
    rows: DeviceBuffer<u8>,
    labels: DeviceBuffer<u8>,
    queries: DeviceBuffer<f32>,
    outputs: DeviceBuffer<f32>,
    lse: DeviceBuffer<f32>,
}

impl Cuda {
    /// Opens device `ordinal` of those that the driver shows, and finds the compiler.
    ///
    /// # Errors
    /// What is missing, and what was looked for.
    pub fn open(ordinal: u32) -> Result<Self, CudaError> {
        let gpu = Gpu::open(ordinal)?;
        let compiler = Compiler::find()?;
        let context = Arc::clone(&gpu.context);
        Ok(Self {
            name: format!("cuda:{ordinal} ({}, sm_{}{})", gpu.name, gpu.capability.0, gpu.capability.1),
            stream: context.new_stream().doing("making a stream")?,
            streamed: Vec::new(),
            rows: DeviceBuffer::uninitialised(&context, 0)?,
            labels: DeviceBuffer::uninitialised(&context, 0)?,
            queries: DeviceBuffer::uninitialised(&context, 0)?,
            outputs: DeviceBuffer::uninitialised(&context, 0)?,
            lse: DeviceBuffer::uninitialised(&context, 0)?,
            modules: Modules::new(gpu, compiler),
        })
    }

    /// Ordinal, name and architecture.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The device, its compiled kernels, and the stream on which verbs run.
    pub fn parts(&mut self) -> (&mut Modules, &Arc<CudaStream>) {
        (&mut self.modules, &self.stream)
    }

    /// [`crate::device::Device::label`].
    ///
    /// # Errors
    /// What the compiler or the driver says.
    pub fn label(&mut self, job: &LabelJob, out: &mut [u8]) -> Result<(), CudaError> {
        let label_bytes = job.geometry.heads.lanes() * crate::slot::CHUNK_TOKENS * job.coder.plan.label_bytes();
        assert!(out.len() == label_bytes && job.page.len() == job.geometry.page_bytes(), "bytes of a page and of its labels");
        let module = self.modules.get(Source::Label, &Specialisation::labels(&job.geometry, &job.coder.plan))?;
        let labeller = Labeller::with_module(&module, &self.stream, &job.geometry, job.coder)?;
        self.rows.fit(job.page.len())?;
        self.labels.fit(out.len())?;
        self.rows.write(&self.stream, 0, job.page)?;
        let tables = DeviceBuffer::from_slice(&self.stream, &[self.rows.address(), self.labels.address()])?;
        // SAFETY: tables, rows and labels live until the copy below has waited for the stream.
        unsafe { labeller.launch(&self.stream, tables.address(), tables.address_of(1), 1) }?;
        self.labels.read(&self.stream, 0, out)
    }

    /// [`crate::device::Device::attend_many`]: pages are streamed in pieces.
    ///
    /// # Errors
    /// What the compiler or the driver says.
    pub fn attend_many(&mut self, job: &ManyJob, output: &mut [f32], lse: &mut [f32]) -> Result<(), CudaError> {
        let (heads, head_dim) = (job.geometry.heads.query_heads(), job.geometry.head_dim);
        let count = job.queries.len() / (heads * head_dim);
        assert!(job.queries.len() == count * heads * head_dim && output.len() == job.queries.len(), "queries and outputs");
        assert_eq!(lse.len(), count * heads, "log-sum-exps");
        let index = match self.streamed.iter().position(|(geometry, _)| *geometry == job.geometry) {
            Some(index) => index,
            None => {
                if self.streamed.len() == KEPT_SHAPES {
                    self.streamed.remove(0);
                }
                let streamed = Streamed::new(&mut self.modules, &self.stream, &job.geometry, PIECE_BYTES)?;
                self.streamed.push((job.geometry, streamed));
                self.streamed.len() - 1
            }
        };
        self.queries.fit(job.queries.len())?;
        self.outputs.fit(output.len())?;
        self.lse.fit(lse.len())?;
        self.queries.write(&self.stream, 0, job.queries)?;
        let queries = Queries { address: self.queries.address(), count, first_position: job.first_position, window: job.window };
        // SAFETY: all buffers are this value's, and the copies below wait for the stream, on which the attention waits for its copies.
        unsafe { self.streamed[index].1.attend(&self.stream, queries, job.pages, self.outputs.address(), self.lse.address()) }?;
        self.outputs.read(&self.stream, 0, output)?;
        self.lse.read(&self.stream, 0, lse)
    }
}
