//! Steps of sequences: everything of a step is checked before anything of it is stored.

use sluice_kernels::decoder::{Attend, Decoder, StepReport, StepRequest};
use sluice_kernels::rows::{first_non_finite, first_non_finite_value};
use sluice_kernels::sequence::Sequence;
use sluice_kernels::slot::CHUNK_TOKENS;

use crate::decode::{Answer, DecodeError, StepDone, StepWork};

/// Most query tokens of a step.
const QUERIES_MAX: usize = 4096;

/// Bytes of a reply beside the rows of its steps.
const REPLY_BYTES: usize = 1024;

/// A step whose rows are stored, and room for what it answers.
pub(super) struct Stored {
    queries: Vec<f32>,
    output: Vec<f32>,
    lse: Vec<f32>,
}

/// Checks a step and stores its new rows.
pub(super) fn store(sequence: &mut Sequence, step: &StepWork, message_bytes_max: usize) -> Result<Stored, DecodeError> {
    let count = count_of(sequence, step)?;
    if step.answer == Answer::Rows {
        check_answer(sequence, step, message_bytes_max)?;
    }
    let queries = check(sequence, step, count)?;
    let first = step.first_position as usize;
    if !step.rows.is_empty() {
        sequence.append(step.layer, first, &step.rows)?;
        if step.layer == 0 {
            sequence.write_tokens(first, &step.token_ids)?;
        }
    }
    let heads = sequence.part(step.layer).geometry.heads.query_heads();
    let wanted = matches!(step.answer, Answer::Sparse | Answer::Dense);
    let (values, heads) = if wanted { (queries.len(), count * heads) } else { (0, 0) };
    Ok(Stored { queries, output: vec![0.0; values], lse: vec![0.0; heads] })
}

/// A stored step and its sequence.
pub(super) struct Attending<'a> {
    pub(super) step: &'a StepWork,
    pub(super) sequence: &'a mut Sequence,
    pub(super) stored: &'a mut Stored,
}

/// Attends steps of one layer together.
pub(super) fn attend(decoder: &mut Decoder, layer: usize, together: &mut [Attending<'_>]) -> Vec<Result<StepDone, DecodeError>> {
    let mut requests = Vec::new();
    for Attending { step, sequence, stored } in together.iter_mut() {
        let attend = if step.answer == Answer::Dense { Attend::Dense } else { Attend::Sparse };
        let (first_position, Stored { queries, output, lse }) = (step.first_position as usize, &mut **stored);
        if matches!(step.answer, Answer::Sparse | Answer::Dense) {
            requests.push(StepRequest { sequence, first_position, queries, attend, output, lse });
        }
    }
    let mut reports = decoder.step(layer, &mut requests).into_iter();
    let answer = |Attending { step, sequence, stored }: &mut Attending<'_>| match step.answer {
        Answer::Nothing => Ok(StepDone::default()),
        Answer::Rows => {
            let rows = decoder.rows(layer, sequence, step.first_position as usize, &stored.queries)?;
            Ok(StepDone { rows, ..StepDone::default() })
        }
        Answer::Sparse | Answer::Dense => {
            // There is a report for each request.
            let report = reports.next().unwrap_or_else(|| Ok(StepReport::default()))?;
            Ok(StepDone { output: le_bytes(&stored.output), log_sum_exp: le_bytes(&stored.lse), report, ..StepDone::default() })
        }
    };
    together.iter_mut().map(answer).collect()
}

/// Refuses an answer in rows that no message could carry.
fn check_answer(sequence: &Sequence, step: &StepWork, message_bytes_max: usize) -> Result<(), DecodeError> {
    let settings = sequence.settings();
    // Without labels every row is selected. A length beyond the sequence's is refused by its own name later.
    let rows = |length: usize| {
        let selected = if sequence.is_calibrated() { settings.selected_tokens(length) } else { settings.horizon(length) };
        selected + length - settings.horizon(length)
    };
    let length = step.first_position.saturating_add(1).min(sequence.written(step.layer) as u64 + 1) as usize;
    let geometry = sequence.part(step.layer).geometry;
    let most = message_bytes_max.saturating_sub(REPLY_BYTES);
    // A position takes up to ten bytes beside its row.
    let bytes = rows(length).saturating_mul(geometry.heads.lanes()).saturating_mul(geometry.row_bytes() + 10);
    if bytes > most {
        let bound = format!("0 to {most} bytes a message: lower settings.budget, or raise limits.message_bytes");
        return Err(DecodeError::invalid("rows of ANSWER_ROWS", format!("{bytes} bytes"), bound));
    }
    Ok(())
}

/// Tokens of a step: as told, or as many as there are rows.
fn count_of(sequence: &Sequence, step: &StepWork) -> Result<usize, DecodeError> {
    sequence.check_layer(step.layer)?;
    if let Some(count) = step.count {
        let fits = (1..=QUERIES_MAX).contains(&count);
        return if fits { Ok(count) } else { Err(DecodeError::invalid("query_count", count, format!("1 to {QUERIES_MAX}"))) };
    }
    let geometry = sequence.part(step.layer).geometry;
    let unit = geometry.heads.lanes() * geometry.row_bytes();
    if step.rows.is_empty() || !step.rows.len().is_multiple_of(unit) {
        let bound = format!("positive multiples of {unit} bytes, the rows of a token in layer {}", step.layer);
        return Err(DecodeError::invalid("rows", format!("{} bytes", step.rows.len()), bound));
    }
    Ok(step.rows.len() / unit)
}

/// Checks every field of a step of `count` tokens; answers with its queries.
fn check(sequence: &Sequence, step: &StepWork, count: usize) -> Result<Vec<f32>, DecodeError> {
    if step.answer == Answer::Rows && count != 1 {
        return Err(DecodeError::invalid("query_count", count, "1 for ANSWER_ROWS"));
    }
    check_rows(sequence, step, count)?;
    let queries = check_queries(sequence, step, count)?;
    let end = step.first_position.saturating_add(count as u64);
    let written = sequence.written(step.layer) as u64;
    if step.rows.is_empty() && end > written {
        return Err(DecodeError::invalid("first_position + query_count", end, format!("1 to {written}, the rows of layer {}", step.layer)));
    }
    Ok(queries)
}

fn check_rows(sequence: &Sequence, step: &StepWork, count: usize) -> Result<(), DecodeError> {
    if step.rows.is_empty() {
        let needless = step.answer != Answer::Nothing;
        return if needless { Ok(()) } else { Err(DecodeError::invalid("rows", "0 bytes", "rows, with ANSWER_NONE")) };
    }
    let geometry = sequence.part(step.layer).geometry;
    let expected = count * geometry.heads.lanes() * geometry.row_bytes();
    if step.rows.len() != expected {
        let bound = format!("{expected} bytes: {} tokens of layer {}", count, step.layer);
        return Err(DecodeError::invalid("rows", format!("{} bytes", step.rows.len()), bound));
    }
    let next = sequence.written(step.layer) as u64;
    if step.first_position != next {
        return Err(DecodeError::invalid("first_position", step.first_position, format!("{next}, the next row of layer {}", step.layer)));
    }
    if step.layer == 0 && step.token_ids.len() != count {
        return Err(DecodeError::invalid("token_ids", step.token_ids.len(), format!("{} ids with layer 0", count)));
    }
    check_room(sequence, next as usize + count)?;
    if let Some(element) = first_non_finite(&step.rows, sequence.shape().row_type) {
        return Err(DecodeError::invalid("rows", format!("element {element} is not finite"), "finite values"));
    }
    Ok(())
}

/// Full open slots pass; a run that is longer than they are does not.
fn check_room(sequence: &Sequence, wanted: usize) -> Result<(), DecodeError> {
    let slots = sequence.open().layout().slots as usize;
    let most = (sequence.committed() / CHUNK_TOKENS + slots) * CHUNK_TOKENS;
    sequence.check_place(wanted.min(most))?;
    if wanted > most {
        let bound = format!("runs up to token {most}: {slots} open slots of {CHUNK_TOKENS} tokens, {} committed", sequence.committed());
        return Err(DecodeError::invalid("rows", format!("a run up to token {wanted}"), bound));
    }
    Ok(())
}

fn check_queries(sequence: &Sequence, step: &StepWork, count: usize) -> Result<Vec<f32>, DecodeError> {
    if step.answer == Answer::Nothing {
        return Ok(Vec::new());
    }
    let geometry = sequence.part(step.layer).geometry;
    let values = count * geometry.heads.query_heads() * geometry.head_dim;
    if step.queries.len() != values * 4 {
        let bound = format!("{} bytes: {} queries of layer {}", values * 4, count, step.layer);
        return Err(DecodeError::invalid("queries", format!("{} bytes", step.queries.len()), bound));
    }
    let queries: Vec<f32> =
        step.queries.chunks_exact(4).map(|bytes| f32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]])).collect();
    match first_non_finite_value(&queries) {
        Some(index) => Err(DecodeError::invalid("queries", format!("value {index} is not finite"), "finite values")),
        None => Ok(queries),
    }
}

fn le_bytes(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|value| value.to_le_bytes()).collect()
}
