//! SVG plots: lines over an axis, and bars against targets.

mod axis;
mod bars;
mod lines;
mod svg;

pub(crate) use axis::Scale;
pub(crate) use bars::bars_against_targets;
pub(crate) use lines::{Chart, Line, Points};
