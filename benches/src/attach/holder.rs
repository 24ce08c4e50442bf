//! A sequence and a decoder alone: the kernels over the daemon's segments, without the daemon and without the client library.

use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, Result, ensure};
use sluice_kernels::budget::Settings;
use sluice_kernels::decoder::{Attend, Decoder, StepRequest};
use sluice_kernels::device;
use sluice_kernels::sequence::{Sequence, SequenceFiles};
use sluice_kernels::shared::board::{Board, BoardState};
use sluice_kernels::shared::folder::{create_allocated, open_read_only, open_writable};
use sluice_kernels::shared::open::{OpenFile, OpenLayout};
use sluice_kernels::slot::SlotClass;

use super::Token;
use crate::context::LongContext;
use crate::floors::ArenaView;
use crate::workload::Workload;

/// What a program has that links the decoder and keeps its own rows.
#[derive(Debug)]
pub(super) struct Holder {
    sequence: Sequence,
    decoder: Decoder,
}

impl Holder {
    /// A sequence over the chunks of `view`, with board and open slots of its own in `folder`.
    pub(super) fn new(folder: &Path, context: &LongContext, view: &ArenaView, settings: Settings) -> Result<Self> {
        let (shape, slots) = (context.model.shape(), view.slots());
        let (board_path, open_path) = (folder.join("board"), folder.join("open"));
        let table = slots.len() as u32 + Workload::OPEN_SLOTS;
        let board = Board::create(&create_allocated(&board_path, Board::file_bytes(table), 1)?, table)?;
        for (chunk, &slot) in slots.iter().enumerate() {
            board.set_slot(SlotClass::Selected, chunk, Some(slot));
        }
        board.set_label_set(Some(view.label_set()));
        board.set_sealed_chunks(slots.len());
        board.set_lease(1, 1, BoardState::Live);
        let layout = OpenLayout::new(shape, Workload::OPEN_SLOTS)?;
        let open = create_allocated(&open_path, layout.file_bytes(), 1)?;
        OpenFile::create(open, layout)?.set_committed(view.tokens() as u64)?;
        let mut sequence = Sequence::attach(SequenceFiles {
            shape: Arc::clone(shape),
            calibration: Some(Arc::new(context.calibration.clone())),
            board: open_read_only(&board_path)?,
            open: open_writable(&open_path)?,
            open_slots: Workload::OPEN_SLOTS,
            writer: 0,
            lanes: None,
            settings,
        })?;
        for (rows, labels) in view.segments() {
            sequence.add_segment(Arc::clone(rows), Some(Arc::clone(labels)));
        }
        let missing = sequence.refresh()?;
        ensure!(missing.is_empty() && sequence.sealed_chunks() == slots.len(), "segments {missing:?} are missing");
        let decoder = Decoder::new(device::open(context.workload.device, context.workload.threads())?);
        Ok(Self { sequence, decoder })
    }

    /// Stores the rows of a new token and attends its queries, or only asks again for one that is there, layer by layer.
    pub(super) fn step(&mut self, token: &Token<'_>, outputs: &mut [Vec<f32>]) -> Result<()> {
        let Self { sequence, decoder } = self;
        let position = token.position;
        sequence.refresh()?;
        for (input, output) in token.inputs.iter().zip(outputs) {
            let layer = input.layer;
            if let Some(id) = token.new {
                sequence.append(layer, position, &input.rows).context("append")?;
                if layer == 0 {
                    sequence.write_tokens(position, &[id])?;
                }
            }
            let mut lse = vec![0.0; output.len() / sequence.part(layer).geometry.head_dim];
            let queries = &input.query;
            let mut request = StepRequest { sequence, first_position: position, queries, attend: Attend::Sparse, output, lse: &mut lse };
            decoder.step_one(layer, &mut request).context("step")?;
            sequence.commit();
        }
        Ok(())
    }
}
