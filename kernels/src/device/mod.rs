//! The device contract: coarse verbs over plain-data jobs. The plain [`reference`] is the oracle of every other device.
//!
//! All positions are absolute token positions of the sequence. A *page* is one chunk's part of one layer:
//! `lanes x 256 x row_bytes`, lane after lane, a row being key then value. Queries, outputs and log-sum-exps are f32,
//! `[query][query_head][head_dim]` and `[query][query_head]`. Log-sum-exp is natural, of the scaled scores.

use crate::heads::HeadMap;
use crate::label::LabelCoder;
use crate::shape::RowType;

/// How the rows of a layer are shaped.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LayerGeometry {
    /// Query heads on lanes.
    pub heads: HeadMap,
    /// Channels of a key and of a value.
    pub head_dim: usize,
    /// Element type of rows.
    pub row_type: RowType,
    /// Factor applied to q·k before the softmax.
    pub softmax_scale: f32,
}

impl LayerGeometry {
    /// Bytes of a row.
    #[must_use]
    pub fn row_bytes(&self) -> usize {
        2 * self.head_dim * self.row_type.element_bytes()
    }
}

/// Quantise the keys of one page (all lanes, all 256 tokens) into a label page.
#[derive(Clone, Copy)]
pub struct LabelJob<'a> {
    /// Shape of the rows.
    pub geometry: LayerGeometry,
    /// `lanes x 256 x row_bytes`.
    pub page: &'a [u8],
    /// Channels, widths and ranges of the layer's lanes.
    pub coder: &'a LabelCoder,
}

/// Score all rows before the horizon against one query token and merge the group's heads into one importance per (lane, row).
#[derive(Clone, Copy)]
pub struct ScoreJob<'a> {
    /// Shape of the rows.
    pub geometry: LayerGeometry,
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
    pub geometry: LayerGeometry,
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
}

/// Exact causal attention of many query tokens: query i at position `first_position + i` attends rows
/// `max(0, position + 1 - window) ..= position` (all earlier rows without a window).
#[derive(Clone, Copy)]
pub struct ManyJob<'a> {
    /// Shape of the rows.
    pub geometry: LayerGeometry,
    /// `[query][query_head][head_dim]`.
    pub queries: &'a [f32],
    /// Position of the first query token.
    pub first_position: usize,
    /// Sliding window in tokens, the query's own included.
    pub window: Option<usize>,
    /// Pages by chunk, from chunk 0; a chunk that is not needed may be an empty slice.
    pub pages: &'a [&'a [u8]],
}
