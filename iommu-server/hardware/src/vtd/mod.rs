//! The VT-d unit in legacy mode (VT-d 5.10).
// CONTRACT. Helper C owns vtd/spec/, vtd/walk.rs, vtd/interrupt.rs (remapping). Helper D owns the rest of vtd/ (unit.rs, port.rs, fault_log.rs, registers/, queue.rs, explain.rs) and dma.rs.

pub mod interrupt; // C
pub mod spec; // C: root_context.rs, pte.rs, irte.rs, invalidation.rs (descriptors), registers.rs (bit layouts of CAP, ECAP, GCMD.. FRCD), each item citing VT-d 5.10 §n once
mod unit;
pub mod walk; // C
pub use unit::*;
