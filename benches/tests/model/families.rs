//! Every family on a tiny random model against the independent implementation, and against itself in pieces of other sizes.

use crate::support::{dense, largest_difference, logits_in_pieces, prefill, random_ids, reference, tiny};
use sluice_bench::model::{Model, Phase, Pieces, RotaryLayout, Weights};
use sluice_kernels::shape::{LaneKind, RowType};

const TOKENS: usize = 160;

fn check_family(family: &str) -> Model {
    let folder = tempfile::tempdir().expect("a folder");
    let path = tiny(family, 7, folder.path());
    let ids = random_ids(TOKENS);
    let positions: Vec<usize> = (0..TOKENS).collect();
    let expected = reference(&path, &ids, &positions).logits;
    let model = Model::load(&path, Weights::F32).expect("the model");
    let whole = logits_in_pieces(&model, &ids, prefill(TOKENS), &mut dense(&model));
    let difference = largest_difference(&whole, &expected);
    assert!(difference < 1e-3, "{family}: logits differ by {difference} from the independent implementation");
    let cuts = [prefill(7), prefill(64), Pieces { tokens: 1, phase: Phase::Decode }, Pieces { tokens: 8, phase: Phase::Decode }];
    for pieces in cuts {
        let cut = logits_in_pieces(&model, &ids, pieces, &mut dense(&model));
        let difference = largest_difference(&cut, &whole);
        assert!(difference < 1e-3, "{family}: pieces of {} tokens move logits by {difference}", pieces.tokens);
    }
    model
}

#[test]
fn llama() {
    let model = check_family("llama");
    assert_eq!(model.config().rotary_layout(), RotaryLayout::Pairs);
}

#[test]
fn qwen2() {
    let model = check_family("qwen2");
    assert_eq!(model.config().rotary_layout(), RotaryLayout::Halves);
}

#[test]
fn qwen3() {
    check_family("qwen3");
}

#[test]
fn gemma3() {
    let model = check_family("gemma3");
    let shape = model.shape(RowType::F16).expect("a shape");
    let full: Vec<usize> = (0..shape.layers.len()).filter(|&layer| shape.layers[layer].kind == LaneKind::Selected).collect();
    assert_eq!(full, [5]);
    assert_eq!(shape.layers[6].kind, LaneKind::Window { tokens: 24 });
    assert_eq!(shape.layers[0].softmax_scale, 0.125);
}

/// Rounding the rows of the cache moves logits, a little; if it moved none, or much, rows would not be rounded where they are kept.
#[test]
fn rows_are_rounded_where_asked() {
    let folder = tempfile::tempdir().expect("a folder");
    let model = Model::load(&tiny("qwen3", 3, folder.path()), Weights::F32).expect("the model");
    let ids = random_ids(TOKENS);
    let run = |row_type| {
        let mut layers = sluice_bench::model::DenseLayers::new(model.shape(row_type).expect("a shape")).expect("a cache");
        logits_in_pieces(&model, &ids, prefill(TOKENS), &mut layers)
    };
    let exact = run(RowType::F32);
    let half = largest_difference(&exact, &run(RowType::F16));
    let brain = largest_difference(&exact, &run(RowType::Bf16));
    assert!(half > 1e-5 && half < 0.1, "f16 moves logits by {half}");
    assert!(brain > 2.0 * half && brain < 1.0, "bf16 moves logits by {brain}, f16 by {half}");
}

/// The blocks of the file give nearly the logits of their f32 values.
#[test]
fn quantized_weights_stay_near_f32() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = tiny("qwen2", 5, folder.path());
    let ids = random_ids(40);
    let run = |weights| {
        let model = Model::load(&path, weights).expect("the model");
        logits_in_pieces(&model, &ids, prefill(16), &mut dense(&model))
    };
    let difference = largest_difference(&run(Weights::F32), &run(Weights::Quantized));
    assert!(difference > 0.0 && difference < 1.0, "logits differ by {difference}");
}

#[test]
fn tokenizers_of_both_kinds() {
    let folder = tempfile::tempdir().expect("a folder");
    let llama = Model::load(&tiny("llama", 1, folder.path()), Weights::F32).expect("the model");
    let qwen = Model::load(&tiny("qwen2", 1, folder.path()), Weights::F32).expect("the model");
    // Ids by hand from tiny.py. SentencePiece: space first; "the", "cat" joined; "X" has no piece, so its byte.
    let (letters, words) = (3 + 256 + 1, 3 + 256 + 1 + 28);
    let ids = llama.tokenizer().encode("the catX\n\nb").expect("ids");
    let newlines = words + 11;
    assert_eq!(ids, [1, words + 2, words + 7, 3 + u32::from(b'X'), newlines, letters + 1]);
    assert_eq!(llama.tokenizer().decode(&ids).expect("text"), " the catX\n\nb");
    // Byte-level: " the" and " cat" merged, digits alone, the user-defined token found, the control mark left as plain text.
    let text = "in the cat 12<tool_call><|endoftext|>";
    let ids = qwen.tokenizer().encode(text).expect("ids");
    let byte = |byte: u8| u32::from(byte);
    assert_eq!(ids[..6], [256 + 3, 256 + 2, 256 + 7, byte(b' '), byte(b'1'), byte(b'2')]);
    assert_eq!(ids[6], 256 + 8 + 1);
    assert_eq!(ids[7..], b"<|endoftext|>".map(u32::from));
    assert_eq!(qwen.tokenizer().decode(&ids).expect("text"), text);
}

#[test]
fn bad_files_and_tokens_are_refused_by_name() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = tiny("qwen3", 2, folder.path());
    let model = Model::load(&path, Weights::F32).expect("the model");
    let error = model.forward(&[5, 9999], Phase::Prefill, &mut dense(&model)).err().expect("a refusal");
    assert!(format!("{error:#}").contains("token_ids: 9999"), "{error:#}");
    let bytes = std::fs::read(&path).expect("the file");
    let missing = folder.path().join("missing.gguf");
    std::fs::write(&missing, &bytes[..bytes.len() / 2]).expect("write");
    let error = Model::load(&missing, Weights::F32).err().expect("a refusal");
    assert!(format!("{error:#}").contains("tensor"), "{error:#}");
    let at = bytes.windows(5).position(|window| window == b"qwen3").expect("the family");
    let mut other = bytes;
    other[at..at + 5].copy_from_slice(b"mamba");
    std::fs::write(&missing, &other).expect("write");
    let error = Model::load(&missing, Weights::F32).err().expect("a refusal");
    assert!(format!("{error:#}").contains("mamba"), "{error:#}");
}
