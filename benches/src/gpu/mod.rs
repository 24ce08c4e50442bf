//! What decode steps on a GPU are judged by: key traces of real steps, and what any pool of hot rows would hit in them.

pub mod recorded;
pub mod replay;
pub mod trace;
