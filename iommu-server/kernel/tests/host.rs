//! The rest of the host: booting, interrupts, topology, faults filed by owner.

mod fixture;

use std::sync::Arc;

use fixture::*;
use iommu_hardware::cache::CacheGeometry;
use iommu_hardware::memory::PhysicalMemory;
use iommu_hardware::vtd::UnitConfig;
use iommu_kernel::{
    BootError, DeviceEntry, FaultLogs, Kernel, KernelConfig, OwnerEntry, OwnerLimits, OwnerMemory, Topology,
};
use iommu_types::errors::{CreateDomainError, DeclareError, DetachError, LimitReached};
use iommu_types::{
    Capabilities, DeviceAddress, DomainId, DomainOptions, Fault, FaultReason, Gpa, Iova, Owner, Protection,
    SourceId,
};

#[test]
fn a_host_boots_in_the_smallest_memory_and_only_with_capabilities_that_make_sense() {
    let geometry = CacheGeometry { sets: 16, ways: 4 };
    let boot = |size_bytes, capabilities| {
        let memory = PhysicalMemory::bare(size_bytes);
        let unit = UnitConfig {
            capabilities,
            iotlb: geometry,
            context_cache: geometry,
            paging_structure_cache: geometry,
            iotlb_partitions: 1,
            ports_max: 1,
            byte_extents: true,
        };
        let config = KernelConfig { unit, domains_max: 1, owner: LIMITS, fault_records_per_owner: 1 };
        Kernel::boot(Arc::new(memory.expect("memory")), config)
    };
    // The smallest memory that there is has room for everything.
    assert!(boot(1 << 20, Capabilities::FULL).is_ok_and(|kernel| kernel.free_bytes() > 512 << 10));
    let nonsense = Capabilities { fault_records: 0, ..Capabilities::FULL };
    assert!(matches!(boot(1 << 20, nonsense), Err(BootError::Capabilities(_))));
    let narrow = Capabilities { max_guest_width_bits: 48, ..Capabilities::FULL };
    let kernel = boot(1 << 20, narrow).expect("boot");
    let account = kernel.account(Owner::Vm(0));
    for width_bits in [0, 40, 57, 64] {
        let error = kernel
            .create_domain(&account, DomainOptions::new(Protection::Strict).with_width(width_bits))
            .expect_err("refused");
        assert!(matches!(error, CreateDomainError::InvalidField(_)), "{width_bits}: {error}");
    }
    let _only = kernel.create_domain(&account, DomainOptions::new(Protection::Strict)).expect("domain");
    let error =
        kernel.create_domain(&account, DomainOptions::new(Protection::Strict)).expect_err("all taken");
    let reached = LimitReached { limit: "domains".to_owned(), allowed: 1 };
    assert_eq!(error, CreateDomainError::LimitReached(reached));
    assert_eq!(account.domains(), 1, "a refused domain is not charged");
}

#[test]
fn an_account_is_made_once_per_owner_and_tags_tell_owners_apart() {
    let kernel = kernel();
    let driver = kernel.account(Owner::Driver(0));
    let vm = kernel.account(Owner::Vm(0));
    assert!(Arc::ptr_eq(&driver, &kernel.account(Owner::Driver(0))));
    assert_ne!(driver.tag(), vm.tag());
    assert!(driver.tag() >= 2 && vm.tag() >= 2);
}

#[test]
fn memory_is_read_and_written_only_where_the_owner_has_some() {
    let kernel = kernel();
    let account = kernel.account(Owner::Driver(0));
    let mut memory = OwnerMemory::new(&kernel, account);
    let first = memory.allocate(&kernel, 1).expect("memory");
    let second = memory.allocate(&kernel, 3 * PAGE - 1).expect("memory");
    assert_eq!((first.base(), first.size_bytes()), (Gpa::new(0x1000), PAGE));
    assert_eq!((second.base(), second.size_bytes()), (Gpa::new(0x3000), 3 * PAGE));
    assert_eq!(memory.buffers(), [first, second]);
    memory.write(&kernel, Gpa::new(0x3ffd), b"across pages").expect("owned");
    let mut bytes = [0; 12];
    memory.read(&kernel, Gpa::new(0x3ffd), &mut bytes).expect("owned");
    assert_eq!(&bytes, b"across pages");
    for (gpa, size_bytes) in
        [(0, 1), (0xfff, 2), (0x1fff, 2), (0x2000, 1), (0x5ffe, 3), (u64::MAX, 1), (u64::MAX, 2)]
    {
        let mut bytes = vec![0x11; size_bytes];
        memory.read(&kernel, Gpa::new(gpa), &mut bytes).expect_err("not owned");
        assert!(bytes.iter().all(|byte| *byte == 0x11), "all or nothing");
        memory.write(&kernel, Gpa::new(gpa), &bytes).expect_err("not owned");
    }
    for size_bytes in [0, u64::MAX, 1 << 62, 17 << 20] {
        assert!(memory.allocate(&kernel, size_bytes).is_err(), "{size_bytes}");
    }
    assert_eq!(memory.free_all(&kernel), 4 * PAGE);
    memory.read(&kernel, Gpa::new(0x1000), &mut [0]).expect_err("freed");
    let third = memory.allocate(&kernel, 1).expect("memory");
    assert!(third.base() > second.last(), "addresses are not used again");
}

#[test]
fn a_buffer_in_pieces_is_one_buffer() {
    let kernel = kernel();
    let mut tenant = Tenant::new(&kernel, 1, 48);
    // Every second page is freed, so that the frames lie apart.
    let pages: Vec<_> = (0..200).map(|_| tenant.buffer(1)).collect();
    let rest = kernel.free_bytes() - 8 * PAGE;
    let _hoard = tenant.memory.allocate(&kernel, rest).expect("memory");
    for page in pages.iter().step_by(2) {
        tenant.memory.free(&kernel, page.base()).expect("not mapped");
    }
    let buffer = tenant.buffer(100);
    let content: Vec<u8> = (0..100 * PAGE).map(|n| (n / 512) as u8).collect();
    tenant.cpu_writes(buffer.base(), &content);
    let iova = tenant.dma_map(gpa_range(buffer.base(), 77, 90 * PAGE), iommu_types::Direction::Bidirectional);
    assert_eq!(
        tenant.device_reads(iova, 90 * PAGE as usize).expect("mapped"),
        content[77..77 + 90 * PAGE as usize]
    );
    tenant.map(1 << 30, buffer.base(), 100);
    assert_eq!(tenant.device_reads(Iova::new(1 << 30), content.len()).expect("mapped"), content);
    tenant.dma_unmap(iova, 90 * PAGE, iommu_types::Direction::Bidirectional);
    tenant.unmap(1 << 30, 100);
    tenant.memory.free(&kernel, buffer.base()).expect("no pin is left");
}

#[test]
fn an_interrupt_reaches_its_owner_only_from_its_source() {
    let kernel = kernel();
    let mut tenant = Tenant::new(&kernel, 1, 48);
    let mut other = Tenant::new(&kernel, 2, 48);
    let first = kernel.allocate_interrupt(&tenant.account, tenant.source).expect("entry");
    let second = kernel.allocate_interrupt(&tenant.account, tenant.source).expect("entry");
    let theirs = kernel.allocate_interrupt(&other.account, other.source).expect("entry");
    assert_eq!((first.vector, second.vector, theirs.vector), (0x20, 0x21, 0x20), "vectors are per owner");
    assert_ne!(first.address, theirs.address);
    let delivered = tenant.port.interrupt(second.address, second.data).expect("delivered");
    assert_eq!((delivered.vector, delivered.destination), (0x21, tenant.account.tag()));
    let fault = other.port.interrupt(first.address, first.data).expect_err("another source");
    assert_eq!(fault.reason, FaultReason::IR_SOURCE_DENIED);
    let _quiet = kernel.free_interrupts(tenant.source).wait_blocking();
    let fault = tenant.port.interrupt(first.address, first.data).expect_err("freed");
    assert_eq!(fault.reason, FaultReason::IR_NOT_PRESENT);
    assert_eq!((tenant.account.interrupts(), other.account.interrupts()), (0, 1));
    other.port.interrupt(theirs.address, theirs.data).expect("untouched");
    for n in 0..LIMITS.interrupts {
        kernel
            .allocate_interrupt(&tenant.account, tenant.source)
            .unwrap_or_else(|error| panic!("{n}: {error}"));
    }
    let error = kernel.allocate_interrupt(&tenant.account, tenant.source).expect_err("over the limit");
    assert_eq!(error.limit, "interrupts_per_owner");
}

#[test]
fn i7_interrupt_entries_and_vectors_run_out_by_name() {
    let kernel = kernel_with(16 << 20, OwnerLimits { interrupts: 1000, ..LIMITS });
    let source = SourceId::at(1, 0, 0).expect("source");
    let account = kernel.account(Owner::Vm(0));
    let allocated = (0..).map_while(|_| kernel.allocate_interrupt(&account, source).ok()).count();
    assert_eq!(allocated, 224, "vectors 0x20 to 0xff");
    let error = kernel.allocate_interrupt(&account, source).expect_err("no vector left");
    assert_eq!((error.limit.as_str(), error.allowed), ("vectors_per_owner", 224));
    assert_eq!(account.interrupts(), 224);
    let owners = 4096 / 224;
    for vm in 1..=owners {
        let account = kernel.account(Owner::Vm(vm));
        let mut allocated = (0..224).map(|_| kernel.allocate_interrupt(&account, source).map(|_| ()));
        let refused = allocated.find_map(Result::err).map(|error| error.limit);
        assert_eq!(refused.as_deref(), (vm == owners).then_some("interrupts"), "owner {vm}");
    }
    let _quiet = kernel.free_interrupts(source).wait_blocking();
    assert_eq!(account.interrupts(), 0);
    kernel.allocate_interrupt(&account, source).expect("entries are free again");
}

fn device(bus: u8) -> DeviceAddress {
    DeviceAddress::new(0, SourceId::at(bus, 0, 0).expect("source"))
}

fn entry(bus: u8, owner: Option<Owner>) -> DeviceEntry {
    DeviceEntry::new(device(bus), format!("dev{bus}"), owner)
}

#[test]
fn a_declaration_that_clashes_or_is_one_too_many_is_refused() {
    let mut topology = Topology::new(2, 2);
    let owner = |number, name: &str| OwnerEntry { owner: Owner::Driver(number), name: name.to_owned() };
    topology.declare_owner(owner(1, "net")).expect("first");
    for (again, field) in [(owner(1, "other"), "owner"), (owner(2, "net"), "name")] {
        let error = topology.declare_owner(again).expect_err("taken");
        assert!(matches!(&error, DeclareError::InvalidField(invalid) if invalid.field == field), "{error}");
    }
    topology.declare_owner(owner(2, "block")).expect("second");
    assert!(matches!(topology.declare_owner(owner(3, "third")), Err(DeclareError::LimitReached(_))));
    let unknown = topology.declare_device(entry(1, Some(Owner::Vm(9)))).expect_err("no such owner");
    assert!(matches!(unknown, DeclareError::UnknownOwner(_)));
    topology.declare_device(entry(1, Some(Owner::Driver(1)))).expect("first");
    assert!(matches!(topology.declare_device(entry(1, None)), Err(DeclareError::DeviceExists(_))));
    topology.declare_device(entry(2, None)).expect("second");
    assert!(matches!(topology.declare_device(entry(3, None)), Err(DeclareError::LimitReached(_))));
    assert_eq!(topology.owner_by_name("block").map(|entry| entry.owner), Some(Owner::Driver(2)));
    assert_eq!((topology.devices().count(), topology.owners().count()), (2, 2));
    assert_eq!(topology.remove_device(device(2)), Ok(entry(2, None)));
    assert!(topology.remove_device(device(2)).is_err());
}

#[test]
fn i5_topology_knows_one_domain_per_device() {
    let mut topology = Topology::new(4, 4);
    topology.declare_device(entry(1, None)).expect("device");
    topology.set_attached(device(1), Owner::Vm(1), DomainId::new(5)).expect("device");
    assert_eq!(topology.attached_to(DomainId::new(5)), [device(1)]);
    assert_eq!(topology.devices_of(Owner::Vm(1)), [device(1)]);
    let again = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        topology.set_attached(device(1), Owner::Vm(1), DomainId::new(6))
    }));
    assert!(again.is_err());
    assert_eq!(topology.set_detached(device(1)), Ok(DomainId::new(5)));
    assert!(matches!(topology.set_detached(device(1)), Err(DetachError::NotAttached(_))));
    assert!(matches!(topology.set_detached(device(7)), Err(DetachError::UnknownDevice(_))));
    assert!(topology.set_attached(device(7), Owner::Vm(1), DomainId::new(5)).is_err());
}

#[test]
fn i6_faults_are_filed_by_the_owner_of_the_device() {
    let kernel = kernel();
    let mut tenant = Tenant::new(&kernel, 1, 48);
    let mut stray = kernel.unit().port(SourceId::at(9, 0, 0).expect("source")).expect("port");
    let owner = Owner::Driver(1);
    let mut topology = Topology::new(4, 4);
    topology.declare_owner(OwnerEntry { owner, name: "net".to_owned() }).expect("owner");
    topology.declare_device(entry(1, None)).expect("device");
    topology.set_attached(device(1), owner, tenant.domain.id()).expect("device");
    let mut logs = FaultLogs::new(16);
    assert!(logs.collect(&kernel, &topology, 1).is_empty());
    tenant.device_reads(Iova::new(0x5678), 1).expect_err("not mapped");
    tenant.device_writes(Iova::new(0x9000), &[1]).expect_err("not mapped");
    stray.interrupt(0xfee0_0010, 0).expect_err("no entry");
    let owners = logs.collect(&kernel, &topology, 1234);
    assert_eq!(owners, [Some(owner), None]);
    assert_eq!(logs.owners(), [None, Some(owner)]);
    let (records, overwritten) = logs.after(Some(owner), 0, 10);
    assert_eq!((records.len(), overwritten, logs.latest(Some(owner))), (1, 0, 1));
    let record = records[0];
    assert_eq!((record.sequence, record.at_unix_ms, record.collapsed_count), (1, 1234, 1));
    assert_eq!(
        (record.device, record.owner, record.domain_id),
        (device(1), Some(owner), Some(tenant.domain.id()))
    );
    assert!(matches!(record.fault, Fault::Dma(fault) if fault.iova == Iova::new(0x5000)), "{}", record.fault);
    let (records, _) = logs.after(None, 0, 10);
    assert_eq!((records[0].device, records[0].domain_id), (device(9), None));
    assert!(matches!(records[0].fault, Fault::Interrupt(_)));
    assert!(logs.collect(&kernel, &topology, 1235).is_empty(), "taken once");
}
