//! The Sluice daemon: owner of every KV cache of a machine.
//!
//! The path of a request, which is also the reading order: `service` (gRPC) turns messages into commands of the [`engine`], one thread
//! that owns all state; its seal jobs run on a small pool, its decisions are journaled; `decode` hosts the decoder of Stream clients;
//! `attach` hands descriptors to Direct clients.

pub mod attach;
pub mod cli;
pub mod config;
pub mod decode;
pub mod engine;
pub mod http;
pub mod journal;
pub mod metrics;
pub mod seal;
pub mod server;
pub mod service;
pub mod status;
