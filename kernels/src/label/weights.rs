//! One query head against labels: integer weights a channel and one unit a group.

use crate::label::LabelPlan;
use crate::label::coder::LaneCoder;

/// A query head's integer weights.
///
/// For each group of the plan, in f32 with every operation rounded on its own: `w[c] = query[channel of c] * step[c]`,
/// `m = max |w[c]|`; `weight[c] = floor(w[c] * (127 / m) + 0.5)`, between -127 and 127, and `unit = m / 127`. A group whose `m` is below
/// 1e-30 has weights and unit zero. `unit * sum of weight[c] * code[c]` is then the group's part of q·k, up to the same constant for every
/// row (the channels' `low`), which the softmax over rows takes out again.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct HeadWeights {
    /// One per kept channel, in the order of the plan's groups.
    pub weights: Vec<i8>,
    /// One per group.
    pub units: Vec<f32>,
}

impl HeadWeights {
    /// Below this a group's largest weight counts as zero.
    pub const SMALLEST: f32 = 1e-30;

    /// The weights of one query head, `[head_dim]`, on its lane.
    #[must_use]
    pub fn new(plan: &LabelPlan, lane: &LaneCoder, query: &[f32]) -> Self {
        let mut weights = Self::default();
        weights.set(plan, lane, query);
        weights
    }

    /// [`Self::new`] into buffers that are kept from step to step.
    pub fn set(&mut self, plan: &LabelPlan, lane: &LaneCoder, query: &[f32]) {
        self.weights.clear();
        self.units.clear();
        let mut first = 0;
        for group in plan.groups() {
            let channels = first..first + usize::from(group.channels);
            first = channels.end;
            let products = || channels.clone().map(|c| query[usize::from(lane.channels[c])] * lane.step[c]);
            let largest = products().fold(0.0f32, |largest, w| largest.max(w.abs()));
            let (factor, unit) = if largest < Self::SMALLEST { (0.0, 0.0) } else { (127.0 / largest, largest / 127.0) };
            self.weights.extend(products().map(|w| (w * factor + 0.5).floor() as i8));
            self.units.push(unit);
        }
    }
}
