//! Labels that a holder makes of its own chunks, for as long as the daemon has not sealed them.

use crate::device::{Device, LabelJob, LayerGeometry};
use crate::label::{Calibration, LabelCoder, LabelPlan};
use crate::sequence::LayerPart;
use crate::shape::ModelShape;
use crate::slot::CHUNK_TOKENS;

#[derive(Debug)]
struct LayerLabels {
    coder: LabelCoder,
    /// Bytes of one slot's label page over the own lanes.
    page_bytes: usize,
    /// `slots x page_bytes`, allocated at the first use.
    pages: Vec<u8>,
    /// Which chunk each slot's page belongs to.
    chunk_of_slot: Vec<Option<usize>>,
}

/// Own labels by layer; empty without a calibration.
#[derive(Debug, Default)]
pub(super) struct OwnLabels {
    layers: Vec<Option<LayerLabels>>,
}

impl OwnLabels {
    pub(super) fn new(shape: &ModelShape, calibration: &Calibration, parts: &[LayerPart], slots: u32) -> Self {
        let layers = (0..shape.layers.len()).map(|layer| {
            let lanes = &parts[layer].lanes;
            let mut coder = LabelCoder::new(&calibration.plan, calibration.layer(layer)?);
            coder.lanes = coder.lanes[lanes.clone()].to_vec();
            let page_bytes = lanes.len() * CHUNK_TOKENS * coder.plan.label_bytes();
            Some(LayerLabels { coder, page_bytes, pages: Vec::new(), chunk_of_slot: vec![None; slots as usize] })
        });
        Self { layers: layers.collect() }
    }

    pub(super) fn is_calibrated(&self) -> bool {
        !self.layers.is_empty()
    }

    pub(super) fn plan(&self) -> Option<&LabelPlan> {
        self.layers.iter().flatten().next().map(|labels| &labels.coder.plan)
    }

    pub(super) fn coder(&self, layer: usize) -> Option<&LabelCoder> {
        Some(&self.layers.get(layer)?.as_ref()?.coder)
    }

    pub(super) fn has(&self, layer: usize, slot: u32, chunk: usize) -> bool {
        let labels = self.layers.get(layer).and_then(Option::as_ref);
        labels.is_some_and(|labels| labels.chunk_of_slot[slot as usize] == Some(chunk))
    }

    pub(super) fn build(&mut self, layer: usize, slot: u32, chunk: usize, geometry: &LayerGeometry, page: &[u8], device: &mut dyn Device) {
        let Some(labels) = self.layers.get_mut(layer).and_then(Option::as_mut) else { return };
        if labels.pages.is_empty() {
            labels.pages = vec![0; labels.page_bytes * labels.chunk_of_slot.len()];
        }
        let first = slot as usize * labels.page_bytes;
        let out = &mut labels.pages[first..first + labels.page_bytes];
        device.label(&LabelJob { geometry, page, coder: &labels.coder }, out);
        labels.chunk_of_slot[slot as usize] = Some(chunk);
    }

    pub(super) fn page(&self, layer: usize, slot: u32, chunk: usize) -> Option<&[u8]> {
        let labels = self.layers.get(layer)?.as_ref()?;
        let first = slot as usize * labels.page_bytes;
        (labels.chunk_of_slot[slot as usize] == Some(chunk)).then(|| &labels.pages[first..first + labels.page_bytes])
    }

    pub(super) fn forget_all(&mut self) {
        for labels in self.layers.iter_mut().flatten() {
            labels.chunk_of_slot.fill(None);
        }
    }
}
