//! Direct holders: what they may still be reading is not reused, and what they break breaks nobody else.

use std::time::Duration;

use crate::direct::{append, attach, attach_lanes, refresh};
use crate::support::{check_rows, check_slots, config, open, register, shape, start, tokens};
use sluice_daemon::engine::command::{EngineStats, LeaseKey, SequenceStatus};
use sluice_daemon::engine::{EngineError, EngineHandle};
use sluice_kernels::sequence::Sequence;
use sluice_kernels::shape::ModelShape;
use sluice_kernels::shared::board::BoardState;

async fn until(engine: &EngineHandle, what: &str, holds: impl Fn(&EngineStats) -> bool) {
    for _ in 0..1000 {
        if holds(&engine.stats().await.expect("stats")) {
            return;
        }
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
    panic!("never: {what}: {:?}", engine.stats().await);
}

async fn sealed(engine: &EngineHandle, lease: LeaseKey, sequence: &mut Sequence, chunks: usize) {
    while sequence.sealed_chunks() < chunks {
        refresh(engine, lease, sequence).await;
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn truncated_chunks_stay_until_the_step_that_may_read_them_is_over() {
    let folder = tempfile::tempdir().expect("a folder");
    let engine = start(config(folder.path()));
    let model = register(&engine, &shape(None)).await;
    let lease = open(&engine, model, &[]).await.lease;
    let (mut sequence, _) = attach(&engine, lease).await;
    append(&engine, lease, &mut sequence, &tokens(1024, 1), 0).await;
    sealed(&engine, lease, &mut sequence, 4).await;

    sequence.open().start_step();
    sequence.begin_truncate(0).expect("begun");
    assert_eq!(engine.truncate(lease, 0).await, Ok(0));
    tokio::time::sleep(Duration::from_millis(100)).await;
    assert_eq!(engine.stats().await.expect("stats").chunks_held, 4, "a step is running");
    sequence.open().complete_step();
    until(&engine, "the chunks are let go of", |stats| stats.chunks_held == 0).await;
    sequence.truncated(0);
    engine.close(lease).await.expect("closed");
    check_slots(&engine).await.expect("slots add up");
}

#[tokio::test(flavor = "multi_thread")]
async fn window_slots_wait_in_limbo_for_running_steps_and_for_dead_leases_no_longer() {
    let folder = tempfile::tempdir().expect("a folder");
    let engine = start(config(folder.path()));
    let model = register(&engine, &shape(Some(300))).await;
    let lease = open(&engine, model, &[]).await.lease;
    let (mut sequence, _) = attach(&engine, lease).await;
    sequence.open().start_step();
    append(&engine, lease, &mut sequence, &tokens(256 * 12, 1), 0).await;
    sealed(&engine, lease, &mut sequence, 12).await;
    // 12 chunks are sealed; a window of 300 tokens and a run of 4 open slots need the last 6 of them.
    until(&engine, "six window slots are in limbo", |stats| stats.limbo_slots == 6).await;
    tokio::time::sleep(Duration::from_millis(50)).await;
    assert_eq!(engine.stats().await.expect("stats").limbo_slots, 6, "the step is still running");
    sequence.open().complete_step();
    until(&engine, "limbo is empty", |stats| stats.limbo_slots == 0).await;

    sequence.open().start_step();
    append(&engine, lease, &mut sequence, &tokens(256 * 14, 1), 256 * 12).await;
    until(&engine, "two more are in limbo", |stats| stats.limbo_slots == 2).await;
    engine.close(lease).await.expect("closed");
    until(&engine, "a closed lease reads nothing", |stats| stats.limbo_slots == 0).await;
    check_slots(&engine).await.expect("slots add up");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_holder_that_breaks_its_file_poisons_its_own_sequence_only() {
    let folder = tempfile::tempdir().expect("a folder");
    let engine = start(config(folder.path()));
    let shape = shape(None);
    let model = register(&engine, &shape).await;
    let prompt = tokens(700, 9);
    let bystander = open(&engine, model, &prompt).await.lease;
    crate::support::append(&engine, bystander, &shape, &prompt, 0).await;
    for damage in ["not finite", "committed word", "cut short", "record"] {
        let lease = open(&engine, model, &[]).await.lease;
        let (mut sequence, file) = attach(&engine, lease).await;
        append(&engine, lease, &mut sequence, &tokens(255, 5), 0).await;
        match damage {
            "not finite" => {
                let slots = sequence.open();
                let class = slots.layout().class(sluice_kernels::slot::SlotClass::Selected).clone();
                slots.write_rows(class.class, &class.planes[1], 0, 0, 17, &[0, 0x7c].repeat(128));
                slots.set_committed(256);
            }
            "committed word" => sequence.open().set_committed(u64::MAX),
            "cut short" => file.set_len(0).expect("cut"),
            _ => {
                let record = sluice_kernels::shared::open::SlotRecord { chunk: Some(9), fidelity: None };
                sequence.open().write_record(0, record);
                sequence.open().set_committed(256);
            }
        }
        let poisoned = |state| state == BoardState::Poisoned;
        for _ in 0..1000 {
            if poisoned(sequence.board().state()) {
                break;
            }
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
        assert!(poisoned(sequence.board().state()), "{damage}: the board says so");
        let listed = engine.list(None).await.expect("listed");
        let status = listed.iter().find(|info| info.lease == lease).map(|info| info.status);
        assert_eq!(status, Some(SequenceStatus::Poisoned), "{damage}");
        let refused = engine.truncate(lease, 0).await;
        assert!(matches!(refused, Err(EngineError::State { .. })), "{damage}: {refused:?}");
        engine.close(lease).await.expect("a poisoned sequence can be closed");
    }
    check_rows(&engine, bystander, &shape, &prompt).await;
    engine.close(bystander).await.expect("closed");
    check_slots(&engine).await.expect("slots add up");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_ticket_works_once_and_only_for_the_lease_in_force() {
    let folder = tempfile::tempdir().expect("a folder");
    let engine = start(config(folder.path()));
    let model = register(&engine, &shape(None)).await;
    let lease = open(&engine, model, &[]).await.lease;
    let request = sluice_daemon::engine::command::Attach { lease, lanes: None };
    let ticket = engine.attach(request.clone()).await.expect("a ticket").ticket;
    let redeem = |ticket| {
        let engine = engine.clone();
        async move {
            tokio::task::spawn_blocking(move || engine.redeem_blocking(ticket, crate::support::peer()).map(|_| ())).await.expect("joined")
        }
    };
    assert_eq!(redeem(ticket).await, Ok(()));
    assert!(matches!(redeem(ticket).await, Err(EngineError::Invalid { field: "ticket", .. })), "used");
    assert!(matches!(redeem([9; 16]).await, Err(EngineError::Invalid { field: "ticket", .. })), "never given");
    let ticket = engine.attach(request).await.expect("a ticket").ticket;
    engine.close(lease).await.expect("closed");
    assert!(matches!(redeem(ticket).await, Err(EngineError::Invalid { field: "ticket", .. })), "its lease has ended");
}

/// Two layers of two lanes each, for two workers.
fn shared_shape() -> ModelShape {
    let mut shape = shape(None);
    let layer = shape.layers[0];
    shape.layers[1] = layer;
    shape
}

#[tokio::test(flavor = "multi_thread")]
async fn a_truncation_waits_for_the_steps_of_every_worker() {
    let folder = tempfile::tempdir().expect("a folder");
    let engine = start(config(folder.path()));
    let shape = shared_shape();
    let model = register(&engine, &shape).await;
    let lease = open(&engine, model, &[]).await.lease;
    let (mut low, _) = attach_lanes(&engine, lease, Some(0..1)).await;
    let (mut high, _) = attach_lanes(&engine, lease, Some(1..2)).await;
    let text = tokens(1024, 1);
    // In turns: neither gets further ahead than the open slots allow.
    for end in [512, 1024] {
        append(&engine, lease, &mut low, &text[..end], end - 512).await;
        append(&engine, lease, &mut high, &text[..end], end - 512).await;
    }
    sealed(&engine, lease, &mut low, 4).await;

    // The second worker is inside a step and has given up nothing yet: refused, and nothing has changed.
    high.open().start_step();
    low.begin_truncate(0).expect("begun");
    let refused = engine.truncate(lease, 0).await;
    assert!(matches!(&refused, Err(EngineError::State { state, .. }) if state.contains("1024 tokens are committed")), "{refused:?}");
    assert_eq!(engine.stats().await.expect("stats").chunks_held, 4);
    assert_eq!(low.board().truncations(), 0);
    // It has given its tokens up, and its step over their rows still runs: they stay where they are until it is over.
    high.begin_truncate(0).expect("begun");
    assert_eq!(engine.truncate(lease, 0).await, Ok(0));
    assert_eq!((low.board().truncations(), low.board().sealed_chunks()), (1, 0));
    low.truncated(0);
    append(&engine, lease, &mut low, &tokens(256, 2), 0).await;
    tokio::time::sleep(Duration::from_millis(100)).await;
    assert_eq!(engine.stats().await.expect("stats").chunks_held, 4, "a step of the second worker is running");
    high.open().complete_step();
    until(&engine, "the chunks are let go of", |stats| stats.chunks_held == 0).await;
    high.truncated(0);
    append(&engine, lease, &mut high, &tokens(256, 2), 0).await;
    sealed(&engine, lease, &mut high, 1).await;
    engine.close(lease).await.expect("closed");
    let again = open(&engine, model, &tokens(256, 2)).await;
    assert_eq!(again.matched_tokens, 256, "what both have written since");
    check_rows(&engine, again.lease, &shape, &tokens(256, 2)).await;
    engine.close(again.lease).await.expect("closed");
    check_slots(&engine).await.expect("slots add up");
}

#[tokio::test(flavor = "multi_thread")]
async fn workers_of_all_lanes_and_of_some_do_not_mix() {
    let folder = tempfile::tempdir().expect("a folder");
    let engine = start(config(folder.path()));
    let model = register(&engine, &shared_shape()).await;
    let lanes = |lease, lanes| sluice_daemon::engine::command::Attach { lease, lanes };
    let lease = open(&engine, model, &[]).await.lease;
    engine.attach(lanes(lease, None)).await.expect("all lanes");
    let refused = engine.attach(lanes(lease, Some(1..2))).await;
    assert!(matches!(&refused, Err(EngineError::State { state, .. }) if state.contains("all lanes")), "{refused:?}");
    let lease = open(&engine, model, &[]).await.lease;
    engine.attach(lanes(lease, Some(1..2))).await.expect("the second lane");
    let refused = engine.attach(lanes(lease, None)).await;
    assert!(matches!(refused, Err(EngineError::Invalid { field: "lane_count", .. })), "{refused:?}");
    let refused = engine.attach(lanes(lease, Some(0..2))).await;
    assert!(matches!(refused, Err(EngineError::Invalid { field: "first_lane", .. })), "{refused:?}");
    // Nothing was appended, so what is asked for is whole.
    assert_eq!(engine.truncate(lease, 0).await, Ok(0));
    let refused = engine.truncate(lease, 1).await;
    assert!(matches!(&refused, Err(EngineError::State { state, .. }) if state.contains("lanes 0 to 0 have no worker")), "{refused:?}");
    engine.close(lease).await.expect("closed");
}
