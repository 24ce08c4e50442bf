//! A segment: slots of one class of one model shape, with the labels that lie parallel to it.

use std::fs::File;
use std::sync::Arc;

use crate::layout::{ClassLayout, Plane};
use crate::shared::SharedError;
use crate::shared::mapping::Mapping;

/// A mapped segment. Sealed slots never change; everything else about it is the daemon's business.
#[derive(Debug)]
pub struct Segment {
    /// Number of the segment.
    pub id: u32,
    /// Slots it has.
    pub slots: u32,
    layout: Arc<ClassLayout>,
    rows: Mapping,
}

/// Labels of a segment's chunks, in the same slot numbers, of one label set.
#[derive(Debug)]
pub struct LabelSegment {
    /// Label set: one plan and one calibration of a model. Never zero.
    pub label_set: u64,
    /// Slots it has.
    pub slots: u32,
    layout: Arc<ClassLayout>,
    labels: Mapping,
}

/// Whether this process may write.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// A holder.
    ReadOnly,
    /// The daemon.
    Writable,
}

fn map(what: &'static str, file: &File, bytes: u64, access: Access) -> Result<Mapping, SharedError> {
    let mapping = match access {
        Access::ReadOnly => Mapping::read_only(what, file, bytes)?,
        Access::Writable => Mapping::writable(what, file, bytes)?,
    };
    mapping.advise_huge_pages();
    Ok(mapping)
}

impl Segment {
    /// Maps a segment file.
    ///
    /// # Errors
    /// The file is shorter than the layout, or cannot be mapped.
    pub fn map(id: u32, slots: u32, layout: Arc<ClassLayout>, file: &File, access: Access) -> Result<Self, SharedError> {
        let rows = map("segment", file, layout.segment_bytes(slots), access)?;
        Ok(Self { id, slots, layout, rows })
    }

    /// The layout of its slots.
    #[must_use]
    pub fn layout(&self) -> &Arc<ClassLayout> {
        &self.layout
    }

    /// The page of (slot `index`, `plane`): `lanes x 256 x row_bytes`.
    #[must_use]
    #[inline]
    pub fn page(&self, plane: &Plane, index: u32) -> &[u8] {
        page_of(&self.rows, plane, self.slots, index)
    }

    /// Fills the page of an unpublished slot in place. Daemon only.
    pub fn fill_page<R>(&self, plane: &Plane, index: u32, fill: impl FnOnce(&mut [u8]) -> R) -> R {
        fill_page_of(&self.rows, plane, self.slots, index, fill)
    }

    /// First byte and length of the mapping, to register with a device.
    pub(crate) fn memory(&self) -> (*const u8, usize) {
        (self.rows.address(), self.rows.len())
    }

    /// Maps every page now.
    pub fn populate(&self, threads: usize) {
        self.rows.populate(threads);
    }
}

impl LabelSegment {
    /// Maps a label file that lies parallel to a segment of `slots` slots. `layout` is [`ClassLayout::labels`].
    ///
    /// # Errors
    /// The file is shorter than the layout, or cannot be mapped.
    pub fn map(label_set: u64, slots: u32, layout: Arc<ClassLayout>, file: &File, access: Access) -> Result<Self, SharedError> {
        let labels = map("label segment", file, layout.segment_bytes(slots), access)?;
        Ok(Self { label_set, slots, layout, labels })
    }

    /// The layout of its label pages.
    #[must_use]
    pub fn layout(&self) -> &Arc<ClassLayout> {
        &self.layout
    }

    /// The label page of (slot `index`, `plane`): `lanes x 256 x label_bytes`.
    #[must_use]
    #[inline]
    pub fn page(&self, plane: &Plane, index: u32) -> &[u8] {
        page_of(&self.labels, plane, self.slots, index)
    }

    /// Fills the label page of an unpublished slot, or of an unpublished label set. Daemon only.
    pub fn fill_page<R>(&self, plane: &Plane, index: u32, fill: impl FnOnce(&mut [u8]) -> R) -> R {
        fill_page_of(&self.labels, plane, self.slots, index, fill)
    }

    /// Maps every page now.
    pub fn populate(&self, threads: usize) {
        self.labels.populate(threads);
    }
}

#[inline]
fn page_of<'a>(mapping: &'a Mapping, plane: &Plane, slots: u32, index: u32) -> &'a [u8] {
    assert!(index < slots, "slot {index} of a segment of {slots}");
    let first = ClassLayout::page_offset(plane, slots, index) as usize;
    mapping.bytes(first..first + plane.page_bytes as usize)
}

fn fill_page_of<R>(mapping: &Mapping, plane: &Plane, slots: u32, index: u32, fill: impl FnOnce(&mut [u8]) -> R) -> R {
    assert!(index < slots, "slot {index} of a segment of {slots}");
    let first = ClassLayout::page_offset(plane, slots, index) as usize;
    mapping.fill(first..first + plane.page_bytes as usize, fill)
}
