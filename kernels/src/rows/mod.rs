//! Rows as bytes: packing them from f32, and looking for what is not a number.

pub mod e4m3;

use half::{bf16, f16};

use crate::device::cpu::Level;
use crate::scales::LaneScales;
use crate::shape::RowType;

/// How f32 keys and values become rows.
#[derive(Clone, Copy, Debug)]
pub struct PackJob<'a> {
    /// `[token][lane][head_dim]`.
    pub keys: &'a [f32],
    /// `[token][lane][head_dim]`.
    pub values: &'a [f32],
    /// Lanes of the layer.
    pub lanes: usize,
    /// Channels of a key and of a value.
    pub head_dim: usize,
    /// Element type of the rows, to which elements are rounded to nearest even.
    pub row_type: RowType,
    /// Scales of the lanes, where rows are scaled.
    pub scales: &'a LaneScales,
}

impl PackJob<'_> {
    /// Tokens of the job.
    #[must_use]
    pub fn tokens(&self) -> usize {
        self.keys.len() / (self.lanes * self.head_dim)
    }
}

/// Writes `[lane][token][row]`, a row being key then value.
pub fn pack_rows(job: &PackJob, rows: &mut [u8]) {
    let (token_elements, element_bytes) = (job.lanes * job.head_dim, job.row_type.element_bytes());
    let (tokens, half_row) = (job.tokens(), job.head_dim * element_bytes);
    assert!(job.keys.len() == tokens * token_elements && job.values.len() == job.keys.len(), "keys and values of whole tokens");
    assert_eq!(rows.len(), tokens * job.lanes * 2 * half_row, "bytes of {tokens} tokens in {} lanes", job.lanes);
    let level = Level::available()[0];
    for (index, row) in rows.chunks_exact_mut(2 * half_row).enumerate() {
        let (lane, token) = (index / tokens, index % tokens);
        let from = token * token_elements + lane * job.head_dim;
        let (key, value) = row.split_at_mut(half_row);
        let scale = job.scales.of(lane);
        pack_elements(level, job.row_type, &job.keys[from..from + job.head_dim], scale.key, key);
        pack_elements(level, job.row_type, &job.values[from..from + job.head_dim], scale.value, value);
    }
}

fn pack_elements(level: Level, row_type: RowType, from: &[f32], scale: f32, to: &mut [u8]) {
    match row_type {
        RowType::F32 => to.copy_from_slice(bytemuck::cast_slice(from)),
        RowType::F16 => crate::device::cpu::to_f16(level, from, to),
        RowType::Bf16 => {
            for (to, &from) in to.as_chunks_mut::<2>().0.iter_mut().zip(from) {
                *to = bf16::from_f32(from).to_le_bytes();
            }
        }
        RowType::Fp8 => crate::device::cpu::to_e4m3(level, from, scale, to),
    }
}

/// The numbers of stored elements, each times `scale` where rows are scaled: exact but for that one multiplication, and the same on every
/// device. `elements` is a whole number of them.
pub fn read_elements(row_type: RowType, elements: &[u8], scale: f32, to: &mut [f32]) {
    assert_eq!(elements.len(), to.len() * row_type.element_bytes(), "bytes of {} elements", to.len());
    match row_type {
        RowType::F32 => bytemuck::cast_slice_mut(to).copy_from_slice(elements),
        RowType::F16 => {
            for (to, &from) in to.iter_mut().zip(elements.as_chunks::<2>().0) {
                *to = f16::from_le_bytes(from).to_f32();
            }
        }
        RowType::Bf16 => {
            for (to, &from) in to.iter_mut().zip(elements.as_chunks::<2>().0) {
                *to = bf16::from_le_bytes(from).to_f32();
            }
        }
        RowType::Fp8 => {
            for (to, &from) in to.iter_mut().zip(elements) {
                *to = e4m3::value_of(from, scale);
            }
        }
    }
}

/// Index of the first element that is infinite or not a number; `rows` is a whole number of elements.
#[must_use]
pub fn first_non_finite(rows: &[u8], row_type: RowType) -> Option<usize> {
    match row_type {
        RowType::F32 => first_with_exponent::<4>(rows, u32::from_le_bytes, 0x7F80_0000),
        RowType::F16 => first_with_exponent::<2>(rows, |bytes| u32::from(u16::from_le_bytes(bytes)), u32::from(f16::INFINITY.to_bits())),
        RowType::Bf16 => first_with_exponent::<2>(rows, |bytes| u32::from(u16::from_le_bytes(bytes)), u32::from(bf16::INFINITY.to_bits())),
        RowType::Fp8 => first_with_exponent::<1>(rows, |[code]| u32::from(code), u32::from(e4m3::NAN)),
    }
}

/// As [`first_non_finite`], of f32 values.
#[must_use]
pub fn first_non_finite_value(values: &[f32]) -> Option<usize> {
    first_with_exponent::<4>(bytemuck::cast_slice(values), u32::from_ne_bytes, 0x7F80_0000)
}

/// The first element whose bits of `exponent` are all set.
fn first_with_exponent<const N: usize>(rows: &[u8], bits: impl Fn([u8; N]) -> u32, exponent: u32) -> Option<usize> {
    const PIECE: usize = 1024;
    let elements = rows.as_chunks::<N>().0;
    let is_set = |&bytes: &[u8; N]| bits(bytes) & exponent == exponent;
    for (piece, elements) in elements.chunks(PIECE).enumerate() {
        // Without an early exit inside the piece the comparison is vectorised.
        if elements.iter().fold(false, |any, element| any | is_set(element)) {
            return elements.iter().position(is_set).map(|index| piece * PIECE + index);
        }
    }
    None
}
