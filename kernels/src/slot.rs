//! The place of a chunk.

/// Tokens of a chunk (DESIGN.md, section 2).
pub const CHUNK_TOKENS: usize = 256;

/// Which of a chunk's two slots is meant: full-attention layers and sliding-window layers live and die apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SlotClass {
    /// Rows of the full-attention layers: kept for every chunk.
    Selected,
    /// Rows of the sliding-window layers: kept near reusable ends only.
    Window,
}

/// A slot of the arena: a segment and an index in it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, serde::Serialize, serde::Deserialize)]
pub struct SlotId {
    /// Segment number, unique for the life of an arena folder.
    pub segment: u32,
    /// Index of the slot in its segment.
    pub index: u32,
}

impl SlotId {
    /// The word that stands for this slot in a slot table; never zero.
    #[must_use]
    pub fn to_word(self) -> u64 {
        (u64::from(self.segment) + 1) << 32 | u64::from(self.index)
    }

    /// The slot that a table word stands for; `None` for the zero word.
    #[must_use]
    pub fn from_word(word: u64) -> Option<Self> {
        let segment = (word >> 32).checked_sub(1)?;
        Some(Self { segment: u32::try_from(segment).ok()?, index: (word & 0xffff_ffff) as u32 })
    }
}
