//! A strict map and unmap through the kernel floor: IOVA, pins, record, entry; then invalidation, drain and everything back.

use std::collections::BTreeMap;
use std::hint::black_box;
use std::sync::RwLock;

use iommu_hardware::vtd::Port;
use iommu_kernel::Domain;
use iommu_types::{IovaRange, PAGE_SIZE_BYTES};

use super::host::{Caches, Host, LARGE, Pages, map, unmap, unmap_all};
use crate::figure::{Figure, RatioOf, Target};
use crate::report::Report;
use crate::rounds::{in_turn, nanoseconds_each};
use crate::stand::Bench;

/// Mappings that stay while the pair is measured.
const LIVE: u64 = 1024;

/// The pair.
pub(crate) fn pair(bench: &mut Bench) -> anyhow::Result<Report> {
    let mut host = Host::boot(256 << 20, Caches { iotlb: LARGE, paging: LARGE })?;
    let mut pages = Pages::of(host.buffer(4 << 20)?);
    let mut domain = host.domain()?;
    let mut port = host.device(&mut domain)?;
    // The device has been at work in this domain: its slot stands in the list that every drain looks through.
    drop(port.burst());
    for _ in 0..LIVE {
        map(&host, &mut domain, &mut pages);
    }
    let tree = RwLock::new(BTreeMap::new());
    let mut next = 0u64;
    let mut insert = || {
        next += 1;
        let key = next % (1 << 20) * PAGE_SIZE_BYTES;
        tree.write().expect("no writer panics").insert(key, (next, PAGE_SIZE_BYTES));
        key
    };
    for _ in 0..LIVE {
        insert();
    }
    let operations = bench.plan.operations() / 4;
    let (ours, reference) = in_turn(
        bench.plan,
        || {
            nanoseconds_each(operations, |n| {
                for _ in 0..n {
                    let mapped = map(&host, &mut domain, &mut pages);
                    unmap(&host, &mut domain, black_box(mapped));
                }
            })
        },
        || {
            nanoseconds_each(operations, |n| {
                for _ in 0..n {
                    let key = black_box(insert());
                    tree.write().expect("no writer panics").remove(&key);
                }
            })
        },
    );
    let figure = Figure::alone("map-unmap-in-process", "ns", &ours)
        .beside("BTreeMap insert+remove in an RwLock", &reference, RatioOf::ValueToReference)
        .judged(Target::value_at_most(500.0));
    Ok(Report { figures: vec![figure], ..Report::default() })
}

/// Batches of maps and unmaps, as a stream carries them, without the stream.
pub(crate) struct Batches {
    host: Host,
    domain: Domain,
    pages: Pages,
    mapped: Vec<IovaRange>,
    operations: usize,
    _port: Port,
}

impl Batches {
    /// Batches of so many operations.
    pub(crate) fn new(operations: usize) -> anyhow::Result<Self> {
        let mut host = Host::boot(256 << 20, Caches { iotlb: LARGE, paging: LARGE })?;
        let pages = Pages::of(host.buffer(operations as u64 * PAGE_SIZE_BYTES)?);
        let mut domain = host.domain()?;
        let mut port = host.device(&mut domain)?;
        drop(port.burst());
        Ok(Self { host, domain, pages, mapped: Vec::with_capacity(operations), operations, _port: port })
    }

    /// One batch of maps and one of unmaps; how many pairs that is.
    pub(crate) fn map_and_unmap(&mut self) -> usize {
        self.mapped.clear();
        for _ in 0..self.operations {
            self.mapped.push(map(&self.host, &mut self.domain, &mut self.pages));
        }
        unmap_all(&self.host, &mut self.domain, &self.mapped);
        self.operations
    }
}
