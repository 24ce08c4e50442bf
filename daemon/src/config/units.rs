//! Values that people write with units.

use std::fmt;
use std::str::FromStr;

use serde::de::{Error as _, Visitor};
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use sluice_kernels::budget::Budget;

/// A number of bytes: an integer, or text such as `512MiB` or `8 GiB`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct ByteCount(pub u64);

const UNITS: [(&str, u32); 5] = [("KiB", 10), ("MiB", 20), ("GiB", 30), ("TiB", 40), ("B", 0)];

impl FromStr for ByteCount {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let bad = || format!("{text:?} is not a number of bytes; write an integer or one with KiB, MiB, GiB or TiB");
        let text = text.trim();
        let (digits, shift) = UNITS.iter().find_map(|&(unit, shift)| Some((text.strip_suffix(unit)?, shift))).unwrap_or((text, 0));
        let count: u64 = digits.trim().parse().map_err(|_| bad())?;
        count.checked_mul(1 << shift).map(Self).ok_or_else(bad)
    }
}

impl fmt::Display for ByteCount {
    /// In the largest unit that leaves a whole number, or with one decimal.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (unit, shift) = UNITS[..4].iter().rev().find(|(_, shift)| self.0 >> shift > 0).copied().unwrap_or(UNITS[4]);
        if self.0.trailing_zeros() >= shift || shift == 0 {
            write!(f, "{} {unit}", self.0 >> shift)
        } else {
            write!(f, "{:.1} {unit}", self.0 as f64 / (1u64 << shift) as f64)
        }
    }
}

impl Serialize for ByteCount {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_u64(self.0)
    }
}

impl<'de> Deserialize<'de> for ByteCount {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Bytes;
        impl Visitor<'_> for Bytes {
            type Value = ByteCount;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a number of bytes such as 1073741824 or \"1 GiB\"")
            }

            fn visit_u64<E>(self, count: u64) -> Result<ByteCount, E> {
                Ok(ByteCount(count))
            }

            fn visit_i64<E: serde::de::Error>(self, count: i64) -> Result<ByteCount, E> {
                u64::try_from(count).map(ByteCount).map_err(|_| E::custom(format!("{count} bytes is negative")))
            }

            fn visit_str<E: serde::de::Error>(self, text: &str) -> Result<ByteCount, E> {
                text.parse().map_err(E::custom)
            }
        }
        deserializer.deserialize_any(Bytes)
    }
}

/// How much of a sequence a step selects: `dense`, or a fraction such as `1/16`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RatioText {
    /// k = everything.
    Dense,
    /// k = length x numerator / denominator.
    Fraction {
        /// At least 1.
        numerator: u32,
        /// At least the numerator.
        denominator: u32,
    },
}

impl RatioText {
    /// The budget with these bounds, both in tokens.
    #[must_use]
    pub fn budget(self, floor_tokens: u32, cap_tokens: u32) -> Budget {
        match self {
            Self::Dense => Budget::Dense,
            Self::Fraction { numerator, denominator } => Budget::Ratio { numerator, denominator, floor_tokens, cap_tokens },
        }
    }
}

impl FromStr for RatioText {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text == "dense" {
            return Ok(Self::Dense);
        }
        let parts = text.split_once('/').and_then(|(above, below)| Some((above.trim().parse().ok()?, below.trim().parse().ok()?)));
        match parts {
            Some((numerator, denominator)) if 0 < numerator && numerator <= denominator => Ok(Self::Fraction { numerator, denominator }),
            _ => Err(format!("{text:?} is neither \"dense\" nor a fraction of at most one such as \"1/16\"")),
        }
    }
}

impl fmt::Display for RatioText {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Dense => f.write_str("dense"),
            Self::Fraction { numerator, denominator } => write!(f, "{numerator}/{denominator}"),
        }
    }
}

impl Serialize for RatioText {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for RatioText {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(D::Error::custom)
    }
}
