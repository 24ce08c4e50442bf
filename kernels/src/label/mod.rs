//! Labels: the calibrated channels of a key, quantised by a plan (Double Sparsity, section 3; DESIGN.md, section 2).

pub mod calibration;
pub mod coder;
pub mod plan;

pub use calibration::{Calibration, CalibrationError, LaneCalibration, LayerCalibration};
pub use coder::LabelCoder;
pub use plan::{LabelGroup, LabelPlan, PlanError};
