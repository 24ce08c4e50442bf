//! Recordings: queries, keys and selections of real decode steps as a file (docs/formats.md).
//!
//! One JSON line, then blocks in the order in which they happened. A block is a header of 32 bytes and its payload, all little-endian.

use std::io::{self, BufRead, Read, Write};

use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::shape::{ModelShape, ShapeError};

/// What a recording says about itself.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RecordingHeader {
    /// Always `sluice-recording`.
    pub format: String,
    /// Format version: 1.
    pub version: u32,
    /// Name of the model, for people.
    pub model: String,
    /// BLAKE3 of the text's token ids (u32, little-endian), hex; empty when unknown.
    pub text_hash: String,
    /// Seed of whatever sampling made it.
    pub seed: u64,
    /// Shape of the model; says how large the parts of a block are.
    pub shape: ModelShape,
}

/// One layer of a run of tokens, or what one lane after the other selected in one step.
#[derive(Clone, Debug, PartialEq)]
pub enum Block {
    /// Queries and keys of a run of tokens, after rotary embedding, not scaled.
    Attention {
        /// Layer of the model.
        layer: u16,
        /// Position of the first token.
        first_position: u64,
        /// `[token][query_head][head_dim]`
        queries: Vec<f32>,
        /// `[token][kv_head][head_dim]`
        keys: Vec<f32>,
    },
    /// Positions that each lane of a layer selected for one query, ascending.
    Selection {
        /// Layer of the model.
        layer: u16,
        /// Position of the query's token.
        position: u64,
        /// By lane.
        lanes: Vec<Vec<u32>>,
    },
}

/// A recording that cannot be read or written.
#[derive(Debug, Error)]
pub enum RecordingError {
    /// The file.
    #[error("recording: {0}")]
    Io(#[from] io::Error),
    /// The first line.
    #[error("recording.header: {0}")]
    Header(#[from] serde_json::Error),
    /// Another format or version.
    #[error("recording.header: {format} version {version}, this build reads {FORMAT} version {VERSION}")]
    Version {
        /// Format given.
        format: String,
        /// Version given.
        version: u32,
    },
    /// A shape that is not served.
    #[error("recording.header.shape: {0}")]
    Shape(#[from] ShapeError),
    /// A block whose parts do not fit the shape.
    #[error("recording.block[{block}].{field}: {value}, expected {expected}")]
    Block {
        /// Block, counted from 0.
        block: u64,
        /// Field of the block.
        field: &'static str,
        /// Value given.
        value: String,
        /// What would fit.
        expected: String,
    },
}

/// Name of the format.
pub const FORMAT: &str = "sluice-recording";

/// Version that is read and written.
pub const VERSION: u32 = 1;

/// Largest payload of a block, in bytes.
pub const MAX_PAYLOAD_BYTES: u64 = 1 << 30;

const KIND_ATTENTION: u32 = 1;
const KIND_SELECTION: u32 = 2;
const HEADER_BYTES: usize = 32;

/// The header of a block: kind u32, layer u32, position u64, tokens or lanes u64, payload bytes u64.
struct BlockHeader {
    kind: u32,
    layer: u32,
    position: u64,
    count: u64,
    payload_bytes: u64,
}

impl BlockHeader {
    fn to_bytes(&self) -> [u8; HEADER_BYTES] {
        let mut bytes = [0; HEADER_BYTES];
        bytes[0..4].copy_from_slice(&self.kind.to_le_bytes());
        bytes[4..8].copy_from_slice(&self.layer.to_le_bytes());
        bytes[8..16].copy_from_slice(&self.position.to_le_bytes());
        bytes[16..24].copy_from_slice(&self.count.to_le_bytes());
        bytes[24..32].copy_from_slice(&self.payload_bytes.to_le_bytes());
        bytes
    }

    fn from_bytes(bytes: &[u8; HEADER_BYTES]) -> Self {
        let u32_at = |at: usize| u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
        let u64_at = |at: usize| u64::from(u32_at(at)) | u64::from(u32_at(at + 4)) << 32;
        Self { kind: u32_at(0), layer: u32_at(4), position: u64_at(8), count: u64_at(16), payload_bytes: u64_at(24) }
    }
}

/// Writes a recording.
pub struct RecordingWriter<W> {
    file: W,
}

impl<W: Write> RecordingWriter<W> {
    /// Begins a recording.
    ///
    /// # Errors
    /// What the file answers.
    pub fn new(mut file: W, header: &RecordingHeader) -> Result<Self, RecordingError> {
        serde_json::to_writer(&mut file, header)?;
        file.write_all(b"\n")?;
        Ok(Self { file })
    }

    /// Appends queries `[token][query_head][head_dim]` and keys `[token][kv_head][head_dim]` of `tokens` tokens of one layer.
    ///
    /// # Errors
    /// What the file answers.
    pub fn attention(&mut self, layer: u16, first_position: u64, tokens: u64, queries: &[f32], keys: &[f32]) -> Result<(), RecordingError> {
        let payload_bytes = size_of_val(queries) as u64 + size_of_val(keys) as u64;
        let header = BlockHeader { kind: KIND_ATTENTION, layer: layer.into(), position: first_position, count: tokens, payload_bytes };
        self.file.write_all(&header.to_bytes())?;
        self.file.write_all(bytemuck::cast_slice(queries))?;
        Ok(self.file.write_all(bytemuck::cast_slice(keys))?)
    }

    /// Appends the positions that each lane of a layer selected for the query at `position`.
    ///
    /// # Errors
    /// What the file answers.
    pub fn selection(&mut self, layer: u16, position: u64, lanes: &[Vec<u32>]) -> Result<(), RecordingError> {
        let payload_bytes = lanes.iter().map(|lane| 4 + 4 * lane.len() as u64).sum();
        let header = BlockHeader { kind: KIND_SELECTION, layer: layer.into(), position, count: lanes.len() as u64, payload_bytes };
        self.file.write_all(&header.to_bytes())?;
        for lane in lanes {
            self.file.write_all(&(lane.len() as u32).to_le_bytes())?;
            self.file.write_all(bytemuck::cast_slice(lane))?;
        }
        Ok(())
    }

    /// Ends the recording; gives the file back.
    ///
    /// # Errors
    /// What the file answers.
    pub fn finish(mut self) -> Result<W, RecordingError> {
        self.file.flush()?;
        Ok(self.file)
    }
}

/// Reads a recording.
pub struct RecordingReader<R> {
    file: R,
    header: RecordingHeader,
    blocks: u64,
}

impl<R: BufRead> RecordingReader<R> {
    /// Reads and checks the header.
    ///
    /// # Errors
    /// Not a recording, or one of a version or shape that is not served.
    pub fn new(mut file: R) -> Result<Self, RecordingError> {
        let mut line = Vec::new();
        // Bounded: what is no recording may have no line end for gigabytes.
        file.by_ref().take(1 << 22).read_until(b'\n', &mut line)?;
        let header: RecordingHeader = serde_json::from_slice(&line)?;
        if header.format != FORMAT || header.version != VERSION {
            return Err(RecordingError::Version { format: header.format, version: header.version });
        }
        header.shape.check()?;
        Ok(Self { file, header, blocks: 0 })
    }

    /// What the recording says about itself.
    #[must_use]
    pub fn header(&self) -> &RecordingHeader {
        &self.header
    }

    /// The next block; `None` at the end.
    ///
    /// # Errors
    /// A block that ends early or does not fit the shape.
    pub fn next_block(&mut self) -> Result<Option<Block>, RecordingError> {
        if self.file.fill_buf()?.is_empty() {
            return Ok(None);
        }
        let mut bytes = [0; HEADER_BYTES];
        self.file.read_exact(&mut bytes)?;
        let header = BlockHeader::from_bytes(&bytes);
        let layer = usize::try_from(header.layer).unwrap_or(usize::MAX);
        let layers = self.header.shape.layers.len();
        self.expect("layer", layer < layers, header.layer, || format!("0 to {}", layers - 1))?;
        let largest = MAX_PAYLOAD_BYTES;
        self.expect("payload_bytes", header.payload_bytes <= largest, header.payload_bytes, || format!("at most {largest}"))?;
        let block = match header.kind {
            KIND_ATTENTION => self.read_attention(&header)?,
            KIND_SELECTION => self.read_selection(&header)?,
            kind => return Err(self.misfit("kind", kind, format!("{KIND_ATTENTION} or {KIND_SELECTION}"))),
        };
        self.blocks += 1;
        Ok(Some(block))
    }

    fn read_attention(&mut self, header: &BlockHeader) -> Result<Block, RecordingError> {
        let shape = self.header.shape.layers[header.layer as usize];
        let (query, key) =
            (u64::from(shape.query_heads) * u64::from(shape.head_dim), u64::from(shape.kv_heads) * u64::from(shape.head_dim));
        let expected = header.count.checked_mul(4 * (query + key)).filter(|&bytes| bytes > 0 && bytes <= MAX_PAYLOAD_BYTES);
        let expected_text = || format!("{} for {} tokens of this layer", 4 * (query + key) * header.count.min(1 << 32), header.count);
        self.expect("payload_bytes", expected == Some(header.payload_bytes), header.payload_bytes, expected_text)?;
        let queries = self.read_floats("queries", (header.count * query) as usize)?;
        let keys = self.read_floats("keys", (header.count * key) as usize)?;
        Ok(Block::Attention { layer: header.layer as u16, first_position: header.position, queries, keys })
    }

    fn read_selection(&mut self, header: &BlockHeader) -> Result<Block, RecordingError> {
        let lanes = self.header.shape.layers[header.layer as usize].lanes() as u64;
        self.expect("lanes", header.count == lanes, header.count, || lanes.to_string())?;
        let mut left = header.payload_bytes;
        let mut selected = Vec::new();
        for _ in 0..lanes {
            let mut count = [0; 4];
            self.file.read_exact(&mut count)?;
            let count = u64::from(u32::from_le_bytes(count));
            let bytes = 4 + 4 * count;
            self.expect("payload_bytes", bytes <= left, header.payload_bytes, || format!("at least {bytes} more for a lane"))?;
            left -= bytes;
            let mut positions = vec![0_u32; count as usize];
            self.file.read_exact(bytemuck::cast_slice_mut(&mut positions))?;
            selected.push(positions);
        }
        self.expect("payload_bytes", left == 0, header.payload_bytes, || format!("{left} less"))?;
        Ok(Block::Selection { layer: header.layer as u16, position: header.position, lanes: selected })
    }

    fn read_floats(&mut self, field: &'static str, count: usize) -> Result<Vec<f32>, RecordingError> {
        let mut values = vec![0.0_f32; count];
        self.file.read_exact(bytemuck::cast_slice_mut(&mut values))?;
        match values.iter().position(|value| !value.is_finite()) {
            None => Ok(values),
            Some(at) => Err(self.misfit(field, format!("{} at element {at}", values[at]), "finite numbers".to_owned())),
        }
    }

    fn expect(
        &self,
        field: &'static str,
        fits: bool,
        value: impl ToString,
        expected: impl FnOnce() -> String,
    ) -> Result<(), RecordingError> {
        if fits { Ok(()) } else { Err(self.misfit(field, value, expected())) }
    }

    fn misfit(&self, field: &'static str, value: impl ToString, expected: String) -> RecordingError {
        RecordingError::Block { block: self.blocks, field, value: value.to_string(), expected }
    }
}
