//! A direct decode step makes no system call: strace looks on.

mod support;

use std::process::Command;

use support::daemon::{Daemon, DaemonOptions, target_folder};

#[test]
fn two_hundred_direct_tokens_make_no_system_call() {
    let daemon = Daemon::start(DaemonOptions::default());
    drop(daemon.client());
    let folder = tempfile::tempdir().expect("folder for the trace");
    let trace = folder.path().join("trace");
    let mut command = Command::new("strace");
    command.arg("-f").arg("-o").arg(&trace).arg(target_folder().join("examples/step_loop")).arg(daemon.socket());
    let output = command.output().expect("strace is installed (apt-get install strace)");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let text = std::fs::read_to_string(&trace).expect("trace");
    let lines: Vec<(&str, &str)> = text.lines().filter_map(|line| line.split_once(' ')).collect();
    let mark = |name: &str| lines.iter().position(|(_, call)| call.contains(name)).expect("a mark in the trace");
    let (begin, end) = (mark("/sluice-mark-begin"), mark("/sluice-mark-end"));
    // Whatever the decoding thread does between the marks; the threads of the idle connection may wake up for their keepalives.
    let thread = lines[begin].0;
    let calls: Vec<&str> = lines[begin + 1..end].iter().filter(|(task, _)| *task == thread).map(|(_, call)| call.trim()).collect();
    assert!(lines.len() > 100 && end > begin, "a trace of {} lines", lines.len());
    assert!(calls.is_empty(), "{} system calls in 200 tokens: {:?}", calls.len(), &calls[..calls.len().min(20)]);
}
