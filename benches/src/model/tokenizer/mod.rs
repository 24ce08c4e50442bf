//! The tokenizer that a GGUF carries: SentencePiece with scores (Gemma, Llama 1 and 2) or byte-level BPE with merges (Qwen, Llama 3).

mod bytes;
mod pieces;

use anyhow::{Context, Result, bail};
use candle_core::quantized::gguf_file::Value;

use super::gguf::Gguf;
use bytes::ByteLevel;
use pieces::Pieces;

/// What a token is, as GGUF numbers it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum TokenType {
    Normal,
    Unknown,
    /// Marks such as the begin of a text: never found in plain text.
    Control,
    /// Found literally, before anything else is done to the text.
    UserDefined,
    Unused,
    /// One byte of a character that has no token.
    Byte,
}

/// The vocabulary of a GGUF.
struct Vocabulary {
    tokens: Vec<String>,
    types: Vec<TokenType>,
}

enum Kind {
    Pieces(Box<Pieces>),
    ByteLevel(Box<ByteLevel>),
}

/// Text to token ids and back.
pub struct Tokenizer {
    kind: Kind,
    begin: Option<u32>,
    end: Option<u32>,
}

impl Tokenizer {
    /// Reads the tokenizer of a GGUF.
    ///
    /// # Errors
    /// A kind of tokenizer or of pre-tokenizer that is not known exactly, or a vocabulary that contradicts itself.
    pub fn read(gguf: &Gguf) -> Result<Self> {
        let vocabulary = Vocabulary::read(gguf)?;
        let begin = special(gguf, "bos", vocabulary.tokens.len())?;
        let end = special(gguf, "eos", vocabulary.tokens.len())?;
        let model = gguf.text("tokenizer.ggml.model")?.context("gguf: tokenizer.ggml.model is missing")?;
        let (kind, begins) = match model {
            "llama" => (Kind::Pieces(Box::new(Pieces::read(gguf, &vocabulary)?)), true),
            "gpt2" => (Kind::ByteLevel(Box::new(ByteLevel::read(gguf, &vocabulary)?)), false),
            other => bail!("gguf: tokenizer.ggml.model is {other:?}; llama (SentencePiece) and gpt2 (byte-level BPE) are served"),
        };
        let begins = gguf.truth("tokenizer.ggml.add_bos_token")?.unwrap_or(begins);
        Ok(Self { kind, begin: begin.filter(|_| begins), end })
    }

    /// Token ids of a text, after the begin-of-text token where the model wants one.
    ///
    /// # Errors
    /// A character that the vocabulary can express in no way.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>> {
        let mut ids: Vec<u32> = self.begin.into_iter().collect();
        match &self.kind {
            Kind::Pieces(pieces) => pieces.encode(text, &mut ids)?,
            Kind::ByteLevel(bytes) => bytes.encode(text, &mut ids)?,
        }
        Ok(ids)
    }

    /// The text of token ids. Marks have none; bytes that do not make up a character become U+FFFD.
    ///
    /// # Errors
    /// An id outside the vocabulary.
    pub fn decode(&self, ids: &[u32]) -> Result<String> {
        match &self.kind {
            Kind::Pieces(pieces) => pieces.decode(ids),
            Kind::ByteLevel(bytes) => bytes.decode(ids),
        }
    }

    /// The token that ends a text.
    #[must_use]
    pub fn end(&self) -> Option<u32> {
        self.end
    }
}

impl Vocabulary {
    fn read(gguf: &Gguf) -> Result<Self> {
        let token = |value: &Value| Ok(value.to_string().context("gguf: tokenizer.ggml.tokens")?.clone());
        let tokens = gguf.array("tokenizer.ggml.tokens")?.iter().map(token).collect::<Result<Vec<_>>>()?;
        let types = gguf.array("tokenizer.ggml.token_type")?.iter().map(token_type).collect::<Result<Vec<_>>>()?;
        if types.len() != tokens.len() {
            bail!("gguf: tokenizer.ggml.token_type has {} entries for {} tokens", types.len(), tokens.len());
        }
        Ok(Self { tokens, types })
    }

    /// Ids, texts and types in order.
    fn entries(&self) -> impl Iterator<Item = (u32, &str, TokenType)> {
        self.tokens.iter().zip(&self.types).enumerate().map(|(id, (token, kind))| (id as u32, token.as_str(), *kind))
    }
}

fn token_type(value: &Value) -> Result<TokenType> {
    Ok(match value.to_i32().context("gguf: tokenizer.ggml.token_type")? {
        1 => TokenType::Normal,
        2 => TokenType::Unknown,
        3 => TokenType::Control,
        4 => TokenType::UserDefined,
        5 => TokenType::Unused,
        6 => TokenType::Byte,
        other => bail!("gguf: tokenizer.ggml.token_type: {other} is not in 1 to 6"),
    })
}

fn special(gguf: &Gguf, name: &str, vocabulary: usize) -> Result<Option<u32>> {
    let key = format!("tokenizer.ggml.{name}_token_id");
    match gguf.number(&key)? {
        Some(id) if id >= vocabulary => bail!("gguf: {key} is {id}, the vocabulary has {vocabulary}"),
        id => Ok(id.map(|id| id as u32)),
    }
}
