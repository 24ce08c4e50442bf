//! Rows in host memory that the device reads across the link.

use std::sync::Arc;

use super::buffer::{HostAccess, RegisteredRange};
use super::error::CudaError;
use super::open::Gpu;
use crate::layout::ClassLayout;
use crate::shared::segment::Segment;

/// A mapped segment, registered with the device for as long as this value lives.
pub struct HostSegment {
    segment: Arc<Segment>,
    range: RegisteredRange,
    /// By plane: device address of its page in slot 0.
    planes: Vec<u64>,
}

impl HostSegment {
    /// Registers a segment. One that was mapped for reading is registered for reading: a kernel that writes there faults.
    ///
    /// # Errors
    /// A registration that the driver refuses, or a plane that the device sees in several pieces.
    pub fn register(gpu: &Gpu, segment: Arc<Segment>, access: HostAccess) -> Result<Self, CudaError> {
        let (first, len) = segment.memory();
        // SAFETY: the mapping lives as long as the segment, which the range keeps.
        let range = unsafe { RegisteredRange::register(&gpu.context, first, len, access, segment.clone()) }?;
        let mut planes = Vec::new();
        for plane in &segment.layout().planes {
            let first = ClassLayout::page_offset(plane, segment.slots, 0) as usize;
            let bytes = (plane.page_bytes * u64::from(segment.slots)) as usize;
            let (begin, end) = (range.address(first), range.address(first + bytes - 1));
            if end.wrapping_sub(begin) != bytes as u64 - 1 {
                return Err(CudaError::Scattered { segment: segment.id, layer: plane.layer });
            }
            planes.push(begin);
        }
        Ok(Self { segment, range, planes })
    }

    /// The segment.
    #[must_use]
    pub fn segment(&self) -> &Arc<Segment> {
        &self.segment
    }

    /// Bytes registered.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.range.len() as u64
    }
}

/// Registered segments of one layout, by number. A host place is `segment << 16 | slot`.
pub struct HostRows {
    layout: Arc<ClassLayout>,
    segments: Vec<HostSegment>,
}

impl HostRows {
    /// Segments whose numbers are their indices.
    #[must_use]
    pub fn new(layout: Arc<ClassLayout>, segments: Vec<HostSegment>) -> Self {
        Self { layout, segments }
    }

    /// The segments.
    #[must_use]
    pub fn segments(&self) -> &[HostSegment] {
        &self.segments
    }

    /// Device addresses of plane `plane` by segment.
    #[must_use]
    pub fn planes(&self, plane: usize) -> Vec<u64> {
        self.segments.iter().map(|segment| segment.planes[plane]).collect()
    }

    /// Device address of the page of a host place in plane `plane`.
    #[must_use]
    pub fn page_address(&self, plane: usize, place: u32) -> u64 {
        let (segment, slot) = (&self.segments[(place >> 16) as usize], place & 0xFFFF);
        assert!(slot < segment.segment.slots, "slot {slot} of {}", segment.segment.slots);
        segment.planes[plane] + u64::from(slot) * self.layout.planes[plane].page_bytes
    }

    /// The same page, read by the processor: `lanes x 256 x row_bytes`.
    #[must_use]
    pub fn page(&self, plane: usize, place: u32) -> &[u8] {
        self.segments[(place >> 16) as usize].segment.page(&self.layout.planes[plane], place & 0xFFFF)
    }

    /// Plane `plane` as the long pieces in which it lies, one a segment: device address and bytes.
    #[must_use]
    pub fn pieces(&self, plane: usize) -> Vec<(u64, u64)> {
        let page_bytes = self.layout.planes[plane].page_bytes;
        self.segments.iter().map(|segment| (segment.planes[plane], page_bytes * u64::from(segment.segment.slots))).collect()
    }
}
