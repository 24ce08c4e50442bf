//! The Stream way: steps and rows travel over the Decode stream; the daemon's decoder performs them.

use std::ops::Range;
use std::time::{Duration, Instant};

use prost::bytes::Bytes;
use sluice_kernels::slot::CHUNK_TOKENS;
use sluice_proto::v1;
use tonic::Code;

use crate::connection::Retry;
use crate::decode_stream::StreamFailure;
use crate::error::{ClientError, expect_count};
use crate::rows::{f32_bytes, read_f32};
use crate::session::Core;
use crate::step::{AttendMode, LaneSelection, MAX_STEP_QUERIES, Step, StepOut};

/// What a Stream session keeps: where its open slots end.
pub(crate) struct StreamWay {
    /// Tokens of all open slots.
    slots_tokens: usize,
    /// Tokens that fit with what is known to be sealed.
    fit_until: usize,
    /// A message with rows got no answer: whether they are stored must be asked before more is sent.
    unsure: bool,
}

/// A step of one sequence as it travels.
pub(crate) struct Message {
    pub(crate) layer: usize,
    pub(crate) answer: v1::Answer,
    pub(crate) report: bool,
    pub(crate) step: v1::SequenceStep,
}

impl StreamWay {
    pub(crate) fn new(core: &Core, tokens_until_full: u64) -> Self {
        // After an open or a fork everything matched is sealed but the part of a chunk.
        let fit_until = core.committed + tokens_until_full as usize;
        Self { slots_tokens: fit_until - core.committed / CHUNK_TOKENS * CHUNK_TOKENS, fit_until, unsure: false }
    }

    /// After a resume more may be unsealed: the daemon says how much.
    pub(crate) fn measure(&mut self, core: &Core) -> Result<(), ClientError> {
        self.slots_tokens = self.fit_until.saturating_sub(held(core)?.sealed_tokens as usize);
        Ok(())
    }

    pub(crate) fn slots_tokens(&self) -> usize {
        self.slots_tokens
    }

    pub(crate) fn tokens_until_full(&mut self, core: &mut Core) -> Result<usize, ClientError> {
        self.ask(core)?;
        Ok(self.fit_until.saturating_sub(core.committed))
    }

    /// Room for a run; the daemon is asked only when what is known does not suffice.
    pub(crate) fn room(&mut self, core: &mut Core, needed: usize) -> Result<usize, ClientError> {
        if self.fit_until < core.committed + needed {
            self.ask(core)?;
        }
        Ok(self.fit_until.saturating_sub(core.committed))
    }

    pub(crate) fn sealed_tokens(&mut self, core: &mut Core) -> Result<usize, ClientError> {
        Ok(self.ask(core)?.sealed_tokens as usize)
    }

    fn ask(&mut self, core: &mut Core) -> Result<v1::SequenceInfo, ClientError> {
        let info = held(core)?;
        self.fit_until = info.sealed_tokens as usize + self.slots_tokens;
        Ok(info)
    }

    /// After a truncation the sealed tokens are not known any more.
    pub(crate) fn truncated(&mut self) {
        self.fit_until = 0;
        self.unsure = false;
    }

    /// Records that a message with this session's rows got no answer.
    pub(crate) fn lost(&mut self) {
        self.unsure = true;
    }

    pub(crate) fn append(&mut self, core: &mut Core, layer: usize, positions: &Range<usize>, rows: &[u8]) -> Result<(), ClientError> {
        let token_bytes = rows.len() / positions.len();
        let most = (core.client.config().message_bytes_max / 2 / token_bytes).clamp(1, MAX_STEP_QUERIES);
        if positions.len() <= most {
            return self.append_part(core, layer, positions.clone(), Bytes::copy_from_slice(rows));
        }
        let lanes = core.model.shape.layers[layer].lanes();
        for first in positions.clone().step_by(most) {
            let part = first..positions.end.min(first + most);
            self.append_part(core, layer, part.clone(), cut_rows(rows, lanes, positions, &part))?;
        }
        Ok(())
    }

    /// By Decode without queries and not by the client stream Append: every message gets its own answer here, so that full open slots are
    /// waited for, and after a lost connection it is known which rows the daemon has. Append answers once, at its end.
    fn append_part(&mut self, core: &mut Core, layer: usize, positions: Range<usize>, rows: Bytes) -> Result<(), ClientError> {
        let step = sequence_step(core, layer, &positions, Bytes::new(), Some(rows))?;
        self.exchange(core, &Message { layer, answer: v1::Answer::None, report: false, step }).map(|_| ())
    }

    pub(crate) fn step(
        &mut self,
        core: &mut Core,
        step: &Step<'_>,
        positions: &Range<usize>,
        out: &mut StepOut<'_>,
    ) -> Result<(), ClientError> {
        let result = self.exchange(core, &message(core, step, positions, out.report.is_some())?)?;
        read_result(&result, out)
    }

    pub(crate) fn rows(
        &mut self,
        core: &mut Core,
        layer: usize,
        position: usize,
        query: &[f32],
    ) -> Result<Vec<LaneSelection>, ClientError> {
        let step = sequence_step(core, layer, &(position..position + 1), f32_bytes(query).into(), None)?;
        let result = self.exchange(core, &Message { layer, answer: v1::Answer::Rows, report: false, step })?;
        Ok(result.rows.into_iter().map(|lane| LaneSelection { positions: lane.positions, rows: lane.rows.to_vec() }).collect())
    }

    /// Sends one step until it is answered or refused. A lost connection is taken up again when nothing can have been stored twice.
    fn exchange(&mut self, core: &mut Core, message: &Message) -> Result<v1::StepResult, ClientError> {
        let begin = Instant::now();
        let config = core.client.config().clone();
        let mut message = Message { step: message.step.clone(), ..*message };
        let mut losses = 0;
        let mut pause = Duration::from_millis(1);
        loop {
            if self.unsure {
                resync(core, &mut message.step)?;
                self.unsure = false;
                if message.answer == v1::Answer::None && message.step.rows.is_empty() {
                    return Ok(v1::StepResult::default());
                }
            }
            let request = decode_request(message.layer, message.answer, message.report, vec![message.step.clone()]);
            match send(core, request) {
                Ok(mut reply) => {
                    core.boot_epoch = reply.boot_epoch;
                    if reply.results.len() != 1 {
                        return Err(ClientError::protocol("DecodeResponse", format!("{} results for one step", reply.results.len())));
                    }
                    let result = reply.results.remove(0);
                    let Some(error) = result.error else { return Ok(result) };
                    // Full open slots are the only refusal that passes by itself.
                    let waits = Code::from_i32(error.code) == Code::ResourceExhausted && begin.elapsed() < config.slot_wait;
                    if !waits {
                        return Err(refusal(error));
                    }
                    std::thread::sleep(pause);
                    pause = (pause * 2).min(Duration::from_millis(20));
                }
                Err(StreamFailure::Broken(reason)) => {
                    if losses == config.retries_max {
                        return Err(ClientError::Unreachable { call: "Decode", attempts: losses + 1, message: reason });
                    }
                    std::thread::sleep(config.backoff(losses));
                    losses += 1;
                    self.unsure = true;
                }
                Err(failure) => {
                    self.unsure |= matches!(failure, StreamFailure::Deadline);
                    return Err(failure.into_error(core.client.connection()));
                }
            }
        }
    }
}

fn send(core: &Core, request: v1::DecodeRequest) -> Result<v1::DecodeResponse, StreamFailure> {
    let connection = core.client.connection();
    connection.decode_stream().request(connection, request)
}

/// After a lost connection: is the lease still ours, and may `step` be sent again as it is?
///
/// Rows whose run was committed although the answer was lost are not sent again. Rows of a run that had been begun are dropped on both
/// sides, and the run must begin again.
fn resync(core: &mut Core, step: &mut v1::SequenceStep) -> Result<(), ClientError> {
    if step.rows.is_empty() {
        return Ok(());
    }
    let info = held(core)?;
    let committed = info.committed_tokens as usize;
    if core.run.as_ref().is_some_and(|run| run.end() == committed) {
        step.rows = Bytes::new();
        step.token_ids = Vec::new();
        return Ok(());
    }
    let request = v1::TruncateRequest { lease: Some(core.lease), position: info.committed_tokens };
    core.client.connection().call("Truncate", Retry::Idempotent, request, async |client, request| client.truncate(request).await)?;
    if core.run.as_ref().is_some_and(|run| !run.is_started()) && committed == core.committed {
        return Ok(());
    }
    // The session goes on at what the daemon has; the caller is told.
    core.committed = committed;
    core.run = None;
    Err(ClientError::RunInterrupted { committed })
}

/// What the daemon says about the session's sequence; it must still be held under the session's generation.
fn held(core: &Core) -> Result<v1::SequenceInfo, ClientError> {
    let v1::LeaseRef { sequence_id, generation } = core.lease;
    let lost = |reason: String| ClientError::LeaseLost { sequence_id, generation, reason };
    let listed = core.client.list(Some(&core.model))?;
    let info = listed.into_iter().find(|info| info.sequence_id == sequence_id);
    let info = info.ok_or_else(|| lost("the daemon does not know the sequence".to_owned()))?;
    if info.generation != generation || info.state() == v1::SequenceState::Parked {
        return Err(lost(format!("the daemon lists it as {:?}, generation {}", info.state(), info.generation)));
    }
    Ok(info)
}

pub(crate) fn message(core: &Core, step: &Step<'_>, positions: &Range<usize>, report: bool) -> Result<Message, ClientError> {
    let answer = match step.attend {
        AttendMode::Sparse => v1::Answer::Output,
        AttendMode::Dense => v1::Answer::OutputDense,
    };
    let rows = step.rows.map(Bytes::copy_from_slice);
    let sequence_step = sequence_step(core, step.layer, positions, f32_bytes(step.queries).into(), rows)?;
    Ok(Message { layer: step.layer, answer, report, step: sequence_step })
}

fn sequence_step(
    core: &Core,
    layer: usize,
    positions: &Range<usize>,
    queries: Bytes,
    rows: Option<Bytes>,
) -> Result<v1::SequenceStep, ClientError> {
    let query_count = u32::try_from(positions.len()).map_err(|_| ClientError::Input {
        field: "queries",
        value: positions.len().to_string(),
        bound: format!("1 to {MAX_STEP_QUERIES}"),
    })?;
    // Token ids travel with the rows of layer 0.
    let ids = core.run.as_ref().filter(|_| layer == 0 && rows.is_some()).map(|run| run.ids_of(positions.clone()).to_vec());
    Ok(v1::SequenceStep {
        lease: Some(core.lease),
        first_position: positions.start as u64,
        query_count,
        queries,
        rows: rows.unwrap_or_default(),
        token_ids: ids.unwrap_or_default(),
    })
}

pub(crate) fn decode_request(layer: usize, answer: v1::Answer, report: bool, steps: Vec<v1::SequenceStep>) -> v1::DecodeRequest {
    v1::DecodeRequest { request_id: 0, layer: layer as u32, answer: answer.into(), steps, report }
}

pub(crate) fn refusal(error: v1::Error) -> ClientError {
    ClientError::Refused { call: "Decode", code: Code::from_i32(error.code), message: error.message }
}

pub(crate) fn read_result(result: &v1::StepResult, out: &mut StepOut<'_>) -> Result<(), ClientError> {
    expect_count("StepResult.output (bytes)", result.output.len(), out.output.len() * 4)?;
    expect_count("StepResult.log_sum_exp (bytes)", result.log_sum_exp.len(), out.log_sum_exp.len() * 4)?;
    read_f32(&result.output, out.output);
    read_f32(&result.log_sum_exp, out.log_sum_exp);
    if let (Some(report), Some(costs)) = (out.report.as_deref_mut(), result.report) {
        *report += costs.into();
    }
    Ok(())
}

/// The rows of `part` out of rows `[lane][position]` of `positions`.
fn cut_rows(rows: &[u8], lanes: usize, positions: &Range<usize>, part: &Range<usize>) -> Bytes {
    let lane_bytes = rows.len() / lanes;
    let row_bytes = lane_bytes / positions.len();
    let first = (part.start - positions.start) * row_bytes;
    let cut = rows.chunks_exact(lane_bytes).flat_map(|lane| &lane[first..first + part.len() * row_bytes]);
    cut.copied().collect::<Vec<u8>>().into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cut_keeps_lanes_apart() {
        // Two lanes of three positions, two bytes a row.
        let rows = [0, 0, 1, 1, 2, 2, 10, 10, 11, 11, 12, 12];
        assert_eq!(&cut_rows(&rows, 2, &(5..8), &(6..8))[..], [1, 1, 2, 2, 11, 11, 12, 12]);
        assert_eq!(&cut_rows(&rows, 2, &(5..8), &(5..6))[..], [0, 0, 10, 10]);
    }
}
