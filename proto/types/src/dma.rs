//! Placeholder until the wire branch lands.
/// Attributes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct DmaAttributes {
    /// No copy.
    pub skip_cpu_sync: bool,
    /// Device memory.
    pub resource: bool,
}
/// For whom.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum SyncFor {
    /// CPU.
    Cpu,
    /// Device.
    Device,
}
/// Limits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct DmaLimits {
    /// Mask.
    pub mask_bits: u8,
    /// Segment.
    pub segment_bytes_max: u64,
    /// Boundary.
    pub segment_boundary_mask: u64,
}
impl Default for DmaLimits {
    fn default() -> Self {
        Self { mask_bits: 64, segment_bytes_max: u64::MAX, segment_boundary_mask: u64::MAX }
    }
}
