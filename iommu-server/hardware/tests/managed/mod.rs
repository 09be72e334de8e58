//! A managed unit under test, with what it has beyond a bare one: byte extents and partitions. Each source has a domain of its own, of one
//! level-1 table with an extent table behind it.
#![allow(dead_code, reason = "each test binary uses a part of it")]
#![allow(unreachable_pub, reason = "a module that several test binaries include")]

use std::sync::Arc;

use iommu_hardware::cache::CacheGeometry;
use iommu_hardware::memory::PhysicalMemory;
use iommu_hardware::vtd::spec::extent::{ByteExtent, extent_address};
use iommu_hardware::vtd::spec::pte::{SecondStageEntry, entry_address};
use iommu_hardware::vtd::spec::root_context::{self, ContextEntry, RootEntry};
use iommu_hardware::vtd::walk::{RootMode, RootTable};
use iommu_hardware::vtd::{EventMessage, EventSink, Port, Request, Unit, UnitConfig};
use iommu_types::{
    Access, AddressType, Capabilities, DomainId, FaultReason, Hpa, Iova, IovaRange, PageSize, Permissions,
    SourceId,
};

const ROOT: Hpa = Hpa::new(0x1000);
const CONTEXTS: Hpa = Hpa::new(0x2000);
/// Where the pages of tests lead to.
pub const FRAMES: u64 = 0x10_0000;

struct NoEvents;
impl EventSink for NoEvents {
    fn deliver(&self, _message: EventMessage) {}
}

/// A unit of 64 IOTLB entries that knows byte extents.
pub fn config() -> UnitConfig {
    let geometry = CacheGeometry { sets: 16, ways: 4 };
    UnitConfig {
        capabilities: Capabilities::FULL,
        iotlb: geometry,
        context_cache: geometry,
        paging_structure_cache: geometry,
        iotlb_partitions: 1,
        ports_max: 16,
        byte_extents: true,
    }
}

pub struct Host {
    pub unit: Arc<Unit>,
}

impl Host {
    pub fn new(config: UnitConfig) -> Self {
        let memory = Arc::new(PhysicalMemory::bare(4 << 20).expect("memory"));
        let unit = Unit::new(config, memory, Arc::new(NoEvents)).expect("sound");
        unit.set_root_table(RootTable { base: ROOT, mode: RootMode::Legacy });
        let _drained = unit.set_translation(true).wait_blocking();
        Self { unit }
    }
    pub fn store(&self, at: Hpa, word: u64) {
        self.unit.memory().store_u64(at, word).expect("inside memory");
    }
    /// A device with a domain, both of that number (0 to 15).
    pub fn device(&self, number: u16) -> Device {
        let (source, domain) = (SourceId::new(number), DomainId::new(number));
        let tables = 0x1_0000 * (1 + u64::from(number));
        let [top, middle, leaves] = [0, 0x1000, 0x2000].map(|offset| Hpa::new(tables + offset));
        let memory = self.unit.memory();
        let root_at = root_context::entry_address(ROOT, source.bus()).expect("fits");
        memory.store_u128(root_at, RootEntry::present(CONTEXTS).into_bits()).expect("inside memory");
        let context_at = root_context::entry_address(CONTEXTS, source.devfn()).expect("fits");
        let context = ContextEntry::second_stage(top, 3, domain);
        memory.store_u128(context_at, context.into_bits()).expect("inside memory");
        self.store(top, SecondStageEntry::table(middle).into_bits());
        self.store(middle, SecondStageEntry::table(leaves).into_bits());
        Device { source, domain, leaves, port: self.unit.port(source).expect("a port") }
    }
    /// Maps a page as a whole or in part. Where there is an extent it is written first.
    pub fn map(
        &self,
        device: &Device,
        iova: u64,
        hpa: u64,
        permissions: Permissions,
        bytes: Option<(u16, u16)>,
    ) {
        let iova = Iova::new(iova);
        if let Some((first, last)) = bytes {
            let extent = ByteExtent::new(first, last).expect("in order");
            self.store(extent_address(device.leaves, iova).expect("fits"), extent.into_word());
        }
        let leaf = SecondStageEntry::leaf(Hpa::new(hpa), PageSize::Size4K, permissions);
        let leaf = leaf.with_partial_page(bytes.is_some());
        self.store(entry_address(device.leaves, iova, 1).expect("fits"), leaf.into_bits());
    }
    pub fn unmap(&self, device: &Device, iova: u64) {
        self.store(entry_address(device.leaves, Iova::new(iova), 1).expect("fits"), 0);
    }
    pub fn invalidate(&self, device: &Device, page: u64, pages: u64) {
        let range = IovaRange::new(Iova::new(page), pages * 4096).expect("a range");
        let _drained = self.unit.invalidate_pages(device.domain, &[range], true).wait_blocking();
    }
    /// IOTLB hits, IOTLB misses and walks so far.
    pub fn counts(&self) -> [u64; 3] {
        let counters = self.unit.counters();
        [counters.iotlb.hits, counters.iotlb.misses, counters.walks]
    }
}

pub struct Device {
    pub source: SourceId,
    pub domain: DomainId,
    pub leaves: Hpa,
    pub port: Port,
}

impl Device {
    pub fn access(&mut self, iova: u64, access: Access, size_bytes: u32) -> Result<u64, FaultReason> {
        let address_type = AddressType::Untranslated;
        let request = Request { iova: Iova::new(iova), size_bytes, access, pasid: None, address_type };
        let reached = self.port.burst().translate(request, |lent| lent.hpa.get());
        reached.map_err(|fault| fault.reason)
    }
}
