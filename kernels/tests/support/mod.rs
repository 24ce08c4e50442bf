//! The daemon's half of shared memory, as small as a test needs it: it seals by hand and tells the holder through the board.

mod e4m3;

use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use sluice_kernels::budget::Settings;
use sluice_kernels::device::{DeviceKind, LabelJob, LayerGeometry, open as open_device};
use sluice_kernels::label::{Calibration, LabelCoder, LabelPlan, LaneCalibration, LayerCalibration};
use sluice_kernels::layout::ClassLayout;
use sluice_kernels::scales::RowScale;
use sluice_kernels::sequence::{Sequence, SequenceFiles};
use sluice_kernels::shape::{LaneKind, LayerShape, ModelShape, RowType};
use sluice_kernels::shared::board::{Board, BoardState};
use sluice_kernels::shared::open::{OpenFile, OpenLayout};
use sluice_kernels::shared::segment::{Access, LabelSegment, Segment};
use sluice_kernels::slot::{SlotClass, SlotId};

pub(crate) const TABLE_CHUNKS: u32 = 32;
pub(crate) const SEGMENT_SLOTS: u32 = 8;
const LABEL_SET: u64 = 7;

/// Types of rows that a holder is tested with: one of plain elements, and the one whose elements have scales.
pub(crate) const ROW_TYPES: [RowType; 2] = [RowType::F16, RowType::Fp8];

pub(crate) fn shape() -> Arc<ModelShape> {
    shape_of(RowType::F16)
}

pub(crate) fn shape_of(row_type: RowType) -> Arc<ModelShape> {
    let selected = LayerShape { kind: LaneKind::Selected, query_heads: 4, kv_heads: 2, head_dim: 64, softmax_scale: 0.125 };
    let window = LayerShape { kind: LaneKind::Window { tokens: 300 }, query_heads: 2, kv_heads: 1, head_dim: 64, softmax_scale: 0.125 };
    let mut shape = ModelShape { row_type, layers: vec![selected, window, selected], scales: Vec::new() };
    set_scales(&mut shape);
    Arc::new(shape)
}

/// Gives every lane of fp8 rows scales of its own, so that a mix-up shows.
pub(crate) fn set_scales(shape: &mut ModelShape) {
    let scale = |layer: usize, lane: usize| {
        let factor = 1.0 + 0.3 * layer as f32 + 0.7 * lane as f32;
        RowScale { key: 0.0051 * factor, value: 0.0047 / factor }
    };
    let of_layer = |(layer, shape): (usize, &LayerShape)| (0..shape.lanes()).map(|lane| scale(layer, lane)).collect::<Vec<_>>().into();
    if shape.row_type == RowType::Fp8 {
        shape.scales = shape.layers.iter().enumerate().map(of_layer).collect();
    }
}

pub(crate) fn calibration(shape: &ModelShape) -> Arc<Calibration> {
    let dim = shape.layers[0].head_dim;
    let lane = |lane: usize| LaneCalibration {
        // Every lane has channels and ranges of its own, so that a mix-up shows.
        order: (0..dim).map(|channel| (channel * 5 + 11 * lane as u16) % dim).collect(),
        magnitude: (0..dim).map(|channel| 1.0 / (1.0 + f32::from(channel))).collect(),
        low: (0..usize::from(dim)).map(|channel| -2.0 - 0.01 * (channel + lane) as f32).collect(),
        high: (0..usize::from(dim)).map(|channel| 2.0 + 0.02 * (channel + 2 * lane) as f32).collect(),
    };
    let selected = shape.layers.iter().enumerate().filter(|(_, layer)| layer.kind == LaneKind::Selected);
    let layers = selected.map(|(layer, shape)| LayerCalibration { layer: layer as u16, lanes: (0..shape.lanes()).map(lane).collect() });
    let layers = layers.collect();
    Arc::new(Calibration { version: 1, plan: LabelPlan::small(dim), text_hash: String::new(), seed: 0, tokens: 0, layers })
}

/// The devices that every machine has, and the GPU where `SLUICE_TEST_DEVICES` names cuda; a machine without one then fails the tests.
pub(crate) fn device_kinds() -> Vec<DeviceKind> {
    let asked = std::env::var("SLUICE_TEST_DEVICES").is_ok_and(|devices| devices.split(',').any(|device| device == "cuda"));
    let kinds: Vec<_> = DeviceKind::EVERYWHERE.into_iter().chain(asked.then_some(DeviceKind::Cuda { ordinal: 0 })).collect();
    eprintln!("devices covered: {}", kinds.iter().map(ToString::to_string).collect::<Vec<_>>().join(", "));
    kinds
}

pub(crate) struct TestDaemon {
    pub(crate) folder: tempfile::TempDir,
    pub(crate) shape: Arc<ModelShape>,
    pub(crate) calibration: Option<Arc<Calibration>>,
    pub(crate) board: Board,
    pub(crate) open: OpenFile,
    pub(crate) sealed: usize,
    pub(crate) segments: Vec<(Arc<Segment>, Option<Arc<LabelSegment>>)>,
    /// First of the segments that this daemon seals to.
    pub(crate) first_segment: u32,
    /// Slots of a segment.
    pub(crate) segment_slots: u32,
}

/// A new file of `bytes`, which takes memory where it is touched.
fn create(path: &Path, bytes: u64) -> File {
    let file = File::options().read(true).write(true).create_new(true).open(path).expect("a new file");
    file.set_len(bytes).expect("its length");
    file
}

impl TestDaemon {
    pub(crate) fn new(shape: Arc<ModelShape>, calibration: Option<Arc<Calibration>>, open_slots: u32) -> Self {
        let folder = tempfile::tempdir_in("/dev/shm").expect("a folder for the test");
        let file = create(&folder.path().join("board"), Board::file_bytes(TABLE_CHUNKS));
        let board = Board::create(&file, TABLE_CHUNKS).expect("board");
        board.set_lease(1, 1, BoardState::Live);
        board.set_label_set(calibration.as_ref().map(|_| LABEL_SET));
        let layout = OpenLayout::new(&shape, open_slots).expect("layout");
        let file = create(&folder.path().join("open"), layout.file_bytes());
        let open = OpenFile::create(file, layout).expect("open slots");
        let (sealed, segments, first_segment, segment_slots) = (0, Vec::new(), 0, SEGMENT_SLOTS);
        Self { folder, shape, calibration, board, open, sealed, segments, first_segment, segment_slots }
    }

    pub(crate) fn attach(&self, settings: Settings, lanes: Option<std::ops::Range<usize>>, writer: usize) -> Sequence {
        let open = |name: &str| std::fs::OpenOptions::new().read(true).write(name == "open").open(self.path(name)).expect("file");
        let files = SequenceFiles {
            shape: Arc::clone(&self.shape),
            calibration: self.calibration.clone(),
            board: open("board"),
            open: open("open"),
            open_slots: self.open.layout().slots,
            writer,
            lanes,
            settings,
        };
        Sequence::attach(files).expect("attach")
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Segment of a class that holds chunk `chunk`: slots are handed out backwards, so that no test passes by slot order.
    fn slot(&mut self, class: SlotClass, chunk: usize) -> SlotId {
        let segment = self.first_segment + (chunk as u32 / self.segment_slots) * 2 + u32::from(class == SlotClass::Window);
        while self.segments.len() <= segment as usize {
            self.add_segment();
        }
        SlotId { segment, index: self.segment_slots - 1 - chunk as u32 % self.segment_slots }
    }

    fn add_segment(&mut self) {
        let id = self.segments.len() as u32;
        let class = if id.is_multiple_of(2) { SlotClass::Selected } else { SlotClass::Window };
        let layout = Arc::new(ClassLayout::new(&self.shape, class));
        let slots = self.segment_slots;
        let file = create(&self.path(&format!("segment-{id}")), layout.segment_bytes(slots));
        let rows = Arc::new(Segment::map(id, slots, layout, &file, Access::Writable).expect("segment"));
        let labels = self.calibration.as_ref().filter(|_| class == SlotClass::Selected).map(|calibration| {
            let layout = Arc::new(ClassLayout::labels(&self.shape, &calibration.plan));
            let file = create(&self.path(&format!("labels-{id}")), layout.segment_bytes(slots));
            Arc::new(LabelSegment::map(LABEL_SET, slots, layout, &file, Access::Writable).expect("labels"))
        });
        self.segments.push((rows, labels));
    }

    /// Seals every full chunk that is committed, and destroys the open slot it grew in.
    pub(crate) fn seal(&mut self) -> usize {
        let committed = self.open.words().expect("words").committed[0] as usize;
        while (self.sealed + 1) * 256 <= committed {
            self.seal_one(self.sealed);
            self.sealed += 1;
            self.board.set_sealed_chunks(self.sealed);
        }
        self.sealed
    }

    fn seal_one(&mut self, chunk: usize) {
        let from = self.open.layout().slot_of(chunk);
        for class in [SlotClass::Selected, SlotClass::Window] {
            let slot = self.slot(class, chunk);
            let (segment, labels) = self.segments[slot.segment as usize].clone();
            for plane in &segment.layout().planes {
                segment.fill_page(plane, slot.index, |page| self.open.read_page(class, plane, from, page)).expect("read page");
                if let (Some(labels), Some(calibration)) = (&labels, &self.calibration) {
                    self.label(&segment, labels, calibration, plane, slot.index);
                }
                for lane in 0..usize::from(plane.lanes) {
                    let garbage = vec![0x3c; 256 * plane.row_bytes as usize];
                    self.open.write_rows(class, plane, from, lane, &garbage).expect("destroy the open slot");
                }
            }
            self.board.set_slot(class, chunk, Some(slot));
        }
    }

    fn label(
        &self,
        segment: &Segment,
        labels: &LabelSegment,
        calibration: &Calibration,
        plane: &sluice_kernels::layout::Plane,
        index: u32,
    ) {
        let layer = usize::from(plane.layer);
        let coder = LabelCoder::new(&calibration.plan, calibration.layer(layer).expect("a selected layer"));
        let geometry = LayerGeometry::of(&self.shape, layer);
        let mut device = open_device(DeviceKind::Reference, 1).expect("device");
        let label_plane = labels.layout().plane_of_layer(layer).expect("label plane");
        let page = segment.page(plane, index);
        labels.fill_page(label_plane, index, |out| device.label(&LabelJob { geometry: &geometry, page, coder: &coder }, out));
    }

    /// Takes up everything that is sealed, as a client does over the side socket.
    pub(crate) fn refresh(&self, sequence: &mut Sequence) {
        for segment in sequence.refresh().expect("refresh") {
            let (rows, labels) = self.segments[segment as usize].clone();
            sequence.add_segment(rows, labels);
        }
        assert_eq!(sequence.refresh().expect("second refresh"), Vec::<u32>::new());
    }
}

/// Rows `[lane][token][row]` of a layer, a hash of position, layer and lane: any mix-up shows.
pub(crate) fn rows(shape: &ModelShape, layer: usize, lanes: std::ops::Range<usize>, positions: std::ops::Range<usize>) -> Vec<u8> {
    let dims = 2 * usize::from(shape.layers[layer].head_dim);
    let mut bytes = Vec::new();
    for lane in lanes {
        for position in positions.clone() {
            (0..dims).for_each(|element| bytes.extend(stored(shape, layer, lane, position, element).0));
        }
    }
    bytes
}

/// Bytes of an element, and the number that they stand for.
pub(crate) fn stored(shape: &ModelShape, layer: usize, lane: usize, position: usize, element: usize) -> (Vec<u8>, f64) {
    let value = value(layer, lane, position, element);
    if shape.row_type == RowType::Fp8 {
        let scales = shape.scales[layer].as_slice()[lane];
        let scale = if element < usize::from(shape.layers[layer].head_dim) { scales.key } else { scales.value };
        let code = e4m3::e4m3_code(value / scale);
        return (vec![code], e4m3::e4m3_value(code) * f64::from(scale));
    }
    let half = half::f16::from_f32(value);
    (half.to_le_bytes().to_vec(), half.to_f64())
}

pub(crate) fn value(layer: usize, lane: usize, position: usize, element: usize) -> f32 {
    let seed = [layer as u64, lane as u64, position as u64, element as u64];
    let mixed = seed.into_iter().fold(0x9e37_79b9_7f4a_7c15u64, |state, word| {
        let state = (state ^ word).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        state ^ (state >> 29)
    });
    (mixed >> 40) as f32 / (1u64 << 24) as f32 * 4.0 - 2.0
}
