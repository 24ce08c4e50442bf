//! Limbo: what a holder could still be reading in a step that it began before we took it away.
//!
//! A holder stores its started word, then reads the board; the engine writes the board, then reads the started word. With stores still in
//! flight either could miss the other, so an entry is stamped at the turn after its board word was written: milliseconds later, every
//! step that may have seen the old word has its started word in memory.

use sluice_kernels::shared::open::{MAX_WRITERS, OpenWords};
use sluice_kernels::slot::SlotId;

/// What waits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Waiting {
    /// A slot that becomes free.
    Slot(SlotId),
    /// A hold on a chunk that a path has dropped.
    Hold(u64),
}

/// A holder that may be reading.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Reader {
    sequence: u64,
    generation: u64,
    started: Option<[u64; MAX_WRITERS]>,
}

#[derive(Debug)]
struct Entry {
    what: Waiting,
    readers: Vec<Reader>,
}

/// Everything that waits for a step to complete.
#[derive(Debug, Default)]
pub struct Limbo {
    entries: Vec<Entry>,
}

impl Limbo {
    /// Takes up something that the given leases (sequence, generation) could be reading.
    pub fn add(&mut self, what: Waiting, leases: impl IntoIterator<Item = (u64, u64)>) {
        let readers = leases.into_iter().map(|(sequence, generation)| Reader { sequence, generation, started: None });
        self.entries.push(Entry { what, readers: readers.collect() });
    }

    /// Entries.
    #[must_use]
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Whether nothing waits.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// Slots that wait.
    #[must_use]
    pub fn slots(&self) -> usize {
        self.entries.iter().filter(|entry| matches!(entry.what, Waiting::Slot(_))).count()
    }

    /// Drops entries without giving them out.
    pub fn forget(&mut self, which: impl Fn(Waiting) -> bool) {
        self.entries.retain(|entry| !which(entry.what));
    }

    /// Stamps new entries and gives out what no step can be reading any more. `words` answers with the words of a live lease, and with
    /// `None` when that lease has ended. Call no sooner than a turn after the boards were written.
    pub fn settle(&mut self, mut words: impl FnMut(u64, u64) -> Option<OpenWords>) -> Vec<Waiting> {
        let mut settled = Vec::new();
        self.entries.retain_mut(|entry| {
            entry.readers.retain_mut(|reader| {
                let Some(words) = words(reader.sequence, reader.generation) else { return false };
                let started = *reader.started.get_or_insert(words.started);
                words.completed.iter().zip(started).any(|(&completed, started)| completed < started)
            });
            if entry.readers.is_empty() {
                settled.push(entry.what);
            }
            !entry.readers.is_empty()
        });
        settled
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(started: u64, completed: u64) -> OpenWords {
        OpenWords { committed: [0; MAX_WRITERS], started: [started; MAX_WRITERS], completed: [completed; MAX_WRITERS] }
    }

    #[test]
    fn a_slot_waits_for_the_step_that_was_running_and_for_no_later_one() {
        let slot = Waiting::Slot(SlotId { segment: 0, index: 3 });
        let mut limbo = Limbo::default();
        limbo.add(slot, [(7, 1)]);
        assert_eq!(limbo.settle(|_, _| Some(words(5, 4))), [], "step 5 is running");
        assert_eq!(limbo.settle(|_, _| Some(words(6, 4))), [], "still running");
        assert_eq!(limbo.settle(|_, _| Some(words(9, 5))), [slot], "step 5 is over, later ones do not matter");
        assert!(limbo.is_empty());
    }

    #[test]
    fn every_holder_counts_and_an_ended_lease_does_not() {
        let hold = Waiting::Hold(11);
        let mut limbo = Limbo::default();
        limbo.add(hold, [(1, 1), (2, 4)]);
        let first_only = |sequence: u64, _| (sequence == 1).then(|| words(2, 1));
        assert_eq!(limbo.settle(first_only), []);
        assert_eq!(limbo.settle(|sequence, generation| (sequence == 2 && generation == 4).then(|| words(2, 1))), [hold]);
    }
}
