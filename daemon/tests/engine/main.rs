//! The engine from the inside of its process: prefixes, restarts, random histories, holders, labels and refusals.

mod direct;
mod holders;
mod labels;
mod prefix;
mod random;
mod refusals;
mod restart;
mod spares;
mod support;
