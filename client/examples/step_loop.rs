//! Decodes tokens directly, one after the other; says from when to when by the wall clock, so that the calls of a trace with times can be told
//! apart without a mark in it, and how long a token took. Before each token it computes on its own for PAUSE_US microseconds, as a model would.

#[path = "../tests/support/mod.rs"]
mod support;

use std::process::ExitCode;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use sluice_client::{Attach, AttendMode, Client, Step, StepOut};
use sluice_kernels::device::DeviceKind;
use sluice_kernels::shape::RowType;
use support::daemon::quick;
use support::rows::{path_hashes, query_of, rows_of, token_ids};
use support::{fill, options, plain_shape, register, sparse_settings};

const PROMPT: usize = 700;
const WARM: usize = 100;
const TOKENS: usize = 200;
/// The operating system needs a few of its ticks until each compute thread has a core of its own.
const SETTLING: Duration = Duration::from_millis(50);

fn main() -> ExitCode {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let [socket, threads, pause] = words.as_slice() else {
        eprintln!("usage: step_loop SOCKET THREADS PAUSE_US");
        return ExitCode::FAILURE;
    };
    let threads: usize = threads.parse().expect("threads");
    let pause = Duration::from_micros(pause.parse().expect("microseconds"));
    let ids = token_ids(77, PROMPT + WARM + TOKENS);
    let paths = path_hashes(&ids);
    let shape = plain_shape(RowType::F16);
    let client = Client::connect(socket, quick()).expect("connect");
    let model = register(&client, "step loop", &shape);
    let attach = Attach::Direct { device: DeviceKind::Cpu, threads };
    let mut session = client.open(&model, &ids[..PROMPT], &options(attach, sparse_settings())).expect("open");
    fill(&mut session, &ids[..PROMPT]);
    // Rows and queries are made beforehand: a worker has them from its model.
    let rows: Vec<Vec<Vec<u8>>> =
        (0..2).map(|layer| paths.iter().map(|path| rows_of(std::slice::from_ref(path), layer, &shape)).collect()).collect();
    let query = |position: usize, layer: usize| query_of(position, layer, &shape.layers[layer]);
    let queries: Vec<Vec<Vec<f32>>> = (0..2).map(|layer| (0..ids.len()).map(|position| query(position, layer)).collect()).collect();
    let mut output = [0.0; 4 * 64];
    let mut log_sum_exp = [0.0; 4];
    // A token that is there already is only asked again.
    let mut decode = |position: usize| {
        let new = position == session.length();
        if new {
            session.begin(&ids[position..position + 1]).expect("begin");
        }
        for layer in 0..2 {
            let queries = &queries[layer][position];
            let rows = new.then_some(rows[layer][position].as_slice());
            let step = Step { layer, first_position: position, queries, rows, attend: AttendMode::Sparse };
            let heads = usize::from(shape.layers[layer].query_heads);
            let out = StepOut { output: &mut output[..queries.len()], log_sum_exp: &mut log_sum_exp[..heads], report: None };
            session.step(&step, out).expect("step");
        }
    };
    (PROMPT..PROMPT + WARM).for_each(&mut decode);
    let settled = Instant::now();
    while settled.elapsed() < SETTLING {
        decode(PROMPT + WARM - 1);
    }
    let mut times = Vec::with_capacity(TOKENS);
    let begin = since_epoch();
    for index in 0..TOKENS {
        let paused = Instant::now();
        while paused.elapsed() < pause {
            std::hint::spin_loop();
        }
        let begin = Instant::now();
        decode(PROMPT + WARM + index);
        times.push(begin.elapsed());
    }
    let end = since_epoch();
    times.sort_unstable();
    println!("{begin:.6} {end:.6}");
    println!("{TOKENS} tokens decoded, {:.1} us a token (median)", times[TOKENS / 2].as_secs_f64() * 1e6);
    ExitCode::SUCCESS
}

/// Seconds, as strace writes them.
fn since_epoch() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |time| time.as_secs_f64())
}
