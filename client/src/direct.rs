//! The Direct way: rows lie in shared memory, and this process performs the steps.
//!
//! A step needs neither the daemon nor the operating system. Segments that appear later are asked for between steps without waiting for the
//! answer; a daemon that is dead or stopped holds nothing up until the open slots are full.

use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};

use sluice_kernels::decoder::{Attend, StepError, StepReport as Costs, StepRequest};
use sluice_kernels::device::DeviceKind;
use sluice_kernels::label::Calibration;
use sluice_kernels::layout::ClassLayout;
use sluice_kernels::rows::first_non_finite_value;
use sluice_kernels::sequence::{Sequence, SequenceError, SequenceFiles};
use sluice_kernels::shape::ModelShape;
use sluice_kernels::shared::LAYOUT_VERSION;
use sluice_kernels::shared::segment::{Access, LabelSegment, Segment};
use sluice_kernels::slot::{CHUNK_TOKENS, SlotClass};
use sluice_proto::v1;

use crate::client::from_json;
use crate::connection::Retry;
use crate::convert::settings_in_force;
use crate::error::ClientError;
use crate::local::{Known, SharedDecoder};
use crate::run::Run;
use crate::session::Core;
use crate::side_socket::{Attached, SegmentReply, SideSocket};
use crate::step::{AttendMode, LaneSelection, Step, StepOut, StepReport};

/// What a Direct session holds.
pub(crate) struct DirectWay {
    sequence: Sequence,
    decoder: SharedDecoder,
    side: Option<SideSocket>,
    selected: Arc<ClassLayout>,
    window: Arc<ClassLayout>,
    /// When a lost side socket may be opened again.
    reattach_at: Instant,
}

/// Shortest time between two attempts to open the side socket again.
const REATTACH_PAUSE: Duration = Duration::from_millis(250);

impl Drop for DirectWay {
    /// What a device holds of the sequence goes with the session, not with the next one's first step.
    fn drop(&mut self) {
        self.sequence.forget_device_state();
        self.decoder.lock().sweep();
    }
}

impl DirectWay {
    pub(crate) fn attach(core: &mut Core, device: DeviceKind, threads: usize) -> Result<Self, ClientError> {
        let decoder = core.client.local().decoder(device, threads)?;
        let Side { attached: Attached { side, files, board, open }, calibration, reply } = open_side(core)?;
        core.boot_epoch = reply.boot_epoch;
        core.settings = settings_in_force(reply.settings)?;
        let shape: ModelShape =
            serde_json::from_str(&files.shape_json).map_err(|error| ClientError::protocol("AttachFiles.shape_json", error.to_string()))?;
        if shape != *core.model.shape {
            return Err(ClientError::protocol("AttachFiles.shape_json", "not the shape that the model was registered with"));
        }
        let mut sequence = Sequence::attach(SequenceFiles {
            shape: Arc::clone(&core.model.shape),
            calibration,
            board,
            open,
            open_slots: files.open_slots,
            writer: files.writer as usize,
            lanes: core.options.lanes.clone().map(|lanes| usize::from(lanes.start)..usize::from(lanes.end)),
            settings: core.settings,
        })?;
        if core.options.hot_rows > 0 {
            sequence.set_hot_rows(core.options.hot_rows);
        }
        core.committed = sequence.committed();
        let selected = Arc::new(ClassLayout::new(&shape, SlotClass::Selected));
        let window = Arc::new(ClassLayout::new(&shape, SlotClass::Window));
        let mut way = Self { sequence, decoder, side: Some(side), selected, window, reattach_at: Instant::now() };
        way.sync_all(core)?;
        Ok(way)
    }

    pub(crate) fn open_slots(&self) -> usize {
        self.sequence.open().layout().slots as usize
    }

    pub(crate) fn tokens_until_full(&mut self) -> Result<usize, ClientError> {
        Ok(self.sequence.tokens_until_full())
    }

    /// Room for a run after taking up what the daemon has sealed. A lost side socket is opened again when room is short.
    pub(crate) fn room(&mut self, core: &Core, needed: usize) -> Result<usize, ClientError> {
        self.sync(core)?;
        if self.sequence.tokens_until_full() < needed {
            self.reattach(core);
            self.sync(core)?;
        } else if self.sequence.needs_calibration() {
            self.reattach(core);
        }
        Ok(self.sequence.tokens_until_full())
    }

    pub(crate) fn sealed_tokens(&mut self, core: &Core) -> Result<usize, ClientError> {
        self.reattach(core);
        self.sync(core)?;
        Ok(self.sequence.sealed_chunks() * CHUNK_TOKENS)
    }

    pub(crate) fn store_opaque(&mut self, state: &[u8]) -> Result<(), ClientError> {
        Ok(self.sequence.open().store_opaque(state)?)
    }

    pub(crate) fn append(&mut self, core: &Core, layer: usize, positions: &Range<usize>, rows: &[u8]) -> Result<(), ClientError> {
        let Some(run) = core.run.as_ref() else { return Ok(()) };
        self.store(run, layer, positions, rows)?;
        self.sequence.commit();
        Ok(())
    }

    fn store(&mut self, run: &Run, layer: usize, positions: &Range<usize>, rows: &[u8]) -> Result<(), ClientError> {
        self.sequence.append(layer, positions.start, rows)?;
        // Token ids go with layer 0, as on the wire.
        if layer == 0 {
            self.sequence.write_tokens(positions.start, run.ids_of(positions.clone()))?;
        }
        Ok(())
    }

    /// Whether rows of `positions` are stored, even though their step was refused.
    pub(crate) fn has_stored(&self, layer: usize, positions: &Range<usize>) -> bool {
        self.sequence.written(layer) == positions.end
    }

    pub(crate) fn step(
        &mut self,
        core: &Core,
        step: &Step<'_>,
        positions: &Range<usize>,
        out: &mut StepOut<'_>,
    ) -> Result<(), ClientError> {
        self.begin_step(core, step, positions)?;
        let attended = self.attend(step, out);
        self.end_step(core, step, out, attended)
    }

    /// What a step does before it attends: takes up what is sealed, and stores the new rows.
    pub(crate) fn begin_step(&mut self, core: &Core, step: &Step<'_>, positions: &Range<usize>) -> Result<(), ClientError> {
        self.sync(core)?;
        if let Some(index) = first_non_finite_value(step.queries) {
            return Err(StepError::NotFinite { index }.into());
        }
        if let (Some(rows), Some(run)) = (step.rows, core.run.as_ref()) {
            self.store(run, step.layer, positions, rows)?;
        }
        Ok(())
    }

    /// What a step does after it has attended: fetches a segment that was missing and tries again, commits, and counts costs.
    pub(crate) fn end_step(
        &mut self,
        core: &Core,
        step: &Step<'_>,
        out: &mut StepOut<'_>,
        attended: Result<Costs, StepError>,
    ) -> Result<(), ClientError> {
        let attended = match attended {
            Err(StepError::Sequence(SequenceError::SegmentMissing { segment })) => {
                self.fetch(core, segment).and_then(|()| self.sync_all(core)).and_then(|()| Ok(self.attend(step, out)?))
            }
            other => other.map_err(ClientError::from),
        };
        // Committed after the step, which has marked how the rows came to be: the daemon may seal from here on.
        if step.rows.is_some() {
            self.sequence.commit();
        }
        let costs = attended?;
        if let Some(report) = out.report.as_deref_mut() {
            *report += costs_of(&costs);
        }
        Ok(())
    }

    fn attend(&mut self, step: &Step<'_>, out: &mut StepOut<'_>) -> Result<Costs, StepError> {
        let decoder = self.decoder();
        decoder.lock().step_one(step.layer, &mut self.request(step, out))
    }

    /// The decoder that this session shares with others.
    pub(crate) fn decoder(&self) -> SharedDecoder {
        Arc::clone(&self.decoder)
    }

    /// What the decoder is asked.
    pub(crate) fn request<'a>(&'a mut self, step: &Step<'a>, out: &'a mut StepOut<'_>) -> StepRequest<'a> {
        StepRequest {
            sequence: &mut self.sequence,
            first_position: step.first_position,
            queries: step.queries,
            attend: match step.attend {
                AttendMode::Sparse => Attend::Sparse,
                AttendMode::Dense => Attend::Dense,
            },
            output: out.output,
            lse: out.log_sum_exp,
        }
    }

    pub(crate) fn rows(&mut self, core: &Core, layer: usize, position: usize, query: &[f32]) -> Result<Vec<LaneSelection>, ClientError> {
        self.sync(core)?;
        let lanes = self.decoder.lock().rows(layer, &mut self.sequence, position, query)?;
        let lanes =
            lanes.into_iter().map(|lane| LaneSelection { positions: lane.positions.into_iter().map(u64::from).collect(), rows: lane.rows });
        Ok(lanes.collect())
    }

    /// Rows that are hot now and were not.
    pub(crate) fn warm_up(&mut self, core: &Core) -> Result<u64, ClientError> {
        self.sync(core)?;
        let mut fetched = 0;
        for layer in 0..core.model.shape.layers.len() {
            loop {
                // Steps of other sessions may come in between.
                let warmed = self.decoder.lock().warm_up(layer, &mut self.sequence)?;
                fetched += warmed.fetched_rows;
                if warmed.is_done {
                    break;
                }
            }
        }
        Ok(fetched)
    }

    pub(crate) fn begin_truncate(&mut self, position: usize) -> Result<(), ClientError> {
        Ok(self.sequence.begin_truncate(position)?)
    }

    pub(crate) fn abort_truncate(&mut self) {
        self.sequence.abort_truncate();
    }

    /// How often the daemon has truncated the sequence.
    pub(crate) fn truncations(&self) -> u64 {
        self.sequence.board().truncations()
    }

    pub(crate) fn truncated(&mut self, position: usize) {
        self.sequence.truncated(position);
    }

    pub(crate) fn take_calibration(&mut self, core: &Core, calibration: &Calibration) -> Result<(), ClientError> {
        self.sequence.set_calibration(calibration)?;
        self.sync(core)
    }

    /// Takes up what the daemon has published, as far as segments are here; asks for those that are not, and never waits.
    fn sync(&mut self, core: &Core) -> Result<(), ClientError> {
        let missing = self.refresh(core)?;
        let (Some(&segment), Some(side)) = (missing.first(), self.side.as_mut()) else { return Ok(()) };
        match side.poll_segment(segment) {
            Ok(None) => Ok(()),
            Ok(Some(reply)) => self.add_segment(core, reply),
            // The daemon is gone or has refused: rows that grew here are still in the open slots.
            Err(error) => {
                self.lose_side(&error);
                Ok(())
            }
        }
    }

    /// As [`DirectWay::sync`], waiting until everything published is here.
    fn sync_all(&mut self, core: &Core) -> Result<(), ClientError> {
        let limit = core.client.config().rpc_deadline;
        let begin = Instant::now();
        loop {
            let missing = self.refresh(core)?;
            let Some(&segment) = missing.first() else { return Ok(()) };
            if begin.elapsed() > limit {
                return Err(ClientError::Deadline { call: "segments", limit });
            }
            self.fetch(core, segment)?;
        }
    }

    /// Maps one segment, waiting for it. A lost side socket is opened again first.
    fn fetch(&mut self, core: &Core, segment: u32) -> Result<(), ClientError> {
        let mut side = match self.side.take() {
            Some(side) => side,
            None => self.open_again(core)?,
        };
        let reply = side.segment(segment);
        match reply {
            Ok(reply) => {
                self.side = Some(side);
                self.add_segment(core, reply)
            }
            Err(error) => {
                self.lose_side(&error);
                Err(error)
            }
        }
    }

    fn refresh(&mut self, core: &Core) -> Result<Vec<u32>, ClientError> {
        let generation = self.sequence.board().generation();
        if generation != core.lease.generation {
            let v1::LeaseRef { sequence_id, generation: held } = core.lease;
            let reason = format!("the board names generation {generation}");
            return Err(ClientError::LeaseLost { sequence_id, generation: held, reason });
        }
        match self.sequence.refresh() {
            Err(SequenceError::Lease(state)) => {
                let v1::LeaseRef { sequence_id, generation } = core.lease;
                Err(ClientError::LeaseLost { sequence_id, generation, reason: format!("the board says {state:?}") })
            }
            other => other.map_err(ClientError::from),
        }
    }

    fn add_segment(&mut self, core: &Core, reply: SegmentReply) -> Result<(), ClientError> {
        let SegmentReply { files, rows, labels } = reply;
        let local = core.client.local();
        let layout = if files.window_class { &self.window } else { &self.selected };
        let mapped = local.rows(&rows, || Ok(Segment::map(files.segment, files.slots, Arc::clone(layout), &rows, Access::ReadOnly)?))?;
        let labels = match (labels, self.sequence.plan()) {
            (Some(file), Some(plan)) => {
                let layout = Arc::new(ClassLayout::labels(&core.model.shape, plan));
                Some(local.labels(&file, files.label_set, || {
                    Ok(LabelSegment::map(files.label_set, files.slots, layout, &file, Access::ReadOnly)?)
                })?)
            }
            _ => None,
        };
        self.sequence.add_segment(mapped, labels);
        Ok(())
    }

    fn lose_side(&mut self, error: &ClientError) {
        tracing::debug!(%error, "side socket lost");
        self.side = None;
        self.reattach_at = Instant::now() + REATTACH_PAUSE;
    }

    /// Opens a lost side socket again, or takes up a calibration that has appeared. A failure is tried again later.
    fn reattach(&mut self, core: &Core) {
        let wanted = self.side.is_none() || self.sequence.needs_calibration();
        if !wanted || Instant::now() < self.reattach_at {
            return;
        }
        let begin = Instant::now();
        match self.open_again(core) {
            Ok(side) => self.side = Some(side),
            Err(error) => {
                self.lose_side(&error);
                // A daemon that is stopped rather than dead makes an attempt slow: it is then repeated rarely.
                self.reattach_at += 4 * begin.elapsed();
            }
        }
    }

    fn open_again(&mut self, core: &Core) -> Result<SideSocket, ClientError> {
        let Side { attached, calibration, .. } = open_side(core)?;
        if let Some(calibration) = calibration.filter(|_| !self.sequence.is_calibrated()) {
            self.sequence.set_calibration(&calibration)?;
        }
        // Board and open slots are the files that are mapped already.
        Ok(attached.side)
    }
}

/// A side socket just opened, and what Attach has answered.
struct Side {
    attached: Attached,
    calibration: Option<Arc<Calibration>>,
    reply: v1::AttachResponse,
}

/// Attach, then the side socket: what there is to map, and the calibration in force.
fn open_side(core: &Core) -> Result<Side, ClientError> {
    let lanes = core.options.lanes.clone().unwrap_or(0..0);
    let (local, model) = (core.client.local(), core.model.id());
    let known = local.calibration(model, core.boot_epoch);
    let request = v1::AttachRequest {
        lease: Some(core.lease),
        first_lane: lanes.start.into(),
        lane_count: lanes.len() as u32,
        known_label_set: known.as_ref().map_or(0, |known| known.label_set),
    };
    let connection = core.client.connection();
    let reply = connection.call("Attach", Retry::Idempotent, request, async |client, request| client.attach(request).await)?;
    if reply.layout_version != LAYOUT_VERSION {
        let message = format!("{} given, this build reads {LAYOUT_VERSION}", reply.layout_version);
        return Err(ClientError::protocol("AttachResponse.layout_version", message));
    }
    let calibration = match known.filter(|known| known.label_set == reply.label_set) {
        _ if reply.label_set == 0 => None,
        // Left out because we have it. A lease that is still good proves that the arena, and with it the number, is the same one.
        Some(known) if reply.calibration_json.is_empty() => Some(known.calibration),
        _ => {
            let calibration = Arc::new(from_json("AttachResponse.calibration_json", &reply.calibration_json)?);
            let (boot_epoch, label_set) = (reply.boot_epoch, reply.label_set);
            local.keep_calibration(model, Known { boot_epoch, label_set, calibration: Arc::clone(&calibration) });
            Some(calibration)
        }
    };
    let attached = SideSocket::attach(&reply.side_socket, &reply.ticket, core.client.config().rpc_deadline)?;
    Ok(Side { attached, calibration, reply })
}

fn costs_of(costs: &Costs) -> StepReport {
    let nanoseconds = |time: Duration| time.as_nanos() as u64;
    StepReport {
        selected_rows: costs.selected_rows,
        hot_rows: costs.hot_rows,
        row_bytes: costs.row_bytes,
        label_bytes: costs.label_bytes,
        score_ns: nanoseconds(costs.score),
        select_ns: nanoseconds(costs.select),
        gather_ns: nanoseconds(costs.gather),
        attend_ns: nanoseconds(costs.attend),
        fused_ns: nanoseconds(costs.fused),
    }
}
