//! Static scales of fp8 rows: what a lane's codes are multiplied by.

use std::ops::Range;
use std::sync::Arc;

use bytemuck::{Pod, Zeroable};
use serde::{Deserialize, Serialize};

/// The scales of one lane: an element of a key is its code's value times `key`, of a value its code's value times `value`.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize, Pod, Zeroable)]
#[serde(deny_unknown_fields)]
pub struct RowScale {
    /// Of keys.
    pub key: f32,
    /// Of values.
    pub value: f32,
}

impl RowScale {
    /// The scales of rows that have none.
    pub const ONE: Self = Self { key: 1.0, value: 1.0 };
    /// Smallest scale that is served. Between the bounds an element is a normal f32 or zero, and so is every product that a device folds
    /// the scale into.
    pub const LOWEST: f32 = 1e-30;
    /// Largest scale that is served.
    pub const HIGHEST: f32 = 1e30;

    /// Whether a scale lies between the bounds.
    #[must_use]
    pub fn is_served(scale: f32) -> bool {
        (Self::LOWEST..=Self::HIGHEST).contains(&scale)
    }
}

/// The scales of some lanes of one layer; none where rows are not scaled. Cheap to clone.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(from = "Vec<RowScale>", into = "Vec<RowScale>")]
pub struct LaneScales(Arc<[RowScale]>);

impl LaneScales {
    /// The scales of a lane.
    #[must_use]
    pub fn of(&self, lane: usize) -> RowScale {
        self.0.get(lane).copied().unwrap_or(RowScale::ONE)
    }

    /// By lane; empty where rows are not scaled.
    #[must_use]
    pub fn as_slice(&self) -> &[RowScale] {
        &self.0
    }

    /// The scales of some of the lanes.
    #[must_use]
    pub fn part(&self, lanes: Range<usize>) -> Self {
        if self.0.is_empty() || lanes == (0..self.0.len()) { self.clone() } else { Self(self.0[lanes].into()) }
    }
}

impl From<Vec<RowScale>> for LaneScales {
    fn from(scales: Vec<RowScale>) -> Self {
        Self(scales.into())
    }
}

impl From<LaneScales> for Vec<RowScale> {
    fn from(scales: LaneScales) -> Self {
        scales.0.to_vec()
    }
}
