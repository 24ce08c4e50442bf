//! A prompt that was filled once is found again: nothing is appended for it.

mod support;

use std::time::{Duration, Instant};

use sluice_client::{Attach, AttendMode};
use sluice_kernels::budget::Settings;
use sluice_kernels::shape::{ModelShape, RowType};
use support::daemon::{Daemon, DaemonOptions};
use support::rows::{selected, token_ids};
use support::{ask, bits, direct, options, register};

const TOKENS: usize = 128 * 1024;

#[test]
fn the_second_open_of_a_long_prompt_appends_nothing() {
    let daemon = Daemon::start(DaemonOptions { arena_bytes: 128 << 20, segment_bytes: 16 << 20, ..DaemonOptions::default() });
    let client = daemon.client();
    let shape = ModelShape::unscaled(RowType::F16, vec![selected(1, 1, 64)]);
    let model = register(&client, "long", &shape);
    let ids = token_ids(5, TOKENS);
    let mut first = client.open(&model, &ids, &options(direct(), Settings::dense())).expect("first open");
    assert_eq!(first.matched_tokens(), 0);
    // Cheap rows that still differ: the position in the first four bytes of f16 halves.
    let fill = |want: sluice_client::RowsWanted, rows: &mut [u8]| {
        for (position, row) in want.positions.zip(rows.chunks_exact_mut(256)) {
            for (index, element) in row.chunks_exact_mut(2).enumerate() {
                let value = ((position >> (index % 17)) & 1) as f32 - 0.5;
                element.copy_from_slice(&half::f16::from_f32(value).to_le_bytes());
            }
        }
    };
    let begin = Instant::now();
    first.prefill(&ids, fill).expect("prefill");
    first.wait_sealed(TOKENS, Duration::from_secs(60)).expect("sealed");
    println!("{TOKENS} tokens filled and sealed in {:?}", begin.elapsed());
    let expected = ask(&mut first, TOKENS - 1, 0, AttendMode::Dense);
    first.close().expect("close");
    let appended = client.stats().expect("stats").appended_tokens;
    for attach in [direct(), Attach::Stream, direct()] {
        let begin = Instant::now();
        let mut again = client.open(&model, &ids, &options(attach, Settings::dense())).expect("second open");
        println!("second open, {attach:?}: {:?}", begin.elapsed());
        assert_eq!(again.matched_tokens(), TOKENS);
        let found = ask(&mut again, TOKENS - 1, 0, AttendMode::Dense);
        assert_eq!((bits(&found.0), bits(&found.1)), (bits(&expected.0), bits(&expected.1)));
        again.close().expect("close");
    }
    assert_eq!(client.stats().expect("stats").appended_tokens, appended, "the second opens appended rows");
}
