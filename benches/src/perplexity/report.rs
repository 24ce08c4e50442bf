//! What a perplexity run found.

use std::collections::BTreeMap;

use serde::Serialize;

use super::score::Scored;
use crate::model::Model;
use crate::model::input::hash_tokens;
use crate::model::serving::Served;
use crate::report::{Plot, Series, Table};

/// Results; the sparse ones are null in a dense run.
#[derive(Clone, Debug, Serialize)]
pub struct PerplexityReport {
    /// Tokens of the text.
    pub tokens: usize,
    /// Tokens that were scored.
    pub scored_tokens: usize,
    /// Nats a scored token with dense attention over f32 rows.
    pub dense_nll: f64,
    /// Nats a scored token with attention by Sluice.
    pub sparse_nll: Option<f64>,
    /// Nats above dense; paired, so much surer than either figure.
    pub added_nll: Option<f64>,
    /// Standard error of `added_nll`, from the scored tokens' differences.
    pub added_nll_error: Option<f64>,
    /// 99th percentile of one token's absolute change in nats.
    pub token_change_p99: Option<f64>,
    /// Share of the softmax over all rows that decode steps saw, by layer; null when a prefix was held already.
    pub mass_kept: Option<BTreeMap<usize, f64>>,
    /// Label plan.
    pub label: Option<String>,
    /// Bytes of one row's label.
    pub label_bytes_per_row: Option<usize>,
    /// Part of the tokens that a lane selects.
    pub budget_ratio: Option<f64>,
    /// How the rows were reached.
    pub attach: Option<String>,
    /// Scored tokens a second, of the sparse part where there is one.
    pub tokens_per_s: f64,
    /// Scored tokens a second, dense.
    pub dense_tokens_per_s: f64,
    /// Prefilled tokens a second, dense.
    pub dense_prefill_tokens_per_s: f64,
    /// Prefilled tokens a second through Sluice.
    pub prefill_tokens_per_s: Option<f64>,
    /// Tokens whose rows were held already.
    pub matched_tokens: Option<usize>,
    /// Bytes of rows and labels that one scored token read, all layers.
    pub bytes_per_token: Option<f64>,
    /// Share of the selected rows that the hot pool held; null without one.
    pub hot_share: Option<f64>,
    /// BLAKE3 of the GGUF file.
    pub weights_digest: String,
    /// BLAKE3 of the token ids.
    pub text_hash: String,
    #[serde(skip)]
    dense_losses: Vec<f64>,
    #[serde(skip)]
    sparse_losses: Vec<f64>,
}

impl PerplexityReport {
    /// The report of a dense run.
    #[must_use]
    pub fn dense(model: &Model, ids: &[u32], dense: &Scored) -> Self {
        Self {
            tokens: ids.len(),
            scored_tokens: dense.losses.len(),
            dense_nll: dense.mean(),
            sparse_nll: None,
            added_nll: None,
            added_nll_error: None,
            token_change_p99: None,
            mass_kept: None,
            label: None,
            label_bytes_per_row: None,
            budget_ratio: None,
            attach: None,
            tokens_per_s: dense.decode_tokens_per_s,
            dense_tokens_per_s: dense.decode_tokens_per_s,
            dense_prefill_tokens_per_s: dense.prefill_tokens_per_s,
            prefill_tokens_per_s: None,
            matched_tokens: None,
            bytes_per_token: None,
            hot_share: None,
            weights_digest: blake3::Hash::from_bytes(model.digest()).to_hex().to_string(),
            text_hash: hash_tokens(ids),
            dense_losses: dense.losses.clone(),
            sparse_losses: Vec::new(),
        }
    }

    /// Adds what the run through Sluice found.
    pub fn add_sparse(&mut self, served: &Served, sparse: &Scored) {
        let changes: Vec<f64> = sparse.losses.iter().zip(&self.dense_losses).map(|(sparse, dense)| sparse - dense).collect();
        let count = changes.len() as f64;
        let mean = changes.iter().sum::<f64>() / count;
        let variance = changes.iter().map(|change| (change - mean).powi(2)).sum::<f64>() / (count - 1.0).max(1.0);
        let mut sizes: Vec<f64> = changes.iter().map(|change| change.abs()).collect();
        sizes.sort_by(f64::total_cmp);
        let (cost, decoded) = served.layers.cost();
        self.sparse_nll = Some(sparse.mean());
        self.added_nll = Some(mean);
        self.added_nll_error = Some((variance / count).sqrt());
        self.token_change_p99 = sizes.get((sizes.len() * 99 / 100).min(sizes.len() - 1)).copied();
        self.mass_kept = served.layers.mass().map(crate::model::MassMeter::kept);
        self.label = Some(served.plan.to_string());
        self.label_bytes_per_row = Some(served.plan.label_bytes());
        self.budget_ratio = Some(served.ratio.value());
        self.attach = Some(served.attach.to_owned());
        self.tokens_per_s = sparse.decode_tokens_per_s;
        self.prefill_tokens_per_s = Some(sparse.prefill_tokens_per_s);
        self.matched_tokens = Some(served.matched_tokens);
        self.bytes_per_token = Some((cost.row_bytes + cost.label_bytes) as f64 / decoded.max(1) as f64);
        self.hot_share = served.hot.then(|| cost.hot_rows as f64 / cost.selected_rows.max(1) as f64);
        self.sparse_losses = sparse.losses.clone();
    }

    /// The report for people.
    #[must_use]
    pub fn table(&self) -> String {
        let mut table = Table::new(["attention", "nats a token", "above dense", "p99 of a token", "tokens/s", "prefill tokens/s"]);
        table.row([
            "dense, f32 rows".to_owned(),
            format!("{:.4}", self.dense_nll),
            String::new(),
            String::new(),
            format!("{:.1}", self.dense_tokens_per_s),
            format!("{:.0}", self.dense_prefill_tokens_per_s),
        ]);
        if let (Some(nll), Some(added), Some(error)) = (self.sparse_nll, self.added_nll, self.added_nll_error) {
            let (label, attach) = (self.label.as_deref().unwrap_or(""), self.attach.as_deref().unwrap_or(""));
            table.row([
                format!("Sluice, {attach}, {label}, k = {:.4} n", self.budget_ratio.unwrap_or(1.0)),
                format!("{nll:.4}"),
                format!("{added:+.4} +- {error:.4}"),
                format!("{:.2}", self.token_change_p99.unwrap_or(0.0)),
                format!("{:.1}", self.tokens_per_s),
                format!("{:.0}", self.prefill_tokens_per_s.unwrap_or(0.0)),
            ]);
        }
        let mut text = format!("{} tokens, the last {} scored\n{table}", self.tokens, self.scored_tokens);
        if let Some(mass) = &self.mass_kept {
            let layers: Vec<String> = mass.iter().map(|(layer, kept)| format!("layer {layer} {kept:.3}")).collect();
            text += &format!("attention mass kept: {}\n", layers.join(", "));
        }
        if let (Some(bytes), Some(label)) = (self.bytes_per_token, self.label_bytes_per_row) {
            text +=
                &format!("{label} B of label a row; {:.1} MiB of rows and labels read a token, all layers\n", bytes / f64::from(1 << 20));
        }
        if let Some(share) = self.hot_share {
            text += &format!("selected rows that were hot: {:.1} %\n", 100.0 * share);
        }
        text
    }

    /// Mean loss of every 32 scored tokens along the text.
    #[must_use]
    pub fn plot(&self) -> Plot {
        const TOKENS: usize = 32;
        let first = self.tokens - self.scored_tokens;
        let line = |name: &str, losses: &[f64]| {
            let point = |(index, losses): (usize, &[f64])| {
                ((first + index * TOKENS + losses.len() / 2) as f64, losses.iter().sum::<f64>() / losses.len() as f64)
            };
            Series { name: name.to_owned(), points: losses.chunks(TOKENS).enumerate().map(point).collect() }
        };
        let mut series = vec![line("dense", &self.dense_losses)];
        if !self.sparse_losses.is_empty() {
            series.push(line("Sluice", &self.sparse_losses));
        }
        let title = format!("Loss along the text, mean of {TOKENS} tokens");
        Plot { title, x_label: "position, tokens".to_owned(), y_label: "loss, nats a token".to_owned(), series }
    }
}
