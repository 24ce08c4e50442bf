//! Probes of memory: how fast this machine reads rows when nothing is computed from them.
//!
//! A step reads selected rows and all labels, so its floor is `row bytes / gather rate + label bytes / read rate`. The probes below measure
//! the two rates over the very mappings that a step reads. They share no function with a device: what a device does badly shows as a gap.
//! Work is taken from a shared counter, so that a core that is busy elsewhere does not hold the others up.

use std::sync::Barrier;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::Instant;

use thiserror::Error;

/// What a probe read, and how long it took.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ProbeReading {
    /// Bytes read.
    pub bytes: u64,
    /// Seconds from the moment all threads were ready to the moment the last one was done.
    pub seconds: f64,
    /// Exclusive or of all 64-bit words that were read: keeps the reads alive and proves what was read.
    pub check: u64,
}

impl ProbeReading {
    /// Bytes per nanosecond, that is 1e9 bytes a second.
    #[must_use]
    pub fn gb_per_s(&self) -> f64 {
        self.bytes as f64 / self.seconds / 1e9
    }
}

/// Rows of one layer to be gathered.
#[derive(Clone, Copy, Debug)]
pub struct GatherLayer<'a> {
    /// Pages by chunk, from chunk 0: `lanes x rows_per_page x row_bytes`, lane after lane.
    pub pages: &'a [&'a [u8]],
    /// Positions by lane, each ascending and below `pages.len() * rows_per_page`.
    pub positions: &'a [&'a [u32]],
    /// Rows of one lane in a page.
    pub rows_per_page: usize,
    /// Bytes of a row: a multiple of 64.
    pub row_bytes: usize,
}

/// Bytes of one cache line, and of one step of the inner loops.
const LINE: usize = 64;
/// Bytes of rows between a prefetch and its use: more than covers a memory access, and still fits the first cache.
const PREFETCH_BYTES: usize = 16 * 1024;
/// Chunks whose rows are gathered together, all lanes after each other: rows in flight lie near each other (LIMITS.md, "The link and the memory").
const PIECE_CHUNKS: usize = 16;

/// Reads every whole line of all parts once, in order, with `threads` threads.
///
/// Parts should be of similar size and many times more than threads: a part is the unit of work. Bytes after the last whole 64-byte
/// line of a part are neither read nor counted.
#[must_use]
pub fn read_probe(parts: &[&[u8]], threads: usize) -> ProbeReading {
    let width = Width::detect();
    timed(threads, parts.len(), |piece| {
        let part = parts[piece];
        let lines = part.len() / LINE;
        (lines as u64 * LINE as u64, width.fold(&part[..lines * LINE]))
    })
}

/// Reads the listed rows of all layers once, each lane in ascending order, with software prefetch and `threads` threads.
///
/// # Errors
/// A position outside the pages, or rows that are not a multiple of 64 bytes.
pub fn gather_probe(layers: &[GatherLayer<'_>], threads: usize) -> Result<ProbeReading, ProbeError> {
    let width = Width::detect();
    let pieces: Vec<Vec<GatherPiece<'_>>> = layers.iter().map(gather_pieces).collect::<Result<_, _>>()?;
    let pieces = pieces.concat();
    Ok(timed(threads, pieces.len(), |piece| pieces[piece].read(width)))
}

/// Lists that cannot be gathered; nothing was read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum ProbeError {
    /// Rows are read in whole cache lines.
    #[error("row_bytes: {bytes} is not a positive multiple of {LINE}")]
    RowBytes {
        /// Bytes given.
        bytes: usize,
    },
    /// Ascending positions end before the last row.
    #[error("positions: {position} lies behind the {rows} rows of the pages")]
    Position {
        /// Position given.
        position: u32,
        /// Rows of all pages.
        rows: usize,
    },
}

/// Ascending rows of one lane of a few neighbouring chunks.
#[derive(Clone, Copy)]
struct GatherPiece<'a> {
    layer: GatherLayer<'a>,
    lane: usize,
    positions: &'a [u32],
}

fn gather_pieces<'a>(layer: &GatherLayer<'a>) -> Result<Vec<GatherPiece<'a>>, ProbeError> {
    let layer = *layer;
    if layer.row_bytes == 0 || !layer.row_bytes.is_multiple_of(LINE) {
        return Err(ProbeError::RowBytes { bytes: layer.row_bytes });
    }
    let piece_rows = PIECE_CHUNKS * layer.rows_per_page;
    let rows = layer.pages.len() * layer.rows_per_page;
    let mut rest = layer.positions.to_vec();
    let mut pieces = Vec::new();
    for end in (piece_rows..rows + piece_rows).step_by(piece_rows) {
        for (lane, rest) in rest.iter_mut().enumerate() {
            let count = rest.partition_point(|&position| (position as usize) < end.min(rows));
            let (positions, after) = rest.split_at(count);
            pieces.push(GatherPiece { layer, lane, positions });
            *rest = after;
        }
    }
    match rest.iter().find_map(|rest| rest.first()) {
        Some(&position) => Err(ProbeError::Position { position, rows }),
        None => Ok(pieces),
    }
}

impl GatherPiece<'_> {
    fn row(&self, position: u32) -> &[u8] {
        let GatherLayer { pages, rows_per_page, row_bytes, .. } = self.layer;
        let position = position as usize;
        let offset = (self.lane * rows_per_page + position % rows_per_page) * row_bytes;
        &pages[position / rows_per_page][offset..offset + row_bytes]
    }

    fn read(&self, width: Width) -> (u64, u64) {
        let distance = PREFETCH_BYTES / self.layer.row_bytes;
        for &position in self.positions.iter().take(distance) {
            prefetch(self.row(position));
        }
        let mut check = 0;
        for (index, &position) in self.positions.iter().enumerate() {
            if let Some(&ahead) = self.positions.get(index + distance) {
                prefetch(self.row(ahead));
            }
            check ^= width.fold(self.row(position));
        }
        ((self.positions.len() * self.layer.row_bytes) as u64, check)
    }
}

/// Runs `work` on the pieces `0..count`, each once, on `threads` threads, and times it from the moment all of them are ready.
fn timed(threads: usize, count: usize, work: impl Fn(usize) -> (u64, u64) + Sync) -> ProbeReading {
    let threads = threads.clamp(1, count.max(1));
    let (next, bytes, check) = (AtomicUsize::new(0), AtomicU64::new(0), AtomicU64::new(0));
    let ready = Barrier::new(threads);
    let start = std::sync::OnceLock::new();
    let run = || {
        ready.wait();
        start.get_or_init(Instant::now);
        let (mut read, mut folded) = (0, 0);
        loop {
            let piece = next.fetch_add(1, Ordering::Relaxed);
            if piece >= count {
                break;
            }
            let (piece_bytes, piece_check) = work(piece);
            read += piece_bytes;
            folded ^= piece_check;
        }
        bytes.fetch_add(read, Ordering::Relaxed);
        check.fetch_xor(folded, Ordering::Relaxed);
    };
    std::thread::scope(|scope| {
        for _ in 1..threads {
            scope.spawn(run);
        }
        run();
    });
    let seconds = start.get().map_or(0.0, |start| start.elapsed().as_secs_f64());
    ProbeReading { bytes: bytes.into_inner(), seconds, check: check.into_inner() }
}

/// Width of a load.
#[derive(Clone, Copy)]
enum Width {
    Portable,
    #[cfg(target_arch = "x86_64")]
    Avx2,
    #[cfg(target_arch = "x86_64")]
    Avx512,
}

impl Width {
    fn detect() -> Self {
        #[cfg(target_arch = "x86_64")]
        {
            if is_x86_feature_detected!("avx512f") {
                return Self::Avx512;
            }
            if is_x86_feature_detected!("avx2") {
                return Self::Avx2;
            }
        }
        Self::Portable
    }

    /// Exclusive or of the 64-bit words of `bytes`, a multiple of one line.
    fn fold(self, bytes: &[u8]) -> u64 {
        match self {
            Self::Portable => fold_lines(bytes),
            // SAFETY: `detect` is the only maker of this variant and has seen the feature on this processor.
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => unsafe { fold_avx2(bytes) },
            // SAFETY: as above.
            #[cfg(target_arch = "x86_64")]
            Self::Avx512 => unsafe { fold_avx512(bytes) },
        }
    }
}

/// As [`fold_lines`], in two 256-bit registers a line.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
fn fold_avx2(bytes: &[u8]) -> u64 {
    use std::arch::x86_64::{__m256i, _mm256_loadu_si256, _mm256_setzero_si256, _mm256_xor_si256};
    let mut sums = [_mm256_setzero_si256(); 4];
    let (blocks, rest) = bytes.as_chunks::<128>();
    for block in blocks {
        for (part, sum) in block.as_chunks::<32>().0.iter().zip(&mut sums) {
            // SAFETY: `part` is 32 readable bytes and the load has no alignment.
            let value = unsafe { _mm256_loadu_si256(part.as_ptr().cast::<__m256i>()) };
            *sum = _mm256_xor_si256(*sum, value);
        }
    }
    let [a, b, c, d] = sums;
    let sum = _mm256_xor_si256(_mm256_xor_si256(a, b), _mm256_xor_si256(c, d));
    bytemuck::cast::<__m256i, [u64; 4]>(sum).iter().fold(fold_lines(rest), |all, word| all ^ word)
}

/// As [`fold_lines`], in one 512-bit register a line.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f")]
fn fold_avx512(bytes: &[u8]) -> u64 {
    use std::arch::x86_64::{__m256i, __m512i, _mm256_xor_si256};
    use std::arch::x86_64::{
        _mm512_castsi512_si256, _mm512_extracti64x4_epi64, _mm512_loadu_si512, _mm512_setzero_si512, _mm512_xor_si512,
    };
    let mut sums = [_mm512_setzero_si512(); 4];
    let (blocks, rest) = bytes.as_chunks::<{ 4 * LINE }>();
    for block in blocks {
        for (line, sum) in block.as_chunks::<LINE>().0.iter().zip(&mut sums) {
            // SAFETY: `line` is 64 readable bytes and the load has no alignment.
            let value = unsafe { _mm512_loadu_si512(line.as_ptr().cast::<__m512i>()) };
            *sum = _mm512_xor_si512(*sum, value);
        }
    }
    let [a, b, c, d] = sums;
    let sum = _mm512_xor_si512(_mm512_xor_si512(a, b), _mm512_xor_si512(c, d));
    let half = _mm256_xor_si256(_mm512_castsi512_si256(sum), _mm512_extracti64x4_epi64::<1>(sum));
    bytemuck::cast::<__m256i, [u64; 4]>(half).iter().fold(fold_lines(rest), |all, word| all ^ word)
}

/// Exclusive or of the 64-bit words of `bytes`, a multiple of one line.
fn fold_lines(bytes: &[u8]) -> u64 {
    bytes.as_chunks::<8>().0.iter().fold(0, |all, word| all ^ u64::from_le_bytes(*word))
}

/// Asks for all lines of a row.
#[inline(always)]
fn prefetch(row: &[u8]) {
    #[cfg(target_arch = "x86_64")]
    for line in row.iter().step_by(LINE) {
        // SAFETY: a prefetch is a hint without architectural effect; the address is that of a byte of a live slice.
        unsafe { std::arch::x86_64::_mm_prefetch::<{ std::arch::x86_64::_MM_HINT_T0 }>(std::ptr::from_ref(line).cast()) };
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = row;
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Words that differ everywhere, so that a missed or doubled line changes the check.
    fn memory(words: usize, seed: u64) -> Vec<u8> {
        (0..words as u64).flat_map(|word| (word + seed).wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(29).to_le_bytes()).collect()
    }

    fn naive_xor(bytes: &[u8]) -> u64 {
        let mut all = [0_u8; 8];
        for (index, byte) in bytes.iter().enumerate() {
            all[index % 8] ^= byte;
        }
        u64::from_le_bytes(all)
    }

    #[test]
    fn every_line_is_read_once_at_every_width() {
        let memory = memory(4096, 1);
        let parts: Vec<&[u8]> = vec![&memory[..64], &memory[64..8256], &memory[8256..8256 + 448], &[], &memory[16384..]];
        let expected = parts.iter().fold(0, |all, part| all ^ naive_xor(part));
        let bytes = parts.iter().map(|part| part.len() as u64).sum::<u64>();
        for threads in [1, 2, 7] {
            let reading = read_probe(&parts, threads);
            assert_eq!((reading.bytes, reading.check), (bytes, expected));
            assert!(reading.seconds > 0.0);
        }
        for length in [0, 64, 128, 192, 256, 320, 1024 + 64] {
            assert_eq!(fold_lines(&memory[..length]), naive_xor(&memory[..length]));
            for width in [Width::detect(), Width::Portable] {
                assert_eq!(width.fold(&memory[..length]), naive_xor(&memory[..length]), "{length} bytes");
            }
            #[cfg(target_arch = "x86_64")]
            if is_x86_feature_detected!("avx2") {
                assert_eq!(Width::Avx2.fold(&memory[..length]), naive_xor(&memory[..length]), "{length} bytes");
            }
        }
    }

    #[test]
    fn listed_rows_and_no_others_are_gathered() {
        let (lanes, rows_per_page, row_bytes) = (3, 16, 128);
        let pages: Vec<Vec<u8>> = (0..40).map(|page| memory(lanes * rows_per_page * row_bytes / 8, page * 7919)).collect();
        let pages: Vec<&[u8]> = pages.iter().map(Vec::as_slice).collect();
        let positions: Vec<Vec<u32>> = vec![(0..640).step_by(7).collect(), vec![], vec![0, 1, 2, 255, 256, 257, 639]];
        let positions: Vec<&[u32]> = positions.iter().map(Vec::as_slice).collect();
        let layer = GatherLayer { pages: &pages, positions: &positions, rows_per_page, row_bytes };
        let mut expected = 0;
        for (lane, list) in positions.iter().enumerate() {
            for position in list.iter().map(|&position| position as usize) {
                let row = (lane * rows_per_page + position % rows_per_page) * row_bytes;
                expected ^= naive_xor(&pages[position / rows_per_page][row..row + row_bytes]);
            }
        }
        let rows = positions.iter().map(|list| list.len()).sum::<usize>();
        for threads in [1, 3] {
            let reading = gather_probe(&[layer], threads).expect("lists within the pages");
            assert_eq!((reading.bytes, reading.check), ((rows * row_bytes) as u64, expected));
            let twice = gather_probe(&[layer, layer], threads).expect("lists within the pages");
            assert_eq!((twice.bytes, twice.check), (2 * (rows * row_bytes) as u64, 0));
        }
    }

    #[test]
    fn lists_that_do_not_fit_are_refused() {
        let page = memory(16 * 64 / 8, 3);
        let layer = GatherLayer { pages: &[&page], positions: &[&[3, 16]], rows_per_page: 16, row_bytes: 64 };
        assert_eq!(gather_probe(&[layer], 1), Err(ProbeError::Position { position: 16, rows: 16 }));
        assert_eq!(gather_probe(&[GatherLayer { row_bytes: 60, ..layer }], 1), Err(ProbeError::RowBytes { bytes: 60 }));
    }
}
