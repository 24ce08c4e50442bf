//! A session: one held sequence, the same to its caller whichever way it is attached.

use std::time::{Duration, Instant};

use sluice_kernels::budget::Settings;
use sluice_kernels::shape::ModelShape;
use sluice_kernels::slot::CHUNK_TOKENS;
use sluice_proto::v1;

use crate::calibrate::OnlineCalibrator;
use crate::client::Client;
use crate::connection::Retry;
use crate::convert::Model;
use crate::direct::DirectWay;
use crate::error::{ClientError, expect_count};
use crate::options::{Attach, OpenOptions};
use crate::rows::encode_rows;
use crate::run::Run;
use crate::step::{LaneSelection, RowsWanted, Step, StepOut, check_step, layer_of};
use crate::stream::StreamWay;

/// What a session knows whichever way it is attached.
pub(crate) struct Core {
    pub(crate) client: Client,
    pub(crate) model: Model,
    pub(crate) options: OpenOptions,
    pub(crate) lease: v1::LeaseRef,
    pub(crate) boot_epoch: u64,
    pub(crate) settings: Settings,
    pub(crate) matched: usize,
    pub(crate) committed: usize,
    pub(crate) token_ids: Vec<u32>,
    pub(crate) opaque: Vec<u8>,
    pub(crate) run: Option<Run>,
}

/// What a session owes the daemon when it goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Holding {
    /// It opened the sequence: its end is the end of the lease.
    Opened,
    /// It joined another worker's lease, and only lets go of its files.
    Joined,
    /// The lease has ended.
    Closed,
}

/// Tokens given up for another worker's truncation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Yielding {
    /// Tokens that stay.
    pub(crate) position: usize,
    /// How often the sequence had been truncated before.
    pub(crate) truncations: u64,
}

pub(crate) enum Way {
    Stream(StreamWay),
    Direct(Box<DirectWay>),
}

/// A held sequence. Dropped without [`Session::close`], it is closed on a best effort; otherwise its lease ends with the process.
pub struct Session {
    pub(crate) core: Core,
    pub(crate) way: Way,
    pub(crate) calibrator: Option<OnlineCalibrator>,
    /// A truncation whose outcome is unknown: it is finished before anything else.
    pub(crate) truncating: Option<usize>,
    /// A truncation that another worker of the sequence is about to carry out.
    pub(crate) yielding: Option<Yielding>,
    pub(crate) holding: Holding,
}

impl std::fmt::Debug for Session {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Core { lease, committed, .. } = &self.core;
        f.debug_struct("Session").field("lease", lease).field("committed", committed).finish_non_exhaustive()
    }
}

impl Session {
    /// Id of the sequence: a parked one is resumed by it.
    #[must_use]
    pub fn sequence_id(&self) -> u64 {
        self.core.lease.sequence_id
    }

    /// Generation of the lease.
    #[must_use]
    pub fn generation(&self) -> u64 {
        self.core.lease.generation
    }

    /// Boot epoch of the daemon that answered last.
    #[must_use]
    pub fn boot_epoch(&self) -> u64 {
        self.core.boot_epoch
    }

    /// Shape of the model.
    #[must_use]
    pub fn shape(&self) -> &ModelShape {
        &self.core.model.shape
    }

    /// Settings of this sequence's steps, as the daemon has accepted them.
    #[must_use]
    pub fn settings(&self) -> Settings {
        self.core.settings
    }

    /// Tokens whose rows were held already when the sequence was opened: append from here on.
    #[must_use]
    pub fn matched_tokens(&self) -> usize {
        self.core.matched
    }

    /// Committed tokens: every row of every layer is stored.
    #[must_use]
    pub fn length(&self) -> usize {
        self.core.committed
    }

    /// Token ids of the matched tokens.
    #[must_use]
    pub fn token_ids(&self) -> &[u32] {
        &self.core.token_ids
    }

    /// State that the last holder stored with [`Session::store_opaque`]; empty without.
    #[must_use]
    pub fn opaque(&self) -> &[u8] {
        &self.core.opaque
    }

    /// Tokens that can be committed even if the daemon seals nothing more from now on.
    ///
    /// # Errors
    /// The daemon cannot be asked (Stream), or has ended the lease.
    pub fn tokens_until_full(&mut self) -> Result<usize, ClientError> {
        match &mut self.way {
            Way::Stream(way) => way.tokens_until_full(&mut self.core),
            Way::Direct(way) => way.tokens_until_full(),
        }
    }

    /// Longest run that fits once everything before it is sealed.
    #[must_use]
    pub fn run_tokens_max(&self) -> usize {
        let slots = match &self.way {
            Way::Stream(way) => way.slots_tokens() / CHUNK_TOKENS,
            Way::Direct(way) => way.open_slots(),
        };
        slots.saturating_sub(1) * CHUNK_TOKENS + 1
    }

    /// Announces the next run: consecutive new tokens whose rows follow, layer by layer. Waits, within bounds, until all of them fit.
    ///
    /// # Errors
    /// No token or too many, a run that is not finished, or open slots that stay full.
    pub fn begin(&mut self, token_ids: &[u32]) -> Result<(), ClientError> {
        self.finish_truncation()?;
        self.check_yielding()?;
        let most = self.run_tokens_max();
        if token_ids.is_empty() || token_ids.len() > most {
            let bound = format!("1 to {most}, what the open slots hold");
            return Err(ClientError::Input { field: "token_ids", value: token_ids.len().to_string(), bound });
        }
        if self.core.run.as_ref().is_some_and(Run::is_started) {
            let bound = "a finished run; truncate(length()) drops the rows given so far".to_owned();
            return Err(ClientError::Input { field: "begin", value: "an unfinished run".to_owned(), bound });
        }
        self.wait_for_room(token_ids.len())?;
        self.core.run = Some(Run::new(self.core.committed, token_ids, self.core.model.shape.layers.len()));
        Ok(())
    }

    fn wait_for_room(&mut self, needed: usize) -> Result<(), ClientError> {
        let begin = Instant::now();
        let limit = self.core.client.config().slot_wait;
        let mut pause = Duration::from_micros(200);
        loop {
            let free = match &mut self.way {
                Way::Stream(way) => way.room(&mut self.core, needed)?,
                Way::Direct(way) => way.room(&self.core, needed)?,
            };
            if free >= needed {
                return Ok(());
            }
            let waited = begin.elapsed();
            if waited >= limit {
                return Err(ClientError::SlotsFull { needed, free, waited });
            }
            std::thread::sleep(pause.min(limit - waited));
            pause = (pause * 2).min(Duration::from_millis(20));
        }
    }

    /// Stores rows of the run: `[lane][token][row bytes]`, beginning at the layer's next position.
    ///
    /// # Errors
    /// A gap, rows that are not whole or not finite, or no run: nothing is stored.
    pub fn append(&mut self, layer: usize, first_position: usize, rows: &[u8]) -> Result<(), ClientError> {
        self.finish_truncation()?;
        let token_bytes = self.token_row_bytes(layer)?;
        if rows.is_empty() || !rows.len().is_multiple_of(token_bytes) {
            let bound = format!("a positive multiple of {token_bytes} bytes");
            return Err(ClientError::Input { field: "rows", value: rows.len().to_string(), bound });
        }
        let positions = self.run()?.check(layer, first_position, rows.len() / token_bytes)?;
        match &mut self.way {
            Way::Stream(way) => way.append(&mut self.core, layer, &positions, rows)?,
            Way::Direct(way) => way.append(&self.core, layer, &positions, rows)?,
        }
        self.stored(layer, &positions);
        Ok(())
    }

    /// As [`Session::append`], from f32 keys and values, each `[token][lane][head_dim]`.
    ///
    /// # Errors
    /// As [`Session::append`].
    pub fn append_f32(&mut self, layer: usize, first_position: usize, keys: &[f32], values: &[f32]) -> Result<(), ClientError> {
        let shape = &self.core.model.shape;
        let (lanes, count) = (self.core.options.lanes.as_ref(), self.lanes_of(layer)?);
        let token_values = count * usize::from(layer_of(shape, layer)?.head_dim);
        expect_count("values", values.len(), keys.len())?;
        if keys.is_empty() || !keys.len().is_multiple_of(token_values) {
            let bound = format!("a positive multiple of {token_values}");
            return Err(ClientError::Input { field: "keys", value: keys.len().to_string(), bound });
        }
        let mut rows = Vec::new();
        let lanes = lanes.map_or(0..count, |own| usize::from(own.start)..usize::from(own.end));
        encode_rows(shape, layer, lanes, keys, values, &mut rows);
        self.append(layer, first_position, &rows)
    }

    /// Performs one layer of one or several query tokens, storing their rows first when they are given.
    ///
    /// # Errors
    /// Arguments that do not fit, rows that are not there: nothing is stored. [`ClientError::RunInterrupted`] when the run must begin again.
    pub fn step(&mut self, step: &Step<'_>, mut out: StepOut<'_>) -> Result<(), ClientError> {
        self.finish_truncation()?;
        let positions = self.check(step, &out)?;
        match &mut self.way {
            Way::Stream(way) => way.step(&mut self.core, step, &positions, &mut out)?,
            Way::Direct(way) => {
                let attended = way.step(&self.core, step, &positions, &mut out);
                return self.settle(step, &positions, attended);
            }
        }
        self.after_step(step, &positions)
    }

    /// Checks a step against shape and run; answers the positions of its queries.
    pub(crate) fn check(&self, step: &Step<'_>, out: &StepOut<'_>) -> Result<std::ops::Range<usize>, ClientError> {
        let layer = layer_of(&self.core.model.shape, step.layer)?;
        let row_bytes = layer.row_bytes(self.core.model.shape.row_type);
        let tokens = check_step(layer, self.lanes_of(step.layer)?, row_bytes, step, out)?;
        let end = step.first_position + tokens;
        match (step.rows, self.yielding) {
            (Some(_), _) => self.run()?.check(step.layer, step.first_position, tokens),
            (None, Some(Yielding { position: kept, .. })) if end > kept => {
                let bound = format!("0 to {kept}, where another worker truncates; end_truncate follows it");
                Err(ClientError::Input { field: "first_position + queries", value: end.to_string(), bound })
            }
            (None, _) => Ok(step.first_position..end),
        }
    }

    /// Takes account of a step that this process has attended, or tried to.
    pub(crate) fn settle(
        &mut self,
        step: &Step<'_>,
        positions: &std::ops::Range<usize>,
        attended: Result<(), ClientError>,
    ) -> Result<(), ClientError> {
        // Rows whose segments could not be reached: the new ones are stored all the same, and the query can be asked again.
        let stored = matches!(&self.way, Way::Direct(way) if way.has_stored(step.layer, positions));
        if attended.is_err() && step.rows.is_some() && stored {
            self.stored(step.layer, positions);
        }
        attended?;
        self.after_step(step, positions)
    }

    /// Takes account of a step that has succeeded.
    pub(crate) fn after_step(&mut self, step: &Step<'_>, positions: &std::ops::Range<usize>) -> Result<(), ClientError> {
        let Some(rows) = step.rows else { return Ok(()) };
        self.stored(step.layer, positions);
        self.calibrate(step, rows)
    }

    fn stored(&mut self, layer: usize, positions: &std::ops::Range<usize>) {
        let Some(run) = &mut self.core.run else { return };
        run.stored(layer, positions);
        if run.is_complete() {
            self.core.committed = run.end();
            self.core.run = None;
        }
    }

    /// The rows that a sparse step of one query would attend, by lane, ascending; the caller attends them.
    ///
    /// # Errors
    /// A sliding-window layer, or arguments that do not fit.
    pub fn rows(&mut self, layer: usize, position: usize, query: &[f32]) -> Result<Vec<LaneSelection>, ClientError> {
        self.finish_truncation()?;
        let shape = layer_of(&self.core.model.shape, layer)?;
        expect_count("query", query.len(), self.lanes_of(layer)? * shape.heads().group() * usize::from(shape.head_dim))?;
        match &mut self.way {
            Way::Stream(way) => way.rows(&mut self.core, layer, position, query),
            Way::Direct(way) => way.rows(&self.core, layer, position, query),
        }
    }

    /// Makes rows hot that the last queries of the prompt select, before the first sparse step asks for them; answers how many were fetched.
    /// Worth a call where a prompt's dense steps are over and the worker has something else to do. In Stream the daemon does so by itself
    /// while nothing waits, and this does nothing.
    ///
    /// # Errors
    /// Rows that cannot be reached, or memory that the device does not have; a step that follows works or says so itself.
    pub fn warm_up(&mut self) -> Result<u64, ClientError> {
        self.finish_truncation()?;
        match &mut self.way {
            Way::Stream(_) => Ok(0),
            Way::Direct(way) => way.warm_up(&self.core),
        }
    }

    /// Appends all tokens after [`Session::length`], in every layer, in runs of bounded size. `fill` writes the rows wanted, all lanes:
    /// `[lane][position][row bytes]`.
    ///
    /// # Errors
    /// As [`Session::begin`] and [`Session::append`]; whole runs before the failure are committed.
    pub fn prefill(&mut self, token_ids: &[u32], mut fill: impl FnMut(RowsWanted, &mut [u8])) -> Result<(), ClientError> {
        let layers = self.core.model.shape.layers.len();
        let run_tokens = self.prefill_run_tokens()?;
        let mut rows = Vec::new();
        for ids in token_ids.chunks(run_tokens) {
            self.begin(ids)?;
            let first = self.core.committed;
            for layer in 0..layers {
                rows.resize(ids.len() * self.token_row_bytes(layer)?, 0);
                fill(RowsWanted { layer, positions: first..first + ids.len() }, &mut rows);
                self.append(layer, first, &rows)?;
            }
        }
        Ok(())
    }

    /// Tokens of one run of a bulk append: whole chunks where they fit, messages within their bound.
    fn prefill_run_tokens(&self) -> Result<usize, ClientError> {
        let mut most = self.run_tokens_max().min(8 * CHUNK_TOKENS);
        for layer in 0..self.core.model.shape.layers.len() {
            most = most.min(self.core.client.config().message_bytes_max / 2 / self.token_row_bytes(layer)?);
        }
        Ok(if most > CHUNK_TOKENS { most / CHUNK_TOKENS * CHUNK_TOKENS } else { most.max(1) })
    }

    /// Stores state (token sampler, position in a text) for whoever resumes the sequence after this process died; at most 4072 bytes. Direct:
    /// without the daemon.
    ///
    /// # Errors
    /// Too long, or the daemon cannot be asked (Stream).
    pub fn store_opaque(&mut self, state: &[u8]) -> Result<(), ClientError> {
        match &mut self.way {
            Way::Direct(way) => way.store_opaque(state),
            Way::Stream(_) => {
                let request = v1::StoreOpaqueRequest { lease: Some(self.core.lease), state: state.to_vec().into() };
                let connection = self.core.client.connection();
                let stored = connection
                    .call("StoreOpaque", Retry::Idempotent, request, async |client, request| client.store_opaque(request).await)?;
                self.core.boot_epoch = stored.boot_epoch;
                Ok(())
            }
        }
    }

    /// Tokens that the daemon has sealed.
    ///
    /// # Errors
    /// The daemon cannot be asked (Stream), or has ended the lease.
    pub fn sealed_tokens(&mut self) -> Result<usize, ClientError> {
        match &mut self.way {
            Way::Stream(way) => way.sealed_tokens(&mut self.core),
            Way::Direct(way) => way.sealed_tokens(&self.core),
        }
    }

    /// Waits until at least `tokens` tokens (rounded down to chunks) are sealed; answers how many are.
    ///
    /// # Errors
    /// They were not in time.
    pub fn wait_sealed(&mut self, tokens: usize, limit: Duration) -> Result<usize, ClientError> {
        let begin = Instant::now();
        let wanted = tokens / CHUNK_TOKENS * CHUNK_TOKENS;
        loop {
            let sealed = self.sealed_tokens()?;
            if sealed >= wanted {
                return Ok(sealed);
            }
            if begin.elapsed() >= limit {
                return Err(ClientError::Deadline { call: "wait_sealed", limit });
            }
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    /// Ends the lease. The sealed chunks stay with the daemon as cache. A session that [`crate::Client::join`] made only leaves: the worker that
    /// opened the sequence ends the lease for all.
    ///
    /// # Errors
    /// The daemon cannot be reached; the lease then ends with this process.
    pub fn close(mut self) -> Result<(), ClientError> {
        if self.holding == Holding::Joined {
            return Ok(());
        }
        self.holding = Holding::Closed;
        let request = v1::CloseRequest { lease: Some(self.core.lease) };
        let attempts = std::cell::Cell::new(0);
        let closed = self.core.client.connection().call("Close", Retry::Idempotent, request, async |client, request| {
            attempts.set(attempts.get() + 1);
            client.close(request).await
        });
        match closed {
            // The first attempt was carried out, only its answer was lost.
            Err(ClientError::Refused { code: tonic::Code::NotFound, .. }) if attempts.get() > 1 => Ok(()),
            other => other.map(|_| ()),
        }
    }

    /// Refuses new rows while another worker truncates.
    fn check_yielding(&self) -> Result<(), ClientError> {
        let Some(Yielding { position, .. }) = self.yielding else { return Ok(()) };
        let bound = format!("none until end_truncate: another worker truncates to {position}");
        Err(ClientError::Input { field: "rows", value: "new rows".to_owned(), bound })
    }

    pub(crate) fn run(&self) -> Result<&Run, ClientError> {
        self.check_yielding()?;
        let bound = "a run that was announced with begin".to_owned();
        self.core.run.as_ref().ok_or(ClientError::Input { field: "rows", value: "no run".to_owned(), bound })
    }

    /// Lanes of a layer that this session writes and attends.
    pub(crate) fn lanes_of(&self, layer: usize) -> Result<usize, ClientError> {
        let lanes = layer_of(&self.core.model.shape, layer)?.lanes();
        Ok(self.core.options.lanes.as_ref().map_or(lanes, |own| usize::from(own.end - own.start)))
    }

    fn token_row_bytes(&self, layer: usize) -> Result<usize, ClientError> {
        let shape = layer_of(&self.core.model.shape, layer)?;
        Ok(self.lanes_of(layer)? * shape.row_bytes(self.core.model.shape.row_type))
    }

    /// Whether this process performs the steps.
    #[must_use]
    pub fn is_direct(&self) -> bool {
        matches!(self.core.options.attach, Attach::Direct { .. })
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        if self.holding != Holding::Opened || tokio::runtime::Handle::try_current().is_ok() {
            return;
        }
        let connection = self.core.client.connection();
        let (mut client, lease) = (connection.client(), self.core.lease);
        // Best effort: a daemon that does not answer must not hold up the caller; the lease ends with this process anyway.
        connection.block_on(async {
            let close = client.close(v1::CloseRequest { lease: Some(lease) });
            let _ = tokio::time::timeout(Duration::from_secs(1), close).await;
        });
    }
}
