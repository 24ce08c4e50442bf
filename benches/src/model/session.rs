//! Steps of a session with a daemon.

use std::time::Duration;

use anyhow::Result;
use sluice_client::{AttendMode, Session, Step, StepOut};
use sluice_kernels::decoder::{Attend, StepReport};

use super::served::{LayerStep, Steps};

/// A session, attached either way.
pub struct SessionSteps {
    session: Session,
}

impl SessionSteps {
    /// Takes over a session.
    #[must_use]
    pub fn new(session: Session) -> Self {
        Self { session }
    }
}

impl Steps for SessionSteps {
    fn length(&self) -> usize {
        self.session.length()
    }

    fn begin(&mut self, token_ids: &[u32]) -> Result<()> {
        Ok(self.session.begin(token_ids)?)
    }

    fn step(&mut self, step: &LayerStep<'_>, output: &mut [f32], lse: &mut [f32]) -> Result<StepReport> {
        let attend = match step.attend {
            Attend::Sparse => AttendMode::Sparse,
            Attend::Dense => AttendMode::Dense,
        };
        let mut report = sluice_client::StepReport::default();
        self.session.step(
            &Step { layer: step.layer, first_position: step.first_position, queries: step.queries, rows: Some(step.rows), attend },
            StepOut { output, log_sum_exp: lse, report: Some(&mut report) },
        )?;
        Ok(StepReport {
            selected_rows: report.selected_rows,
            hot_rows: report.hot_rows,
            row_bytes: report.row_bytes,
            label_bytes: report.label_bytes,
            score: Duration::from_nanos(report.score_ns),
            select: Duration::from_nanos(report.select_ns),
            gather: Duration::from_nanos(report.gather_ns),
            attend: Duration::from_nanos(report.attend_ns),
            fused: Duration::from_nanos(report.fused_ns),
            // One sequence steps here.
            shared_label_bytes: 0,
        })
    }

    fn selected(&mut self, layer: usize, position: usize, query: &[f32]) -> Result<Vec<Vec<u32>>> {
        let lanes = self.session.rows(layer, position, query)?;
        lanes.into_iter().map(|lane| lane.positions.into_iter().map(|position| Ok(u32::try_from(position)?)).collect()).collect()
    }
}
