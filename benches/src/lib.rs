//! Workloads of Sluice: what they measure lives here, the binary only reads flags and calls it.

pub mod attach;
pub mod context;
pub mod daemon;
pub mod floors;
#[cfg(feature = "model")]
pub mod generate;
pub mod generator;
pub mod gpu;
#[cfg(feature = "model")]
pub mod look_ahead;
#[cfg(feature = "model")]
pub mod model;
#[cfg(feature = "model")]
pub mod perplexity;
#[cfg(feature = "model")]
pub mod record;
pub mod report;
pub mod statistics;
pub mod stress;
pub mod units;
pub mod workload;
