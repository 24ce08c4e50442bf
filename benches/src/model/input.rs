//! What every command that runs a model takes: the model, and tokens to feed it.

use std::path::PathBuf;

use anyhow::{Context, Result, bail, ensure};
use clap::Args;

use super::linear::Weights;
use super::tokenizer::Tokenizer;
use super::{DenseLayers, Model};
use crate::workload::RowTypeName;
use sluice_kernels::shape::RowType;

/// Which model, and how its numbers are kept.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Model")]
pub struct ModelArguments {
    /// GGUF file: Gemma 3, Llama, Qwen 2 or Qwen 3 (`python3 benches/model.py gguf` fetches a small Gemma 3).
    #[arg(long, value_name = "PATH")]
    pub gguf: PathBuf,
    /// Weights dequantised to f32 once, or multiplied as the file's own blocks (less memory traffic, other numbers).
    #[arg(long, value_enum, default_value = "f32")]
    pub weights: WeightsName,
    /// Element type of cached rows.
    #[arg(long, value_enum, default_value = "f16")]
    pub row_type: RowTypeName,
}

/// `--weights`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum WeightsName {
    /// [`Weights::F32`].
    F32,
    /// [`Weights::Quantized`].
    Quantized,
}

impl ModelArguments {
    /// Reads the model.
    ///
    /// # Errors
    /// As for [`Model::load`].
    pub fn load(&self) -> Result<Model> {
        let weights = match self.weights {
            WeightsName::F32 => Weights::F32,
            WeightsName::Quantized => Weights::Quantized,
        };
        Model::load(&self.gguf, weights)
    }

    /// An empty dense cache whose rows are kept as `row_type`.
    ///
    /// # Errors
    /// A shape out of bounds.
    pub fn dense(&self, model: &Model, row_type: RowType) -> Result<DenseLayers> {
        DenseLayers::new(model.shape(row_type)?)
    }
}

/// Which tokens.
#[derive(Args, Clone, Debug)]
#[group(required = true, multiple = false)]
pub struct TokenArguments {
    /// Text files, read one behind the other.
    #[arg(long, value_name = "PATH", num_args = 1..)]
    pub text: Vec<PathBuf>,
    /// A JSON list of token ids instead of text.
    #[arg(long, value_name = "PATH")]
    pub ids: Option<PathBuf>,
}

impl TokenArguments {
    /// The token ids, the begin-of-text token first where the model wants one.
    ///
    /// # Errors
    /// A file that cannot be read, is not UTF-8 or not a JSON list of ids.
    pub fn read(&self, tokenizer: &Tokenizer) -> Result<Vec<u32>> {
        if let Some(path) = &self.ids {
            return read_ids(path);
        }
        let mut text = String::new();
        for path in &self.text {
            text += &std::fs::read_to_string(path).with_context(|| format!("--text {}", path.display()))?;
        }
        tokenizer.encode(&text)
    }
}

/// Token ids of one file: a JSON list where its name ends in `.json`, else text.
///
/// # Errors
/// As for [`TokenArguments::read`].
pub fn read_tokens(path: &PathBuf, tokenizer: &Tokenizer) -> Result<Vec<u32>> {
    if path.extension().is_some_and(|extension| extension == "json") {
        return read_ids(path);
    }
    TokenArguments { text: vec![path.clone()], ids: None }.read(tokenizer)
}

fn read_ids(path: &PathBuf) -> Result<Vec<u32>> {
    let text = std::fs::read_to_string(path).with_context(|| format!("token ids {}", path.display()))?;
    serde_json::from_str(&text).with_context(|| format!("token ids {}: a JSON list of integers expected", path.display()))
}

/// The first `count` of `ids`.
///
/// # Errors
/// There are fewer.
pub fn first_tokens(mut ids: Vec<u32>, count: usize) -> Result<Vec<u32>> {
    ensure!(count > 0, "--tokens: 0, at least 1 needed");
    if ids.len() < count {
        bail!("--tokens: {count}, the text has {}", ids.len());
    }
    ids.truncate(count);
    Ok(ids)
}

/// BLAKE3 of token ids as little-endian 32-bit words, in hex: what a calibration stores as the hash of its text.
#[must_use]
pub fn hash_tokens(ids: &[u32]) -> String {
    let mut hasher = blake3::Hasher::new();
    ids.iter().for_each(|id| {
        hasher.update(&id.to_le_bytes());
    });
    hasher.finalize().to_hex().to_string()
}
