//! One holder's view of a sequence: its rows in open slots and sealed chunks, and the labels of both.
//!
//! A direct worker and the daemon's own decoder use this same type over the same files, which is why both ways to attach give the same
//! bits. Between steps [`Sequence::refresh`] takes up what the daemon has sealed; within a step nothing here takes a lock or enters the kernel.

mod labels;
mod path;
mod recent;

use std::fs::File;
use std::ops::Range;
use std::sync::Arc;

use thiserror::Error;

use crate::bound::Bound;
use crate::budget::Settings;
use crate::decoder::{Resident, fidelity_digest};
use crate::device::LayerGeometry;
use crate::device::cuda::host::HostFile;
use crate::heads::HeadMap;
use crate::hot::HotPool;
use crate::label::{Calibration, CalibrationError, LabelCoder, LabelPlan};
use crate::layout::{Plane, class_of};
use crate::rows::first_non_finite;
use crate::scales::LaneScales;
use crate::shape::{LaneKind, ModelShape};
use crate::shared::SharedError;
use crate::shared::board::{Board, BoardState};
use crate::shared::open::{OpenLayout, OpenSlots, SlotRecord};
use crate::shared::segment::{Access, LabelSegment, Segment};
use crate::slot::{CHUNK_TOKENS, SlotClass, SlotId};

use labels::OwnLabels;
use path::Path;
pub(crate) use recent::LayerQueries;
use recent::RecentQueries;

/// A call that the sequence refuses; nothing has changed.
#[derive(Debug, Error)]
pub enum SequenceError {
    /// An argument out of its bound.
    #[error(transparent)]
    Bound(#[from] Bound),
    /// Rows must come without gaps.
    #[error("first_position: {given}, but the next row of layer {layer} is {expected}")]
    Position {
        /// Layer.
        layer: usize,
        /// Position given.
        given: usize,
        /// Position expected.
        expected: usize,
    },
    /// Bytes that are not whole rows of every lane.
    #[error("{field}: {given} bytes, a positive multiple of {unit} expected")]
    Bytes {
        /// Field.
        field: &'static str,
        /// Bytes given.
        given: usize,
        /// Bytes of one token.
        unit: usize,
    },
    /// A row with a value that cannot be attended.
    #[error("rows: element {element} of layer {layer} is not finite")]
    NotFinite {
        /// Layer.
        layer: usize,
        /// Index of the element in the bytes given.
        element: usize,
    },
    /// The next chunk's open slot is not sealed yet: wait for the daemon, or stop.
    #[error("open slots: full at token {full_at}, {sealed_tokens} tokens are sealed; {wanted} wanted")]
    OpenSlotsFull {
        /// First token that has no place.
        full_at: usize,
        /// Tokens in the arena.
        sealed_tokens: usize,
        /// End of the rows given.
        wanted: usize,
    },
    /// The board has no place for more chunks.
    #[error("tokens: {wanted} wanted, max_tokens is {max_tokens}")]
    TooLong {
        /// End of the rows given.
        wanted: usize,
        /// Tokens that the board has places for.
        max_tokens: usize,
    },
    /// A row before the window of a sliding-window layer is wanted, but not kept.
    #[error("layer {layer}: rows of chunk {chunk} are no longer kept for the window")]
    WindowGone {
        /// Layer.
        layer: usize,
        /// Chunk.
        chunk: usize,
    },
    /// A segment that the slot table names is not mapped: refresh and map it.
    #[error("segment {segment} is not mapped")]
    SegmentMissing {
        /// Segment number.
        segment: u32,
    },
    /// The daemon ended or poisoned the lease.
    #[error("lease: {0:?} on the board")]
    Lease(BoardState),
    /// A shared file that cannot be used.
    #[error(transparent)]
    Shared(#[from] SharedError),
    /// A calibration that does not fit.
    #[error(transparent)]
    Calibration(#[from] CalibrationError),
}

/// What a holder is given when it attaches.
#[derive(Debug)]
pub struct SequenceFiles {
    /// Shape of the model.
    pub shape: Arc<ModelShape>,
    /// Calibration in force.
    pub calibration: Option<Arc<Calibration>>,
    /// The board, readable.
    pub board: File,
    /// The open slots, writable.
    pub open: File,
    /// Slots of the open file.
    pub open_slots: u32,
    /// This holder among the sequence's workers.
    pub writer: usize,
    /// Lanes of every layer that this holder writes and attends; `None`: all.
    pub lanes: Option<Range<usize>>,
    /// Settings of its steps.
    pub settings: Settings,
}

/// One holder's view of a sequence.
#[derive(Debug)]
pub struct Sequence {
    shape: Arc<ModelShape>,
    settings: Settings,
    lanes: Option<Range<usize>>,
    /// By layer, scales of the own lanes; none where rows are not scaled.
    scales: Vec<LaneScales>,
    board: Arc<Board>,
    open: Arc<OpenSlots>,
    path: Path,
    own_labels: OwnLabels,
    /// Next position of each layer.
    written: Vec<usize>,
    tokens_written: usize,
    committed: usize,
    /// Hot rows by layer; empty without.
    hot: Vec<Option<HotPool>>,
    hot_rows_wanted: usize,
    /// What a device keeps of this sequence between steps.
    resident: Option<Box<Resident>>,
    /// Of the prompt's last piece.
    recent: RecentQueries,
}

/// The part of a layer's lanes that a holder works on, and its geometry.
#[derive(Clone, Debug)]
pub struct LayerPart {
    /// Geometry of the own lanes.
    pub geometry: LayerGeometry,
    /// Own lanes among the layer's.
    pub lanes: Range<usize>,
    /// What the lanes keep.
    pub kind: LaneKind,
}

impl Sequence {
    /// Maps the files of a sequence. Call [`Sequence::refresh`] before the first step.
    ///
    /// # Errors
    /// Files of another version, lanes that a layer does not have, a calibration that does not fit.
    pub fn attach(files: SequenceFiles) -> Result<Self, SequenceError> {
        let SequenceFiles { shape, calibration, board, open, open_slots, writer, lanes, settings } = files;
        check_lanes(&shape, lanes.as_ref())?;
        let board = Arc::new(Board::map(&board, Access::ReadOnly)?);
        let open = Arc::new(OpenSlots::map(&open, OpenLayout::new(&shape, open_slots)?, writer)?);
        let committed = open.committed() as usize;
        let own = |scales: &LaneScales| lanes.as_ref().map_or_else(|| scales.clone(), |lanes| scales.part(lanes.clone()));
        let scales = shape.scales.iter().map(own).collect();
        let mut sequence = Self {
            scales,
            path: Path::default(),
            own_labels: OwnLabels::default(),
            written: vec![committed; shape.layers.len()],
            tokens_written: committed,
            committed,
            hot: Vec::new(),
            hot_rows_wanted: 0,
            resident: None,
            recent: RecentQueries::default(),
            shape,
            settings,
            lanes,
            board,
            open,
        };
        if let Some(calibration) = calibration {
            sequence.set_calibration(&calibration)?;
        }
        Ok(sequence)
    }

    /// Sets the calibration, once the daemon has one.
    ///
    /// # Errors
    /// It does not fit the model.
    pub fn set_calibration(&mut self, calibration: &Calibration) -> Result<(), SequenceError> {
        calibration.check(&self.shape)?;
        let parts: Vec<LayerPart> = (0..self.shape.layers.len()).map(|layer| self.part(layer)).collect();
        self.own_labels = OwnLabels::new(&self.shape, calibration, &parts, self.open.layout().slots);
        self.resident.iter_mut().for_each(|resident| resident.forget_layers());
        Ok(())
    }

    /// Shape of the model.
    #[must_use]
    pub fn shape(&self) -> &Arc<ModelShape> {
        &self.shape
    }

    /// Settings of this sequence's steps.
    #[must_use]
    pub fn settings(&self) -> Settings {
        self.settings
    }

    /// Changes the settings of later steps.
    pub fn set_settings(&mut self, settings: Settings) {
        self.settings = settings;
    }

    /// Tokens committed: rows of all layers and token ids are there.
    #[must_use]
    pub fn committed(&self) -> usize {
        self.committed
    }

    /// Next position of a layer.
    #[must_use]
    pub fn written(&self, layer: usize) -> usize {
        self.written[layer]
    }

    /// Chunks taken up from the arena.
    #[must_use]
    pub fn sealed_chunks(&self) -> usize {
        self.path.len()
    }

    /// The board.
    #[must_use]
    pub fn board(&self) -> &Board {
        &self.board
    }

    /// The open slots.
    #[must_use]
    pub fn open(&self) -> &OpenSlots {
        &self.open
    }

    /// Tokens that fit before the daemon must seal a chunk.
    #[must_use]
    pub fn tokens_until_full(&self) -> usize {
        self.capacity() - self.written.iter().copied().max().unwrap_or(0)
    }

    fn capacity(&self) -> usize {
        let chunks = self.path.len() + self.open.layout().slots as usize;
        chunks.min(self.board.table_chunks() as usize) * CHUNK_TOKENS
    }

    /// The own part of a layer.
    #[must_use]
    pub fn part(&self, layer: usize) -> LayerPart {
        let shape = &self.shape.layers[layer];
        let lanes = self.lanes.clone().unwrap_or(0..shape.lanes());
        let group = shape.heads().group();
        let geometry = LayerGeometry {
            heads: HeadMap::new((lanes.len() * group) as u16, lanes.len() as u16),
            head_dim: usize::from(shape.head_dim),
            row_type: self.shape.row_type,
            softmax_scale: shape.softmax_scale,
            scales: self.scales.get(layer).cloned().unwrap_or_default(),
        };
        LayerPart { geometry, lanes, kind: shape.kind }
    }

    /// Stores rows of consecutive tokens of one layer: `[own lane][token][row bytes]`. Returns how many tokens they were.
    ///
    /// # Errors
    /// A gap, bytes that are not whole rows, values that are not finite, or no place: nothing is stored.
    pub fn append(&mut self, layer: usize, first_position: usize, rows: &[u8]) -> Result<usize, SequenceError> {
        let tokens = self.check_append(layer, first_position, rows)?;
        let class = class_of(self.shape.layers[layer].kind);
        let plane = *self.plane(layer);
        let row_bytes = plane.row_bytes as usize;
        let lanes = self.part(layer).lanes;
        for (own_lane, lane) in lanes.enumerate() {
            let of_lane = &rows[own_lane * tokens * row_bytes..(own_lane + 1) * tokens * row_bytes];
            let mut done = 0;
            while done < tokens {
                let position = first_position + done;
                let (chunk, token) = (position / CHUNK_TOKENS, position % CHUNK_TOKENS);
                let count = (CHUNK_TOKENS - token).min(tokens - done);
                let part = &of_lane[done * row_bytes..(done + count) * row_bytes];
                self.open.write_rows(class, &plane, self.open.layout().slot_of(chunk), lane, token, part);
                done += count;
            }
        }
        self.written[layer] = first_position + tokens;
        Ok(tokens)
    }

    fn check_append(&self, layer: usize, first_position: usize, rows: &[u8]) -> Result<usize, SequenceError> {
        self.check_layer(layer)?;
        let expected = self.written[layer];
        if first_position != expected {
            return Err(SequenceError::Position { layer, given: first_position, expected });
        }
        let unit = self.part(layer).lanes.len() * self.plane(layer).row_bytes as usize;
        if rows.is_empty() || !rows.len().is_multiple_of(unit) {
            return Err(SequenceError::Bytes { field: "rows", given: rows.len(), unit });
        }
        let tokens = rows.len() / unit;
        self.check_place(first_position + tokens)?;
        if let Some(element) = first_non_finite(rows, self.shape.row_type) {
            return Err(SequenceError::NotFinite { layer, element });
        }
        Ok(tokens)
    }

    /// Checks that rows up to `wanted` tokens have a place.
    ///
    /// # Errors
    /// Open slots full, or longer than the board.
    pub fn check_place(&self, wanted: usize) -> Result<(), SequenceError> {
        let max_tokens = self.board.table_chunks() as usize * CHUNK_TOKENS;
        if wanted > max_tokens {
            return Err(SequenceError::TooLong { wanted, max_tokens });
        }
        let full_at = self.capacity();
        if wanted > full_at {
            let sealed_tokens = self.path.len() * CHUNK_TOKENS;
            return Err(SequenceError::OpenSlotsFull { full_at, sealed_tokens, wanted });
        }
        Ok(())
    }

    /// Checks a layer index.
    ///
    /// # Errors
    /// The model has no such layer.
    pub fn check_layer(&self, layer: usize) -> Result<(), SequenceError> {
        let count = self.shape.layers.len();
        if layer < count {
            return Ok(());
        }
        Err(Bound { field: "layer", value: layer as u64, low: 0, high: count as u64 - 1 }.into())
    }

    /// Takes account of the token ids of consecutive tokens, from the first one without an id on. Writer 0 stores them; every writer marks the
    /// slots that its rows of them lie in.
    ///
    /// # Errors
    /// A gap, or no place.
    pub fn write_tokens(&mut self, first_position: usize, ids: &[u32]) -> Result<(), SequenceError> {
        if first_position != self.tokens_written {
            return Err(SequenceError::Position { layer: 0, given: first_position, expected: self.tokens_written });
        }
        self.check_place(first_position + ids.len())?;
        let mut done = 0;
        while done < ids.len() {
            let position = first_position + done;
            let (chunk, token) = (position / CHUNK_TOKENS, position % CHUNK_TOKENS);
            let count = (CHUNK_TOKENS - token).min(ids.len() - done);
            let slot = self.open.layout().slot_of(chunk);
            if self.open.record(slot).chunk != Some(chunk as u64) {
                self.open.write_record(slot, SlotRecord { chunk: Some(chunk as u64), fidelity: None });
            }
            if self.open.writer() == 0 {
                self.open.write_tokens(slot, token, &ids[done..done + count]);
            }
            done += count;
        }
        self.tokens_written += ids.len();
        Ok(())
    }

    /// Commits every token whose rows are written in all layers and whose id is known. Returns the committed tokens.
    pub fn commit(&mut self) -> usize {
        let rows = self.written.iter().copied().min().unwrap_or(0);
        let committed = rows.min(self.tokens_written);
        if committed > self.committed {
            self.committed = committed;
            self.open.set_committed(committed as u64);
        }
        self.committed
    }

    /// Records that rows of the chunk at `position` come from a sparse step: its later layers, and every token after it, are approximations.
    pub(crate) fn mark_fidelity(&self, position: usize) {
        let chunk = position / CHUNK_TOKENS;
        if chunk < self.path.len() {
            return;
        }
        let slot = self.open.layout().slot_of(chunk);
        let fidelity = Some(fidelity_digest(&self.settings, self.plan()));
        let record = SlotRecord { chunk: Some(chunk as u64), fidelity };
        if self.open.record(slot) != record {
            self.open.write_record(slot, record);
        }
    }

    /// Keeps copies of up to `rows_per_lane` fetched rows of every full-attention layer between steps; 0 keeps none on devices that read
    /// rows where they lie (there it only costs memory), and as many as the device sees fit on others. It never changes a result.
    pub fn set_hot_rows(&mut self, rows_per_lane: usize) {
        self.hot = Vec::new();
        self.hot_rows_wanted = rows_per_lane;
        self.resident = None;
    }

    /// Drops what a device holds of this sequence; the next step brings it there again.
    pub fn forget_device_state(&mut self) {
        self.resident = None;
    }

    pub(crate) fn hot_rows_wanted(&self) -> usize {
        self.hot_rows_wanted
    }

    /// The hot rows of a layer, to be put back after a step; made at the first use.
    pub(crate) fn take_hot_pool(&mut self, layer: usize) -> Option<HotPool> {
        if self.hot_rows_wanted == 0 {
            return None;
        }
        self.hot.resize_with(self.shape.layers.len(), || None);
        let part = self.part(layer);
        let made = || HotPool::new(part.lanes.len(), self.hot_rows_wanted, part.geometry.row_bytes());
        Some(self.hot[layer].take().unwrap_or_else(made))
    }

    pub(crate) fn put_hot_pool(&mut self, layer: usize, pool: Option<HotPool>) {
        if let Some(place) = self.hot.get_mut(layer) {
            *place = pool;
        }
    }

    /// Hot places by lane on a device that keeps state, `[layer][own lane]` of the full-attention layers by their shape; empty before the first
    /// step and on other devices.
    #[must_use]
    pub fn hot_places(&self) -> Vec<usize> {
        self.resident.as_ref().map_or(Vec::new(), |resident| resident.hot_places())
    }

    /// Keeps the last queries of a piece of a prompt.
    pub(crate) fn note_queries(&mut self, layer: usize, first_position: usize, queries: &[f32], unit: usize) {
        self.recent.note(layer, first_position, queries, unit);
    }

    /// The queries that were kept of a layer, once.
    pub(crate) fn take_queries(&mut self, layer: usize) -> Option<LayerQueries> {
        self.recent.take(layer)
    }

    pub(crate) fn take_resident(&mut self) -> Option<Box<Resident>> {
        self.resident.take()
    }

    pub(crate) fn put_resident(&mut self, resident: Box<Resident>) {
        self.resident = Some(resident);
    }

    /// Lowers the committed tokens before the daemon is asked to truncate; nothing is lost until [`Sequence::truncated`].
    ///
    /// # Errors
    /// A position beyond the committed tokens.
    pub fn begin_truncate(&mut self, position: usize) -> Result<(), SequenceError> {
        if position > self.committed {
            return Err(Bound { field: "position", value: position as u64, low: 0, high: self.committed as u64 }.into());
        }
        self.open.set_committed(position as u64);
        Ok(())
    }

    /// Takes back [`Sequence::begin_truncate`] after the daemon refused.
    pub fn abort_truncate(&mut self) {
        self.open.set_committed(self.committed as u64);
    }

    /// Follows the daemon's truncation: forgets everything from `position` on. Refresh afterwards.
    pub fn truncated(&mut self, position: usize) {
        self.written.fill(position);
        self.tokens_written = position;
        self.committed = position;
        self.open.set_committed(position as u64);
        self.path.clear();
        self.own_labels.forget_all();
        self.recent.forget();
        for pool in self.hot.iter_mut().flatten() {
            pool.truncate(position);
        }
        if let Some(resident) = &mut self.resident {
            resident.truncate(position);
        }
    }

    /// Takes up chunks that the daemon has sealed since the last call, and labels since a calibration. Call between steps.
    ///
    /// Returns the segments that must be mapped ([`Sequence::add_segment`]) before those chunks can be taken up; until then their rows
    /// are still read from the open slots where they grew, or the call must be repeated where they did not grow here.
    ///
    /// # Errors
    /// The lease was ended or poisoned.
    pub fn refresh(&mut self) -> Result<Vec<u32>, SequenceError> {
        match self.board.state() {
            BoardState::Live => {}
            state => return Err(SequenceError::Lease(state)),
        }
        Ok(self.path.refresh(&self.board, self.own_labels.is_calibrated()))
    }

    /// Whether this holder has a calibration, and so can select.
    #[must_use]
    pub fn is_calibrated(&self) -> bool {
        self.own_labels.is_calibrated()
    }

    /// The label plan in force.
    #[must_use]
    pub fn plan(&self) -> Option<&LabelPlan> {
        self.own_labels.plan()
    }

    /// Whether the daemon has published labels of a calibration that this holder was not given yet.
    #[must_use]
    pub fn needs_calibration(&self) -> bool {
        self.board.label_set().is_some() && !self.own_labels.is_calibrated()
    }

    /// Hands over a mapped segment and its labels.
    pub fn add_segment(&mut self, rows: Arc<Segment>, labels: Option<Arc<LabelSegment>>) {
        self.path.add_segment(rows, labels);
    }

    fn plane(&self, layer: usize) -> &Plane {
        let class = class_of(self.shape.layers[layer].kind);
        let plane = self.open.layout().class(class).plane_of_layer(layer);
        plane.expect("every layer of the shape has a plane in its class")
    }

    /// The own lanes' pages of chunks `chunks` of a layer, pushed onto `pages` behind empty slices for the chunks before.
    ///
    /// # Errors
    /// A segment that is not mapped, or window rows that are no longer kept.
    pub fn pages<'a>(&'a self, layer: usize, chunks: Range<usize>, pages: &mut Vec<&'a [u8]>) -> Result<(), SequenceError> {
        let class = class_of(self.shape.layers[layer].kind);
        let plane = self.plane(layer);
        let lane_bytes = CHUNK_TOKENS * plane.row_bytes as usize;
        let part = self.part(layer).lanes;
        let own = part.start * lane_bytes..part.end * lane_bytes;
        pages.clear();
        pages.resize(chunks.start, &[]);
        for chunk in chunks {
            pages.push(&self.whole_page(layer, plane, class, chunk)?[own.clone()]);
        }
        Ok(())
    }

    /// The own lanes' page of one chunk of a layer.
    ///
    /// # Errors
    /// As [`Sequence::pages`].
    pub(crate) fn page(&self, layer: usize, chunk: usize) -> Result<&[u8], SequenceError> {
        let (class, plane) = (class_of(self.shape.layers[layer].kind), self.plane(layer));
        let lane_bytes = CHUNK_TOKENS * plane.row_bytes as usize;
        let part = self.part(layer).lanes;
        Ok(&self.whole_page(layer, plane, class, chunk)?[part.start * lane_bytes..part.end * lane_bytes])
    }

    #[inline]
    fn whole_page(&self, layer: usize, plane: &Plane, class: SlotClass, chunk: usize) -> Result<&[u8], SequenceError> {
        if chunk < self.path.len() {
            return self.path.page(&self.board, layer, plane, class, chunk);
        }
        Ok(self.open.page(class, plane, self.open.layout().slot_of(chunk)))
    }

    /// The file in which the rows of a chunk lie in full-attention layers, and the slot there.
    ///
    /// # Errors
    /// A segment that is not mapped.
    pub(crate) fn chunk_place(&self, chunk: usize) -> Result<(HostFile, u32), SequenceError> {
        if chunk >= self.path.len() {
            return Ok((HostFile::Open(Arc::clone(&self.open)), self.open.layout().slot_of(chunk)));
        }
        let (segment, slot) = self.path.selected(chunk)?;
        Ok((HostFile::Sealed(Arc::clone(segment)), slot))
    }

    /// Where the rows of a chunk lie in full-attention layers, once it is sealed and taken up.
    pub(crate) fn sealed_slot(&self, chunk: usize) -> Option<SlotId> {
        if chunk < self.path.len() { self.path.selected_slot(chunk) } else { None }
    }

    /// The board, for those who ask it later.
    pub(crate) fn shared_board(&self) -> &Arc<Board> {
        &self.board
    }

    /// What the labels of a layer mean; `None` without a calibration.
    pub(crate) fn coder(&self, layer: usize) -> Option<&LabelCoder> {
        self.own_labels.coder(layer)
    }

    /// The own lanes' labels of a chunk, where the daemon has made them and they are mapped.
    pub(crate) fn label_page(&self, layer: usize, chunk: usize) -> Option<&[u8]> {
        let part = self.part(layer).lanes;
        let lane_bytes = CHUNK_TOKENS * self.coder(layer)?.plan.label_bytes();
        let page = (chunk < self.path.labelled_chunks()).then(|| self.path.label_page(layer, chunk))??;
        Some(&page[part.start * lane_bytes..part.end * lane_bytes])
    }

    /// Labels every own chunk below `chunks` that the daemon has not labelled yet.
    pub(crate) fn ensure_labels(&mut self, layer: usize, chunks: usize, device: &mut dyn crate::device::Device) {
        if !self.own_labels.is_calibrated() {
            return;
        }
        let plane = *self.plane(layer);
        let part = self.part(layer);
        let lane_bytes = CHUNK_TOKENS * plane.row_bytes as usize;
        // Only chunks that still lie in open slots: labels of sealed ones are the daemon's.
        for chunk in self.path.len().min(chunks)..chunks {
            let slot = self.open.layout().slot_of(chunk);
            if !self.own_labels.has(layer, slot, chunk) {
                let page = self.open.page(class_of(part.kind), &plane, slot);
                let page = &page[part.lanes.start * lane_bytes..part.lanes.end * lane_bytes];
                self.own_labels.build(layer, slot, chunk, &part.geometry, page, device);
            }
        }
    }

    /// The own lanes' label pages of the chunks below `chunks`, after [`Sequence::ensure_labels`]; `None` without a calibration.
    ///
    /// # Errors
    /// Labels of a sealed chunk that are not mapped: refresh and map their segment.
    pub(crate) fn labels<'a>(
        &'a self,
        layer: usize,
        chunks: usize,
        labels: &mut Vec<&'a [u8]>,
    ) -> Result<Option<&'a LabelCoder>, SequenceError> {
        let Some(coder) = self.own_labels.coder(layer) else { return Ok(None) };
        let part = self.part(layer).lanes;
        let lane_bytes = CHUNK_TOKENS * coder.plan.label_bytes();
        labels.clear();
        for chunk in 0..chunks {
            let page = if chunk < self.path.labelled_chunks() {
                self.path.label_page(layer, chunk).map(|page| &page[part.start * lane_bytes..part.end * lane_bytes])
            } else {
                self.own_labels.page(layer, self.open.layout().slot_of(chunk), chunk)
            };
            labels.push(page.ok_or_else(|| self.path.label_missing(chunk))?);
        }
        Ok(Some(coder))
    }
}

fn check_lanes(shape: &ModelShape, lanes: Option<&Range<usize>>) -> Result<(), SequenceError> {
    let Some(lanes) = lanes else { return Ok(()) };
    let fewest = shape.layers.iter().map(crate::shape::LayerShape::lanes).min().unwrap_or(0);
    if lanes.is_empty() || lanes.end > fewest {
        return Err(Bound { field: "lanes", value: lanes.end as u64, low: lanes.start as u64 + 1, high: fewest as u64 }.into());
    }
    Ok(())
}
