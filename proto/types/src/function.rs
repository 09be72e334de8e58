//! What a PCI function is, as far as isolation goes.

use std::fmt;

use crate::DeviceAddress;

/// The kind of a PCI function.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum FunctionKind {
    /// An ordinary function.
    Endpoint,
    /// A bridge or switch port: never assigned.
    Bridge {
        /// The bus below it.
        secondary_bus: u8,
        /// The highest bus below it.
        subordinate_bus: u8,
    },
    /// An SR-IOV virtual function.
    VirtualFunction {
        /// Its physical function.
        physical: DeviceAddress,
    },
}

/// A PCI function, and what it is kept from by the fabric.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct PciFunction {
    /// What it is.
    pub kind: FunctionKind,
    /// Whether it has Access Control Services on (PCIe 6.12): source validation, and peer-to-peer requests redirected upstream, to the IOMMU.
    pub acs: bool,
}

impl PciFunction {
    /// An ordinary function that is isolated from its neighbours.
    pub const ISOLATED: Self = Self { kind: FunctionKind::Endpoint, acs: true };

    /// Whether it is a bridge.
    pub const fn is_bridge(&self) -> bool {
        matches!(self.kind, FunctionKind::Bridge { .. })
    }
    /// Whether it is a virtual function.
    pub const fn is_virtual(&self) -> bool {
        matches!(self.kind, FunctionKind::VirtualFunction { .. })
    }
}

impl fmt::Display for PciFunction {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.kind {
            FunctionKind::Endpoint => f.write_str("endpoint")?,
            FunctionKind::Bridge { secondary_bus, subordinate_bus } => {
                write!(f, "bridge to {secondary_bus:02x}-{subordinate_bus:02x}")?;
            }
            FunctionKind::VirtualFunction { physical } => write!(f, "virtual function of {physical}")?,
        }
        f.write_str(if self.acs { ", ACS" } else { ", no ACS" })
    }
}
