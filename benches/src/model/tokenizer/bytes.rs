//! Byte-level BPE with merges, through the crate `tokenizers`, set up as each model family's own tokenizer.json has it.

use anyhow::{Context, Result, anyhow, bail};
use tokenizers::decoders::byte_level::ByteLevel as Bytes;
use tokenizers::models::bpe::{BPE, Vocab};
use tokenizers::normalizers::unicode::NFC;
use tokenizers::pre_tokenizers::PreTokenizerWrapper;
use tokenizers::pre_tokenizers::sequence::Sequence;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::tokenizer::SplitDelimiterBehavior;
use tokenizers::{AddedToken, Tokenizer};

use super::{Gguf, TokenType, Vocabulary};

/// How Qwen 2 and 3 cut a text before merging: every digit alone.
const QWEN2: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
/// How Llama 3 does: digits by up to three.
const LLAMA3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// A byte-level BPE tokenizer.
pub(super) struct ByteLevel {
    tokenizer: Tokenizer,
    /// Marks: without text.
    controls: Vec<bool>,
}

impl ByteLevel {
    pub(super) fn read(gguf: &Gguf, vocabulary: &Vocabulary) -> Result<Self> {
        let merge = |value: &candle_core::quantized::gguf_file::Value| {
            let text = value.to_string().context("gguf: tokenizer.ggml.merges")?;
            let (left, right) = text.split_once(' ').ok_or_else(|| anyhow!("gguf: tokenizer.ggml.merges: {text:?} is not a pair"))?;
            Ok((left.to_owned(), right.to_owned()))
        };
        let merges = gguf.array("tokenizer.ggml.merges")?.iter().map(merge).collect::<Result<Vec<_>>>()?;
        let pre = gguf.text("tokenizer.ggml.pre")?.unwrap_or("gpt-2").to_owned();
        let whole_words = matches!(pre.as_str(), "llama-bpe" | "llama3" | "llama-v3");
        let ids: Vocab = vocabulary.entries().map(|(id, token, _)| (token.to_owned(), id)).collect();
        let bpe = BPE::builder()
            .vocab_and_merges(ids, merges)
            .ignore_merges(whole_words)
            .build()
            .map_err(|error| anyhow!("gguf: tokenizer.ggml.merges: {error}"))?;
        let mut tokenizer = Tokenizer::new(bpe);
        tokenizer.with_pre_tokenizer(Some(cutter(&pre)?));
        tokenizer.with_decoder(Some(Bytes::new(false, false, false)));
        if pre == "qwen2" {
            tokenizer.with_normalizer(Some(NFC)).map_err(|error| anyhow!("tokenizer: {error}"))?;
        }
        let literal = vocabulary.entries().filter(|(_, _, kind)| *kind == TokenType::UserDefined);
        let literal: Vec<AddedToken> = literal.map(|(_, token, _)| AddedToken::from(token, false).normalized(false)).collect();
        tokenizer.add_tokens(literal).map_err(|error| anyhow!("tokenizer: {error}"))?;
        let controls =
            vocabulary.types.iter().map(|kind| matches!(kind, TokenType::Control | TokenType::Unused | TokenType::Unknown)).collect();
        Ok(Self { tokenizer, controls })
    }

    pub(super) fn encode(&self, text: &str, ids: &mut Vec<u32>) -> Result<()> {
        let encoding = self.tokenizer.encode_fast(text, false).map_err(|error| anyhow!("text: {error}"))?;
        ids.extend_from_slice(encoding.get_ids());
        Ok(())
    }

    pub(super) fn decode(&self, ids: &[u32]) -> Result<String> {
        if let Some(id) = ids.iter().find(|&&id| id as usize >= self.controls.len()) {
            bail!("token id: {id}, the vocabulary has {}", self.controls.len());
        }
        let texts: Vec<u32> = ids.iter().copied().filter(|&id| !self.controls[id as usize]).collect();
        self.tokenizer.decode(&texts, false).map_err(|error| anyhow!("token ids: {error}"))
    }
}

/// The pre-tokenizer that llama.cpp's converter names.
fn cutter(pre: &str) -> Result<PreTokenizerWrapper> {
    let pattern = match pre {
        "qwen2" => QWEN2,
        "llama-bpe" | "llama3" | "llama-v3" => LLAMA3,
        "gpt-2" => return Ok(Bytes::new(false, false, true).into()),
        other => bail!("gguf: tokenizer.ggml.pre is {other:?}; qwen2, llama-bpe and gpt-2 are served"),
    };
    let split = Split::new(SplitPattern::Regex(pattern.to_owned()), SplitDelimiterBehavior::Isolated, false);
    let split = split.map_err(|error| anyhow!("tokenizer: {error}"))?;
    Ok(Sequence::new(vec![split.into(), Bytes::new(false, false, false).into()]).into())
}
