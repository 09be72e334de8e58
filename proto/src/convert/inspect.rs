//! `inspect.proto`: looking at everything. Walks are in `explain.rs`.

use iommu_types::errors::InvalidField;
use iommu_types::{
    DeviceAddress, DomainId, DomainOptions, Generation, Gpa, Hpa, Iova, Owner, PageSize, Permissions,
    RequestId,
};

use super::explain::WalkStep;
use super::{Field, messages, wrong, wrong_at};

impl Field<u64> for PageSize {
    fn parse(wire: u64) -> Result<Self, InvalidField> {
        let size = Self::ALL.into_iter().find(|size| size.bytes() == wire);
        size.ok_or_else(|| wrong(format!("{wire} is not the size of a page")))
    }
    fn write(self) -> u64 {
        self.bytes()
    }
}

fn check_extent(entry: &IotlbEntry) -> Result<(), InvalidField> {
    match (entry.first_byte, entry.last_byte) {
        (None, None) => Ok(()),
        (Some(first), Some(last)) if first <= last && u64::from(last) < entry.page_bytes.bytes() => Ok(()),
        (Some(first), Some(last)) => {
            Err(wrong_at("last_byte", format!("{first} to {last} are no bytes of the page")))
        }
        _ => Err(wrong_at("last_byte", "comes with first_byte, and not without it")),
    }
}

messages! {
    /// Everything at a glance.
    Topology as GetTopologyResponse {
        /// Version of the server.
        server_version: String,
        /// Milliseconds since it started.
        uptime_ms: u64,
        /// Physical memory.
        memory_bytes: u64,
        /// Of it free.
        memory_free_bytes: u64,
        /// Everybody known.
        owners: Vec<OwnerState>,
        /// Every declared device.
        devices: Vec<DeviceState>,
    };
    /// An owner.
    OwnerState as OwnerState {
        /// Who.
        owner: Owner,
        /// Name in the configuration.
        name: String,
        /// Whether a session is open.
        connected: bool,
        /// Bytes allocated to it.
        memory_bytes: u64,
        /// Live mappings.
        mappings: u64,
        /// Its domains.
        domain_ids: Vec<DomainId>,
    };
    /// A device.
    DeviceState as DeviceState {
        /// Where.
        device: DeviceAddress,
        /// Name in the configuration.
        name: String,
        /// Owner, when it has one.
        owner: Option<Owner>,
        /// Domain that it is attached to, when it is.
        domain_id: Option<DomainId>,
        /// Whether an agent is connected.
        connected: bool,
        /// Generation of its latest session.
        generation: Generation,
        /// DMA operations answered with success.
        operations: u64,
        /// Bytes that it read and wrote.
        bytes: u64,
        /// DMA operations refused by translation.
        faults: u64,
        /// DMA operations refused outside translation.
        refusals: u64,
    };
    /// Whose limits.
    ListLimits as ListLimitsRequest {
        /// Of this owner; `None` for all that the caller may see.
        owner: Option<Owner>,
    };
    /// Limits of owners.
    LimitsList as ListLimitsResponse {
        /// By owner.
        owners: Vec<LimitsOfOwner>,
    };
    /// Limits of an owner.
    LimitsOfOwner as OwnerLimits {
        /// Whose.
        owner: Owner,
        /// Each.
        limits: Vec<LimitState>,
    };
    /// A limit.
    LimitState as LimitState {
        /// Its name, as in `LimitReached`.
        limit: String,
        /// How much is used now; for a rate, how much was done ahead of it.
        used: u64,
        /// How much is allowed.
        allowed: u64,
        /// How often it refused something.
        refused_count: u64,
    };
    /// Which domains.
    ListDomains as ListDomainsRequest {
        /// Of this owner; `None` for all that the caller may see.
        owner: Option<Owner>,
    };
    /// Domains.
    Domains as ListDomainsResponse {
        /// By identifier.
        domains: Vec<DomainState>,
    };
    /// A domain.
    DomainState as DomainState {
        /// Identifier.
        domain_id: DomainId,
        /// Whose.
        owner: Owner,
        /// What was chosen when it was created.
        options: DomainOptions,
        /// The devices attached to it.
        devices: Vec<DeviceAddress>,
        /// Live mappings.
        mappings: u64,
        /// Bytes mapped.
        mapped_bytes: u64,
        /// Bytes of its page tables.
        table_bytes: u64,
        /// Mappings ever made.
        maps: u64,
        /// Mappings ever removed.
        unmaps: u64,
        /// Address ranges that are allocated.
        live_iova_ranges: u64,
        /// Address ranges that are free and kept in magazines.
        cached_iova_ranges: u64,
        /// Address ranges ever allocated.
        iova_allocations: u64,
        /// Nodes that these allocations visited.
        iova_visits: u64,
        /// Unmaps that are answered and wait for their invalidation.
        pending_flushes: u64,
        /// How long the oldest of them has waited, in microseconds; `None` when none waits.
        oldest_pending_us: Option<u64>,
        /// Flushes of waiting unmaps ever made.
        flushes: u64,
        /// Invalidations ever asked for.
        invalidations: u64,
        /// Mappings that are kept and that nobody uses.
        idle_mappings: u64,
        /// Bytes of shadow buffers.
        shadow_bytes: u64,
        /// Bytes ever copied to and from shadow buffers.
        copied_bytes: u64,
        /// Reports of the sanitizer so far, repeated ones included.
        sanitizer_reports: u64,
    };
    /// Which mappings.
    ListMappings as ListMappingsRequest {
        /// Of this domain.
        domain_id: DomainId,
        /// Only those that end above this address.
        from_iova: Iova,
        /// Without so many of those that begin at that very address.
        skip: u32,
        /// At most so many; 0 for as many as fit one message.
        limit: u32,
    };
    /// Mappings.
    Mappings as ListMappingsResponse {
        /// In the order of their addresses.
        mappings: Vec<MappingState>,
        /// Where to go on, when there are more.
        next_iova: Option<Iova>,
        /// How many that begin there are not to come again.
        next_skip: u32,
    };
    /// A mapping.
    MappingState as MappingState {
        /// First address.
        iova: Iova,
        /// Size.
        size_bytes: u64,
        /// Memory behind it.
        gpa: Gpa,
        /// What it allows.
        permissions: Permissions,
        /// The request that made it.
        request_id: RequestId,
    };
    /// What to dump.
    DumpTables as DumpTablesRequest {
        /// The device whose entries are followed.
        device: DeviceAddress,
        /// Root and context entries only.
        without_page_tables: bool,
    };
    /// Entries in the order of the walk.
    DumpedTables as DumpTablesResponse {
        /// A bounded number per message.
        entries: Vec<WalkStep>,
    };
    /// Which entries of the IOTLB.
    DumpIotlb as DumpIotlbRequest {
        /// Only of this domain.
        domain_id: Option<DomainId>,
        /// At most so many; 0 for as many as fit one message.
        limit: u32,
    };
    /// Entries of the IOTLB.
    DumpedIotlb as DumpIotlbResponse {
        /// By domain and address.
        entries: Vec<IotlbEntry>,
        /// How many there are in all.
        total: u64,
        /// How many there can be.
        capacity: u64,
    };
    /// A cached translation.
    IotlbEntry as IotlbEntry {
        /// Domain.
        domain_id: DomainId,
        /// First address of the page.
        iova: Iova,
        /// Size of the page.
        page_bytes: PageSize,
        /// Where it leads.
        hpa: Hpa,
        /// What it allows.
        permissions: Permissions,
        /// First byte of the page that is open, where not the whole page is; with `last_byte`.
        first_byte: Option<u32>,
        /// Last byte of the page that is open.
        last_byte: Option<u32>,
    } check check_extent;
    /// Whose counters.
    GetCounters as GetCountersRequest {
        /// Of the bare machine at this segment; `None` for the managed unit.
        segment: Option<u16>,
    };
    /// Counters since the start of a unit.
    Counters as GetCountersResponse {
        /// IOTLB.
        iotlb: CacheCounters,
        /// Context cache.
        context_cache: CacheCounters,
        /// Paging-structure cache.
        paging_structure_cache: CacheCounters,
        /// Walks begun.
        walks: u64,
        /// Table entries read by walks.
        walk_reads: u64,
        /// Invalidations carried out.
        invalidations: u64,
        /// Of them such that had to wait for DMA in flight.
        drains_waited: u64,
        /// DMA requests refused by translation.
        faults: u64,
        /// Of them written to a recording register.
        faults_recorded: u64,
        /// Of them collapsed into a pending record.
        faults_collapsed: u64,
        /// Of them dropped because the recording registers were full.
        faults_overflowed: u64,
        /// Of them suppressed by FPD.
        faults_suppressed: u64,
        /// Interrupts remapped.
        interrupts: u64,
        /// The rIOMMU beside the unit, where there is one.
        ring: Option<RingCounters>,
    };
    /// Counters of an rIOMMU.
    #[derive(Copy, Default)]
    RingCounters as RingCounters {
        /// Accesses to the slot that the entry of the ring holds.
        hits: u64,
        /// Accesses to the next slot, which the entry held prefetched.
        promotions: u64,
        /// Accesses that walked the tables.
        walks: u64,
        /// Table entries read by walks.
        walk_reads: u64,
        /// Slots read ahead.
        prefetch_reads: u64,
        /// Invalidations carried out, one per ring.
        invalidations: u64,
    };
    /// Counters of a cache.
    #[derive(Copy, Default)]
    CacheCounters as CacheCounters {
        /// Lookups that found a usable entry.
        hits: u64,
        /// Lookups that did not.
        misses: u64,
        /// Entries filled.
        fills: u64,
        /// Entries displaced by a fill.
        evictions: u64,
        /// Fills dropped because an invalidation overtook their walk (I4).
        outdated_fills: u64,
    };
}
