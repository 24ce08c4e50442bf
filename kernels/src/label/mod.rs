//! Labels: the calibrated channels of a key, quantised by a plan (Double Sparsity, section 3; DESIGN.md, section 2).

pub mod calibration;
pub mod calibrator;
pub mod coder;
pub mod packing;
pub mod plan;
pub mod weights;

pub use calibration::{Calibration, CalibrationError, LaneCalibration, LayerCalibration};
pub use calibrator::Calibrator;
pub use coder::{LabelCoder, LaneCoder};
pub use packing::{decode, encode, quantise};
pub use plan::{LabelGroup, LabelPlan, PlanError};
pub use weights::HeadWeights;
