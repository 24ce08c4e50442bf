//! Decodes tokens directly between two marks that strace shows: `statx` of the files /sluice-mark-begin and /sluice-mark-end.

#[path = "../tests/support/mod.rs"]
mod support;

use std::process::ExitCode;

use sluice_client::{AttendMode, Client, Step, StepOut};
use sluice_kernels::shape::RowType;
use support::daemon::quick;
use support::rows::{path_hashes, query_of, rows_of, token_ids};
use support::{DIRECT, fill, options, plain_shape, register, sparse_settings};

const PROMPT: usize = 700;
const WARM: usize = 100;
const TOKENS: usize = 200;

fn main() -> ExitCode {
    let Some(socket) = std::env::args().nth(1) else {
        eprintln!("usage: step_loop SOCKET");
        return ExitCode::FAILURE;
    };
    let ids = token_ids(77, PROMPT + WARM + TOKENS);
    let paths = path_hashes(&ids);
    let shape = plain_shape(RowType::F16);
    let client = Client::connect(&socket, quick()).expect("connect");
    let model = register(&client, "step loop", &shape);
    let mut session = client.open(&model, &ids[..PROMPT], &options(DIRECT, sparse_settings())).expect("open");
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
    let _ = std::fs::metadata("/sluice-mark-begin");
    (PROMPT + WARM..PROMPT + WARM + TOKENS).for_each(&mut decode);
    let _ = std::fs::metadata("/sluice-mark-end");
    println!("{TOKENS} tokens decoded");
    ExitCode::SUCCESS
}
