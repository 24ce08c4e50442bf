//! The CUDA device: driver and compiler found at run time, kernels from source.
//!
//! Layers, from below: `cudarc` binds the driver; `buffer`, `compile` and `module` check what is passed and own what is made; `label` and
//! `many` know one kernel each. A launch takes one plain-data job, whose size both sides assert.

pub mod append;
pub mod batch;
pub mod buffer;
pub mod compile;
mod copies;
pub mod cut;
mod enqueue;
pub mod error;
pub mod host;
pub mod host_step;
pub mod jobs;
pub mod joint;
pub mod label;
pub mod label_pages;
pub mod many;
pub mod module;
pub mod open;
mod pipeline;
pub mod probe;
pub mod prompt;
mod ring;
pub mod seat;
pub mod staged;
mod staged_step;
pub mod staging;
pub mod step;
pub mod store;
pub mod streamed;
pub mod timer;
pub mod whole_cache;
pub mod window;
mod workspace;

pub use cudarc::driver::{CudaGraph, CudaStream};
pub use error::{CudaError, Doing};
pub use open::{Gpu, OpenError};
pub use staged::Cuda;
