//! What the device holds of one sequence, and how far it has come.

use std::ops::Range;
use std::sync::Arc;

use super::balance::{Balance, BlockBounds};
use super::labels::LabelHold;
use super::limits::Charge;
use super::window::Windows;
use crate::decoder::StepError;
use crate::device::cuda::CudaError;
use crate::device::cuda::batch::Batch;
use crate::device::cuda::host::HostSegment;
use crate::device::cuda::jobs::POOL_BLOCK;
use crate::device::cuda::seat::Seat;
use crate::sequence::Sequence;
use crate::slot::CHUNK_TOKENS;

/// Device state of one sequence; freed with it. Without a calibration it has the files and the windows alone.
#[derive(Debug, Default)]
pub struct Resident {
    /// By shape of rows.
    pub(super) parts: Vec<ResidentPart>,
    /// By layer of the model: its part, and its layer in there.
    pub(super) part_of_layer: Vec<Option<(usize, usize)>>,
    /// Where the rows of chunks lie on the host: number of the file `<< 16 |` slot.
    pub(super) places: Vec<u32>,
    /// How many of these chunks are sealed; the others lie in open slots.
    pub(super) sealed: usize,
    /// The files of `places`, kept registered, by their numbers.
    pub(super) files: Vec<(usize, Arc<HostSegment>)>,
    /// Tokens that there is room for.
    pub(super) capacity: usize,
    /// Rows that a lane selects at most.
    pub(super) max_count: usize,
    /// Pages from the horizon on.
    pub(super) tail_chunks: usize,
    /// Whether hot rows may be of positions that were written anew.
    pub(super) hot_stale: bool,
    /// The sliding-window layers, from their first step on.
    pub(super) windows: Option<Windows>,
}

/// The layers of one shape.
#[derive(Debug)]
pub(super) struct ResidentPart {
    /// Group of the decoder that serves this shape.
    pub(super) group: usize,
    pub(super) seat: Arc<Seat>,
    pub(super) layers: Vec<Progress>,
    /// Misses by lane, and what follows from them for the pools.
    pub(super) balance: Balance,
    /// By chunk.
    pub(super) labels: Vec<LabelHold>,
    pub(super) _charge: Charge,
}

/// What the device holds of one layer.
#[derive(Clone, Debug, Default)]
pub(super) struct Progress {
    /// Chunks whose labels are there.
    pub(super) labelled: usize,
    /// Pages from the horizon on, chunk c at `c % len`.
    pub(super) tail: Vec<TailPage>,
}

/// A page from the horizon on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct TailPage {
    pub(super) chunk: usize,
    /// Rows that are there, from the chunk's first on.
    pub(super) rows: usize,
}

impl Resident {
    /// Forgets what a calibration decides, which is everything but the files and the windows.
    pub(crate) fn forget_layers(&mut self) {
        self.parts.clear();
        self.part_of_layer.clear();
        self.capacity = 0;
    }

    /// Hot places by lane, `[part][layer][lane]`.
    pub(crate) fn hot_places(&self) -> Vec<usize> {
        self.parts.iter().flat_map(|part| part.seat.pool_blocks()).map(|blocks| blocks * POOL_BLOCK).collect()
    }

    /// Forgets everything from `length` on, as truncating a sequence does.
    pub(crate) fn truncate(&mut self, length: usize) {
        self.places.clear();
        self.sealed = 0;
        self.hot_stale = true;
        for part in &mut self.parts {
            part.layers.iter_mut().for_each(|layer| layer.truncate(length));
            part.labels.truncate(length / CHUNK_TOKENS);
        }
        self.windows.iter_mut().for_each(|windows| windows.truncate(length));
    }
}

impl ResidentPart {
    /// Ends a step of the sequence in a slot, whose lanes select at most `most_selected` rows: hot places move to the lanes that miss most.
    pub(super) fn end_step(&mut self, batch: &mut Batch, slot: usize, most_selected: usize) -> Result<(), CudaError> {
        let bounds = BlockBounds { least: most_selected.div_ceil(POOL_BLOCK), most: self.seat.most_pool_blocks() };
        let moves = self.balance.end_step(&self.seat.pool_blocks(), bounds);
        if moves.is_empty() { Ok(()) } else { batch.move_blocks(slot, &moves) }
    }
}

impl Progress {
    /// Brings rows at `span` of a layer of the model to the device by `write`, a chunk's page at a time, as far as they are not there.
    pub(super) fn take_up(
        &mut self,
        sequence: &Sequence,
        layer: usize,
        span: Range<usize>,
        mut write: impl FnMut(usize, &[u8]) -> Result<(), CudaError>,
    ) -> Result<(), StepError> {
        for chunk in span.start / CHUNK_TOKENS..span.end.div_ceil(CHUNK_TOKENS) {
            if self.has(chunk, (span.end - chunk * CHUNK_TOKENS).min(CHUNK_TOKENS)) {
                continue;
            }
            write(chunk, sequence.page(layer, chunk)?)?;
            let written = sequence.written(layer).saturating_sub(chunk * CHUNK_TOKENS);
            self.note(chunk, written.min(CHUNK_TOKENS));
        }
        Ok(())
    }

    pub(super) fn truncate(&mut self, length: usize) {
        self.labelled = self.labelled.min(length / CHUNK_TOKENS);
        for page in &mut self.tail {
            page.rows = page.rows.min(length.saturating_sub(page.chunk * CHUNK_TOKENS));
        }
    }

    /// Whether rows `0..rows` of a chunk are there.
    pub(super) fn has(&self, chunk: usize, rows: usize) -> bool {
        let page = self.tail[chunk % self.tail.len()];
        rows == 0 || (page.chunk == chunk && page.rows >= rows)
    }

    /// Notes that rows `0..rows` of a chunk are there.
    pub(super) fn note(&mut self, chunk: usize, rows: usize) {
        let at = chunk % self.tail.len();
        let page = &mut self.tail[at];
        let before = if page.chunk == chunk { page.rows } else { 0 };
        *page = TailPage { chunk, rows: before.max(rows) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_tail_knows_which_rows_it_has() {
        let mut layer = Progress { labelled: 3, tail: vec![TailPage::default(); 2] };
        assert!(layer.has(4, 0) && !layer.has(4, 1), "nothing is there");
        layer.note(4, 256);
        layer.note(5, 10);
        assert!(layer.has(4, 256) && layer.has(5, 10) && !layer.has(5, 11) && !layer.has(2, 1));
        layer.note(5, 7);
        assert!(layer.has(5, 10), "a row that is written again takes none away");
        layer.note(6, 1);
        assert!(layer.has(6, 1) && !layer.has(4, 1), "chunk 6 has taken the place of chunk 4");
    }

    #[test]
    fn truncating_forgets_labels_and_rows_from_there_on() {
        let tail = vec![TailPage { chunk: 4, rows: 256 }, TailPage { chunk: 5, rows: 10 }];
        let part = Progress { labelled: 4, tail };
        let cut = |length| {
            let mut layer = part.clone();
            layer.truncate(length);
            layer
        };
        assert!(cut(1100).has(4, 76) && !cut(1100).has(4, 77) && !cut(1100).has(5, 1) && cut(1100).labelled == 4);
        assert_eq!(cut(700).labelled, 2);
    }
}
