//! What a writer notes beside the rows of an open slot.

/// How rows came to be: `None` by dense prefill, otherwise a digest of selector, budget and plan (DESIGN.md, section 5, Names).
pub type Fidelity = Option<[u8; 32]>;

/// Bytes of one writer's record of one slot.
pub(super) const RECORD_BYTES: usize = 64;

/// What one writer has written beside its rows of a slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SlotRecord {
    /// Chunk that grows in the slot; `None` before the first.
    pub chunk: Option<u64>,
    /// How its rows came to be.
    pub fidelity: Fidelity,
}

impl SlotRecord {
    /// The record of a slot that several writers fill: the chunk that all of them name, and how the rows of all came to be. Rows of one
    /// sparse step make the whole chunk an approximation.
    #[must_use]
    pub fn of_writers(records: &[Self]) -> Self {
        let Some(first) = records.first() else { return Self { chunk: None, fidelity: None } };
        let chunk = first.chunk.filter(|_| records.iter().all(|record| record.chunk == first.chunk));
        if records.iter().all(|record| record.fidelity == first.fidelity) {
            return Self { chunk, fidelity: first.fidelity };
        }
        let mut hasher = blake3::Hasher::new_derive_key("sluice v1 fidelity of several writers");
        for record in records {
            hasher.update(&record.fidelity.unwrap_or([0; 32]));
        }
        Self { chunk, fidelity: Some(*hasher.finalize().as_bytes()) }
    }

    pub(super) fn to_bytes(self) -> [u8; RECORD_BYTES] {
        let mut bytes = [0; RECORD_BYTES];
        bytes[..8].copy_from_slice(&self.chunk.map_or(0, |chunk| chunk + 1).to_le_bytes());
        bytes[8..40].copy_from_slice(&self.fidelity.unwrap_or([0; 32]));
        bytes
    }

    pub(super) fn from_bytes(bytes: &[u8]) -> Self {
        let chunk = u64::from_le_bytes(std::array::from_fn(|index| bytes[index])).checked_sub(1);
        let fidelity: [u8; 32] = std::array::from_fn(|index| bytes[8 + index]);
        Self { chunk, fidelity: Some(fidelity).filter(|digest| *digest != [0; 32]) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_approximating_writer_makes_the_chunk_an_approximation() {
        let record = |chunk, fidelity| SlotRecord { chunk: Some(chunk), fidelity };
        let (dense, sparse) = (record(3, None), record(3, Some([7; 32])));
        assert_eq!(SlotRecord::of_writers(&[dense, dense]), dense);
        assert_eq!(SlotRecord::of_writers(&[sparse, sparse, sparse]), sparse);
        let mixed = [SlotRecord::of_writers(&[dense, sparse]), SlotRecord::of_writers(&[sparse, dense])];
        assert!(mixed.iter().all(|record| record.chunk == Some(3) && record.fidelity.is_some_and(|digest| digest != [7; 32])));
        assert_ne!(mixed[0], mixed[1], "other lanes are exact");
        assert_eq!(SlotRecord::of_writers(&[dense, record(4, None)]).chunk, None, "the writers do not agree");
        for record in [dense, sparse, SlotRecord { chunk: None, fidelity: None }] {
            assert_eq!(SlotRecord::from_bytes(&record.to_bytes()), record);
        }
    }
}
