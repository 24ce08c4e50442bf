//! What a killed daemon finds again, and what it must not serve.

use std::io::{Read, Seek, SeekFrom, Write};
use std::path::Path;

use crate::support::{append, check_rows, check_slots, config, crash, open, open_request, register, registration, shape, start, tokens};
use sluice_daemon::engine::command::{LeaseKey, Peer, SequenceStatus};
use sluice_daemon::engine::{EngineError, EngineHandle};
use sluice_kernels::scales::RowScale;
use sluice_kernels::shape::{ModelShape, RowType};

async fn sealed_tokens(engine: &EngineHandle, lease: LeaseKey, wanted: u64) {
    for _ in 0..1000 {
        let listed = engine.list(None).await.expect("listed");
        if listed.iter().any(|info| info.lease == lease && info.sealed_tokens >= wanted) {
            return;
        }
        tokio::time::sleep(std::time::Duration::from_millis(2)).await;
    }
    panic!("{wanted} tokens were not sealed");
}

#[tokio::test(flavor = "multi_thread")]
async fn models_paths_and_live_leases_are_found_again() {
    let folder = tempfile::tempdir().expect("a folder");
    let engine = start(config(folder.path()));
    let shape = shape(Some(600));
    let model = register(&engine, &shape).await;
    let prompt = tokens(1500, 1);
    let lease = open(&engine, model, &prompt).await.lease;
    append(&engine, lease, &shape, &prompt, 0).await;
    let epoch = engine.boot_epoch();
    crash(engine).await;

    let engine = start(config(folder.path()));
    assert_ne!(engine.boot_epoch(), epoch);
    assert_eq!(register(&engine, &shape).await, model, "the model keeps its id");
    let listed = engine.list(None).await.expect("listed");
    assert_eq!(listed.len(), 1);
    assert_eq!((listed[0].lease, listed[0].status, listed[0].committed_tokens), (lease, SequenceStatus::Held, 1500));
    check_rows(&engine, lease, &shape, &prompt).await;
    let longer = [prompt.clone(), tokens(700, 2)].concat();
    append(&engine, lease, &shape, &longer, 1500).await;
    check_rows(&engine, lease, &shape, &longer).await;
    engine.close(lease).await.expect("closed");
    assert_eq!(open(&engine, model, &longer).await.matched_tokens, 2048);
    check_slots(&engine).await.expect("slots add up");
}

#[tokio::test(flavor = "multi_thread")]
async fn scales_of_fp8_rows_are_a_part_of_the_model_and_kept() {
    let folder = tempfile::tempdir().expect("a folder");
    let engine = start(config(folder.path()));
    let scaled = |factor: f32| {
        let scale = |lane: usize| RowScale { key: 0.1 * factor / (lane + 3) as f32, value: factor.sqrt() };
        let plain = shape(Some(600));
        let scales = plain.layers.iter().map(|layer| (0..layer.lanes()).map(scale).collect::<Vec<_>>().into()).collect();
        ModelShape { row_type: RowType::Fp8, scales, ..plain }
    };
    let model = register(&engine, &scaled(1.7)).await;
    crash(engine).await;
    let engine = start(config(folder.path()));
    assert_eq!(register(&engine, &scaled(1.7)).await, model, "the journal has the same scales, to the bit");
    let others = engine.register_model(registration(&scaled(1.7f32.next_up()))).await;
    assert!(matches!(others, Err(EngineError::Exists { field: "model.name", .. })), "{others:?}");
    engine.shutdown().await.expect("stopped");
}

#[tokio::test(flavor = "multi_thread")]
async fn files_that_the_journal_does_not_know_are_deleted() {
    let folder = tempfile::tempdir().expect("a folder");
    let engine = start(config(folder.path()));
    register(&engine, &shape(None)).await;
    crash(engine).await;
    let orphans = ["seg-77.rows", "seg-77.labels-3", "open-99", "board-99", "spare-7"].map(|name| folder.path().join("arena").join(name));
    for orphan in &orphans {
        std::fs::write(orphan, b"torn").expect("written");
    }
    let foreign = folder.path().join("arena").join("README");
    std::fs::write(&foreign, b"not ours").expect("written");
    let engine = start(config(folder.path()));
    assert!(orphans.iter().all(|orphan| !orphan.exists()), "orphans are deleted");
    assert!(foreign.exists(), "other files are left alone");
    engine.shutdown().await.expect("stopped");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_sequence_whose_open_slots_are_gone_is_dropped_and_its_chunks_stay() {
    let folder = tempfile::tempdir().expect("a folder");
    let engine = start(config(folder.path()));
    let shape = shape(None);
    let model = register(&engine, &shape).await;
    let prompt = tokens(1024, 1);
    let lease = open(&engine, model, &prompt).await.lease;
    append(&engine, lease, &shape, &prompt, 0).await;
    sealed_tokens(&engine, lease, 1024).await;
    crash(engine).await;
    std::fs::remove_file(folder.path().join("arena").join(format!("open-{}", lease.sequence))).expect("removed");

    let engine = start(config(folder.path()));
    assert_eq!(engine.close(lease).await, Err(EngineError::NotFound { field: "lease.sequence_id", value: lease.sequence }));
    let opened = open(&engine, model, &prompt).await;
    assert_eq!(opened.matched_tokens, 1024);
    check_rows(&engine, opened.lease, &shape, &prompt).await;
}

/// Flips one byte of the rows of slot `slot` (both lanes' planes lie behind each other; plane 0 starts the file).
fn flip(arena: &Path, slot: u64) {
    let name = std::fs::read_dir(arena).expect("arena").flatten().map(|entry| entry.path());
    let rows = name.filter(|path| path.extension().is_some_and(|extension| extension == "rows")).min().expect("a segment");
    let mut file = std::fs::OpenOptions::new().read(true).write(true).open(rows).expect("opened");
    let at = SeekFrom::Start(slot * 2 * 256 * 256 + 5_000);
    let mut byte = [0];
    file.seek(at).and_then(|_| file.read_exact(&mut byte)).expect("read");
    file.seek(at).and_then(|_| file.write_all(&[byte[0] ^ 1])).expect("written");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_flipped_byte_ends_the_prefix_before_its_chunk() {
    let folder = tempfile::tempdir().expect("a folder");
    let engine = start(config(folder.path()));
    let shape = shape(None);
    let model = register(&engine, &shape).await;
    let prompt = tokens(1280, 1);
    let lease = open(&engine, model, &prompt).await.lease;
    append(&engine, lease, &shape, &prompt, 0).await;
    engine.close(lease).await.expect("closed");
    crash(engine).await;
    flip(&folder.path().join("arena"), 3);

    let engine = start(config(folder.path()));
    let opened = open(&engine, model, &prompt).await;
    assert_eq!(opened.matched_tokens, 768, "chunk 3 is damaged");
    assert_eq!(engine.counters().quarantined_chunks.get(), 1);
    append(&engine, opened.lease, &shape, &prompt, 768).await;
    check_rows(&engine, opened.lease, &shape, &prompt).await;
    engine.close(opened.lease).await.expect("closed");
    let again = open(&engine, model, &prompt).await;
    assert_eq!(again.matched_tokens, 1280, "a sound copy has taken the name");
    check_rows(&engine, again.lease, &shape, &prompt).await;
    engine.close(again.lease).await.expect("closed");
    check_slots(&engine).await.expect("slots add up");
}

/// A process that holds a lease and does nothing.
struct Holder(std::process::Child);

impl Holder {
    fn start() -> Self {
        Self(std::process::Command::new("sleep").arg("600").spawn().expect("a child"))
    }

    fn pid(&self) -> u32 {
        self.0.id()
    }

    fn kill(&mut self) {
        self.0.kill().and_then(|()| self.0.wait()).expect("killed");
    }
}

impl Drop for Holder {
    fn drop(&mut self) {
        let _ = self.0.kill().and_then(|()| self.0.wait());
    }
}

async fn parked(engine: &EngineHandle, lease: LeaseKey) {
    for _ in 0..1000 {
        let listed = engine.list(None).await.expect("listed");
        if listed.iter().any(|info| info.lease == lease && info.status == SequenceStatus::Parked) {
            return;
        }
        tokio::time::sleep(std::time::Duration::from_millis(2)).await;
    }
    panic!("the sequence was not parked");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_dead_holders_sequence_is_parked_and_resumed_to_its_last_token() {
    let folder = tempfile::tempdir().expect("a folder");
    let mut engine = start(config(folder.path()));
    let shape = shape(Some(600));
    let model = register(&engine, &shape).await;
    for restart in [false, true] {
        let mut holder = Holder::start();
        let prompt = tokens(1100, u32::from(restart));
        let mut request = open_request(model, &prompt);
        request.holder_pid = holder.pid();
        let opened = engine.open(request).await.expect("opened");
        append(&engine, opened.lease, &shape, &prompt, 0).await;
        if restart {
            crash(engine).await;
            holder.kill();
            engine = start(config(folder.path()));
        } else {
            holder.kill();
        }
        parked(&engine, opened.lease).await;
        let stale = engine.truncate(opened.lease, 10).await;
        assert!(matches!(stale, Err(EngineError::State { .. })), "a parked lease is refused: {stale:?}");

        let mut request = open_request(model, &[]);
        request.resume = Some(opened.lease.sequence);
        let resumed = engine.open(request.clone()).await.expect("resumed");
        assert_eq!((resumed.matched_tokens, resumed.lease.generation), (1100, opened.lease.generation + 1));
        assert_eq!(resumed.token_ids, prompt);
        assert!(matches!(engine.close(opened.lease).await, Err(EngineError::StaleLease { .. })), "the dead holder's lease is stale");
        assert!(matches!(engine.open(request).await, Err(EngineError::State { .. })), "it is held again");
        check_rows(&engine, resumed.lease, &shape, &prompt).await;
        engine.close(resumed.lease).await.expect("closed");
    }
    check_slots(&engine).await.expect("slots add up");
}

#[tokio::test(flavor = "multi_thread")]
async fn parked_sequences_are_bounded_and_the_oldest_goes_first() {
    let folder = tempfile::tempdir().expect("a folder");
    let mut limits = config(folder.path());
    limits.parked_sequences_max = 2;
    let engine = start(limits);
    let shape = shape(None);
    let model = register(&engine, &shape).await;
    let mut leases = Vec::new();
    for seed in 0..3 {
        let mut holder = Holder::start();
        let prompt = tokens(300, seed);
        let mut request = open_request(model, &prompt);
        request.holder_pid = holder.pid();
        let lease = engine.open(request).await.expect("opened").lease;
        append(&engine, lease, &shape, &prompt, 0).await;
        holder.kill();
        parked(&engine, lease).await;
        leases.push(lease);
    }
    let left: Vec<LeaseKey> = engine.list(None).await.expect("listed").iter().map(|info| info.lease).collect();
    assert_eq!(left, leases[1..]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lease_without_a_process_ends_when_it_is_idle() {
    let folder = tempfile::tempdir().expect("a folder");
    let mut limits = config(folder.path());
    limits.stream_idle = std::time::Duration::from_millis(100);
    let engine = start(limits);
    let model = register(&engine, &shape(None)).await;
    let mut remote = open_request(model, &[]);
    remote.peer = Peer::Remote;
    let lease = engine.open(remote).await.expect("opened").lease;
    let local = open(&engine, model, &[]).await.lease;
    parked(&engine, lease).await;
    let listed = engine.list(None).await.expect("listed");
    assert!(listed.iter().any(|info| info.lease == local && info.status == SequenceStatus::Held), "a process's lease has no timer");
}

#[tokio::test(flavor = "multi_thread")]
async fn two_daemons_do_not_share_an_arena_folder() {
    let folder = tempfile::tempdir().expect("a folder");
    let engine = start(config(folder.path()));
    let second = sluice_daemon::engine::Engine::start(config(folder.path()), std::sync::Arc::default());
    let refused = second.map(drop).expect_err("the folder is in use").to_string();
    let arena = folder.path().join("arena");
    assert_eq!(refused, format!("arena_dir: {} is outside folders that no running daemon uses", arena.display()));
    engine.register_model(registration(&shape(None))).await.expect("the first one still serves");
}
