//! Every granularity of invalidation against every cache; and what is served while nothing is invalidated.

mod machine;

use iommu_hardware::vtd::spec::registers::{Ccmd, Iotlb, Iva, offset};
use iommu_types::{
    Capabilities, DomainId, FaultReason, FunctionMask, Invalidation, Iova, IovaRange, SourceId,
};
use machine::{DEVICE, DOMAIN, Machine, RW, Table};

const SIBLING: SourceId = SourceId::new(0x0314); // bit 2 of DEVICE's function differs
const OTHER_DEVICE: SourceId = SourceId::new(0x0408);
const OTHER_DOMAIN: DomainId = DomainId::new(9);
const NEAR: u64 = 0x5000;
const FAR: u64 = 0x4000_0000;
/// What the frames hold before and after the tables change.
const OLD: u8 = 1;
const NEW: u8 = 2;

/// Two devices in one domain and one in another, two pages each; everything is cached.
struct Scene {
    machine: Machine,
    table: Table,
    other: Table,
}

impl Scene {
    fn cached() -> Self {
        let (machine, table) = Machine::with_domain(Capabilities::FULL);
        let other = machine.table(4);
        machine.attach(SIBLING, DOMAIN, table);
        machine.attach(OTHER_DEVICE, OTHER_DOMAIN, other);
        for table in [table, other] {
            for page in [NEAR, FAR] {
                let hpa = machine.map_new(table, page, RW);
                machine.fill(hpa, OLD);
            }
        }
        let scene = Self { machine, table, other };
        for source in [DEVICE, SIBLING, OTHER_DEVICE] {
            for page in [NEAR, FAR] {
                assert_eq!(scene.machine.read_byte_of(source, page), Ok(OLD));
            }
        }
        scene
    }
    /// Every page leads to a new frame, by new leaf entries.
    fn change_leaves(&self) {
        for table in [self.table, self.other] {
            for page in [NEAR, FAR] {
                let hpa = self.machine.map_new(table, page, RW);
                self.machine.fill(hpa, NEW);
            }
        }
    }
    /// The level-1 tables are replaced: only the entries above them change.
    fn change_upper_tables(&self) {
        for table in [self.table, self.other] {
            for page in [NEAR, FAR] {
                let at = self.machine.entry_at(table, page, 2);
                self.machine.store(at, 0);
                let hpa = self.machine.map_new(table, page, RW);
                self.machine.fill(hpa, NEW);
            }
        }
    }
    /// Every context entry leads to a new table, with a new domain ID so that no translation of the old is found.
    fn change_contexts(&self) {
        let table = self.machine.table(4);
        for page in [NEAR, FAR] {
            let hpa = self.machine.map_new(table, page, RW);
            self.machine.fill(hpa, NEW);
        }
        for source in [DEVICE, SIBLING, OTHER_DEVICE] {
            self.machine.attach(source, DomainId::new(30), table);
        }
    }
    /// What DEVICE near, DEVICE far, the sibling near and the other device near read.
    fn seen(&self) -> [u8; 4] {
        [(DEVICE, NEAR), (DEVICE, FAR), (SIBLING, NEAR), (OTHER_DEVICE, NEAR)]
            .map(|(source, page)| self.machine.read_byte_of(source, page).expect("mapped"))
    }
}

fn pages(domain: DomainId, base: u64, size_bytes: u64, leaf_only: bool) -> Invalidation {
    let range = IovaRange::new(Iova::new(base), size_bytes).expect("a range");
    Invalidation::IotlbPages { domain_id: domain, range, leaf_only }
}

fn device(source_id: SourceId, function_mask: FunctionMask) -> Invalidation {
    Invalidation::ContextDevice { domain_id: DOMAIN, source_id, function_mask }
}

fn check(change: fn(&Scene), invalidations: &[Invalidation], seen: [u8; 4]) {
    let scene = Scene::cached();
    change(&scene);
    assert_eq!(scene.seen(), [OLD; 4], "what is not invalidated is served for ever");
    for invalidation in invalidations {
        scene.machine.invalidate(*invalidation);
    }
    assert_eq!(scene.seen(), seen, "after {invalidations:?}");
}

#[test]
fn the_iotlb_forgets_exactly_the_granule_when_leaves_changed() {
    for leaf_only in [false, true] {
        check(Scene::change_leaves, &[pages(DOMAIN, NEAR, 4096, leaf_only)], [NEW, OLD, NEW, OLD]);
        check(Scene::change_leaves, &[pages(DOMAIN, FAR, 1 << 30, leaf_only)], [OLD, NEW, OLD, OLD]);
        check(Scene::change_leaves, &[pages(OTHER_DOMAIN, NEAR, 4096, leaf_only)], [OLD, OLD, OLD, NEW]);
    }
    check(Scene::change_leaves, &[Invalidation::IotlbDomain(DOMAIN)], [NEW, NEW, NEW, OLD]);
    check(Scene::change_leaves, &[Invalidation::IotlbGlobal], [NEW; 4]);
}

#[test]
fn a_context_invalidation_never_flushes_the_iotlb() {
    let contexts = [
        Invalidation::ContextGlobal,
        Invalidation::ContextDomain(DOMAIN),
        device(DEVICE, FunctionMask::IgnoreAll),
        Invalidation::InterruptGlobal,
    ];
    check(Scene::change_leaves, &contexts, [OLD; 4]);
}

#[test]
fn the_paging_structure_cache_survives_an_invalidation_of_leaves_only() {
    // IH=1: the walk begins at the old level-1 table, which still leads to the old frame.
    check(Scene::change_upper_tables, &[pages(DOMAIN, NEAR, 4096, true)], [OLD; 4]);
    check(Scene::change_upper_tables, &[pages(DOMAIN, NEAR, 4096, false)], [NEW, OLD, NEW, OLD]);
    check(Scene::change_upper_tables, &[Invalidation::IotlbDomain(DOMAIN)], [NEW, NEW, NEW, OLD]);
    check(Scene::change_upper_tables, &[Invalidation::IotlbGlobal], [NEW; 4]);
}

#[test]
fn the_context_cache_forgets_exactly_the_granule() {
    check(Scene::change_contexts, &[Invalidation::IotlbGlobal], [OLD; 4]);
    check(Scene::change_contexts, &[device(DEVICE, FunctionMask::Exact)], [NEW, NEW, OLD, OLD]);
    check(Scene::change_contexts, &[device(DEVICE, FunctionMask::IgnoreBit2)], [NEW, NEW, NEW, OLD]);
    check(Scene::change_contexts, &[device(OTHER_DEVICE, FunctionMask::IgnoreAll)], [OLD, OLD, OLD, NEW]);
    check(Scene::change_contexts, &[Invalidation::ContextDomain(DOMAIN)], [NEW, NEW, NEW, OLD]);
    check(Scene::change_contexts, &[Invalidation::ContextDomain(OTHER_DOMAIN)], [OLD, OLD, OLD, NEW]);
    check(Scene::change_contexts, &[Invalidation::ContextGlobal], [NEW; 4]);
}

#[test]
fn i2_a_changed_entry_without_invalidation_still_leads_to_the_old_frame() {
    let (machine, table) = Machine::with_domain(Capabilities::FULL);
    let old = machine.map_new(table, NEAR, RW);
    machine.fill(old, OLD);
    assert_eq!(machine.read_byte(NEAR), Ok(OLD));
    let new = machine.map_new(table, NEAR, RW);
    machine.fill(new, NEW);
    assert_eq!(machine.read_byte(NEAR), Ok(OLD), "the IOTLB is real");
    machine.invalidate(pages(DOMAIN, NEAR, 4096, true));
    assert_eq!(machine.read_byte(NEAR), Ok(NEW));
    // Unmapped without invalidation: still served. Invalidated: refused.
    machine.unmap(table, NEAR);
    assert_eq!(machine.read_byte(NEAR), Ok(NEW));
    machine.invalidate(pages(DOMAIN, NEAR, 4096, true));
    assert!(machine.read_byte(NEAR).is_err());
}

#[test]
fn i3_what_is_not_present_is_never_cached() {
    let (machine, table) = Machine::with_domain(Capabilities::FULL);
    assert!(machine.read_byte(NEAR).is_err());
    machine.map_new(table, NEAR, RW);
    assert!(machine.read_byte(NEAR).is_ok(), "present without an invalidation");
    // A device that was absent.
    assert!(machine.read_byte_of(OTHER_DEVICE, NEAR).is_err());
    machine.attach(OTHER_DEVICE, DOMAIN, table);
    assert!(machine.read_byte_of(OTHER_DEVICE, NEAR).is_ok());
}

#[test]
fn with_caching_mode_an_absent_page_stays_absent_until_it_is_invalidated() {
    use iommu_types::{FaultReason, Permissions};
    let (machine, table) = Machine::with_domain(Capabilities { caching_mode: true, ..Capabilities::FULL });
    let hpa = machine.map_new(table, FAR, Permissions::READ);
    let write_denied = machine.write_bytes(FAR, &[1]).expect_err("read-only");
    assert_eq!(write_denied.reason, Ok(FaultReason::WRITE_DENIED));
    // A page that allows something is not absent.
    machine.map(table, FAR, hpa, RW);
    assert!(machine.write_bytes(FAR, &[1]).is_ok());
    assert!(machine.read_byte(NEAR).is_err());
    machine.map_new(table, NEAR, RW);
    let absent = machine.read_byte(NEAR).expect_err("cached as absent");
    assert_eq!(absent.reason, Ok(FaultReason::READ_DENIED));
    assert_eq!(
        machine.write_bytes(NEAR, &[1]).map_err(|fault| fault.reason),
        Err(Ok(FaultReason::WRITE_DENIED))
    );
    let explanation =
        machine.bare.unit().explain(DEVICE, None, Iova::new(NEAR), iommu_types::Access::Read, 1);
    assert!(explanation.conclusion.contains("a stale cached entry refuses it"), "{}", explanation.conclusion);
    machine.invalidate(pages(DOMAIN, NEAR, 4096, true));
    assert!(machine.read_byte(NEAR).is_ok());
}

#[test]
fn a_permission_fault_always_comes_from_the_tables() {
    use iommu_types::Permissions;
    let (machine, table) = Machine::with_domain(Capabilities::FULL);
    let hpa = machine.map_new(table, NEAR, Permissions::READ);
    assert!(machine.read_byte(NEAR).is_ok());
    assert!(machine.write_bytes(NEAR, &[1]).is_err());
    // Loosened without an invalidation: the insufficient hit walks again and finds it.
    machine.map(table, NEAR, hpa, RW);
    assert!(machine.write_bytes(NEAR, &[1]).is_ok());
    // Loosened above: the cached table says read-only, but the fault would have to come from the tables.
    machine.invalidate(Invalidation::IotlbGlobal);
    let upper = machine.entry_at(table, NEAR, 2);
    let both = machine.load(upper);
    machine.store(upper, both & !2);
    assert!(machine.read_byte(NEAR).is_ok());
    assert!(machine.write_bytes(NEAR, &[1]).is_err());
    machine.store(upper, both);
    assert!(machine.write_bytes(NEAR, &[1]).is_ok());
}

/// A context command of a granularity, and what CAIG says.
fn context_command(machine: &Machine, command: Ccmd) -> u8 {
    machine.write_wide(offset::CCMD, command.with_invalidate(true).into_bits());
    machine.settle();
    let command = Ccmd::from_bits(machine.read_wide(offset::CCMD));
    assert!(!command.invalidate(), "ICC falls");
    command.actual_granularity()
}

/// An IOTLB command, and what IAIG says.
fn iotlb_command(machine: &Machine, address: Iva, command: Iotlb) -> u8 {
    machine.write_wide(offset::IVA, address.into_bits());
    machine.write_wide(offset::IOTLB, command.with_invalidate(true).into_bits());
    machine.settle();
    let command = Iotlb::from_bits(machine.read_wide(offset::IOTLB));
    assert!(!command.invalidate(), "IVT falls");
    command.actual_granularity()
}

#[test]
fn register_based_invalidation_says_what_it_did() {
    let near = Iva::new().with_page_number(NEAR >> 12);
    let iotlb = |granularity| Iotlb::new().with_domain_id(DOMAIN).with_granularity(granularity);
    let context =
        |granularity| Ccmd::new().with_domain_id(DOMAIN).with_source_id(DEVICE).with_granularity(granularity);
    for (address, command, done, seen) in [
        (near, iotlb(3), 3, [NEW, OLD, NEW, OLD]),
        (near, iotlb(2), 2, [NEW, NEW, NEW, OLD]),
        (near, iotlb(1), 1, [NEW; 4]),
        (near, iotlb(0), 0, [OLD; 4]),
        (near.with_address_mask(18), iotlb(3), 3, [NEW, OLD, NEW, OLD]),
        (near.with_address_mask(19), iotlb(3), 0, [OLD; 4]),
        (near.with_address_mask(63), iotlb(3), 0, [OLD; 4]),
    ] {
        let scene = Scene::cached();
        scene.change_leaves();
        assert_eq!(iotlb_command(&scene.machine, address, command), done, "{command:?}");
        assert_eq!(scene.seen(), seen, "{command:?}");
    }
    for (command, done, seen) in [
        (context(3), 3, [NEW, NEW, OLD, OLD]),
        (context(3).with_function_mask(1), 3, [NEW, NEW, NEW, OLD]),
        (context(2), 2, [NEW, NEW, NEW, OLD]),
        (context(1), 1, [NEW; 4]),
        (context(0), 0, [OLD; 4]),
    ] {
        let scene = Scene::cached();
        scene.change_contexts();
        assert_eq!(context_command(&scene.machine, command), done, "{command:?}");
        assert_eq!(scene.seen(), seen, "{command:?}");
    }
}

#[test]
fn register_based_invalidation_is_ignored_outside_legacy_mode() {
    let machine = Machine::translating(Capabilities::FULL);
    machine.set_root(machine::ROOT.get() | 1 << 10);
    assert_eq!(context_command(&machine, Ccmd::new().with_granularity(1)), 0);
    assert_eq!(iotlb_command(&machine, Iva::new(), Iotlb::new().with_granularity(1)), 0);
}

#[test]
fn without_page_selective_invalidation_the_whole_domain_goes() {
    let capabilities = Capabilities { page_selective: false, max_address_mask: 0, ..Capabilities::FULL };
    let (machine, table) = Machine::with_domain(capabilities);
    machine.map_new(table, NEAR, RW);
    machine.map_new(table, FAR, RW);
    assert!(machine.read_byte(NEAR).is_ok() && machine.read_byte(FAR).is_ok());
    let near = Iva::new().with_page_number(NEAR >> 12);
    let command = Iotlb::new().with_domain_id(DOMAIN).with_granularity(3);
    assert_eq!(iotlb_command(&machine, near, command), 2);
    assert!(machine.bare.unit().iotlb_entries().is_empty());
    assert!(machine.read_byte(FAR).is_ok());
    machine.invalidate(pages(DOMAIN, NEAR, 4096, false));
    assert!(machine.bare.unit().iotlb_entries().is_empty());
}

#[test]
fn many_pages_go_with_one_invalidation() {
    let scene = Scene::cached();
    scene.change_leaves();
    let range = |base| IovaRange::new(Iova::new(base), 4096).expect("a page");
    let before = scene.machine.bare.unit().counters();
    let pending = scene.machine.bare.unit().invalidate_pages(DOMAIN, &[range(NEAR), range(FAR)], true);
    let _drained = pending.wait_blocking();
    assert_eq!(scene.seen(), [NEW, NEW, NEW, OLD]);
    let now = scene.machine.bare.unit().counters();
    assert_eq!(now.invalidations, before.invalidations + 1);
    assert_eq!(now.invalidated_ranges, before.invalidated_ranges + 2);
}

#[test]
fn hits_and_misses_are_counted_and_outlive_the_port() {
    let (machine, table) = Machine::with_domain(Capabilities::FULL);
    machine.map_new(table, NEAR, RW);
    for _ in 0..4 {
        assert!(machine.read_byte(NEAR).is_ok());
    }
    let counters = machine.bare.unit().counters();
    assert_eq!((counters.iotlb.hits, counters.iotlb.misses, counters.iotlb.fills), (3, 1, 1));
    assert_eq!((counters.walks, counters.walk_reads), (1, 6), "root, context and four levels");
    assert_eq!((counters.table_reads, counters.extent_reads), ([1, 1, 1, 1, 0], 0));
    assert_eq!(counters.paging_structure_cache.fills, 1, "the deepest table");
    // The first burst looks its context up twice: once to learn the domain, once more as a member of its list.
    assert_eq!((counters.context_cache.misses, counters.context_cache.hits), (1, 7));
    assert_eq!(machine.bare.unit().iotlb_capacity(), 1024);
    assert_eq!(machine.bare.unit().iotlb_entries().len(), 1);
}

#[test]
fn a_table_mode_that_is_not_built_refuses_sources_whose_context_is_cached() {
    let (machine, table) = Machine::with_domain(Capabilities::FULL);
    machine.map_new(table, 0x5000, RW);
    assert!(machine.read_byte(0x5000).is_ok(), "this caches the context");
    machine.set_root(machine::ROOT.get() | 3 << 10);
    let refused = machine.read_byte(0x5000).expect_err("abort-DMA mode is not built");
    assert_eq!(refused.reason, Ok(FaultReason::TABLE_MODE_INVALID));
}
