//! What the daemon counts: plain atomics that any thread adds to and the metrics endpoint reads.

use std::sync::atomic::{AtomicI64, AtomicU64, Ordering};
use std::time::Duration;

/// A number that only grows.
#[derive(Debug, Default)]
pub struct Count(AtomicU64);

impl Count {
    /// Adds `n`.
    pub fn add(&self, n: u64) {
        self.0.fetch_add(n, Ordering::Relaxed);
    }

    /// The sum so far.
    #[must_use]
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// A number that goes up and down.
#[derive(Debug, Default)]
pub struct Level(AtomicI64);

impl Level {
    /// Replaces the value.
    pub fn set(&self, value: u64) {
        self.0.store(value.try_into().unwrap_or(i64::MAX), Ordering::Relaxed);
    }

    /// Adds `delta`.
    pub fn add(&self, delta: i64) {
        self.0.fetch_add(delta, Ordering::Relaxed);
    }

    /// The value.
    #[must_use]
    pub fn get(&self) -> i64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// Upper bounds of the buckets of a [`Latency`], in microseconds; one bucket more holds the rest.
pub const LATENCY_BOUNDS_MICROSECONDS: [u64; 14] =
    [10, 25, 50, 100, 250, 500, 1_000, 2_500, 5_000, 10_000, 25_000, 50_000, 100_000, 1_000_000];

/// A histogram of durations with fixed buckets.
#[derive(Debug, Default)]
pub struct Latency {
    buckets: [AtomicU64; LATENCY_BOUNDS_MICROSECONDS.len() + 1],
    nanoseconds: AtomicU64,
}

impl Latency {
    /// Counts one duration.
    pub fn observe(&self, duration: Duration) {
        let microseconds = duration.as_micros() as u64;
        let bucket = LATENCY_BOUNDS_MICROSECONDS.partition_point(|&bound| bound < microseconds);
        self.buckets[bucket].fetch_add(1, Ordering::Relaxed);
        self.nanoseconds.fetch_add(duration.as_nanos() as u64, Ordering::Relaxed);
    }

    /// Durations by bucket (not cumulative), and their sum.
    #[must_use]
    pub fn snapshot(&self) -> (Vec<u64>, Duration) {
        let buckets = self.buckets.iter().map(|bucket| bucket.load(Ordering::Relaxed)).collect();
        (buckets, Duration::from_nanos(self.nanoseconds.load(Ordering::Relaxed)))
    }
}

/// Why a request was refused; the label of a counter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(usize)]
pub enum Refusal {
    /// A field out of bounds.
    InvalidArgument,
    /// Unknown model or sequence.
    NotFound,
    /// Stale lease, wrong state, position whose rows are gone.
    FailedPrecondition,
    /// The same name with another shape.
    AlreadyExists,
    /// No slot, no open slot memory, a full queue.
    ResourceExhausted,
    /// Not this caller's sequence.
    PermissionDenied,
    /// Not built.
    Unimplemented,
    /// The deadline passed first.
    DeadlineExceeded,
    /// Shutting down or poisoned.
    Unavailable,
    /// A fault of the daemon.
    Internal,
}

impl Refusal {
    /// All reasons, in the order of their counters.
    pub const ALL: [Self; 10] = [
        Self::InvalidArgument,
        Self::NotFound,
        Self::FailedPrecondition,
        Self::AlreadyExists,
        Self::ResourceExhausted,
        Self::PermissionDenied,
        Self::Unimplemented,
        Self::DeadlineExceeded,
        Self::Unavailable,
        Self::Internal,
    ];

    /// The reason in `snake_case`.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::InvalidArgument => "invalid_argument",
            Self::NotFound => "not_found",
            Self::FailedPrecondition => "failed_precondition",
            Self::AlreadyExists => "already_exists",
            Self::ResourceExhausted => "resource_exhausted",
            Self::PermissionDenied => "permission_denied",
            Self::Unimplemented => "unimplemented",
            Self::DeadlineExceeded => "deadline_exceeded",
            Self::Unavailable => "unavailable",
            Self::Internal => "internal",
        }
    }
}

/// Every number of the daemon. Levels are set by the engine thread after each turn; counts are added to where things happen.
#[derive(Debug, Default)]
pub struct Counters {
    /// Registered models.
    pub models: Level,
    /// Sequences that a live lease holds.
    pub sequences_held: Level,
    /// Sequences whose holder died.
    pub sequences_parked: Level,
    /// Held sequences whose holder attached directly.
    pub leases_direct: Level,
    /// Held sequences that the daemon decodes for.
    pub leases_stream: Level,
    /// Sealed chunks in the arena.
    pub chunks: Level,
    /// Sealed chunks that some sequence holds.
    pub chunks_held: Level,
    /// Slots that wait for a holder's step to complete.
    pub limbo_slots: Level,
    /// Capacity of the arena, bytes of rows.
    pub arena_capacity_bytes: Level,
    /// Bytes of rows of sealed chunks.
    pub arena_used_bytes: Level,
    /// Bytes of label files.
    pub label_bytes: Level,
    /// Bytes of open slot files of sequences.
    pub open_slot_bytes: Level,
    /// Bytes of open slot files that were made ahead.
    pub spare_slot_bytes: Level,
    /// Labels in the memory of the decoder's GPU.
    pub device_label_bytes: Level,
    /// Hot rows there.
    pub device_hot_bytes: Level,
    /// Maps of hot rows there.
    pub device_map_bytes: Level,
    /// Rows from the horizon on there.
    pub device_tail_bytes: Level,
    /// Working room of steps there.
    pub device_workspace_bytes: Level,
    /// Tokens of Opens that were found in the arena.
    pub prefix_hit_tokens: Count,
    /// Tokens of Opens that were not.
    pub prefix_miss_tokens: Count,
    /// Tokens committed by holders.
    pub appended_tokens: Count,
    /// Tokens sealed.
    pub sealed_tokens: Count,
    /// Sealed chunks that an equal one replaced.
    pub deduplicated_chunks: Count,
    /// Chunks shed from the cache.
    pub shed_chunks: Count,
    /// Chunks whose checksum did not match.
    pub quarantined_chunks: Count,
    /// Chunks refused at seal (rows not finite, or changed after commit).
    pub refused_chunks: Count,
    /// Leases that ended because their process died.
    pub leases_dead: Count,
    /// Rows selected by the daemon's own decoder.
    pub selected_rows: Count,
    /// Of these, found in the hot pool.
    pub hot_hits: Count,
    /// Of these, fetched.
    pub hot_misses: Count,
    /// Rows fetched between a prompt and its first step.
    pub warmed_rows: Count,
    /// Bytes of rows that the daemon's own decoder read.
    pub row_bytes_read: Count,
    /// Bytes of labels that the daemon's own decoder scored.
    pub label_bytes_read: Count,
    /// Of these, in chunks that were read once for several sequences of a step.
    pub label_bytes_shared: Count,
    /// One sequence and layer of a step, as a whole.
    pub step: Latency,
    /// Its scoring.
    pub step_score: Latency,
    /// Its selection.
    pub step_select: Latency,
    /// Its fetch of rows.
    pub step_gather: Latency,
    /// Its attention.
    pub step_attend: Latency,
    /// All of a step, on a device that does not tell its parts apart.
    pub step_fused: Latency,
    /// One seal job.
    pub seal: Latency,
    /// One journal commit.
    pub journal_commit: Latency,
    refused: [Count; Refusal::ALL.len()],
}

impl Counters {
    /// The counter of requests refused for `reason`.
    #[must_use]
    pub fn refused(&self, reason: Refusal) -> &Count {
        &self.refused[reason as usize]
    }
}
