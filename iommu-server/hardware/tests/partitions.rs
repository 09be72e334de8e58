//! An IOTLB that is cut into partitions, seen from devices: what a tenant does there, another does not feel.

mod managed;

use iommu_hardware::cache::CacheGeometry;
use iommu_hardware::vtd::UnitConfig;
use iommu_types::{Access, Invalidation, Permissions};
use managed::{Device, FRAMES, Host, config};

/// Entries of each partition of the IOTLBs here, in two partitions.
const SHARE: u64 = 8;

fn mapped(host: &Host, number: u16) -> Device {
    let device = host.device(number);
    for page in 0..512 {
        host.map(&device, page * 4096, FRAMES, Permissions::READ, None);
    }
    device
}

fn touch(device: &mut Device, pages: u64) {
    for page in 0..pages {
        assert_eq!(device.access(page * 4096, Access::Read, 8), Ok(FRAMES));
    }
}

/// Misses of a victim that uses a share of the IOTLB, beside an aggressor that thrashes.
fn misses_beside(partitions: u16, victim: u16, aggressor: u16) -> u64 {
    let iotlb = CacheGeometry { sets: 4, ways: 4 };
    let host = Host::new(UnitConfig { iotlb, iotlb_partitions: partitions, ..config() });
    let (mut victim, mut aggressor) = (mapped(&host, victim), mapped(&host, aggressor));
    touch(&mut victim, SHARE);
    let mut misses = 0;
    for _ in 0..4 {
        touch(&mut aggressor, 512);
        let before = host.counts()[1];
        touch(&mut victim, SHARE);
        misses += host.counts()[1] - before;
    }
    misses
}

#[test]
fn i7_a_tenant_that_thrashes_the_iotlb_costs_others_nothing() {
    assert_eq!(misses_beside(1, 2, 3), 4 * SHARE, "without partitions it costs every hit");
    assert_eq!(misses_beside(2, 2, 3), 0);
    assert_eq!(misses_beside(2, 3, 8), 0);
    assert_eq!(misses_beside(2, 3, 5), 4 * SHARE, "two domains of one partition share it");
}

#[test]
fn every_invalidation_reaches_every_partition() {
    let host = Host::new(UnitConfig { iotlb_partitions: 8, ..config() });
    let mut devices: Vec<Device> = (0..10).map(|number| mapped(&host, number)).collect();
    let mut left = |gone: usize, what: &dyn Fn(&Device)| {
        devices.iter_mut().for_each(|device| touch(device, 2));
        what(&devices[gone]);
        host.unit.iotlb_entries().iter().filter(|entry| entry.domain_id == devices[gone].domain).count()
    };
    for gone in 0..10 {
        assert_eq!(left(gone, &|device| host.invalidate(device, 0, 1)), 1);
        assert_eq!(left(gone, &|device| host.invalidate(device, 0, 512)), 0, "a range that scans");
        let domain = |device: &Device| drop(host.unit.invalidate(Invalidation::IotlbDomain(device.domain)));
        assert_eq!(left(gone, &domain), 0);
        assert_eq!(left(gone, &|_| drop(host.unit.invalidate(Invalidation::IotlbGlobal))), 0);
    }
    assert!(host.unit.iotlb_entries().is_empty());
    let counters = host.unit.counters();
    let parts = (counters.invalidated_ranges, counters.invalidated_domains, counters.global_invalidations);
    assert_eq!((parts, counters.invalidations), ((20, 10, 10), 40));
}
