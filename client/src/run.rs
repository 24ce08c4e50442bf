//! A run: consecutive new tokens whose rows are being given, layer by layer. The same bookkeeping for both ways to attach.

use std::ops::Range;

use crate::error::ClientError;

/// The run in progress.
#[derive(Clone, Debug)]
pub(crate) struct Run {
    first: usize,
    token_ids: Vec<u32>,
    /// Next position of each layer.
    next: Vec<usize>,
}

impl Run {
    pub(crate) fn new(first: usize, token_ids: &[u32], layers: usize) -> Self {
        Self { first, token_ids: token_ids.to_vec(), next: vec![first; layers] }
    }

    pub(crate) fn end(&self) -> usize {
        self.first + self.token_ids.len()
    }

    /// The token ids of positions of the run.
    pub(crate) fn ids_of(&self, positions: Range<usize>) -> &[u32] {
        &self.token_ids[positions.start - self.first..positions.end - self.first]
    }

    /// Checks that rows of `tokens` tokens may be given to `layer` at `first_position`; answers the positions.
    pub(crate) fn check(&self, layer: usize, first_position: usize, tokens: usize) -> Result<Range<usize>, ClientError> {
        let input = |field, value: usize, bound: String| Err(ClientError::Input { field, value: value.to_string(), bound });
        let Some(&next) = self.next.get(layer) else {
            return input("layer", layer, format!("0 to {}", self.next.len().saturating_sub(1)));
        };
        if first_position != next {
            return input("first_position", first_position, format!("{next}, the next position of layer {layer}"));
        }
        let room = self.end() - next;
        if tokens == 0 || tokens > room {
            return input("rows (tokens)", tokens, format!("1 to {room}, what is left of the run in layer {layer}"));
        }
        Ok(first_position..first_position + tokens)
    }

    /// Records that the rows are stored.
    pub(crate) fn stored(&mut self, layer: usize, positions: &Range<usize>) {
        self.next[layer] = positions.end;
    }

    /// Whether every layer has every row.
    pub(crate) fn is_complete(&self) -> bool {
        let end = self.end();
        self.next.iter().all(|&next| next == end)
    }

    /// Whether any row has been given.
    pub(crate) fn is_started(&self) -> bool {
        self.next.iter().any(|&next| next > self.first)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_run_takes_each_layer_once_and_in_order() {
        let mut run = Run::new(10, &[1, 2, 3], 2);
        assert!(!run.is_started());
        let part = run.check(0, 10, 2).expect("first part");
        assert_eq!(run.ids_of(part.clone()), [1, 2]);
        run.stored(0, &part);
        assert!(run.is_started() && !run.is_complete());
        assert_eq!(run.check(0, 10, 1).expect_err("again").to_string(), "first_position: 10 is outside 12, the next position of layer 0");
        assert_eq!(
            run.check(0, 12, 2).expect_err("too long").to_string(),
            "rows (tokens): 2 is outside 1 to 1, what is left of the run in layer 0"
        );
        assert_eq!(run.check(2, 10, 1).expect_err("no layer").to_string(), "layer: 2 is outside 0 to 1");
        assert!(run.check(1, 11, 1).is_err());
        for (layer, first, tokens) in [(1, 10, 3), (0, 12, 1)] {
            let part = run.check(layer, first, tokens).expect("in order");
            run.stored(layer, &part);
        }
        assert!(run.is_complete());
        assert!(run.check(0, 13, 1).is_err());
    }
}
