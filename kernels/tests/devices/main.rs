//! Every device does what a naive model says. The models here are written on their own and share no code with the crate.

mod append;
mod attend;
mod batch;
mod calibrator;
mod cuda;
mod data;
#[path = "../support/e4m3.rs"]
mod e4m3;
mod hot;
mod joint;
mod kind;
mod label;
mod many;
mod micro_batches;
mod offsets;
mod rows;
mod score;
mod select;
mod step;
mod window;

use std::sync::{LazyLock, Mutex, MutexGuard, Once, PoisonError};
use std::time::Duration;

use sluice_kernels::device::cpu::{Cpu, Level};
use sluice_kernels::device::cuda::Cuda;
use sluice_kernels::device::reference::Reference;
use sluice_kernels::device::{AttendJob, Device, DeviceKind, LabelJob, ManyJob, ScoreJob, SelectJob, StepJob, StepResult, StepTimes, open};

/// The reference, what `open` gives, the CPU device with each instruction set of this machine, and the GPU where it is asked for.
fn all_devices() -> Vec<Box<dyn Device>> {
    let mut devices: Vec<Box<dyn Device>> = vec![Box::new(Reference), open(DeviceKind::Cpu, 2).expect("two threads")];
    devices.extend(Level::available().into_iter().map(|level| cpu(level, 1)));
    if asked_for_cuda() {
        devices.push(Box::new(SharedGpu));
    }
    static SAID: Once = Once::new();
    SAID.call_once(|| eprintln!("devices covered: {}", devices.iter().map(|device| device.name()).collect::<Vec<_>>().join(", ")));
    devices
}

/// Whether `SLUICE_TEST_DEVICES` names cuda. Then a machine without a GPU fails the tests.
fn asked_for_cuda() -> bool {
    let asked = std::env::var("SLUICE_TEST_DEVICES").is_ok_and(|devices| devices.split(',').any(|device| device == "cuda"));
    static SAID: Once = Once::new();
    SAID.call_once(|| {
        if !asked {
            eprintln!("NOT COVERED: the CUDA device; SLUICE_TEST_DEVICES=cuda asks for it");
        }
    });
    asked
}

/// The CPU device with given instructions and threads.
fn cpu(level: Level, threads: usize) -> Box<dyn Device> {
    Box::new(Cpu::with_level(threads, level, Duration::from_micros(50)).expect("threads"))
}

/// One device for all tests of this process, so that kernels are loaded once.
static GPU: LazyLock<Mutex<Cuda>> =
    LazyLock::new(|| Mutex::new(Cuda::open(0).unwrap_or_else(|error| panic!("SLUICE_TEST_DEVICES asks for a CUDA device: {error}"))));

struct SharedGpu;

fn gpu() -> MutexGuard<'static, Cuda> {
    // A test that failed inside a verb leaves nothing behind that the next would read.
    GPU.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Device for SharedGpu {
    fn name(&self) -> &str {
        "cuda:0"
    }

    fn label(&mut self, job: &LabelJob, out: &mut [u8]) {
        gpu().label(job, out);
    }

    fn score(&mut self, job: &ScoreJob, keys: &mut [u16]) {
        gpu().score(job, keys);
    }

    fn select(&mut self, job: &SelectJob, positions: &mut [u32]) {
        gpu().select(job, positions);
    }

    fn attend(&mut self, job: &AttendJob, output: &mut [f32], lse: &mut [f32]) {
        gpu().attend(job, output, lse);
    }

    fn attend_many(&mut self, job: &ManyJob, output: &mut [f32], lse: &mut [f32]) {
        gpu().attend_many(job, output, lse);
    }

    fn step(&mut self, job: &StepJob, result: StepResult) -> StepTimes {
        gpu().step(job, result)
    }

    fn mass_kept(&mut self, job: &AttendJob) -> Vec<f32> {
        gpu().mass_kept(job)
    }
}
