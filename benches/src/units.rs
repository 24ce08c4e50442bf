//! Numbers as people write them on a command line.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use sluice_kernels::budget::Budget;

/// A number of tokens: an integer, or one with `Ki` or `Mi`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct TokenCount(pub usize);

const UNITS: [(&str, u32); 2] = [("Mi", 20), ("Ki", 10)];

impl FromStr for TokenCount {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let bad = || format!("{text:?} is not a number of tokens; write an integer such as 4096, or one with Ki or Mi such as 256Ki");
        let (digits, shift) = UNITS.iter().find_map(|&(unit, shift)| Some((text.strip_suffix(unit)?, shift))).unwrap_or((text, 0));
        let count: usize = digits.parse().map_err(|_| bad())?;
        count.checked_mul(1 << shift).map(Self).ok_or_else(bad)
    }
}

impl fmt::Display for TokenCount {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match UNITS.iter().find(|(_, shift)| self.0 > 0 && self.0.trailing_zeros() >= *shift) {
            Some((unit, shift)) => write!(f, "{}{unit}", self.0 >> shift),
            None => write!(f, "{}", self.0),
        }
    }
}

/// A part of the context: how many tokens a lane selects in a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ratio {
    /// At least 1.
    pub numerator: u32,
    /// At least the numerator.
    pub denominator: u32,
}

impl Ratio {
    /// The ratio as a number.
    #[must_use]
    pub fn value(self) -> f64 {
        f64::from(self.numerator) / f64::from(self.denominator)
    }

    /// A budget of this ratio and at least `floor_tokens`, without a cap.
    #[must_use]
    pub fn budget(self, floor_tokens: u32) -> Budget {
        Budget::Ratio { numerator: self.numerator, denominator: self.denominator, floor_tokens, cap_tokens: 0 }
    }
}

impl FromStr for Ratio {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let parts = text.split_once('/').unwrap_or((text, "1"));
        let bad = || format!("{text:?} is not a ratio; write one such as 1/16, above 0 and at most 1");
        let (numerator, denominator) = (parts.0.parse().map_err(|_| bad())?, parts.1.parse().map_err(|_| bad())?);
        if numerator == 0 || numerator > denominator { Err(bad()) } else { Ok(Self { numerator, denominator }) }
    }
}

impl fmt::Display for Ratio {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.numerator, self.denominator)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn token_counts_are_read_and_written() {
        for (text, count) in [("256Ki", 262_144), ("1Mi", 1 << 20), ("0", 0), ("4097", 4097), ("1000", 1000)] {
            assert_eq!(text.parse(), Ok(TokenCount(count)));
            assert_eq!(TokenCount(count).to_string(), text);
        }
        assert_eq!(TokenCount(1024).to_string(), "1Ki");
        for text in ["", "Ki", "-1", "1.5Ki", "256K", "1 Ki", "99999999999999999999Mi", "18446744073709551615Ki"] {
            let error = text.parse::<TokenCount>().expect_err(text);
            assert!(error.starts_with(&format!("{text:?} ")), "{error}");
        }
    }

    #[test]
    fn ratios_are_above_zero_and_at_most_one() {
        for (text, numerator, denominator) in [("1/16", 1, 16), ("3/64", 3, 64), ("1/1", 1, 1), ("1", 1, 1)] {
            assert_eq!(text.parse(), Ok(Ratio { numerator, denominator }));
        }
        for text in ["", "/", "0/4", "5/4", "2", "1/0", "0.1", "1/-2", "1/2/3"] {
            assert!(text.parse::<Ratio>().is_err(), "{text}");
        }
        assert!((Ratio { numerator: 3, denominator: 64 }.value() - 0.046_875).abs() < 1e-12);
    }
}
