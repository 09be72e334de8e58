//! What every call passes, outermost first: observation, limits, the gate.

pub mod gate;
pub mod limits;
pub mod observe;
pub mod permissions;
