use half::{bf16, f16};
use proptest::prelude::*;
use sluice_kernels::rows::{PackJob, e4m3, first_non_finite, first_non_finite_value, pack_rows, read_elements};
use sluice_kernels::scales::{LaneScales, RowScale};
use sluice_kernels::shape::RowType;

use crate::data::ROW_TYPES;
use crate::e4m3::{e4m3_code, e4m3_value};

fn elements(row_type: RowType, values: &[f32], scale: f32) -> Vec<u8> {
    let bytes = |&x: &f32| match row_type {
        RowType::F32 => x.to_le_bytes().to_vec(),
        RowType::F16 => f16::from_f32_const(x).to_bits().to_le_bytes().to_vec(),
        RowType::Bf16 => bf16::from_f32_const(x).to_bits().to_le_bytes().to_vec(),
        RowType::Fp8 if x.is_finite() => vec![e4m3_code((x / scale).clamp(-1000.0, 1000.0))],
        RowType::Fp8 => vec![e4m3_code(x)],
    };
    values.iter().flat_map(bytes).collect()
}

proptest! {
    #[test]
    fn packing_rounds_like_half_and_puts_every_element_in_its_place(
        bits in prop::collection::vec(any::<u32>(), 2 * 3 * 2 * 40), row_type in prop::sample::select(ROW_TYPES.to_vec()),
        scales in prop::collection::vec(1e-3f32..1e3, 4),
    ) {
        // All bit patterns: numbers of every size, subnormals, infinities, NaNs.
        let all: Vec<f32> = bits.iter().map(|&bits| f32::from_bits(bits)).collect();
        let (keys, values) = all.split_at(3 * 2 * 40);
        let mut rows = vec![0; 3 * 2 * 2 * 40 * row_type.element_bytes()];
        let lane_scales = LaneScales::from(vec![RowScale { key: scales[0], value: scales[1] }, RowScale { key: scales[2], value: scales[3] }]);
        pack_rows(&PackJob { keys, values, lanes: 2, head_dim: 40, row_type, scales: &lane_scales }, &mut rows);
        let mut expected = Vec::new();
        for lane in 0..2 {
            for token in 0..3 {
                let range = (token * 2 + lane) * 40..(token * 2 + lane + 1) * 40;
                expected.extend(elements(row_type, &keys[range.clone()], scales[2 * lane]));
                expected.extend(elements(row_type, &values[range], scales[2 * lane + 1]));
            }
        }
        prop_assert_eq!(rows, expected);
    }

    #[test]
    fn the_first_element_that_is_no_number_is_found(
        len in 1usize..5000, at in prop::collection::vec(any::<prop::sample::Index>(), 0..3), pick in 0usize..3,
        row_type in prop::sample::select(ROW_TYPES.to_vec()),
    ) {
        let largest = match row_type { RowType::F32 | RowType::Fp8 => f32::MAX, RowType::F16 => 65504.0, RowType::Bf16 => bf16::MAX.to_f32() };
        let mut values: Vec<f32> = (0..len).map(|index| [0.0, -largest, largest, 1e-7, -2.5][index % 5]).collect();
        let places: Vec<usize> = at.iter().map(|index| index.index(len)).collect();
        for &place in &places {
            values[place] = [f32::NAN, f32::INFINITY, f32::NEG_INFINITY][pick];
        }
        prop_assert_eq!(first_non_finite(&elements(row_type, &values, 0.7), row_type), places.iter().copied().min());
        prop_assert_eq!(first_non_finite_value(&values), places.iter().copied().min());
    }

    #[test]
    fn e4m3_codes_are_the_nearest_of_all(bits in any::<u32>(), small in -600f32..600.0, scale in 1e-4f32..1e4) {
        let any_size = f32::from_bits(bits);
        for x in [small * scale, small / 64.0 * scale, if any_size.is_finite() { any_size } else { 0.0 }] {
            let quotient = f64::from(x / scale).clamp(-448.0, 448.0);
            let code = e4m3::code_of(x, scale);
            let distance = |code: u8| (e4m3_value(code) - quotient).abs();
            let numbers = (0..=255u8).filter(|code| code & 0x7F != 0x7F);
            let least = numbers.clone().map(distance).fold(f64::INFINITY, f64::min);
            prop_assert!(distance(code) == least, "{} at {}: code {:#x}", x, scale, code);
            // Of two equally near ones of the same sign the even one.
            let tied = numbers.filter(|&other| distance(other) == least && other & 0x80 == code & 0x80).count();
            prop_assert!(tied == 1 || code.is_multiple_of(2), "{} at {}: code {:#x}", x, scale, code);
            prop_assert_eq!(code & 0x80 != 0, (x / scale).is_sign_negative());
        }
    }
}

#[test]
fn every_e4m3_code_is_what_its_definition_says() {
    for code in 0..=255u8 {
        for scale in [1.0, 0.037, 300.0] {
            let (value, expected) = (e4m3::value_of(code, scale), e4m3_value(code) as f32 * scale);
            assert!(value.to_bits() == expected.to_bits() || value.is_nan() && expected.is_nan(), "{code:#x} at {scale}: {value}");
            let mut read = [0.0];
            read_elements(RowType::Fp8, &[code], scale, &mut read);
            assert!(read[0].to_bits() == expected.to_bits() || read[0].is_nan() && expected.is_nan());
            assert_eq!(value.is_nan(), first_non_finite(&[code], RowType::Fp8) == Some(0));
            // A number that has a code of its own keeps it; what is no number gets the code that is none.
            if code & 0x7F != 0x7F || scale == 1.0 {
                assert_eq!(e4m3::code_of(value, scale) & 0x7F, code & 0x7F, "{value} at {scale}");
            }
        }
    }
    // Halfway between neighbours goes to the even one, just beyond it on.
    for low in 0..126u8 {
        let middle = ((e4m3_value(low) + e4m3_value(low + 1)) / 2.0) as f32;
        assert_eq!(e4m3::code_of(middle, 1.0), low + low % 2, "halfway above {low:#x}");
        assert_eq!(e4m3::code_of(middle.next_up(), 1.0), low + 1);
        assert_eq!(e4m3::code_of(-middle.next_down(), 1.0), low | 0x80);
    }
    for (x, code) in
        [(448.0, 0x7E), (464.0, 0x7E), (1e30, 0x7E), (-449.0, 0xFE), (f32::INFINITY, 0x7F), (-f32::INFINITY, 0xFF), (-0.0, 0x80)]
    {
        assert_eq!(e4m3::code_of(x, 1.0), code, "{x}");
    }
    assert_eq!(e4m3::code_of(1e30, 1e-30), 0x7E, "a quotient beyond f32 is cut off as well");
    assert_eq!(e4m3::code_of(f32::NAN, 1.0) & 0x7F, 0x7F);
}
