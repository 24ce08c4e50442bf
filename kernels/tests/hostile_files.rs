//! What a holder may do to a file it can write, and what a file on disk may contain: refused, never a crash.

#[expect(dead_code, reason = "this file needs a part of it")]
mod support;

use std::os::unix::fs::FileExt;

use proptest::prelude::*;
use sluice_kernels::shape::ModelShape;
use sluice_kernels::shared::SharedError;
use sluice_kernels::shared::board::Board;
use sluice_kernels::shared::open::{OpenFile, OpenLayout, OpenSlots};
use sluice_kernels::shared::segment::{Access, Segment};
use sluice_kernels::slot::SlotClass;
use support::{TestDaemon, shape};

fn open_layout(shape: &ModelShape) -> OpenLayout {
    OpenLayout::new(shape, 3).expect("layout")
}

#[test]
fn a_file_cut_short_by_its_holder_is_an_error_for_the_daemon() {
    let daemon = TestDaemon::new(shape(), None, 3);
    let layout = open_layout(&shape());
    let plane = layout.class(SlotClass::Selected).planes[0];
    let mut page = vec![0; plane.page_bytes as usize];
    daemon.open.read_page(SlotClass::Selected, &plane, 2, &mut page).expect("whole");
    daemon.open.file().set_len(8192).expect("cut");
    assert!(daemon.open.read_page(SlotClass::Selected, &plane, 2, &mut page).is_err());
    daemon.open.words().expect("the first page is still there");
    daemon.open.file().set_len(100).expect("cut again");
    assert!(matches!(daemon.open.words(), Err(SharedError::Io { .. })));
    assert!(OpenSlots::map(daemon.open.file(), layout, 0).is_err(), "nor can it be mapped");
}

#[test]
fn files_of_another_kind_or_version_are_refused_by_name() {
    let daemon = TestDaemon::new(shape(), None, 3);
    let layout = open_layout(&shape());
    daemon.open.file().write_all_at(&99u64.to_le_bytes(), 8).expect("another version");
    let refused = OpenSlots::map(daemon.open.file(), layout.clone(), 0).expect_err("version 99");
    assert!(refused.to_string().contains("version 99, this build reads"), "{refused}");
    let refused = Board::map(daemon.open.file(), Access::ReadOnly).expect_err("not a board");
    assert!(matches!(refused, SharedError::Layout { what: "board", .. }), "{refused}");
    let selected = layout.class(SlotClass::Selected).clone();
    let refused = Segment::map(0, 1 << 20, selected, daemon.open.file(), Access::ReadOnly).expect_err("too short");
    assert!(matches!(refused, SharedError::TooShort { what: "segment", .. }), "{refused}");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn garbage_in_the_header_is_read_back_as_numbers_and_nothing_more(garbage in proptest::collection::vec(any::<u8>(), 4096..40_000)) {
        let daemon = TestDaemon::new(shape(), None, 3);
        daemon.open.file().write_all_at(&garbage, 0).expect("write");
        let word = |index: usize| u64::from_le_bytes(std::array::from_fn(|byte| garbage[index * 8 + byte]));
        let words = daemon.open.words().expect("words");
        prop_assert_eq!(words.committed[0], word(8));
        prop_assert_eq!(words.completed[7], word(31));
        for slot in 0..3 {
            daemon.open.record(slot, 8).expect("a record is any 64 bytes");
            daemon.open.tokens(slot, 256).expect("tokens are any numbers");
        }
        prop_assert!(daemon.open.record(3, 1).is_err());
        // Random bytes do not have the checksum of a state.
        prop_assert_eq!(daemon.open.opaque().expect("read"), None);
    }

    #[test]
    fn a_board_of_garbage_is_refused_or_bounded(mut garbage in proptest::collection::vec(any::<u8>(), 4096..8192), keep_header: bool) {
        let daemon = TestDaemon::new(shape(), None, 3);
        let file = std::fs::OpenOptions::new().read(true).write(true).open(daemon.path("board")).expect("board");
        if keep_header {
            // Magic, version and table size stay; everything else is garbage.
            file.read_exact_at(&mut garbage[..16], 0).expect("header");
            file.read_exact_at(&mut garbage[56..64], 56).expect("table size");
        }
        file.write_all_at(&garbage, 0).expect("write");
        match Board::map(&file, Access::ReadOnly) {
            Ok(board) => {
                prop_assert!(keep_header && board.sealed_chunks() <= board.table_chunks() as usize);
                for chunk in 0..board.table_chunks() as usize {
                    let _ = board.slot(SlotClass::Window, chunk);
                }
            }
            Err(_) => prop_assert!(!keep_header),
        }
    }

    #[test]
    fn a_file_reopened_shows_what_was_stored(ids in proptest::collection::vec(any::<u32>(), 1..256), committed: u64) {
        let daemon = TestDaemon::new(shape(), None, 3);
        daemon.open.write_tokens(1, &ids).expect("tokens");
        daemon.open.set_committed(committed).expect("committed");
        let file = std::fs::File::open(daemon.path("open")).expect("open");
        let again = OpenFile::reopen(file, open_layout(&shape()));
        prop_assert_eq!(again.tokens(1, ids.len()).expect("tokens"), ids);
        prop_assert_eq!(again.words().expect("words").committed, [committed; 8]);
    }
}
