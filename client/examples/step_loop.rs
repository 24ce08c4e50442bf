//! Decodes tokens directly between marks that strace shows: `statx` of the files /sluice-mark-0, /sluice-mark-1 and so on, one before every
//! two tokens and one at the end. Between two tokens it computes on its own for PAUSE_US microseconds, as a model would. It says how long a
//! token took.

#[path = "../tests/support/mod.rs"]
mod support;

use std::process::ExitCode;
use std::time::{Duration, Instant};

use sluice_client::{Attach, AttendMode, Client, Step, StepOut};
use sluice_kernels::device::DeviceKind;
use sluice_kernels::shape::RowType;
use support::daemon::quick;
use support::rows::{path_hashes, query_of, rows_of, token_ids};
use support::{fill, options, plain_shape, register, sparse_settings};

const PROMPT: usize = 700;
const WARM: usize = 100;
const TOKENS: usize = 200;
const WINDOW: usize = 2;

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
    let mut decode = |position: usize| {
        session.begin(&ids[position..position + 1]).expect("begin");
        for layer in 0..2 {
            let queries = &queries[layer][position];
            let step = Step { layer, first_position: position, queries, rows: Some(&rows[layer][position]), attend: AttendMode::Sparse };
            let heads = usize::from(shape.layers[layer].query_heads);
            let out = StepOut { output: &mut output[..queries.len()], log_sum_exp: &mut log_sum_exp[..heads], report: None };
            session.step(&step, out).expect("step");
        }
    };
    (PROMPT..PROMPT + WARM).for_each(&mut decode);
    let mut times = Vec::with_capacity(TOKENS);
    for index in 0..TOKENS {
        if index % WINDOW == 0 {
            let _ = std::fs::metadata(format!("/sluice-mark-{}", index / WINDOW));
        }
        let paused = Instant::now();
        while paused.elapsed() < pause {
            std::hint::spin_loop();
        }
        let begin = Instant::now();
        decode(PROMPT + WARM + index);
        times.push(begin.elapsed());
    }
    let _ = std::fs::metadata(format!("/sluice-mark-{}", TOKENS / WINDOW));
    times.sort_unstable();
    println!("{TOKENS} tokens decoded, {:.1} us a token (median)", times[TOKENS / 2].as_secs_f64() * 1e6);
    ExitCode::SUCCESS
}
