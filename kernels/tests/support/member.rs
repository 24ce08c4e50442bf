//! A sequence with rows of its own, for tests of several.

use std::sync::Arc;

use sluice_kernels::budget::{Budget, Settings};
use sluice_kernels::sequence::Sequence;
use sluice_kernels::shape::ModelShape;

use crate::support::{TestDaemon, calibration, rows};

pub(crate) const SPARSE: Settings =
    Settings { budget: Budget::Ratio { numerator: 1, denominator: 16, floor_tokens: 48, cap_tokens: 0 }, exact_tokens: 64, sink_tokens: 4 };

/// Far apart, so that no two sequences have a row in common that they did not inherit.
const APART: usize = 100_000;

/// A sequence whose rows tell its seed.
pub(crate) struct Member {
    pub(crate) daemon: TestDaemon,
    pub(crate) sequence: Sequence,
    pub(crate) seed: usize,
}

impl Member {
    /// Without rows yet.
    pub(crate) fn empty(seed: usize, shape: &Arc<ModelShape>) -> Self {
        let daemon = TestDaemon::new(Arc::clone(shape), Some(calibration(shape)), 14);
        let sequence = daemon.attach(SPARSE, None, 0);
        Self { daemon, sequence, seed }
    }

    pub(crate) fn append(&mut self, tokens: usize) {
        let (first, shape) = (self.sequence.committed(), self.sequence.shape().clone());
        for layer in 0..shape.layers.len() {
            let lanes = self.sequence.part(layer).lanes;
            let own = self.seed * APART + first..self.seed * APART + first + tokens;
            self.sequence.append(layer, first, &rows(&shape, layer, lanes, own)).expect("append");
        }
        let ids: Vec<u32> = (first..first + tokens).map(|position| position as u32).collect();
        self.sequence.write_tokens(first, &ids).expect("token ids");
        self.sequence.commit();
    }

    pub(crate) fn seal(&mut self) {
        self.daemon.seal();
        self.daemon.refresh(&mut self.sequence);
    }
}
