//! Isolation groups: which functions can reach each other past the IOMMU, and so belong to one owner.
//!
//! Functions of one device, and whatever lies below one bridge, can send each other peer-to-peer transactions that never come to the root
//! complex, and can pretend to be each other. ACS (PCIe 6.0 §6.12: source validation, P2P request and completion redirect, upstream
//! forwarding; here one flag) is the promise that a function does neither. The rules are those of Linux (`pci_device_group`):
//!
//! 1. A virtual function whose physical function lacks ACS is in the group of that one.
//! 2. Everything below a bridge without ACS is in the group of the bridge; of several such bridges above each other, of the uppermost.
//! 3. Functions of one device that lack ACS are in one group. Virtual functions are no functions of the device in this sense: rule 1 is theirs.
//!
//! ```text
//!   root ── bridge 00:1c.0 (ACS) ─── bus 1 ── 01:00.0 ACS        alone
//!        │                                 ├─ 01:01.0 no ACS ┐
//!        │                                 └─ 01:01.1 no ACS ┘    one group
//!        └─ bridge 00:1d.0 (no ACS) ─ bus 2 ── 02:00.0 ACS ┐
//!                                          └─ 02:01.0 ACS  ┘      one group, with the bridge
//! ```

use std::collections::{BTreeMap, HashMap};

use iommu_types::errors::{InvalidField, UnknownDevice};
use iommu_types::{DeviceAddress, FunctionKind, Owner, PciFunction, SourceId};

use crate::topology::{DeviceEntry, Topology};

/// The buses below a bridge.
fn buses(function: &PciFunction) -> Option<(u8, u8)> {
    match function.kind {
        FunctionKind::Bridge { secondary_bus, subordinate_bus } => Some((secondary_bus, subordinate_bus)),
        FunctionKind::Endpoint | FunctionKind::VirtualFunction { .. } => None,
    }
}

type Devices = BTreeMap<DeviceAddress, DeviceEntry>;

impl Topology {
    /// The isolation group of a device, itself included, by address. Whoever has one of them can reach all.
    pub fn group_of(&self, address: DeviceAddress) -> Result<Vec<DeviceAddress>, UnknownDevice> {
        let entry = self.device(address)?;
        Ok(group_in(self.all(), entry))
    }
    /// The isolation group of every device, named after the lowest address in it.
    pub fn groups(&self) -> BTreeMap<DeviceAddress, DeviceAddress> {
        let bridges = Bridges::of(self.all());
        let mut lowest: BTreeMap<DeviceAddress, DeviceAddress> = BTreeMap::new();
        let named = |entry: &DeviceEntry| {
            let representative = representative(self.all(), &bridges, entry);
            // Devices come by address, so the first of a group is its lowest.
            (entry.address, *lowest.entry(representative).or_insert(entry.address))
        };
        self.devices().map(named).collect()
    }
    /// Another function of the isolation group of a device that somebody else than `owner` has.
    pub fn neighbour_of_another(
        &self,
        address: DeviceAddress,
        owner: Owner,
    ) -> Result<Option<(DeviceAddress, Owner)>, UnknownDevice> {
        let others = self.group_of(address)?.into_iter().filter(|member| *member != address);
        let owned = others.filter_map(|member| Some((member, self.device(member).ok()?.owner?)));
        Ok(owned.into_iter().find(|(_, other)| *other != owner))
    }
}

fn owners_of(devices: &Devices, group: &[DeviceAddress]) -> Vec<Owner> {
    let mut owners: Vec<Owner> = group.iter().filter_map(|member| devices.get(member)?.owner).collect();
    owners.sort_unstable();
    owners.dedup();
    owners
}

fn group_in(devices: &Devices, entry: &DeviceEntry) -> Vec<DeviceAddress> {
    let bridges = Bridges::of(devices);
    let mine = representative(devices, &bridges, entry);
    let is_mine = |other: &&DeviceEntry| representative(devices, &bridges, other) == mine;
    devices.values().filter(is_mine).map(|other| other.address).collect()
}

/// The function that stands for a group: equal for two functions when they share one.
fn representative(devices: &Devices, bridges: &Bridges<'_>, entry: &DeviceEntry) -> DeviceAddress {
    let mut entry = entry;
    if let FunctionKind::VirtualFunction { physical } = entry.function.kind
        && let Some(physical) = devices.get(&physical).filter(|physical| !physical.function.acs)
    {
        entry = physical;
    }
    if let Some(uppermost) = bridges.uppermost_without_acs(entry.address) {
        entry = uppermost;
    }
    if entry.function.acs || entry.function.is_virtual() {
        return entry.address;
    }
    let is_like = |other: &&DeviceEntry| !other.function.acs && !other.function.is_virtual();
    let first = slot(devices, entry.address).find(is_like);
    first.map_or(entry.address, |first| first.address)
}

/// All bridges, so that they are looked for once and not for every function.
struct Bridges<'a> {
    all: Vec<&'a DeviceEntry>,
    /// By segment and bus.
    uppermost_without_acs: HashMap<(u16, u8), &'a DeviceEntry>,
}

impl<'a> Bridges<'a> {
    fn of(devices: &'a Devices) -> Self {
        let all: Vec<_> = devices.values().filter(|entry| entry.function.is_bridge()).collect();
        let mut lacking: Vec<_> = all.iter().copied().filter(|bridge| !bridge.function.acs).collect();
        // Bridges above one bus lie inside each other, so the uppermost has the lowest bus below it.
        lacking.sort_by_key(|bridge| buses(&bridge.function));
        let mut uppermost_without_acs = HashMap::new();
        for bridge in lacking {
            let (Some((first, last)), segment) = (buses(&bridge.function), bridge.address.segment) else {
                continue;
            };
            // One that lies inside another adds nothing.
            if !uppermost_without_acs.contains_key(&(segment, first)) {
                uppermost_without_acs.extend((first..=last).map(|bus| ((segment, bus), bridge)));
            }
        }
        Self { all, uppermost_without_acs }
    }
    /// Of those on the way from a function to the root, the last that lacks ACS.
    fn uppermost_without_acs(&self, address: DeviceAddress) -> Option<&'a DeviceEntry> {
        self.uppermost_without_acs.get(&(address.segment, address.source_id.bus())).copied()
    }
    /// Those on the way from a function to the root.
    fn above(&self, address: DeviceAddress) -> impl Iterator<Item = &'a DeviceEntry> {
        let bus = address.source_id.bus();
        self.all.iter().copied().filter(move |bridge| {
            let below = buses(&bridge.function);
            bridge.address.segment == address.segment
                && below.is_some_and(|(first, last)| (first..=last).contains(&bus))
        })
    }
}

/// The functions of the device that a function is of, by address.
fn slot(devices: &Devices, address: DeviceAddress) -> impl Iterator<Item = &DeviceEntry> {
    let first = SourceId::new(address.source_id.get() & !7);
    let last = SourceId::new(address.source_id.get() | 7);
    let at = |source_id| DeviceAddress { segment: address.segment, source_id };
    devices.range(at(first)..=at(last)).map(|(_, entry)| entry)
}

fn refuse<T>(field: &str, why: String) -> Result<T, InvalidField> {
    Err(InvalidField { field: field.to_owned(), why })
}

/// Whether a function may be declared beside those that are: what it refers to is there, its buses make sense, and no two owners come
/// to share a group.
pub(crate) fn check_declared(devices: &Devices, entry: &DeviceEntry) -> Result<(), InvalidField> {
    match entry.function.kind {
        FunctionKind::Endpoint => {}
        FunctionKind::VirtualFunction { physical } => check_physical(devices, entry, physical)?,
        FunctionKind::Bridge { secondary_bus, subordinate_bus } => {
            check_buses(devices, entry.address, secondary_bus, subordinate_bus)?;
            if let Some(owner) = entry.owner {
                return refuse("owner", format!("is {owner}, and a bridge is never assigned"));
            }
        }
    }
    if let Some(going) = Bridges::of(devices).above(entry.address).find(|bridge| bridge.is_going) {
        return refuse("device", format!("lies below {}, which is being removed", going.address));
    }
    let mut with = devices.clone();
    with.insert(entry.address, entry.clone());
    let group = group_in(&with, entry);
    if let Some(other) = group.iter().find(|member| with[*member].declared_by != entry.declared_by) {
        // Whoever declares a function cannot take those of others out of their hands by it.
        return refuse(
            "function",
            format!("lacks isolation: it would share the group of {other}, which somebody else declared"),
        );
    }
    match owners_of(&with, &group)[..] {
        [one, other, ..] => {
            refuse("function", format!("lacks isolation: {one} and {other} would share its group"))
        }
        _ => Ok(()),
    }
}

fn check_physical(
    devices: &Devices,
    entry: &DeviceEntry,
    physical: DeviceAddress,
) -> Result<(), InvalidField> {
    let address = entry.address;
    let field = "function.virtual_function.physical";
    let declared = devices.get(&physical);
    let is_anothers = |one: &DeviceEntry| one.declared_by.is_some() && one.declared_by != entry.declared_by;
    match declared.map(|one| one.function.kind) {
        _ if declared.is_some_and(is_anothers) => {
            refuse(field, format!("{physical} was declared by somebody else"))
        }
        _ if declared.is_some_and(|one| one.is_going) => {
            refuse(field, format!("{physical} is being removed"))
        }
        _ if physical.segment != address.segment => {
            refuse(field, format!("{physical} is in another segment"))
        }
        None => refuse(field, format!("{physical} is not declared; declare it first")),
        Some(FunctionKind::Endpoint) => Ok(()),
        Some(_) => refuse(field, format!("{physical} is no endpoint, and only those have virtual functions")),
    }
}

fn check_buses(
    devices: &Devices,
    address: DeviceAddress,
    secondary: u8,
    subordinate: u8,
) -> Result<(), InvalidField> {
    let bus = address.source_id.bus();
    if subordinate < secondary {
        return refuse(
            "function.bridge.subordinate_bus",
            format!("is {subordinate:#x}, less than the secondary {secondary:#x}"),
        );
    }
    if secondary <= bus {
        return refuse(
            "function.bridge.secondary_bus",
            format!("is {secondary:#x}; buses below a bridge come after its own, {bus:#x}"),
        );
    }
    for other in devices.values().filter(|other| other.address.segment == address.segment) {
        let Some((first, last)) = buses(&other.function) else { continue };
        if last < secondary || subordinate < first {
            continue;
        }
        let is_inside = |bus: u8, from: u8, to: u8| (from..=to).contains(&bus);
        // One lies on a bus below the other, and all of its own buses do as well.
        let below = is_inside(bus, first, last) && first < secondary && subordinate <= last;
        let other_bus = other.address.source_id.bus();
        let above = is_inside(other_bus, secondary, subordinate) && secondary < first && last <= subordinate;
        if !below && !above {
            let other = other.address;
            return refuse(
                "function.bridge.secondary_bus",
                format!("to subordinate are buses of {other}, and neither is below the other"),
            );
        }
    }
    Ok(())
}

/// Whether a device may go: nothing that is declared refers to it.
pub(crate) fn check_removed(devices: &Devices, entry: &DeviceEntry) -> Result<(), InvalidField> {
    let refers = |other: &&DeviceEntry| match (buses(&entry.function), other.function.kind) {
        (_, FunctionKind::VirtualFunction { physical }) if physical == entry.address => true,
        (Some((first, last)), _) => {
            other.address.segment == entry.address.segment
                && (first..=last).contains(&other.address.source_id.bus())
        }
        _ => false,
    };
    match devices.values().find(refers) {
        Some(other) => refuse("device", format!("is in the way of {}; remove that first", other.address)),
        None => Ok(()),
    }
}
