//! SentencePiece with scores, as BPE: the neighbours whose joined text has the best score are joined first (arXiv 1808.06226, section 3.1).

use std::cmp::Ordering;
use std::collections::{BinaryHeap, HashMap};

use anyhow::{Context, Result, anyhow, bail};

use super::{Gguf, TokenType, Vocabulary};

/// What stands for a space inside pieces.
const SPACE: char = '\u{2581}';

/// A SentencePiece vocabulary.
pub(super) struct Pieces {
    /// Normal pieces: id and score by text.
    pieces: HashMap<String, (u32, f32)>,
    /// Tokens that are found literally, by first byte, longest first.
    literal: Vec<Vec<(String, u32)>>,
    /// The token of each byte.
    bytes: [Option<u32>; 256],
    unknown: Option<u32>,
    /// What each id turns back into.
    texts: Vec<Text>,
    space_first: bool,
}

enum Text {
    Nothing,
    Byte(u8),
    Plain(String),
}

impl Pieces {
    pub(super) fn read(gguf: &Gguf, vocabulary: &Vocabulary) -> Result<Self> {
        let scores = gguf.array("tokenizer.ggml.scores")?;
        if scores.len() != vocabulary.tokens.len() {
            bail!("gguf: tokenizer.ggml.scores has {} entries for {} tokens", scores.len(), vocabulary.tokens.len());
        }
        let mut read = Self {
            pieces: HashMap::with_capacity(scores.len()),
            literal: vec![Vec::new(); 256],
            bytes: [None; 256],
            unknown: None,
            texts: Vec::with_capacity(scores.len()),
            space_first: gguf.truth("tokenizer.ggml.add_space_prefix")?.unwrap_or(true),
        };
        for ((id, token, kind), score) in vocabulary.entries().zip(scores) {
            let score = score.to_f32().context("gguf: tokenizer.ggml.scores")?;
            let text = read.place(id, token, kind, score)?;
            read.texts.push(text);
        }
        read.literal.iter_mut().for_each(|tokens| tokens.sort_by_key(|(token, _)| std::cmp::Reverse(token.len())));
        Ok(read)
    }

    fn place(&mut self, id: u32, token: &str, kind: TokenType, score: f32) -> Result<Text> {
        match kind {
            TokenType::Normal => {
                self.pieces.insert(token.to_owned(), (id, score));
                Ok(Text::Plain(token.replace(SPACE, " ")))
            }
            TokenType::UserDefined => {
                // Some converters write spaces, some the mark that stands for them; the text has spaces.
                let literal = token.replace(SPACE, " ");
                let first = *literal.as_bytes().first().ok_or_else(|| anyhow!("gguf: token {id} is user-defined and empty"))?;
                self.literal[usize::from(first)].push((literal.clone(), id));
                Ok(Text::Plain(literal))
            }
            TokenType::Byte => {
                let digits = token.strip_prefix("<0x").and_then(|rest| rest.strip_suffix('>'));
                let byte = digits.and_then(|digits| u8::from_str_radix(digits, 16).ok());
                let byte = byte.ok_or_else(|| anyhow!("gguf: token {id} is {token:?}, a byte such as <0x0A> expected"))?;
                self.bytes[usize::from(byte)] = Some(id);
                Ok(Text::Byte(byte))
            }
            TokenType::Unknown => {
                self.unknown = Some(id);
                Ok(Text::Nothing)
            }
            TokenType::Control | TokenType::Unused => Ok(Text::Nothing),
        }
    }

    pub(super) fn encode(&self, text: &str, ids: &mut Vec<u32>) -> Result<()> {
        let mut plain_from = 0;
        let mut at = 0;
        while at < text.len() {
            let found = self.literal[usize::from(text.as_bytes()[at])].iter().find(|(token, _)| text[at..].starts_with(token));
            let Some((token, id)) = found else {
                at += text[at..].chars().next().map_or(1, char::len_utf8);
                continue;
            };
            self.encode_plain(&text[plain_from..at], plain_from == 0, ids)?;
            ids.push(*id);
            at += token.len();
            plain_from = at;
        }
        self.encode_plain(&text[plain_from..], plain_from == 0, ids)
    }

    fn encode_plain(&self, text: &str, first: bool, ids: &mut Vec<u32>) -> Result<()> {
        if text.is_empty() {
            return Ok(());
        }
        let mut marked = String::with_capacity(text.len() * 2);
        if first && self.space_first {
            marked.push(SPACE);
        }
        marked.extend(text.chars().map(|character| if character == ' ' { SPACE } else { character }));
        for symbol in (Joining { pieces: self, text: &marked, symbols: symbols(&marked), queue: BinaryHeap::new() }).run() {
            self.push_symbol(symbol, ids)?;
        }
        Ok(())
    }

    fn push_symbol(&self, symbol: &str, ids: &mut Vec<u32>) -> Result<()> {
        if let Some((id, _)) = self.pieces.get(symbol) {
            ids.push(*id);
            return Ok(());
        }
        let bytes: Option<Vec<u32>> = symbol.bytes().map(|byte| self.bytes[usize::from(byte)]).collect();
        match (bytes, self.unknown) {
            (Some(bytes), _) => ids.extend(bytes),
            (None, Some(unknown)) => ids.push(unknown),
            (None, None) => bail!("text: {symbol:?} has no token, and the vocabulary has neither its bytes nor an unknown token"),
        }
        Ok(())
    }

    pub(super) fn decode(&self, ids: &[u32]) -> Result<String> {
        let mut bytes = Vec::new();
        for &id in ids {
            match self.texts.get(id as usize).ok_or_else(|| anyhow!("token id: {id}, the vocabulary has {}", self.texts.len()))? {
                Text::Nothing => {}
                Text::Byte(byte) => bytes.push(*byte),
                Text::Plain(text) => bytes.extend_from_slice(text.as_bytes()),
            }
        }
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    }
}

/// A run of text that may still be joined with its neighbours; empty once it has been joined to the one before it.
struct Symbol {
    start: usize,
    end: usize,
    previous: Option<usize>,
    next: Option<usize>,
}

fn symbols(text: &str) -> Vec<Symbol> {
    let count = text.chars().count();
    let symbol = |(index, (start, character)): (usize, (usize, char))| Symbol {
        start,
        end: start + character.len_utf8(),
        previous: index.checked_sub(1),
        next: (index + 1 < count).then_some(index + 1),
    };
    text.char_indices().enumerate().map(symbol).collect()
}

/// Two neighbours that could be joined: valid as long as both still have the ends they had.
struct Pair {
    score: f32,
    left: usize,
    right: usize,
    end: usize,
}

impl Ord for Pair {
    /// The best score first, the leftmost among equals.
    fn cmp(&self, other: &Self) -> Ordering {
        self.score.total_cmp(&other.score).then(other.left.cmp(&self.left))
    }
}

impl PartialOrd for Pair {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl PartialEq for Pair {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other) == Ordering::Equal
    }
}

impl Eq for Pair {}

struct Joining<'a> {
    pieces: &'a Pieces,
    text: &'a str,
    symbols: Vec<Symbol>,
    queue: BinaryHeap<Pair>,
}

impl<'a> Joining<'a> {
    fn run(mut self) -> Vec<&'a str> {
        for left in 0..self.symbols.len() {
            self.propose(Some(left));
        }
        while let Some(pair) = self.queue.pop() {
            let (left, right) = (&self.symbols[pair.left], &self.symbols[pair.right]);
            let stale = left.start == left.end || left.next != Some(pair.right) || right.end != pair.end;
            if !stale {
                self.join(pair.left, pair.right);
            }
        }
        let Self { text, symbols, .. } = self;
        symbols.iter().filter(|symbol| symbol.start < symbol.end).map(|symbol| &text[symbol.start..symbol.end]).collect()
    }

    fn join(&mut self, left: usize, right: usize) {
        let (end, next) = (self.symbols[right].end, self.symbols[right].next);
        self.symbols[left].end = end;
        self.symbols[left].next = next;
        self.symbols[right].end = self.symbols[right].start;
        if let Some(next) = next {
            self.symbols[next].previous = Some(left);
        }
        self.propose(self.symbols[left].previous);
        self.propose(Some(left));
    }

    /// Puts the pair that starts at `left` into the queue, if its joined text is a piece.
    fn propose(&mut self, left: Option<usize>) {
        let Some((left, right)) = left.and_then(|left| Some((left, self.symbols[left].next?))) else { return };
        let end = self.symbols[right].end;
        if let Some(&(_, score)) = self.pieces.pieces.get(&self.text[self.symbols[left].start..end]) {
            self.queue.push(Pair { score, left, right, end });
        }
    }
}
