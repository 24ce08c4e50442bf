//! A direct decode step makes no system call while its compute threads are awake: strace looks on.

mod support;

use std::process::Command;

use support::daemon::{Daemon, DaemonOptions, target_folder};

const TOKENS: usize = 200;
/// Loops that are traced until one of them makes no call: where other programs take the cores away, threads sleep and are woken.
const ATTEMPTS: usize = 8;

/// The calls of a traced loop, those of the decoding thread and of the device's other threads, with their times.
fn trace(threads: usize, pause_us: usize) -> Vec<String> {
    let daemon = Daemon::start(DaemonOptions::default());
    drop(daemon.client());
    let folder = tempfile::tempdir().expect("folder for the trace");
    let trace = folder.path().join("trace");
    let mut command = Command::new("strace");
    command.args(["-f", "-ttt", "-o"]).arg(&trace).arg(target_folder().join("examples/step_loop")).arg(daemon.socket());
    let output = command.args([threads, pause_us].map(|number| number.to_string())).output();
    let output = output.expect("strace is installed (apt-get install strace)");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let said = String::from_utf8(output.stdout).expect("text");
    let seconds = |word: &str| word.parse::<f64>().expect("seconds since the epoch");
    let (begin, end) = said.lines().next().and_then(|line| line.split_once(' ')).expect("begin and end");
    let inside = seconds(begin)..seconds(end);
    let text = std::fs::read_to_string(&trace).expect("trace");
    // Task, time, call.
    let lines = text.lines().filter_map(|line| line.split_once(' ')).filter_map(|(task, rest)| {
        let (time, call) = rest.trim_start().split_once(' ')?;
        Some((task, seconds(time), call))
    });
    let lines: Vec<(&str, f64, &str)> = lines.collect();
    // The threads of the idle connection may wake up for their keepalives; what counts are the threads that compute.
    let mut computing = vec![lines[0].0];
    computing.extend(lines.iter().filter(|(.., call)| call.contains("PR_SET_NAME, \"sluice-cpu-")).map(|line| line.0));
    assert_eq!(computing.len(), threads, "the device's threads in the trace");
    assert!(lines[0].1 < inside.start && inside.end < lines[lines.len() - 1].1, "the loop lies within the trace");
    // A call that was under way at the beginning is an answer only.
    let calls = lines.iter().filter(|(task, time, call)| computing.contains(task) && inside.contains(time) && !call.contains("resumed>"));
    calls.map(|(_, time, call)| format!("{time:.6} {call}")).collect()
}

/// A thread that has nothing to do for longer than it would spin goes to sleep, is woken by the next step, and leaves the core of the thread
/// that woke it: nothing else is ever called.
fn only_sleeps_and_wakes(calls: &[String]) -> bool {
    calls.iter().all(|call| [" futex(", " sched_getaffinity(", " sched_setaffinity("].iter().any(|name| call.contains(name)))
}

#[test]
fn two_hundred_tokens_of_one_thread_make_no_system_call() {
    let calls = trace(1, 0);
    assert!(calls.is_empty(), "{} system calls in {TOKENS} tokens: {:?}", calls.len(), &calls[..calls.len().min(20)]);
}

#[test]
fn two_hundred_tokens_of_two_threads_that_follow_one_another_make_no_system_call() {
    let mut calls = Vec::new();
    for _ in 0..ATTEMPTS {
        calls = trace(2, 0);
        println!("back to back: {} calls in {TOKENS} tokens", calls.len());
        assert!(only_sleeps_and_wakes(&calls), "{calls:?}");
        if calls.is_empty() {
            return;
        }
    }
    panic!("not {TOKENS} tokens in a row without a system call in {ATTEMPTS} loops; the last: {:?}", &calls[..calls.len().min(20)]);
}

#[test]
fn a_pause_between_tokens_costs_two_threads_one_sleep_and_one_wake() {
    let calls = trace(2, 1000);
    println!("with pauses of 1 ms: {} calls in {TOKENS} tokens", calls.len());
    assert!(only_sleeps_and_wakes(&calls), "{calls:?}");
    let count = |name| calls.iter().filter(|call| call.contains(name)).count();
    let (waits, wakes, moves) = (count("FUTEX_WAIT"), count("FUTEX_WAKE"), count("sched_getaffinity"));
    println!("{waits} sleeps, {wakes} wakes, {moves} of them on the caller's core");
    assert!(waits > 0 && wakes > 0, "{waits} sleeps and {wakes} wakes: the spin time is longer than the pause");
}
