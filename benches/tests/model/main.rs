//! The decode worker against implementations and token ids that share nothing with it. Needs python3; fetches the real model when it is missing.
#![cfg(feature = "model")]

mod commands;
mod daemon;
mod families;
mod gemma;
mod served;
mod support;
