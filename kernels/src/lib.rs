//! Lanes of rows: their layout in shared memory, the labels that find them, and the devices that attend them.
//!
//! The path of a token through this crate, which is also the reading order of its modules:
//! a model's [`shape`] gives every layer its [`heads`] and lanes (and, of fp8 rows, the [`scales`] of lanes); [`rows`] are laid out in chunk [`slot`]s by [`layout`] and live in
//! [`shared`] memory; a [`sequence`] is one holder's view of them; keys become [`label`]s; [`select`] picks the rows of a step
//! within a [`budget`]; a [`device`] scores, selects, gathers and attends, remembering [`hot`] rows; the [`decoder`] puts a step together.
//!
//! No tokio, no gRPC and no generated types in here. All `unsafe` of the project lives in this crate.

pub mod bound;
pub mod budget;
pub mod decoder;
pub mod device;
pub mod heads;
pub mod hot;
pub mod label;
pub mod layout;
pub mod probe;
pub mod recording;
pub mod rows;
pub mod scales;
pub mod select;
pub mod sequence;
pub mod shape;
pub mod shared;
pub mod slot;
