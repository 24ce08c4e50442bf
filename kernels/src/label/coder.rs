//! The coder: a plan and a calibration joined, for one layer.

use crate::label::{LabelPlan, LayerCalibration};

/// Which channels of each lane are kept, at how many bits, over which range.
#[derive(Clone, Debug, PartialEq)]
pub struct LabelCoder {
    /// The plan.
    pub plan: LabelPlan,
    /// Kept channels by lane.
    pub lanes: Vec<LaneCoder>,
}

/// The kept channels of one lane, in the order of the plan's groups.
#[derive(Clone, Debug, PartialEq)]
pub struct LaneCoder {
    /// Channel of the key, one per kept channel.
    pub channels: Vec<u16>,
    /// Value of code 0.
    pub low: Vec<f32>,
    /// Difference between neighbouring codes: `(high - low) / (2^bits - 1)`.
    pub step: Vec<f32>,
}

impl LabelCoder {
    /// Joins a plan with a checked calibration.
    #[must_use]
    pub fn new(plan: &LabelPlan, calibration: &LayerCalibration) -> Self {
        let widths: Vec<u8> = plan.groups().iter().flat_map(|group| std::iter::repeat_n(group.bits, usize::from(group.channels))).collect();
        let lanes = calibration.lanes.iter().map(|lane| {
            let channels: Vec<u16> = lane.order[..widths.len()].to_vec();
            let range = |&channel: &u16| (lane.low[usize::from(channel)], lane.high[usize::from(channel)]);
            let low = channels.iter().map(|channel| range(channel).0).collect();
            let step = channels.iter().zip(&widths).map(|(channel, &bits)| {
                let (low, high) = range(channel);
                (high - low) / ((1u32 << bits) - 1) as f32
            });
            LaneCoder { low, step: step.collect(), channels }
        });
        Self { plan: plan.clone(), lanes: lanes.collect() }
    }
}
