//! Who may call what: **the one table** of methods and roles.
//!
//! A method of the schema without a row fails a test, a row without a method too, and a path without a row is refused.

use std::collections::HashMap;
use std::sync::OnceLock;

use iommu_types::Role;

/// A set of roles, a bit each.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Roles(u8);

const DRIVER: Roles = Roles(1);
const BARE: Roles = Roles(1 << 1);
const OBSERVER: Roles = Roles(1 << 2);
const OPERATOR: Roles = Roles(1 << 3);
const HYPERVISOR: Roles = Roles(1 << 4);
/// With the words in which they are named to those who are refused.
const EACH: [(Roles, &str); 5] = [
    (DRIVER, "driver"),
    (BARE, "bare"),
    (OBSERVER, "observer"),
    (OPERATOR, "operator"),
    (HYPERVISOR, "hypervisor"),
];

impl Roles {
    const fn and(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }
    const fn has(self, role: Self) -> bool {
        self.0 & role.0 != 0
    }
    /// Whether a role is one of them.
    pub fn admit(self, role: Role) -> bool {
        match role {
            Role::Device(_) => false,
            Role::Driver(_) => self.has(DRIVER),
            Role::Bare => self.has(BARE),
            Role::Observer => self.has(OBSERVER),
            Role::Operator => self.has(OPERATOR),
            Role::Hypervisor => self.has(HYPERVISOR),
        }
    }
    /// Such as "the driver or operator role".
    pub fn words(self) -> String {
        let names: Vec<&str> =
            EACH.iter().filter(|(role, _)| self.has(*role)).map(|(_, name)| *name).collect();
        match names.split_last() {
            None => "no role".to_owned(),
            Some((last, [])) => format!("the {last} role"),
            Some((last, rest)) => format!("the {} or {last} role", rest.join(", ")),
        }
    }
}

/// Those who act for an owner, and those who own or steer owners.
const MEMORY: Roles = DRIVER.and(OPERATOR).and(HYPERVISOR);
const LOOK: Roles = MEMORY.and(OBSERVER);
const LOOK_AT_UNIT: Roles = LOOK.and(BARE);
/// The unit's counters are those of all tenants together, so neither a driver nor a hypervisor sees them (I7).
const COUNT: Roles = BARE.and(OBSERVER).and(OPERATOR);

/// What a method needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Needs {
    /// Nothing but a connection: health and reflection.
    Nothing,
    /// A peer that is not a device: it opens its session with it.
    Client,
    /// A device: its stream begins with Hello.
    Device,
    /// A session with one of these roles.
    Session(Roles),
}
use Needs::{Client, Device, Nothing, Session};

/// **The** table: every method there is, and what it needs. A method that is not here is refused, and a test compares the list with the schema.
const TABLE: &[(&str, &[(&str, Needs)])] = &[
    ("iommu.v1.SessionService", &[("Open", Client)]),
    ("iommu.v1.DeviceService", &[("Attach", Device)]),
    (
        "iommu.v1.DriverService",
        &[
            ("AllocateBuffer", Session(DRIVER)),
            ("FreeBuffer", Session(DRIVER)),
            ("DmaMap", Session(DRIVER)),
            ("DmaUnmap", Session(DRIVER)),
            ("DmaStream", Session(DRIVER)),
            ("DmaMapSg", Session(DRIVER)),
            ("DmaUnmapSg", Session(DRIVER)),
            ("DmaSync", Session(DRIVER)),
            ("SetDmaLimits", Session(DRIVER)),
            ("AllocateCoherent", Session(DRIVER)),
            ("FreeCoherent", Session(DRIVER)),
            ("CreateDomain", Session(DRIVER)),
            ("DestroyDomain", Session(DRIVER)),
            ("AttachDevice", Session(DRIVER)),
            ("DetachDevice", Session(DRIVER)),
            ("Map", Session(DRIVER)),
            ("Unmap", Session(DRIVER)),
            ("AllocateInterrupt", Session(DRIVER)),
            ("WatchInterrupts", Session(DRIVER)),
            ("MmioRead", Session(DRIVER)),
            ("MmioWrite", Session(DRIVER)),
            ("ListMemory", Session(DRIVER)),
            ("Hypercall", Session(DRIVER)),
        ],
    ),
    (
        "iommu.v1.HypervisorService",
        &[
            ("CreateVm", Session(HYPERVISOR)),
            ("DestroyVm", Session(HYPERVISOR)),
            ("ListVms", Session(HYPERVISOR)),
            ("AddMemory", Session(HYPERVISOR)),
            ("RemoveMemory", Session(HYPERVISOR)),
            ("MoveMemory", Session(HYPERVISOR)),
            ("DeclareFunction", Session(HYPERVISOR)),
            ("RemoveFunction", Session(HYPERVISOR)),
            ("ListFunctions", Session(HYPERVISOR)),
            ("AssignGroup", Session(HYPERVISOR)),
            ("ReleaseGroup", Session(HYPERVISOR)),
            ("ServeHypercalls", Session(HYPERVISOR)),
        ],
    ),
    (
        "iommu.v1.BareMachineService",
        &[
            ("Create", Session(BARE)),
            ("Destroy", Session(BARE)),
            ("List", Session(BARE)),
            ("ReadRegister", Session(BARE)),
            ("WriteRegister", Session(BARE)),
            ("ReadMemory", Session(BARE)),
            ("WriteMemory", Session(BARE)),
            ("WatchInterrupts", Session(BARE)),
            ("MmioRead", Session(BARE)),
            ("MmioWrite", Session(BARE)),
        ],
    ),
    (
        "iommu.v1.MemoryService",
        &[
            ("Read", Session(MEMORY)),
            ("Write", Session(MEMORY)),
            ("ReadBulk", Session(MEMORY)),
            ("WriteBulk", Session(MEMORY)),
        ],
    ),
    ("iommu.v1.FaultService", &[("List", Session(LOOK)), ("Watch", Session(LOOK))]),
    ("iommu.v1.SanitizerService", &[("ListReports", Session(LOOK)), ("Watch", Session(LOOK))]),
    (
        "iommu.v1.InspectService",
        &[
            ("GetTopology", Session(LOOK)),
            ("ListDomains", Session(LOOK)),
            ("ListMappings", Session(LOOK)),
            ("DumpTables", Session(LOOK_AT_UNIT)),
            ("DumpIotlb", Session(LOOK)),
            ("GetCounters", Session(COUNT)),
            ("ListLimits", Session(LOOK)),
            ("Explain", Session(LOOK_AT_UNIT)),
        ],
    ),
    (
        "iommu.v1.AdminService",
        &[
            ("DeclareDevice", Session(OPERATOR)),
            ("RemoveDevice", Session(OPERATOR)),
            ("DeclareDriver", Session(OPERATOR)),
            ("AttachToOwner", Session(OPERATOR)),
            ("Detach", Session(OPERATOR)),
            ("Quarantine", Session(OPERATOR)),
            ("MmioRead", Session(OPERATOR)),
            ("MmioWrite", Session(OPERATOR)),
        ],
    ),
    ("grpc.health.v1.Health", &[("Check", Nothing), ("Watch", Nothing)]),
    ("grpc.reflection.v1.ServerReflection", &[("ServerReflectionInfo", Nothing)]),
    ("grpc.reflection.v1alpha.ServerReflection", &[("ServerReflectionInfo", Nothing)]),
];

/// What a method needs, by its path.
pub fn needs(path: &str) -> Option<Needs> {
    static BY_PATH: OnceLock<HashMap<String, Needs>> = OnceLock::new();
    let by_path = BY_PATH.get_or_init(|| {
        let rows = TABLE.iter().flat_map(|(service, methods)| {
            methods.iter().map(move |(method, needs)| (format!("/{service}/{method}"), *needs))
        });
        rows.collect()
    });
    by_path.get(path).copied()
}

/// Every row of the table: service, method, and what it needs.
pub fn rows() -> impl Iterator<Item = (&'static str, &'static str, Needs)> {
    TABLE
        .iter()
        .flat_map(|(service, methods)| methods.iter().map(|(method, needs)| (*service, *method, *needs)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_method_of_the_schema_has_exactly_one_row() {
        let mut rows: Vec<(&str, &str)> = rows()
            .map(|(service, method, _)| (service, method))
            .filter(|(service, _)| !service.starts_with("grpc.reflection."))
            .collect();
        let mut methods: Vec<(&str, &str)> = crate::server::methods()
            .iter()
            .map(|(service, method)| (service.as_str(), method.as_str()))
            .collect();
        rows.sort_unstable();
        methods.sort_unstable();
        assert_eq!(rows, methods);
    }

    #[test]
    fn a_path_outside_the_table_needs_what_nobody_has() {
        for path in [
            "/iommu.v1.DriverService/",
            "/iommu.v1.DriverService/Anything",
            "/iommu.v2.DriverService/Map",
            "/",
            "",
        ] {
            assert_eq!(needs(path), None, "{path:?}");
        }
    }

    #[test]
    fn only_operators_administer_and_observers_touch_nothing() {
        for (service, method, needs) in rows() {
            let Session(roles) = needs else { continue };
            let looks = ["Inspect", "Fault", "Sanitizer"].iter().any(|about| service.contains(about));
            assert_eq!(roles.admit(Role::Observer), looks, "{service}/{method}");
            assert_eq!(service.contains("Admin"), roles == OPERATOR, "{service}/{method}");
            assert_eq!(service.contains("Hypervisor"), roles == HYPERVISOR, "{service}/{method}");
        }
    }

    #[test]
    fn refusals_name_the_roles() {
        assert_eq!(DRIVER.words(), "the driver role");
        assert_eq!(MEMORY.words(), "the driver, operator or hypervisor role");
    }
}
