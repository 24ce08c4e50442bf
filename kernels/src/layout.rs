//! Where a row lies: layer-major planes of a segment (DESIGN.md, section 5).
//!
//! A segment holds the rows of one slot class of one model shape. For each layer of the class it has one plane of
//! `slots x lanes x 256 x row_bytes`; the page of (slot, layer) is contiguous: `lanes x 256` rows, lane after lane.

use crate::label::LabelPlan;
use crate::shape::{LaneKind, LayerShape, ModelShape};
use crate::slot::{CHUNK_TOKENS, SlotClass};

/// One layer's part of a slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Plane {
    /// Layer of the model.
    pub layer: u16,
    /// Lanes of the layer.
    pub lanes: u16,
    /// Bytes of a row.
    pub row_bytes: u32,
    /// Bytes of one slot's page in this plane: `lanes * 256 * row_bytes`.
    pub page_bytes: u64,
    /// Sum of `page_bytes` over the planes before this one.
    pub before_bytes: u64,
}

/// The planes of one slot class of one model shape. Without planes when the model has no layer of the class.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ClassLayout {
    /// The class.
    pub class: SlotClass,
    /// Its planes, in layer order.
    pub planes: Vec<Plane>,
    /// Bytes of one slot over all planes.
    pub slot_bytes: u64,
    plane_of_layer: Vec<Option<u16>>,
}

impl ClassLayout {
    /// The rows of `class` for `shape`.
    #[must_use]
    pub fn new(shape: &ModelShape, class: SlotClass) -> Self {
        Self::with_row_bytes(shape, class, |layer| layer.row_bytes(shape.row_type))
    }

    /// The labels that lie parallel to the selected class's rows; "row bytes" are label bytes here.
    #[must_use]
    pub fn labels(shape: &ModelShape, plan: &LabelPlan) -> Self {
        Self::with_row_bytes(shape, SlotClass::Selected, |_| plan.label_bytes())
    }

    fn with_row_bytes(shape: &ModelShape, class: SlotClass, row_bytes: impl Fn(&LayerShape) -> usize) -> Self {
        let mut planes = Vec::new();
        let mut plane_of_layer = vec![None; shape.layers.len()];
        let mut before_bytes = 0;
        for (layer, layer_shape) in shape.layers.iter().enumerate().filter(|(_, layer)| class_of(layer.kind) == class) {
            let row_bytes = row_bytes(layer_shape);
            let page_bytes = (layer_shape.lanes() * CHUNK_TOKENS * row_bytes) as u64;
            plane_of_layer[layer] = Some(planes.len() as u16);
            let row_bytes = row_bytes as u32;
            planes.push(Plane { layer: layer as u16, lanes: layer_shape.kv_heads, row_bytes, page_bytes, before_bytes });
            before_bytes += page_bytes;
        }
        Self { class, planes, slot_bytes: before_bytes, plane_of_layer }
    }

    /// The plane of a layer, if the layer is of this class.
    #[must_use]
    pub fn plane_of_layer(&self, layer: usize) -> Option<&Plane> {
        let plane = (*self.plane_of_layer.get(layer)?)?;
        self.planes.get(usize::from(plane))
    }

    /// Offset of the page of (`plane`, slot `index`) in a segment of `slots` slots.
    #[must_use]
    pub fn page_offset(plane: &Plane, slots: u32, index: u32) -> u64 {
        debug_assert!(index < slots, "slot {index} of {slots}");
        plane.before_bytes * u64::from(slots) + plane.page_bytes * u64::from(index)
    }

    /// Bytes of a segment of `slots` slots.
    #[must_use]
    pub fn segment_bytes(&self, slots: u32) -> u64 {
        self.slot_bytes * u64::from(slots)
    }

    /// Slots of a segment of about `segment_bytes`; at least one.
    #[must_use]
    pub fn slots_in(&self, segment_bytes: u64) -> u32 {
        (segment_bytes / self.slot_bytes.max(1)).clamp(1, u64::from(u32::MAX)) as u32
    }
}

/// The class in which a layer's rows are stored.
#[must_use]
pub fn class_of(kind: LaneKind) -> SlotClass {
    match kind {
        LaneKind::Selected => SlotClass::Selected,
        LaneKind::Window { .. } => SlotClass::Window,
    }
}
