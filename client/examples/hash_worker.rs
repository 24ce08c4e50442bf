//! A worker whose rows are only hashes of their place, for the tests that kill it: it opens or resumes a sequence, decodes token after
//! token, verifies every row that it reads, and says what it has done, a line each:
//!
//! ```text
//! open <sequence id> <committed tokens>
//! token <position> <digest of all layers' outputs>
//! verified <rows>
//! done
//! ```
//! Every fifth token it stores its position as opaque state. Before token GATE (0: none) it waits for a line on its input, so that
//! it cannot be done before its fate has come.

#[path = "../tests/support/mod.rs"]
mod support;

use std::io::Write;
use std::process::ExitCode;
use std::time::Duration;

use sluice_client::{Attach, AttendMode, Client, ClientError, Session};
use sluice_kernels::budget::Settings;
use sluice_kernels::shape::RowType;
use support::daemon::quick;
use support::rows::{path_hashes, token_ids};
use support::{bits, decode, direct, hybrid_shape, options, register, try_fill, verify_rows};
use xxhash_rust::xxh3::xxh3_64;

struct Arguments {
    socket: String,
    model: String,
    attach: Attach,
    seed: u64,
    /// Tokens filled without attention, then tokens decoded up to the target.
    prompt: usize,
    target: usize,
    resume: Option<u64>,
    pause: Duration,
    gate: usize,
}

fn arguments() -> Option<Arguments> {
    let mut words = std::env::args().skip(1);
    let mut number = || words.next()?.parse::<u64>().ok();
    let (seed, prompt, target) = (number()?, number()?, number()?);
    let (resume, pause, gate) = (number()?, number()?, number()?);
    let (socket, model, attach) = (words.next()?, words.next()?, words.next()?);
    Some(Arguments {
        socket,
        model,
        attach: if attach == "direct" { direct() } else { Attach::Stream },
        seed,
        prompt: prompt as usize,
        target: target as usize,
        resume: Some(resume).filter(|&id| id != 0),
        pause: Duration::from_micros(pause),
        gate: gate as usize,
    })
}

fn main() -> ExitCode {
    let Some(arguments) = arguments() else {
        eprintln!("usage: hash_worker SEED PROMPT TARGET RESUME_ID PAUSE_US GATE SOCKET MODEL direct|stream");
        return ExitCode::FAILURE;
    };
    match work(&arguments) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("hash_worker {}: {error}", std::process::id());
            ExitCode::FAILURE
        }
    }
}

fn say(line: &str) {
    let mut out = std::io::stdout().lock();
    // The reader may have killed its end; then nobody is interested.
    let _ = writeln!(out, "{line}").and_then(|()| out.flush());
}

fn work(arguments: &Arguments) -> Result<(), ClientError> {
    let ids = token_ids(arguments.seed, arguments.target);
    let paths = path_hashes(&ids);
    let client = Client::connect(&arguments.socket, quick())?;
    let model = register(&client, &arguments.model, &hybrid_shape(RowType::F16));
    let options = options(arguments.attach, Settings::dense());
    let mut session = match arguments.resume {
        Some(id) => client.resume(&model, id, &options)?,
        None => client.open(&model, &ids[..arguments.prompt], &options)?,
    };
    if arguments.resume.is_some() {
        assert_eq!(session.token_ids(), &ids[..session.length()], "token ids of the resumed sequence");
        check_opaque(&session);
    }
    say(&format!("open {} {}", session.sequence_id(), session.length()));
    say(&format!("verified {}", verify_rows(&mut session, &paths)));
    while session.length() < arguments.target {
        match advance(&mut session, arguments, &ids, &paths) {
            // The daemon died under a Stream session: the run begins again at what is committed.
            Err(ClientError::RunInterrupted { .. }) => {}
            other => other?,
        }
    }
    say(&format!("verified {}", verify_rows(&mut session, &paths)));
    session.close()?;
    say("done");
    Ok(())
}

fn advance(session: &mut Session, arguments: &Arguments, ids: &[u32], paths: &[u64]) -> Result<(), ClientError> {
    if session.length() < arguments.prompt {
        // In pieces, so that kills meet half-filled runs as well.
        let end = arguments.prompt.min(session.length() + 100);
        return try_fill(session, &ids[..end]);
    }
    let position = session.length();
    if position == arguments.gate {
        // The end of the input is as good as a line.
        let _ = std::io::stdin().read_line(&mut String::new());
    }
    let outputs = decode(session, ids, paths, AttendMode::Sparse)?;
    let bytes: Vec<u8> = bits(&outputs).iter().flat_map(|word| word.to_le_bytes()).collect();
    say(&format!("token {position} {:016x}", xxh3_64(&bytes)));
    if position.is_multiple_of(5) {
        session.store_opaque(&(position as u64).to_le_bytes())?;
    }
    if position.is_multiple_of(97) {
        say(&format!("verified {}", verify_rows(session, paths)));
    }
    std::thread::sleep(arguments.pause);
    Ok(())
}

/// The state that a killed worker stored is whole, and no more than five tokens behind the committed ones.
fn check_opaque(session: &Session) {
    let Ok(bytes) = <[u8; 8]>::try_from(session.opaque()) else {
        assert!(session.opaque().is_empty(), "a torn opaque state of {} bytes", session.opaque().len());
        return;
    };
    let position = u64::from_le_bytes(bytes) as usize;
    assert!(position.is_multiple_of(5) && position < session.length() + 1, "state of token {position} at length {}", session.length());
}
