//! Kernels of one shape of rows: sources, the options that specialise them, loaded modules and launches.

use std::collections::HashMap;
use std::ffi::c_void;
use std::sync::Arc;

use bytemuck::Pod;
use cudarc::driver::{CudaContext, CudaEvent, CudaFunction, CudaModule, CudaStream, sys};
use cudarc::nvrtc::Ptx;

use super::compile::{CompileError, Compiler, Program, Target};
use super::error::{CudaError, Doing};
use super::open::Gpu;
use super::ring::Rings;
use super::{append, jobs, label, many, probe, step, store};
use crate::device::LayerGeometry;
use crate::label::LabelPlan;
use crate::shape::RowType;

/// How much of a processor's first-level memory is shared memory while kernels that overlap run. The same for all of them: a processor has
/// to be empty before it changes the division.
const SHARED_PERCENT: i32 = 75;

/// What is fixed when kernels are compiled.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Specialisation {
    /// Channels of a key and of a value.
    pub head_dim: usize,
    /// Element type of rows.
    pub row_type: RowType,
    /// Query heads that share a lane.
    pub group: usize,
    /// The label plan; `None` for kernels that read no labels.
    pub plan: Option<LabelPlan>,
    /// Whether scores give way to the keys of a trace, for benches.
    pub replays_trace: bool,
}

impl Specialisation {
    /// Of a layer's rows, without labels.
    #[must_use]
    pub fn rows(geometry: &LayerGeometry) -> Self {
        Self { head_dim: geometry.head_dim, row_type: geometry.row_type, group: geometry.heads.group(), plan: None, replays_trace: false }
    }

    /// Of a layer's rows and labels.
    #[must_use]
    pub fn labels(geometry: &LayerGeometry, plan: &LabelPlan) -> Self {
        Self { plan: Some(plan.clone()), ..Self::rows(geometry) }
    }

    /// Warps of an attention block: their results are joined in 48 KiB of shared memory.
    pub(super) fn attend_warps(&self) -> usize {
        if self.head_dim * self.group.min(8) <= 1024 { 8 } else { 4 }
    }

    /// `-D` options: `HEAD_DIM`, `ROW_TYPE` (0 f32, 1 f16, 2 bf16, 3 e4m3), `GROUP`, and with a plan `PLAN_GROUPS` ({channels, bits}, ...),
    /// `N_GROUPS`, `LABEL_BYTES`, `CHANNELS`.
    fn options(&self) -> Vec<String> {
        let row_type = match self.row_type {
            RowType::F32 => 0,
            RowType::F16 => 1,
            RowType::Bf16 => 2,
            RowType::Fp8 => 3,
        };
        let mut options =
            vec![format!("-DHEAD_DIM={}", self.head_dim), format!("-DROW_TYPE={row_type}"), format!("-DGROUP={}", self.group)];
        if let Some(plan) = &self.plan {
            let groups: Vec<String> = plan.groups().iter().map(|group| format!("{{{},{}}}", group.channels, group.bits)).collect();
            options.push(format!("-DPLAN_GROUPS={}", groups.join(",")));
            options.push(format!("-DN_GROUPS={}", groups.len()));
            options.push(format!("-DLABEL_BYTES={}", plan.label_bytes()));
            options.push(format!("-DCHANNELS={}", plan.channels()));
        }
        if self.replays_trace {
            options.push("-DTRACE_KEYS".to_owned());
        }
        options
    }
}

/// A CUDA source of ours. Each becomes a module of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Source {
    /// Keys to label pages.
    Label,
    /// Labels to importance keys.
    Score,
    /// The same of several sequences.
    Joint,
    /// Keys to selected positions.
    Select,
    /// The gather of missing rows.
    Hot,
    /// Attention over listed rows.
    Attend,
    /// Exact attention of many queries.
    Many,
    /// Rows of tokens to pages.
    Arrange,
    /// Reads of plain memory.
    Probe,
}

/// What the sources include.
const HEADERS: [(&str, &str); 8] = [
    ("common.cuh", include_str!("common.cuh")),
    ("append.cuh", include_str!("append.cuh")),
    ("mma.cuh", include_str!("mma.cuh")),
    ("parts.cuh", include_str!("parts.cuh")),
    ("types.cuh", include_str!("types.cuh")),
    ("sample.cuh", include_str!("sample.cuh")),
    ("scan.cuh", include_str!("scan.cuh")),
    ("tile.cuh", include_str!("tile.cuh")),
];

impl Source {
    /// Every source.
    pub const ALL: [Self; 9] =
        [Self::Label, Self::Score, Self::Joint, Self::Select, Self::Hot, Self::Attend, Self::Many, Self::Arrange, Self::Probe];

    /// File name.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Label => "label.cu",
            Self::Score => "score.cu",
            Self::Joint => "joint.cu",
            Self::Select => "select.cu",
            Self::Hot => "hot.cu",
            Self::Attend => "attend.cu",
            Self::Many => "many.cu",
            Self::Arrange => "arrange.cu",
            Self::Probe => "probe.cu",
        }
    }

    fn text(self) -> &'static str {
        match self {
            Self::Label => include_str!("label.cu"),
            Self::Score => include_str!("score.cu"),
            Self::Joint => include_str!("joint.cu"),
            Self::Select => include_str!("select.cu"),
            Self::Hot => include_str!("hot.cu"),
            Self::Attend => include_str!("attend.cu"),
            Self::Many => include_str!("many.cu"),
            Self::Arrange => include_str!("arrange.cu"),
            Self::Probe => include_str!("probe.cu"),
        }
    }

    /// Whether the source is compiled for a label plan.
    #[must_use]
    pub fn needs_plan(self) -> bool {
        match self {
            Self::Label | Self::Score | Self::Joint => true,
            Self::Select | Self::Hot | Self::Attend | Self::Many | Self::Arrange | Self::Probe => false,
        }
    }

    /// Sizes of the jobs that cross to the device, by the name of a macro. The source asserts them.
    fn job_bytes(self) -> Vec<(&'static str, usize)> {
        match self {
            Self::Label => vec![("LABEL_JOB_BYTES", size_of::<label::LabelLaunch>())],
            Self::Arrange => vec![("ARRANGE_JOB_BYTES", size_of::<append::ArrangeJob>())],
            Self::Probe => vec![("READ_JOB_BYTES", size_of::<probe::ReadJob>())],
            Self::Score | Self::Attend => step_bytes(),
            Self::Select => {
                let mut bytes = step_bytes();
                bytes.push(("SELECT_TILE_BYTES", step::SELECT_TILE_BYTES));
                bytes
            }
            Self::Joint => {
                let mut bytes = step_bytes();
                bytes.push(("JOINT_JOB_BYTES", size_of::<jobs::JointJob>()));
                bytes
            }
            Self::Hot => {
                let mut bytes = step_bytes();
                bytes.extend([("BLOCK_MOVE_BYTES", size_of::<store::BlockMove>()), ("MOVE_JOB_BYTES", size_of::<step::MoveJob>())]);
                bytes
            }
            Self::Many => vec![("MANY_JOB_BYTES", size_of::<many::ManyLaunch>()), ("MERGE_JOB_BYTES", size_of::<many::MergeLaunch>())],
        }
    }

    /// Machine code of this source. Needs no GPU.
    ///
    /// # Errors
    /// What the compiler says.
    pub fn compile(self, compiler: &Compiler, specialisation: &Specialisation, target: Target) -> Result<Vec<u8>, CompileError> {
        let mut options = specialisation.options();
        options.extend(self.job_bytes().into_iter().map(|(name, bytes)| format!("-D{name}={bytes}")));
        if self == Self::Many {
            options.extend(many::Tiles::new(specialisation.head_dim, specialisation.row_type, target).options());
        }
        if matches!(self, Self::Score | Self::Joint) {
            options.extend(Rings::new(specialisation, target).options());
        }
        if self == Self::Attend {
            options.push(format!("-DATTEND_WARPS={}", specialisation.attend_warps()));
        }
        options.extend(["--std=c++17", "-lineinfo"].map(str::to_owned));
        compiler.compile(&Program { name: self.name(), source: self.text(), headers: &HEADERS, options }, target)
    }
}

/// The same of the jobs of a step's kernels.
fn step_bytes() -> Vec<(&'static str, usize)> {
    vec![
        ("SEQUENCE_STATE_BYTES", size_of::<jobs::SequenceState>()),
        ("LAYER_PLACE_BYTES", size_of::<jobs::LayerPlace>()),
        ("PART_COUNTS_BYTES", size_of::<jobs::PartCounts>()),
        ("VICTIM_COUNTS_BYTES", size_of::<jobs::VictimCounts>()),
        ("MISS_BYTES", size_of::<jobs::Miss>()),
        ("VICTIM_BYTES", size_of::<jobs::Victim>()),
        ("ARRIVALS_BYTES", size_of::<jobs::Arrivals>()),
        ("STEP_JOB_BYTES", size_of::<jobs::StepJob>()),
    ]
}

/// A source compiled and loaded.
#[derive(Clone, Debug)]
pub struct Module {
    module: Arc<CudaModule>,
    context: Arc<CudaContext>,
    capability: (u32, u32),
}

impl Module {
    /// Compiles (or takes from the cache) and loads a source.
    ///
    /// # Errors
    /// What the compiler or the driver says.
    pub fn load(gpu: &Gpu, compiler: &Compiler, source: Source, specialisation: &Specialisation) -> Result<Self, CudaError> {
        let cubin = source.compile(compiler, specialisation, Target { capability: gpu.capability })?;
        let module = gpu.context.load_module(Ptx::from_binary(cubin)).doing(source.name())?;
        Ok(Self { module, context: Arc::clone(&gpu.context), capability: gpu.capability })
    }

    /// A kernel by name, allowed `shared_bytes` of dynamic shared memory.
    ///
    /// # Errors
    /// A name that the source does not have, or more shared memory than the device has.
    pub fn kernel(&self, name: &'static str, shared_bytes: usize) -> Result<Kernel, CudaError> {
        let function = self.module.load_function(name).doing(name)?;
        let attribute = sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
        function.set_attribute(attribute, shared_bytes as i32).doing(name)?;
        Ok(Kernel { name, function, context: Arc::clone(&self.context), shared_bytes, overlaps: false })
    }

    /// A kernel that passes `enter_stream` (common.cuh): its launch may overlap the end of the kernel before it, where the device can.
    ///
    /// # Errors
    /// As [`Module::kernel`].
    pub fn overlapping_kernel(&self, name: &'static str, shared_bytes: usize) -> Result<Kernel, CudaError> {
        let kernel = self.kernel(name, shared_bytes)?;
        let attribute = sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT;
        kernel.function.set_attribute(attribute, SHARED_PERCENT).doing(name)?;
        Ok(Kernel { overlaps: self.capability >= (9, 0), ..kernel })
    }

    /// Dynamic shared memory that the score kernel wants, for this module's device.
    #[must_use]
    pub fn score_bytes(&self, specialisation: &Specialisation) -> usize {
        Rings::new(specialisation, Target { capability: self.capability }).shared_bytes()
    }
}

/// The modules of a device, each compiled and loaded when it is first asked for.
pub struct Modules {
    gpu: Gpu,
    compiler: Arc<Compiler>,
    loaded: HashMap<(Source, Specialisation), Module>,
}

impl Modules {
    /// None loaded yet.
    #[must_use]
    pub fn new(gpu: Gpu, compiler: Compiler) -> Self {
        Self { gpu, compiler: Arc::new(compiler), loaded: HashMap::new() }
    }

    /// The device.
    #[must_use]
    pub fn gpu(&self) -> &Gpu {
        &self.gpu
    }

    /// The compiler.
    #[must_use]
    pub fn compiler(&self) -> &Arc<Compiler> {
        &self.compiler
    }

    /// A source's module for a shape of rows; the plan counts only for sources that read labels.
    ///
    /// # Errors
    /// What the compiler or the driver says.
    pub fn get(&mut self, source: Source, specialisation: &Specialisation) -> Result<Module, CudaError> {
        let plan = specialisation.plan.clone().filter(|_| source.needs_plan());
        let key = (source, Specialisation { plan, ..specialisation.clone() });
        if let Some(module) = self.loaded.get(&key) {
            return Ok(module.clone());
        }
        let module = Module::load(&self.gpu, &self.compiler, source, &key.1)?;
        self.loaded.insert(key, module.clone());
        Ok(module)
    }
}

/// Blocks and threads of a launch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Grid {
    /// Blocks.
    pub blocks: [usize; 3],
    /// Threads of a block.
    pub threads: usize,
}

/// A kernel that takes one plain-data job by value.
#[derive(Clone, Debug)]
pub struct Kernel {
    name: &'static str,
    function: CudaFunction,
    context: Arc<CudaContext>,
    shared_bytes: usize,
    overlaps: bool,
}

impl Kernel {
    /// The function, to ask for its attributes.
    #[must_use]
    pub fn function(&self) -> &CudaFunction {
        &self.function
    }

    /// The same, never overlapping what came before it.
    #[must_use]
    pub fn apart(&self) -> Self {
        Self { overlaps: false, ..self.clone() }
    }

    /// Blocks of `threads` threads that run at once on one processor.
    ///
    /// # Errors
    /// What the driver says.
    pub fn resident_blocks(&self, threads: usize) -> Result<usize, CudaError> {
        let blocks = self.function.occupancy_max_active_blocks_per_multiprocessor(threads as u32, self.shared_bytes, None);
        Ok(blocks.doing(self.name)? as usize)
    }

    /// Enqueues the kernel with all the shared memory it was allowed. A grid without blocks is no launch.
    ///
    /// # Safety
    /// `job` is the kernel's job type; every address in it stays valid, for as many bytes as the kernel's description says, until the stream
    /// has passed this point, and nothing else writes there meanwhile.
    ///
    /// # Errors
    /// A launch that the driver refuses.
    pub unsafe fn launch<J: Pod>(&self, stream: &CudaStream, grid: Grid, job: &J) -> Result<(), CudaError> {
        // SAFETY: the caller's promise.
        unsafe { self.launch_telling(stream, grid, job, None) }
    }

    /// The same; `begun` is recorded when all blocks of the kernel run, or later.
    ///
    /// # Safety
    /// As [`Kernel::launch`].
    ///
    /// # Errors
    /// As [`Kernel::launch`].
    pub unsafe fn launch_telling<J: Pod>(
        &self,
        stream: &CudaStream,
        grid: Grid,
        job: &J,
        begun: Option<&CudaEvent>,
    ) -> Result<(), CudaError> {
        let [x, y, z] = grid.blocks.map(|count| count as u32);
        if x == 0 || y == 0 || z == 0 {
            return begun.map_or(Ok(()), |begun| begun.record(stream).doing(self.name));
        }
        self.context.bind_to_thread().doing("entering the context")?;
        let mut parameters = [std::ptr::from_ref(job).cast_mut().cast::<c_void>()];
        // SAFETY: unions of plain numbers and pointers, of which zero is a value.
        let mut attributes: [sys::CUlaunchAttribute; 2] = unsafe { std::mem::zeroed() };
        let mut count = 0;
        if self.overlaps {
            attributes[count].id = sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION;
            attributes[count].value.programmaticStreamSerializationAllowed = 1;
            count += 1;
        }
        if let Some(begun) = begun {
            attributes[count].id = sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_LAUNCH_COMPLETION_EVENT;
            attributes[count].value.launchCompletionEvent.event = begun.cu_event();
            count += 1;
        }
        let config = sys::CUlaunchConfig {
            gridDimX: x,
            gridDimY: y,
            gridDimZ: z,
            blockDimX: grid.threads as u32,
            blockDimY: 1,
            blockDimZ: 1,
            sharedMemBytes: self.shared_bytes as u32,
            hStream: stream.cu_stream(),
            attrs: attributes.as_mut_ptr(),
            numAttrs: count as u32,
        };
        // SAFETY: the kernel has one parameter, of the job's type by the caller's promise; it is copied by the call.
        let result =
            unsafe { sys::cuLaunchKernelEx(&raw const config, self.function.cu_function(), parameters.as_mut_ptr(), std::ptr::null_mut()) };
        result.result().doing(self.name)
    }
}
