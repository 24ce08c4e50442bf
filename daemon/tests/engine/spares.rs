//! Files of open slots are made ahead, taken by the next sequence, and never cost an Open its memory.

use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::support::{append, check_rows, config, crash, open, open_request, register, shape, start, tokens};
use sluice_daemon::engine::{EngineConfig, EngineError, EngineHandle};
use sluice_kernels::shared::open::OpenLayout;

fn file_bytes(open_slots: u32) -> u64 {
    OpenLayout::new(&shape(None), open_slots).expect("a layout").file_bytes()
}

/// Spare files in the arena, oldest first.
fn spares(folder: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(folder.join("arena")).expect("the arena folder").flatten().map(|entry| entry.path());
    let is_spare = |path: &PathBuf| path.file_name().and_then(|name| name.to_str()).is_some_and(|name| name.starts_with("spare-"));
    let mut spares: Vec<PathBuf> = entries.filter(is_spare).collect();
    spares.sort();
    spares
}

async fn until_spare(engine: &EngineHandle, bytes: u64) {
    for _ in 0..1000 {
        if engine.stats().await.expect("stats").spare_slot_bytes == bytes {
            return;
        }
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
    panic!("never {bytes} bytes: {:?}", engine.stats().await);
}

/// Waits until a spare file has been allocated: the size of one in the making counts already.
async fn until_made(folder: &Path, count: usize, bytes: u64) {
    let allocated = |path: &PathBuf| std::fs::metadata(path).is_ok_and(|file| file.blocks() * 512 >= bytes);
    for _ in 0..1000 {
        let spares = spares(folder);
        if spares.len() == count && spares.iter().all(allocated) {
            // The engine learns of it in its next turn.
            tokio::time::sleep(Duration::from_millis(20)).await;
            return;
        }
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
    panic!("never {count} files: {:?}", spares(folder));
}

#[tokio::test(flavor = "multi_thread")]
async fn the_next_sequence_grows_in_a_file_that_was_made_before_it_came() {
    let folder = tempfile::tempdir_in("/dev/shm").expect("a folder");
    let engine = start(config(folder.path()));
    let shape = shape(None);
    let model = register(&engine, &shape).await;
    assert_eq!(spares(folder.path()), Vec::<PathBuf>::new(), "nobody has opened anything");
    let first = open(&engine, model, &[]).await.lease;
    until_made(folder.path(), 2, file_bytes(4)).await;
    until_spare(&engine, 2 * file_bytes(4)).await;
    assert_eq!(engine.stats().await.expect("stats").open_slot_bytes, file_bytes(4), "spares are no sequence's");
    let inodes: Vec<u64> = spares(folder.path()).iter().map(|path| std::fs::metadata(path).expect("a spare").ino()).collect();

    let prompt = tokens(700, 3);
    let second = open(&engine, model, &prompt).await.lease;
    let taken = std::fs::metadata(folder.path().join("arena").join(format!("open-{}", second.sequence))).expect("open slots").ino();
    assert!(inodes.contains(&taken), "{taken} is none of {inodes:?}");
    append(&engine, second, &shape, &prompt, 0).await;
    check_rows(&engine, second, &shape, &prompt).await;
    until_made(folder.path(), 2, file_bytes(4)).await;
    for lease in [first, second] {
        engine.close(lease).await.expect("closed");
    }
    engine.unregister_model(model).await.expect("removed");
    until_spare(&engine, 0).await;
    assert_eq!(spares(folder.path()), Vec::<PathBuf>::new(), "without a model nobody will take them");

    let model = register(&engine, &shape).await;
    open(&engine, model, &[]).await;
    until_made(folder.path(), 2, file_bytes(4)).await;
    crash(engine).await;
    let engine = start(EngineConfig { spare_files: 0, ..config(folder.path()) });
    assert_eq!(spares(folder.path()), Vec::<PathBuf>::new(), "a start deletes what the journal does not know");
    open(&engine, model, &[]).await;
    tokio::time::sleep(Duration::from_millis(50)).await;
    assert_eq!(engine.stats().await.expect("stats").spare_slot_bytes, 0, "none are asked for");
}

#[tokio::test(flavor = "multi_thread")]
async fn spares_stay_within_the_bytes_of_open_slots_and_make_room_for_sequences() {
    let folder = tempfile::tempdir_in("/dev/shm").expect("a folder");
    let (small, large) = (file_bytes(4), file_bytes(9));
    assert!(large > 2 * small, "{large} bytes, {small} bytes");
    let engine = start(EngineConfig { open_bytes_max: small + large, spare_files: 8, ..config(folder.path()) });
    let model = register(&engine, &shape(None)).await;
    open(&engine, model, &[]).await;
    until_made(folder.path(), (large / small) as usize, small).await;
    let refused = engine.open(sluice_daemon::engine::command::Open { open_slots: 10, ..open_request(model, &[]) }).await;
    assert!(matches!(refused, Err(EngineError::Exhausted { limit: "open_bytes_max", available, .. }) if available == large), "{refused:?}");
    assert_eq!(spares(folder.path()).len(), (large / small) as usize, "a refusal changes nothing");
    let granted = engine.open(sluice_daemon::engine::command::Open { open_slots: 9, ..open_request(model, &[]) }).await;
    granted.expect("the spares make room");
    let stats = engine.stats().await.expect("stats");
    assert_eq!((stats.open_slot_bytes, stats.spare_slot_bytes), (small + large, 0));
    assert_eq!(spares(folder.path()), Vec::<PathBuf>::new());
}
