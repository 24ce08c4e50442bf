//! Append and Decode: errors travel inside the replies, so one bad request does not end a stream.

use std::collections::HashSet;
use std::time::{Duration, Instant};

use sluice_proto::v1;
use tokio::sync::{mpsc, watch};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Status, Streaming};

use crate::decode::{Answer, DecodeError, StepDone, StepWork};
use crate::engine::command::LeaseKey;
use crate::engine::{EngineError, EngineHandle};
use crate::server::Stage;
use crate::service::{convert, refuse};

/// Replies that a client may leave unread before its requests are no longer read.
const REPLIES_UNREAD: usize = 4;
/// How long a stream must have been silent to count as idle when the daemon stops.
const IDLE: Duration = Duration::from_millis(200);

/// `Append`: stores rows in the order of the messages; waits while the open slots are full.
pub(super) async fn append(engine: &EngineHandle, mut requests: Streaming<v1::AppendRequest>) -> Result<v1::AppendResponse, Status> {
    let mut response = v1::AppendResponse { boot_epoch: engine.boot_epoch(), ..v1::AppendResponse::default() };
    while let Some(request) = requests.message().await? {
        let bytes = request.rows.len() as u64;
        let lease = convert::lease(request.lease.as_ref())?;
        let work = StepWork {
            lease,
            layer: request.layer as usize,
            answer: Answer::Nothing,
            first_position: request.first_position,
            count: None,
            queries: prost::bytes::Bytes::new(),
            rows: request.rows,
            token_ids: request.token_ids,
        };
        let done = store(engine, work).await?;
        engine.touch(lease);
        response.committed_tokens = done.committed;
        response.appended_bytes += bytes;
    }
    Ok(response)
}

async fn store(engine: &EngineHandle, work: StepWork) -> Result<StepDone, Status> {
    let (begin, patience) = (Instant::now(), engine.config().seal_wait);
    loop {
        let mut results = engine.decoder()?.steps(vec![work.clone()]).await?;
        match results.pop() {
            Some(Ok(done)) => return Ok(done),
            Some(Err(error)) if error.is_full() && begin.elapsed() < patience => tokio::time::sleep(Duration::from_millis(1)).await,
            Some(Err(error)) => {
                engine.counters().refused(error.refusal()).add(1);
                return Err(error.into());
            }
            None => return Err(Status::internal("the decoder answered nothing")),
        }
    }
}

/// `Decode`: one reply for each request, in their order.
pub(super) fn decode(
    engine: EngineHandle,
    mut requests: Streaming<v1::DecodeRequest>,
    mut stage: watch::Receiver<Stage>,
) -> ReceiverStream<Result<v1::DecodeResponse, Status>> {
    let (sender, receiver) = mpsc::channel(REPLIES_UNREAD);
    tokio::spawn(async move {
        loop {
            let request = tokio::select! {
                request = requests.message() => request,
                () = sender.closed() => return,
                () = idle_at_drain(&mut stage) => Err(Status::unavailable("the daemon is stopping; the stream was idle")),
            };
            let reply = match request {
                Ok(Some(request)) => Ok(answer(&engine, request).await),
                Ok(None) => return,
                Err(status) => Err(status),
            };
            let is_end = reply.is_err();
            if sender.send(reply).await.is_err() || is_end {
                return;
            }
        }
    });
    ReceiverStream::new(receiver)
}

/// Returns when the daemon is stopping and nothing has come for a while since.
async fn idle_at_drain(stage: &mut watch::Receiver<Stage>) {
    // An error means that the daemon is gone altogether.
    let _ = stage.wait_for(|stage| matches!(stage, Stage::Draining | Stage::Stopped)).await.map(drop);
    tokio::time::sleep(IDLE).await;
}

async fn answer(engine: &EngineHandle, request: v1::DecodeRequest) -> v1::DecodeResponse {
    let (request_id, layer) = (request.request_id, request.layer);
    let sequences: Vec<u64> = request.steps.iter().map(|step| step.lease.as_ref().map_or(0, |lease| lease.sequence_id)).collect();
    let report = request.report;
    let results = match batch(engine, request) {
        Ok(works) => results(engine, works, report).await,
        Err(error) => refuse_all(engine, &sequences, &error),
    };
    v1::DecodeResponse { boot_epoch: engine.boot_epoch(), request_id, layer, results }
}

/// The steps of a request, or what is wrong with the request as a whole.
fn batch(engine: &EngineHandle, request: v1::DecodeRequest) -> Result<Vec<StepWork>, EngineError> {
    let most = engine.config().decode_batch_max;
    if request.steps.is_empty() || request.steps.len() > most {
        return Err(EngineError::invalid("steps", request.steps.len(), format!("1 to {most} sequences")));
    }
    let answer = match request.answer() {
        v1::Answer::Output => Answer::Sparse,
        v1::Answer::OutputDense => Answer::Dense,
        v1::Answer::Rows => Answer::Rows,
        v1::Answer::None => Answer::Nothing,
        v1::Answer::Unspecified => return Err(EngineError::invalid("answer", request.answer, "1 to 4")),
    };
    let layer = request.layer as usize;
    let mut seen = HashSet::new();
    let steps = request.steps.into_iter().map(|step| {
        let lease = convert::lease(step.lease.as_ref())?;
        if !seen.insert(lease.sequence) {
            return Err(EngineError::invalid("steps.lease.sequence_id", lease.sequence, "different sequences"));
        }
        Ok(StepWork {
            lease,
            layer,
            answer,
            first_position: step.first_position,
            count: Some(step.query_count as usize),
            queries: step.queries,
            rows: step.rows,
            token_ids: step.token_ids,
        })
    });
    steps.collect()
}

async fn results(engine: &EngineHandle, works: Vec<StepWork>, report: bool) -> Vec<v1::StepResult> {
    let leases: Vec<LeaseKey> = works.iter().map(|work| work.lease).collect();
    let sequences: Vec<u64> = leases.iter().map(|lease| lease.sequence).collect();
    let done = match engine.decoder() {
        Ok(decoder) => decoder.steps(works).await,
        Err(error) => Err(error),
    };
    match done {
        Ok(results) => {
            let pairs = leases.iter().zip(results);
            pairs.map(|(lease, result)| step_result(engine, lease.sequence, result, report)).collect()
        }
        Err(error) => refuse_all(engine, &sequences, &error),
    }
}

fn refuse_all(engine: &EngineHandle, sequences: &[u64], error: &EngineError) -> Vec<v1::StepResult> {
    // A request without steps is answered as well.
    let sequences = if sequences.is_empty() { &[0] } else { sequences };
    let refused = |&sequence_id: &u64| v1::StepResult {
        sequence_id,
        error: Some(refuse(engine, error.refusal(), error.to_string())),
        ..v1::StepResult::default()
    };
    sequences.iter().map(refused).collect()
}

fn step_result(engine: &EngineHandle, sequence_id: u64, result: Result<StepDone, DecodeError>, report: bool) -> v1::StepResult {
    let done = match result {
        Ok(done) => done,
        Err(error) => {
            let error = Some(refuse(engine, error.refusal(), error.to_string()));
            return v1::StepResult { sequence_id, error, ..v1::StepResult::default() };
        }
    };
    let lanes = done
        .rows
        .into_iter()
        .map(|lane| v1::LaneRows { positions: lane.positions.into_iter().map(u64::from).collect(), rows: lane.rows.into() });
    let costs = &done.report;
    let report = report.then_some(v1::StepReport {
        selected_rows: costs.selected_rows,
        hot_rows: costs.hot_rows,
        row_bytes: costs.row_bytes,
        label_bytes: costs.label_bytes,
        score_nanoseconds: costs.score.as_nanos() as u64,
        select_nanoseconds: costs.select.as_nanos() as u64,
        gather_nanoseconds: costs.gather.as_nanos() as u64,
        attend_nanoseconds: costs.attend.as_nanos() as u64,
        fused_nanoseconds: costs.fused.as_nanos() as u64,
    });
    v1::StepResult {
        sequence_id,
        error: None,
        output: done.output.into(),
        log_sum_exp: done.log_sum_exp.into(),
        rows: lanes.collect(),
        report,
    }
}
