//! What each owner has for itself: limits, a tag, a share of the IOTLB and of the domain identifiers.

mod fixture;

use std::sync::Arc;

use fixture::*;
use iommu_kernel::{Domain, Kernel, OwnerAccount, OwnerLimits, OwnerMemory};
use iommu_types::errors::{AddMemoryError, AllocateError};
use iommu_types::{Direction, DomainOptions, Gpa, GpaRange, Owner, Protection};

fn domain(kernel: &Kernel, account: &Arc<OwnerAccount>) -> Domain {
    kernel.create_domain(account, DomainOptions::new(Protection::Strict)).expect("domain")
}

fn destroy(kernel: &Kernel, domain: Domain) {
    let mut pending = kernel.destroy_domain(domain);
    let drained = pending.take_drain().wait_blocking();
    pending.finish(kernel, drained);
}

#[test]
fn i7_an_owner_with_limits_of_its_own_is_held_to_them() {
    let kernel = kernel();
    let small = OwnerLimits { memory_bytes: 2 * PAGE, ..LIMITS };
    let account = kernel.account_with(Owner::Vm(1), small).expect("a tag");
    assert_eq!(account.limits(), small);
    assert!(Arc::ptr_eq(&account, &kernel.account(Owner::Vm(1))), "one account");
    let mut memory = OwnerMemory::new(&kernel, Arc::clone(&account));
    let range = GpaRange::new(Gpa::new(0), 3 * PAGE).expect("range");
    assert!(matches!(memory.add_at(&kernel, range), Err(AddMemoryError::LimitReached(_))));
    let mut other = OwnerMemory::new(&kernel, kernel.account(Owner::Driver(1)));
    other.add_at(&kernel, range).expect("the usual limits");
    let error = memory.allocate(&kernel, 3 * PAGE).expect_err("over its limit");
    assert!(matches!(error, AllocateError::LimitReached(limit) if limit.allowed == 2 * PAGE));
}

#[test]
fn i9_the_tag_of_an_owner_that_is_gone_is_never_used_again() {
    let kernel = kernel();
    let (one, two) = (kernel.account(Owner::Vm(1)), kernel.account(Owner::Vm(2)));
    let mut seen = vec![one.tag(), two.tag()];
    for _ in 0..10 {
        assert!(kernel.forget_account(Owner::Vm(1)));
        let again = kernel.account_with(Owner::Vm(1), LIMITS).expect("a tag");
        assert!(!seen.contains(&again.tag()), "{seen:?}");
        seen.push(again.tag());
    }
    assert!(kernel.forget_account(Owner::Vm(9)));
    let mut memory = OwnerMemory::new(&kernel, Arc::clone(&two));
    memory.allocate(&kernel, PAGE).expect("memory");
    assert!(!two.is_empty());
    assert!(!kernel.forget_account(Owner::Vm(2)), "it holds something");
    assert!(Arc::ptr_eq(&two, &kernel.account(Owner::Vm(2))), "nothing changed");
}

#[test]
fn owners_are_spread_over_the_partitions_and_domains_follow_them() {
    // As many as there are of all owners together.
    let kernel = kernel_in_partitions(16 << 20, OwnerLimits { domains: 8, ..LIMITS }, 4);
    let accounts: Vec<_> = (0..6).map(|vm| kernel.account(Owner::Vm(vm))).collect();
    let partitions = |accounts: &[Arc<OwnerAccount>]| -> Vec<u16> {
        accounts.iter().map(|account| account.iotlb_partition()).collect()
    };
    assert_eq!(partitions(&accounts), [0, 1, 2, 3, 0, 1]);
    assert!(kernel.forget_account(Owner::Vm(3)));
    assert_eq!(kernel.account(Owner::Vm(7)).iotlb_partition(), 3, "where the fewest are");
    for account in [&accounts[0], &accounts[2], &accounts[5]] {
        let (first, second) = (domain(&kernel, account), domain(&kernel, account));
        for domain in [&first, &second] {
            assert_eq!(domain.id().get() % 4, account.iotlb_partition());
        }
        let beyond: Vec<_> = (0..6).map(|_| domain(&kernel, account)).collect();
        let is_own = |domain: &Domain| domain.id().get() % 4 == account.iotlb_partition();
        assert!(!beyond.iter().any(is_own), "of other partitions when its own is used up");
        let other = accounts.iter().find(|other| !Arc::ptr_eq(other, account)).expect("there are six");
        let refused =
            kernel.create_domain(other, DomainOptions::new(Protection::Strict)).expect_err("8 domains");
        assert!(refused.to_string().contains("domains of 8"), "{refused}");
        // An identifier comes back when everything cached under it is flushed and drained, and no earlier.
        let id = second.id();
        let mut pending = kernel.destroy_domain(second);
        kernel.create_domain(other, DomainOptions::new(Protection::Strict)).expect_err("not finished");
        let drained = pending.take_drain().wait_blocking();
        pending.finish(&kernel, drained);
        let again = domain(&kernel, account);
        assert_eq!(again.id(), id);
        for domain in beyond.into_iter().chain([again, first]) {
            destroy(&kernel, domain);
        }
    }
}

/// Misses of a victim whose pages fit its share, beside an aggressor that touches many more.
fn misses_beside(partitions: u16) -> u64 {
    let kernel = kernel_in_partitions(16 << 20, LIMITS, partitions);
    let mut victim = Tenant::new(&kernel, 1, 48);
    let mut aggressor = Tenant::new(&kernel, 2, 48);
    let share = 128;
    let (mine, theirs) = (victim.buffer(share), aggressor.buffer(512));
    let page = |buffer: GpaRange, n| gpa_range(buffer.base(), n * PAGE, 8);
    let iovas: Vec<_> = (0..share).map(|n| victim.dma_map(page(mine, n), Direction::ToDevice)).collect();
    let many: Vec<_> = (0..512).map(|n| aggressor.dma_map(page(theirs, n), Direction::ToDevice)).collect();
    let misses = |kernel: &Kernel| kernel.unit().counters().iotlb.misses;
    let touch = |tenant: &mut Tenant, iovas: &[iommu_types::Iova]| {
        iovas.iter().for_each(|iova| drop(tenant.device_reads(*iova, 8).expect("mapped")));
    };
    touch(&mut victim, &iovas);
    touch(&mut victim, &iovas);
    let mut missed = 0;
    for _ in 0..3 {
        touch(&mut aggressor, &many);
        let before = misses(&kernel);
        touch(&mut victim, &iovas);
        missed += misses(&kernel) - before;
    }
    missed
}

#[test]
fn i7_domains_of_owners_in_different_partitions_displace_nothing() {
    assert_eq!(misses_beside(2), 0);
    assert!(misses_beside(1) > 0, "without partitions they do");
}
