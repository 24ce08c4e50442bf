//! Random sequences of open, append, fork, truncate, decode and close, through both ways at once, against a naive model: a sequence is a
//! list of token ids, and its rows are what they hash to.

mod support;

use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};
use sluice_client::{Attach, AttendMode, Client, Model, Session};
use sluice_kernels::budget::Settings;
use sluice_kernels::shape::{LaneKind, ModelShape, RowType};
use support::daemon::{Daemon, DaemonOptions};
use support::oracle::{assert_close, dense};
use support::rows::{path_hashes, token_ids};
use support::{ask, bits, decode, fill, hybrid_shape, options, plain_shape, register, tolerance, verify_rows};
use tonic::Code;

#[derive(Clone, Debug)]
enum Action {
    /// Opens the first tokens of one of three texts, directly or not.
    Open {
        text: u64,
        tokens: usize,
        direct: bool,
    },
    /// Appends tokens of the text `text` (at the sequence's own positions).
    Append {
        sequence: usize,
        tokens: usize,
        text: u64,
    },
    Decode {
        sequence: usize,
        tokens: usize,
        text: u64,
    },
    Fork {
        sequence: usize,
        part: usize,
    },
    Truncate {
        sequence: usize,
        part: usize,
    },
    /// Asks an old position densely.
    Ask {
        sequence: usize,
        part: usize,
    },
    Verify {
        sequence: usize,
    },
    Close {
        sequence: usize,
    },
}

const PARTS: usize = 64;
const HELD_MAX: usize = 6;
const LENGTH_MAX: usize = 1200;

fn action() -> impl Strategy<Value = Action> {
    let sequence = 0..HELD_MAX;
    let (text, part) = (0..3u64, 0..=PARTS);
    prop_oneof![
        3 => (text.clone(), 0..900usize, any::<bool>()).prop_map(|(text, tokens, direct)| Action::Open { text, tokens, direct }),
        3 => (sequence.clone(), 1..500usize, text.clone()).prop_map(|(sequence, tokens, text)| Action::Append { sequence, tokens, text }),
        3 => (sequence.clone(), 1..6usize, text).prop_map(|(sequence, tokens, text)| Action::Decode { sequence, tokens, text }),
        2 => (sequence.clone(), part.clone()).prop_map(|(sequence, part)| Action::Fork { sequence, part }),
        2 => (sequence.clone(), part.clone()).prop_map(|(sequence, part)| Action::Truncate { sequence, part }),
        3 => (sequence.clone(), part).prop_map(|(sequence, part)| Action::Ask { sequence, part }),
        2 => sequence.clone().prop_map(|sequence| Action::Verify { sequence }),
        1 => sequence.prop_map(|sequence| Action::Close { sequence }),
    ]
}

/// A held sequence beside what the naive model says it is.
struct Held {
    session: Session,
    ids: Vec<u32>,
}

struct World<'a> {
    client: &'a Client,
    model: &'a Model,
    shape: &'a ModelShape,
    held: Vec<Held>,
}

impl World<'_> {
    fn act(&mut self, action: &Action) {
        match *action {
            Action::Open { text, tokens, direct } => self.open(text, tokens, direct),
            Action::Append { sequence, tokens, text } => self.grow(sequence, tokens, text, false),
            Action::Decode { sequence, tokens, text } => self.grow(sequence, tokens, text, true),
            Action::Fork { sequence, part } => self.fork(sequence, part),
            Action::Truncate { sequence, part } => self.truncate(sequence, part),
            Action::Ask { sequence, part } => self.ask(sequence, part),
            Action::Verify { sequence } => self.verify(sequence),
            Action::Close { sequence } => self.close(sequence),
        }
        for held in &self.held {
            assert_eq!(held.session.length(), held.ids.len(), "length after {action:?}");
        }
    }

    fn open(&mut self, text: u64, tokens: usize, direct: bool) {
        if self.held.len() == HELD_MAX {
            return;
        }
        let ids = token_ids(text, tokens);
        let attach = if direct { support::direct() } else { Attach::Stream };
        let mut session = self.client.open(self.model, &ids, &options(attach, Settings::dense())).expect("open");
        let matched = session.matched_tokens();
        assert!(matched <= tokens, "{matched} matched of {tokens}");
        fill(&mut session, &ids);
        self.held.push(Held { session, ids });
    }

    fn grow(&mut self, sequence: usize, tokens: usize, text: u64, decoding: bool) {
        let shape = self.shape;
        let Some(held) = self.held.get_mut(sequence) else { return };
        let tokens = tokens.min(LENGTH_MAX.saturating_sub(held.ids.len()));
        let from = held.ids.len();
        held.ids.extend_from_slice(&token_ids(text, from + tokens)[from..]);
        if !decoding {
            fill(&mut held.session, &held.ids);
            return;
        }
        let paths = path_hashes(&held.ids);
        for position in from..held.ids.len() {
            let outputs = decode(&mut held.session, &held.ids, &paths, AttendMode::Sparse).expect("decode");
            let expected = (0..shape.layers.len()).flat_map(|layer| {
                let (output, log_sum_exp) = dense(&paths, position, layer, shape);
                output.into_iter().chain(log_sum_exp)
            });
            assert_close(&format!("decoded token {position}"), &outputs, &expected.collect::<Vec<_>>(), tolerance());
        }
    }

    fn has_windows(&self) -> bool {
        self.shape.layers.iter().any(|layer| layer.kind != LaneKind::Selected)
    }

    fn fork(&mut self, sequence: usize, part: usize) {
        if self.held.len() == HELD_MAX {
            return;
        }
        let windows = self.has_windows();
        let Some(held) = self.held.get_mut(sequence) else { return };
        let position = held.ids.len() * part / PARTS;
        match held.session.fork(position) {
            Ok(session) => {
                assert_eq!(session.token_ids(), &held.ids[..position]);
                let ids = held.ids[..position].to_vec();
                self.held.push(Held { session, ids });
            }
            Err(error) => assert!(windows && error.code() == Some(Code::FailedPrecondition), "fork at {position}: {error}"),
        }
    }

    fn truncate(&mut self, sequence: usize, part: usize) {
        let windows = self.has_windows();
        let Some(held) = self.held.get_mut(sequence) else { return };
        let position = held.ids.len() * part / PARTS;
        match held.session.truncate(position) {
            Ok(()) => held.ids.truncate(position),
            Err(error) => assert!(windows && error.code() == Some(Code::FailedPrecondition), "truncate at {position}: {error}"),
        }
    }

    fn ask(&mut self, sequence: usize, part: usize) {
        let Some(held) = self.held.get_mut(sequence) else { return };
        let position = held.ids.len() * part / PARTS;
        if position >= held.ids.len() {
            return;
        }
        let paths = path_hashes(&held.ids);
        for (layer, layer_shape) in self.shape.layers.iter().enumerate() {
            if layer_shape.kind != LaneKind::Selected {
                continue;
            }
            let (expected, expected_lse) = dense(&paths, position, layer, self.shape);
            let (output, log_sum_exp) = ask(&mut held.session, position, layer, AttendMode::Dense);
            assert_close(&format!("layer {layer} at {position} of {}", held.ids.len()), &output, &expected, tolerance());
            assert_close("log-sum-exp", &log_sum_exp, &expected_lse, tolerance());
            let again = ask(&mut held.session, position, layer, AttendMode::Sparse);
            assert_eq!(bits(&again.0), bits(&output), "dense settings are dense");
        }
    }

    fn verify(&mut self, sequence: usize) {
        let Some(held) = self.held.get_mut(sequence) else { return };
        let lanes: usize = self.shape.layers.iter().filter(|layer| layer.kind == LaneKind::Selected).map(|layer| layer.lanes()).sum();
        assert_eq!(verify_rows(&mut held.session, &path_hashes(&held.ids)), held.ids.len() * lanes);
    }

    fn close(&mut self, sequence: usize) {
        if sequence < self.held.len() {
            self.held.swap_remove(sequence).session.close().expect("close");
        }
    }
}

fn check(name: &str, shape: &ModelShape) {
    // Room for what can be held, and little more: chunks of closed sequences are shed and their slots used again.
    let chunk: usize = shape.layers.iter().map(|layer| layer.lanes() * layer.row_bytes(shape.row_type) * 256).sum();
    let arena_bytes = (HELD_MAX * LENGTH_MAX.div_ceil(256) + 8) * chunk;
    let options = DaemonOptions { arena_bytes: arena_bytes as u64, segment_bytes: 1 << 20, ..DaemonOptions::default() };
    let daemon = Daemon::start(options);
    let client = daemon.client();
    let model = register(&client, name, shape);
    let mut runner = TestRunner::new(Config { cases: 24, failure_persistence: None, ..Config::default() });
    let result = runner.run(&proptest::collection::vec(action(), 1..40), |actions| {
        let mut world = World { client: &client, model: &model, shape, held: Vec::new() };
        for action in &actions {
            world.act(action);
        }
        (0..world.held.len()).for_each(|sequence| world.verify(sequence));
        world.held.drain(..).for_each(|held| held.session.close().expect("close"));
        let stats = client.stats().expect("stats");
        assert_eq!((stats.sequences_held, stats.chunks_held, stats.open_slot_bytes), (0, 0, 0));
        Ok(())
    });
    if let Err(error) = result {
        panic!("{error}");
    }
}

#[test]
fn random_histories_of_full_attention_agree_with_the_naive_model() {
    check("property, plain", &plain_shape(RowType::F16));
}

#[test]
fn random_histories_with_sliding_windows_agree_with_the_naive_model() {
    check("property, hybrid", &hybrid_shape(RowType::F32));
}
