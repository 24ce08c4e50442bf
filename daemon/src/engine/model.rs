//! A registered model: its shape, layouts, digest and calibration.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use sluice_kernels::label::{Calibration, LabelCoder};
use sluice_kernels::layout::ClassLayout;
use sluice_kernels::shape::{LaneKind, ModelShape};
use sluice_kernels::shared::LAYOUT_VERSION;
use sluice_kernels::slot::{CHUNK_TOKENS, SlotClass};

use crate::engine::error::EngineError;
use crate::engine::name::{Name, RootParts};
use crate::journal::ModelRecord;

/// A calibration in force.
#[derive(Clone, Debug)]
pub struct LabelSet {
    /// Number of the set, unique in the arena folder.
    pub id: u64,
    /// The calibration.
    pub calibration: Arc<Calibration>,
    /// Coder of each layer; `None` for sliding-window layers.
    pub coders: Arc<Vec<Option<LabelCoder>>>,
    /// Layout of a label segment.
    pub layout: Arc<ClassLayout>,
}

/// A registered model.
#[derive(Debug)]
pub struct Model {
    /// What is journaled.
    pub record: ModelRecord,
    /// Shape.
    pub shape: Arc<ModelShape>,
    /// Rows of full-attention layers.
    pub selected: Arc<ClassLayout>,
    /// Rows of sliding-window layers.
    pub window: Arc<ClassLayout>,
    /// Calibration whose labels every sealed chunk has.
    pub labels: Option<LabelSet>,
    /// Calibration whose labels are being made: new chunks get them already.
    pub labels_to_come: Option<LabelSet>,
    /// Widest sliding window in tokens; 0 without one.
    pub window_tokens: usize,
    digest: [u8; 32],
}

impl Model {
    /// A model of a checked record.
    ///
    /// # Errors
    /// A calibration that does not fit the shape.
    pub fn new(record: ModelRecord) -> Result<Self, EngineError> {
        let shape = Arc::new(record.shape.clone());
        let widths = shape.layers.iter().map(|layer| match layer.kind {
            LaneKind::Selected => 0,
            LaneKind::Window { tokens } => tokens as usize,
        });
        let window_tokens = widths.max().unwrap_or(0);
        let labels = match (record.label_set, &record.calibration_json) {
            (Some(id), Some(json)) => Some(LabelSet::new(id, parse_calibration(json.as_bytes(), &shape)?, &shape)),
            _ => None,
        };
        let digest = digest(&record)?;
        Ok(Self {
            selected: Arc::new(ClassLayout::new(&shape, SlotClass::Selected)),
            window: Arc::new(ClassLayout::new(&shape, SlotClass::Window)),
            shape,
            labels,
            labels_to_come: None,
            window_tokens,
            digest,
            record,
        })
    }

    /// Id.
    #[must_use]
    pub fn id(&self) -> u64 {
        self.record.id
    }

    /// Lanes of the first layer: of every layer, where workers may share a sequence by lanes.
    #[must_use]
    pub fn lanes(&self) -> u32 {
        self.shape.layers.first().map_or(0, |layer| u32::from(layer.kv_heads))
    }

    /// The layout of a class.
    #[must_use]
    pub fn class(&self, class: SlotClass) -> &Arc<ClassLayout> {
        match class {
            SlotClass::Selected => &self.selected,
            SlotClass::Window => &self.window,
        }
    }

    /// Whether the model has layers of a class.
    #[must_use]
    pub fn has(&self, class: SlotClass) -> bool {
        self.class(class).slot_bytes > 0
    }

    /// Bytes of rows of one chunk, all layers.
    #[must_use]
    pub fn chunk_bytes(&self) -> u64 {
        self.selected.slot_bytes + self.window.slot_bytes
    }

    /// Label set that new chunks are labelled with.
    #[must_use]
    pub fn newest_labels(&self) -> Option<&LabelSet> {
        self.labels_to_come.as_ref().or(self.labels.as_ref())
    }

    /// Root of the names of a prompt family.
    #[must_use]
    pub fn root(&self, salt: &[u8], extra_keys: &[Vec<u8>]) -> Name {
        Name::root(&RootParts { salt, namespace: &self.record.namespace, model_digest: &self.digest, extra_keys })
    }

    /// First chunk whose window rows a query at `position` or later may read; the number of full chunks before `position` without windows.
    #[must_use]
    pub fn window_floor(&self, position: usize) -> usize {
        if self.window_tokens == 0 { position / CHUNK_TOKENS } else { position.saturating_sub(self.window_tokens) / CHUNK_TOKENS }
    }
}

impl LabelSet {
    /// Joins a checked calibration with a shape.
    #[must_use]
    pub fn new(id: u64, calibration: Calibration, shape: &ModelShape) -> Self {
        let coders = (0..shape.layers.len()).map(|layer| Some(LabelCoder::new(&calibration.plan, calibration.layer(layer)?)));
        let coders = Arc::new(coders.collect());
        let layout = Arc::new(ClassLayout::labels(shape, &calibration.plan));
        Self { id, coders, layout, calibration: Arc::new(calibration) }
    }
}

/// Reads and checks a calibration file.
///
/// # Errors
/// Not JSON of this format, or it does not fit the shape.
pub fn parse_calibration(json: &[u8], shape: &ModelShape) -> Result<Calibration, EngineError> {
    let calibration: Calibration =
        serde_json::from_slice(json).map_err(|error| EngineError::Misfit(format!("calibration_json: {error}")))?;
    calibration.check(shape).map_err(|error| EngineError::Misfit(error.to_string()))?;
    Ok(calibration)
}

fn digest(record: &ModelRecord) -> Result<[u8; 32], EngineError> {
    let shape = serde_json::to_vec(&record.shape).map_err(|error| EngineError::Internal(error.to_string()))?;
    let mut hasher = blake3::Hasher::new_derive_key("sluice v1 model digest");
    hasher.update(&LAYOUT_VERSION.to_le_bytes());
    hasher.update(&record.rotary_layout.to_le_bytes());
    hasher.update(&(record.weights_digest.len() as u64).to_le_bytes());
    hasher.update(&record.weights_digest);
    hasher.update(&shape);
    Ok(*hasher.finalize().as_bytes())
}

/// Names of the files in the arena folder.
#[derive(Clone, Debug)]
pub struct Folder(pub PathBuf);

impl Folder {
    /// The journal.
    #[must_use]
    pub fn journal(&self) -> PathBuf {
        self.0.join("journal.redb")
    }

    /// Rows of a segment.
    #[must_use]
    pub fn rows(&self, segment: u32) -> PathBuf {
        self.0.join(format!("seg-{segment}.rows"))
    }

    /// Labels of a segment.
    #[must_use]
    pub fn labels(&self, segment: u32, label_set: u64) -> PathBuf {
        self.0.join(format!("seg-{segment}.labels-{label_set}"))
    }

    /// Open slots of a sequence.
    #[must_use]
    pub fn open(&self, sequence: u64) -> PathBuf {
        self.0.join(format!("open-{sequence}"))
    }

    /// Open slots that no sequence has yet.
    #[must_use]
    pub fn spare(&self, number: u64) -> PathBuf {
        self.0.join(format!("spare-{number}"))
    }

    /// Board of a sequence.
    #[must_use]
    pub fn board(&self, sequence: u64) -> PathBuf {
        self.0.join(format!("board-{sequence}"))
    }

    /// The folder.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.0
    }
}
