//! What the cross-process tests share.
#![expect(dead_code, unreachable_pub, reason = "every test file uses a part of it")]

pub mod daemon;
#[path = "../../../kernels/tests/support/e4m3.rs"]
mod e4m3;
pub mod oracle;
pub mod rows;

use sluice_client::{
    Attach, AttendMode, Client, ClientError, Model, ModelRegistration, OpenOptions, RotaryLayout, RowsWanted, Session, Step, StepOut,
};
use sluice_kernels::budget::{Budget, Settings};
use sluice_kernels::device::DeviceKind;
use sluice_kernels::shape::{ModelShape, RowType};

use rows::{query_of, rows_of, scaled, selected, window};

/// Two full-attention layers around a sliding-window layer.
pub fn hybrid_shape(row_type: RowType) -> ModelShape {
    scaled(ModelShape::unscaled(row_type, vec![selected(4, 2, 64), window(300, 2, 1, 64), selected(2, 2, 96)]))
}

/// Full-attention layers only.
pub fn plain_shape(row_type: RowType) -> ModelShape {
    scaled(ModelShape::unscaled(row_type, vec![selected(4, 2, 64), selected(2, 1, 64)]))
}

/// Four lanes in every layer, for workers that share a sequence by lanes.
pub fn lane_shape() -> ModelShape {
    ModelShape::unscaled(RowType::F16, vec![selected(8, 4, 64), window(300, 4, 4, 64), selected(4, 4, 64)])
}

pub fn register(client: &Client, name: &str, shape: &ModelShape) -> Model {
    let registration = ModelRegistration {
        name: name.to_owned(),
        weights_digest: name.as_bytes().to_vec(),
        shape: shape.clone(),
        rotary: RotaryLayout::HalfSplit,
        namespace: String::new(),
    };
    client.register_model(&registration, None).expect("registration")
}

/// The device of daemons and direct sessions: the CPU, or the GPU where `SLUICE_TEST_DEVICES` names cuda; without one there the tests fail.
pub fn device() -> DeviceKind {
    let asked = std::env::var("SLUICE_TEST_DEVICES").is_ok_and(|devices| devices.split(',').any(|device| device == "cuda"));
    if asked { DeviceKind::Cuda { ordinal: 0 } } else { DeviceKind::Cpu }
}

/// Free memory of the GPU under test, bytes; without one there is nothing to hold: always as much as can be.
pub fn device_free_bytes() -> u64 {
    let DeviceKind::Cuda { ordinal } = device() else { return u64::MAX >> 1 };
    let gpu = sluice_kernels::device::cuda::Gpu::open(ordinal).expect("the GPU");
    gpu.context.mem_get_info().expect("its memory").0 as u64
}

/// Attached directly on [`device`].
pub fn direct() -> Attach {
    Attach::Direct { device: device(), threads: 1 }
}

/// How far results on [`device`] may be from f64: a GPU splits queries and weights into halves of 16 bits.
pub fn tolerance() -> f64 {
    if device() == DeviceKind::Cpu { 2e-5 } else { 1e-4 }
}

/// A budget small enough that most rows before the horizon are left out.
pub fn sparse_settings() -> Settings {
    Settings { budget: Budget::Ratio { numerator: 1, denominator: 16, floor_tokens: 32, cap_tokens: 0 }, exact_tokens: 64, sink_tokens: 4 }
}

pub fn options(attach: Attach, settings: Settings) -> OpenOptions {
    OpenOptions { attach, settings: Some(settings), open_slots: 4, ..OpenOptions::default() }
}

/// Appends the hashed rows of `ids[session.length()..]`.
pub fn fill(session: &mut Session, ids: &[u32]) {
    try_fill(session, ids).expect("prefill");
}

/// As [`fill`], where the daemon may be killed meanwhile.
pub fn try_fill(session: &mut Session, ids: &[u32]) -> Result<(), ClientError> {
    let paths = rows::path_hashes(ids);
    let shape = session.shape().clone();
    let rest = &ids[session.length()..];
    let wanted = |want: RowsWanted, rows: &mut [u8]| rows.copy_from_slice(&rows_of(&paths[want.positions], want.layer, &shape));
    session.prefill(rest, wanted)
}

/// One layer's output and log-sum-exp of the query of `position`, over rows that are stored.
pub fn ask(session: &mut Session, position: usize, layer: usize, attend: AttendMode) -> (Vec<f32>, Vec<f32>) {
    let layer_shape = session.shape().layers[layer];
    let queries = query_of(position, layer, &layer_shape);
    let mut output = vec![f32::NAN; queries.len()];
    let mut log_sum_exp = vec![f32::NAN; usize::from(layer_shape.query_heads)];
    let step = Step { layer, first_position: position, queries: &queries, rows: None, attend };
    session.step(&step, StepOut { output: &mut output, log_sum_exp: &mut log_sum_exp, report: None }).expect("step");
    (output, log_sum_exp)
}

/// Decodes the token after `ids[..session.length()]`: its rows are stored, its queries attended; all layers' outputs, one after the other.
pub fn decode(session: &mut Session, ids: &[u32], paths: &[u64], attend: AttendMode) -> Result<Vec<f32>, ClientError> {
    let position = session.length();
    let shape = session.shape().clone();
    session.begin(&ids[position..position + 1])?;
    let mut outputs = Vec::new();
    for (layer, layer_shape) in shape.layers.iter().enumerate() {
        let queries = query_of(position, layer, layer_shape);
        let rows = rows_of(&paths[position..position + 1], layer, &shape);
        let mut output = vec![f32::NAN; queries.len()];
        let mut log_sum_exp = vec![f32::NAN; usize::from(layer_shape.query_heads)];
        let step = Step { layer, first_position: position, queries: &queries, rows: Some(&rows), attend };
        session.step(&step, StepOut { output: &mut output, log_sum_exp: &mut log_sum_exp, report: None })?;
        outputs.extend(output);
        outputs.extend(log_sum_exp);
    }
    Ok(outputs)
}

/// Fails unless every row that the session can read up to its last token is the right one. With dense settings these are all rows.
pub fn verify_rows(session: &mut Session, paths: &[u64]) -> usize {
    let shape = session.shape().clone();
    let Some(position) = session.length().checked_sub(1) else { return 0 };
    let mut verified = 0;
    for (layer, layer_shape) in shape.layers.iter().enumerate() {
        if layer_shape.kind != sluice_kernels::shape::LaneKind::Selected {
            continue;
        }
        let lanes = session.rows(layer, position, &query_of(position, layer, layer_shape)).expect("rows");
        let row_bytes = layer_shape.row_bytes(shape.row_type);
        assert_eq!(lanes.len(), layer_shape.lanes());
        for (lane, selection) in lanes.iter().enumerate() {
            assert_eq!(selection.rows.len(), selection.positions.len() * row_bytes);
            assert!(selection.positions.windows(2).all(|pair| pair[0] < pair[1]), "positions ascend");
            for (&at, row) in selection.positions.iter().zip(selection.rows.chunks_exact(row_bytes)) {
                let expected = rows::row_bytes(paths[at as usize], layer, lane, &shape);
                assert_eq!(row, expected, "row of position {at}, layer {layer}, lane {lane}");
                verified += 1;
            }
        }
    }
    verified
}

/// The bits of floats, for comparisons to the bit.
pub fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| value.to_bits()).collect()
}
