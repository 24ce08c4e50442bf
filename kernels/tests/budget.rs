//! The horizon and k, as numbers worked out by hand.

use sluice_kernels::budget::{Budget, Settings};

fn ratio(numerator: u32, denominator: u32, floor_tokens: u32, cap_tokens: u32) -> Settings {
    let budget = Budget::Ratio { numerator, denominator, floor_tokens, cap_tokens };
    Settings { budget, exact_tokens: 256, sink_tokens: 4 }
}

#[test]
fn the_horizon_is_a_whole_number_of_chunks_behind_the_exact_tokens() {
    let settings = ratio(1, 16, 0, 0);
    let expected = [(0, 0), (1, 0), (255, 0), (511, 0), (512, 256), (767, 256), (768, 512), (16_384, 16_128), (16_383, 15_872)];
    for (length, horizon) in expected {
        assert_eq!(settings.horizon(length), horizon, "length {length}");
    }
    let narrow = Settings { exact_tokens: 64, ..settings };
    assert_eq!([319, 320, 575, 576].map(|length| narrow.horizon(length)), [0, 256, 256, 512]);
}

#[test]
fn k_follows_the_ratio_between_floor_and_cap_and_never_passes_the_horizon() {
    assert_eq!(ratio(1, 16, 0, 0).selected_tokens(16_384), 1024);
    assert_eq!(ratio(1, 16, 0, 0).selected_tokens(16_385), 1025, "rounded up");
    assert_eq!(ratio(1, 64, 300, 0).selected_tokens(16_384), 300, "the floor");
    assert_eq!(ratio(1, 4, 0, 2000).selected_tokens(16_384), 2000, "the cap");
    assert_eq!(ratio(1, 16, 400, 0).selected_tokens(600), 256, "all there is before the horizon");
    assert_eq!(ratio(1, 1, 0, 0).selected_tokens(16_384), 16_128);
    assert_eq!(ratio(1, 1024, 0, 0).selected_tokens(2048), 4, "the sinks are always in");
    assert_eq!(Settings::dense().selected_tokens(10_000), Settings::dense().horizon(10_000));
    assert_eq!(ratio(1, 16, 256, 0).selected_tokens(500), 0, "nothing lies before the horizon");
}
