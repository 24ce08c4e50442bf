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
use super::staged_step;
use super::staging::Staging;
use super::streamed::{PIECE_BYTES, Streamed};
use crate::device::{AttendJob, Device, LabelJob, LayerGeometry, ManyJob, ScoreJob, SelectJob};

/// Shapes of layers whose halves for streaming are kept.
const KEPT_SHAPES: usize = 4;

/// The CUDA device for jobs in host memory: each verb copies its job to the device, runs the kernels of the resident decode step, and copies
/// the results back.
pub struct Cuda {
    name: String,
    modules: Modules,
    stream: Arc<CudaStream>,
    streamed: Vec<(LayerGeometry, Streamed)>,
    staging: Staging,
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
            staging: Staging::new(&context)?,
            rows: DeviceBuffer::uninitialised(&context, 0)?,
            labels: DeviceBuffer::uninitialised(&context, 0)?,
            queries: DeviceBuffer::uninitialised(&context, 0)?,
            outputs: DeviceBuffer::uninitialised(&context, 0)?,
            lse: DeviceBuffer::uninitialised(&context, 0)?,
            modules: Modules::new(gpu, compiler),
        })
    }

    /// The device, its compiled kernels, and the stream on which verbs run.
    pub fn parts(&mut self) -> (&mut Modules, &Arc<CudaStream>) {
        (&mut self.modules, &self.stream)
    }

    fn try_label(&mut self, job: &LabelJob, out: &mut [u8]) -> Result<(), CudaError> {
        let label_bytes = job.geometry.heads.lanes() * crate::slot::CHUNK_TOKENS * job.coder.plan.label_bytes();
        assert!(out.len() == label_bytes && job.page.len() == job.geometry.page_bytes(), "bytes of a page and of its labels");
        let module = self.modules.get(Source::Label, &Specialisation::labels(job.geometry, &job.coder.plan))?;
        let labeller = Labeller::with_module(&module, &self.stream, job.geometry, job.coder)?;
        self.rows.fit(job.page.len())?;
        self.labels.fit(out.len())?;
        self.rows.write(&self.stream, 0, job.page)?;
        let tables = DeviceBuffer::from_slice(&self.stream, &[self.rows.address(), self.labels.address()])?;
        // SAFETY: tables, rows and labels live until the copy below has waited for the stream.
        unsafe { labeller.launch(&self.stream, tables.address(), tables.address_of(1), 1) }?;
        self.labels.read(&self.stream, 0, out)
    }

    /// Pages are streamed in pieces.
    fn try_attend_many(&mut self, job: &ManyJob, output: &mut [f32], lse: &mut [f32]) -> Result<(), CudaError> {
        let (heads, head_dim) = (job.geometry.heads.query_heads(), job.geometry.head_dim);
        let count = job.queries.len() / (heads * head_dim);
        assert!(job.queries.len() == count * heads * head_dim && output.len() == job.queries.len(), "queries and outputs");
        assert_eq!(lse.len(), count * heads, "log-sum-exps");
        let (geometry, scales) = (job.geometry.unscaled(), &job.geometry.scales);
        let index = match self.streamed.iter().position(|(of, _)| *of == geometry) {
            Some(index) => index,
            None => {
                if self.streamed.len() == KEPT_SHAPES {
                    self.streamed.remove(0);
                }
                let streamed = Streamed::new(&mut self.modules, &self.stream, &geometry, PIECE_BYTES)?;
                self.streamed.push((geometry, streamed));
                self.streamed.len() - 1
            }
        };
        self.queries.fit(job.queries.len())?;
        self.outputs.fit(output.len())?;
        self.lse.fit(lse.len())?;
        let queries = Queries { address: self.queries.address(), count, first_position: job.first_position, window: job.window };
        // SAFETY: the pages are borrowed until the copies below have waited for the stream.
        let run = unsafe { self.streamed[index].1.start(queries.keys(), job.pages) }?;
        self.staging.upload(&self.stream, job.queries, &self.queries)?;
        // SAFETY: all buffers are this value's, and the copies below wait for the stream, on which the attention waits for its copies.
        unsafe { run.attend(&self.stream, queries, scales, self.outputs.address(), self.lse.address()) }?;
        self.staging.download(&self.stream, &self.outputs, output)?;
        self.staging.download(&self.stream, &self.lse, lse)
    }
}

/// A verb gives no error, and after a failure of the device nothing more can be computed there.
fn done<T>(name: &str, result: Result<T, CudaError>) -> T {
    result.unwrap_or_else(|error| panic!("{name}: {error}"))
}

impl Device for Cuda {
    fn name(&self) -> &str {
        &self.name
    }

    fn gpu(&self) -> Option<(Gpu, Arc<Compiler>)> {
        Some((self.modules.gpu().clone(), Arc::clone(self.modules.compiler())))
    }

    fn label(&mut self, job: &LabelJob, out: &mut [u8]) {
        let result = self.try_label(job, out);
        done(&self.name, result);
    }

    fn score(&mut self, job: &ScoreJob, keys: &mut [u16]) {
        done(&self.name, staged_step::score(&mut self.modules, &self.stream, job, keys));
    }

    fn select(&mut self, job: &SelectJob, positions: &mut [u32]) {
        done(&self.name, staged_step::select(&mut self.modules, &self.stream, job, positions));
    }

    fn attend(&mut self, job: &AttendJob, output: &mut [f32], lse: &mut [f32]) {
        done(&self.name, staged_step::attend(&mut self.modules, &self.stream, job, output, lse));
    }

    fn attend_many(&mut self, job: &ManyJob, output: &mut [f32], lse: &mut [f32]) {
        let result = self.try_attend_many(job, output, lse);
        done(&self.name, result);
    }
}
