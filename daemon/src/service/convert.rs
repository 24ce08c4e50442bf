//! Messages to commands and back: every field is checked where it is read.

use std::time::Duration;

use sluice_kernels::budget::{Budget, Settings};
use sluice_kernels::scales::{LaneScales, RowScale};
use sluice_kernels::shape::{LaneKind, LayerShape, ModelShape, RowType};
use sluice_proto::v1;

use crate::engine::command::{EngineStats, Fork, LeaseKey, Open, Peer, RegisterModel, SequenceInfo, SequenceStatus};
use crate::engine::{EngineError, EngineHandle};

/// The lease of a request.
pub(super) fn lease(lease: Option<&v1::LeaseRef>) -> Result<LeaseKey, EngineError> {
    let lease = lease.ok_or_else(|| EngineError::invalid("lease", "nothing", "the lease that Open answered"))?;
    Ok(LeaseKey { sequence: lease.sequence_id, generation: lease.generation })
}

/// A lease as it travels.
pub(super) fn lease_ref(lease: LeaseKey) -> v1::LeaseRef {
    v1::LeaseRef { sequence_id: lease.sequence, generation: lease.generation }
}

/// `RegisterModel`.
pub(super) fn register_model(request: v1::RegisterModelRequest) -> Result<RegisterModel, EngineError> {
    let model = request.model.ok_or_else(|| EngineError::invalid("model", "nothing", "a model"))?;
    if model.layers.len() > ModelShape::MAX_LAYERS {
        return Err(EngineError::invalid("model.layers", model.layers.len(), format!("1 to {}", ModelShape::MAX_LAYERS)));
    }
    let rotary_layout = match model.rotary_layout() {
        v1::RotaryLayout::Unspecified => return Err(EngineError::invalid("model.rotary_layout", model.rotary_layout, "1 to 3")),
        _ => model.rotary_layout,
    };
    let row_type = match model.row_type() {
        v1::RowType::F32 => RowType::F32,
        v1::RowType::F16 => RowType::F16,
        v1::RowType::Bf16 => RowType::Bf16,
        v1::RowType::F8E4m3 => RowType::Fp8,
        v1::RowType::Unspecified => return Err(EngineError::invalid("model.row_type", model.row_type, "1 to 4")),
    };
    let layers = model.layers.iter().enumerate().map(|(index, spec)| layer(index, spec));
    let mut shape = ModelShape::unscaled(row_type, layers.collect::<Result<_, _>>()?);
    let scales = model.layers.iter().enumerate().map(|(index, spec)| lane_scales(index, spec, row_type)).collect::<Result<_, _>>()?;
    if row_type == RowType::Fp8 {
        shape.scales = scales;
    }
    Ok(RegisterModel {
        name: model.name,
        namespace: if request.namespace.is_empty() { "default".to_owned() } else { request.namespace },
        weights_digest: model.weights_digest.to_vec(),
        rotary_layout,
        shape,
        calibration_json: request.calibration_json.to_vec(),
    })
}

fn layer(index: usize, spec: &v1::LayerSpec) -> Result<LayerShape, EngineError> {
    match spec.attention() {
        v1::AttentionKind::MhaGqa => {}
        v1::AttentionKind::Mla => {
            return Err(EngineError::Unimplemented(format!("layers[{index}].attention: multi-head latent attention (MLA) is not served")));
        }
        v1::AttentionKind::Unspecified => {
            return Err(EngineError::invalid("layers.attention", spec.attention, "ATTENTION_KIND_MHA_GQA"));
        }
    }
    let narrow = |field, value: u32| {
        let bound = "heads and dimensions of 16 bit";
        u16::try_from(value).map_err(|_| EngineError::invalid(field, value, bound))
    };
    let head_dim = narrow("layers.head_dim", spec.head_dim)?;
    let is_default_scale = spec.softmax_scale == 0.0;
    let softmax_scale = if is_default_scale { 1.0 / f32::from(head_dim.max(1)).sqrt() } else { spec.softmax_scale };
    let kind = if spec.window_tokens == 0 { LaneKind::Selected } else { LaneKind::Window { tokens: spec.window_tokens } };
    let (query_heads, kv_heads) = (narrow("layers.query_heads", spec.query_heads)?, narrow("layers.kv_heads", spec.kv_heads)?);
    Ok(LayerShape { kind, query_heads, kv_heads, head_dim, softmax_scale })
}

/// The scales of a layer's lanes: one a lane with fp8 rows, none with others.
fn lane_scales(index: usize, spec: &v1::LayerSpec, row_type: RowType) -> Result<LaneScales, EngineError> {
    let expected = if row_type == RowType::Fp8 { spec.kv_heads as usize } else { 0 };
    for (field, scales) in [("layers.key_scales", &spec.key_scales), ("layers.value_scales", &spec.value_scales)] {
        if scales.len() != expected {
            let bound = format!("{expected} in layers[{index}] of {row_type:?} rows: one a kv head with fp8 rows, else none");
            return Err(EngineError::invalid(field, scales.len(), bound));
        }
    }
    let scales = spec.key_scales.iter().zip(&spec.value_scales).map(|(&key, &value)| RowScale { key, value });
    Ok(scales.collect::<Vec<_>>().into())
}

/// `Open`.
pub(super) fn open(request: v1::OpenRequest, peer: Peer, default: &Settings) -> Result<Open, EngineError> {
    Ok(Open {
        model: request.model_id,
        tokens: request.token_ids,
        extra_keys: request.extra_keys.iter().map(|key| key.to_vec()).collect(),
        settings: request.settings.map(|settings| step_settings(&settings, default)),
        resume: Some(request.resume_sequence_id).filter(|&id| id != 0),
        open_slots: request.open_slots,
        holder_pid: request.holder_pid,
        peer,
    })
}

/// `Fork`.
pub(super) fn fork(request: &v1::ForkRequest, peer: Peer) -> Result<Fork, EngineError> {
    let (open_slots, holder_pid) = (request.open_slots, request.holder_pid);
    Ok(Fork { lease: lease(request.lease.as_ref())?, position: request.position, open_slots, holder_pid, peer })
}

fn step_settings(settings: &v1::StepSettings, default: &Settings) -> Settings {
    let exact_tokens = if settings.exact_tokens == 0 { 256 } else { settings.exact_tokens };
    let budget = match &settings.budget {
        None => default.budget,
        Some(budget) => step_budget(budget, default.budget),
    };
    Settings { budget, exact_tokens, sink_tokens: settings.sink_tokens }
}

fn step_budget(budget: &v1::Budget, default: Budget) -> Budget {
    if budget.dense {
        return Budget::Dense;
    }
    let (numerator, denominator) = match (budget.numerator, budget.denominator, default) {
        (0, 0, Budget::Ratio { numerator, denominator, .. }) => (numerator, denominator),
        (0, 0, Budget::Dense) => return Budget::Dense,
        (numerator, denominator, _) => (numerator, denominator),
    };
    Budget::Ratio { numerator, denominator, floor_tokens: budget.floor_tokens, cap_tokens: budget.cap_tokens }
}

/// Settings as they travel.
pub(super) fn wire_settings(settings: &Settings) -> v1::StepSettings {
    let budget = match settings.budget {
        Budget::Dense => v1::Budget { dense: true, ..v1::Budget::default() },
        Budget::Ratio { numerator, denominator, floor_tokens, cap_tokens } => {
            v1::Budget { dense: false, numerator, denominator, floor_tokens, cap_tokens }
        }
    };
    v1::StepSettings { budget: Some(budget), exact_tokens: settings.exact_tokens, sink_tokens: settings.sink_tokens }
}

/// One line of `List`.
pub(super) fn sequence_info(info: SequenceInfo) -> v1::SequenceInfo {
    let state = match info.status {
        SequenceStatus::Held => v1::SequenceState::Held,
        SequenceStatus::Parked => v1::SequenceState::Parked,
        SequenceStatus::Poisoned => v1::SequenceState::Poisoned,
    };
    v1::SequenceInfo {
        sequence_id: info.lease.sequence,
        model_id: info.model,
        namespace: info.namespace,
        state: state.into(),
        committed_tokens: info.committed_tokens,
        sealed_tokens: info.sealed_tokens,
        holder_pid: info.holder_pid,
        direct: info.direct,
        generation: info.lease.generation,
    }
}

/// `Stats`.
pub(super) fn stats(engine: &EngineHandle, stats: &EngineStats, uptime: Duration) -> v1::StatsResponse {
    let counters = engine.counters();
    v1::StatsResponse {
        boot_epoch: engine.boot_epoch(),
        version: env!("CARGO_PKG_VERSION").to_owned(),
        uptime_seconds: uptime.as_secs(),
        models: stats.models,
        sequences_held: stats.sequences_held,
        sequences_parked: stats.sequences_parked,
        chunks: stats.chunks,
        chunks_held: stats.chunks_held,
        arena_capacity_bytes: stats.arena_capacity_bytes,
        arena_used_bytes: stats.arena_used_bytes,
        label_bytes: stats.label_bytes,
        open_slot_bytes: stats.open_slot_bytes,
        spare_slot_bytes: stats.spare_slot_bytes,
        appended_tokens: counters.appended_tokens.get(),
        sealed_tokens: counters.sealed_tokens.get(),
        rss_anon_bytes: rss_anon_bytes(),
        open_descriptors: std::fs::read_dir("/proc/self/fd").map_or(0, |entries| entries.count() as u64),
        limbo_slots: stats.limbo_slots,
        device: engine.decoder().map_or_else(|_| String::new(), |decoder| decoder.device().to_owned()),
        prefix_hit_tokens: counters.prefix_hit_tokens.get(),
        prefix_miss_tokens: counters.prefix_miss_tokens.get(),
        hot_hits: counters.hot_hits.get(),
        hot_misses: counters.hot_misses.get(),
    }
}

/// `RssAnon` of this process.
fn rss_anon_bytes() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:"));
    let kibibytes = line.and_then(|line| line.trim().strip_suffix("kB")).and_then(|number| number.trim().parse::<u64>().ok());
    kibibytes.unwrap_or(0) * 1024
}
