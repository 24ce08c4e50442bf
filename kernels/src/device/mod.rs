//! The device contract: coarse verbs over plain-data jobs. The plain [`mod@reference`] is the oracle of every other device.
//!
//! All positions are absolute token positions of the sequence. A *page* is one chunk's part of one layer:
//! `lanes x 256 x row_bytes`, lane after lane, a row being key then value. Queries, outputs and log-sum-exps are f32,
//! `[query][query_head][head_dim]` and `[query][query_head]`. Log-sum-exp is natural, of the scaled scores.

pub mod cpu;
pub mod cuda;
pub mod kind;
pub mod reference;

use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::heads::HeadMap;
use crate::label::LabelCoder;
use crate::scales::{LaneScales, RowScale};
use crate::shape::{ModelShape, RowType};
use crate::slot::CHUNK_TOKENS;

pub use kind::{DeviceError, DeviceKind, ParseDeviceError, open};

/// How the rows of a layer are shaped.
#[derive(Clone, Debug, PartialEq)]
pub struct LayerGeometry {
    /// Query heads on lanes.
    pub heads: HeadMap,
    /// Channels of a key and of a value.
    pub head_dim: usize,
    /// Element type of rows.
    pub row_type: RowType,
    /// Factor applied to q·k before the softmax.
    pub softmax_scale: f32,
    /// Scales of the lanes, where rows are scaled.
    pub scales: LaneScales,
}

impl LayerGeometry {
    /// The geometry of a whole layer.
    #[must_use]
    pub fn of(shape: &ModelShape, layer: usize) -> Self {
        let layer_shape = &shape.layers[layer];
        Self {
            heads: layer_shape.heads(),
            head_dim: usize::from(layer_shape.head_dim),
            row_type: shape.row_type,
            softmax_scale: layer_shape.softmax_scale,
            scales: shape.scales_of(layer),
        }
    }

    /// The same without scales: what layers have in common whose scales alone differ.
    #[must_use]
    pub fn unscaled(&self) -> Self {
        Self { scales: LaneScales::default(), ..self.clone() }
    }

    /// The scales of every lane; ones where rows are not scaled.
    pub(crate) fn lane_scales(&self) -> Vec<RowScale> {
        (0..self.heads.lanes()).map(|lane| self.scales.of(lane)).collect()
    }

    /// Bytes of a row.
    #[must_use]
    pub fn row_bytes(&self) -> usize {
        2 * self.head_dim * self.row_type.element_bytes()
    }

    /// Bytes of a page: the rows of all lanes of one chunk.
    #[must_use]
    pub fn page_bytes(&self) -> usize {
        self.heads.lanes() * CHUNK_TOKENS * self.row_bytes()
    }

    /// Offset in its page of the row of (`lane`, absolute `position`).
    #[must_use]
    pub fn row_offset(&self, lane: usize, position: usize) -> usize {
        (lane * CHUNK_TOKENS + position % CHUNK_TOKENS) * self.row_bytes()
    }
}

/// Quantise the keys of one page (all lanes, all 256 tokens) into a label page. A key of fp8 rows is the number of its code times the
/// lane's scale, rounded to f32.
#[derive(Clone, Copy)]
pub struct LabelJob<'a> {
    /// Shape of the rows.
    pub geometry: &'a LayerGeometry,
    /// `lanes x 256 x row_bytes`.
    pub page: &'a [u8],
    /// Channels, widths and ranges of the layer's lanes.
    pub coder: &'a LabelCoder,
}

/// Score all rows before the horizon (`labels.len() * 256` of them) against one query token and merge the group's heads into one
/// importance per (lane, row).
///
/// The label score of query head h and row i, in log2, is `x[h][i] = log2(e) * softmax_scale * sum over groups of unit[h][group] * (sum over
/// the group's channels of weight[h][c] * code[i][c])`, with weights and units by [`crate::label::HeadWeights`].
///
/// A head's normaliser is the log-sum-exp of a sample of its scores, `L[h] = log2(sum over the sample of weight * 2^x[h][i])`. Of n chunks the
/// sample has the first and the last whole, with weight 1, and of every other chunk c those blocks b of 16 rows for which
/// `b % stride = 5 c % stride`, with weight `stride`: 1 for n up to 64, 2 up to 128, 4 up to 256, 8 up to 512, and 16 above. Up to 16,384
/// rows it is thus the exact log-sum-exp.
///
/// The importance of row i in a lane is the sum over the lane's query heads of `lin(x[h][i] - L[h])`, the difference being clamped to
/// [-126, 7] and `lin(y) = 2^floor(y) * (1 + y - floor(y))`: the softmax, with straight lines between the powers of two. Its key is
/// [`crate::select::importance_key`].
#[derive(Clone, Copy)]
pub struct ScoreJob<'a> {
    /// Shape of the rows.
    pub geometry: &'a LayerGeometry,
    /// One query token: `[query_head][head_dim]`.
    pub query: &'a [f32],
    /// Label pages of the chunks before the horizon: `lanes x 256 x label_bytes` each.
    pub labels: &'a [&'a [u8]],
    /// What the labels mean.
    pub coder: &'a LabelCoder,
}

/// Pick `count` rows a lane: the `sinks` first rows, then the highest keys; ties go to the lower position.
#[derive(Clone, Copy)]
pub struct SelectJob<'a> {
    /// `[lane][row]` order-preserving importance keys.
    pub keys: &'a [u16],
    /// Lanes.
    pub lanes: usize,
    /// Rows a lane has (the horizon).
    pub rows: usize,
    /// Rows to pick a lane; at most `rows`.
    pub count: usize,
    /// First rows that are always picked; at most `count`.
    pub sinks: usize,
}

/// Attend one query token over listed rows, then over every row from `exact_from` to the end.
#[derive(Clone, Copy)]
pub struct AttendJob<'a> {
    /// Shape of the rows.
    pub geometry: &'a LayerGeometry,
    /// One query token: `[query_head][head_dim]`.
    pub query: &'a [f32],
    /// Pages by chunk, from chunk 0; a chunk that is not needed may be an empty slice.
    pub pages: &'a [&'a [u8]],
    /// Listed rows of every lane, `[lane][listed]`, ascending, all below `exact_from`.
    pub listed: &'a [u32],
    /// Rows listed a lane.
    pub listed_per_lane: usize,
    /// First row of the exactly attended range.
    pub exact_from: usize,
    /// End of the exactly attended range: the query's position + 1.
    pub exact_to: usize,
    /// Copies of listed rows to read instead of the rows in `pages`; the result does not depend on it.
    pub hot: Option<HotRows<'a>>,
}

/// Copies of listed rows, as [`crate::hot::HotPool`] keeps them.
#[derive(Clone, Copy)]
pub struct HotRows<'a> {
    /// `[lane][listed]`: index into `rows` of each listed row, or [`HotRows::COLD`].
    pub slots: &'a [u32],
    /// Row bytes, slot after slot.
    pub rows: &'a [u8],
}

impl HotRows<'_> {
    /// The slot of a row that has no copy.
    pub const COLD: u32 = u32::MAX;
}

/// One whole decode step over one layer: score, select, gather, attend. The horizon is `labels.len() * 256`.
#[derive(Clone, Copy)]
pub struct StepJob<'a> {
    /// Shape of the rows.
    pub geometry: &'a LayerGeometry,
    /// One query token: `[query_head][head_dim]`.
    pub query: &'a [f32],
    /// Label pages of the chunks before the horizon: `lanes x 256 x label_bytes` each.
    pub labels: &'a [&'a [u8]],
    /// What the labels mean.
    pub coder: &'a LabelCoder,
    /// Row pages by chunk, from chunk 0 to the chunk of the last attended row.
    pub pages: &'a [&'a [u8]],
    /// Rows to select a lane; at most the horizon.
    pub count: usize,
    /// First rows that are always selected; at most `count`.
    pub sinks: usize,
    /// End of the exactly attended range, which starts at the horizon: the query's position + 1.
    pub exact_to: usize,
}

impl<'a> StepJob<'a> {
    /// Rows that are selected from.
    #[must_use]
    pub fn horizon(&self) -> usize {
        self.labels.len() * CHUNK_TOKENS
    }

    /// The scoring part.
    #[must_use]
    pub fn score(&self) -> ScoreJob<'a> {
        ScoreJob { geometry: self.geometry, query: self.query, labels: self.labels, coder: self.coder }
    }

    /// The attention part over the selected `positions`.
    #[must_use]
    pub fn attend<'b>(&self, positions: &'b [u32]) -> AttendJob<'b>
    where
        'a: 'b,
    {
        AttendJob {
            geometry: self.geometry,
            query: self.query,
            pages: self.pages,
            listed: positions,
            listed_per_lane: self.count,
            exact_from: self.horizon(),
            exact_to: self.exact_to,
            hot: None,
        }
    }
}

/// What a step writes.
pub struct StepResult<'a> {
    /// `[lane][count]` selected positions, ascending.
    pub positions: &'a mut [u32],
    /// `[query_head][head_dim]`.
    pub output: &'a mut [f32],
    /// `[query_head]`.
    pub lse: &'a mut [f32],
}

/// Where the time of a step went. Parts that ran on several threads at once are counted once, as elapsed time.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct StepTimes {
    /// Label scores and importance keys.
    pub score: Duration,
    /// Choosing rows from the keys.
    pub select: Duration,
    /// Fetching rows and attending them.
    pub attend: Duration,
}

/// Exact causal attention of many query tokens: query i at position `first_position + i` attends rows
/// `max(0, position + 1 - window) ..= position` (all earlier rows without a window).
#[derive(Clone, Copy)]
pub struct ManyJob<'a> {
    /// Shape of the rows.
    pub geometry: &'a LayerGeometry,
    /// `[query][query_head][head_dim]`.
    pub queries: &'a [f32],
    /// Position of the first query token.
    pub first_position: usize,
    /// Sliding window in tokens, the query's own included.
    pub window: Option<usize>,
    /// Pages by chunk, from chunk 0; a chunk that is not needed may be an empty slice.
    pub pages: &'a [&'a [u8]],
}

/// A device that performs the verbs of a decode step. Every verb blocks until its result is written.
///
/// Results are a function of the job alone: the same job gives the same bits on the same device, however many threads it has. Jobs must
/// be consistent (slice lengths as documented, geometry as checked by [`crate::shape::ModelShape::check`], plans by
/// [`crate::label::LabelPlan::check`]); a verb panics on a job that is not, and never reads outside the slices of the job.
pub trait Device: Send {
    /// Short name for reports, with the instruction set where that varies.
    fn name(&self) -> &str;

    /// The GPU and its compiler, where there is one: decoders then keep state of sequences there, and use verbs for the rest.
    fn gpu(&self) -> Option<(cuda::Gpu, Arc<cuda::compile::Compiler>)> {
        None
    }

    /// Quantises a page into `out`, a label page of `lanes x 256 x label_bytes` in the packing of [`crate::label::packing`].
    /// All devices give the same bits.
    fn label(&mut self, job: &LabelJob, out: &mut [u8]);

    /// Writes `[lane][row]` importance keys. Devices agree within one step of the key.
    fn score(&mut self, job: &ScoreJob, keys: &mut [u16]);

    /// Writes `[lane][count]` positions, ascending. All devices give the same positions for the same keys.
    fn select(&mut self, job: &SelectJob, positions: &mut [u32]);

    /// Writes `[query_head][head_dim]` and `[query_head]`. Without any row to attend the output is zero and the log-sum-exp `-inf`.
    fn attend(&mut self, job: &AttendJob, output: &mut [f32], lse: &mut [f32]);

    /// Writes `[query][query_head][head_dim]` and `[query][query_head]`. The result of a query does not depend on its neighbours.
    fn attend_many(&mut self, job: &ManyJob, output: &mut [f32], lse: &mut [f32]);

    /// Score, select and attend as one verb; the same result as the three verbs one after the other, which it is where a device has no faster
    /// way.
    fn step(&mut self, job: &StepJob, result: StepResult) -> StepTimes {
        let (lanes, rows) = (job.geometry.heads.lanes(), job.horizon());
        let mut keys = vec![0; lanes * rows];
        let start = Instant::now();
        self.score(&job.score(), &mut keys);
        let scored = Instant::now();
        self.select(&SelectJob { keys: &keys, lanes, rows, count: job.count, sinks: job.sinks }, result.positions);
        let selected = Instant::now();
        self.attend(&job.attend(result.positions), result.output, result.lse);
        StepTimes { score: scored - start, select: selected - scored, attend: selected.elapsed() }
    }

    /// By query head, the fraction of the dense softmax mass (over all rows before `exact_to`) that the job's listed and exact rows hold:
    /// between 0 and 1. Every page before `exact_to` is needed. By default from the log-sum-exps of attending these rows, and all rows.
    fn mass_kept(&mut self, job: &AttendJob) -> Vec<f32> {
        let heads = job.geometry.heads.query_heads();
        let (mut output, mut kept, mut all) = (vec![0.0; heads * job.geometry.head_dim], vec![0.0; heads], vec![0.0; heads]);
        self.attend(job, &mut output, &mut kept);
        let dense = AttendJob { listed: &[], listed_per_lane: 0, exact_from: 0, hot: None, ..*job };
        self.attend(&dense, &mut output, &mut all);
        kept.iter().zip(&all).map(|(kept, all)| (kept - all).exp().min(1.0)).collect()
    }
}
