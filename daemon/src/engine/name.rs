//! Names of chunks: a hash chain over everything that decides their rows (DESIGN.md, section 5, Names).

use serde::{Deserialize, Serialize};
use sluice_kernels::shared::open::Fidelity;

/// Name of a chunk, or the root from which the names of a prefix descend.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Name([u8; 32]);

/// What all chunks of one prompt family have in common.
#[derive(Clone, Copy, Debug)]
pub struct RootParts<'a> {
    /// Secret of the installation.
    pub salt: &'a [u8],
    /// Namespace.
    pub namespace: &'a str,
    /// Digest of weights, shape, layout and rotary layout.
    pub model_digest: &'a [u8; 32],
    /// Adapter, image digests and the like.
    pub extra_keys: &'a [Vec<u8>],
}

impl Name {
    /// The root of a prompt family.
    #[must_use]
    pub fn root(parts: &RootParts<'_>) -> Self {
        let mut hasher = blake3::Hasher::new_derive_key("sluice v1 root of chunk names");
        for part in [parts.salt, parts.namespace.as_bytes(), parts.model_digest] {
            update_sized(&mut hasher, part);
        }
        for key in parts.extra_keys {
            update_sized(&mut hasher, key);
        }
        Self(*hasher.finalize().as_bytes())
    }

    /// The name of the chunk that follows this one with `tokens`, its rows made with `fidelity`.
    #[must_use]
    pub fn child(&self, tokens: &[u32], fidelity: Fidelity) -> Self {
        let mut hasher = blake3::Hasher::new();
        hasher.update(&self.0);
        match fidelity {
            None => hasher.update(&[0]),
            Some(digest) => hasher.update(&[1]).update(&digest),
        };
        let mut bytes = [0; 1024];
        for part in tokens.chunks(256) {
            for (slot, token) in bytes.chunks_exact_mut(4).zip(part) {
                slot.copy_from_slice(&token.to_le_bytes());
            }
            hasher.update(&bytes[..part.len() * 4]);
        }
        Self(*hasher.finalize().as_bytes())
    }
}

/// Length before content, so that no two lists of parts hash alike.
fn update_sized(hasher: &mut blake3::Hasher, part: &[u8]) {
    hasher.update(&(part.len() as u64).to_le_bytes());
    hasher.update(part);
}
