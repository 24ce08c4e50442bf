//! A GGUF file: its metadata by key, its tensors by name, and the digest of its bytes.

use std::fs::File;
use std::io::{BufReader, Seek};
use std::path::Path;

use anyhow::{Context, Result, anyhow, bail};
use candle_core::Device;
use candle_core::quantized::QTensor;
use candle_core::quantized::gguf_file::{Content, Value};

/// An open GGUF file. Nothing but the header is read before a tensor is asked for.
pub struct Gguf {
    content: Content,
    file: BufReader<File>,
    architecture: String,
}

impl Gguf {
    /// Opens a file and reads its header.
    ///
    /// # Errors
    /// The file cannot be read, is not GGUF, or names no architecture.
    pub fn open(path: &Path) -> Result<Self> {
        let file = File::open(path).with_context(|| format!("gguf: open {}", path.display()))?;
        let mut file = BufReader::with_capacity(1 << 20, file);
        let content = Content::read(&mut file).with_context(|| format!("gguf: read the header of {}", path.display()))?;
        let architecture = match content.metadata.get("general.architecture") {
            Some(Value::String(name)) => name.clone(),
            _ => bail!("gguf: general.architecture is missing in {}", path.display()),
        };
        Ok(Self { content, file, architecture })
    }

    /// The value of `general.architecture`: the prefix of the model's own keys.
    #[must_use]
    pub fn architecture(&self) -> &str {
        &self.architecture
    }

    /// BLAKE3 of the whole file.
    ///
    /// # Errors
    /// The file cannot be read.
    pub fn digest(&mut self) -> Result<[u8; 32]> {
        self.file.rewind().context("gguf: rewind")?;
        let mut hasher = blake3::Hasher::new();
        hasher.update_reader(&mut self.file).context("gguf: read for the digest")?;
        Ok(*hasher.finalize().as_bytes())
    }

    /// The value of a key as it stands in the file.
    #[must_use]
    pub fn value(&self, key: &str) -> Option<&Value> {
        self.content.metadata.get(key)
    }

    /// A whole number under `key`, of whatever width it was written with.
    ///
    /// # Errors
    /// The value is not a whole number, or is negative.
    pub fn number(&self, key: &str) -> Result<Option<usize>> {
        self.value(key).map(|value| whole(value).with_context(|| format!("gguf: {key}"))).transpose()
    }

    /// A real number under `key`.
    ///
    /// # Errors
    /// The value is not a floating-point number.
    pub fn real(&self, key: &str) -> Result<Option<f32>> {
        let real = |value: &Value| match value {
            Value::F32(value) => Ok(*value),
            Value::F64(value) => Ok(*value as f32),
            other => Err(anyhow!("gguf: {key} is {other:?}, a floating-point number expected")),
        };
        self.value(key).map(real).transpose()
    }

    /// A text under `key`.
    ///
    /// # Errors
    /// The value is not text.
    pub fn text(&self, key: &str) -> Result<Option<&str>> {
        match self.value(key) {
            None => Ok(None),
            Some(Value::String(text)) => Ok(Some(text)),
            Some(other) => Err(anyhow!("gguf: {key} is {other:?}, a string expected")),
        }
    }

    /// A truth value under `key`.
    ///
    /// # Errors
    /// The value is not a truth value.
    pub fn truth(&self, key: &str) -> Result<Option<bool>> {
        self.value(key).map(|value| value.to_bool().with_context(|| format!("gguf: {key}"))).transpose()
    }

    /// An array under `key`.
    ///
    /// # Errors
    /// The key is missing or is not an array.
    pub fn array(&self, key: &str) -> Result<&[Value]> {
        let value = self.value(key).ok_or_else(|| anyhow!("gguf: {key} is missing"))?;
        Ok(value.to_vec().with_context(|| format!("gguf: {key}"))?)
    }

    /// Whether a tensor is in the file.
    #[must_use]
    pub fn has_tensor(&self, name: &str) -> bool {
        self.content.tensor_infos.contains_key(name)
    }

    /// Reads one tensor and checks its dimensions, outermost first (`[outputs, inputs]` for a matrix).
    ///
    /// # Errors
    /// The tensor is missing, has other dimensions, or has a type that candle does not read.
    pub fn tensor(&mut self, name: &str, dims: &[usize]) -> Result<QTensor> {
        let tensor = self.content.tensor(&mut self.file, name, &Device::Cpu).with_context(|| format!("gguf: tensor {name}"))?;
        let given = tensor.shape().dims();
        if given != dims {
            bail!("gguf: tensor {name} has dimensions {given:?}, the metadata give {dims:?}");
        }
        Ok(tensor)
    }

    /// Reads a small tensor as plain numbers.
    ///
    /// # Errors
    /// As for [`Gguf::tensor`].
    pub fn vector(&mut self, name: &str, length: usize) -> Result<Vec<f32>> {
        Ok(self.tensor(name, &[length])?.dequantize(&Device::Cpu)?.to_vec1()?)
    }
}

fn whole(value: &Value) -> Result<usize> {
    let number = match *value {
        Value::I8(value) => usize::try_from(value)?,
        Value::I16(value) => usize::try_from(value)?,
        Value::I32(value) => usize::try_from(value)?,
        Value::I64(value) => usize::try_from(value)?,
        Value::U8(value) => usize::from(value),
        Value::U16(value) => usize::from(value),
        Value::U32(value) => usize::try_from(value)?,
        Value::U64(value) => usize::try_from(value)?,
        ref other => bail!("{other:?} is not a whole number"),
    };
    Ok(number)
}
