//! `admin.proto`: steering the host.

use iommu_types::errors::InvalidField;
use iommu_types::{DeviceAddress, DomainId, Owner, PciFunction};

use super::session::check_name;
use super::{Field, absent, messages, parse, wrong_at};
use crate::pb;

fn check_device(declare: &DeclareDevice) -> Result<(), InvalidField> {
    if declare.device.segment != 0 {
        return Err(wrong_at("device.segment", "is not 0; only the host's devices are declared"));
    }
    check_name(&declare.name)
}
fn check_driver(declare: &DeclareDriver) -> Result<(), InvalidField> {
    check_name(&declare.name)
}

messages! {
    /// A device to declare.
    DeclareDevice as DeclareDeviceRequest {
        /// Where; in segment 0.
        device: DeviceAddress,
        /// Name with which its agent says Hello.
        name: String,
        /// Owner to give it to.
        owner: Option<Owner>,
        /// What it is; `None` for an ordinary function with ACS.
        function: Option<PciFunction>,
    } check check_device;
    /// A device to forget.
    RemoveDevice as RemoveDeviceRequest {
        /// Which.
        device: DeviceAddress,
    };
    /// A driver to declare.
    DeclareDriver as DeclareDriverRequest {
        /// Its owner.
        owner: Owner,
        /// Name with which it opens its session.
        name: String,
    } check check_driver;
    /// A device to give to an owner.
    AttachToOwner as AttachToOwnerRequest {
        /// Which.
        device: DeviceAddress,
        /// To whom.
        owner: Owner,
        /// To which domain; `None` for the owner's default domain of the device.
        domain_id: Option<DomainId>,
    };
    /// A device to detach.
    Detach as DetachRequest {
        /// Which.
        device: DeviceAddress,
    };
    /// A session to end.
    Quarantine as QuarantineRequest {
        /// Whose.
        peer: Peer,
    };
}

/// Whose session is to end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Peer {
    /// That of a device's agent.
    Device(DeviceAddress),
    /// That of an owner's driver.
    Owner(Owner),
}

impl Field<Option<pb::quarantine_request::Peer>> for Peer {
    fn parse(wire: Option<pb::quarantine_request::Peer>) -> Result<Self, InvalidField> {
        match wire.ok_or_else(absent)? {
            pb::quarantine_request::Peer::Device(device) => parse("device", device).map(Self::Device),
            pb::quarantine_request::Peer::Owner(owner) => parse("owner", owner).map(Self::Owner),
        }
    }
    fn write(self) -> Option<pb::quarantine_request::Peer> {
        Some(match self {
            Self::Device(device) => pb::quarantine_request::Peer::Device(device.into()),
            Self::Owner(owner) => pb::quarantine_request::Peer::Owner(owner.into()),
        })
    }
}
