//! Decode steps of what was gathered, through Sluice's sequence and decoder.

use anyhow::Result;
use sluice_kernels::budget::Settings;
use sluice_kernels::decoder::Attend;
use sluice_kernels::device::DeviceKind;
use sluice_kernels::slot::CHUNK_TOKENS;

use super::gathered::Gathered;
use crate::model::{LayerStep, LocalOptions, LocalSteps, Steps};
use crate::report::show_progress;

/// How steps are replayed.
#[derive(Clone, Copy, Debug)]
pub(super) struct Replay {
    pub(super) settings: Settings,
    pub(super) device: DeviceKind,
    /// Steps that are not counted.
    pub(super) warm_up: usize,
    /// Rows of a lane's pool.
    pub(super) hot_rows: usize,
    pub(super) looks_ahead: bool,
}

/// Rows of one layer, all steps that count.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Counts {
    pub(super) selected: u64,
    /// Fetched by the steps themselves.
    pub(super) missed: u64,
    /// Fetched before them.
    pub(super) ahead: u64,
}

/// What a replay gave.
#[derive(Clone, Debug, Default)]
pub(super) struct Replayed {
    pub(super) steps: usize,
    /// By layer.
    pub(super) counts: Vec<Counts>,
    /// BLAKE3 of all outputs.
    pub(super) digest: String,
}

/// A sequence with the rows before the first step.
fn begin(gathered: &Gathered, replay: &Replay) -> Result<LocalSteps> {
    let steps = gathered.layers.first().map_or(0, |layer| layer.queries.len());
    let mut local = LocalSteps::new(&LocalOptions {
        shape: gathered.shape.clone(),
        calibration: Some(gathered.calibration.clone()),
        settings: replay.settings,
        tokens: gathered.first_step + steps + CHUNK_TOKENS,
        device: replay.device,
        threads: std::thread::available_parallelism().map_or(1, std::num::NonZero::get),
    })?;
    local.set_hot_rows(replay.hot_rows);
    local.begin(&vec![0; gathered.first_step])?;
    for layer in 0..gathered.layers.len() {
        for piece in rows(gathered, layer, 0, gathered.first_step) {
            local.append(layer, piece.0, &piece.1)?;
        }
    }
    Ok(local)
}

/// Rows of the tokens from `from` to `to` of a layer, `[lane][token][row bytes]`, by piece.
fn rows(gathered: &Gathered, layer: usize, from: usize, to: usize) -> Vec<(usize, Vec<u8>)> {
    let shape = &gathered.shape.layers[layer];
    let (lanes, row_bytes) = (shape.lanes(), shape.row_bytes(gathered.shape.row_type));
    let part = |(first, rows): &(usize, Vec<u8>)| {
        let tokens = rows.len() / (lanes * row_bytes);
        let (begin, end) = (from.max(*first), to.min(first + tokens));
        let of_lane = |lane: usize| &rows[(lane * tokens + begin - first) * row_bytes..(lane * tokens + end - first) * row_bytes];
        (begin < end).then(|| (begin, (0..lanes).flat_map(of_lane).copied().collect()))
    };
    gathered.layers[layer].rows.iter().filter_map(part).collect()
}

/// Replays all steps.
pub(super) fn replay(gathered: &Gathered, replay: &Replay) -> Result<Replayed> {
    let mut local = begin(gathered, replay)?;
    let steps = gathered.layers[0].queries.len();
    let (mut counts, mut hasher) = (vec![Counts::default(); gathered.layers.len()], blake3::Hasher::new());
    for step in 0..steps {
        show_progress(&format!("pool of {} rows, looking ahead: {}; step", replay.hot_rows, replay.looks_ahead), step, steps);
        let position = gathered.first_step + step;
        local.begin(&[0])?;
        for (layer, of_layer) in gathered.layers.iter().enumerate() {
            let query = &of_layer.queries[step];
            let shape = &gathered.shape.layers[layer];
            let ahead = if replay.looks_ahead { local.look_ahead(layer, position, &of_layer.predicted[step])?.fetched_rows } else { 0 };
            let own = rows(gathered, layer, position, position + 1);
            let (mut output, mut lse) = (vec![0.0; query.len()], vec![0.0; usize::from(shape.query_heads)]);
            let job = LayerStep { layer, first_position: position, queries: query, rows: &own[0].1, attend: Attend::Sparse };
            let report = local.step(&job, &mut output, &mut lse)?;
            hasher.update(bytemuck::cast_slice(&output));
            if step >= replay.warm_up {
                counts[layer].selected += report.selected_rows;
                counts[layer].missed += report.selected_rows - report.hot_rows;
                counts[layer].ahead += ahead;
            }
        }
    }
    Ok(Replayed { steps: steps - replay.warm_up, counts, digest: hasher.finalize().to_hex().to_string() })
}

/// By layer, the part of the rows which the true queries select that the predicted ones select as well; steps that count only.
pub(super) fn agreement(gathered: &Gathered, replay: &Replay) -> Result<Vec<f64>> {
    let mut local = begin(gathered, replay)?;
    let steps = gathered.layers[0].queries.len();
    let (mut both, mut all) = (vec![0u64; gathered.layers.len()], vec![0u64; gathered.layers.len()]);
    for step in 0..steps {
        show_progress("agreement; step", step, steps);
        let position = gathered.first_step + step;
        local.begin(&[0])?;
        for (layer, of_layer) in gathered.layers.iter().enumerate() {
            let own = rows(gathered, layer, position, position + 1);
            local.append(layer, position, &own[0].1)?;
            if step < replay.warm_up {
                continue;
            }
            let horizon = replay.settings.horizon(position + 1);
            let mut selected = |query: &[f32]| -> Result<Vec<Vec<u32>>> {
                let mut lanes = local.selected(layer, position, query)?;
                lanes.iter_mut().for_each(|lane| lane.retain(|&row| (row as usize) < horizon));
                Ok(lanes)
            };
            let (truth, predicted) = (selected(&of_layer.queries[step])?, selected(&of_layer.predicted[step])?);
            for (truth, predicted) in truth.iter().zip(&predicted) {
                all[layer] += truth.len() as u64;
                both[layer] += truth.iter().filter(|&row| predicted.binary_search(row).is_ok()).count() as u64;
            }
        }
    }
    Ok(both.iter().zip(&all).map(|(&both, &all)| both as f64 / all.max(1) as f64).collect())
}
