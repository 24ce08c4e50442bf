//! What the kernels of a layer leave for each other, shared by all layers of a batch.

use super::batch::BatchShape;
use super::buffer::DeviceBuffer;
use super::error::CudaError;
use super::jobs::{ABOVE_WORDS, Arrivals, BINS, Miss, PARTS, PartCounts, SAMPLE_SUMS, Victim, VictimCounts};
use super::open::Gpu;

/// Working room that layers share, `[slot]` first.
pub(super) struct Workspace {
    pub(super) label_lse: DeviceBuffer<f32>,
    pub(super) keys: DeviceBuffer<u16>,
    pub(super) histogram: DeviceBuffer<u32>,
    pub(super) above: DeviceBuffer<u32>,
    pub(super) positions: DeviceBuffer<u32>,
    pub(super) hot_places: DeviceBuffer<u32>,
    pub(super) misses: DeviceBuffer<Miss>,
    pub(super) part_counts: DeviceBuffer<PartCounts>,
    pub(super) victim_bins: DeviceBuffer<u32>,
    pub(super) victims: DeviceBuffer<Victim>,
    pub(super) victim_counts: DeviceBuffer<VictimCounts>,
    pub(super) partials: DeviceBuffer<f32>,
    pub(super) arrivals: DeviceBuffer<Arrivals>,
}

impl Workspace {
    pub(super) fn new(gpu: &Gpu, shape: &BatchShape) -> Result<Self, CudaError> {
        let context = &gpu.context;
        let (lanes, group) = (shape.slots * shape.lanes(), shape.geometry.heads.group());
        let listed = lanes * shape.max_count;
        Ok(Self {
            label_lse: DeviceBuffer::zeroed(context, lanes * group * SAMPLE_SUMS * 2)?,
            keys: DeviceBuffer::zeroed(context, lanes * shape.max_tokens)?,
            histogram: DeviceBuffer::zeroed(context, lanes * BINS)?,
            above: DeviceBuffer::zeroed(context, lanes * PARTS * ABOVE_WORDS)?,
            positions: DeviceBuffer::zeroed(context, listed)?,
            hot_places: DeviceBuffer::zeroed(context, listed)?,
            misses: DeviceBuffer::zeroed(context, listed)?,
            part_counts: DeviceBuffer::zeroed(context, lanes * PARTS)?,
            victim_bins: DeviceBuffer::zeroed(context, lanes * BINS)?,
            victims: DeviceBuffer::zeroed(context, listed)?,
            victim_counts: DeviceBuffer::zeroed(context, lanes)?,
            partials: DeviceBuffer::zeroed(context, lanes * shape.lane_partials())?,
            arrivals: DeviceBuffer::zeroed(context, lanes)?,
        })
    }

    pub(super) fn bytes(&self) -> u64 {
        let words = self.positions.bytes() + self.hot_places.bytes() + self.misses.bytes() + self.victims.bytes();
        let bins = self.histogram.bytes() + self.above.bytes() + self.victim_bins.bytes() + self.victim_counts.bytes();
        (words
            + bins
            + self.label_lse.bytes()
            + self.keys.bytes()
            + self.part_counts.bytes()
            + self.partials.bytes()
            + self.arrivals.bytes()) as u64
    }
}
