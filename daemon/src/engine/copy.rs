//! The part of a chunk that a fork or a truncation copies into open slots.

use sluice_kernels::layout::Plane;
use sluice_kernels::shared::open::{OpenFile, SlotRecord};
use sluice_kernels::slot::{CHUNK_TOKENS, SlotClass};

use crate::engine::error::EngineError;
use crate::engine::state::Engine;
use crate::seal::Place;

/// Where the rows of a chunk are.
enum Source<'a> {
    Arena { selected: Option<Place>, window: Option<Place> },
    Open { file: &'a OpenFile, slot: u32 },
}

impl Engine {
    /// Copies the first tokens of the chunk that contains `position` from sequence `from` into the open slots `to`.
    ///
    /// # Errors
    /// Open slots that cannot be read or written.
    pub(crate) fn copy_part(&self, from: u64, position: u64, to: &OpenFile) -> Result<(), EngineError> {
        let (chunk, tokens) = (position as usize / CHUNK_TOKENS, position as usize % CHUNK_TOKENS);
        let Some(sequence) = self.sequences.get(&from).filter(|_| tokens > 0) else { return Ok(()) };
        let (source, record, mut ids) = match sequence.path.get(chunk).and_then(|&id| self.chunks.get(id)) {
            Some(sealed) => {
                let place = |slot: Option<_>| slot.and_then(|slot| self.arena.place(slot));
                let source = Source::Arena { selected: place(sealed.record.selected), window: place(sealed.record.window) };
                let record = SlotRecord { chunk: Some(chunk as u64), fidelity: sealed.record.fidelity };
                (source, record, self.journal.tokens(sealed.record.id)?)
            }
            None => {
                let slot = sequence.open.layout().slot_of(chunk);
                let fidelity = sequence.open.record(slot, sequence.writer_count())?.fidelity;
                let record = SlotRecord { chunk: Some(chunk as u64), fidelity };
                (Source::Open { file: &sequence.open, slot }, record, sequence.open.tokens(slot, tokens)?)
            }
        };
        ids.truncate(tokens);
        let slot = to.layout().slot_of(chunk);
        for class in [SlotClass::Selected, SlotClass::Window] {
            for plane in &to.layout().class(class).planes {
                copy_plane(&source, class, plane, tokens, to, slot)?;
            }
        }
        to.write_tokens(slot, &ids)?;
        to.write_record(slot, record)?;
        Ok(())
    }
}

fn copy_plane(source: &Source<'_>, class: SlotClass, plane: &Plane, tokens: usize, to: &OpenFile, slot: u32) -> Result<(), EngineError> {
    let mut scratch = Vec::new();
    let page: &[u8] = match source {
        Source::Arena { selected, window } => {
            let place = if class == SlotClass::Selected { selected } else { window };
            let place = place.as_ref().ok_or_else(|| EngineError::Internal(format!("layer {}: no rows to copy", plane.layer)))?;
            place.segment.page(plane, place.index)
        }
        Source::Open { file, slot } => {
            scratch.resize(plane.page_bytes as usize, 0);
            file.read_page(class, plane, *slot, &mut scratch)?;
            &scratch
        }
    };
    let row_bytes = plane.row_bytes as usize;
    for (lane, rows) in page.chunks_exact(CHUNK_TOKENS * row_bytes).enumerate() {
        to.write_rows(class, plane, slot, lane, &rows[..tokens * row_bytes])?;
    }
    Ok(())
}
