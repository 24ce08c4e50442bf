//! Attention layers served by Sluice: rows go to its open slots, attention comes back.

use anyhow::{Result, bail, ensure};
use sluice_kernels::decoder::{Attend, StepReport};
use sluice_kernels::rows::{PackJob, pack_rows};
use sluice_kernels::shape::{LaneKind, ModelShape};

use super::attention::{AttentionLayers, Phase, Piece};
use super::mass::MassMeter;

/// One layer of a piece, as whoever performs it takes it.
#[derive(Clone, Copy, Debug)]
pub struct LayerStep<'a> {
    /// Layer of the model.
    pub layer: usize,
    /// Position of the first token.
    pub first_position: usize,
    /// `[token][query_head][d]`.
    pub queries: &'a [f32],
    /// New rows of the same tokens, `[lane][token][row bytes]`.
    pub rows: &'a [u8],
    /// Which rows are attended.
    pub attend: Attend,
}

/// Whoever performs the steps of one sequence: a session with a daemon, or this process alone.
pub trait Steps {
    /// Tokens committed so far.
    fn length(&self) -> usize;

    /// Announces the tokens whose rows come next, layer by layer.
    ///
    /// # Errors
    /// There is no room for them.
    fn begin(&mut self, token_ids: &[u32]) -> Result<()>;

    /// Stores the rows of one layer and attends: `output` is `[token][query_head][d]`, `lse` (`[token][query_head]`) the natural
    /// log-sum-exp of the scaled scores over the attended rows.
    ///
    /// # Errors
    /// The step is refused.
    fn step(&mut self, step: &LayerStep<'_>, output: &mut [f32], lse: &mut [f32]) -> Result<StepReport>;

    /// The positions that a sparse step of one query (`[query_head][d]`) attends, by lane, ascending, those attended exactly included.
    ///
    /// # Errors
    /// The layer has no selection, or the step is refused.
    fn selected(&mut self, layer: usize, position: usize, query: &[f32]) -> Result<Vec<Vec<u32>>>;
}

/// Attention layers of one sequence over [`Steps`].
pub struct ServedLayers {
    shape: ModelShape,
    steps: Box<dyn Steps>,
    mass: Option<MassMeter>,
    /// Costs of decode steps, all layers.
    cost: StepReport,
    decoded_tokens: u64,
    begun: usize,
    rows: Vec<u8>,
    lse: Vec<f32>,
}

impl ServedLayers {
    /// Layers of a sequence. With `mass`, the attention mass that decode steps keep is measured on the side.
    #[must_use]
    pub fn new(shape: ModelShape, steps: Box<dyn Steps>, mass: Option<MassMeter>) -> Self {
        Self { shape, steps, mass, cost: StepReport::default(), decoded_tokens: 0, begun: 0, rows: Vec::new(), lse: Vec::new() }
    }

    /// The shape of the model.
    #[must_use]
    pub fn shape(&self) -> &ModelShape {
        &self.shape
    }

    /// The meter of the attention mass, if there is one.
    #[must_use]
    pub fn mass(&self) -> Option<&MassMeter> {
        self.mass.as_ref()
    }

    /// Costs of decode steps so far, all layers, and how many tokens they were.
    #[must_use]
    pub fn cost(&self) -> (StepReport, u64) {
        (self.cost, self.decoded_tokens)
    }

    /// Whoever performs the steps.
    pub fn steps(&mut self) -> &mut dyn Steps {
        self.steps.as_mut()
    }
}

impl AttentionLayers for ServedLayers {
    fn position(&self) -> usize {
        self.steps.length()
    }

    fn begin(&mut self, token_ids: &[u32], phase: Phase) -> Result<()> {
        self.begun = self.position() + token_ids.len();
        if phase == Phase::Decode {
            self.decoded_tokens += token_ids.len() as u64;
        }
        self.steps.begin(token_ids)
    }

    fn attend(&mut self, piece: &Piece<'_>, out: &mut [f32]) -> Result<()> {
        let Some(layer) = self.shape.layers.get(piece.layer) else {
            bail!("layer: {}, the model has {}", piece.layer, self.shape.layers.len());
        };
        self.rows.resize(piece.tokens * layer.lanes() * layer.row_bytes(self.shape.row_type), 0);
        let (lanes, head_dim) = (layer.lanes(), usize::from(layer.head_dim));
        let (row_type, scales) = (self.shape.row_type, &self.shape.scales_of(piece.layer));
        let job = PackJob { keys: piece.keys, values: piece.values, lanes, head_dim, row_type, scales };
        pack_rows(&job, &mut self.rows);
        self.lse.resize(piece.tokens * usize::from(layer.query_heads), 0.0);
        let attend = if piece.phase == Phase::Decode { Attend::Sparse } else { Attend::Dense };
        let step = LayerStep { layer: piece.layer, first_position: piece.first_position, queries: piece.queries, rows: &self.rows, attend };
        let report = self.steps.step(&step, out, &mut self.lse)?;
        if piece.phase == Phase::Decode {
            self.cost += report;
        }
        if let Some(mass) = self.mass.as_mut().filter(|_| layer.kind == LaneKind::Selected) {
            mass.add(piece, &self.lse)?;
        }
        Ok(())
    }

    fn commit(&mut self) -> Result<()> {
        let length = self.position();
        ensure!(length == self.begun, "commit: {length} tokens are committed, {} were given", self.begun);
        Ok(())
    }
}
