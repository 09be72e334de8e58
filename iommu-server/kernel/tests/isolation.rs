//! What keeps tenants apart: quiet before released, one domain per source, pins, limits.

mod fixture;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::mpsc::channel;

use fixture::*;
use iommu_hardware::vtd::Request;
use iommu_kernel::OwnerLimits;
use iommu_types::errors::{AllocateError, CreateDomainError, FreeError, LimitReached, StillMapped};
use iommu_types::{Access, AddressType, Direction, DomainOptions, FaultReason, Iova, Owner, Protection};

/// A DMA stands in the middle of its copy: the unmap is not quiet, its frame stays pinned and its address is not used again.
/// Another domain's unmap does not wait for it.
#[test]
fn i1_an_unmap_stays_unanswered_while_a_dma_is_in_its_copy() {
    let kernel = kernel();
    let mut slow = Tenant::new(&kernel, 1, 48);
    let mut other = Tenant::new(&kernel, 2, 48);
    let buffer = slow.buffer(1);
    let other_buffer = other.buffer(1);
    let iova = slow.dma_map(buffer, Direction::Bidirectional);
    let other_iova = other.dma_map(other_buffer, Direction::Bidirectional);
    other.device_writes(other_iova, &[1]).expect("mapped");

    let Tenant { kernel: _, account: _, mut memory, mut domain, source, mut port } = slow;
    let (entered, is_inside) = channel();
    let (release, is_released) = channel::<()>();
    let device = std::thread::spawn({
        let kernel = Arc::clone(&kernel);
        move || {
            let request = Request {
                iova,
                size_bytes: 4,
                access: Access::Write,
                pasid: None,
                address_type: AddressType::Untranslated,
            };
            let copied = port.burst().translate(request, |lent| {
                entered.send(()).expect("the test waits");
                is_released.recv().expect("the test releases");
                kernel.memory().write(lent.hpa, b"late").expect("memory");
            });
            copied.expect("it was mapped when it was admitted");
            port
        }
    });
    is_inside.recv().expect("the device begins");

    let request = unmap_request(iova_range(iova, PAGE), Direction::Bidirectional);
    let pending = domain.dma_unmap(&kernel, request, NOW).expect("unmapped");
    let (drain, undone) = pending.split();
    let drain = drain.try_complete().expect_err("the device is inside");
    let still_mapped = Err(FreeError::StillMapped(StillMapped { gpa: buffer.base() }));
    assert_eq!(memory.free(&kernel, buffer.base()), still_mapped, "I9: pinned until the drain is over");
    let again = domain.dma_map(&kernel, &memory, dma_map(buffer, Direction::ToDevice), NOW).expect("mapped");
    assert_ne!(again, iova, "the address is not used again before the drain is over");

    let request = unmap_request(iova_range(other_iova, PAGE), Direction::Bidirectional);
    let theirs = other.domain.dma_unmap(&kernel, request, NOW).expect("unmapped");
    assert!(theirs.drain.try_complete().is_ok(), "another domain does not wait");

    release.send(()).expect("the device waits");
    let drained = drain.wait_blocking();
    let mut bytes = [0; 4];
    memory.read(&kernel, buffer.base(), &mut bytes).expect("owned");
    assert_eq!(&bytes, b"late", "what was admitted has landed when the drain is over");
    domain.finish_unmap(&kernel, undone, drained);
    let request = unmap_request(iova_range(again, PAGE), Direction::ToDevice);
    let (drain, undone) = domain.dma_unmap(&kernel, request, NOW).expect("unmapped").split();
    domain.finish_unmap(&kernel, undone, drain.wait_blocking());
    assert_eq!(memory.free(&kernel, buffer.base()), Ok(buffer));

    let mut port = device.join().expect("the device ends");
    let request = Request {
        iova,
        size_bytes: 4,
        access: Access::Write,
        pasid: None,
        address_type: AddressType::Untranslated,
    };
    let fault = port.burst().translate(request, |_| ()).expect_err("I1: gone");
    assert_eq!(fault.reason, FaultReason::WRITE_DENIED);
    assert_eq!(source, fault.source_id);
}

#[test]
fn i1_a_cached_translation_is_gone_when_the_unmap_is_answered() {
    let kernel = kernel();
    let mut tenant = Tenant::new(&kernel, 1, 48);
    let buffer = tenant.buffer(64);
    for _ in 0..3 {
        let iovas: Vec<Iova> = (0..64)
            .map(|page| tenant.dma_map(gpa_range(buffer.base(), page * PAGE, PAGE), Direction::ToDevice))
            .collect();
        for iova in &iovas {
            tenant.device_reads(*iova, 8).expect("mapped and now cached");
        }
        for (done, iova) in iovas.iter().enumerate() {
            tenant.dma_unmap(*iova, PAGE, Direction::ToDevice);
            assert!(tenant.device_reads(*iova, 8).is_err());
            assert!(iovas[done + 1..].iter().all(|iova| tenant.device_reads(*iova, 8).is_ok()));
        }
    }
}

#[test]
fn i5_a_source_is_attached_to_one_domain_at_most() {
    let kernel = kernel();
    let mut tenant = Tenant::new(&kernel, 1, 48);
    let buffer = tenant.buffer(1);
    tenant.map(0x1000, buffer.base(), 1);
    let mut second = kernel
        .create_domain(&tenant.account, DomainOptions::new(Protection::Strict).with_width(39))
        .expect("domain");
    let attach = catch_unwind(AssertUnwindSafe(|| kernel.attach(tenant.source, &mut second)));
    assert!(attach.is_err(), "attached twice");
}

#[test]
fn i5_a_detached_source_reaches_nothing_until_it_is_attached_again() {
    let kernel = kernel();
    let mut tenant = Tenant::new(&kernel, 1, 48);
    let buffer = tenant.buffer(1);
    tenant.map(0x1000, buffer.base(), 1);
    tenant.device_reads(Iova::new(0x1000), 8).expect("mapped");
    let _quiet = kernel.detach(tenant.source, &mut tenant.domain).wait_blocking();
    let fault = tenant.device_reads(Iova::new(0x1000), 8).expect_err("detached");
    assert_eq!(fault.reason, Ok(FaultReason::CONTEXT_NOT_PRESENT));
    let mut empty = kernel
        .create_domain(&tenant.account, DomainOptions::new(Protection::Strict).with_width(57))
        .expect("domain");
    kernel.attach(tenant.source, &mut empty).expect("attach");
    let fault = tenant.device_reads(Iova::new(0x1000), 8).expect_err("another domain");
    assert_eq!(fault.reason, Ok(FaultReason::READ_DENIED));
    let _quiet = kernel.detach(tenant.source, &mut empty).wait_blocking();
    kernel.attach(tenant.source, &mut tenant.domain).expect("attach");
    tenant.device_reads(Iova::new(0x1000), 8).expect("back");
}

#[test]
fn i7_an_owner_cannot_use_up_what_others_may_have() {
    let limits = OwnerLimits { domains: 2, memory_bytes: 64 * PAGE, mappings: 1 << 20, ..LIMITS };
    let kernel = kernel_with(16 << 20, limits);
    let mut greedy = Tenant::new(&kernel, 1, 48);
    let reached = |limit: &str, allowed| LimitReached { limit: limit.to_owned(), allowed };
    let error = greedy.memory.allocate(&kernel, 65 * PAGE).expect_err("over the limit");
    assert_eq!(error, AllocateError::LimitReached(reached("memory_bytes_per_owner", 64 * PAGE)));
    let _second =
        kernel.create_domain(&greedy.account, DomainOptions::new(Protection::Strict)).expect("domain");
    let error = kernel
        .create_domain(&greedy.account, DomainOptions::new(Protection::Strict))
        .expect_err("over the limit");
    assert_eq!(error, CreateDomainError::LimitReached(reached("domains_per_owner", 2)));
    // Sparse mappings: a page here and there costs tables, and those are counted, too.
    let buffer = greedy.buffer(1);
    let refused = (1..1000u64).find_map(|n| {
        let request = fixed(n << 39, buffer.base(), 1);
        greedy.domain.map(&kernel, &greedy.memory, request, NOW).err()
    });
    assert_eq!(
        refused.map(|error| error.to_string()).as_deref(),
        Some("the limit table_bytes_per_owner of 131072 is reached")
    );
    assert!(greedy.account.table_bytes() <= 32 * PAGE);
    let mut modest = Tenant::new(&kernel, 2, 48);
    let buffer = modest.buffer(64);
    let iova = modest.dma_map(buffer, Direction::ToDevice);
    modest.device_reads(iova, 8).expect("mapped");
}

#[test]
fn i9_memory_with_pins_is_not_freed_and_freed_memory_is_wiped() {
    let kernel = kernel();
    let mut tenant = Tenant::new(&kernel, 1, 48);
    let buffer = tenant.buffer(3);
    tenant.cpu_writes(buffer.base(), &[0xaa; 3 * PAGE as usize]);
    let middle = gpa_range(buffer.base(), PAGE, 1);
    let iova = tenant.dma_map(middle, Direction::ToDevice);
    let before = held(&kernel, &tenant.account);
    let still_mapped = Err(FreeError::StillMapped(StillMapped { gpa: middle.base() }));
    assert_eq!(tenant.memory.free(&kernel, buffer.base()), still_mapped, "the page that is mapped is named");
    assert_eq!(held(&kernel, &tenant.account), before, "nothing changes");
    assert_eq!(tenant.cpu_reads(buffer.base(), 2), [0xaa, 0xaa]);
    tenant.dma_unmap(iova, 1, Direction::ToDevice);
    assert_eq!(tenant.memory.free(&kernel, buffer.base()), Ok(buffer));
    let error = tenant.memory.free(&kernel, buffer.base()).expect_err("freed");
    assert!(matches!(error, FreeError::NotAllocated(_)));
    let mut other = Tenant::new(&kernel, 2, 48);
    let all = kernel.free_bytes();
    let theirs = other.memory.allocate(&kernel, all).expect("every frame");
    let bytes = other.cpu_reads(theirs.base(), all as usize);
    assert!(bytes.iter().all(|byte| *byte == 0), "nothing of the first owner is left");
}

#[test]
fn an_unmap_that_nobody_finishes_is_taken_over_by_unmap_all() {
    let kernel = kernel();
    let mut tenant = Tenant::new(&kernel, 1, 48);
    let buffer = tenant.buffer(1);
    let before = tenant.account.mappings();
    tenant.map(0x1000, buffer.base(), 1);
    let lost = tenant.domain.unmap(&kernel, iova_range(Iova::new(0x1000), PAGE), NOW).expect("unmapped");
    let (drain, late) = lost.split();
    let pending = tenant.domain.unmap_all(&kernel, NOW);
    assert_eq!(pending.undone.unmapped_bytes(), PAGE);
    tenant.finish(pending);
    // The late ticket must not finish what came after it.
    tenant.map(0x1000, buffer.base(), 1);
    let next = tenant.domain.unmap(&kernel, iova_range(Iova::new(0x1000), PAGE), NOW).expect("unmapped");
    tenant.domain.finish_unmap(&kernel, late, drain.wait_blocking());
    assert!(tenant.memory.free(&kernel, buffer.base()).is_err(), "the next unmap is not finished");
    tenant.finish(next);
    assert_eq!(tenant.memory.free(&kernel, buffer.base()), Ok(buffer));
    assert_eq!(tenant.account.mappings(), before, "finished once");
}

#[test]
fn everything_comes_back_when_a_tenant_leaves_and_identifiers_are_used_again_only_then() {
    let kernel = kernel();
    // The context table of the bus stays.
    Tenant::new(&kernel, 1, 48).leave();
    let account = kernel.account(Owner::Driver(1));
    let before = held(&kernel, &account);
    for round in 0..20 {
        let mut tenant = Tenant::new(&kernel, 1, [39, 48, 57][round % 3]);
        let create =
            || kernel.create_domain(&account, DomainOptions::new(Protection::Strict)).expect("domain");
        let destroyed = create();
        let id = destroyed.id();
        let mut pending = kernel.destroy_domain(destroyed);
        let meanwhile = create();
        assert_ne!(meanwhile.id(), id, "the first is not finished");
        let drained = pending.take_drain().wait_blocking();
        pending.finish(&kernel, drained);
        let after = create();
        assert_eq!(after.id(), id, "flushed and drained");
        for domain in [meanwhile, after] {
            let mut pending = kernel.destroy_domain(domain);
            let drained = pending.take_drain().wait_blocking();
            pending.finish(&kernel, drained);
        }
        let buffer = tenant.buffer(700);
        tenant.map(1 << 30, buffer.base(), 700);
        let iova = tenant.dma_map(buffer, Direction::Bidirectional);
        tenant.device_writes(iova, &[round as u8; 5000]).expect("mapped");
        tenant.leave();
        assert_eq!(held(&kernel, &account), before, "round {round}");
    }
}
