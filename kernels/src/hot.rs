//! Hot rows: copies of rows that were fetched lately, kept between steps.
//!
//! A lane's pool keeps what the current step selected and, of the rest, what this step holds most important (LIMITS.md: a better rule than
//! least recently used, and it needs no ages). What is hot decides where a row is read from, never the result.

use std::collections::HashMap;

use crate::device::{HotRows, LayerGeometry};
use crate::slot::CHUNK_TOKENS;

/// The hot rows of every lane of one layer of one sequence.
#[derive(Debug)]
pub struct HotPool {
    row_bytes: usize,
    capacity: usize,
    lanes: Vec<HotLane>,
    /// `[lane][slot]` rows.
    rows: Vec<u8>,
    counts: HotCounts,
}

/// What the pool has been asked for since it was made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct HotCounts {
    /// Selected rows that were in the pool.
    pub hits: u64,
    /// Selected rows that were not.
    pub misses: u64,
}

/// What became of the rows that were not in the pool.
struct Brought {
    misses: usize,
    fetched: usize,
}

/// One lane's map.
#[derive(Debug, Default)]
struct HotLane {
    slot_of: HashMap<u32, u32>,
    free: Vec<u32>,
}

impl HotPool {
    /// A pool of `capacity` rows for each of `lanes` lanes; 0 keeps nothing.
    #[must_use]
    pub fn new(lanes: usize, capacity: usize, row_bytes: usize) -> Self {
        assert!(lanes * capacity < HotRows::COLD as usize, "slots of all lanes have 32-bit numbers");
        let lane = |lane: usize| {
            let slots = (lane * capacity) as u32..((lane + 1) * capacity) as u32;
            HotLane { slot_of: HashMap::new(), free: slots.rev().collect() }
        };
        let lanes: Vec<HotLane> = (0..lanes).map(lane).collect();
        Self { row_bytes, capacity, rows: vec![0; lanes.len() * capacity * row_bytes], lanes, counts: HotCounts::default() }
    }

    /// Rows that each lane can keep.
    #[must_use]
    pub fn capacity(&self) -> usize {
        self.capacity
    }

    /// Hits and misses since the pool was made.
    #[must_use]
    pub fn counts(&self) -> HotCounts {
        self.counts
    }

    /// The rows, for [`HotRows::rows`].
    #[must_use]
    pub fn rows(&self) -> &[u8] {
        &self.rows
    }

    /// Finds a lane's selected rows, and fetches as many of the missing ones as the pool has room for from `pages`.
    ///
    /// `positions` are ascending; `keys` are the lane's importance keys by row of this step. Room is made by dropping rows that this step
    /// did not select, lowest key first, of equal keys the highest position first; misses are taken in by position. Rows without a place
    /// stay cold. Writes one slot per position, or [`HotRows::COLD`].
    pub fn resolve(&mut self, lane: usize, positions: &[u32], keys: &[u16], fetch: &HotFetch, slots: &mut [u32]) {
        let misses = self.bring(lane, positions, keys, fetch, slots).misses;
        self.counts.misses += misses as u64;
        self.counts.hits += (positions.len() - misses) as u64;
    }

    /// The same for rows that a step is only expected to select: it counts neither hits nor misses. Returns how many rows were fetched.
    pub fn fetch_ahead(&mut self, lane: usize, positions: &[u32], keys: &[u16], fetch: &HotFetch) -> usize {
        self.bring(lane, positions, keys, fetch, &mut vec![HotRows::COLD; positions.len()]).fetched
    }

    fn bring(&mut self, lane: usize, positions: &[u32], keys: &[u16], fetch: &HotFetch, slots: &mut [u32]) -> Brought {
        assert_eq!(positions.len(), slots.len(), "one slot a position");
        let map = &mut self.lanes[lane];
        for (&position, slot) in positions.iter().zip(slots.iter_mut()) {
            *slot = map.slot_of.get(&position).copied().unwrap_or(HotRows::COLD);
        }
        let misses = slots.iter().filter(|&&slot| slot == HotRows::COLD).count();
        map.make_room(positions, keys, misses);
        let mut fetched = 0;
        for (&position, slot) in positions.iter().zip(slots.iter_mut()) {
            if *slot != HotRows::COLD {
                continue;
            }
            let Some(place) = map.free.pop() else { break };
            let from =
                &fetch.pages[position as usize / CHUNK_TOKENS][fetch.geometry.row_offset(lane, position as usize)..][..self.row_bytes];
            self.rows[place as usize * self.row_bytes..][..self.row_bytes].copy_from_slice(from);
            map.slot_of.insert(position, place);
            *slot = place;
            fetched += 1;
        }
        Brought { misses, fetched }
    }

    /// Forgets every row from `length` on, as truncating a sequence does.
    pub fn truncate(&mut self, length: usize) {
        for lane in &mut self.lanes {
            let free = &mut lane.free;
            lane.slot_of.retain(|&position, &mut slot| {
                let keep = (position as usize) < length;
                if !keep {
                    free.push(slot);
                }
                keep
            });
            // The map has no order of its own; results must not depend on it.
            lane.free.sort_unstable_by(|a, b| b.cmp(a));
        }
    }
}

/// Where missing rows are fetched from.
#[derive(Clone, Copy)]
pub struct HotFetch<'a> {
    /// Shape of the rows.
    pub geometry: &'a LayerGeometry,
    /// Row pages by chunk.
    pub pages: &'a [&'a [u8]],
}

impl HotLane {
    /// Drops rows until `wanted` slots are free or only rows of `positions` are left.
    fn make_room(&mut self, positions: &[u32], keys: &[u16], wanted: usize) {
        let missing = wanted.saturating_sub(self.free.len());
        if missing == 0 {
            return;
        }
        let key = |position: u32| keys.get(position as usize).copied().unwrap_or(0);
        let unselected = self.slot_of.keys().copied().filter(|position| positions.binary_search(position).is_err());
        let mut victims: Vec<(u16, std::cmp::Reverse<u32>)> =
            unselected.map(|position| (key(position), std::cmp::Reverse(position))).collect();
        let dropped = missing.min(victims.len());
        if dropped > 0 && dropped < victims.len() {
            victims.select_nth_unstable(dropped - 1);
        }
        victims.truncate(dropped);
        victims.sort_unstable();
        for (_, std::cmp::Reverse(position)) in victims {
            self.free.extend(self.slot_of.remove(&position));
        }
    }
}
