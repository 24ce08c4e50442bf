//! A direct decode step makes no system call while its compute threads are awake: strace looks on.

mod support;

use std::process::Command;

use support::daemon::{Daemon, DaemonOptions, target_folder};

const TOKENS: usize = 200;
/// Tokens between two marks.
const WINDOW: usize = 2;

/// The calls of a traced loop, by window of two tokens: those of the decoding thread and of the device's other threads.
fn trace(threads: usize, pause_us: usize) -> Vec<Vec<String>> {
    let daemon = Daemon::start(DaemonOptions::default());
    drop(daemon.client());
    let folder = tempfile::tempdir().expect("folder for the trace");
    let trace = folder.path().join("trace");
    let mut command = Command::new("strace");
    command.arg("-f").arg("-o").arg(&trace).arg(target_folder().join("examples/step_loop")).arg(daemon.socket());
    let output = command.args([threads, pause_us].map(|number| number.to_string())).output();
    let output = output.expect("strace is installed (apt-get install strace)");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let text = std::fs::read_to_string(&trace).expect("trace");
    let lines: Vec<(&str, &str)> = text.lines().filter_map(|line| line.split_once(' ')).collect();
    let mark = |number: usize| {
        let name = format!("\"/sluice-mark-{number}\"");
        lines.iter().position(|(_, call)| call.contains(&name)).expect("a mark in the trace")
    };
    // The threads of the idle connection may wake up for their keepalives; what counts are the threads that compute.
    let mut computing = vec![lines[mark(0)].0];
    computing.extend(lines.iter().filter(|(_, call)| call.contains("PR_SET_NAME, \"sluice-cpu-")).map(|&(task, _)| task));
    assert_eq!(computing.len(), threads, "the device's threads in the trace");
    let windows = (0..TOKENS / WINDOW).map(|window| {
        let inside = &lines[mark(window) + 1..mark(window + 1)];
        // A call that was under way at the mark is an answer only.
        let calls = inside.iter().filter(|(task, call)| computing.contains(task) && !call.contains("resumed>"));
        calls.map(|(_, call)| call.trim().to_owned()).collect()
    });
    windows.collect()
}

#[test]
fn two_hundred_tokens_of_one_thread_make_no_system_call() {
    let calls: Vec<String> = trace(1, 0).concat();
    assert!(calls.is_empty(), "{} system calls in {TOKENS} tokens: {:?}", calls.len(), &calls[..calls.len().min(20)]);
}

#[test]
fn two_threads_make_no_system_call_between_tokens_that_follow_one_another() {
    let windows = trace(2, 0);
    let quiet = windows.iter().filter(|window| window.is_empty()).count();
    let calls = windows.concat();
    println!("back to back: {} calls in {TOKENS} tokens, {quiet} of {} windows without one", calls.len(), windows.len());
    // A thread that loses its core for longer than it would spin goes to sleep, and is woken by the next step: nothing else is ever called.
    assert!(calls.iter().all(|call| call.starts_with("futex(") || call.starts_with("sched_yield(")), "{calls:?}");
    assert!(quiet > 0, "not two tokens in a row without a system call: {:?}", &calls[..calls.len().min(20)]);
}

#[test]
fn a_pause_between_tokens_costs_two_threads_one_sleep_and_one_wake() {
    let windows = trace(2, 1000);
    let calls = windows.concat();
    println!("with pauses of 1 ms: {} calls in {TOKENS} tokens", calls.len());
    assert!(calls.iter().all(|call| call.starts_with("futex(") || call.starts_with("sched_yield(")), "{calls:?}");
    let waits = calls.iter().filter(|call| call.contains("FUTEX_WAIT")).count();
    let wakes = calls.iter().filter(|call| call.contains("FUTEX_WAKE")).count();
    assert!(waits > 0 && wakes > 0, "{waits} sleeps and {wakes} wakes: the spin time is longer than the pause");
}
