//! Devices, owners, assignments. Plain data: no hardware is touched here; the service calls `Kernel::attach` and
//! `Kernel::detach` around it.

use std::collections::BTreeMap;

use iommu_types::errors::{
    AssignError, DeclareError, DetachError, DeviceExists, DomainInUse, InvalidField, LimitReached,
    NotAttached, OwnerInUse, RemoveDeviceError, RemoveOwnerError, UnknownDevice, UnknownOwner,
};
use iommu_types::{DeviceAddress, DomainId, Owner, PciFunction};

use crate::groups::{check_declared, check_removed};

/// A declared device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceEntry {
    /// Where it is.
    pub address: DeviceAddress,
    /// What people call it.
    pub name: String,
    /// What it is, and how well it is kept apart.
    pub function: PciFunction,
    /// Who it is assigned to.
    pub owner: Option<Owner>,
    /// The domain it translates through, when it is attached.
    pub domain_id: Option<DomainId>,
    /// The hypervisor that declared it, by name; `None` when the configuration or an operator did.
    pub declared_by: Option<String>,
    /// Set while it is being removed: nothing that is declared may refer to it any more.
    pub is_going: bool,
}

impl DeviceEntry {
    /// An ordinary function with ACS, attached to nothing.
    pub fn new(address: DeviceAddress, name: String, owner: Option<Owner>) -> Self {
        Self {
            address,
            name,
            function: PciFunction::ISOLATED,
            owner,
            domain_id: None,
            declared_by: None,
            is_going: false,
        }
    }
}

/// A declared owner.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OwnerEntry {
    /// Who.
    pub owner: Owner,
    /// What people call it.
    pub name: String,
}

/// What is declared, and what is attached where.
#[derive(Debug)]
pub struct Topology {
    devices: BTreeMap<DeviceAddress, DeviceEntry>,
    owners: BTreeMap<Owner, OwnerEntry>,
    devices_max: u32,
    owners_max: u32,
}

impl Topology {
    /// Nothing is declared.
    pub fn new(devices_max: u32, owners_max: u32) -> Self {
        Self { devices: BTreeMap::new(), owners: BTreeMap::new(), devices_max, owners_max }
    }
    /// Declares an owner. Neither number nor name may be taken.
    pub fn declare_owner(&mut self, entry: OwnerEntry) -> Result<(), DeclareError> {
        let taken = |field: &str, what: String| {
            Err(InvalidField { field: field.to_owned(), why: format!("{what} is declared already") }.into())
        };
        if self.owners.contains_key(&entry.owner) {
            return taken("owner", entry.owner.to_string());
        }
        if self.owner_by_name(&entry.name).is_some() {
            return taken("name", format!("{:?}", entry.name));
        }
        check_room("owners", self.owners.len(), self.owners_max)?;
        self.owners.insert(entry.owner, entry);
        Ok(())
    }
    /// Removes an owner that has no devices.
    pub fn remove_owner(&mut self, owner: Owner) -> Result<OwnerEntry, RemoveOwnerError> {
        self.owner(owner)?;
        if let Some(device) = self.devices.values().find(|entry| entry.owner == Some(owner)) {
            return Err(OwnerInUse { owner, device: device.address }.into());
        }
        Ok(self.owners.remove(&owner).expect("it was just found"))
    }
    /// Assigns a device that is attached to nothing to an owner, or to nobody. Whether its [group](Self::group_of) allows it is the caller's to
    /// ask: a group changes hands one by one.
    pub fn set_owner(&mut self, address: DeviceAddress, owner: Option<Owner>) -> Result<(), AssignError> {
        if let Some(owner) = owner {
            self.owner(owner)?;
        }
        let entry = self.devices.get_mut(&address).ok_or(UnknownDevice { device: address })?;
        if entry.function.is_bridge() && owner.is_some() {
            let why = "is a bridge, and a bridge is never assigned".to_owned();
            return Err(InvalidField { field: "device".to_owned(), why }.into());
        }
        if let Some(domain_id) = entry.domain_id {
            return Err(DomainInUse { domain_id, device: address }.into());
        }
        entry.owner = owner;
        Ok(())
    }
    pub(crate) fn all(&self) -> &BTreeMap<DeviceAddress, DeviceEntry> {
        &self.devices
    }
    /// Declares a device. Its owner, when it has one, must be declared, and what it is must fit what is there; it is attached to nothing yet.
    pub fn declare_device(&mut self, entry: DeviceEntry) -> Result<(), DeclareError> {
        assert!(entry.domain_id.is_none(), "a device is declared first and attached then");
        if self.devices.contains_key(&entry.address) {
            return Err(DeviceExists { device: entry.address }.into());
        }
        if let Some(owner) = entry.owner {
            self.owner(owner)?;
        }
        check_declared(&self.devices, &entry)?;
        check_room("devices", self.devices.len(), self.devices_max)?;
        self.devices.insert(entry.address, entry);
        Ok(())
    }
    /// Whether a device may go: no virtual function is one of its, and nothing lies below it. To be asked before it is detached.
    pub fn check_removable(&self, address: DeviceAddress) -> Result<(), RemoveDeviceError> {
        Ok(check_removed(&self.devices, self.device(address)?)?)
    }
    /// Says that a device is being removed, if it may go: what is declared from now on does not refer to it.
    pub fn begin_removal(&mut self, address: DeviceAddress) -> Result<(), RemoveDeviceError> {
        self.check_removable(address)?;
        self.devices.get_mut(&address).expect("it was just found").is_going = true;
        Ok(())
    }
    /// Removes a device that no other refers to. It must be detached.
    pub fn remove_device(&mut self, address: DeviceAddress) -> Result<DeviceEntry, RemoveDeviceError> {
        self.check_removable(address)?;
        let is_attached = self.device(address)?.domain_id.is_some();
        assert!(!is_attached, "a device is detached before it is removed");
        Ok(self.devices.remove(&address).expect("it was just found"))
    }
    /// The device at an address.
    pub fn device(&self, address: DeviceAddress) -> Result<&DeviceEntry, UnknownDevice> {
        self.devices.get(&address).ok_or(UnknownDevice { device: address })
    }
    /// A declared owner.
    pub fn owner(&self, owner: Owner) -> Result<&OwnerEntry, UnknownOwner> {
        self.owners.get(&owner).ok_or(UnknownOwner { owner })
    }
    /// The owner of that name.
    pub fn owner_by_name(&self, name: &str) -> Option<&OwnerEntry> {
        self.owners.values().find(|entry| entry.name == name)
    }
    /// Every device, by address.
    pub fn devices(&self) -> impl Iterator<Item = &DeviceEntry> {
        self.devices.values()
    }
    /// Every owner.
    pub fn owners(&self) -> impl Iterator<Item = &OwnerEntry> {
        self.owners.values()
    }
    /// The devices that are assigned to an owner.
    pub fn devices_of(&self, owner: Owner) -> Vec<DeviceAddress> {
        self.addresses(|entry| entry.owner == Some(owner))
    }
    /// The devices that are attached to a domain.
    pub fn attached_to(&self, domain: DomainId) -> Vec<DeviceAddress> {
        self.addresses(|entry| entry.domain_id == Some(domain))
    }
    fn addresses(&self, is_meant: impl Fn(&DeviceEntry) -> bool) -> Vec<DeviceAddress> {
        self.devices.values().filter(|entry| is_meant(entry)).map(|entry| entry.address).collect()
    }
    /// Notes that a device is attached to a domain of `owner`, who it is now assigned to. It must be attached to nothing (I5).
    pub fn set_attached(
        &mut self,
        address: DeviceAddress,
        owner: Owner,
        domain: DomainId,
    ) -> Result<(), UnknownDevice> {
        let entry = self.devices.get_mut(&address).ok_or(UnknownDevice { device: address })?;
        assert!(entry.domain_id.is_none(), "I5: {address} is detached before it is attached again");
        assert!(!entry.function.is_bridge(), "{address} is a bridge, and a bridge is never assigned");
        entry.owner = Some(owner);
        entry.domain_id = Some(domain);
        Ok(())
    }
    /// Notes that a device is attached to nothing; returns where it was. It stays assigned to its owner.
    pub fn set_detached(&mut self, address: DeviceAddress) -> Result<DomainId, DetachError> {
        let entry = self.devices.get_mut(&address).ok_or(UnknownDevice { device: address })?;
        Ok(entry.domain_id.take().ok_or(NotAttached { device: address })?)
    }
}

fn check_room(limit: &str, used: usize, allowed: u32) -> Result<(), LimitReached> {
    if used < allowed as usize {
        return Ok(());
    }
    Err(LimitReached { limit: limit.to_owned(), allowed: allowed.into() })
}
