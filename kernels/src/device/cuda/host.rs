//! Rows in host memory that the device reads across the link.

use std::any::Any;
use std::ops::Range;
use std::sync::Arc;

use super::buffer::{HostAccess, RegisteredRange};
use super::error::CudaError;
use super::open::Gpu;
use crate::layout::{ClassLayout, Plane};
use crate::shared::open::OpenSlots;
use crate::shared::segment::Segment;
use crate::slot::SlotClass;

/// A mapped file with slots of full-attention layers.
#[derive(Clone, Debug)]
pub enum HostFile {
    /// Of the arena.
    Sealed(Arc<Segment>),
    /// Of one sequence.
    Open(Arc<OpenSlots>),
}

impl HostFile {
    /// Whether both are one mapping.
    #[must_use]
    pub fn is_same(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Sealed(a), Self::Sealed(b)) => Arc::ptr_eq(a, b),
            (Self::Open(a), Self::Open(b)) => Arc::ptr_eq(a, b),
            _ => false,
        }
    }

    /// Slots it has.
    #[must_use]
    pub fn slots(&self) -> u32 {
        match self {
            Self::Sealed(segment) => segment.slots,
            Self::Open(open) => open.layout().slots,
        }
    }

    fn layout(&self) -> &Arc<ClassLayout> {
        match self {
            Self::Sealed(segment) => segment.layout(),
            Self::Open(open) => open.layout().class(SlotClass::Selected),
        }
    }

    /// Offset of a plane's page in slot 0.
    fn plane_at(&self, plane: &Plane) -> u64 {
        match self {
            Self::Sealed(segment) => ClassLayout::page_offset(plane, segment.slots, 0),
            Self::Open(open) => open.layout().page_at(SlotClass::Selected, plane, 0),
        }
    }

    fn page(&self, plane: &Plane, slot: u32) -> &[u8] {
        match self {
            Self::Sealed(segment) => segment.page(plane, slot),
            Self::Open(open) => open.page(SlotClass::Selected, plane, slot),
        }
    }

    fn memory(&self) -> (*const u8, usize) {
        match self {
            Self::Sealed(segment) => segment.memory(),
            Self::Open(open) => open.memory(),
        }
    }

    fn owner(&self) -> Arc<dyn Any + Send + Sync> {
        match self {
            Self::Sealed(segment) => Arc::clone(segment) as Arc<dyn Any + Send + Sync>,
            Self::Open(open) => Arc::clone(open) as Arc<dyn Any + Send + Sync>,
        }
    }

    /// What to call it where something is wrong with it.
    fn number(&self) -> u32 {
        match self {
            Self::Sealed(segment) => segment.id,
            Self::Open(_) => u32::MAX,
        }
    }
}

/// A mapped file, registered with the device for as long as this value lives.
pub struct HostSegment {
    file: HostFile,
    range: RegisteredRange,
    /// By plane: device address of its page in slot 0.
    planes: Vec<u64>,
}

impl HostSegment {
    /// Registers a file. One that is registered for reading cannot be written: a kernel that does so faults.
    ///
    /// # Errors
    /// A registration that the driver refuses, or a plane that the device sees in several pieces.
    pub fn register(gpu: &Gpu, file: HostFile, access: HostAccess) -> Result<Self, CudaError> {
        let (first, len) = file.memory();
        // SAFETY: the mapping lives as long as its owner, which the range keeps.
        let range = unsafe { RegisteredRange::register(&gpu.context, first, len, access, file.owner()) }?;
        let mut planes = Vec::new();
        for plane in &file.layout().planes {
            let first = file.plane_at(plane) as usize;
            let bytes = (plane.page_bytes * u64::from(file.slots())) as usize;
            let (begin, end) = (range.address(first), range.address(first + bytes - 1));
            if end.wrapping_sub(begin) != bytes as u64 - 1 {
                return Err(CudaError::Scattered { segment: file.number(), layer: plane.layer });
            }
            planes.push(begin);
        }
        Ok(Self { file, range, planes })
    }

    /// The file.
    #[must_use]
    pub fn file(&self) -> &HostFile {
        &self.file
    }

    /// Bytes registered.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.range.len() as u64
    }

    /// Device address of the page of a slot in plane `plane`.
    #[must_use]
    pub fn page_address(&self, plane: usize, slot: u32) -> u64 {
        assert!(slot < self.file.slots(), "slot {slot} of {}", self.file.slots());
        self.planes[plane] + u64::from(slot) * self.file.layout().planes[plane].page_bytes
    }

    /// The same page, read by the processor: `lanes x 256 x row_bytes`.
    #[must_use]
    pub fn page(&self, plane: usize, slot: u32) -> &[u8] {
        self.file.page(&self.file.layout().planes[plane], slot)
    }
}

impl std::fmt::Debug for HostSegment {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("HostSegment").field("file", &self.file).field("bytes", &self.bytes()).finish_non_exhaustive()
    }
}

/// Registered segments of one layout, by number. A host place is `segment << 16 | slot`.
pub struct HostRows {
    layout: Arc<ClassLayout>,
    segments: Vec<Arc<HostSegment>>,
}

impl HostRows {
    /// Segments whose numbers are their indices.
    #[must_use]
    pub fn new(layout: Arc<ClassLayout>, segments: Vec<HostSegment>) -> Self {
        Self { layout, segments: segments.into_iter().map(Arc::new).collect() }
    }

    /// The segments.
    #[must_use]
    pub fn segments(&self) -> &[Arc<HostSegment>] {
        &self.segments
    }

    /// A page of rows by its host place.
    #[must_use]
    pub fn host_page(&self, place: u32) -> HostPage<'_> {
        HostPage { segment: &self.segments[(place >> 16) as usize], slot: place & 0xFFFF }
    }

    /// The page of a host place in plane `plane`, read by the processor: `lanes x 256 x row_bytes`.
    #[must_use]
    pub fn page(&self, plane: usize, place: u32) -> &[u8] {
        self.segments[(place >> 16) as usize].page(plane, place & 0xFFFF)
    }

    /// Plane `plane` as the long pieces in which it lies, one a segment: device address and bytes.
    #[must_use]
    pub fn pieces(&self, plane: usize) -> Vec<(u64, u64)> {
        let page_bytes = self.layout.planes[plane].page_bytes;
        self.segments.iter().map(|segment| (segment.planes[plane], page_bytes * u64::from(segment.file.slots()))).collect()
    }
}

/// A chunk's slot in registered memory.
#[derive(Clone, Copy)]
pub struct HostPage<'a> {
    /// Where the slot is.
    pub segment: &'a HostSegment,
    /// The slot.
    pub slot: u32,
}

/// The part of a layer's pages on the host that a holder works on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HostPart {
    /// Plane of the layer in the layout of segments.
    pub plane: usize,
    /// Bytes from one page to the next.
    pub page_bytes: u64,
    /// Bytes of the own lanes in a page.
    pub own: Range<u64>,
}

impl HostPart {
    /// Plane `plane` with all of its lanes.
    #[must_use]
    pub fn whole(plane: usize, page_bytes: u64) -> Self {
        Self { plane, page_bytes, own: 0..page_bytes }
    }

    /// Device address of the own lanes of a page.
    #[must_use]
    pub fn address(&self, page: HostPage<'_>) -> u64 {
        page.segment.page_address(self.plane, page.slot) + self.own.start
    }
}
