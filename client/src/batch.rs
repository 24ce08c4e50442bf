//! Steps of several sessions at once: one message in Stream, one call of the decoder in Direct.

use std::ops::Range;
use std::sync::Arc;

use sluice_proto::v1;

use crate::client::Client;
use crate::error::ClientError;
use crate::session::{Session, Way};
use crate::step::{BatchStep, Step, StepOut};
use crate::stream::{decode_request, message, read_result, refusal};

/// Most sequences of one message.
const MESSAGE_STEPS_MAX: usize = 256;

impl Client {
    /// Performs one layer of a ragged batch: different sessions of this client, each with its own length and number of queries. Each
    /// succeeds or fails on its own; the result of a step does not depend on its batch.
    pub fn step_batch(&self, batch: &mut [BatchStep<'_>]) -> Vec<Result<(), ClientError>> {
        let mut results: Vec<Option<Result<(), ClientError>>> = batch.iter().map(|_| None).collect();
        let mut together = Vec::new();
        for (index, entry) in batch.iter().enumerate() {
            let alike = |&first: &usize| {
                let first: &BatchStep<'_> = &batch[first];
                first.step.layer == entry.step.layer
                    && first.step.attend == entry.step.attend
                    && first.session.core.model.id == entry.session.core.model.id
            };
            let streams = matches!(entry.session.way, Way::Stream(_)) && entry.session.truncating.is_none();
            if streams && together.first().is_none_or(alike) && together.len() < MESSAGE_STEPS_MAX {
                together.push(index);
            }
        }
        if together.len() > 1 {
            self.exchange_together(batch, &together, &mut results);
        }
        self.attend_together(batch, &mut results);
        // Those that are still open.
        let rest = batch.iter_mut().zip(results);
        rest.map(|(entry, result)| result.unwrap_or_else(|| one(entry.session, &entry.step, &mut entry.out))).collect()
    }

    /// Performs direct steps of one layer that share a decoder in one call: a GPU then serves them together.
    fn attend_together(&self, batch: &mut [BatchStep<'_>], results: &mut [Option<Result<(), ClientError>>]) {
        let direct = |entry: &BatchStep<'_>| match &entry.session.way {
            Way::Direct(way) if entry.session.truncating.is_none() => Some((entry.step.layer, way.decoder())),
            _ => None,
        };
        let Some((layer, decoder)) = batch.iter().find_map(direct) else { return };
        let mut members = Vec::new();
        for (index, entry) in batch.iter_mut().enumerate() {
            let alike = direct(entry).is_some_and(|(own_layer, own)| own_layer == layer && Arc::ptr_eq(&own, &decoder));
            if !alike {
                continue;
            }
            match entry.session.check(&entry.step, &entry.out) {
                Ok(positions) => members.push((index, positions, entry)),
                Err(error) => results[index] = Some(Err(error)),
            }
        }
        let mut requests = Vec::new();
        let mut asked = Vec::new();
        let mut attended = Vec::new();
        for (index, positions, entry) in &mut members {
            let BatchStep { session, step, out } = &mut **entry;
            let Way::Direct(way) = &mut session.way else { continue };
            match way.begin_step(&session.core, step, positions) {
                Ok(()) => {
                    requests.push(way.request(step, out));
                    asked.push(*index);
                }
                Err(error) => attended.push((*index, Err(error))),
            }
        }
        let costs = decoder.lock().step(layer, &mut requests);
        drop(requests);
        attended.extend(asked.into_iter().zip(costs).map(|(index, costs)| (index, Ok(costs))));
        for (index, positions, entry) in members {
            let Some(at) = attended.iter().position(|(of, _)| *of == index) else { continue };
            let BatchStep { session, step, out } = entry;
            let ended = match (attended.swap_remove(at).1, &mut session.way) {
                (Ok(costs), Way::Direct(way)) => way.end_step(&session.core, step, out, costs),
                (Ok(_), Way::Stream(_)) => continue,
                (Err(error), _) => Err(error),
            };
            results[index] = Some(session.settle(step, &positions, ended));
        }
    }

    /// Sends the steps of `indices` in one message. Steps that were not settled by it (the connection broke, open slots were full) keep
    /// `None`: each is then taken up by itself, with its session's own retries.
    fn exchange_together(&self, batch: &mut [BatchStep<'_>], indices: &[usize], results: &mut [Option<Result<(), ClientError>>]) {
        let mut sent: Vec<(usize, Range<usize>)> = Vec::new();
        let mut steps = Vec::new();
        for &index in indices {
            let entry = &batch[index];
            let checked = entry.session.check(&entry.step, &entry.out);
            let made = checked.and_then(|positions| Ok((message(&entry.session.core, &entry.step, &positions, false)?.step, positions)));
            match made {
                Ok((step, positions)) => {
                    steps.push(step);
                    sent.push((index, positions));
                }
                Err(error) => results[index] = Some(Err(error)),
            }
        }
        let Some((first, _)) = sent.first() else { return };
        let report = indices.iter().any(|&index| batch[index].out.report.is_some());
        let answer = match batch[*first].step.attend {
            crate::step::AttendMode::Sparse => v1::Answer::Output,
            crate::step::AttendMode::Dense => v1::Answer::OutputDense,
        };
        let request = decode_request(batch[*first].step.layer, answer, report, steps);
        let reply = self.connection().decode_stream().request(self.connection(), request);
        let Some(reply) = reply.ok().filter(|reply| reply.results.len() == sent.len()) else {
            for (index, _) in sent {
                if let Way::Stream(way) = &mut batch[index].session.way {
                    way.lost();
                }
            }
            return;
        };
        for ((index, positions), result) in sent.into_iter().zip(reply.results) {
            let entry = &mut batch[index];
            entry.session.core.boot_epoch = reply.boot_epoch;
            results[index] = match result.error {
                Some(error) if tonic::Code::from_i32(error.code) == tonic::Code::ResourceExhausted => None,
                Some(error) => Some(Err(refusal(error))),
                None => Some(read_result(&result, &mut entry.out).and_then(|()| entry.session.after_step(&entry.step, &positions))),
            };
        }
    }
}

fn one(session: &mut Session, step: &Step<'_>, out: &mut StepOut<'_>) -> Result<(), ClientError> {
    session.step(step, StepOut { output: out.output, log_sum_exp: out.log_sum_exp, report: out.report.as_deref_mut() })
}
