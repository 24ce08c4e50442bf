//! An engine over a folder of its own, and a worker that appends rows whose values follow from what they are rows of.

use std::path::Path;
use std::sync::Arc;

use sluice_daemon::decode::{Answer, DecodeError, StepDone, StepWork};
use sluice_daemon::engine::command::{LeaseKey, Open, Opened, Peer, RegisterModel};
use sluice_daemon::engine::{Counters, Engine, EngineConfig, EngineError, EngineHandle, EngineState};
use sluice_kernels::shape::{LaneKind, LayerShape, ModelShape, RowType};

/// Values of a row: key, then value.
pub(crate) const ROW_VALUES: usize = 128;

/// A small arena in `folder`.
pub(crate) fn config(folder: &Path) -> EngineConfig {
    EngineConfig {
        arena_dir: folder.join("arena"),
        arena_bytes: 64 << 20,
        segment_bytes: 4 << 20,
        open_bytes_max: 256 << 20,
        max_tokens: 16 * 1024,
        device_threads: 1,
        side_socket: folder.join("side.sock"),
        lease_poll: std::time::Duration::from_millis(20),
        ..EngineConfig::default()
    }
}

/// Starts an engine.
pub(crate) fn start(config: EngineConfig) -> EngineHandle {
    Engine::start(config, Arc::new(Counters::default())).expect("the engine starts")
}

/// What a kill leaves: the engine ends without writing anything more.
pub(crate) async fn crash(engine: EngineHandle) {
    engine.panic_for_test();
    let mut state = engine.state();
    state.wait_for(|state| *state == EngineState::Poisoned).await.expect("the engine says that it has failed");
}

/// Two full-attention layers of different widths and, if wanted, a sliding-window layer between them.
pub(crate) fn shape(window: Option<u32>) -> ModelShape {
    let layer = |kind, kv_heads| LayerShape { kind, query_heads: 2 * kv_heads, kv_heads, head_dim: 64, softmax_scale: 0.125 };
    let mut layers = vec![layer(LaneKind::Selected, 2), layer(LaneKind::Selected, 1)];
    if let Some(tokens) = window {
        layers.insert(1, layer(LaneKind::Window { tokens }, 1));
    }
    ModelShape::unscaled(RowType::F16, layers)
}

/// Registers a model of `shape`.
pub(crate) async fn register(engine: &EngineHandle, shape: &ModelShape) -> u64 {
    engine.register_model(registration(shape)).await.expect("the model is registered").model
}

/// A registration of `shape`.
pub(crate) fn registration(shape: &ModelShape) -> RegisterModel {
    RegisterModel {
        name: "model".to_owned(),
        namespace: "default".to_owned(),
        weights_digest: vec![7; 32],
        rotary_layout: 1,
        shape: shape.clone(),
        calibration_json: Vec::new(),
    }
}

/// This process.
pub(crate) fn peer() -> Peer {
    Peer::Local { pid: std::process::id() as i32, uid: rustix::process::getuid().as_raw() }
}

/// An Open of `tokens`.
pub(crate) fn open_request(model: u64, tokens: &[u32]) -> Open {
    Open {
        model,
        tokens: tokens.to_vec(),
        extra_keys: Vec::new(),
        settings: None,
        resume: None,
        open_slots: 0,
        holder_pid: 0,
        peer: peer(),
    }
}

/// Opens `tokens`.
pub(crate) async fn open(engine: &EngineHandle, model: u64, tokens: &[u32]) -> Opened {
    engine.open(open_request(model, tokens)).await.expect("the sequence is opened")
}

/// The bytes of one row: finite f16 values out of (path, layer, lane, element).
pub(crate) fn row(path: u64, layer: usize, lane: usize) -> Vec<u8> {
    let value = |element: usize| {
        let mixed = path ^ ((layer as u64) << 40) ^ ((lane as u64) << 48) ^ (element as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        let mixed = mixed.wrapping_mul(0xff51_afd7_ed55_8ccd);
        // Exponent 15 or 14: between 0.5 and 2, never infinite.
        (0x3800 | (mixed >> 52) as u16 & 0x07ff).to_le_bytes()
    };
    (0..ROW_VALUES).flat_map(value).collect()
}

/// Path hashes of all positions.
pub(crate) fn path_hashes(tokens: &[u32]) -> Vec<u64> {
    let hash = tokens.iter().scan(0xcbf2_9ce4_8422_2325_u64, |hash, &token| {
        *hash = (*hash ^ u64::from(token)).wrapping_mul(0x0100_0000_01b3).rotate_left(17);
        Some(*hash)
    });
    hash.collect()
}

/// Rows `[lane][token]` of the tokens from `first` on.
pub(crate) fn rows(tokens: &[u32], first: usize, layer: usize, lanes: usize) -> Vec<u8> {
    let paths = path_hashes(tokens);
    (0..lanes).flat_map(|lane| paths[first..].iter().flat_map(move |&path| row(path, layer, lane))).collect()
}

/// Sends one message of rows through the daemon's own worker, waiting while the open slots are full.
pub(crate) async fn send(engine: &EngineHandle, work: StepWork) -> Result<StepDone, DecodeError> {
    loop {
        let decoder = engine.decoder().expect("a handle from outside has a decoder");
        let mut results = decoder.steps(vec![work.clone()]).await?;
        match results.pop().expect("one result for one step") {
            Err(error) if error.is_full() => tokio::time::sleep(std::time::Duration::from_millis(1)).await,
            result => return result,
        }
    }
}

/// Rows of `tokens[first..]` of one layer as a message.
pub(crate) fn append_work(lease: LeaseKey, shape: &ModelShape, tokens: &[u32], first: usize, layer: usize) -> StepWork {
    StepWork {
        lease,
        layer,
        answer: Answer::Nothing,
        first_position: first as u64,
        count: None,
        queries: Vec::new().into(),
        rows: rows(tokens, first, layer, shape.layers[layer].lanes()).into(),
        token_ids: if layer == 0 { tokens[first..].to_vec() } else { Vec::new() },
    }
}

/// Appends `tokens[first..]`, in runs that fit the open slots.
pub(crate) async fn append(engine: &EngineHandle, lease: LeaseKey, shape: &ModelShape, tokens: &[u32], first: usize) {
    let mut first = first;
    while first < tokens.len() {
        let end = (first + 300).min(tokens.len());
        for layer in 0..shape.layers.len() {
            send(engine, append_work(lease, shape, &tokens[..end], first, layer)).await.expect("rows are stored");
        }
        first = end;
    }
}

/// Compares a sequence with what it must be: every row of the full-attention layers, and the attention of the sliding-window layers.
pub(crate) async fn check_rows(engine: &EngineHandle, lease: LeaseKey, shape: &ModelShape, tokens: &[u32]) {
    if tokens.is_empty() {
        return;
    }
    for (layer, layer_shape) in shape.layers.iter().enumerate() {
        let answer = if layer_shape.kind == LaneKind::Selected { Answer::Rows } else { Answer::Sparse };
        let query: Vec<f32> =
            (0..usize::from(layer_shape.query_heads) * 64).map(|index| ((index * 37 % 101) as f32 - 50.0) / 50.0).collect();
        let work = StepWork {
            lease,
            layer,
            answer,
            first_position: tokens.len() as u64 - 1,
            count: Some(1),
            queries: query.iter().flat_map(|value| value.to_le_bytes()).collect::<Vec<u8>>().into(),
            rows: Vec::new().into(),
            token_ids: Vec::new(),
        };
        let done = send(engine, work).await.expect("the step is answered");
        match layer_shape.kind {
            LaneKind::Selected => check_selected(&done, layer, tokens),
            LaneKind::Window { tokens: width } => check_window(&done, layer, layer_shape, &query, tokens, width as usize),
        }
    }
}

/// Without a calibration every row is attended, so all of them are answered.
fn check_selected(done: &StepDone, layer: usize, tokens: &[u32]) {
    let paths = path_hashes(tokens);
    for (lane, found) in done.rows.iter().enumerate() {
        let expected: Vec<u8> = paths.iter().flat_map(|&path| row(path, layer, lane)).collect();
        assert_eq!(found.positions.len(), tokens.len(), "layer {layer} lane {lane}: all positions");
        assert!(found.rows == expected, "layer {layer} lane {lane}: rows differ");
    }
}

/// Softmax attention over the last `width` rows, in double precision from the definition.
fn check_window(done: &StepDone, layer: usize, shape: &LayerShape, query: &[f32], tokens: &[u32], width: usize) {
    let group = usize::from(shape.query_heads / shape.kv_heads);
    let output: Vec<f32> = done.output.chunks_exact(4).map(|bytes| f32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]])).collect();
    let paths = path_hashes(tokens);
    for head in 0..usize::from(shape.query_heads) {
        let lane_rows = paths[tokens.len().saturating_sub(width)..].iter().map(|&path| values(&row(path, layer, head / group)));
        let lane_rows: Vec<Vec<f64>> = lane_rows.collect();
        let own = &query[head * 64..(head + 1) * 64];
        let score =
            |row: &Vec<f64>| own.iter().zip(&row[..64]).map(|(&q, k)| f64::from(q) * k).sum::<f64>() * f64::from(shape.softmax_scale);
        let weights: Vec<f64> = lane_rows.iter().map(|row| score(row).exp()).collect();
        let total: f64 = weights.iter().sum();
        for channel in 0..64 {
            let expected: f64 = weights.iter().zip(&lane_rows).map(|(weight, row)| weight * row[64 + channel]).sum::<f64>() / total;
            let found = f64::from(output[head * 64 + channel]);
            assert!((found - expected).abs() < 1e-3, "layer {layer} head {head} channel {channel}: {found}, expected {expected}");
        }
    }
}

/// The values of positive, normal f16 elements.
fn values(row: &[u8]) -> Vec<f64> {
    let value = |bytes: &[u8]| {
        let bits = u16::from_le_bytes([bytes[0], bytes[1]]);
        (1.0 + f64::from(bits & 0x3ff) / 1024.0) * 2f64.powi(i32::from(bits >> 10) - 15)
    };
    row.chunks_exact(2).map(value).collect()
}

/// Every slot is free, in limbo, or a chunk's: nothing has leaked.
pub(crate) async fn check_slots(engine: &EngineHandle) -> Result<(), EngineError> {
    for _ in 0..500 {
        let stats = engine.stats().await?;
        if stats.free_slots + stats.limbo_slots + stats.chunk_slots == stats.slots {
            return Ok(());
        }
        tokio::time::sleep(std::time::Duration::from_millis(2)).await;
    }
    let stats = engine.stats().await?;
    panic!("slots have leaked: {stats:?}");
}

/// Distinct token ids.
pub(crate) fn tokens(count: usize, seed: u32) -> Vec<u32> {
    (0..count as u32).map(|index| index.wrapping_mul(2_654_435_761).wrapping_add(seed)).collect()
}
