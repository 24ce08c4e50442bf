//! `sluice status`: asks the daemon over its Unix socket and prints what it holds.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, Result};
use clap::Args;
use hyper_util::rt::TokioIo;
use serde::Serialize;
use sluice_proto::v1::sluice_client::SluiceClient;
use sluice_proto::v1::{ListRequest, ListResponse, SequenceInfo, SequenceState, StatsRequest, StatsResponse};
use tokio::net::UnixStream;
use tonic::transport::{Channel, Endpoint};

use super::{ConfigOptions, Format};
use crate::config::ByteCount;

/// Longest wait for the daemon's answers.
const ANSWER_SECONDS: u64 = 10;

/// Arguments of `sluice status`.
#[derive(Args, Debug)]
pub(super) struct StatusArguments {
    /// How to print.
    #[arg(long, value_enum, default_value = "table")]
    format: Format,
    #[command(flatten)]
    options: ConfigOptions,
}

/// Prints the state of the daemon.
pub(super) fn run(arguments: &StatusArguments) -> Result<()> {
    let socket = arguments.options.load()?.listen.socket;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let (stats, list) = runtime.block_on(ask(&socket))?;
    let report = StatusReport::new(&stats, &list);
    match arguments.format {
        Format::Table => print!("{}", report.table()),
        Format::Json => println!("{}", serde_json::to_string_pretty(&report)?),
    }
    Ok(())
}

async fn ask(socket: &Path) -> Result<(StatsResponse, ListResponse)> {
    let mut client = SluiceClient::new(connect(socket.to_owned()).await?).max_decoding_message_size(1 << 30);
    let stats = client.stats(StatsRequest {}).await.context("asking for stats")?.into_inner();
    let list = client.list(ListRequest { model_id: 0 }).await.context("asking for sequences")?.into_inner();
    Ok((stats, list))
}

async fn connect(socket: PathBuf) -> Result<Channel> {
    let shown = socket.display().to_string();
    let connector = tower::service_fn(move |_| {
        let socket = socket.clone();
        async move { UnixStream::connect(socket).await.map(TokioIo::new) }
    });
    // The address is never resolved: the connector goes to the socket.
    let endpoint = Endpoint::from_static("http://sluice.local").timeout(Duration::from_secs(ANSWER_SECONDS));
    endpoint.connect_with_connector(connector).await.with_context(|| format!("no daemon answers at {shown}; `sluice serve` starts one"))
}

/// What `sluice status` prints; the keys of its JSON form.
#[derive(Serialize)]
struct StatusReport {
    version: String,
    boot_epoch: u64,
    uptime_seconds: u64,
    device: String,
    models: u64,
    sequences_held: u64,
    sequences_parked: u64,
    chunks: u64,
    chunks_held: u64,
    limbo_slots: u64,
    arena_capacity_bytes: u64,
    arena_used_bytes: u64,
    label_bytes: u64,
    open_slot_bytes: u64,
    spare_slot_bytes: u64,
    rss_anon_bytes: u64,
    open_descriptors: u64,
    appended_tokens: u64,
    sealed_tokens: u64,
    prefix_hit_tokens: u64,
    prefix_miss_tokens: u64,
    hot_hits: u64,
    hot_misses: u64,
    sequences: Vec<SequenceReport>,
}

#[derive(Serialize)]
struct SequenceReport {
    sequence_id: u64,
    model_id: u64,
    namespace: String,
    state: &'static str,
    committed_tokens: u64,
    sealed_tokens: u64,
    holder_pid: u32,
    attach: &'static str,
    generation: u64,
}

impl StatusReport {
    fn new(stats: &StatsResponse, list: &ListResponse) -> Self {
        Self {
            version: stats.version.clone(),
            boot_epoch: stats.boot_epoch,
            uptime_seconds: stats.uptime_seconds,
            device: stats.device.clone(),
            models: stats.models,
            sequences_held: stats.sequences_held,
            sequences_parked: stats.sequences_parked,
            chunks: stats.chunks,
            chunks_held: stats.chunks_held,
            limbo_slots: stats.limbo_slots,
            arena_capacity_bytes: stats.arena_capacity_bytes,
            arena_used_bytes: stats.arena_used_bytes,
            label_bytes: stats.label_bytes,
            open_slot_bytes: stats.open_slot_bytes,
            spare_slot_bytes: stats.spare_slot_bytes,
            rss_anon_bytes: stats.rss_anon_bytes,
            open_descriptors: stats.open_descriptors,
            appended_tokens: stats.appended_tokens,
            sealed_tokens: stats.sealed_tokens,
            prefix_hit_tokens: stats.prefix_hit_tokens,
            prefix_miss_tokens: stats.prefix_miss_tokens,
            hot_hits: stats.hot_hits,
            hot_misses: stats.hot_misses,
            sequences: list.sequences.iter().map(SequenceReport::new).collect(),
        }
    }

    fn table(&self) -> String {
        let bytes = |count| ByteCount(count).to_string();
        let lines = [
            (
                "daemon",
                format!(
                    "version {}, up {} s, device {}, boot epoch {:016x}",
                    self.version, self.uptime_seconds, self.device, self.boot_epoch
                ),
            ),
            ("models", self.models.to_string()),
            ("sequences", format!("{} held, {} parked", self.sequences_held, self.sequences_parked)),
            ("chunks", format!("{} in the arena, {} of them held, {} slots in limbo", self.chunks, self.chunks_held, self.limbo_slots)),
            ("arena", format!("{} of {} used", bytes(self.arena_used_bytes), bytes(self.arena_capacity_bytes))),
            ("labels", bytes(self.label_bytes)),
            ("open slots", format!("{}, and {} made ahead", bytes(self.open_slot_bytes), bytes(self.spare_slot_bytes))),
            ("process", format!("{} anonymous memory, {} descriptors", bytes(self.rss_anon_bytes), self.open_descriptors)),
            ("tokens", format!("{} appended, {} sealed", self.appended_tokens, self.sealed_tokens)),
            ("prefix hits", share(self.prefix_hit_tokens, self.prefix_miss_tokens, "tokens")),
            ("hot hits", share(self.hot_hits, self.hot_misses, "rows")),
        ];
        let mut table: String = lines.iter().map(|(name, value)| format!("{name:<12} {value}\n")).collect();
        if !self.sequences.is_empty() {
            table += &format!(
                "\n{:>10} {:>6} {:<12} {:<9} {:>10} {:>10} {:>8} {:<7} {:>10}\n",
                "sequence", "model", "namespace", "state", "committed", "sealed", "pid", "attach", "generation"
            );
            table.extend(self.sequences.iter().map(SequenceReport::line));
        }
        table
    }
}

impl SequenceReport {
    fn new(info: &SequenceInfo) -> Self {
        let state = match info.state() {
            SequenceState::Held => "held",
            SequenceState::Parked => "parked",
            SequenceState::Poisoned => "poisoned",
            SequenceState::Unspecified => "unknown",
        };
        Self {
            sequence_id: info.sequence_id,
            model_id: info.model_id,
            namespace: info.namespace.clone(),
            state,
            committed_tokens: info.committed_tokens,
            sealed_tokens: info.sealed_tokens,
            holder_pid: info.holder_pid,
            attach: if info.direct { "direct" } else { "stream" },
            generation: info.generation,
        }
    }

    fn line(&self) -> String {
        format!(
            "{:>10} {:>6} {:<12} {:<9} {:>10} {:>10} {:>8} {:<7} {:>10}\n",
            self.sequence_id,
            self.model_id,
            self.namespace,
            self.state,
            self.committed_tokens,
            self.sealed_tokens,
            self.holder_pid,
            self.attach,
            self.generation
        )
    }
}

fn share(hits: u64, misses: u64, unit: &str) -> String {
    match hits + misses {
        0 => "none yet".to_owned(),
        all => format!("{hits} of {all} {unit} ({:.1} %)", 100.0 * hits as f64 / all as f64),
    }
}
