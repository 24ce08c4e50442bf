//! Sliding-window layers of a sequence on the device: their newest rows stay there, and a step brings the row of its own token.

use std::sync::Arc;

use super::group::MOST_SLOTS;
use super::limits::{Charge, Ledger};
use super::state::{Progress, Resident, TailPage};
use super::step::{Launch, Ready, Work};
use super::{CAPACITY_STEP, ResidentDecoder};
use crate::decoder::{Item, StepError};
use crate::device::LayerGeometry;
use crate::device::cuda::CudaError;
use crate::device::cuda::seat::DeviceBytes;
use crate::device::cuda::window::{Attended, RingShape, Rings, WindowShape, WindowStep};
use crate::scales::LaneScales;
use crate::sequence::Sequence;
use crate::shape::LaneKind;
use crate::slot::CHUNK_TOKENS;

/// The window layers of a sequence.
#[derive(Debug)]
pub(super) struct Windows {
    /// By shape of rows.
    parts: Vec<WindowPart>,
    /// By layer of the model: its part, and its layer in there.
    part_of_layer: Vec<Option<(usize, usize)>>,
}

/// The window layers of one shape.
#[derive(Debug)]
struct WindowPart {
    /// Of the decoder's groups for windows.
    group: usize,
    /// Rows of the window.
    window: usize,
    rings: Rings,
    layers: Vec<Progress>,
    _charge: Charge,
}

/// What tells groups of window layers apart.
#[derive(Clone, Debug, PartialEq)]
struct WindowKey {
    /// Without scales, which are each layer's own.
    geometry: LayerGeometry,
    scales: Vec<LaneScales>,
    window: usize,
}

/// The step over the window layers of one shape, for all sequences.
pub(super) struct WindowGroup {
    key: WindowKey,
    step: WindowStep,
    /// Slots that are worth asking for: fewer after the device had no room for more.
    most_slots: usize,
    _charge: Charge,
}

impl Windows {
    /// Forgets rows from `length` on.
    pub(super) fn truncate(&mut self, length: usize) {
        self.parts.iter_mut().flat_map(|part| &mut part.layers).for_each(|layer| layer.truncate(length));
    }

    /// Whether queries of sequences of `length` tokens find room.
    fn holds(&self, length: usize) -> bool {
        self.parts.iter().all(|part| part.rings.shape().chunks >= chunks_of(part.window, length))
    }
}

/// Pages of a ring for sequences of up to `length` tokens.
fn chunks_of(window: usize, length: usize) -> usize {
    RingShape::chunks_of(window).min(length.div_ceil(CHUNK_TOKENS))
}

impl WindowGroup {
    fn new(decoder: &mut ResidentDecoder, key: WindowKey, slots: usize) -> Result<Self, CudaError> {
        let (ledger, stream) = (decoder.ledger()?, decoder.stream()?);
        let shape = WindowShape { geometry: key.geometry.clone(), slots, max_rows: key.window };
        let charge = ledger.charge(DeviceBytes { workspace: shape.own_bytes(key.scales.len()), ..DeviceBytes::default() })?;
        let step = WindowStep::new(&decoder.gpu, &decoder.compiler, &stream, &shape, &key.scales)?;
        Ok(Self { key, step, most_slots: MOST_SLOTS, _charge: charge })
    }
}

impl ResidentDecoder {
    /// Makes the rings of a sequence, or larger ones, where it has none that hold `length` tokens.
    fn make_windows(&mut self, resident: &mut Resident, sequence: &Sequence, length: usize) -> Result<(), CudaError> {
        if resident.windows.as_ref().is_some_and(|windows| windows.holds(length)) {
            return Ok(());
        }
        // Smaller ones go first: their windows begin with the sequence, so all of their rows are on the host.
        resident.windows = None;
        self.sweep();
        let ledger = self.ledger()?;
        let mut windows = Windows { parts: Vec::new(), part_of_layer: vec![None; sequence.shape().layers.len()] };
        for (key, layers) in keys_of(sequence) {
            layers.iter().enumerate().for_each(|(own, &layer)| windows.part_of_layer[layer] = Some((windows.parts.len(), own)));
            windows.parts.push(self.window_part(&ledger, key, layers.len(), length)?);
        }
        resident.windows = Some(windows);
        Ok(())
    }

    fn window_part(&mut self, ledger: &Arc<Ledger>, key: WindowKey, layers: usize, length: usize) -> Result<WindowPart, CudaError> {
        let room = (length + length / 8).next_multiple_of(CAPACITY_STEP);
        let shape = RingShape { geometry: key.geometry.clone(), layers, chunks: chunks_of(key.window, room) };
        let charge = ledger.charge(DeviceBytes { tail: shape.bytes(), ..DeviceBytes::default() })?;
        let window = key.window;
        let group = match self.windows.iter().position(|group| group.key == key) {
            Some(group) => group,
            None => {
                let group = WindowGroup::new(self, key, 1)?;
                self.windows.push(group);
                self.windows.len() - 1
            }
        };
        let progress = Progress { labelled: 0, tail: vec![TailPage::default(); shape.chunks] };
        Ok(WindowPart { group, window, rings: Rings::new(&self.gpu, shape)?, layers: vec![progress; layers], _charge: charge })
    }

    /// Brings the rows of a window layer before an item's own up to date.
    pub(super) fn prepare_window(&mut self, layer: usize, index: usize, item: &mut Item<'_>) -> Result<Option<Ready>, StepError> {
        let mut resident = item.sequence.take_resident().unwrap_or_default();
        if let Err(refused) = self.make_windows(&mut resident, item.sequence, item.query.position + 1) {
            item.sequence.put_resident(resident);
            return Err(refused.into());
        }
        match self.take_up_window(&mut resident, layer, item) {
            Ok(Some((part, launch))) => Ok(Some(Ready { index, resident, part, launch })),
            // Rows that are there stay.
            other => {
                item.sequence.put_resident(resident);
                other.map(|_| None)
            }
        }
    }

    fn take_up_window(&mut self, resident: &mut Resident, layer: usize, item: &Item<'_>) -> Result<Option<(usize, Launch)>, StepError> {
        let (stream, position) = (self.stream()?, item.query.position);
        let Some(windows) = &mut resident.windows else { return Ok(None) };
        let Some((part, own_layer)) = windows.part_of_layer[layer] else { return Ok(None) };
        let WindowPart { group, rings, layers, .. } = &mut windows.parts[part];
        let write = |chunk: usize, page: &[u8]| rings.write(&stream, own_layer, chunk, page);
        layers[own_layer].take_up(item.sequence, layer, item.plan.exact_from..position, write)?;
        // The newest row comes with the query, and is still to be had.
        item.sequence.page(layer, position / CHUNK_TOKENS)?;
        Ok(Some((part, Launch { group: *group, layer: own_layer, work: Work::Window })))
    }

    /// Brings a window layer to the device, for the step that comes.
    pub(in crate::decoder) fn restore_window(&mut self, layer: usize, item: &mut Item<'_>) -> Result<(), StepError> {
        if let Some(ready) = self.prepare_window(layer, 0, item)? {
            item.sequence.put_resident(ready.resident);
        }
        Ok(())
    }

    /// Sequences that a launch over window layers takes at once, of `wanted`: fewer where the device has no room for more.
    pub(super) fn window_slots(&mut self, group: usize, wanted: usize) -> usize {
        let (of_group, slots) = (&self.windows[group], self.windows[group].step.shape().slots);
        let wanted = wanted.next_power_of_two().min(of_group.most_slots);
        if wanted > slots {
            match WindowGroup::new(self, self.windows[group].key.clone(), wanted) {
                Ok(wider) => self.windows[group] = wider,
                // What there is serves as well, in turns.
                Err(_) => self.windows[group].most_slots = slots,
            }
        }
        self.windows[group].step.shape().slots
    }

    /// Performs one launch over window layers.
    pub(super) fn perform_window(
        &mut self,
        layer: usize,
        launch: Launch,
        items: &mut [Item<'_>],
        together: &mut [Ready],
    ) -> Result<(), CudaError> {
        let step = &mut self.windows[launch.group].step;
        for (slot, ready) in together.iter().enumerate() {
            let (values, rows) = step.input(slot);
            items[ready.index].put_input(layer, values, rows)?;
        }
        let attended: Option<Vec<_>> = together.iter().map(|ready| attended(&items[ready.index], ready)).collect();
        step.perform(launch.layer, &attended.ok_or(CudaError::NoHostRows)?)?;
        for (slot, ready) in together.iter_mut().enumerate() {
            let query = &mut items[ready.index].query;
            let (output, lse) = step.result(slot);
            query.output.copy_from_slice(output);
            query.lse.copy_from_slice(lse);
            if let Some(windows) = &mut ready.resident.windows {
                windows.parts[ready.part].layers[launch.layer].note(query.position / CHUNK_TOKENS, query.position % CHUNK_TOKENS + 1);
            }
        }
        Ok(())
    }
}

/// What an item's query attends.
fn attended<'a>(item: &Item<'_>, ready: &'a Ready) -> Option<Attended<'a>> {
    let windows = ready.resident.windows.as_ref()?;
    Some(Attended { rings: &windows.parts[ready.part].rings, span: item.plan.exact_from..item.query.position + 1 })
}

/// The window layers by their shape of rows and their window.
fn keys_of(sequence: &Sequence) -> Vec<(WindowKey, Vec<usize>)> {
    let mut keys: Vec<(WindowKey, Vec<usize>)> = Vec::new();
    for layer in 0..sequence.shape().layers.len() {
        let part = sequence.part(layer);
        let LaneKind::Window { tokens } = part.kind else { continue };
        let (geometry, window) = (part.geometry.unscaled(), tokens as usize);
        let index = keys.iter().position(|(key, _)| key.geometry == geometry && key.window == window).unwrap_or_else(|| {
            keys.push((WindowKey { geometry, scales: Vec::new(), window }, Vec::new()));
            keys.len() - 1
        });
        let (key, layers) = &mut keys[index];
        key.scales.push(part.geometry.scales);
        layers.push(layer);
    }
    keys
}
