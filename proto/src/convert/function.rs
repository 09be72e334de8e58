//! PCI functions, as `types.proto` has them.

use iommu_types::errors::InvalidField;
use iommu_types::{FunctionKind, PciFunction};

use super::{Field, absent, message_field, parse, within};
use crate::pb;

impl TryFrom<pb::PciFunction> for PciFunction {
    type Error = InvalidField;
    fn try_from(wire: pb::PciFunction) -> Result<Self, InvalidField> {
        use pb::pci_function::Kind;
        let kind = match wire.kind.ok_or_else(absent).map_err(|error| within("kind", error))? {
            Kind::Endpoint(_) => FunctionKind::Endpoint,
            Kind::Bridge(bridge) => FunctionKind::Bridge {
                secondary_bus: parse("bridge.secondary_bus", bridge.secondary_bus)?,
                subordinate_bus: parse("bridge.subordinate_bus", bridge.subordinate_bus)?,
            },
            Kind::VirtualFunction(function) => FunctionKind::VirtualFunction {
                physical: parse("virtual_function.physical", function.physical)?,
            },
        };
        Ok(Self { kind, acs: wire.acs })
    }
}

impl From<PciFunction> for pb::PciFunction {
    fn from(function: PciFunction) -> Self {
        use pb::pci_function::Kind;
        let kind = match function.kind {
            FunctionKind::Endpoint => Kind::Endpoint(pb::Endpoint {}),
            FunctionKind::Bridge { secondary_bus, subordinate_bus } => Kind::Bridge(pb::Bridge {
                secondary_bus: secondary_bus.write(),
                subordinate_bus: subordinate_bus.write(),
            }),
            FunctionKind::VirtualFunction { physical } => {
                Kind::VirtualFunction(pb::VirtualFunction { physical: Some(physical.into()) })
            }
        };
        Self { kind: Some(kind), acs: function.acs }
    }
}

message_field!(PciFunction, pb::PciFunction);
