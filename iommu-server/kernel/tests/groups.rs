//! Isolation groups, by drawings: which functions belong to one owner.

use iommu_kernel::{DeviceEntry, OwnerEntry, Topology};
use iommu_types::errors::{AssignError, DeclareError, RemoveDeviceError, RemoveOwnerError};
use iommu_types::{DeviceAddress, DomainId, FunctionKind, Owner, PciFunction};

fn at(text: &str) -> DeviceAddress {
    text.parse().expect("an address")
}

/// One line of a drawing: `01:00.0 acs`, `00:1c.0 bridge 1-3`, `01:00.1 of 01:00.0`; `acs` says that it has it.
fn function(line: &str) -> (DeviceAddress, PciFunction) {
    let mut words = line.split_whitespace().peekable();
    let address = at(words.next().expect("an address"));
    let (mut kind, mut acs) = (FunctionKind::Endpoint, false);
    while let Some(word) = words.next() {
        match word {
            "acs" => acs = true,
            "bridge" => {
                let (secondary, subordinate) =
                    words.next().and_then(|buses| buses.split_once('-')).expect("buses");
                let bus = |text: &str| text.parse().expect("a bus");
                kind =
                    FunctionKind::Bridge { secondary_bus: bus(secondary), subordinate_bus: bus(subordinate) };
            }
            "of" => kind = FunctionKind::VirtualFunction { physical: at(words.next().expect("an address")) },
            other => panic!("{other}"),
        }
    }
    (address, PciFunction { kind, acs })
}

fn entry(line: &str, owner: Option<Owner>) -> DeviceEntry {
    let (address, function) = function(line);
    DeviceEntry { function, ..DeviceEntry::new(address, line.to_owned(), owner) }
}

fn topology(drawing: &[&str]) -> Topology {
    let mut topology = Topology::new(64, 4);
    for vm in 1..=2 {
        let owner = OwnerEntry { owner: Owner::Vm(vm), name: format!("vm{vm}") };
        topology.declare_owner(owner).expect("vacant");
    }
    for line in drawing {
        topology.declare_device(entry(line, None)).unwrap_or_else(|error| panic!("{line}: {error}"));
    }
    topology
}

/// The groups of more than one function that a drawing has; every other function is alone.
fn check(drawing: &[&str], groups: &[&[&str]]) {
    let topology = topology(drawing);
    for device in topology.devices() {
        let group = topology.group_of(device.address).expect("declared");
        let mut expected = vec![device.address];
        for members in groups {
            let members: Vec<DeviceAddress> = members.iter().copied().map(at).collect();
            if members.contains(&device.address) {
                expected = members;
            }
        }
        assert_eq!(group, expected, "the group of {} in {drawing:?}", device.address);
    }
}

#[test]
fn a_group_is_what_can_reach_each_other_past_the_iommu() {
    // With ACS everywhere each function is alone.
    check(&["00:1c.0 bridge 1-1 acs", "01:00.0 acs", "01:00.1 acs", "01:01.0 acs"], &[]);
    // A device of one function has nobody to reach, with ACS or without.
    check(&["00:01.0", "00:02.0", "00:03.0 acs"], &[]);
    // Functions of one device that lack ACS are together; one that has it is not.
    check(
        &["00:01.0", "00:01.1", "00:01.2 acs", "00:01.7", "00:02.0"],
        &[&["00:01.0", "00:01.1", "00:01.7"]],
    );
    // root ─ 00:1c.0 (no ACS) ─ bus 1 ─ 01:00.0, 01:01.0: all together, with the bridge, whatever they have themselves.
    check(
        &["00:1c.0 bridge 1-1", "01:00.0 acs", "01:01.0", "00:02.0 acs"],
        &[&["00:1c.0", "01:00.0", "01:01.0"]],
    );
    // A switch: 00:1c.0 ─ 01:00.0 ─ 02:00.0 ─ 03:00.0
    //                             └ 02:01.0 ─ 04:00.0
    let switch = |root: &str, upstream: &str, left: &str, right: &str| {
        let bridge = |address: &str, buses: &str, acs: &str| format!("{address} bridge {buses} {acs}");
        vec![
            bridge("00:1c.0", "1-4", root),
            bridge("01:00.0", "2-4", upstream),
            bridge("02:00.0", "3-3", left),
            bridge("02:01.0", "4-4", right),
            "03:00.0 acs".to_owned(),
            "04:00.0 acs".to_owned(),
        ]
    };
    let check_switch = |acs: [&str; 4], groups: &[&[&str]]| {
        let drawing = switch(acs[0], acs[1], acs[2], acs[3]);
        check(&drawing.iter().map(String::as_str).collect::<Vec<_>>(), groups);
    };
    let everything: &[&str] = &["00:1c.0", "01:00.0", "02:00.0", "02:01.0", "03:00.0", "04:00.0"];
    check_switch(["acs", "acs", "acs", "acs"], &[]);
    check_switch(["", "acs", "acs", "acs"], &[everything]);
    check_switch(["acs", "", "acs", "acs"], &[&everything[1..]]);
    check_switch(["acs", "acs", "", "acs"], &[&["02:00.0", "03:00.0"]]);
    check_switch(["acs", "acs", "", ""], &[&["02:00.0", "03:00.0"], &["02:01.0", "04:00.0"]]);
    check_switch(["acs", "", "", ""], &[&everything[1..]]);
    // Two root ports of one device without ACS: what is below either reaches what is below the other.
    check(
        &[
            "00:1c.0 bridge 1-1",
            "00:1c.1 bridge 2-2",
            "00:1c.2 bridge 3-3 acs",
            "01:00.0 acs",
            "02:00.0 acs",
            "03:00.0",
        ],
        &[&["00:1c.0", "00:1c.1", "01:00.0", "02:00.0"]],
    );
    // Virtual functions follow the physical one when it lacks ACS, and are alone otherwise.
    check(
        &[
            "01:00.0 acs",
            "01:00.1 of 01:00.0",
            "01:10.0 of 01:00.0",
            "02:00.0",
            "02:00.1 of 02:00.0",
            "02:10.0 of 02:00.0",
        ],
        &[&["02:00.0", "02:00.1", "02:10.0"]],
    );
    // Bus 2 holds virtual functions of a device on bus 1; the bridge above both lacks ACS.
    check(
        &["00:1c.0 bridge 1-2", "01:00.0 acs", "02:10.0 of 01:00.0", "03:00.0 acs"],
        &[&["00:1c.0", "01:00.0", "02:10.0"]],
    );
    // The same addresses in another segment have nothing to do with it.
    check(&["00:1c.0 bridge 1-1", "01:00.0", "0001:01:00.0", "0001:00:1c.0"], &[&["00:1c.0", "01:00.0"]]);
}

#[test]
fn a_declaration_that_makes_no_sense_is_refused_by_field() {
    let drawing = ["00:1c.0 bridge 4-9 acs", "04:00.0 bridge 5-7 acs", "00:01.0 acs", "00:01.1 of 00:01.0"];
    for (line, owner, field) in [
        ("00:02.0 bridge 9-8", None, "subordinate"),
        ("05:00.0 bridge 5-5", None, "secondary"),
        ("20:00.0 bridge 3-3", None, "secondary"),
        // Overlapping the first, below neither.
        ("00:02.0 bridge 8-12", None, "secondary"),
        ("00:02.0 bridge 2-4", None, "secondary"),
        // Inside the buses of the first, and not on one of them.
        ("00:02.0 bridge 8-9", None, "secondary"),
        // Around the second, which is not on one of its buses.
        ("03:00.0 bridge 5-8", None, "secondary"),
        ("04:01.0 bridge 7-8", None, "secondary"),
        ("00:02.0 bridge 12-13 acs", Some(Owner::Vm(1)), "owner"),
        ("00:03.0 of 00:04.0", None, "physical"),
        ("00:03.0 of 00:1c.0", None, "physical"),
        ("00:03.0 of 00:01.1", None, "physical"),
        ("0001:00:03.0 of 00:01.0", None, "physical"),
    ] {
        let mut topology = topology(&drawing);
        let error = topology.declare_device(entry(line, owner)).expect_err(line);
        let DeclareError::InvalidField(invalid) = &error else { panic!("{line}: {error}") };
        assert!(invalid.field.contains(field), "{line}: {error}");
        assert!(topology.device(at(line.split(' ').next().unwrap_or_default())).is_err(), "{line}");
    }
    topology(&drawing).declare_device(entry("04:01.0 bridge 8-9", None)).expect("beside the second");
}

#[test]
fn no_declaration_brings_two_owners_into_one_group() {
    let mut topology = topology(&["00:01.0", "01:00.0 acs", "01:01.0 acs"]);
    topology.set_owner(at("00:01.0"), Some(Owner::Vm(1))).expect("vacant");
    topology.set_owner(at("01:00.0"), Some(Owner::Vm(1))).expect("vacant");
    topology.set_owner(at("01:01.0"), Some(Owner::Vm(2))).expect("vacant");
    for line in ["00:01.1", "00:1c.0 bridge 1-1"] {
        let owner = (!line.contains("bridge")).then_some(Owner::Vm(2));
        let error = topology.declare_device(entry(line, owner)).expect_err(line);
        assert!(
            matches!(&error, DeclareError::InvalidField(invalid) if invalid.field == "function"),
            "{error}"
        );
    }
    topology.declare_device(entry("00:01.1", Some(Owner::Vm(1)))).expect("the same owner");
    topology.declare_device(entry("00:1c.0 bridge 1-1 acs", None)).expect("it keeps them apart");
    let neighbour = topology.neighbour_of_another(at("00:01.1"), Owner::Vm(2)).expect("declared");
    assert_eq!(neighbour.map(|(_, owner)| owner), Some(Owner::Vm(1)));
}

#[test]
fn a_device_changes_hands_when_it_is_detached_and_an_owner_goes_without_devices() {
    let mut topology = topology(&["00:1c.0 bridge 1-1 acs", "01:00.0 acs", "01:00.1 of 01:00.0"]);
    let (vm, device) = (Owner::Vm(1), at("01:00.0"));
    topology.set_owner(device, Some(vm)).expect("vacant");
    assert_eq!(topology.devices_of(vm), [device]);
    assert!(matches!(topology.set_owner(device, Some(Owner::Vm(9))), Err(AssignError::UnknownOwner(_))));
    assert!(matches!(topology.set_owner(at("05:00.0"), None), Err(AssignError::UnknownDevice(_))));
    assert!(matches!(topology.set_owner(at("00:1c.0"), Some(vm)), Err(AssignError::InvalidField(_))));
    topology.set_attached(device, vm, DomainId::new(3)).expect("declared");
    assert!(matches!(topology.set_owner(device, None), Err(AssignError::DomainInUse(_))));
    topology.set_detached(device).expect("attached");
    assert!(matches!(topology.remove_owner(vm), Err(RemoveOwnerError::OwnerInUse(_))));
    topology.set_owner(device, None).expect("detached");
    assert_eq!(topology.remove_owner(vm).map(|entry| entry.owner), Ok(vm));
    assert!(matches!(topology.remove_owner(vm), Err(RemoveOwnerError::UnknownOwner(_))));
    for in_the_way in ["01:00.0", "00:1c.0"] {
        let refused = topology.remove_device(at(in_the_way));
        assert!(matches!(refused, Err(RemoveDeviceError::InvalidField(_))), "{in_the_way}: {refused:?}");
    }
    for last_first in ["01:00.1", "01:00.0", "00:1c.0"] {
        topology.remove_device(at(last_first)).expect("nothing refers to it");
    }
}
