//! One attention step as a session takes it, and what it costs.

use std::ops::{AddAssign, Range};

use sluice_kernels::shape::{LayerShape, ModelShape};
use sluice_proto::v1;

use crate::error::{ClientError, expect_count};
use crate::session::Session;

/// Which rows a step attends.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum AttendMode {
    /// Those that the sequence's settings select before the horizon, and all from it on.
    Sparse,
    /// All rows, exactly: prefill after a prefix hit, or k = everything. Several queries attend causally.
    Dense,
}

/// One layer of one or several consecutive query tokens of a sequence.
#[derive(Clone, Copy, Debug)]
pub struct Step<'a> {
    /// Layer of the model.
    pub layer: usize,
    /// Position of the first query's token.
    pub first_position: usize,
    /// `[query][query_head][head_dim]`, after rotary embedding, not scaled.
    pub queries: &'a [f32],
    /// New rows of the same tokens, `[lane][token][row bytes]`, stored before attending; they must be the next of the announced run.
    /// `None`: the rows are stored already.
    pub rows: Option<&'a [u8]>,
    /// Which rows to attend.
    pub attend: AttendMode,
}

/// Where a step's results go.
pub struct StepOut<'a> {
    /// `[query][query_head][head_dim]`.
    pub output: &'a mut [f32],
    /// `[query][query_head]`: natural log-sum-exp of the scaled scores over the attended rows.
    pub log_sum_exp: &'a mut [f32],
    /// Costs are added here.
    pub report: Option<&'a mut StepReport>,
}

/// One sequence's part of a batch.
pub struct BatchStep<'a> {
    /// The sequence.
    pub session: &'a mut Session,
    /// Its step.
    pub step: Step<'a>,
    /// Where its results go.
    pub out: StepOut<'a>,
}

/// Costs of steps, added up.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct StepReport {
    /// Rows selected before the horizon, all lanes and queries.
    pub selected_rows: u64,
    /// Of these, found in the hot pool.
    pub hot_rows: u64,
    /// Bytes of rows read.
    pub row_bytes: u64,
    /// Bytes of labels read.
    pub label_bytes: u64,
    /// Scoring labels, nanoseconds.
    pub score_ns: u64,
    /// Selecting rows, nanoseconds.
    pub select_ns: u64,
    /// Gathering rows, nanoseconds; 0 where gathering and attending are one pass.
    pub gather_ns: u64,
    /// Attending, nanoseconds.
    pub attend_ns: u64,
    /// All of it, on a device that does not tell the parts apart (a GPU), nanoseconds.
    pub fused_ns: u64,
}

impl AddAssign for StepReport {
    fn add_assign(&mut self, other: Self) {
        self.selected_rows += other.selected_rows;
        self.hot_rows += other.hot_rows;
        self.row_bytes += other.row_bytes;
        self.label_bytes += other.label_bytes;
        self.score_ns += other.score_ns;
        self.select_ns += other.select_ns;
        self.gather_ns += other.gather_ns;
        self.attend_ns += other.attend_ns;
        self.fused_ns += other.fused_ns;
    }
}

impl From<v1::StepReport> for StepReport {
    fn from(report: v1::StepReport) -> Self {
        Self {
            selected_rows: report.selected_rows,
            hot_rows: report.hot_rows,
            row_bytes: report.row_bytes,
            label_bytes: report.label_bytes,
            score_ns: report.score_nanoseconds,
            select_ns: report.select_nanoseconds,
            gather_ns: report.gather_nanoseconds,
            attend_ns: report.attend_nanoseconds,
            fused_ns: report.fused_nanoseconds,
        }
    }
}

/// Rows that a step selected and attended exactly, of one lane.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LaneSelection {
    /// Positions, ascending.
    pub positions: Vec<u64>,
    /// `[row][row bytes]`, in the same order.
    pub rows: Vec<u8>,
}

/// The rows that a prefill wants next.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RowsWanted {
    /// Layer of the model.
    pub layer: usize,
    /// Positions; the buffer is `[lane][position][row bytes]`.
    pub positions: Range<usize>,
}

/// Most query tokens of one step.
pub const MAX_STEP_QUERIES: usize = 4096;

/// The layer of a shape, or a clear word.
pub(crate) fn layer_of(shape: &ModelShape, layer: usize) -> Result<&LayerShape, ClientError> {
    let last = shape.layers.len() - 1;
    shape.layers.get(layer).ok_or_else(|| ClientError::Input { field: "layer", value: layer.to_string(), bound: format!("0 to {last}") })
}

/// Query tokens of a step over `lanes` lanes of its layer; checks every length of it.
pub(crate) fn check_step(
    layer: &LayerShape,
    lanes: usize,
    row_bytes: usize,
    step: &Step<'_>,
    out: &StepOut<'_>,
) -> Result<usize, ClientError> {
    let heads = lanes * layer.heads().group();
    let query_values = heads * usize::from(layer.head_dim);
    let queries = step.queries.len() / query_values;
    if queries == 0 || queries > MAX_STEP_QUERIES || !step.queries.len().is_multiple_of(query_values) {
        let bound = format!("1 to {MAX_STEP_QUERIES} times {query_values} (query heads x head_dim)");
        return Err(ClientError::Input { field: "queries", value: step.queries.len().to_string(), bound });
    }
    if let Some(rows) = step.rows {
        expect_count("rows (bytes)", rows.len(), queries * lanes * row_bytes)?;
    }
    expect_count("output", out.output.len(), step.queries.len())?;
    expect_count("log_sum_exp", out.log_sum_exp.len(), queries * heads)?;
    Ok(queries)
}
