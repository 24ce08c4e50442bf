//! A matrix of the model, as f32 or as the file's own blocks.

use anyhow::{Context, Result};
use candle_core::quantized::{QMatMul, QTensor};
use candle_core::{Device, Module, Tensor};

use super::gguf::Gguf;

/// How matrices are kept in memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Weights {
    /// Dequantised to f32 once, at load: what reference figures are computed with.
    F32,
    /// The file's blocks; products quantise the activations to 8 bit. Less memory traffic a token, other numbers.
    Quantized,
}

/// `y = W x + b` over rows of activations.
pub(crate) struct Linear {
    matrix: QMatMul,
    bias: Option<Vec<f32>>,
    inputs: usize,
}

impl Linear {
    /// Reads `{name}.weight` (`[outputs, inputs]`) and, where the file has it, `{name}.bias`.
    pub(crate) fn load(gguf: &mut Gguf, name: &str, outputs: usize, inputs: usize, weights: Weights) -> Result<Self> {
        let matrix = gguf.tensor(&format!("{name}.weight"), &[outputs, inputs])?;
        let bias_name = format!("{name}.bias");
        let bias = gguf.has_tensor(&bias_name).then(|| gguf.vector(&bias_name, outputs)).transpose()?;
        Ok(Self { matrix: keep(matrix, weights)?, bias, inputs })
    }

    /// Applies the matrix to `rows` (`[token][inputs]`); gives `[token][outputs]`.
    pub(crate) fn forward(&self, rows: &[f32]) -> Result<Vec<f32>> {
        let mut out = product(&self.matrix, rows, self.inputs)?;
        if let Some(bias) = &self.bias {
            for row in out.chunks_exact_mut(bias.len()) {
                row.iter_mut().zip(bias).for_each(|(value, bias)| *value += bias);
            }
        }
        Ok(out)
    }
}

/// Keeps a matrix as asked for.
pub(crate) fn keep(matrix: QTensor, weights: Weights) -> Result<QMatMul> {
    Ok(match weights {
        Weights::F32 => QMatMul::Tensor(matrix.dequantize(&Device::Cpu)?),
        Weights::Quantized => QMatMul::from_qtensor(matrix)?,
    })
}

/// `rows` (`[token][inputs]`) times the transposed `matrix`.
pub(crate) fn product(matrix: &QMatMul, rows: &[f32], inputs: usize) -> Result<Vec<f32>> {
    let input = Tensor::from_slice(rows, (rows.len() / inputs, inputs), &Device::Cpu).context("linear: rows of activations")?;
    Ok(matrix.forward(&input)?.flatten_all()?.to_vec1()?)
}
