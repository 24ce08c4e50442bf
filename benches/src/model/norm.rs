//! Root-mean-square normalisation (arXiv 1910.07467).

use anyhow::Result;
use rayon::prelude::*;

use super::gguf::Gguf;

/// The weights of one normalisation. GGUF files of Gemma already hold `1 + weight`.
pub(crate) struct Norm {
    weights: Vec<f32>,
    epsilon: f32,
}

impl Norm {
    /// Reads the weights named `name`, one for each of `channels`.
    pub(crate) fn load(gguf: &mut Gguf, name: &str, channels: usize, epsilon: f32) -> Result<Self> {
        Ok(Self { weights: gguf.vector(name, channels)?, epsilon })
    }

    /// As [`Norm::load`], or nothing where the file has no such tensor.
    pub(crate) fn load_if_present(gguf: &mut Gguf, name: &str, channels: usize, epsilon: f32) -> Result<Option<Self>> {
        gguf.has_tensor(name).then(|| Self::load(gguf, name, channels, epsilon)).transpose()
    }

    /// Normalises every run of `channels` values of `rows` in place.
    pub(crate) fn apply(&self, rows: &mut [f32]) {
        let channels = self.weights.len();
        rows.par_chunks_mut(channels).with_min_len(16).for_each(|row| {
            let squares: f64 = row.iter().map(|&value| f64::from(value) * f64::from(value)).sum();
            let factor = (1.0 / (squares / channels as f64 + f64::from(self.epsilon)).sqrt()) as f32;
            for (value, weight) in row.iter_mut().zip(&self.weights) {
                *value = *value * factor * weight;
            }
        });
    }

    /// A normalised copy of `rows`.
    pub(crate) fn of(&self, rows: &[f32]) -> Vec<f32> {
        let mut copy = rows.to_vec();
        self.apply(&mut copy);
        copy
    }
}
