//! Random histories against a naive model: tokens in memory, rows as a function of the path.

use std::collections::HashSet;

use crate::support::{append, check_rows, check_slots, config, crash, open, peer, register, shape, start, tokens};
use proptest::prelude::*;
use sluice_daemon::engine::command::{Fork, LeaseKey};
use sluice_daemon::engine::{EngineError, EngineHandle};
use sluice_kernels::shape::ModelShape;

#[derive(Clone, Debug)]
enum Act {
    /// Open a prompt of pieces.
    Open(Vec<Piece>),
    /// Append a piece to one of the sequences.
    Append(usize, Piece),
    /// Fork one of the sequences at a part of its length, in 1/16.
    Fork(usize, usize),
    /// Truncate one of the sequences to a part of its length, in 1/16.
    Truncate(usize, usize),
    /// Close one of the sequences.
    Close(usize),
    /// Kill the daemon and start it again.
    Crash,
}

/// A run of tokens; few seeds, so that prefixes meet.
#[derive(Clone, Copy, Debug)]
struct Piece {
    seed: u32,
    count: usize,
}

fn piece() -> impl Strategy<Value = Piece> {
    (0..3u32, prop::sample::select(vec![1, 100, 256, 300, 512])).prop_map(|(seed, count)| Piece { seed, count })
}

fn act() -> impl Strategy<Value = Act> {
    prop_oneof![
        3 => prop::collection::vec(piece(), 0..5).prop_map(Act::Open),
        6 => (any::<usize>(), piece()).prop_map(|(which, piece)| Act::Append(which, piece)),
        3 => (any::<usize>(), 0..=16usize).prop_map(|(which, part)| Act::Fork(which, part)),
        3 => (any::<usize>(), 0..=16usize).prop_map(|(which, part)| Act::Truncate(which, part)),
        2 => any::<usize>().prop_map(Act::Close),
        1 => Just(Act::Crash),
    ]
}

struct Live {
    lease: LeaseKey,
    tokens: Vec<u32>,
}

/// What the daemon must be, in the plainest form.
struct Naive {
    model: u64,
    shape: ModelShape,
    windowed: bool,
    live: Vec<Live>,
    /// Prefixes of whole chunks that were ever committed: no Open may match more.
    committed: HashSet<Vec<u32>>,
    /// Prefixes that were certainly sealed: every Open must match at least these (without window layers).
    sealed: HashSet<Vec<u32>>,
}

fn whole_prefixes(tokens: &[u32]) -> impl Iterator<Item = Vec<u32>> + '_ {
    (1..=tokens.len() / 256).map(|chunks| tokens[..chunks * 256].to_vec())
}

fn longest(set: &HashSet<Vec<u32>>, tokens: &[u32]) -> usize {
    whole_prefixes(tokens).take_while(|prefix| set.contains(prefix)).count() * 256
}

impl Naive {
    async fn extend(&mut self, engine: &EngineHandle, lease: LeaseKey, tokens: &[u32], first: usize) {
        append(engine, lease, &self.shape, tokens, first).await;
        self.committed.extend(whole_prefixes(tokens));
    }

    async fn open(&mut self, engine: &EngineHandle, pieces: &[Piece]) {
        let prompt: Vec<u32> = pieces.iter().flat_map(|piece| tokens(piece.count, piece.seed)).collect();
        let opened = open(engine, self.model, &prompt).await;
        let matched = opened.matched_tokens as usize;
        assert!(matched <= longest(&self.committed, &prompt), "matched {matched} tokens that were never appended");
        if !self.windowed {
            assert!(matched >= longest(&self.sealed, &prompt), "matched {matched}, fewer than were sealed");
        }
        self.extend(engine, opened.lease, &prompt, matched).await;
        self.live.push(Live { lease: opened.lease, tokens: prompt });
    }

    async fn fork(&mut self, engine: &EngineHandle, which: usize, position: usize) {
        let (parent, prefix) = (self.live[which].lease, self.live[which].tokens[..position].to_vec());
        let request = Fork { lease: parent, position: position as u64, open_slots: 0, holder_pid: 0, peer: peer() };
        match engine.fork(request).await {
            Ok(child) => {
                assert_eq!(child.matched_tokens as usize, position);
                assert_eq!(child.token_ids, prefix);
                self.sealed.extend(whole_prefixes(&prefix));
                self.live.push(Live { lease: child.lease, tokens: prefix });
            }
            Err(EngineError::WindowGone { below, above, .. }) => {
                assert!(self.windowed, "refused for a window that the model does not have");
                let request = Fork { position: below, ..request };
                let child = engine.fork(request).await.expect("the position below works");
                engine.close(child.lease).await.expect("closed");
                assert!(above as usize <= self.live[which].tokens.len(), "the position above exists");
            }
            Err(error) => panic!("fork at {position}: {error}"),
        }
    }

    async fn truncate(&mut self, engine: &EngineHandle, which: usize, position: usize) {
        let decoder = engine.decoder().expect("a decoder");
        let length = self.live[which].tokens.len();
        match decoder.truncate(self.live[which].lease, position as u64).await {
            Ok(committed) => {
                assert_eq!(committed as usize, position);
                self.live[which].tokens.truncate(position);
            }
            Err(EngineError::WindowGone { .. }) => assert!(self.windowed && position < length),
            Err(error) => panic!("truncate to {position}: {error}"),
        }
    }
}

async fn history(windowed: bool, acts: Vec<Act>) {
    let folder = tempfile::tempdir().expect("a folder");
    let mut engine = start(config(folder.path()));
    let shape = shape(windowed.then_some(300));
    let model = register(&engine, &shape).await;
    let mut naive = Naive { model, shape, windowed, live: Vec::new(), committed: HashSet::new(), sealed: HashSet::new() };
    for act in acts {
        let which = match &act {
            Act::Append(which, _) | Act::Fork(which, _) | Act::Truncate(which, _) | Act::Close(which) if naive.live.is_empty() => {
                let _ = which;
                continue;
            }
            Act::Append(which, _) | Act::Fork(which, _) | Act::Truncate(which, _) | Act::Close(which) => which % naive.live.len(),
            Act::Open(_) | Act::Crash => 0,
        };
        match act {
            Act::Open(pieces) => naive.open(&engine, &pieces).await,
            Act::Append(_, piece) => {
                let Live { lease, mut tokens } = naive.live.swap_remove(which);
                let first = tokens.len();
                tokens.extend(crate::support::tokens(piece.count, piece.seed));
                naive.extend(&engine, lease, &tokens, first).await;
                naive.live.push(Live { lease, tokens });
            }
            Act::Fork(_, part) => naive.fork(&engine, which, naive.live[which].tokens.len() * part / 16).await,
            Act::Truncate(_, part) => naive.truncate(&engine, which, naive.live[which].tokens.len() * part / 16).await,
            Act::Close(_) => {
                let closed = naive.live.swap_remove(which);
                engine.close(closed.lease).await.expect("closed");
                naive.sealed.extend(whole_prefixes(&closed.tokens));
            }
            Act::Crash => {
                crash(engine).await;
                engine = start(config(folder.path()));
            }
        }
        for live in &naive.live {
            check_rows(&engine, live.lease, &naive.shape, &live.tokens).await;
        }
    }
    for live in naive.live.drain(..) {
        engine.close(live.lease).await.expect("closed");
    }
    check_slots(&engine).await.expect("slots add up");
    let mut stats = engine.stats().await.expect("stats");
    for _ in 0..500 {
        // Chunks of truncated paths are let go of a round later.
        if stats.chunks_held == 0 {
            break;
        }
        tokio::time::sleep(std::time::Duration::from_millis(2)).await;
        stats = engine.stats().await.expect("stats");
    }
    assert_eq!((stats.sequences_held, stats.chunks_held, stats.open_slot_bytes), (0, 0, 0), "nothing is held");
    engine.shutdown().await.expect("stopped");
    let left = std::fs::read_dir(folder.path().join("arena")).expect("the arena folder").flatten();
    let left: Vec<String> = left.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect();
    assert!(left.iter().all(|name| name == "journal.redb" || name.starts_with("seg-")), "files have leaked: {left:?}");
}

fn run(windowed: bool, acts: Vec<Act>) {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().expect("a runtime");
    runtime.block_on(history(windowed, acts));
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, max_shrink_iters: 200, ..ProptestConfig::default() })]

    #[test]
    fn full_attention_histories(acts in prop::collection::vec(act(), 1..30)) {
        run(false, acts);
    }

    #[test]
    fn sliding_window_histories(acts in prop::collection::vec(act(), 1..30)) {
        run(true, acts);
    }
}
