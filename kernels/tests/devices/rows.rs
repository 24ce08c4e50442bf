use half::{bf16, f16};
use proptest::prelude::*;
use sluice_kernels::rows::{PackJob, first_non_finite, pack_rows};
use sluice_kernels::shape::RowType;

fn elements(row_type: RowType, values: &[f32]) -> Vec<u8> {
    let bytes = |&x: &f32| match row_type {
        RowType::F32 => x.to_le_bytes().to_vec(),
        RowType::F16 => f16::from_f32_const(x).to_bits().to_le_bytes().to_vec(),
        RowType::Bf16 => bf16::from_f32_const(x).to_bits().to_le_bytes().to_vec(),
    };
    values.iter().flat_map(bytes).collect()
}

proptest! {
    #[test]
    fn packing_rounds_like_half_and_puts_every_element_in_its_place(
        bits in prop::collection::vec(any::<u32>(), 2 * 3 * 2 * 40), row_type in prop::sample::select(vec![RowType::F32, RowType::F16, RowType::Bf16]),
    ) {
        // All bit patterns: numbers of every size, subnormals, infinities, NaNs.
        let all: Vec<f32> = bits.iter().map(|&bits| f32::from_bits(bits)).collect();
        let (keys, values) = all.split_at(3 * 2 * 40);
        let mut rows = vec![0; 3 * 2 * 2 * 40 * row_type.element_bytes()];
        pack_rows(&PackJob { keys, values, lanes: 2, head_dim: 40, row_type }, &mut rows);
        let mut expected = Vec::new();
        for lane in 0..2 {
            for token in 0..3 {
                let range = (token * 2 + lane) * 40..(token * 2 + lane + 1) * 40;
                expected.extend(elements(row_type, &keys[range.clone()]));
                expected.extend(elements(row_type, &values[range]));
            }
        }
        prop_assert_eq!(rows, expected);
    }

    #[test]
    fn the_first_element_that_is_no_number_is_found(
        len in 1usize..5000, at in prop::collection::vec(any::<prop::sample::Index>(), 0..3), pick in 0usize..3,
        row_type in prop::sample::select(vec![RowType::F32, RowType::F16, RowType::Bf16]),
    ) {
        let largest = match row_type { RowType::F32 => f32::MAX, RowType::F16 => 65504.0, RowType::Bf16 => bf16::MAX.to_f32() };
        let mut values: Vec<f32> = (0..len).map(|index| [0.0, -largest, largest, 1e-7, -2.5][index % 5]).collect();
        let places: Vec<usize> = at.iter().map(|index| index.index(len)).collect();
        for &place in &places {
            values[place] = [f32::NAN, f32::INFINITY, f32::NEG_INFINITY][pick];
        }
        prop_assert_eq!(first_non_finite(&elements(row_type, &values), row_type), places.iter().copied().min());
    }
}
