//! What the memory allows: probes over the very rows and labels that a step reads.
//!
//! The arena's files are mapped again, read-only, as a direct holder does; the board of a sequence says where its chunks lie. The bytes that
//! are probed are thus those that steps read, for both ways to attach, wherever the decoder runs.

use std::collections::BTreeMap;
use std::fs::File;
use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, Result, anyhow, ensure};
use sluice_kernels::label::LabelPlan;
use sluice_kernels::layout::ClassLayout;
use sluice_kernels::probe::{GatherLayer, ProbeReading, gather_probe, read_probe};
use sluice_kernels::shape::ModelShape;
use sluice_kernels::shared::board::Board;
use sluice_kernels::shared::segment::{Access, LabelSegment, Segment};
use sluice_kernels::slot::{CHUNK_TOKENS, SlotClass, SlotId};

use crate::generator::Random;

/// The sealed chunks of one sequence, mapped from the arena folder of its daemon.
#[derive(Debug)]
pub struct ArenaView {
    shape: ModelShape,
    layout: Arc<ClassLayout>,
    segments: BTreeMap<u32, (Arc<Segment>, Arc<LabelSegment>)>,
    label_set: u64,
    /// By chunk.
    slots: Vec<SlotId>,
}

impl ArenaView {
    /// Maps the first `chunks` chunks of a sequence. All of them must be sealed and labelled.
    ///
    /// # Errors
    /// A file of the arena that is not there or does not fit; fewer chunks sealed.
    pub fn open(folder: &Path, sequence_id: u64, chunks: usize, shape: &ModelShape, plan: &LabelPlan) -> Result<Self> {
        let open = |name: String| File::open(folder.join(&name)).with_context(|| format!("open {}", folder.join(name).display()));
        let board = Board::map(&open(format!("board-{sequence_id}"))?, Access::ReadOnly)?;
        ensure!(board.sealed_chunks() >= chunks, "{} chunks are sealed, {chunks} wanted", board.sealed_chunks());
        let label_set = board.label_set().ok_or_else(|| anyhow!("sequence {sequence_id} has no labels"))?;
        let slots = (0..chunks).map(|chunk| board.slot(SlotClass::Selected, chunk).ok_or_else(|| anyhow!("chunk {chunk} has no slot")));
        let slots = slots.collect::<Result<Vec<_>>>()?;
        let layout = Arc::new(ClassLayout::new(shape, SlotClass::Selected));
        let labels = Arc::new(ClassLayout::labels(shape, plan));
        let mut segments = BTreeMap::new();
        for segment in slots.iter().map(|slot| slot.segment) {
            if segments.contains_key(&segment) {
                continue;
            }
            let file = open(format!("seg-{segment}.rows"))?;
            let count = u32::try_from(file.metadata()?.len() / layout.slot_bytes)?;
            let rows = Segment::map(segment, count, layout.clone(), &file, Access::ReadOnly)?;
            let file = open(format!("seg-{segment}.labels-{label_set}"))?;
            let labels = LabelSegment::map(label_set, count, labels.clone(), &file, Access::ReadOnly)?;
            segments.insert(segment, (Arc::new(rows), Arc::new(labels)));
        }
        Ok(Self { shape: shape.clone(), layout, segments, label_set, slots })
    }

    /// Maps every page of every segment, so that no probe takes a page fault.
    pub fn populate(&self, threads: usize) {
        for (rows, labels) in self.segments.values() {
            rows.populate(threads);
            labels.populate(threads);
        }
    }

    /// The mapped segments with their labels.
    pub fn segments(&self) -> impl Iterator<Item = &(Arc<Segment>, Arc<LabelSegment>)> {
        self.segments.values()
    }

    /// Places of the chunks.
    #[must_use]
    pub fn slots(&self) -> &[SlotId] {
        &self.slots
    }

    /// The label set that is mapped.
    #[must_use]
    pub fn label_set(&self) -> u64 {
        self.label_set
    }

    /// Tokens of the chunks.
    #[must_use]
    pub fn tokens(&self) -> usize {
        self.slots.len() * CHUNK_TOKENS
    }

    /// Row pages by layer and chunk.
    #[must_use]
    pub fn pages(&self) -> Vec<Vec<&[u8]>> {
        let of_plane = |plane| self.slots.iter().map(move |slot| self.segments[&slot.segment].0.page(plane, slot.index)).collect();
        self.layout.planes.iter().map(of_plane).collect()
    }

    /// Label pages by layer and chunk.
    #[must_use]
    pub fn label_pages(&self) -> Vec<Vec<&[u8]>> {
        let page = |plane: usize, slot: &SlotId| {
            let labels = &self.segments[&slot.segment].1;
            labels.page(&labels.layout().planes[plane], slot.index)
        };
        (0..self.layout.planes.len()).map(|plane| self.slots.iter().map(|slot| page(plane, slot)).collect()).collect()
    }

    /// Reads every row once.
    #[must_use]
    pub fn read_rows(&self, threads: usize) -> ProbeReading {
        read_probe(&self.pages().concat(), threads)
    }

    /// Reads every label once.
    #[must_use]
    pub fn read_labels(&self, threads: usize) -> ProbeReading {
        read_probe(&self.label_pages().concat(), threads)
    }

    /// Gathers listed rows of all layers.
    ///
    /// # Errors
    /// Lists of positions that are not mapped.
    pub fn gather(&self, lists: &GatherLists, threads: usize) -> Result<ProbeReading> {
        let pages = self.pages();
        let positions: Vec<Vec<&[u32]>> = lists.layers.iter().map(|lanes| lanes.iter().map(Vec::as_slice).collect()).collect();
        let layers = self.layout.planes.iter().zip(&pages).zip(&positions).map(|((plane, pages), positions)| GatherLayer {
            pages,
            positions,
            rows_per_page: CHUNK_TOKENS,
            row_bytes: self.shape.layers[usize::from(plane.layer)].row_bytes(self.shape.row_type),
        });
        Ok(gather_probe(&layers.collect::<Vec<_>>(), threads)?)
    }
}

/// Ascending random positions by layer and lane.
#[derive(Clone, Debug)]
pub struct GatherLists {
    layers: Vec<Vec<Vec<u32>>>,
}

impl GatherLists {
    /// `count` of the first `rows` positions for every lane, uniformly, each lane its own.
    #[must_use]
    pub fn random(shape: &ModelShape, rows: usize, count: usize, seed: u64) -> Self {
        let lane = |layer: usize, lane: usize| sorted_sample(rows, count, &mut Random::new(&[seed, layer as u64, lane as u64]));
        let layers = shape.layers.iter().enumerate().map(|(index, layer)| (0..layer.lanes()).map(|at| lane(index, at)).collect());
        Self { layers: layers.collect() }
    }
}

/// `count` different numbers below `rows`, ascending (selection sampling: Knuth, volume 2, algorithm S).
fn sorted_sample(rows: usize, count: usize, random: &mut Random) -> Vec<u32> {
    let mut chosen = Vec::with_capacity(count);
    for row in 0..rows {
        if chosen.len() < count && random.below(rows - row) < count - chosen.len() {
            chosen.push(row as u32);
        }
    }
    chosen
}

#[cfg(test)]
mod tests {
    use super::*;
    use sluice_kernels::shape::{LaneKind, LayerShape, RowType};
    use sluice_kernels::shared::board::BoardState;
    use sluice_kernels::shared::folder::create_allocated;

    #[test]
    fn a_sorted_sample_has_the_size_asked_for_and_covers_the_range() {
        let mut hits = [0; 100];
        for seed in 0..400 {
            let sample = sorted_sample(100, 7, &mut Random::new(&[seed]));
            assert_eq!(sample.len(), 7);
            assert!(sample.windows(2).all(|pair| pair[0] < pair[1]) && sample[6] < 100, "{sample:?}");
            for row in sample {
                hits[row as usize] += 1;
            }
        }
        assert!(hits.iter().all(|&hits| (8..60).contains(&hits)), "28 hits expected of each: {hits:?}");
        assert_eq!(sorted_sample(3, 9, &mut Random::new(&[1])), [0, 1, 2]);
        assert_eq!(sorted_sample(3, 0, &mut Random::new(&[1])), [0; 0]);
    }

    /// An arena of two segments written by hand: the view must find the chunks in path order, not in slot order.
    #[test]
    fn the_view_follows_the_board() {
        let layer = LayerShape { kind: LaneKind::Selected, query_heads: 2, kv_heads: 1, head_dim: 64, softmax_scale: 0.125 };
        let shape = ModelShape::unscaled(RowType::F16, vec![layer; 2]);
        let plan = LabelPlan::small(64);
        let (row_page, label_page) = (256 * 256_u64, 256 * 8_u64);
        let folder = tempfile::tempdir().expect("a folder");
        let path = [(5_u32, 1_u32), (2, 0), (5, 0)];
        for segment in [2, 5] {
            for (name, page) in [(format!("seg-{segment}.rows"), row_page), (format!("seg-{segment}.labels-3"), label_page)] {
                // Plane of layer 0 for both slots, then that of layer 1; every page filled with its own number.
                let bytes: Vec<u8> = (0..4_u8).flat_map(|at| vec![segment as u8 * 10 + at; page as usize]).collect();
                std::fs::write(folder.path().join(name), bytes).expect("a segment");
            }
        }
        let file = create_allocated(&folder.path().join("board-7"), Board::file_bytes(8), 1).expect("a board");
        let board = Board::create(&file, 8).expect("a board");
        board.set_lease(1, 1, BoardState::Live);
        for (chunk, &(segment, index)) in path.iter().enumerate() {
            board.set_slot(SlotClass::Selected, chunk, Some(SlotId { segment, index }));
        }
        board.set_label_set(Some(3));
        board.set_sealed_chunks(3);

        let view = ArenaView::open(folder.path(), 7, 3, &shape, &plan).expect("a view");
        let first_bytes =
            |pages: Vec<Vec<&[u8]>>| pages.iter().map(|pages| pages.iter().map(|page| page[0]).collect()).collect::<Vec<Vec<_>>>();
        let expected = [[51, 20, 50], [53, 22, 52]].map(|layer| layer.to_vec());
        assert_eq!(first_bytes(view.pages()), expected);
        assert_eq!(first_bytes(view.label_pages()), expected);
        view.populate(2);
        assert_eq!(view.tokens(), 768);
        assert_eq!(view.read_rows(2).bytes, 6 * row_page);
        assert_eq!(view.read_labels(2).bytes, 6 * label_page);
        let gathered = view.gather(&GatherLists::random(&shape, 768, 48, 9), 2).expect("positions of the view");
        assert_eq!(gathered.bytes, 2 * 48 * 256);
        let error = ArenaView::open(folder.path(), 7, 4, &shape, &plan).expect_err("three are sealed");
        assert!(error.to_string().contains("3 chunks are sealed, 4 wanted"), "{error}");
        assert!(ArenaView::open(folder.path(), 8, 1, &shape, &plan).is_err());
    }
}
