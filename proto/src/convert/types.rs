//! `types.proto`: the vocabulary that the services share. What is chosen for a domain is in `options.rs`.

use iommu_types::errors::InvalidField;
use iommu_types::{
    Access, AddressType, DeviceAddress, Direction, Fault, FaultRecord, InterruptFault, Owner, Permissions,
    TranslationFault,
};

use super::{Field, absent, choices, convert, message_field, messages, parse, within, wrong};
use crate::pb;

convert!(DeviceAddress as DeviceAddress { segment, source_id });

impl TryFrom<pb::Owner> for Owner {
    type Error = InvalidField;
    fn try_from(wire: pb::Owner) -> Result<Self, InvalidField> {
        match wire.kind.ok_or_else(|| within("kind", absent()))? {
            pb::owner::Kind::Driver(number) => Ok(Self::Driver(number)),
            pb::owner::Kind::Vm(number) => Ok(Self::Vm(number)),
        }
    }
}
impl From<Owner> for pb::Owner {
    fn from(owner: Owner) -> Self {
        let kind = match owner {
            Owner::Driver(number) => pb::owner::Kind::Driver(number),
            Owner::Vm(number) => pb::owner::Kind::Vm(number),
        };
        Self { kind: Some(kind) }
    }
}
message_field!(Owner, pb::Owner);

choices! {
    Access as Access { Read, Write, Atomic }
    Direction as Direction { Bidirectional, ToDevice, FromDevice }
}

impl TryFrom<pb::Permissions> for Permissions {
    type Error = InvalidField;
    fn try_from(wire: pb::Permissions) -> Result<Self, InvalidField> {
        let mut permissions = Self::empty();
        permissions.set(Self::READ, wire.read);
        permissions.set(Self::WRITE, wire.write);
        Ok(permissions)
    }
}
impl From<Permissions> for pb::Permissions {
    fn from(permissions: Permissions) -> Self {
        Self {
            read: permissions.contains(Permissions::READ),
            write: permissions.contains(Permissions::WRITE),
        }
    }
}
message_field!(Permissions, pb::Permissions);

impl Field<u32> for AddressType {
    fn parse(wire: u32) -> Result<Self, InvalidField> {
        let known = u8::try_from(wire).ok().and_then(Self::from_bits);
        known.ok_or_else(|| wrong(format!("{wire} is no address type; 0, 1 and 2 are")))
    }
    fn write(self) -> u32 {
        self.bits().into()
    }
}

impl TryFrom<pb::TranslationFault> for TranslationFault {
    type Error = InvalidField;
    fn try_from(wire: pb::TranslationFault) -> Result<Self, InvalidField> {
        Ok(Self {
            source_id: parse("source_id", wire.source_id)?,
            pasid: parse("pasid", wire.pasid)?,
            iova: parse("iova", wire.iova)?,
            access: parse("access", wire.access)?,
            address_type: parse("address_type", wire.address_type)?,
            reason: parse("reason", wire.reason)?,
        })
    }
}
impl From<TranslationFault> for pb::TranslationFault {
    fn from(fault: TranslationFault) -> Self {
        Self {
            source_id: fault.source_id.write(),
            pasid: fault.pasid.write(),
            iova: fault.iova.write(),
            access: fault.access.write(),
            address_type: fault.address_type.write(),
            reason: fault.reason.write(),
            meaning: fault.reason.meaning().to_owned(),
        }
    }
}
message_field!(TranslationFault, pb::TranslationFault);

impl TryFrom<pb::InterruptFault> for InterruptFault {
    type Error = InvalidField;
    fn try_from(wire: pb::InterruptFault) -> Result<Self, InvalidField> {
        Ok(Self {
            source_id: parse("source_id", wire.source_id)?,
            index: parse("index", wire.index)?,
            reason: parse("reason", wire.reason)?,
        })
    }
}
impl From<InterruptFault> for pb::InterruptFault {
    fn from(fault: InterruptFault) -> Self {
        Self {
            source_id: fault.source_id.write(),
            index: fault.index.write(),
            reason: fault.reason.write(),
            meaning: fault.reason.meaning().to_owned(),
        }
    }
}
message_field!(InterruptFault, pb::InterruptFault);

impl Field<Option<pb::fault_record::Fault>> for Fault {
    fn parse(wire: Option<pb::fault_record::Fault>) -> Result<Self, InvalidField> {
        match wire.ok_or_else(absent)? {
            pb::fault_record::Fault::Dma(fault) => {
                fault.try_into().map(Self::Dma).map_err(|error| within("dma", error))
            }
            pb::fault_record::Fault::Interrupt(fault) => {
                fault.try_into().map(Self::Interrupt).map_err(|error| within("interrupt", error))
            }
        }
    }
    fn write(self) -> Option<pb::fault_record::Fault> {
        Some(match self {
            Self::Dma(fault) => pb::fault_record::Fault::Dma(fault.into()),
            Self::Interrupt(fault) => pb::fault_record::Fault::Interrupt(fault.into()),
        })
    }
}

convert!(FaultRecord as FaultRecord {
    sequence, at_unix_ms, owner, device, domain_id, fault, collapsed_count
});

messages! {
    /// An interrupt that passed remapping.
    Interrupt as Interrupt {
        /// The device that raised it.
        device: DeviceAddress,
        /// Vector.
        vector: u8,
        /// Destination: APIC ID of the processor.
        destination: u32,
        /// How many equal interrupts this one stands for; at least 1.
        count: u32,
    };
}
