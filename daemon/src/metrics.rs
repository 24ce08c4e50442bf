//! Metrics in the Prometheus text format: names `sluice_*`, base units (seconds, bytes), `_total` on what only grows.
//!
//! The engine's [`Counters`] stay plain atomics; a collector reads them when the endpoint is asked, so a step pays nothing for it.

use std::collections::HashMap;
use std::sync::Arc;

use prometheus::core::{Collector, Desc};
use prometheus::proto::{Bucket, Counter, Gauge, Histogram, LabelPair, Metric, MetricFamily, MetricType};
use prometheus::{Encoder as _, Registry, TextEncoder};

use crate::engine::Counters;
use crate::engine::counters::{Count, LATENCY_BOUNDS_MICROSECONDS, Latency, Level, Refusal};

/// A registry that shows `counters` and what was built.
///
/// # Errors
/// A name or label that Prometheus does not accept, or one given twice.
pub fn registry(counters: Arc<Counters>) -> prometheus::Result<Registry> {
    let families = families(&counters);
    let descriptions = families.iter().map(Family::description).collect::<prometheus::Result<_>>()?;
    let registry = Registry::new();
    registry.register(Box::new(CountersCollector { counters, descriptions }))?;
    Ok(registry)
}

/// The text that a scrape answers.
///
/// # Errors
/// A family without samples, which is a fault of this module.
pub fn text(registry: &Registry) -> prometheus::Result<String> {
    let mut text = Vec::new();
    TextEncoder::new().encode(&registry.gather(), &mut text)?;
    String::from_utf8(text).map_err(|error| prometheus::Error::Msg(error.to_string()))
}

/// Content type of [`text`].
pub const TEXT_CONTENT_TYPE: &str = "text/plain; version=0.0.4";

struct CountersCollector {
    counters: Arc<Counters>,
    descriptions: Vec<Desc>,
}

impl Collector for CountersCollector {
    fn desc(&self) -> Vec<&Desc> {
        self.descriptions.iter().collect()
    }

    fn collect(&self) -> Vec<MetricFamily> {
        families(&self.counters).into_iter().map(Family::into_proto).collect()
    }
}

/// One metric with its samples.
struct Family {
    name: &'static str,
    help: &'static str,
    kind: MetricType,
    /// Name of the label that tells the samples apart; empty when there is one sample.
    label: &'static str,
    samples: Vec<Metric>,
}

impl Family {
    fn description(&self) -> prometheus::Result<Desc> {
        let labels = if self.label.is_empty() { Vec::new() } else { vec![self.label.to_owned()] };
        Desc::new(self.name.to_owned(), self.help.to_owned(), labels, HashMap::new())
    }

    fn into_proto(self) -> MetricFamily {
        let mut family = MetricFamily::default();
        family.set_name(self.name.to_owned());
        family.set_help(self.help.to_owned());
        family.set_field_type(self.kind);
        family.set_metric(self.samples);
        family
    }
}

fn families(counters: &Counters) -> Vec<Family> {
    let mut families = levels(counters);
    families.extend(counts(counters));
    families.extend(latencies(counters));
    families.push(gauges("sluice_build_info", "What was built; always 1.", "version", &[(env!("CARGO_PKG_VERSION"), 1.0)]));
    families
}

fn levels(counters: &Counters) -> Vec<Family> {
    let held = counters.chunks_held.get();
    let one = |name, help, level: &Level| gauges(name, help, "", &[("", level.get() as f64)]);
    let by = |name, help, label, levels: &[(&str, i64)]| {
        let values: Vec<(&str, f64)> = levels.iter().map(|&(value, level)| (value, level as f64)).collect();
        gauges(name, help, label, &values)
    };
    vec![
        one("sluice_models", "Registered models.", &counters.models),
        by(
            "sluice_sequences",
            "Sequences by state.",
            "state",
            &[("held", counters.sequences_held.get()), ("parked", counters.sequences_parked.get())],
        ),
        by(
            "sluice_leases",
            "Live leases by the way their holder is attached.",
            "attach",
            &[("direct", counters.leases_direct.get()), ("stream", counters.leases_stream.get())],
        ),
        by(
            "sluice_chunks",
            "Sealed chunks in the arena: held by a sequence, or kept as cache.",
            "state",
            &[("held", held), ("cached", counters.chunks.get() - held)],
        ),
        one("sluice_limbo_slots", "Slots whose chunk is gone but whose last holder has not completed its step.", &counters.limbo_slots),
        one("sluice_arena_capacity_bytes", "Bytes of rows that sealed chunks may take.", &counters.arena_capacity_bytes),
        by(
            "sluice_memory_bytes",
            "Shared memory in use by kind: rows of sealed chunks, labels, open slots of sequences and those made ahead.",
            "kind",
            &[
                ("rows", counters.arena_used_bytes.get()),
                ("labels", counters.label_bytes.get()),
                ("open_slots", counters.open_slot_bytes.get()),
                ("spare_slots", counters.spare_slot_bytes.get()),
            ],
        ),
        by(
            "sluice_device_memory_bytes",
            "GPU memory that the daemon's own decoder uses, by kind; zero on the CPU.",
            "kind",
            &[
                ("labels", counters.device_label_bytes.get()),
                ("hot_rows", counters.device_hot_bytes.get()),
                ("maps", counters.device_map_bytes.get()),
                ("newest_rows", counters.device_tail_bytes.get()),
                ("workspace", counters.device_workspace_bytes.get()),
            ],
        ),
    ]
}

fn counts(counters: &Counters) -> Vec<Family> {
    let one = |name, help, count: &Count| totals(name, help, "", &[("", count.get())]);
    let refused: Vec<(&str, u64)> = Refusal::ALL.iter().map(|&reason| (reason.as_str(), counters.refused(reason).get())).collect();
    let hot = [("hit", counters.hot_hits.get()), ("miss", counters.hot_misses.get())];
    let read = [("rows", counters.row_bytes_read.get()), ("labels", counters.label_bytes_read.get())];
    vec![
        totals(
            "sluice_prefix_tokens_total",
            "Tokens of opened prompts whose rows were held already (hit) or not (miss).",
            "result",
            &[("hit", counters.prefix_hit_tokens.get()), ("miss", counters.prefix_miss_tokens.get())],
        ),
        one("sluice_appended_tokens_total", "Tokens committed by holders.", &counters.appended_tokens),
        one("sluice_sealed_tokens_total", "Tokens of sealed chunks.", &counters.sealed_tokens),
        one("sluice_deduplicated_chunks_total", "Sealed chunks that an equal one replaced.", &counters.deduplicated_chunks),
        one("sluice_shed_chunks_total", "Chunks shed from the cache to make room.", &counters.shed_chunks),
        one("sluice_quarantined_chunks_total", "Chunks whose checksum did not match.", &counters.quarantined_chunks),
        one("sluice_warmed_rows_total", "Rows made hot between a prompt and its first step.", &counters.warmed_rows),
        one("sluice_refused_chunks_total", "Chunks refused at seal: rows not finite, or changed after commit.", &counters.refused_chunks),
        one("sluice_dead_leases_total", "Leases that ended because their process died.", &counters.leases_dead),
        one("sluice_selected_rows_total", "Rows selected by the daemon's own decoder.", &counters.selected_rows),
        totals("sluice_hot_rows_total", "Selected rows found in the hot pool (hit) or fetched (miss).", "result", &hot),
        totals(
            "sluice_read_bytes_total",
            "Bytes that the daemon's own decoder read, by kind; labels that are scored for several sequences at once count for each.",
            "kind",
            &read,
        ),
        one(
            "sluice_shared_label_bytes_total",
            "Bytes of labels scored with other sequences of a step: each of them counts what is read once.",
            &counters.label_bytes_shared,
        ),
        totals("sluice_refused_requests_total", "Refused requests by reason.", "reason", &refused),
    ]
}

fn latencies(counters: &Counters) -> Vec<Family> {
    let parts = [
        ("score", &counters.step_score),
        ("select", &counters.step_select),
        ("gather", &counters.step_gather),
        ("attend", &counters.step_attend),
        ("fused", &counters.step_fused),
    ];
    let step = "One sequence and layer of a step of the daemon's own decoder.";
    vec![
        histograms("sluice_step_seconds", step, "", &[("", &counters.step)]),
        histograms(
            "sluice_step_part_seconds",
            "The parts of such a step; fused: all of it, on a GPU, whose launches overlap.",
            "part",
            &parts,
        ),
        histograms("sluice_seal_seconds", "One seal of a chunk: copy, checksum, check, labels.", "", &[("", &counters.seal)]),
        histograms("sluice_journal_commit_seconds", "One commit of the journal.", "", &[("", &counters.journal_commit)]),
    ]
}

fn gauges(name: &'static str, help: &'static str, label: &'static str, values: &[(&str, f64)]) -> Family {
    let samples = values.iter().map(|&(value, number)| {
        let mut gauge = Gauge::default();
        gauge.set_value(number);
        let mut metric = Metric::from_label(labels(label, value));
        metric.set_gauge(gauge);
        metric
    });
    Family { name, help, kind: MetricType::GAUGE, label, samples: samples.collect() }
}

fn totals(name: &'static str, help: &'static str, label: &'static str, values: &[(&str, u64)]) -> Family {
    let samples = values.iter().map(|&(value, number)| {
        let mut counter = Counter::default();
        counter.set_value(number as f64);
        let mut metric = Metric::from_label(labels(label, value));
        metric.set_counter(counter);
        metric
    });
    Family { name, help, kind: MetricType::COUNTER, label, samples: samples.collect() }
}

fn histograms(name: &'static str, help: &'static str, label: &'static str, values: &[(&str, &Latency)]) -> Family {
    let samples = values.iter().map(|&(value, latency)| {
        let mut metric = Metric::from_label(labels(label, value));
        metric.set_histogram(histogram(latency));
        metric
    });
    Family { name, help, kind: MetricType::HISTOGRAM, label, samples: samples.collect() }
}

fn histogram(latency: &Latency) -> Histogram {
    let (counts, sum) = latency.snapshot();
    let mut below = 0;
    let bounded = counts.iter().zip(LATENCY_BOUNDS_MICROSECONDS).map(|(&count, bound)| {
        below += count;
        let mut bucket = Bucket::default();
        bucket.set_cumulative_count(below);
        bucket.set_upper_bound(bound as f64 / 1e6);
        bucket
    });
    let buckets = bounded.collect();
    let mut histogram = Histogram::default();
    histogram.set_sample_count(counts.iter().sum());
    histogram.set_sample_sum(sum.as_secs_f64());
    histogram.set_bucket(buckets);
    histogram
}

fn labels(name: &str, value: &str) -> Vec<LabelPair> {
    if name.is_empty() {
        return Vec::new();
    }
    let mut pair = LabelPair::default();
    pair.set_name(name.to_owned());
    pair.set_value(value.to_owned());
    vec![pair]
}
