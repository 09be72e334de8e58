//! A host in this process: memory, kernel, one owner; and the operations that are measured on it.

use std::sync::Arc;

use anyhow::{Context, ensure};
use iommu_hardware::cache::CacheGeometry;
use iommu_hardware::memory::{Backing, MemoryConfig, PhysicalMemory};
use iommu_hardware::vtd::{Port, UnitConfig};
use iommu_kernel::{
    DmaMap, DmaUnmap, Domain, Kernel, KernelConfig, OwnerAccount, OwnerLimits, OwnerMemory, PendingUnmap,
    Tick,
};
use iommu_types::{Capabilities, Direction, DomainOptions, Gpa, GpaRange, IovaRange, Owner, PAGE_SIZE_BYTES};
use iommu_types::{Protection, RequestId, SourceId};

/// Geometry that holds 16,384 translations: what the server starts with.
pub(crate) const LARGE: CacheGeometry = CacheGeometry { sets: 4096, ways: 4 };
/// Geometry that holds next to nothing.
pub(crate) const TINY: CacheGeometry = CacheGeometry { sets: 1, ways: 4 };

/// The sizes of the unit's caches.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Caches {
    pub(crate) iotlb: CacheGeometry,
    pub(crate) paging: CacheGeometry,
}

/// A host with one owner.
pub(crate) struct Host {
    pub(crate) kernel: Arc<Kernel>,
    pub(crate) account: Arc<OwnerAccount>,
    pub(crate) memory: OwnerMemory,
    sources: u16,
}

impl Host {
    /// Boots. Memory is taken from the system as it is touched, so a large one costs nothing by itself.
    pub(crate) fn boot(memory_bytes: u64, caches: Caches) -> anyhow::Result<Self> {
        Self::boot_partitioned(memory_bytes, caches, 1)
    }

    /// The same with an IOTLB that is cut into shares.
    pub(crate) fn boot_partitioned(
        memory_bytes: u64,
        caches: Caches,
        iotlb_partitions: u16,
    ) -> anyhow::Result<Self> {
        let config = MemoryConfig { size_bytes: memory_bytes, backing: Backing::Memfd };
        let memory = Arc::new(PhysicalMemory::new(&config).context("make physical memory")?);
        let unit = UnitConfig {
            capabilities: Capabilities::FULL,
            iotlb: caches.iotlb,
            context_cache: LARGE,
            paging_structure_cache: caches.paging,
            iotlb_partitions,
            ports_max: 1024,
            byte_extents: true,
        };
        let owner = OwnerLimits {
            domains: 4096,
            mappings: 1 << 21,
            mapped_bytes: 1 << 40,
            memory_bytes,
            interrupts: 1,
        };
        let config = KernelConfig { unit, domains_max: 4096, owner, fault_records_per_owner: 64 };
        let kernel = Kernel::boot(memory, config).context("boot the kernel floor")?;
        let account = kernel.account(Owner::Driver(0));
        let memory = OwnerMemory::new(&kernel, Arc::clone(&account));
        Ok(Self { kernel, account, memory, sources: 0 })
    }

    /// A buffer of the owner.
    pub(crate) fn buffer(&mut self, size_bytes: u64) -> anyhow::Result<GpaRange> {
        self.memory.allocate(&self.kernel, size_bytes).context("allocate a buffer")
    }

    /// A strict domain of 48 bits.
    pub(crate) fn domain(&self) -> anyhow::Result<Domain> {
        self.domain_of(DomainOptions::new(Protection::Strict))
    }

    /// A domain.
    pub(crate) fn domain_of(&self, options: DomainOptions) -> anyhow::Result<Domain> {
        self.kernel.create_domain(&self.account, options).context("create a domain")
    }

    /// A device in the domain.
    pub(crate) fn device(&mut self, domain: &mut Domain) -> anyhow::Result<Port> {
        let source = self.source(domain)?;
        self.kernel.unit().port(source).context("open a port")
    }

    /// The address of a device in the domain, without a port.
    pub(crate) fn source(&mut self, domain: &mut Domain) -> anyhow::Result<SourceId> {
        self.sources += 1;
        let source = SourceId::new(8 + self.sources);
        self.kernel.attach(source, domain).context("attach a device")?;
        Ok(source)
    }

    /// Waits for an unmap and finishes it.
    pub(crate) fn finish(&self, domain: &mut Domain, pending: PendingUnmap) {
        let (drain, undone) = pending.split();
        domain.finish_unmap(&self.kernel, undone, drain.wait_blocking());
    }
}

/// What is mapped and unmapped: the pages of a buffer, one after the other.
#[derive(Clone, Debug)]
pub(crate) struct Pages {
    base: Gpa,
    count: u64,
    next: u64,
}

impl Pages {
    pub(crate) fn of(buffer: GpaRange) -> Self {
        Self { base: buffer.base(), count: buffer.size_bytes() / PAGE_SIZE_BYTES, next: 0 }
    }
    fn draw(&mut self) -> GpaRange {
        let page = self.next % self.count;
        self.next += 1;
        let base = self.base.checked_add(page * PAGE_SIZE_BYTES).expect("the page lies in the buffer");
        GpaRange::new(base, PAGE_SIZE_BYTES).expect("a page of a buffer does not wrap")
    }
}

/// Maps the next page for a device that reads and writes it.
pub(crate) fn map(host: &Host, domain: &mut Domain, pages: &mut Pages) -> IovaRange {
    let range = pages.draw();
    let request = DmaMap::single(range, Direction::Bidirectional, RequestId(pages.next));
    let iova =
        domain.dma_map(&host.kernel, &host.memory, request, Tick(0)).expect("the buffer can be mapped");
    IovaRange::new(iova, PAGE_SIZE_BYTES).expect("what was mapped does not wrap")
}

/// Unmaps strictly: the entries, the invalidation, the drain, and what is given back after it.
pub(crate) fn unmap(host: &Host, domain: &mut Domain, range: IovaRange) {
    let request = DmaUnmap::single(range, Direction::Bidirectional, RequestId(0));
    let pending = domain.dma_unmap(&host.kernel, request, Tick(0)).expect("the mapping is there");
    host.finish(domain, pending);
}

/// Unmaps all of them strictly, with one invalidation and one drain.
pub(crate) fn unmap_all(host: &Host, domain: &mut Domain, ranges: &[IovaRange]) {
    let requests: Vec<_> =
        ranges.iter().map(|&range| DmaUnmap::single(range, Direction::Bidirectional, RequestId(0))).collect();
    let (results, pending) = domain.dma_unmap_batch(&host.kernel, &requests, Tick(0));
    assert!(results.iter().all(Result::is_ok), "the mappings are there");
    host.finish(domain, pending);
}

/// That the measurement measured what its name says: `part` of `whole` at least.
pub(crate) fn ensure_share(what: &str, part: u64, whole: u64, at_least: f64) -> anyhow::Result<()> {
    let share = part as f64 / whole.max(1) as f64;
    ensure!(share >= at_least, "only {share:.3} of the operations were {what}");
    Ok(())
}
