//! An identity has one URI, and a URI one identity.

use iommu_types::{DeviceAddress, Identity, Owner, Role, SourceId, is_name};
use proptest::prelude::*;

fn identity(name: &str, role: Role) -> Identity {
    Identity { name: name.to_owned(), role }
}

fn address(text: &str) -> DeviceAddress {
    text.parse().expect("an address")
}

#[test]
fn uris_and_files_are_those_that_people_write() {
    let rows = [
        (
            identity("engine0", Role::Device(address("00:01.0"))),
            "device/engine0/0000-00-01.0",
            "device-0000-00-01.0.pem",
        ),
        (identity("guest3", Role::Driver(Owner::Vm(3))), "driver/guest3/vm-3", "driver-vm-3.pem"),
        (
            identity("driver0", Role::Driver(Owner::Driver(0))),
            "driver/driver0/driver-0",
            "driver-driver-0.pem",
        ),
        (identity("iommuctl", Role::Operator), "operator/iommuctl", "operator-iommuctl.pem"),
        (identity("a.b_C-1", Role::Observer), "observer/a.b_C-1", "observer-a.b_C-1.pem"),
        (identity("bare", Role::Bare), "bare/bare", "bare-bare.pem"),
        (identity("hv0", Role::Hypervisor), "hypervisor/hv0", "hypervisor-hv0.pem"),
    ];
    for (identity, path, file) in rows {
        let uri = format!("spiffe://iommu/{path}");
        assert_eq!(identity.uri().as_deref(), Ok(&*uri));
        assert_eq!(Identity::from_uri(&uri).as_ref(), Ok(&identity));
        assert_eq!(identity.credential_file().as_deref(), Ok(file));
    }
}

#[test]
fn nothing_that_only_resembles_a_uri_is_one() {
    for uri in [
        "",
        "spiffe://iommu",
        "spiffe://iommu/",
        "spiffe://iommu/operator",
        "spiffe://iommu/operator/",
        "spiffe://iommu/operator//",
        "spiffe://iommu/operator/a/",
        "spiffe://iommu/operator/a/b",
        "spiffe://iommu/operator/a?x=1",
        "spiffe://iommu/operator/a#x",
        "spiffe://iommu/operator/%61",
        "spiffe://iommu/operator/.",
        "spiffe://iommu/operator/..",
        "spiffe://iommu/operator/é",
        "spiffe://iommu/Operator/a",
        "spiffe://iommu/server/a",
        "spiffe://IOMMU/operator/a",
        "spiffe://iommu:443/operator/a",
        "spiffe://user@iommu/operator/a",
        "spiffe://elsewhere/operator/a",
        "SPIFFE://iommu/operator/a",
        "https://iommu/operator/a",
        " spiffe://iommu/operator/a",
        "spiffe://iommu/operator/a\0",
        "spiffe://iommu/device/engine0",
        "spiffe://iommu/device/engine0/00-01.0",
        "spiffe://iommu/device/engine0/0000:00:01.0",
        "spiffe://iommu/device/engine0/0000-00-01.9",
        "spiffe://iommu/device/engine0/0000-00-1A.0",
        "spiffe://iommu/device/engine0/0000-00-01.0/x",
        "spiffe://iommu/driver/driver0/driver-00",
        "spiffe://iommu/driver/driver0/driver:0",
        "spiffe://iommu/driver/driver0/guest-0",
        "spiffe://iommu/driver/driver0",
    ] {
        assert!(Identity::from_uri(uri).is_err(), "{uri:?}");
    }
    let long = format!("spiffe://iommu/operator/{}", "a".repeat(65));
    assert!(Identity::from_uri(&long).is_err());
}

#[test]
fn a_name_that_no_uri_can_carry_is_refused_where_one_is_made() {
    for name in ["", ".", "..", "a b", "a/b", "ä", &"a".repeat(65)] {
        assert!(!is_name(name), "{name:?}");
        assert!(identity(name, Role::Operator).uri().is_err(), "{name:?}");
        assert!(identity(name, Role::Operator).credential_file().is_err(), "{name:?}");
    }
}

fn roles() -> impl Strategy<Value = Role> {
    prop_oneof![
        any::<(u16, u16)>()
            .prop_map(|(segment, source)| Role::Device(DeviceAddress::new(segment, SourceId::new(source)))),
        any::<u32>().prop_map(|number| Role::Driver(Owner::Driver(number))),
        any::<u32>().prop_map(|number| Role::Driver(Owner::Vm(number))),
        Just(Role::Bare),
        Just(Role::Observer),
        Just(Role::Operator),
        Just(Role::Hypervisor),
    ]
}

proptest! {
    #[test]
    fn every_identity_reads_back(name in "[A-Za-z0-9._-]{1,64}", role in roles()) {
        prop_assume!(is_name(&name));
        let identity = Identity { name, role };
        let uri = identity.uri().expect("the name is fit");
        prop_assert_eq!(Identity::from_uri(&uri), Ok(identity));
    }

    #[test]
    fn what_reads_prints_the_same(path in "(device|driver|operator|bare)(/[a-z0-9.:-]{1,12}){0,3}") {
        let uri = format!("spiffe://iommu/{path}");
        if let Ok(identity) = Identity::from_uri(&uri) {
            prop_assert_eq!(identity.uri(), Ok(uri));
        }
    }
}
