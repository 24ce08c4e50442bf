//! Steps in this process alone: Sluice's sequence and decoder over files of its own, without a daemon.
//!
//! Nothing is ever sealed: every chunk stays in an open slot. What is attended does not depend on where rows lie, so a session with a
//! daemon must give the same bits, whichever way it is attached.

use std::fs::File;
use std::sync::Arc;

use anyhow::{Context, Result};
use sluice_kernels::budget::Settings;
use sluice_kernels::decoder::{Decoder, LookAhead, StepReport, StepRequest};
use sluice_kernels::device::{DeviceKind, open};
use sluice_kernels::label::Calibration;
use sluice_kernels::sequence::{Sequence, SequenceFiles};
use sluice_kernels::shape::ModelShape;
use sluice_kernels::shared::board::{Board, BoardState};
use sluice_kernels::shared::open::{OpenFile, OpenLayout};
use sluice_kernels::slot::CHUNK_TOKENS;

use super::served::{LayerStep, Steps};

/// A sequence that only this process knows.
pub struct LocalSteps {
    sequence: Sequence,
    decoder: Decoder,
}

/// What a local sequence is made of.
#[derive(Clone, Debug)]
pub struct LocalOptions {
    /// Shape of the model.
    pub shape: ModelShape,
    /// Label calibration; without one every step is dense.
    pub calibration: Option<Calibration>,
    /// Settings of sparse steps.
    pub settings: Settings,
    /// Most tokens it can hold.
    pub tokens: usize,
    /// Device.
    pub device: DeviceKind,
    /// Compute threads.
    pub threads: usize,
}

impl LocalSteps {
    /// An empty sequence in files without a name, in memory.
    ///
    /// # Errors
    /// No room in /dev/shm, or a shape or calibration that does not fit.
    pub fn new(options: &LocalOptions) -> Result<Self> {
        let chunks = u32::try_from(options.tokens.div_ceil(CHUNK_TOKENS).max(2))?;
        let layout = OpenLayout::new(&options.shape, chunks)?;
        let board_file = file(Board::file_bytes(chunks))?;
        Board::create(&board_file, chunks)?.set_lease(1, 1, BoardState::Live);
        let open_file = OpenFile::create(file(layout.file_bytes())?, layout)?;
        let mut sequence = Sequence::attach(SequenceFiles {
            shape: Arc::new(options.shape.clone()),
            calibration: options.calibration.clone().map(Arc::new),
            board: board_file,
            open: open_file.file().try_clone().context("open slots")?,
            open_slots: chunks,
            writer: 0,
            lanes: None,
            settings: options.settings,
        })?;
        sequence.refresh()?;
        Ok(Self { sequence, decoder: Decoder::new(open(options.device, options.threads)?) })
    }

    /// Keeps up to `rows_per_lane` fetched rows of every full-attention layer between steps.
    pub fn set_hot_rows(&mut self, rows_per_lane: usize) {
        self.sequence.set_hot_rows(rows_per_lane);
    }

    /// Stores rows of one layer, `[lane][token][row bytes]`, that nobody attends yet; tokens whose rows are all there are committed.
    ///
    /// # Errors
    /// They have no place.
    pub fn append(&mut self, layer: usize, first_position: usize, rows: &[u8]) -> Result<()> {
        self.sequence.append(layer, first_position, rows)?;
        self.sequence.commit();
        Ok(())
    }

    /// Fetches what a step with a predicted query would select ([`Decoder::look_ahead`]).
    ///
    /// # Errors
    /// As there.
    pub fn look_ahead(&mut self, layer: usize, position: usize, query: &[f32]) -> Result<LookAhead> {
        Ok(self.decoder.look_ahead(layer, &mut self.sequence, position, query)?)
    }
}

fn file(bytes: u64) -> Result<File> {
    let file = tempfile::tempfile_in("/dev/shm").context("/dev/shm")?;
    file.set_len(bytes).with_context(|| format!("/dev/shm: {bytes} bytes"))?;
    Ok(file)
}

impl Steps for LocalSteps {
    fn length(&self) -> usize {
        self.sequence.committed()
    }

    fn begin(&mut self, token_ids: &[u32]) -> Result<()> {
        let first = self.length();
        Ok(self.sequence.write_tokens(first, token_ids)?)
    }

    fn step(&mut self, step: &LayerStep<'_>, output: &mut [f32], lse: &mut [f32]) -> Result<StepReport> {
        self.sequence.append(step.layer, step.first_position, step.rows)?;
        let report = self.decoder.step_one(
            step.layer,
            &mut StepRequest {
                sequence: &mut self.sequence,
                first_position: step.first_position,
                queries: step.queries,
                attend: step.attend,
                output,
                lse,
            },
        )?;
        self.sequence.commit();
        Ok(report)
    }

    fn selected(&mut self, layer: usize, position: usize, query: &[f32]) -> Result<Vec<Vec<u32>>> {
        let lanes = self.decoder.rows(layer, &mut self.sequence, position, query)?;
        Ok(lanes.into_iter().map(|lane| lane.positions).collect())
    }
}
