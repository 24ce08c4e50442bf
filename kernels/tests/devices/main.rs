//! Every device does what a naive model says. The models here are written on their own and share no code with the crate.

mod attend;
mod batch;
mod calibrator;
mod cuda;
mod data;
mod hot;
mod kind;
mod label;
mod many;
mod rows;
mod score;
mod select;
mod step;

use std::time::Duration;

use sluice_kernels::device::cpu::{Cpu, Level};
use sluice_kernels::device::reference::Reference;
use sluice_kernels::device::{Device, DeviceKind, open};

/// The reference, what `open` gives, and the CPU device with each instruction set of this machine.
fn all_devices() -> Vec<Box<dyn Device>> {
    let mut devices: Vec<Box<dyn Device>> = vec![Box::new(Reference), open(DeviceKind::Cpu, 2).expect("two threads")];
    devices.extend(Level::available().into_iter().map(|level| cpu(level, 1)));
    devices
}

/// The CPU device with given instructions and threads.
fn cpu(level: Level, threads: usize) -> Box<dyn Device> {
    Box::new(Cpu::with_level(threads, level, Duration::from_micros(50)).expect("threads"))
}
