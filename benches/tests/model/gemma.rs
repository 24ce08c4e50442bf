//! Gemma 3 270M, the real weights: token ids and logits against what others computed from the same file.

use crate::support::{dense, gemma, kept_ids, largest_difference, prefill, reference};
use sluice_bench::model::{Model, Phase, Weights};

const TOKENS: usize = 1024;
const POSITIONS: [usize; 8] = [0, 1, 255, 511, 512, 513, 800, 1023];

/// The ids in `data` were made by transformers from this GGUF. The digest holds that decoding gives back the text they were made of
/// (`usr_*.txt` of Vim 9.0 in C order, and its `eval.txt`), so that encoding it is a test although the text is not kept here.
#[test]
fn tokenizer_gives_the_kept_ids() {
    let gguf = sluice_bench::model::Gguf::open(&gemma()).expect("the model");
    let tokenizer = sluice_bench::model::Tokenizer::read(&gguf).expect("its tokenizer");
    let cases = [
        ("vim-manual-16k.ids.json", 16_384, "0b7bd799a0a5d5fa27097982e1296a94e67442c71303d51ca5f3d9b8754c2aab"),
        ("vim-eval-6k.ids.json", 6_000, "bb132db4e17108d666e871c21b6a3039836af1b903a95977b44da1aa0b84d763"),
    ];
    for (name, count, digest) in cases {
        let ids = kept_ids(name);
        assert_eq!(ids.len(), count);
        let text = tokenizer.decode(&ids).expect("text");
        assert_eq!(blake3::hash(text.as_bytes()).to_hex().as_str(), digest, "{name}");
        assert!(tokenizer.encode(&text).expect("ids") == ids, "{name}: other ids");
    }
}

#[test]
fn tokenizer_reaches_characters_without_a_token() {
    let gguf = sluice_bench::model::Gguf::open(&gemma()).expect("the model");
    let tokenizer = sluice_bench::model::Tokenizer::read(&gguf).expect("its tokenizer");
    for text in ["", "a", "   \t\t\n\n\n x", "na\u{ef}ve \u{1f980} \u{10348}\u{0}\u{7f}", "<bos> is plain text here"] {
        let ids = tokenizer.encode(text).expect("ids");
        assert_eq!(ids[0], 2);
        assert!(!ids[1..].contains(&2), "plain text made a mark");
        assert_eq!(tokenizer.decode(&ids).expect("text"), text);
    }
    // U+10348 has no token of its own: its bytes F0 90 8D 88 stand for it, from id 238 on.
    assert_eq!(tokenizer.encode("\u{10348}").expect("ids"), [2, 238 + 0xF0, 238 + 0x90, 238 + 0x8D, 238 + 0x88]);
}

#[test]
fn logits_equal_an_independent_implementation() {
    let path = gemma();
    let ids = &kept_ids("vim-manual-16k.ids.json")[..TOKENS];
    let expected = reference(&path, ids, &POSITIONS);
    let model = Model::load(&path, Weights::F32).expect("the model");
    let mut layers = dense(&model);
    let (mut at, mut asked, mut losses) = (0, Vec::new(), Vec::new());
    let mut each = |hidden: sluice_bench::model::Hidden| {
        let tokens = hidden.tokens();
        for position in POSITIONS.iter().filter(|position| (at..at + tokens).contains(*position)) {
            asked.extend(model.logits(&hidden.range(position - at..position - at + 1))?);
        }
        let scored = tokens.min(TOKENS - 1 - at);
        losses.extend(model.losses(&hidden.range(0..scored), &ids[at + 1..at + 1 + scored])?);
        at += tokens;
        Ok(())
    };
    // 512 tokens of prefill, then pieces of 8 as decode steps take them, across the end of the window.
    model.forward_pieces(&ids[..600], prefill(512), &mut layers, &mut each).expect("prefill");
    let steps = sluice_bench::model::Pieces { tokens: 8, phase: Phase::Decode };
    model.forward_pieces(&ids[600..], steps, &mut layers, &mut each).expect("steps");
    let difference = largest_difference(&asked, &expected.logits);
    assert!(difference < 1e-2, "logits differ by {difference}");
    assert_eq!(losses.len(), expected.losses.len());
    let worst = losses.iter().zip(&expected.losses).map(|(left, right)| (left - right).abs()).fold(0.0, f64::max);
    assert!(worst < 1e-2, "a loss differs by {worst}");
    println!("logits within {difference:.1e}, losses within {worst:.1e} nats");
}
