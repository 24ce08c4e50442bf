//! Labels: a sidecar of sealed chunks, made when a calibration comes and for every chunk after it.

use std::sync::Arc;

use crate::direct::{append, attach, refresh, segment};
use crate::support::{config, crash, open, register, registration, rows, shape, start, tokens};
use sluice_daemon::engine::EngineHandle;
use sluice_daemon::engine::command::LeaseKey;
use sluice_kernels::device::{DeviceKind, LabelJob};
use sluice_kernels::label::{Calibration, LabelCoder, LabelPlan, LaneCalibration, LayerCalibration};
use sluice_kernels::layout::ClassLayout;
use sluice_kernels::sequence::Sequence;
use sluice_kernels::shape::{LaneKind, ModelShape};
use sluice_kernels::shared::segment::{Access, LabelSegment};
use sluice_kernels::slot::SlotClass;

fn calibration(shape: &ModelShape, high: f32) -> Calibration {
    let lane = |lane: u16| LaneCalibration {
        order: (0..64).map(|rank| (rank * 5 + lane) % 64).collect(),
        magnitude: vec![1.0; 64],
        low: vec![0.0; 64],
        high: vec![high; 64],
    };
    let selected = shape.layers.iter().enumerate().filter(|(_, layer)| layer.kind == LaneKind::Selected);
    let layers = selected.map(|(layer, of)| LayerCalibration { layer: layer as u16, lanes: (0..of.kv_heads).map(lane).collect() });
    Calibration { version: 1, plan: LabelPlan::small(64), text_hash: String::new(), seed: 0, tokens: 1, layers: layers.collect() }
}

/// Compares the label pages of every sealed chunk with labels that the plain device makes of the rows that were appended.
async fn check_labels(engine: &EngineHandle, lease: LeaseKey, sequence: &Sequence, calibration: &Calibration, tokens: &[u32]) {
    let mut device = sluice_kernels::device::open(DeviceKind::Reference, 1).expect("a device");
    let shape = sequence.shape();
    let layout = Arc::new(ClassLayout::labels(shape, &calibration.plan));
    for chunk in 0..tokens.len() / 256 {
        let slot = sequence.board().slot(SlotClass::Selected, chunk).expect("a slot");
        let files = segment(engine, lease, slot.segment).await;
        let (label_set, file) = files.labels.expect("labels");
        assert_eq!(Some(label_set), sequence.board().label_set());
        let labels = LabelSegment::map(label_set, files.slots, Arc::clone(&layout), &file, Access::ReadOnly).expect("mapped");
        for plane in &layout.planes {
            let layer = usize::from(plane.layer);
            let geometry = sequence.part(layer).geometry;
            let page = rows(&tokens[..(chunk + 1) * 256], chunk * 256, layer, geometry.heads.lanes());
            let coder = LabelCoder::new(&calibration.plan, calibration.layer(layer).expect("a selected layer"));
            let mut expected = vec![0; plane.page_bytes as usize];
            device.label(&LabelJob { geometry: &geometry, page: &page, coder: &coder }, &mut expected);
            assert!(labels.page(plane, slot.index) == expected, "chunk {chunk} layer {layer}: labels differ");
            assert!(expected.iter().any(|&byte| byte != 0), "the labels say something");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn sealed_and_later_chunks_are_labelled_and_the_first_calibration_wins() {
    let folder = tempfile::tempdir().expect("a folder");
    let engine = start(config(folder.path()));
    let shape = shape(Some(600));
    let model = register(&engine, &shape).await;
    let lease = open(&engine, model, &[]).await.lease;
    let (mut sequence, _) = attach(&engine, lease).await;
    let all = tokens(256 * 9, 4);
    append(&engine, lease, &mut sequence, &all[..1300], 0).await;
    assert_eq!(sequence.board().label_set(), None);

    let first = calibration(&shape, 2.0);
    let json = serde_json::to_vec(&first).expect("JSON");
    assert!(engine.set_calibration(model, json.clone()).await.expect("set").accepted);
    let second = serde_json::to_vec(&calibration(&shape, 1.5)).expect("JSON");
    let refused = engine.set_calibration(model, second).await.expect("answered");
    assert!(!refused.accepted && refused.json == json, "the first calibration is in force");

    append(&engine, lease, &mut sequence, &all, 1300).await;
    while sequence.sealed_chunks() < 9 {
        refresh(&engine, lease, &mut sequence).await;
        tokio::time::sleep(std::time::Duration::from_millis(1)).await;
    }
    check_labels(&engine, lease, &sequence, &first, &all).await;
    crash(engine).await;
    let engine = start(config(folder.path()));
    check_labels(&engine, lease, &sequence, &first, &all).await;
    assert!(engine.register_model(registration(&shape)).await.expect("known").calibrated);
    engine.close(lease).await.expect("closed");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_registration_may_bring_its_calibration() {
    let folder = tempfile::tempdir().expect("a folder");
    let engine = start(config(folder.path()));
    let shape = shape(None);
    let given = calibration(&shape, 2.0);
    let mut request = registration(&shape);
    request.calibration_json = serde_json::to_vec(&given).expect("JSON");
    let registered = engine.register_model(request).await.expect("registered");
    assert!(registered.calibrated);
    let lease = open(&engine, registered.model, &[]).await.lease;
    let in_force = engine.calibration_of(lease).await.expect("answered").expect("one is in force");
    assert_eq!(*in_force, given);
}
