//! What the DMA API says beside range and direction: attributes, whom a sync is for, and what a device can address.

use std::fmt;

use crate::errors::InvalidField;

/// Linux's DMA attributes, those of them that have a meaning here.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct DmaAttributes {
    /// `DMA_ATTR_SKIP_CPU_SYNC`: no copy at map and unmap in a bounce domain; the driver syncs where it needs it.
    pub skip_cpu_sync: bool,
    /// Memory of a device (`dma_map_resource`): never copied and never synced.
    pub resource: bool,
}

impl DmaAttributes {
    /// Without any.
    pub const NONE: Self = Self { skip_cpu_sync: false, resource: false };
    /// Of a resource.
    pub const RESOURCE: Self = Self { skip_cpu_sync: false, resource: true };
    /// Without the copies of map and unmap.
    pub const SKIP_CPU_SYNC: Self = Self { skip_cpu_sync: true, resource: false };

    /// Whether map and unmap leave shadow buffers alone.
    pub const fn skips_copies(self) -> bool {
        self.skip_cpu_sync || self.resource
    }
}

/// Who is to see what the other wrote.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum SyncFor {
    /// The CPU (`dma_sync_single_for_cpu`); the device leaves the memory alone until the next sync.
    Cpu,
    /// The device (`dma_sync_single_for_device`); the CPU leaves the memory alone until the next sync.
    Device,
}

impl fmt::Display for SyncFor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Cpu => "cpu",
            Self::Device => "device",
        })
    }
}

/// What a device can address and how long its segments may be. The default is no limit, unlike Linux, whose default is what a PCI
/// device of 1998 could do (32 bits, 64 KiB, 4 GiB): devices here are programs, and one that has a limit says so.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct DmaLimits {
    /// Address bits that it has (`dma_set_mask`): no address at or above 2 to this power is given to it.
    pub mask_bits: u8,
    /// Longest segment, in bytes (`dma_set_max_seg_size`).
    pub segment_bytes_max: u64,
    /// No segment crosses a multiple of this plus 1 (`dma_set_seg_boundary`).
    pub segment_boundary_mask: u64,
}

/// Fewer bits than a page has would leave no address to give.
pub const DMA_MASK_BITS_MIN: u8 = 12;
/// All bits that a PCIe address has.
pub const DMA_MASK_BITS_MAX: u8 = 64;
/// Addresses are given by pages, so a boundary inside a page could not be kept.
pub const SEGMENT_BOUNDARY_MASK_MIN: u64 = 0xfff;

impl Default for DmaLimits {
    fn default() -> Self {
        Self::NONE
    }
}

impl DmaLimits {
    /// No limit.
    pub const NONE: Self =
        Self { mask_bits: DMA_MASK_BITS_MAX, segment_bytes_max: u64::MAX, segment_boundary_mask: u64::MAX };

    /// The highest address that the device can name.
    pub const fn last_address(&self) -> u64 {
        if self.mask_bits >= DMA_MASK_BITS_MAX { u64::MAX } else { (1 << self.mask_bits) - 1 }
    }
    /// Whether these limits make sense; the error names the field and the remedy.
    pub fn check(&self) -> Result<(), InvalidField> {
        let refused = |field: &str, why: String| Err(InvalidField { field: field.to_owned(), why });
        if !(DMA_MASK_BITS_MIN..=DMA_MASK_BITS_MAX).contains(&self.mask_bits) {
            let (bits, min, max) = (self.mask_bits, DMA_MASK_BITS_MIN, DMA_MASK_BITS_MAX);
            return refused("mask_bits", format!("is {bits}, and must be between {min} and {max}"));
        }
        if self.segment_bytes_max == 0 {
            return refused("segment_bytes_max", "is 0; at least 1 is needed".to_owned());
        }
        let mask = self.segment_boundary_mask;
        if mask < SEGMENT_BOUNDARY_MASK_MIN || mask & mask.wrapping_add(1) != 0 {
            let min = SEGMENT_BOUNDARY_MASK_MIN;
            let why = format!("{mask:#x} is not a power of two less 1, or is below {min:#x}");
            return refused("segment_boundary_mask", why);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(limits: DmaLimits, refused: Option<&str>) {
        let field = limits.check().err().map(|error| error.field);
        assert_eq!(field.as_deref(), refused, "{limits:?}");
    }

    #[test]
    fn limits_have_bounds_and_the_error_names_them() {
        let none = DmaLimits::default();
        check(none, None);
        for (mask_bits, refused) in
            [(0, Some("mask_bits")), (11, Some("mask_bits")), (12, None), (64, None), (65, Some("mask_bits"))]
        {
            check(DmaLimits { mask_bits, ..none }, refused);
        }
        for (segment_bytes_max, refused) in [(0, Some("segment_bytes_max")), (1, None), (u64::MAX, None)] {
            check(DmaLimits { segment_bytes_max, ..none }, refused);
        }
        for (segment_boundary_mask, valid) in
            [(0, false), (0x7ff, false), (0xfff, true), (0x1000, false), (0x1fff, true), (u64::MAX, true)]
        {
            let refused = (!valid).then_some("segment_boundary_mask");
            check(DmaLimits { segment_boundary_mask, ..none }, refused);
        }
    }

    #[test]
    fn a_mask_ends_at_its_last_address() {
        for (mask_bits, last) in [(12, 0xfff), (32, 0xffff_ffff), (63, u64::MAX >> 1), (64, u64::MAX)] {
            assert_eq!(DmaLimits { mask_bits, ..DmaLimits::NONE }.last_address(), last);
        }
    }
}
