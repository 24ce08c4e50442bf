//! What the model tests share: the real model, a python with numpy, token ids, and the independent implementation.

use std::path::{Path, PathBuf};
use std::process::Command;

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use sluice_bench::model::{AttentionLayers, DenseLayers, Model, Phase, Pieces};
use sluice_kernels::shape::RowType;

/// The folder of the crate.
fn benches() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// Runs a command and gives its output; a failure ends the test.
fn run(command: &mut Command) -> String {
    let output = command.output().unwrap_or_else(|error| panic!("{command:?}: {error}"));
    assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).expect("utf-8 output").trim().to_owned()
}

/// The real model, fetched if need be.
pub(crate) fn gemma() -> PathBuf {
    run(Command::new("python3").arg(benches().join("model.py")).arg("gguf")).into()
}

fn python() -> String {
    run(Command::new("python3").arg(benches().join("model.py")).arg("python"))
}

/// Token ids kept in `benches/data`.
pub(crate) fn kept_ids(name: &str) -> Vec<u32> {
    let path = benches().join("data").join(name);
    let text = std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    serde_json::from_str(&text).expect("a list of ids")
}

/// Writes a tiny random model of a family.
pub(crate) fn tiny(family: &str, seed: u32, folder: &Path) -> PathBuf {
    let path = folder.join(format!("{family}.gguf"));
    run(Command::new(python()).arg(benches().join("reference/tiny.py")).arg(family).arg(seed.to_string()).arg(&path));
    path
}

/// Token ids that every tiny vocabulary has, always the same.
pub(crate) fn random_ids(count: usize) -> Vec<u32> {
    let mut random = StdRng::seed_from_u64(11);
    (0..count).map(|_| random.random_range(3..260)).collect()
}

/// Writes token ids as the commands read them.
pub(crate) fn write_ids(folder: &Path, name: &str, ids: &[u32]) -> PathBuf {
    let path = folder.join(name);
    std::fs::write(&path, serde_json::to_vec(ids).expect("json")).expect("write ids");
    path
}

/// What the independent implementation says.
pub(crate) struct Reference {
    /// `[position asked for][vocabulary]`.
    pub(crate) logits: Vec<f32>,
    /// Of every token but the first.
    pub(crate) losses: Vec<f64>,
}

/// Runs the independent implementation on `ids`.
pub(crate) fn reference(gguf: &Path, ids: &[u32], positions: &[usize]) -> Reference {
    let folder = tempfile::tempdir().expect("a folder");
    let ids_path = folder.path().join("ids.json");
    std::fs::write(&ids_path, serde_json::to_vec(ids).expect("ids as json")).expect("write ids");
    let positions: Vec<String> = positions.iter().map(ToString::to_string).collect();
    let mut command = Command::new(python());
    command.arg(benches().join("reference/forward.py")).arg("--gguf").arg(gguf).arg("--ids").arg(&ids_path);
    command.arg("--tokens").arg(ids.len().to_string()).arg("--positions").arg(positions.join(","));
    run(command.arg("--out").arg(folder.path()));
    let read = |name: &str| std::fs::read(folder.path().join(name)).expect("the reference's output");
    let logits = read("logits.f32").as_chunks::<4>().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect();
    let losses = read("losses.f64").as_chunks::<8>().0.iter().map(|bytes| f64::from_le_bytes(*bytes)).collect();
    Reference { logits, losses }
}

/// An empty dense cache for a model.
pub(crate) fn dense(model: &Model) -> DenseLayers {
    DenseLayers::new(model.shape(RowType::F32).expect("a shape")).expect("a cache")
}

/// Logits of all tokens (`[token][vocabulary]`), run in pieces through `layers`.
pub(crate) fn logits_in_pieces(model: &Model, ids: &[u32], pieces: Pieces, layers: &mut dyn AttentionLayers) -> Vec<f32> {
    let mut logits = Vec::new();
    let mut each = |hidden| {
        logits.extend(model.logits(&hidden)?);
        Ok(())
    };
    model.forward_pieces(ids, pieces, layers, &mut each).expect("a forward pass");
    logits
}

/// Prefill in pieces of so many tokens.
pub(crate) fn prefill(tokens: usize) -> Pieces {
    Pieces { tokens, phase: Phase::Prefill }
}

/// Largest difference of two equally long lists.
pub(crate) fn largest_difference(left: &[f32], right: &[f32]) -> f32 {
    assert_eq!(left.len(), right.len());
    assert!(left.iter().chain(right).all(|value| value.is_finite()), "a value is not finite");
    left.iter().zip(right).map(|(left, right)| (left - right).abs()).fold(0.0, f32::max)
}
