//! A direct worker in the test's own process.

use std::ops::Range;
use std::sync::Arc;

use sluice_daemon::engine::EngineHandle;
use sluice_daemon::engine::command::{Attach, HolderFiles, HolderSegment, LeaseKey};
use sluice_kernels::layout::ClassLayout;
use sluice_kernels::sequence::{Sequence, SequenceFiles};
use sluice_kernels::shape::ModelShape;
use sluice_kernels::shared::segment::{Access, LabelSegment, Segment};

/// Attaches to a sequence; the open file comes along for tests that damage it.
pub(crate) async fn attach(engine: &EngineHandle, lease: LeaseKey) -> (Sequence, std::fs::File) {
    attach_lanes(engine, lease, None).await
}

/// Attaches as the worker of some lanes.
pub(crate) async fn attach_lanes(engine: &EngineHandle, lease: LeaseKey, lanes: Option<Range<u32>>) -> (Sequence, std::fs::File) {
    let ticket = engine.attach(Attach { lease, lanes: lanes.clone() }).await.expect("a ticket").ticket;
    let redeeming = engine.clone();
    let redeemed = tokio::task::spawn_blocking(move || redeeming.redeem_blocking(ticket, crate::support::peer())).await;
    let files: HolderFiles = redeemed.expect("joined").expect("redeemed");
    let open = files.open.try_clone().expect("cloned");
    let files = SequenceFiles {
        shape: files.shape,
        calibration: files.calibration,
        board: files.board,
        open: files.open,
        open_slots: files.open_slots,
        writer: files.writer as usize,
        lanes: lanes.map(|lanes| lanes.start as usize..lanes.end as usize),
        settings: files.settings,
    };
    (Sequence::attach(files).expect("attached"), open)
}

/// A segment and its labels, as a holder gets them.
pub(crate) async fn segment(engine: &EngineHandle, lease: LeaseKey, id: u32) -> HolderSegment {
    let asking = engine.clone();
    tokio::task::spawn_blocking(move || asking.segment_blocking(lease, id)).await.expect("joined").expect("a segment")
}

/// Takes up what is sealed.
pub(crate) async fn refresh(engine: &EngineHandle, lease: LeaseKey, sequence: &mut Sequence) {
    loop {
        let missing = sequence.refresh().expect("a live lease");
        if missing.is_empty() {
            return;
        }
        for id in missing {
            let files = segment(engine, lease, id).await;
            let layout = Arc::new(ClassLayout::new(sequence.shape(), files.class));
            let rows = Segment::map(id, files.slots, layout, &files.rows, Access::ReadOnly).expect("mapped");
            let plan = sequence.plan().cloned();
            let labels = files.labels.zip(plan).map(|((label_set, file), plan)| {
                let layout = Arc::new(ClassLayout::labels(sequence.shape(), &plan));
                Arc::new(LabelSegment::map(label_set, files.slots, layout, &file, Access::ReadOnly).expect("mapped"))
            });
            sequence.add_segment(Arc::new(rows), labels);
        }
    }
}

/// Appends `tokens[first..]` and commits, waiting for seals.
pub(crate) async fn append(engine: &EngineHandle, lease: LeaseKey, sequence: &mut Sequence, tokens: &[u32], first: usize) {
    let shape: Arc<ModelShape> = Arc::clone(sequence.shape());
    let mut first = first;
    while first < tokens.len() {
        refresh(engine, lease, sequence).await;
        let end = (first + 256).min(tokens.len());
        if sequence.check_place(end).is_err() {
            tokio::time::sleep(std::time::Duration::from_millis(1)).await;
            continue;
        }
        for layer in 0..shape.layers.len() {
            let lanes = sequence.part(layer).lanes;
            let rows = crate::support::rows(&tokens[..end], first, layer, shape.layers[layer].lanes());
            let of_lane = rows.len() / shape.layers[layer].lanes();
            sequence.append(layer, first, &rows[lanes.start * of_lane..lanes.end * of_lane]).expect("appended");
        }
        sequence.write_tokens(first, &tokens[first..end]).expect("ids written");
        sequence.commit();
        first = end;
    }
}
