//! A model of e4m3 that shares nothing with the crate: codes are found by searching the numbers of the definition.

/// The number of an e4m3 code, by its definition.
pub(crate) fn e4m3_value(code: u8) -> f64 {
    let (exponent, mantissa) = (i32::from(code >> 3) & 15, f64::from(code & 7));
    let magnitude = match (exponent, code & 7) {
        (15, 7) => f64::NAN,
        (0, _) => mantissa / 8.0 * 2f64.powi(-6),
        _ => (1.0 + mantissa / 8.0) * 2f64.powi(exponent - 7),
    };
    if code >= 128 { -magnitude } else { magnitude }
}

/// The nearest e4m3 code, an even one of two equally near: magnitudes ascend with their codes, so both neighbours are found by halving.
pub(crate) fn e4m3_code(x: f32) -> u8 {
    let sign = if x.is_sign_negative() { 0x80 } else { 0 };
    if !x.is_finite() {
        return sign | 0x7F;
    }
    let magnitude = f64::from(x.abs());
    let (mut below, mut above) = (0u8, 126u8);
    while above - below > 1 {
        let middle = (above + below) / 2;
        if e4m3_value(middle) <= magnitude { below = middle } else { above = middle }
    }
    let (down, up) = (magnitude - e4m3_value(below), e4m3_value(above) - magnitude);
    sign | if down < up || (down == up && below % 2 == 0) { below } else { above }
}
