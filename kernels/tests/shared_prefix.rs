//! Sequences that have chunks in common: each is as it would be alone, and a device keeps what they share once.

#[path = "support/member.rs"]
mod member;
mod support;

use std::sync::Arc;

use member::{Member, SPARSE};
use sluice_kernels::decoder::{Attend, Decoder, StepReport, StepRequest};
use sluice_kernels::device::{DeviceKind, open};
use sluice_kernels::shape::{LaneKind, LayerShape, ModelShape, RowType};
use sluice_kernels::shared::board::BoardState;
use sluice_kernels::slot::SlotClass;
use support::{ROW_TYPES, TestDaemon, calibration, device_kinds, set_scales, shape, shape_of, value};

impl Member {
    fn grown(seed: usize, tokens: usize, shape: &Arc<ModelShape>) -> Self {
        let mut member = Self::empty(seed, shape);
        member.grow(tokens);
        member
    }

    /// A sequence whose first `chunks` chunks are this one's, and which seals to segments from `first_segment` on.
    fn fork(&self, seed: usize, chunks: usize, first_segment: u32) -> Self {
        let shape = self.sequence.shape();
        let daemon = TestDaemon {
            segments: self.daemon.segments.clone(),
            sealed: chunks,
            first_segment,
            ..TestDaemon::new(shape.clone(), Some(calibration(shape)), 12)
        };
        for chunk in 0..chunks {
            for class in [SlotClass::Selected, SlotClass::Window] {
                daemon.board.set_slot(class, chunk, self.daemon.board.slot(class, chunk));
            }
        }
        daemon.board.set_sealed_chunks(chunks);
        daemon.open.set_committed(256 * chunks as u64).expect("committed");
        let mut sequence = daemon.attach(SPARSE, None, 0);
        daemon.refresh(&mut sequence);
        Self { daemon, sequence, seed }
    }

    /// Appends rows of its own, and has whole chunks sealed.
    fn grow(&mut self, tokens: usize) {
        self.append(tokens);
        self.seal();
    }

    fn truncate(&mut self, tokens: usize) {
        self.sequence.begin_truncate(tokens).expect("begun");
        self.daemon.sealed = tokens / 256;
        self.daemon.board.set_sealed_chunks(tokens / 256);
        self.sequence.truncated(tokens);
        self.daemon.refresh(&mut self.sequence);
    }
}

/// Output and log-sum-exps, and what they cost.
type Answer = (Vec<f32>, Vec<f32>, StepReport);

/// Answers of one layer, of members that step together.
fn answers(decoder: &mut Decoder, layer: usize, members: &mut [&mut Member]) -> Vec<Answer> {
    let mut asked: Vec<_> = members
        .iter()
        .map(|member| {
            let position = member.sequence.committed() - 1;
            let geometry = &member.sequence.part(layer).geometry;
            let (heads, dim) = (geometry.heads.query_heads(), geometry.head_dim);
            let query: Vec<f32> = (0..heads * dim).map(|at| value(90 + layer, at / dim + 40 * member.seed, position, at % dim)).collect();
            (position, query, vec![-1.0; heads * dim], vec![-1.0; heads])
        })
        .collect();
    let mut batch: Vec<StepRequest<'_>> = asked
        .iter_mut()
        .zip(members)
        .map(|((position, queries, output, lse), member)| StepRequest {
            sequence: &mut member.sequence,
            first_position: *position,
            queries,
            attend: Attend::Sparse,
            output,
            lse,
        })
        .collect();
    let reports: Vec<StepReport> = decoder.step(layer, &mut batch).into_iter().map(|report| report.expect("a step")).collect();
    drop(batch);
    assert!(reports.iter().all(|report| report.selected_rows > 0), "rows were selected");
    asked.into_iter().zip(reports).map(|((_, _, output, lse), report)| (output, lse, report)).collect()
}

/// Lets go of everything that a decoder holds of members, so that the next to step shares with nobody, and others may register their files.
fn forget(decoder: &mut Decoder, members: &mut [&mut Member]) {
    members.iter_mut().for_each(|member| member.sequence.forget_device_state());
    decoder.sweep();
}

/// Sequences that step together, and the same ones again that step alone, with nobody else on the device.
struct World {
    kind: DeviceKind,
    decoder: Decoder,
    members: Vec<Member>,
    alone: Decoder,
    twins: Vec<Member>,
    /// Bytes of labels of the first twin, alone.
    bytes_alone: u64,
}

impl World {
    fn new(kind: DeviceKind, make: impl Fn() -> Vec<Member>) -> Self {
        let decoder = || Decoder::new(open(kind, 2).expect("device"));
        Self { kind, decoder: decoder(), members: make(), alone: decoder(), twins: make(), bytes_alone: 0 }
    }

    fn change(&mut self, index: usize, change: impl Fn(&mut Member)) {
        change(&mut self.members[index]);
        change(&mut self.twins[index]);
    }

    fn leave(&mut self, index: usize) {
        self.members.remove(index);
        self.twins.remove(index);
        self.decoder.sweep();
    }

    /// Chunks that each scored with others, in one layer.
    fn assert_as_alone(&mut self, what: &str) -> Vec<u64> {
        let mut joint = Vec::new();
        for layer in [0, 2] {
            let together = answers(&mut self.decoder, layer, &mut self.members.iter_mut().collect::<Vec<_>>());
            let of_chunk = |report: &StepReport, twin: &Member| report.label_bytes / (horizon(twin) / 256) as u64;
            joint =
                together.iter().zip(&self.twins).map(|(answer, twin)| answer.2.shared_label_bytes / of_chunk(&answer.2, twin)).collect();
            for (index, (twin, together)) in self.twins.iter_mut().zip(together).enumerate() {
                let expected = answers(&mut self.alone, layer, &mut [twin]).remove(0);
                let same = (&together.0, &together.1) == (&expected.0, &expected.1);
                assert!(same, "{}, {what}: sequence {} in layer {layer}", self.kind, twin.seed);
                assert_eq!((together.2.label_bytes, expected.2.shared_label_bytes), (expected.2.label_bytes, 0), "{what}: labels scored");
                if index == 0 {
                    self.bytes_alone = self.alone.device_bytes().labels;
                }
                forget(&mut self.alone, &mut [twin]);
            }
        }
        joint
    }

    fn label_bytes(&self) -> u64 {
        self.decoder.device_bytes().labels
    }
}

/// Rows that the next step of a member selects from.
fn horizon(member: &Member) -> usize {
    SPARSE.horizon(member.sequence.committed())
}

/// Ten chunks of one, nine of them with two others that go on alone.
fn family(shape: &Arc<ModelShape>) -> Vec<Member> {
    let parent = Member::grown(0, 2600, shape);
    let mut children = [parent.fork(1, 9, 40), parent.fork(2, 9, 60)];
    children[0].grow(400);
    children[1].grow(700);
    let [first, second] = children;
    vec![parent, first, second]
}

#[test]
fn members_of_a_family_are_as_they_are_alone_and_keep_common_labels_once() {
    for (kind, row_type) in device_kinds().into_iter().flat_map(|kind| ROW_TYPES.map(|row_type| (kind, row_type))) {
        let mut world = World::new(kind, || family(&shape_of(row_type)));
        world.assert_as_alone("at first");
        // 10 + 1 + 2 chunks of labels are a slab of 16; each its own would be 30 and two.
        let alone = world.bytes_alone;
        assert_eq!(world.label_bytes(), alone, "{kind}: bytes of labels");
        assert!(alone > 0 || !matches!(kind, DeviceKind::Cuda { .. }), "{kind}: there are labels on the device");
        world.change(1, |member| member.grow(300));
        world.assert_as_alone("after one has grown");
        assert_eq!(world.label_bytes(), alone, "{kind}: bytes of labels");
    }
}

#[test]
fn what_one_gives_up_the_others_keep() {
    for kind in device_kinds() {
        let mut world = World::new(kind, || family(&shape()));
        world.assert_as_alone("at first");
        world.change(1, |member| {
            member.truncate(256 * 7 + 10);
            member.seed = 7;
            member.grow(900);
        });
        world.assert_as_alone("after one has other rows from chunk 7 on");
        world.leave(0);
        world.assert_as_alone("after the first has gone");
        world.change(1, |member| member.grow(256));
        world.assert_as_alone("after another has grown");
        world.leave(1);
        world.leave(0);
        assert_eq!(world.label_bytes(), 0, "{kind}: labels of sequences that are gone");
    }
}

/// Two layers whose lanes have `group` query heads each.
fn grouped(group: u16, head_dim: u16, row_type: RowType) -> Arc<ModelShape> {
    let selected = LayerShape { kind: LaneKind::Selected, query_heads: 2 * group, kv_heads: 2, head_dim, softmax_scale: 0.1 };
    let window = LayerShape { kind: LaneKind::Window { tokens: 300 }, query_heads: 2, kv_heads: 1, head_dim, softmax_scale: 0.1 };
    let mut shape = ModelShape { row_type, layers: vec![selected, window, selected], scales: Vec::new() };
    set_scales(&mut shape);
    Arc::new(shape)
}

/// Four sequences with 24, 20, 20 and 17 chunks of the first one, which go on alone, and one that has nothing in common with them.
fn long_family(shape: &Arc<ModelShape>) -> Vec<Member> {
    let long = |seed: usize| {
        let mut member = Member::grown(seed, 3000, shape);
        member.grow(3200);
        member
    };
    let parent = long(0);
    let mut children = [parent.fork(1, 20, 40), parent.fork(2, 20, 60), parent.fork(3, 17, 80)];
    for (child, tokens) in children.iter_mut().zip([100, 700, 1900]) {
        child.grow(tokens);
    }
    std::iter::once(parent).chain(children).chain([long(4)]).collect()
}

/// Which of two lists the chunks that members score with others are in: only a GPU scores jointly.
fn assert_joint(kind: DeviceKind, joint: &[u64], expected: &[u64]) {
    let expected = if matches!(kind, DeviceKind::Cuda { .. }) { expected } else { &vec![0; expected.len()] };
    assert_eq!(joint, expected, "{kind}: chunks scored with others");
}

#[test]
fn chunks_in_common_are_scored_jointly_with_the_bits_of_each_alone() {
    for kind in device_kinds() {
        let mut world = World::new(kind, || long_family(&shape()));
        // Three have 20 chunks in common, of which the second one selects from all but the newest.
        let joint = world.assert_as_alone("five of them");
        assert_joint(kind, &joint, &[17, 17, 17, 17, 0]);
        world.change(1, |member| member.grow(1));
        world.assert_as_alone("one has grown");
        // Into what it has in common, and on with rows of its own.
        world.change(2, |member| {
            member.truncate(256 * 16 + 10);
            member.seed = 9;
            member.grow(1200);
        });
        let joint = world.assert_as_alone("one has other rows from chunk 16 on");
        assert_joint(kind, &joint, &[16, 16, 16, 16, 0]);
        world.change(3, |member| member.truncate(256 * 12 + 10));
        let joint = world.assert_as_alone("one has too little in common");
        assert_joint(kind, &joint, &[16, 16, 16, 0, 0]);
        world.leave(0);
        let joint = world.assert_as_alone("the first has gone");
        assert_joint(kind, &joint, &[16, 16, 0, 0]);
        world.leave(0);
        let joint = world.assert_as_alone("nobody has a companion");
        assert_joint(kind, &joint, &[0, 0, 0]);
    }
}

#[test]
fn heads_and_rows_of_every_shape_are_scored_jointly() {
    let shapes = [(1, 64, RowType::F16), (4, 128, RowType::F16), (8, 64, RowType::Fp8), (4, 64, RowType::Fp8), (1, 128, RowType::Fp8)];
    for (kind, (group, dim, row_type)) in device_kinds().into_iter().flat_map(|kind| shapes.map(|shape| (kind, shape))) {
        let mut world = World::new(kind, || long_family(&grouped(group, dim, row_type)));
        let joint = world.assert_as_alone("five of them");
        // Eight heads leave room for two.
        assert_joint(kind, &joint, if group > 4 { &[20, 20, 17, 17, 0] } else { &[17, 17, 17, 17, 0] });
        world.leave(3);
        let joint = world.assert_as_alone("four of them");
        assert_joint(kind, &joint, if group > 4 { &[20, 20, 0, 0] } else { &[20, 20, 20, 0] });
        world.leave(1);
        let joint = world.assert_as_alone("three of them");
        assert_joint(kind, &joint, &[20, 20, 0]);
    }
}

/// A sequence steps; `change` takes its slots away without its knowing; another that has its first `chunks` chunks, and rows of its own in the
/// slots of the next ones, is as it is alone.
fn assert_nothing_is_taken_over(chunks: usize, tokens: usize, change: impl Fn(&Member)) {
    for kind in device_kinds() {
        let decoder = || Decoder::new(open(kind, 2).expect("device"));
        let (mut shared, mut first) = (decoder(), Member::grown(0, 2600, &shape()));
        answers(&mut shared, 0, &mut [&mut first]);
        change(&first);
        let second = || {
            let mut second = first.fork(1, chunks, 0);
            second.grow(tokens);
            second
        };
        let (mut second, mut twin) = (second(), second());
        let together = answers(&mut shared, 0, &mut [&mut second]);
        forget(&mut shared, &mut [&mut first, &mut second]);
        let alone = answers(&mut decoder(), 0, &mut [&mut twin]);
        assert!((&together[0].0, &together[0].1) == (&alone[0].0, &alone[0].1), "{kind}");
    }
}

#[test]
fn a_slot_that_has_another_chunk_by_now_has_its_labels() {
    // The lease is over, but its holder has not looked yet; the same slots are given to another sequence.
    assert_nothing_is_taken_over(0, 2600, |first| first.daemon.board.set_lease(1, 1, BoardState::Closed));
}

#[test]
fn a_slot_of_a_chunk_that_was_truncated_has_the_labels_of_the_next() {
    // The daemon has truncated; the holder does not know yet.
    assert_nothing_is_taken_over(3, 2000, |first| first.daemon.board.set_sealed_chunks(3));
}
