//! Steps over several sequences: what a sequence gets does not depend on who steps beside it.

#[path = "support/member.rs"]
mod member;
mod support;

use std::sync::Arc;

use member::{Member, SPARSE};
use rand::rngs::StdRng;
use rand::seq::SliceRandom;
use rand::{Rng, SeedableRng};
use sluice_kernels::decoder::{Attend, Decoder, StepError, StepReport, StepRequest};
use sluice_kernels::device::{DeviceKind, open};
use sluice_kernels::sequence::Sequence;
use sluice_kernels::shape::ModelShape;
use support::{ROW_TYPES, device_kinds, shape, shape_of, value};

/// A sequence of so many tokens; every second one has its whole chunks sealed.
fn grown(seed: usize, tokens: usize, shape: &Arc<ModelShape>) -> Member {
    let mut member = Member::empty(seed, shape);
    member.append(tokens);
    if seed.is_multiple_of(2) {
        member.seal();
    }
    member
}

/// What a member is asked, and what it answered.
struct Asked {
    first_position: usize,
    queries: Vec<f32>,
    attend: Attend,
    output: Vec<f32>,
    lse: Vec<f32>,
}

impl Asked {
    fn new(member: &Member, layer: usize, count: usize, attend: Attend) -> Self {
        let heads = member.sequence.part(layer).geometry.heads.query_heads();
        let first_position = member.sequence.committed() - count;
        let query = |at: usize| value(90 + layer, at / 64 + 40 * member.seed, first_position, at % 64);
        let queries: Vec<f32> = (0..count * heads * 64).map(query).collect();
        Self { first_position, attend, output: vec![0.0; queries.len()], lse: vec![0.0; count * heads], queries }
    }

    /// One query or several, sparse or dense.
    fn any(member: &Member, layer: usize, rng: &mut StdRng) -> Self {
        let attend = if rng.random_bool(0.2) { Attend::Dense } else { Attend::Sparse };
        let count = if rng.random_bool(0.2) { rng.random_range(2..5) } else { 1 };
        Self::new(member, layer, count, attend)
    }

    fn request<'a>(&'a mut self, sequence: &'a mut Sequence) -> StepRequest<'a> {
        let Self { first_position, queries, attend, output, lse } = self;
        StepRequest { sequence, first_position: *first_position, queries, attend: *attend, output, lse }
    }
}

/// Ten of them: more than one launch takes.
fn members(shape: &Arc<ModelShape>) -> Vec<Member> {
    let lengths = [1800, 300, 2600, 1401, 2049, 700, 1024, 1900, 2304, 1111];
    lengths.into_iter().enumerate().map(|(seed, tokens)| grown(seed, tokens, shape)).collect()
}

#[test]
fn a_sequence_has_the_same_bits_alone_and_in_any_batch() {
    for (kind, row_type) in device_kinds().into_iter().flat_map(|kind| ROW_TYPES.map(|row_type| (kind, row_type))) {
        let mut rng = StdRng::seed_from_u64(5);
        let mut decoder = Decoder::new(open(kind, 2).expect("device"));
        let mut alone = Decoder::new(open(kind, 2).expect("device"));
        let shape = shape_of(row_type);
        // Each has a twin that steps alone.
        let mut pairs: Vec<(Member, Member)> = members(&shape).into_iter().zip(members(&shape)).collect();
        let mut selected = 0;
        for (round, taken) in [10, 1, 3, 9, 2, 4].into_iter().enumerate() {
            pairs.shuffle(&mut rng);
            let pairs = &mut pairs[..taken];
            for layer in 0..3 {
                let mut asked: Vec<Asked> = pairs.iter().map(|(member, _)| Asked::any(member, layer, &mut rng)).collect();
                let mut batch: Vec<_> =
                    asked.iter_mut().zip(&mut *pairs).map(|(asked, (member, _))| asked.request(&mut member.sequence)).collect();
                for (index, report) in decoder.step(layer, &mut batch).into_iter().enumerate() {
                    selected += report.unwrap_or_else(|error| panic!("{kind}, request {index}: {error}")).selected_rows;
                }
                drop(batch);
                for (asked, (_, twin)) in asked.iter_mut().zip(&mut *pairs) {
                    let together = (asked.output.clone(), asked.lse.clone());
                    asked.output.fill(-1.0);
                    asked.lse.fill(-1.0);
                    alone.step_one(layer, &mut asked.request(&mut twin.sequence)).expect("a step");
                    let (seed, position, attend) = (twin.seed, asked.first_position, asked.attend);
                    assert!(
                        together == (asked.output.clone(), asked.lse.clone()),
                        "{kind}, {row_type:?}, round {round}, layer {layer}: sequence {seed} at {position}, {attend:?}"
                    );
                }
            }
            for (member, twin) in pairs {
                if member.sequence.tokens_until_full() > 1 {
                    member.append(1);
                    twin.append(1);
                }
            }
        }
        assert!(selected > 0, "some steps were sparse");
    }
}

#[test]
fn each_of_several_queries_is_what_it_is_alone() {
    for kind in device_kinds() {
        let mut decoder = Decoder::new(open(kind, 2).expect("device"));
        let mut member = grown(3, 1500, &shape());
        let mut together = Asked::new(&member, 0, 4, Attend::Sparse);
        together.queries.iter_mut().enumerate().for_each(|(index, value)| *value += (index / 256) as f32 * 0.5);
        decoder.step_one(0, &mut together.request(&mut member.sequence)).expect("a step");
        for index in 0..4 {
            let mut alone = Asked::new(&member, 0, 1, Attend::Sparse);
            alone.first_position = together.first_position + index;
            alone.queries.copy_from_slice(&together.queries[index * 256..(index + 1) * 256]);
            decoder.step_one(0, &mut alone.request(&mut member.sequence)).expect("a step");
            assert!(alone.output == together.output[index * 256..(index + 1) * 256], "{kind}: output of query {index}");
            assert!(alone.lse == together.lse[index * 4..(index + 1) * 4], "{kind}: log-sum-exps of query {index}");
        }
    }
}

#[test]
fn hot_rows_of_a_batch_are_each_sequences_own() {
    for kind in device_kinds() {
        let mut decoder = Decoder::new(open(kind, 2).expect("device"));
        let mut members = members(&shape());
        members.iter_mut().for_each(|member| member.sequence.set_hot_rows(200));
        let mut answers = Vec::new();
        for turn in 0..3 {
            // Whoever sits where changes in between; what is hot does not.
            if turn == 1 {
                members.reverse();
            }
            let mut asked: Vec<Asked> = members.iter().map(|member| Asked::new(member, 0, 1, Attend::Sparse)).collect();
            let mut batch: Vec<_> = asked.iter_mut().zip(&mut members).map(|(asked, member)| asked.request(&mut member.sequence)).collect();
            let reports: Vec<StepReport> = decoder.step(0, &mut batch).into_iter().map(|report| report.expect("a step")).collect();
            drop(batch);
            for (report, member) in reports.iter().zip(&members) {
                let expected = if turn == 0 { 0 } else { report.selected_rows };
                assert_eq!(report.hot_rows, expected, "{kind}, turn {turn}: sequence {}", member.seed);
            }
            let mut by_seed: Vec<_> = members.iter().zip(asked).map(|(member, asked)| (member.seed, asked.output)).collect();
            by_seed.sort_by_key(|(seed, _)| *seed);
            answers.push(by_seed);
        }
        assert!(answers[0] == answers[1] && answers[1] == answers[2], "{kind}: the same answers");
    }
}

#[test]
fn hot_places_move_to_the_lanes_that_miss_and_no_bit_changes() {
    for kind in device_kinds() {
        let mut decoder = Decoder::new(open(kind, 2).expect("device"));
        let mut members = [0, 0].map(|seed| grown(seed, 2600, &shape()));
        // The second one has places for what it may select and no more, so it has none to move.
        members[0].sequence.set_hot_rows(640);
        members[1].sequence.set_hot_rows(SPARSE.selected_tokens(2600));
        let mut rng = StdRng::seed_from_u64(8);
        let lanes = members[0].sequence.part(0).lanes.len();
        let (mut before, mut after) = (0, 0);
        for round in 0..64 {
            for layer in [0, 2] {
                let mut asked = [0, 1].map(|member| Asked::new(&members[member], layer, 1, Attend::Sparse));
                // Lane 0 asks the same again, which is hot; the others ask anew.
                let own = asked[0].queries.len() / lanes;
                asked[0].queries[own..].iter_mut().for_each(|x| *x = rng.random_range(-1.0..1.0));
                asked[1].queries = asked[0].queries.clone();
                let [first, second] = &mut members;
                let [ask, twin] = &mut asked;
                let hot = decoder.step_one(layer, &mut ask.request(&mut first.sequence)).expect("a step").hot_rows;
                decoder.step_one(layer, &mut twin.request(&mut second.sequence)).expect("a step");
                assert!(ask.output == twin.output && ask.lse == twin.lse, "{kind}, round {round}, layer {layer}");
                *(if round < 8 { &mut before } else { &mut after }) += hot;
            }
        }
        let places = members[0].sequence.hot_places();
        if matches!(kind, DeviceKind::Cuda { .. }) {
            assert_eq!((places.len(), places.iter().sum::<usize>()), (2 * lanes, 2 * lanes * 640), "no place is lost");
            for layer in places.chunks_exact(lanes) {
                assert!(layer[0] < 640 && layer[1..].iter().all(|&places| places > 640), "{places:?}");
            }
            let others = members[1].sequence.hot_places();
            assert!(others[0] < 640 && others.iter().all(|&places| places == others[0]), "nothing to move: {others:?}");
        } else {
            assert!(places.is_empty(), "{kind}: pools of the processor stay as they are");
        }
        assert!(before > 0 && after > 7 * before, "{kind}: {before} hits in 8 rounds, {after} in 56");
    }
}

#[test]
fn a_refused_request_takes_nobody_with_it() {
    for kind in device_kinds() {
        let mut decoder = Decoder::new(open(kind, 2).expect("device"));
        let mut members: Vec<Member> = (0..3).map(|seed| grown(seed, 1500 + 10 * seed, &shape())).collect();
        let mut asked: Vec<Asked> = members.iter().map(|member| Asked::new(member, 0, 1, Attend::Sparse)).collect();
        let expected: Vec<_> = asked
            .iter_mut()
            .zip(&mut members)
            .map(|(asked, member)| {
                decoder.step_one(0, &mut asked.request(&mut member.sequence)).expect("a step");
                asked.output.clone()
            })
            .collect();
        asked[1].queries[7] = f32::NAN;
        asked.iter_mut().for_each(|asked| asked.output.fill(0.0));
        let mut batch: Vec<_> = asked.iter_mut().zip(&mut members).map(|(asked, member)| asked.request(&mut member.sequence)).collect();
        let results = decoder.step(0, &mut batch);
        drop(batch);
        assert!(matches!(results[1], Err(StepError::NotFinite { index: 7 })), "{:?}", results[1]);
        assert!(asked[1].output.iter().all(|&value| value == 0.0), "nothing is written for it");
        for other in [0, 2] {
            assert!(results[other].is_ok() && asked[other].output == expected[other], "{kind}: sequence {other}");
        }
    }
}
