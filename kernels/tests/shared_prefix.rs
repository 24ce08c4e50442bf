//! Sequences that have chunks in common: each is as it would be alone, and a device keeps what they share once.

#[path = "support/member.rs"]
mod member;
mod support;

use std::sync::Arc;

use member::{Member, SPARSE};
use sluice_kernels::decoder::{Attend, Decoder, StepRequest};
use sluice_kernels::device::{DeviceKind, open};
use sluice_kernels::shape::ModelShape;
use sluice_kernels::shared::board::BoardState;
use sluice_kernels::slot::SlotClass;
use support::{ROW_TYPES, TestDaemon, calibration, device_kinds, shape, shape_of, value};

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

/// Answers of one layer, of members that step together.
fn answers(decoder: &mut Decoder, layer: usize, members: &mut [&mut Member]) -> Vec<(Vec<f32>, Vec<f32>)> {
    let heads = 4;
    let mut asked: Vec<_> = members
        .iter()
        .map(|member| {
            let position = member.sequence.committed() - 1;
            let query: Vec<f32> = (0..heads * 64).map(|at| value(90 + layer, at / 64 + 40 * member.seed, position, at % 64)).collect();
            (position, query, vec![-1.0; heads * 64], vec![-1.0; heads])
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
    for report in decoder.step(layer, &mut batch) {
        assert!(report.expect("a step").selected_rows > 0, "rows were selected");
    }
    drop(batch);
    asked.into_iter().map(|(_, _, output, lse)| (output, lse)).collect()
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

    fn assert_as_alone(&mut self, what: &str) {
        for layer in [0, 2] {
            let together = answers(&mut self.decoder, layer, &mut self.members.iter_mut().collect::<Vec<_>>());
            for (index, (twin, together)) in self.twins.iter_mut().zip(together).enumerate() {
                let expected = answers(&mut self.alone, layer, &mut [twin]).remove(0);
                assert!(together == expected, "{}, {what}: sequence {} in layer {layer}", self.kind, twin.seed);
                if index == 0 {
                    self.bytes_alone = self.alone.device_bytes().labels;
                }
                forget(&mut self.alone, &mut [twin]);
            }
        }
    }

    fn label_bytes(&self) -> u64 {
        self.decoder.device_bytes().labels
    }
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
        assert!(together == answers(&mut decoder(), 0, &mut [&mut twin]), "{kind}");
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
