//! How many tokens a lane may fetch in a step, and which of them are always attended.

use serde::{Deserialize, Serialize};

use crate::slot::CHUNK_TOKENS;

/// How many tokens before the horizon a lane may select in one step.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Budget {
    /// k = everything.
    Dense,
    /// k = `length * numerator / denominator` (rounded up), raised to `floor_tokens`, lowered to `cap_tokens`.
    Ratio {
        /// Numerator of the ratio, at least 1.
        numerator: u32,
        /// Denominator of the ratio, at least `numerator`.
        denominator: u32,
        /// k is never below this many tokens.
        floor_tokens: u32,
        /// k is never above this many tokens; 0 means no cap.
        cap_tokens: u32,
    },
}

/// The settings of a sequence that decide the result of a step, beside its rows, its length and the query.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Settings {
    /// Tokens a lane may select.
    pub budget: Budget,
    /// W of the horizon rule: at least this many newest tokens are attended exactly. 64 to 65,536.
    pub exact_tokens: u32,
    /// First tokens of the sequence that are always selected (attention sinks); counted in k.
    pub sink_tokens: u32,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            budget: Budget::Ratio { numerator: 1, denominator: 16, floor_tokens: 256, cap_tokens: 0 },
            exact_tokens: 256,
            sink_tokens: 4,
        }
    }
}

impl Settings {
    /// Dense attention with the default exact window.
    #[must_use]
    pub fn dense() -> Self {
        Self { budget: Budget::Dense, ..Self::default() }
    }

    /// The horizon of a sequence of `length` tokens: rows before it are selected from, rows from it on are attended exactly.
    /// A function of length alone (DESIGN.md, section 2).
    #[must_use]
    pub fn horizon(&self, length: usize) -> usize {
        length.saturating_sub(self.exact_tokens as usize) / CHUNK_TOKENS * CHUNK_TOKENS
    }

    /// k of a step over `length` tokens: how many of the rows before the horizon a lane selects.
    #[must_use]
    pub fn selected_tokens(&self, length: usize) -> usize {
        let horizon = self.horizon(length);
        match self.budget {
            Budget::Dense => horizon,
            Budget::Ratio { numerator, denominator, floor_tokens, cap_tokens } => {
                let ratio = (length as u64 * u64::from(numerator)).div_ceil(u64::from(denominator)) as usize;
                let floored = ratio.max(floor_tokens as usize).max(self.sink_tokens as usize);
                let capped = if cap_tokens == 0 { floored } else { floored.min(cap_tokens as usize) };
                capped.min(horizon)
            }
        }
    }
}
