//! How the codes of 256 tokens of one lane lie in a label page, and the quantiser, both as plain code.
//!
//! **Quantiser.** In f32, each operation rounded on its own (no fused multiply-add), the reciprocal `1 / step` computed once:
//! `code = clamp(floor((x - low) * (1 / step) + 0.5), 0, 2^bits - 1)`. Every device gives these bits.
//!
//! **Packing.** A lane's part of a label page is `256 x label_bytes`, sixteen blocks of 16 tokens, each `16 x label_bytes`. A block holds
//! the plan's groups one after the other, and a group is a row of *vectors* of 64 bytes: one little-endian 32-bit word for each of the 16
//! tokens. Four channels whose codes lie in the four bytes of a word are a *quad*: what a dot product of unsigned by signed bytes
//! (vpdpbusd, dp4a) consumes at once, for 16 tokens a vector. Below, `j` in 0..4 is the byte of the word.
//!
//! | bits | channels a vector | channel `n` of the vector lies in |
//! |---|---|---|
//! | 8 | 4 | byte `n` |
//! | 4 | 8 | byte `n % 4`, bits `4 * (n / 4)` and up |
//! | 2 | 16 | byte `n % 4`, bits `2 * (n / 4)` and up |
//! | 16 | 2 | see below |
//!
//! 16-bit codes are two 8-bit planes: for every four channels a vector of the low bytes, then a vector of the high bytes.
//! When a 2-bit group ends in 8 channels, its last vector has 32 bytes, one 16-bit word a token: channel `n` lies in bits
//! `4 * (n % 4) + 2 * (n / 4)` and up.

use crate::label::LabelPlan;
use crate::slot::CHUNK_TOKENS;

/// Tokens of a block of a label page.
pub const BLOCK_TOKENS: usize = 16;

/// The quantiser of the module's documentation.
#[must_use]
pub fn quantise(x: f32, low: f32, step: f32, bits: u8) -> u16 {
    let reciprocal = 1.0 / step;
    let offset = x - low;
    let scaled = offset * reciprocal;
    let shifted = scaled + 0.5;
    let top = ((1u32 << bits) - 1) as f32;
    shifted.floor().max(0.0).min(top) as u16
}

/// Packs `[token][kept channel]` codes of 256 tokens into one lane's `256 x label_bytes`.
pub fn encode(plan: &LabelPlan, codes: &[u16], lane_page: &mut [u8]) {
    let channels = plan.channels();
    assert_eq!(codes.len(), CHUNK_TOKENS * channels);
    assert_eq!(lane_page.len(), CHUNK_TOKENS * plan.label_bytes());
    lane_page.fill(0);
    for token in 0..CHUNK_TOKENS {
        for channel in 0..channels {
            let code = codes[token * channels + channel];
            for part in parts(plan, token, channel) {
                lane_page[part.byte] |= (((code >> part.code_shift) & part.mask) << part.byte_shift) as u8;
            }
        }
    }
}

/// The `[token][kept channel]` codes of one lane's `256 x label_bytes`.
#[must_use]
pub fn decode(plan: &LabelPlan, lane_page: &[u8]) -> Vec<u16> {
    let channels = plan.channels();
    assert_eq!(lane_page.len(), CHUNK_TOKENS * plan.label_bytes());
    let mut codes = vec![0; CHUNK_TOKENS * channels];
    for token in 0..CHUNK_TOKENS {
        for channel in 0..channels {
            let code = &mut codes[token * channels + channel];
            for part in parts(plan, token, channel) {
                *code |= ((u16::from(lane_page[part.byte]) >> part.byte_shift) & part.mask) << part.code_shift;
            }
        }
    }
    codes
}

/// Bits of a code that lie together in one byte.
#[derive(Clone, Copy)]
struct Part {
    byte: usize,
    byte_shift: u32,
    code_shift: u32,
    mask: u16,
}

/// Where the code of (`token`, kept `channel`) lies: one part, or two for 16-bit codes.
fn parts(plan: &LabelPlan, token: usize, channel: usize) -> Vec<Part> {
    let mut base = token / BLOCK_TOKENS * BLOCK_TOKENS * plan.label_bytes();
    let in_block = token % BLOCK_TOKENS;
    let mut first = 0;
    for group in plan.groups() {
        let channels = usize::from(group.channels);
        if channel < first + channels {
            return parts_in_group(base, in_block, channel - first, channels, group.bits);
        }
        first += channels;
        base += BLOCK_TOKENS * channels * usize::from(group.bits) / 8;
    }
    unreachable!("channel {channel} of {first}")
}

fn parts_in_group(base: usize, token: usize, channel: usize, channels: usize, bits: u8) -> Vec<Part> {
    let word = |vector: usize| base + vector * 64 + token * 4;
    match bits {
        16 => {
            let low = Part { byte: word(channel / 4 * 2) + channel % 4, byte_shift: 0, code_shift: 0, mask: 0xFF };
            vec![low, Part { byte: low.byte + 64, code_shift: 8, ..low }]
        }
        2 if channel / 16 == channels / 16 => {
            let n = channel % 16;
            let bit = 4 * (n % 4) + 2 * (n / 4);
            let byte = base + channels / 16 * 64 + token * 2 + bit / 8;
            vec![Part { byte, byte_shift: (bit % 8) as u32, code_shift: 0, mask: 3 }]
        }
        _ => {
            let a_vector = 32 / usize::from(bits);
            let n = channel % a_vector;
            let byte = word(channel / a_vector) + n % 4;
            vec![Part { byte, byte_shift: (n / 4) as u32 * u32::from(bits), code_shift: 0, mask: (1 << bits) - 1 }]
        }
    }
}
