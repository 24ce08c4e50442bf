use sluice_kernels::device::LabelJob;
use sluice_kernels::label::{LabelPlan, decode, encode};

use crate::all_devices;
use crate::data::{Layer, ROW_TYPES, Shape};

const PLANS: [&str; 8] = ["16@4+32@2", "64@4", "8@2", "24@2", "8@16+8@8+16@4+24@2", "40@8", "16@16", "8@4+40@2"];

/// The code that a lane's labels hold for (token, index of the channel in its group), by the table of the packing's documentation.
fn read_code(group: &[u8], token: usize, n: usize, channels: usize, bits: usize) -> u16 {
    let vector_word = |vector: usize| u32::from_le_bytes(group[vector * 64 + token * 4..][..4].try_into().expect("four bytes"));
    match bits {
        16 => {
            let byte = |vector: usize| (vector_word(vector) >> (8 * (n % 4)) & 0xFF) as u16;
            byte(n / 4 * 2) + 256 * byte(n / 4 * 2 + 1)
        }
        8 => (vector_word(n / 4) >> (8 * (n % 4)) & 0xFF) as u16,
        4 => (vector_word(n / 8) >> (8 * (n % 4) + 4 * (n % 8 / 4)) & 15) as u16,
        2 if n < channels / 16 * 16 => (vector_word(n / 16) >> (8 * (n % 4) + 2 * (n % 16 / 4)) & 3) as u16,
        _ => {
            let word = u16::from_le_bytes(group[channels / 16 * 64 + token * 2..][..2].try_into().expect("two bytes"));
            word >> (4 * (n % 4) + 2 * (n % 8 / 4)) & 3
        }
    }
}

#[test]
fn labels_are_the_stated_codes_at_the_stated_places() {
    for (seed, plan) in PLANS.iter().enumerate() {
        let plan: LabelPlan = plan.parse().expect("a plan");
        let row_type = ROW_TYPES[seed % 4];
        let mut layer = Layer::new(Shape { lanes: 3, group: 1, dim: 64, tokens: 256, row_type }, seed as u64);
        let coder = layer.coder(&plan);
        for mut device in all_devices() {
            let mut labels = vec![0xAA; 3 * 256 * plan.label_bytes()];
            device.label(&LabelJob { geometry: &layer.geometry, page: &layer.pages[0], coder: &coder }, &mut labels);
            for lane in 0..3 {
                let mut seen = [0u32; 4];
                for token in 0..256 {
                    let mut kept = 0;
                    let mut group_at = (lane * 256 + token / 16 * 16) * plan.label_bytes();
                    for group in plan.groups() {
                        let (channels, bits) = (usize::from(group.channels), usize::from(group.bits));
                        for n in 0..channels {
                            let lane_coder = &coder.lanes[lane];
                            let x = layer.key(token, lane)[usize::from(lane_coder.channels[kept])];
                            let reciprocal = 1.0f32 / lane_coder.step[kept];
                            let ideal = ((x - lane_coder.low[kept]) * reciprocal + 0.5).floor();
                            let expected = ideal.clamp(0.0, (2f32.powi(bits as i32)) - 1.0) as u16;
                            let got = read_code(&labels[group_at..], token % 16, n, channels, bits);
                            assert_eq!(got, expected, "{}: {plan}, lane {lane}, token {token}, channel {n} at {bits} bits", device.name());
                            seen[usize::from(got >> (bits - 2))] += 1;
                            kept += 1;
                        }
                        group_at += 16 * channels * bits / 8;
                    }
                }
                assert!(seen.iter().all(|&count| count > 100), "{plan}: codes of every quarter occur: {seen:?}");
            }
        }
    }
}

#[test]
fn decoding_gives_the_codes_that_were_encoded() {
    for plan in PLANS {
        let plan: LabelPlan = plan.parse().expect("a plan");
        let widths: Vec<u8> = plan.groups().iter().flat_map(|group| vec![group.bits; usize::from(group.channels)]).collect();
        let codes: Vec<u16> = (0..256 * widths.len())
            .map(|index| (((index as u64 * 2_654_435_761) >> 7) as u32 % (1 << widths[index % widths.len()])) as u16)
            .collect();
        let mut page = vec![0xFF; 256 * plan.label_bytes()];
        encode(&plan, &codes, &mut page);
        assert_eq!(decode(&plan, &page), codes, "{plan}");
    }
}

#[test]
fn presets_fit_every_head_dimension() {
    for head_dim in [64, 96, 128, 256] {
        let (small, large) = (LabelPlan::small(head_dim), LabelPlan::large(head_dim));
        small.check(head_dim).expect("small fits");
        large.check(head_dim).expect("large fits");
        assert_eq!((small.label_bytes(), large.label_bytes()), (usize::from(head_dim) / 8, usize::from(head_dim) / 4));
    }
}
