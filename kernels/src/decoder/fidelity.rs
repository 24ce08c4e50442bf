//! Fidelity: how rows came to be, as part of a chunk's name (DESIGN.md, section 5, Names).

use crate::budget::Settings;
use crate::label::LabelPlan;

/// Digest of the selector, budget and plan under which rows were made by sparse steps. Rows made by dense attention have none.
/// The version in the key counts definitions of importance ([`crate::device::ScoreJob`]); the second has sampled normalisers.
#[must_use]
pub fn fidelity_digest(settings: &Settings, plan: Option<&LabelPlan>) -> [u8; 32] {
    let mut hasher = blake3::Hasher::new_derive_key("sluice v2 fidelity of double sparsity rows");
    let budget = match settings.budget {
        crate::budget::Budget::Dense => [0; 4],
        crate::budget::Budget::Ratio { numerator, denominator, floor_tokens, cap_tokens } => {
            [numerator, denominator, floor_tokens, cap_tokens]
        }
    };
    for word in budget.into_iter().chain([settings.exact_tokens, settings.sink_tokens]) {
        hasher.update(&word.to_le_bytes());
    }
    hasher.update(plan.map(ToString::to_string).unwrap_or_default().as_bytes());
    *hasher.finalize().as_bytes()
}
