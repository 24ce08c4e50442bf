//! The label plan: how many of a key's channels are kept, at how many bits.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use thiserror::Error;

/// Channels that share a width. Groups take channels from the calibrated order one after the other, most important first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LabelGroup {
    /// Channels in this group: a multiple of 8.
    pub channels: u16,
    /// Bits of each: 2, 4, 8 or 16.
    pub bits: u8,
}

/// The format of a label: a bit budget spread over channels.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LabelPlan {
    /// Calibrated channels with a static scale each.
    Channels(Vec<LabelGroup>),
}

/// A label plan that cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum PlanError {
    /// The text is not a plan.
    #[error("label plan {text:?}: expected small, large, or groups such as 16@4+32@2 (channels@bits, bits 2, 4, 8 or 16)")]
    Syntax {
        /// What was given.
        text: String,
    },
    /// A width without a kernel.
    #[error("label plan: {bits} bits; only 2, 4, 8 and 16 are served")]
    Bits {
        /// Value given.
        bits: u8,
    },
    /// A group that does not pack.
    #[error("label plan: a group of {channels} channels; a positive multiple of 8 is needed")]
    Channels {
        /// Value given.
        channels: u16,
    },
    /// More channels than a key has.
    #[error("label plan: {channels} channels in all, head_dim is {head_dim}")]
    TooMany {
        /// Channels of all groups.
        channels: u32,
        /// Channels of a key.
        head_dim: u16,
    },
}

impl LabelPlan {
    /// d/8 channels, rounded up to a multiple of 8, at 4 bit and the rest of d bits at 2 bit: d/4 channels where d/8 needs no rounding.
    /// 1/32 of a 16-bit row (LIMITS.md).
    #[must_use]
    pub fn small(head_dim: u16) -> Self {
        let fine = (head_dim / 8).next_multiple_of(8);
        Self::Channels(vec![LabelGroup { channels: fine, bits: 4 }, LabelGroup { channels: (head_dim - 4 * fine) / 2, bits: 2 }])
    }

    /// d/2 channels at 4 bit: 1/16 of a 16-bit row.
    #[must_use]
    pub fn large(head_dim: u16) -> Self {
        Self::Channels(vec![LabelGroup { channels: head_dim / 2, bits: 4 }])
    }

    /// The groups of the plan.
    #[must_use]
    pub fn groups(&self) -> &[LabelGroup] {
        match self {
            Self::Channels(groups) => groups,
        }
    }

    /// Channels of all groups.
    #[must_use]
    pub fn channels(&self) -> usize {
        self.groups().iter().map(|group| usize::from(group.channels)).sum()
    }

    /// Bytes of one token's label in one lane.
    #[must_use]
    pub fn label_bytes(&self) -> usize {
        self.groups().iter().map(|group| usize::from(group.channels) * usize::from(group.bits) / 8).sum()
    }

    /// Checks the plan against the channels of a key.
    ///
    /// # Errors
    /// The first group, or the sum, that is out of bounds.
    pub fn check(&self, head_dim: u16) -> Result<(), PlanError> {
        for group in self.groups() {
            if ![2, 4, 8, 16].contains(&group.bits) {
                return Err(PlanError::Bits { bits: group.bits });
            }
            if group.channels == 0 || !group.channels.is_multiple_of(8) {
                return Err(PlanError::Channels { channels: group.channels });
            }
        }
        let channels = self.groups().iter().map(|group| u32::from(group.channels)).sum();
        if channels == 0 || channels > u32::from(head_dim) {
            return Err(PlanError::TooMany { channels, head_dim });
        }
        Ok(())
    }
}

impl fmt::Display for LabelPlan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, group) in self.groups().iter().enumerate() {
            let plus = if index == 0 { "" } else { "+" };
            write!(f, "{plus}{}@{}", group.channels, group.bits)?;
        }
        Ok(())
    }
}

impl FromStr for LabelPlan {
    type Err = PlanError;

    fn from_str(text: &str) -> Result<Self, PlanError> {
        let syntax = || PlanError::Syntax { text: text.to_owned() };
        let group = |part: &str| {
            let (channels, bits) = part.split_once('@')?;
            Some(LabelGroup { channels: channels.parse().ok()?, bits: bits.parse().ok()? })
        };
        text.split('+').map(|part| group(part).ok_or_else(syntax)).collect::<Result<_, _>>().map(Self::Channels)
    }
}
