//! What the kernels of a layer leave for each other, shared by all layers of a batch.

use cudarc::driver::CudaStream;

use super::batch::BatchShape;
use super::buffer::DeviceBuffer;
use super::error::CudaError;
use super::jobs::{Arrivals, BINS, Miss, PART_WORDS, PARTS, PartCounts, SAMPLE_SUMS, Victim, VictimCounts};

/// Working room that layers share, `[slot]` first.
pub(super) struct Workspace {
    pub(super) label_lse: DeviceBuffer<f32>,
    pub(super) keys: DeviceBuffer<u16>,
    pub(super) histogram: DeviceBuffer<u32>,
    pub(super) part_words: DeviceBuffer<u64>,
    pub(super) positions: DeviceBuffer<u32>,
    pub(super) hot_places: DeviceBuffer<u32>,
    pub(super) misses: DeviceBuffer<Miss>,
    pub(super) part_counts: DeviceBuffer<PartCounts>,
    pub(super) victims: DeviceBuffer<Victim>,
    pub(super) victim_counts: DeviceBuffer<VictimCounts>,
    pub(super) partials: DeviceBuffer<f32>,
    pub(super) arrivals: DeviceBuffer<Arrivals>,
}

impl Workspace {
    pub(super) fn new(stream: &CudaStream, shape: &BatchShape) -> Result<Self, CudaError> {
        let (lanes, group) = (shape.slots * shape.lanes(), shape.geometry.heads.group());
        let listed = lanes * shape.max_count;
        Ok(Self {
            label_lse: DeviceBuffer::zeroed(stream, lanes * group * SAMPLE_SUMS)?,
            keys: DeviceBuffer::zeroed(stream, lanes * shape.max_tokens)?,
            histogram: DeviceBuffer::zeroed(stream, lanes * BINS)?,
            part_words: DeviceBuffer::zeroed(stream, lanes * PARTS * PART_WORDS)?,
            positions: DeviceBuffer::zeroed(stream, listed)?,
            hot_places: DeviceBuffer::zeroed(stream, listed)?,
            misses: DeviceBuffer::zeroed(stream, listed)?,
            part_counts: DeviceBuffer::zeroed(stream, lanes * PARTS)?,
            victims: DeviceBuffer::zeroed(stream, listed)?,
            victim_counts: DeviceBuffer::zeroed(stream, lanes)?,
            partials: DeviceBuffer::zeroed(stream, lanes * shape.lane_partials())?,
            arrivals: DeviceBuffer::zeroed(stream, lanes)?,
        })
    }

    /// Bytes of the room for batches of a shape.
    pub(super) fn bytes_of(shape: &BatchShape) -> u64 {
        let of_lane = (SAMPLE_SUMS * shape.geometry.heads.group() + BINS + 2 * PARTS * PART_WORDS + shape.lane_partials()) * 4
            + shape.max_tokens * size_of::<u16>()
            + shape.max_count * (2 * size_of::<u32>() + size_of::<Miss>() + size_of::<Victim>())
            + PARTS * size_of::<PartCounts>()
            + size_of::<VictimCounts>()
            + size_of::<Arrivals>();
        (shape.slots * shape.lanes() * of_lane) as u64
    }

    pub(super) fn bytes(&self) -> u64 {
        let words = self.positions.bytes() + self.hot_places.bytes() + self.misses.bytes() + self.victims.bytes();
        let bins = self.histogram.bytes() + self.part_words.bytes() + self.victim_counts.bytes();
        (words
            + bins
            + self.label_lse.bytes()
            + self.keys.bytes()
            + self.part_counts.bytes()
            + self.partials.bytes()
            + self.arrivals.bytes()) as u64
    }
}
