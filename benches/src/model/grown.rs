//! A matrix that grows by rows.

use std::ops::Range;

use anyhow::Result;
use candle_core::{DType, Device, Tensor};

/// Rows of `width` values with room for more behind them.
pub(super) struct Grown {
    matrix: Tensor,
    width: usize,
    count: usize,
}

impl Grown {
    pub(super) fn new(width: usize) -> Result<Self> {
        Ok(Self { matrix: zeros(0, width)?, width, count: 0 })
    }

    /// Rows in it.
    pub(super) fn count(&self) -> usize {
        self.count
    }

    /// Whether `rows` more rows have a place.
    pub(super) fn has_room(&self, rows: usize) -> Result<bool> {
        Ok(self.count + rows <= self.matrix.dim(0)?)
    }

    /// Puts whole rows behind the others.
    pub(super) fn push(&mut self, values: Vec<f32>) -> Result<()> {
        let rows = values.len() / self.width;
        if !self.has_room(rows)? {
            self.make_room(rows, self.count)?;
        }
        self.matrix.slice_set(&Tensor::from_vec(values, (rows, self.width), &Device::Cpu)?, 0, self.count)?;
        self.count += rows;
        Ok(())
    }

    /// Moves the last `kept` rows to a larger matrix and drops those before them.
    pub(super) fn make_room(&mut self, rows: usize, kept: usize) -> Result<()> {
        let grown = zeros((2 * (kept + rows)).next_multiple_of(1024), self.width)?;
        if kept > 0 {
            grown.slice_set(&self.matrix.narrow(0, self.count - kept, kept)?.copy()?, 0, 0)?;
        }
        self.matrix = grown;
        self.count = kept;
        Ok(())
    }

    /// Some of the rows, not copied.
    pub(super) fn rows(&self, rows: Range<usize>) -> Result<Tensor> {
        Ok(self.matrix.narrow(0, rows.start, rows.len())?)
    }
}

fn zeros(rows: usize, width: usize) -> Result<Tensor> {
    Ok(Tensor::zeros((rows, width), DType::F32, &Device::Cpu)?)
}
