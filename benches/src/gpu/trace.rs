//! Key traces: the importance keys of every row in consecutive decode steps of a real model (docs/formats.md), and how lanes of a larger
//! shape draw from them.

use std::fmt;
use std::fs::File;
use std::io::{self, BufRead, BufReader, BufWriter, Read, Write};
use std::path::Path;

use serde::{Deserialize, Serialize};
use sluice_kernels::label::LabelPlan;
use sluice_kernels::slot::CHUNK_TOKENS;
use thiserror::Error;

/// Name of the format.
pub const FORMAT: &str = "sluice-keys";
/// Version that is read and written.
pub const VERSION: u32 = 1;
/// Most rows of a lane.
pub const MAX_ROWS: usize = 1 << 24;
/// Most steps.
pub const MAX_STEPS: usize = 1 << 16;
/// Most lanes that a trace was taken of.
pub const MAX_LAYERS: usize = 1 << 10;
/// Most bytes of keys.
pub const MAX_KEY_BYTES: u64 = 1 << 30;

/// A lane of the model that was recorded.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SourceLane {
    /// Layer of the model.
    pub layer: u16,
    /// Lane of the layer.
    pub lane: u16,
}

impl fmt::Display for SourceLane {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.layer, self.lane)
    }
}

/// Where a trace comes from.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TraceOrigin {
    /// Name of the model, for people.
    pub model: String,
    /// The lanes it was taken of, in the order of the keys.
    pub layers: Vec<SourceLane>,
    /// Position of the first step's token.
    pub first_position: u64,
    /// Plan of the labels that were scored.
    pub plan: LabelPlan,
    /// BLAKE3 of the text's token ids (u32, little-endian), hex; empty when unknown.
    pub text_hash: String,
    /// The same of the text that the labels were calibrated on.
    pub calibration_hash: String,
    /// The command that made it.
    pub command: String,
}

/// The first line of the file.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Header {
    format: String,
    version: u32,
    rows: usize,
    steps: usize,
    origin: TraceOrigin,
}

/// Importance keys of consecutive decode steps.
#[derive(Clone, Debug, PartialEq)]
pub struct KeyTrace {
    /// Rows of a lane: a power of two, at least one chunk.
    pub rows: usize,
    /// Steps, at least 2.
    pub steps: usize,
    /// Lanes of the model that were recorded; one a layer where the model has one KV head.
    pub layers: usize,
    /// Where it comes from.
    pub origin: TraceOrigin,
    /// `[step][layer][row]`
    keys: Vec<u16>,
}

/// A trace that cannot be read, written or made.
#[derive(Debug, Error)]
pub enum TraceError {
    /// The file.
    #[error("key trace: {0}")]
    Io(#[from] io::Error),
    /// The first line.
    #[error("key trace header: {0}")]
    Header(#[from] serde_json::Error),
    /// Another format or version.
    #[error("key trace header: {format:?} version {version}, this build reads {FORMAT} version {VERSION}")]
    Version {
        /// Format given.
        format: String,
        /// Version given.
        version: u32,
    },
    /// A count out of bounds.
    #[error("key trace {field}: {value}, expected {expected}")]
    Bound {
        /// Field of the header.
        field: &'static str,
        /// Value given.
        value: u64,
        /// What would fit.
        expected: String,
    },
}

fn expect(field: &'static str, fits: bool, value: u64, expected: impl FnOnce() -> String) -> Result<(), TraceError> {
    if fits { Ok(()) } else { Err(TraceError::Bound { field, value, expected: expected() }) }
}

/// Bytes of the keys of a trace of checked size.
fn checked_bytes(rows: usize, steps: usize, layers: usize) -> Result<u64, TraceError> {
    let rows_fit = (CHUNK_TOKENS..=MAX_ROWS).contains(&rows) && rows.is_power_of_two();
    expect("rows", rows_fit, rows as u64, || format!("a power of two from {CHUNK_TOKENS} to {MAX_ROWS}"))?;
    expect("steps", (2..=MAX_STEPS).contains(&steps), steps as u64, || format!("2 to {MAX_STEPS}"))?;
    expect("layers", (1..=MAX_LAYERS).contains(&layers), layers as u64, || format!("1 to {MAX_LAYERS}"))?;
    let bytes = (rows * steps) as u64 * layers as u64 * 2;
    expect("key bytes", bytes <= MAX_KEY_BYTES, bytes, || format!("at most {MAX_KEY_BYTES}"))?;
    Ok(bytes)
}

impl KeyTrace {
    /// A trace of `keys`, `[step][layer][row]`, the layers being those of `origin`.
    ///
    /// # Errors
    /// A count out of bounds, or keys of another number.
    pub fn new(origin: TraceOrigin, rows: usize, steps: usize, keys: Vec<u16>) -> Result<Self, TraceError> {
        let layers = origin.layers.len();
        let bytes = checked_bytes(rows, steps, layers)?;
        expect("keys", 2 * keys.len() as u64 == bytes, keys.len() as u64, || (bytes / 2).to_string())?;
        Ok(Self { rows, steps, layers, origin, keys })
    }

    /// Reads a trace file.
    ///
    /// # Errors
    /// Not a trace, one of another version, or one whose keys do not fit its header.
    pub fn read(path: &Path) -> Result<Self, TraceError> {
        Self::read_from(BufReader::with_capacity(1 << 20, File::open(path)?))
    }

    /// Reads a trace to the end of `file`.
    ///
    /// # Errors
    /// As for [`Self::read`].
    pub fn read_from(mut file: impl BufRead) -> Result<Self, TraceError> {
        let mut line = Vec::new();
        // Bounded: what is no trace may have no line end for gigabytes.
        file.by_ref().take(1 << 20).read_until(b'\n', &mut line)?;
        let Header { format, version, rows, steps, origin } = serde_json::from_slice(&line)?;
        if format != FORMAT || version != VERSION {
            return Err(TraceError::Version { format, version });
        }
        let expected = checked_bytes(rows, steps, origin.layers.len())?;
        // Grows with what is there, not with what the header claims; one byte more tells a file that is too long.
        let mut bytes = Vec::new();
        file.take(expected + 1).read_to_end(&mut bytes)?;
        let read = bytes.len() as u64;
        expect("key bytes", read == expected, read, || format!("{expected} by the header"))?;
        let keys = bytes.as_chunks::<2>().0.iter().map(|&pair| u16::from_le_bytes(pair)).collect();
        Self::new(origin, rows, steps, keys)
    }

    /// Writes a trace file.
    ///
    /// # Errors
    /// What the file answers.
    pub fn write(&self, path: &Path) -> Result<(), TraceError> {
        self.write_to(BufWriter::with_capacity(1 << 20, File::create(path)?))
    }

    /// Writes the trace to `file`.
    ///
    /// # Errors
    /// What the file answers.
    pub fn write_to(&self, mut file: impl Write) -> Result<(), TraceError> {
        let (format, origin) = (FORMAT.to_owned(), self.origin.clone());
        serde_json::to_writer(&mut file, &Header { format, version: VERSION, rows: self.rows, steps: self.steps, origin })?;
        file.write_all(b"\n")?;
        for key in &self.keys {
            file.write_all(&key.to_le_bytes())?;
        }
        Ok(file.flush()?)
    }

    /// The keys of all rows of one step of one recorded lane. Panics where there is no such step or lane.
    #[must_use]
    pub fn keys(&self, step: usize, layer: usize) -> &[u16] {
        assert!(step < self.steps && layer < self.layers, "step {step} of {}, layer {layer} of {}", self.steps, self.layers);
        &self.keys[(step * self.layers + layer) * self.rows..][..self.rows]
    }

    /// The recorded layer and step whose keys lane `lane` (of `lanes` a layer) of layer `layer` has in `step` of a bench.
    ///
    /// Lanes take the recorded layers in turn, so that each serves an equal part (to within one lane). Time runs to the trace's end and back
    /// again, so that consecutive steps stay consecutive. The lanes of one recorded layer start at fixed places of their own: the multiples
    /// of the golden ratio, which lie evenly however many lanes there are.
    #[must_use]
    pub fn lane_source(&self, layer: usize, lane: usize, lanes: usize, step: usize) -> (usize, usize) {
        let index = layer * lanes + lane;
        let period = 2 * (self.steps - 1);
        let fraction = ((index / self.layers) as u32).wrapping_mul(0x9E37_79B9);
        let offset = ((u64::from(fraction) * period as u64) >> 32) as usize;
        let time = (offset + step % period) % period;
        (index % self.layers, if time < self.steps { time } else { period - time })
    }

    /// Writes the keys of a longer lane, as [`Self::lane_source`] gives its source: row r has the key of the recorded row r / run, run being
    /// `out.len() / rows`. Panics unless that is a whole number.
    pub fn stretch(&self, (layer, step): (usize, usize), out: &mut [u16]) {
        let run = out.len() / self.rows;
        assert_eq!(run * self.rows, out.len(), "a lane of whole runs over {} recorded rows", self.rows);
        for (out, &key) in out.chunks_exact_mut(run.max(1)).zip(self.keys(step, layer)) {
            out.fill(key);
        }
    }
}
