//! Scores of several sequences that have their first chunks in common: the same bits jointly as each alone.

use std::ops::Range;
use std::sync::Arc;

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use sluice_kernels::budget::Settings;
use sluice_kernels::device::cuda::Gpu;
use sluice_kernels::device::cuda::batch::{Batch, BatchShape};
use sluice_kernels::device::cuda::compile::Compiler;
use sluice_kernels::device::cuda::cut::Cut;
use sluice_kernels::device::cuda::joint::{Joins, LEAST_COMMON, most_members};
use sluice_kernels::device::cuda::seat::{Kept, Seat, SeatShape};
use sluice_kernels::shape::RowType;

use crate::batch::{Asked, Hosted, Made, PLAN, counts, gpu, hosted, settings};
use crate::data::Shape;

/// Sequences of one batch, whose chunks are made-up chunks of one layer.
struct Family {
    hosted: Hosted,
    batch: Batch,
    members: Vec<Member>,
}

/// One of them: which chunks it has, by number of the layer's, its length, and settings of its own.
struct Member {
    chunks: Vec<usize>,
    length: usize,
    settings: Settings,
}

impl Family {
    /// Members with the layer's first `common` chunks and `own` others each, the last one of which is full but for `short` rows.
    fn new(gpu: &Gpu, compiler: &Compiler, shape: Shape, plan: &str, sinks: u32, common: usize, owns: &[(usize, usize)]) -> Self {
        let chunks = common + owns.iter().map(|own| own.0).sum::<usize>();
        let hosted = hosted(gpu, Shape { tokens: 256 * chunks, ..shape }, plan, 11 + common as u64);
        let mut next = common;
        let member = |(slot, &(own, short)): (u32, &(usize, usize))| {
            let chunks = (0..common).chain(next..next + own).collect::<Vec<_>>();
            next += own;
            Member { length: 256 * chunks.len() - short, chunks, settings: Settings { sink_tokens: sinks + 3 * slot, ..settings(8) } }
        };
        let members: Vec<Member> = (0..).zip(owns).map(member).collect();
        let longest = members.iter().map(|member| member.chunks.len()).max().unwrap_or(0);
        let count = settings(8).selected_tokens(256 * longest);
        let (seat, one) = hosted.shape(Kept::Pool(count), count);
        let shape = BatchShape { slots: members.len(), ..one };
        let mut batch = hosted.batch(gpu, compiler, &shape);
        members.iter().enumerate().for_each(|(slot, member)| sit(&hosted, gpu, &mut batch, &seat, slot, member));
        let mut family = Self { hosted, batch, members };
        family.share_labels(common);
        family
    }

    /// Everybody has the first one's label pages for the chunks in common.
    fn share_labels(&mut self, common: usize) {
        let first = self.batch.seat(0).expect("a seat").label_pages();
        for slot in 1..self.members.len() {
            let seat = self.batch.seat(slot).expect("a seat");
            let pages: Vec<_> = first[..common].iter().chain(&seat.label_pages()[common..]).cloned().collect();
            seat.set_label_pages(self.batch.stream(), 0, &pages).expect("pages");
        }
    }

    fn set_length(&mut self, slot: usize, length: usize) {
        self.members[slot].length = length;
        self.batch.set_length(slot, length, &self.members[slot].settings, None).expect("a length");
    }

    fn queries(&mut self) -> Vec<f32> {
        self.hosted.layer.queries(self.members.len())
    }

    /// A step with `joins` over the same queries, hot or not.
    fn step(&mut self, joins: &Joins, queries: &[f32]) -> Vec<Made> {
        let slots = self.members.len();
        self.batch.set_queries(0, queries).expect("queries");
        let row_bytes = self.hosted.layer.geometry.row_bytes();
        let newest: Vec<u8> = self.members.iter().flat_map(|member| self.newest(member, row_bytes)).collect();
        self.batch.set_new_rows(0, &newest).expect("newest rows");
        self.batch.join(joins.clone()).expect("joins");
        self.batch.send_states().expect("states");
        self.batch.enqueue_layer(0, 0..slots, Cut::Halves).expect("a step");
        let (output, lse) = self.batch.outputs(0).expect("outputs");
        let (of_output, of_lse) = (output.len() / slots, lse.len() / slots);
        let part = |values: &[f32], each: usize, slot: usize| values[slot * each..(slot + 1) * each].to_vec();
        let made = |slot| Made {
            keys: self.batch.keys(slot).expect("keys"),
            positions: self.batch.positions(slot).expect("positions"),
            output: part(&output, of_output, slot),
            lse: part(&lse, of_lse, slot),
        };
        (0..slots).map(made).collect()
    }

    fn newest(&self, member: &Member, row_bytes: usize) -> Vec<u8> {
        let (page, last) = (&self.hosted.layer.pages[member.chunks[(member.length - 1) / 256]], member.length - 1);
        let row = |lane| page[self.hosted.layer.geometry.row_offset(lane, last)..][..row_bytes].to_vec();
        (0..self.hosted.layer.shape.lanes).flat_map(row).collect()
    }

    /// What a slot made is what the reference makes.
    fn assert_as_the_reference(&self, what: &str, slot: usize, queries: &[f32], made: &Made) {
        let Member { chunks, length, settings } = &self.members[slot];
        let each = queries.len() / self.members.len();
        let query = &queries[slot * each..(slot + 1) * each];
        let asked = Asked { chunks, length: *length, settings, query };
        self.hosted.assert_as_the_reference(&format!("{what}: slot {slot}"), &asked, made);
    }
}

fn sit(hosted: &Hosted, gpu: &Gpu, batch: &mut Batch, shape: &SeatShape, slot: usize, member: &Member) {
    let places: Vec<u32> = member.chunks.iter().map(|&chunk| hosted.places[chunk]).collect();
    let seat = Arc::new(Seat::new(gpu, batch.stream(), shape).expect("a seat"));
    seat.set_host_places(batch.stream(), 0, &places).expect("places");
    batch.sit(slot, &seat).expect("seated");
    for (at, &chunk) in member.chunks.iter().enumerate() {
        batch.make_labels(0, &seat, at, &hosted.host_pages(chunk..chunk + 1)).expect("labels");
    }
    let tail = member.settings.horizon(member.length) / 256;
    hosted.write_tail(batch, slot, tail, &places[tail..member.length.div_ceil(256)]);
    batch.set_length(slot, member.length, &member.settings, None).expect("a length");
}

fn join_of(slots: Range<usize>, most: usize) -> Joins {
    Joins::of(slots, most, |_, _| LEAST_COMMON)
}

fn differs(one: &[Made], other: &[Made]) -> bool {
    one.iter().zip(other).all(|(one, other)| one.keys != other.keys && one.output != other.output)
}

#[test]
fn joint_scores_have_the_bits_of_each_alone() {
    let Some((gpu, compiler)) = gpu() else { return };
    let shape = |lanes, group, dim, row_type| Shape { lanes, group, dim, tokens: 0, row_type };
    let cases = [
        (shape(8, 4, 128, RowType::F16), PLAN, 4),
        (shape(2, 3, 64, RowType::Fp8), "32@4", 300),
        (shape(3, 1, 64, RowType::F16), "8@4+16@2", 4),
        (shape(1, 1, 128, RowType::Bf16), "8@16+8@8+16@4+24@2", 270),
        (shape(3, 2, 96, RowType::F16), "24@2", 0),
        (shape(2, 8, 128, RowType::F16), PLAN, 4),
        (shape(1, 7, 64, RowType::F32), "8@16+8@2", 260),
        (shape(1, 4, 256, RowType::F16), "64@4+64@4", 4),
    ];
    // One has nothing of its own before its horizon, and one ends within the chunks in common.
    for (index, (shape, plan, sinks)) in cases.into_iter().enumerate() {
        let owns = [(9, 40), (1, 3), (2, 130), (17, 255)];
        let most = most_members(shape.group);
        for members in 2..=most {
            let what = format!("{shape:?}, {plan}, {members} members");
            let common = [40, 17, 64][(index + members) % 3];
            let mut family = Family::new(&gpu, &compiler, shape, plan, sinks, common, &owns[..members]);
            let (asked, others) = (family.queries(), family.queries());
            let alone = family.step(&Joins::default(), &asked);
            let (_, misses) = counts(&mut family.batch);
            assert!(misses > 0, "{what}: nothing was hot at first");
            assert!(family.step(&Joins::default(), &asked) == alone, "{what}: the same again");
            let (hits, misses) = counts(&mut family.batch);
            assert!(hits > 0 && misses == 0, "{what}: {hits} hits, {misses} misses of rows that were there");
            let other = family.step(&Joins::default(), &others);
            assert!(differs(&alone, &other), "queries that tell steps apart");
            let joins = family.batch.joins_of(0..members);
            assert_eq!(joins, join_of(0..members, most), "{what}: all are joined");
            let joint = family.step(&joins, &asked);
            let in_common = family.batch.common_chunks_of(0);
            assert_eq!(in_common, common, "{what}: chunks in common");
            for slot in 0..members {
                assert!(joint[slot].keys == alone[slot].keys, "{what}: keys of slot {slot}");
                assert!(joint[slot] == alone[slot], "{what}: slot {slot}");
                family.assert_as_the_reference(&what, slot, &asked, &joint[slot]);
            }
            assert!(family.step(&joins, &others) == other, "{what}: other queries");
        }
    }
}

#[test]
fn joint_scores_follow_the_lengths() {
    let Some((gpu, compiler)) = gpu() else { return };
    let shape = Shape { lanes: 2, group: 4, dim: 64, tokens: 0, row_type: RowType::F16 };
    let mut family = Family::new(&gpu, &compiler, shape, "8@4+16@2", 4, 70, &[(30, 0), (30, 0), (30, 0)]);
    let joins = family.batch.joins_of(0..3);
    family.batch.join(joins.clone()).expect("joins");
    let graph = family.batch.capture(|| family.batch.enqueue_layer(0, 0..3, Cut::Whole)).expect("a graph");
    let mut rng = StdRng::seed_from_u64(4);
    for round in 0..12 {
        // Some end within the chunks in common, and in some rounds one has nothing to select from.
        for slot in 0..3 {
            let length = if round % 4 == slot { 200 + round } else { rng.random_range(256 * 12..256 * 100) };
            family.set_length(slot, length);
            let tail = family.members[slot].settings.horizon(length) / 256;
            let member = &family.members[slot];
            let places: Vec<u32> = member.chunks[tail..length.div_ceil(256)].iter().map(|&chunk| family.hosted.places[chunk]).collect();
            family.hosted.write_tail(&family.batch, slot, tail, &places);
        }
        let queries = family.queries();
        let joint = family.step(&joins, &queries);
        let scratch = family.queries();
        family.step(&Joins::default(), &scratch);
        let alone = family.step(&Joins::default(), &queries);
        assert!(joint == alone, "round {round}");
        // The captured graph finds the same, whatever the lengths were when it was captured.
        family.step(&Joins::default(), &scratch);
        family.batch.set_queries(0, &queries).expect("queries");
        family.batch.join(joins.clone()).expect("joins");
        family.batch.send_states().expect("states");
        graph.launch().expect("a launch");
        let keys: Vec<Vec<u16>> = (0..3).map(|slot| family.batch.keys(slot).expect("keys")).collect();
        assert!(keys.iter().zip(&alone).all(|(keys, alone)| *keys == alone.keys), "round {round}, in a graph");
    }
}
