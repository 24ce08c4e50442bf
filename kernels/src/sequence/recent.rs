//! The last queries of a prompt, kept until hot rows have been fetched with them.

/// Queries of a layer that are kept: what they select is much of what the first steps select.
const KEPT: usize = 4;

/// By layer.
#[derive(Debug, Default)]
pub(super) struct RecentQueries(Vec<Option<LayerQueries>>);

/// Queries of consecutive tokens of one layer.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct LayerQueries {
    /// Position of the first.
    pub(crate) first_position: usize,
    /// `[query][own query head][head_dim]`.
    pub(crate) values: Vec<f32>,
}

impl RecentQueries {
    /// Keeps the last of `queries`, each of `unit` values, in place of what was kept of the layer.
    pub(super) fn note(&mut self, layer: usize, first_position: usize, queries: &[f32], unit: usize) {
        if self.0.len() <= layer {
            self.0.resize_with(layer + 1, || None);
        }
        let dropped = (queries.len() / unit).saturating_sub(KEPT);
        let kept = LayerQueries { first_position: first_position + dropped, values: queries[dropped * unit..].to_vec() };
        self.0[layer] = Some(kept);
    }

    pub(super) fn take(&mut self, layer: usize) -> Option<LayerQueries> {
        self.0.get_mut(layer)?.take()
    }

    pub(super) fn forget(&mut self) {
        self.0.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_queries_of_the_last_piece_are_kept_once() {
        let mut recent = RecentQueries::default();
        assert_eq!(recent.take(3), None);
        recent.note(1, 10, &[1.0, 1.0, 2.0, 2.0], 2);
        let six: Vec<f32> = (0..6).flat_map(|query| [query as f32; 2]).collect();
        recent.note(1, 100, &six, 2);
        assert_eq!(recent.take(0), None);
        assert_eq!(recent.take(1), Some(LayerQueries { first_position: 102, values: six[4..].to_vec() }));
        assert_eq!(recent.take(1), None);
        recent.note(0, 5, &[1.0], 1);
        recent.forget();
        assert_eq!(recent.take(0), None);
    }
}
