//! Top-k of 16-bit keys: the threshold by counting, then one pass that writes positions in order.

use super::simd::{Simd, Task};

/// The rows of one lane.
pub(super) struct SelectLane<'a> {
    pub(super) keys: &'a [u16],
    pub(super) sinks: usize,
    pub(super) positions: &'a mut [u32],
    /// Working room.
    pub(super) room: &'a mut Vec<u16>,
}

impl Task for SelectLane<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let (sinks, keys) = self.keys.split_at(self.sinks);
        let (first, rest) = self.positions.split_at_mut(sinks.len());
        for (position, to) in first.iter_mut().enumerate() {
            *to = position as u32;
        }
        assert!(rest.len() <= keys.len(), "{} rows wanted of {}", rest.len(), keys.len());
        if rest.is_empty() {
            return;
        }
        let threshold = find_threshold(simd, keys, rest.len(), self.room);
        write_positions(simd, keys, self.sinks as u32, threshold, rest);
    }
}

/// All rows above `key` are selected, and the first `ties` rows of exactly `key`.
#[derive(Clone, Copy)]
struct Threshold {
    key: u16,
    ties: usize,
}

/// Finds the threshold: the largest key that at least `wanted` rows reach.
///
/// A sample of the keys says between which two keys it should lie. One pass over all keys then counts the rows above and collects those
/// between, and only these are searched. Where the sample was wrong, all keys are.
#[inline(always)]
fn find_threshold<S: Simd>(simd: S, keys: &[u16], wanted: usize, room: &mut Vec<u16>) -> Threshold {
    const LEAST_ROWS: usize = 16 * 1024;
    if keys.len() < LEAST_ROWS {
        return search(simd, keys, wanted, 0);
    }
    let (low, high) = sample_bracket(simd, keys, wanted, room);
    let above = collect_between(simd, keys, low, high, room);
    if above >= wanted || above + room.len() < wanted {
        return search(simd, keys, wanted, 0);
    }
    search(simd, room, wanted, above)
}

/// Two keys between which the threshold most likely lies: the sample's own thresholds for some more and some fewer rows.
#[inline(always)]
fn sample_bracket<S: Simd>(simd: S, keys: &[u16], wanted: usize, room: &mut Vec<u16>) -> (u16, u16) {
    const ONE_IN: usize = 8;
    room.clear();
    let vectors = keys.as_chunks::<32>().0;
    for vector in vectors.iter().step_by(ONE_IN) {
        room.extend_from_slice(vector);
    }
    let expected = wanted * room.len() / keys.len();
    // Four standard deviations of a sample of single rows.
    let margin = 8 + 4 * expected.isqrt();
    let low = search(simd, room, (expected + margin).clamp(1, room.len()), 0).key;
    let high = if expected > margin { search(simd, room, expected - margin, 0).key } else { u16::MAX };
    (low, high)
}

/// Puts the keys from `low` to `high` into `room` and returns how many keys are above `high`.
#[inline(always)]
fn collect_between<S: Simd>(simd: S, keys: &[u16], low: u16, high: u16, room: &mut Vec<u16>) -> usize {
    room.clear();
    let mut above = 0;
    let (vectors, tail) = keys.as_chunks::<32>();
    for vector in vectors {
        // SAFETY: 32 keys.
        let reach = unsafe { simd.at_least(vector.as_ptr(), low) };
        let over = reach_above(simd, vector, high);
        above += over.count_ones() as usize;
        let mut between = reach & !over;
        while between != 0 {
            room.push(vector[between.trailing_zeros() as usize]);
            between &= between - 1;
        }
    }
    for &key in tail {
        above += usize::from(key > high);
        if (low..=high).contains(&key) {
            room.push(key);
        }
    }
    above
}

/// Bit i: whether key i is above `key`.
#[inline(always)]
fn reach_above<S: Simd>(simd: S, keys: &[u16; 32], key: u16) -> u32 {
    match key.checked_add(1) {
        // SAFETY: 32 keys.
        Some(next) => unsafe { simd.at_least(keys.as_ptr(), next) },
        None => 0,
    }
}

/// The largest key that at least `wanted` rows reach, among `keys` and `above` rows of larger keys; two bits at a time.
#[inline(always)]
fn search<S: Simd>(simd: S, keys: &[u16], wanted: usize, above: usize) -> Threshold {
    let mut key = 0u16;
    // Rows that reach the next larger key still in question.
    let mut larger = above;
    for shift in (0..16).step_by(2).rev() {
        let bounds = [key + (1 << shift), key + (2 << shift), key + (3 << shift)];
        let counts = count_at_least(simd, keys, bounds).map(|count| count + above);
        let digit = counts.iter().take_while(|&&count| count >= wanted).count();
        if digit < 3 {
            larger = counts[digit];
        }
        key += (digit as u16) << shift;
    }
    Threshold { key, ties: wanted - larger }
}

/// How many keys are at least each bound.
#[inline(always)]
fn count_at_least<S: Simd>(simd: S, keys: &[u16], bounds: [u16; 3]) -> [usize; 3] {
    let (vectors, tail) = keys.as_chunks::<32>();
    let mut counts = bounds.map(|bound| tail.iter().filter(|&&key| key >= bound).count());
    for vector in vectors {
        for (count, bound) in counts.iter_mut().zip(bounds) {
            // SAFETY: 32 keys.
            *count += unsafe { simd.at_least(vector.as_ptr(), bound) }.count_ones() as usize;
        }
    }
    counts
}

#[inline(always)]
fn write_positions<S: Simd>(simd: S, keys: &[u16], first: u32, threshold: Threshold, positions: &mut [u32]) {
    let mut ties = threshold.ties;
    let mut written = 0;
    let (vectors, tail) = keys.as_chunks::<32>();
    for (index, vector) in vectors.iter().enumerate() {
        // SAFETY: 32 keys.
        let reach = unsafe { simd.at_least(vector.as_ptr(), threshold.key) };
        let above = reach_above(simd, vector, threshold.key);
        let mask = if reach == above { above } else { above | lowest_bits(reach & !above, &mut ties) };
        let position = first + index as u32 * 32;
        written = write_mask(simd, positions, written, position, mask & 0xFFFF);
        written = write_mask(simd, positions, written, position + 16, mask >> 16);
    }
    for (index, &key) in tail.iter().enumerate() {
        let tie = key == threshold.key && ties > 0;
        ties -= usize::from(tie);
        if tie || key > threshold.key {
            positions[written] = first + (vectors.len() * 32 + index) as u32;
            written += 1;
        }
    }
    assert_eq!(written, positions.len(), "rows selected");
}

/// The lowest set bits of `mask`, at most `left` of them, which are taken off.
#[inline(always)]
fn lowest_bits(mask: u32, left: &mut usize) -> u32 {
    let mut rest = mask;
    let mut count = mask.count_ones() as usize;
    while count > *left {
        rest &= !(1 << (31 - rest.leading_zeros()));
        count -= 1;
    }
    *left -= count;
    rest
}

/// Writes the positions of 16 rows' mask and returns how many are written in all.
#[inline(always)]
fn write_mask<S: Simd>(simd: S, positions: &mut [u32], written: usize, first: u32, mask: u32) -> usize {
    if positions.len() - written >= 16 {
        // Written even when the mask is empty: foreseeing that would cost more. SAFETY: 16 words are writable from `written` on.
        return written + unsafe { simd.compress(positions.as_mut_ptr().add(written), first, mask) };
    }
    let mut room = [0u32; 16];
    // SAFETY: the array has 16 words.
    let count = unsafe { simd.compress(room.as_mut_ptr(), first, mask) };
    positions[written..written + count].copy_from_slice(&room[..count]);
    written + count
}
