//! Either side killed or stopped, a hundred times: no wrong row, no leaked byte or descriptor, and a resumed sequence goes on at its last
//! committed row with outputs equal to the bit.

mod support;

use std::collections::HashMap;
use std::io::{BufRead, BufReader};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use sluice_client::{AttendMode, Client, Model, Stats};
use sluice_kernels::budget::Settings;
use sluice_kernels::device::DeviceKind;
use sluice_kernels::shape::RowType;
use sluice_proto::v1::SequenceState;
use support::daemon::{Daemon, DaemonOptions, eventually, target_folder};
use support::rows::{mix, path_hashes, token_ids};
use support::{bits, decode, device, device_free_bytes, direct, fill, hybrid_shape, options, register};
use xxhash_rust::xxh3::xxh3_64;

/// A hundred; fewer on a GPU, where every worker makes a context first.
fn rounds() -> u64 {
    if device() == DeviceKind::Cpu { 100 } else { 20 }
}

const PROMPT: usize = 300;
const TARGET: usize = 620;
const MODEL: &str = "kills";

struct Worker {
    child: Child,
    input: Option<ChildStdin>,
    lines: Receiver<String>,
}

/// What a worker of a round is to do.
#[derive(Clone, Copy)]
struct Task {
    seed: u64,
    way: &'static str,
    resume: u64,
}

impl Worker {
    /// Starts a worker; the first one of a round waits near its end until its fate has come.
    fn start(daemon: &Daemon, task: Task) -> Self {
        let program = target_folder().join("examples/hash_worker");
        let gate = if task.resume == 0 { TARGET as u64 - 20 } else { 0 };
        let numbers = [task.seed, PROMPT as u64, TARGET as u64, task.resume, 150, gate];
        let mut command = Command::new(program);
        command.args(numbers.map(|number| number.to_string())).arg(daemon.socket()).args([MODEL, task.way]);
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().expect("start of the worker");
        let (sender, lines) = channel();
        let output = BufReader::new(child.stdout.take().expect("output of the worker"));
        std::thread::spawn(move || output.lines().map_while(Result::ok).try_for_each(|line| sender.send(line)));
        Self { input: child.stdin.take(), child, lines }
    }

    fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.child), signal).expect("signal to the worker");
    }

    fn kill(&mut self) {
        self.child.kill().expect("kill of the worker");
        self.child.wait().expect("end of the worker");
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// What is known about a round: outputs by position, and the sequence.
struct Round<'a> {
    expected: &'a HashMap<usize, String>,
    sequence_id: u64,
    committed: usize,
    tokens: usize,
    done: bool,
}

impl Round<'_> {
    fn take(&mut self, line: &str) {
        let words: Vec<&str> = line.split(' ').collect();
        match words[..] {
            ["open", id, committed] => {
                self.sequence_id = id.parse().expect("id");
                let committed: usize = committed.parse().expect("committed tokens");
                assert!(committed >= self.committed, "resumed at {committed}, {} had been reported", self.committed);
            }
            ["token", position, digest] => {
                let position: usize = position.parse().expect("position");
                assert_eq!(digest, self.expected[&position], "output of token {position}");
                self.committed = self.committed.max(position + 1);
                self.tokens += 1;
            }
            ["verified", _] => {}
            ["done"] => self.done = true,
            _ => panic!("a line that no worker says: {line}"),
        }
    }

    /// Reads until `enough` holds, the worker ends or the limit is reached.
    fn follow(&mut self, worker: &Worker, limit: Duration, enough: impl Fn(&Self) -> bool) {
        let begin = Instant::now();
        while !enough(self) {
            match worker.lines.recv_timeout(limit.saturating_sub(begin.elapsed())) {
                Ok(line) => self.take(&line),
                Err(RecvTimeoutError::Disconnected) => return,
                Err(RecvTimeoutError::Timeout) => return,
            }
        }
    }
}

/// The outputs of an undisturbed run, in a model of its own so that nothing is shared with it.
fn undisturbed(client: &Client, seed: u64) -> HashMap<usize, String> {
    let model = register(client, "kills, undisturbed", &hybrid_shape(RowType::F16));
    let ids = token_ids(seed, TARGET);
    let paths = path_hashes(&ids);
    let mut session = client.open(&model, &[], &options(direct(), Settings::dense())).expect("open");
    fill(&mut session, &ids[..PROMPT]);
    let digests = (PROMPT..TARGET).map(|position| {
        let outputs = decode(&mut session, &ids, &paths, AttendMode::Sparse).expect("decode");
        let bytes: Vec<u8> = bits(&outputs).iter().flat_map(|word| word.to_le_bytes()).collect();
        (position, format!("{:016x}", xxh3_64(&bytes)))
    });
    let digests = digests.collect();
    session.close().expect("close");
    digests
}

fn parked(client: &Client, model: &Model, sequence_id: u64) -> bool {
    let listed = client.list(Some(model)).expect("list");
    listed.iter().any(|info| info.sequence_id == sequence_id && info.state() == SequenceState::Parked)
}

#[test]
fn a_hundred_kills_and_stops_leave_no_wrong_row_and_leak_nothing() {
    let mut daemon = Daemon::start(DaemonOptions { arena_bytes: 24 << 20, segment_bytes: 2 << 20, ..DaemonOptions::default() });
    let client = daemon.client();
    let model = register(&client, MODEL, &hybrid_shape(RowType::F16));
    let expected: Vec<HashMap<usize, String>> = (0..3).map(|seed| undisturbed(&client, seed)).collect();
    let undisturbed_model = register(&client, "kills, undisturbed", &hybrid_shape(RowType::F16));
    client.unregister_model(&undisturbed_model).expect("unregister");
    let before = client.stats().expect("stats");
    let (mut killed, mut stopped, mut tokens) = (0, 0, 0);
    let begin = Instant::now();
    let free = device_free_bytes();
    for round in 0..rounds() {
        // Two seeds are common to many rounds, so that their prefixes are shared; one in three is cut off before the prompt's end.
        let seed = round % 3;
        let way = if round / 4 % 2 == 0 { "direct" } else { "stream" };
        let mut state = Round { expected: &expected[seed as usize], sequence_id: 0, committed: 0, tokens: 0, done: false };
        let mut worker = Worker::start(&daemon, Task { seed, way, resume: 0 });
        let moment = 1 + (mix(round) % 150) as usize;
        state.follow(&worker, Duration::from_secs(20), |state| state.tokens >= moment || state.done);
        assert!(state.tokens >= moment, "round {round} ({way}): the worker ended early");
        match round % 4 {
            0 => {
                worker.kill();
                while let Ok(line) = worker.lines.recv() {
                    state.take(&line);
                }
                let id = state.sequence_id;
                eventually(&format!("round {round} ({way}): sequence {id} is parked"), Duration::from_secs(10), || {
                    parked(&client, &model, id)
                });
                worker = Worker::start(&daemon, Task { seed, way, resume: id });
                killed += 1;
            }
            1 => {
                worker.signal(Signal::STOP);
                std::thread::sleep(Duration::from_millis(20));
                worker.signal(Signal::CONT);
                stopped += 1;
            }
            2 => {
                daemon.kill();
                std::thread::sleep(Duration::from_millis(mix(round ^ 7) % 20));
                daemon.spawn();
                killed += 1;
            }
            _ => {
                daemon.signal(Signal::STOP);
                std::thread::sleep(Duration::from_millis(20));
                daemon.signal(Signal::CONT);
                stopped += 1;
            }
        }
        // Its input ends: the worker may pass its gate.
        worker.input = None;
        state.follow(&worker, Duration::from_secs(30), |state| state.done);
        assert!(state.done, "round {round} ({way}): the worker did not finish; {} tokens", state.tokens);
        tokens += state.tokens;
        if round % 10 == 9 {
            println!("{} rounds in {:?}", round + 1, begin.elapsed());
        }
    }
    assert_eq!((killed, stopped), (rounds() / 2, rounds() / 2));
    println!("{} rounds, {tokens} tokens decoded and compared", rounds());
    // Contexts of dead processes go with them; the daemon's own has grown a little.
    eventually("no memory of the GPU is held for the dead", Duration::from_secs(20), || device_free_bytes() + (64 << 20) >= free);
    nothing_leaked(&daemon, &client, &model, &before);
}

/// Nobody holds anything any more; and once the model is gone as well, so is everything that was made for it.
fn nothing_leaked(daemon: &Daemon, client: &Client, model: &Model, before: &Stats) {
    let held = |stats: &Stats| {
        let Stats { sequences_held, sequences_parked, chunks_held, open_slot_bytes, limbo_slots, .. } = *stats;
        [sequences_held, sequences_parked, chunks_held, open_slot_bytes, limbo_slots]
    };
    let nothing_held = || held(&client.stats().expect("stats")) == [0; 5];
    eventually("no sequence, held chunk, open slot byte or slot in limbo is left", Duration::from_secs(10), nothing_held);
    let kept = client.stats().expect("stats");
    assert!(kept.arena_used_bytes <= kept.arena_capacity_bytes && kept.chunks > 0, "{kept:?}");
    let left = |prefix: &str| daemon.arena_files().into_iter().filter(|name| name.starts_with(prefix)).collect::<Vec<_>>();
    assert!(left("open-").is_empty() && left("board-").is_empty(), "files of sequences left behind: {:?}", daemon.arena_files());
    client.unregister_model(model).expect("unregister");
    let nothing_kept = || {
        let now = client.stats().expect("stats");
        let bytes = now.chunks + now.arena_used_bytes + now.label_bytes;
        bytes == 0 && left("seg-").is_empty() && now.open_descriptors <= before.open_descriptors
    };
    let what = format!("no chunk, no file, no more than {} descriptors are left", before.open_descriptors);
    eventually(&what, Duration::from_secs(10), nothing_kept);
}
