//! The daemon from outside: the command line, the server around the engine, metrics. All with the real `sluice` binary.

mod calibrate;
mod config;
mod metrics;
mod server;
mod status;
mod support;
