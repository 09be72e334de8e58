//! Interrupt remapping (VT-d 5.10 chapter 5): every check in the order of vtd.md §1.8.
// CONTRACT (helper C)
use iommu_types::*;
use super::walk::TableMemory;
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct InterruptTable { pub base: Hpa, pub entries_log2: u8 /* S+1: 1..=16 */, pub extended_mode: bool }
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct InterruptState { pub remapping_enabled: bool, pub compatibility_allowed: bool, pub table: Option<InterruptTable> }
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DeliveredInterrupt { pub vector: u8, pub destination: u32, pub delivery_mode: u8, pub level_triggered: bool, pub logical_destination: bool, pub redirection_hint: bool, pub index: Option<u16> }
/// (IRTE posted mode, IM=1, is reported as reserved, 24: not supported, CAP.PI=0.) The bool is "suppressed by the IRTE's FPD".
pub fn remap(memory: &impl TableMemory, capabilities: &Capabilities, state: InterruptState, source: SourceId, address: u64, data: u32) -> Result<DeliveredInterrupt, (InterruptFault, bool)> { todo!() }
