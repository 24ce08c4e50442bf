//! The head map: which query heads select and attend together through one lane.

use std::ops::Range;

/// MHA and GQA: query heads `lane * group .. (lane + 1) * group` share lane `lane`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HeadMap {
    query_heads: u16,
    lanes: u16,
}

impl HeadMap {
    /// A map of `query_heads` onto `lanes`; [`crate::shape::ModelShape::check`] has made sure that they divide.
    #[must_use]
    pub fn new(query_heads: u16, lanes: u16) -> Self {
        assert!(lanes > 0 && query_heads.is_multiple_of(lanes), "{query_heads} query heads do not divide into {lanes} lanes");
        Self { query_heads, lanes }
    }

    /// Query heads of the layer.
    #[must_use]
    pub fn query_heads(self) -> usize {
        usize::from(self.query_heads)
    }

    /// Lanes of the layer.
    #[must_use]
    pub fn lanes(self) -> usize {
        usize::from(self.lanes)
    }

    /// Query heads that share one lane (g in the papers).
    #[must_use]
    pub fn group(self) -> usize {
        usize::from(self.query_heads / self.lanes)
    }

    /// The query heads of a lane.
    #[must_use]
    pub fn heads_of(self, lane: usize) -> Range<usize> {
        lane * self.group()..(lane + 1) * self.group()
    }
}
