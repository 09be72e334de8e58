//! Bringing the host up: what physical memory is carved into, and what all floors above share.
//!
//! ```text
//! 0                                                            memory end
//! |frame array|mapping records|root table|interrupt table| buffers →    ← page tables |
//! ```

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard};

use iommu_hardware::memory::{FrameArray, MappingRecords, PhysicalMemory};
use iommu_hardware::vtd::interrupt::InterruptTable;
use iommu_hardware::vtd::walk::{RootMode, RootTable};
use iommu_hardware::vtd::{EventMessage, EventSink, Unit, UnitConfig};
use iommu_types::errors::LimitReached;
use iommu_types::{DomainId, Hpa, InvalidCapabilities, Invalidation, Owner, PAGE_SIZE_BYTES};

use crate::account::{OwnerAccount, OwnerLimits};
use crate::contexts::ContextTables;
use crate::frames::{FrameAllocator, FrameRun};
use crate::identifiers::{DomainIds, OwnerTags};
use crate::interrupts::{self, InterruptEntries};
use crate::records::RecordPool;

/// One mapping record per so many bytes of memory.
const MEMORY_BYTES_PER_RECORD: u64 = 1024;
/// Frames that must be left for buffers and tables.
const FRAMES_LEFT_MIN: u64 = 64;
/// Tags below are the frame array's own: free, and the server's.
const FIRST_OWNER_TAG: u32 = 2;

/// Bounds, each with its reason at the constant that the service passes.
#[derive(Clone, Debug)]
pub struct KernelConfig {
    /// The managed unit's caches and ports.
    pub unit: UnitConfig,
    /// Domains at once, over all owners; each partition of the IOTLB has its share, of one at least.
    pub domains_max: u16,
    /// What each owner may hold that has no limits of its own.
    pub owner: OwnerLimits,
    /// Fault records kept per owner.
    pub fault_records_per_owner: u32,
}

/// Why the host did not come up.
#[derive(Debug, thiserror::Error)]
pub enum BootError {
    /// The tables leave no room for buffers.
    #[error("the memory is too small; give at least 1 MiB")]
    MemoryTooSmall,
    /// The unit cannot be built so.
    #[error(transparent)]
    Capabilities(#[from] InvalidCapabilities),
}

/// What all share: memory, the managed unit, the frame allocator and frame array, mapping records, root and context tables, the
/// interrupt remapping table, identifiers. Safe to use from any thread.
pub struct Kernel {
    memory: Arc<PhysicalMemory>,
    unit: Arc<Unit>,
    config: KernelConfig,
    pub(crate) frames: Arc<FrameAllocator>,
    pub(crate) records: RecordPool,
    pub(crate) contexts: ContextTables,
    pub(crate) interrupts: InterruptEntries,
    domain_ids: Mutex<DomainIds>,
    accounts: Mutex<Accounts>,
}

/// The accounts of owners that are there.
struct Accounts {
    by_owner: BTreeMap<Owner, Arc<OwnerAccount>>,
    tags: OwnerTags,
    partitions: u16,
}

impl Accounts {
    /// Opens an account in the partition of the IOTLB that the fewest owners have.
    fn open(&mut self, owner: Owner, limits: OwnerLimits) -> Result<Arc<OwnerAccount>, LimitReached> {
        let tag = self.tags.take()?;
        let owners_in = |partition: &u16| {
            self.by_owner.values().filter(|account| account.iotlb_partition() == *partition).count()
        };
        let partition = (0..self.partitions).min_by_key(owners_in).expect("there is a partition");
        let account = Arc::new(OwnerAccount::new(owner, tag, partition, limits));
        self.by_owner.insert(owner, Arc::clone(&account));
        Ok(account)
    }
}

/// The managed unit needs no event messages: its fault log is read by `FaultLogs::collect`.
struct NoEvents;

impl EventSink for NoEvents {
    fn deliver(&self, _message: EventMessage) {}
}

impl Kernel {
    /// Carves the frame array, the records (one per KiB of memory), the root table and the interrupt table out of memory; turns
    /// translation and interrupt remapping on (a managed unit never runs with TES=0).
    pub fn boot(memory: Arc<PhysicalMemory>, config: KernelConfig) -> Result<Arc<Self>, BootError> {
        let layout = Layout::of(&memory)?;
        let unit = Unit::new(config.unit.clone(), Arc::clone(&memory), Arc::new(NoEvents))?;
        let array = FrameArray::new(Arc::clone(&memory), Hpa::new(0));
        let records = MappingRecords::new(Arc::clone(&memory), layout.records, layout.record_count);
        let extended_mode = config.unit.capabilities.extended_interrupt_mode;
        let kernel = Self {
            frames: Arc::new(FrameAllocator::new(Arc::clone(&memory), array, layout.reserved)),
            records: RecordPool::new(records),
            contexts: ContextTables::new(layout.root_table),
            interrupts: InterruptEntries::new(layout.interrupt_table, extended_mode),
            domain_ids: Mutex::new(DomainIds::new(config.domains_max, config.unit.iotlb_partitions)),
            accounts: Mutex::new(Accounts {
                by_owner: BTreeMap::new(),
                tags: OwnerTags::new(FIRST_OWNER_TAG),
                partitions: config.unit.iotlb_partitions,
            }),
            memory,
            unit,
            config,
        };
        kernel.start_unit(&layout, extended_mode);
        Ok(Arc::new(kernel))
    }
    /// Points the unit at its tables as software does: pointer, global invalidation, then on (VT-d 5.10 §6.6).
    fn start_unit(&self, layout: &Layout, extended_mode: bool) {
        let unit = &self.unit;
        unit.set_root_table(RootTable { base: layout.root_table, mode: RootMode::Legacy });
        let _quiet = unit.invalidate(Invalidation::ContextGlobal).wait_blocking();
        let _quiet = unit.invalidate(Invalidation::IotlbGlobal).wait_blocking();
        let _quiet = unit.set_translation(true).wait_blocking();
        if self.config.unit.capabilities.interrupt_remapping {
            unit.set_interrupt_table(InterruptTable {
                base: layout.interrupt_table,
                entries_log2: interrupts::ENTRIES_LOG2,
                extended_mode,
            });
            let _quiet = unit.invalidate(Invalidation::InterruptGlobal).wait_blocking();
            let _quiet = unit.set_interrupt_remapping(true).wait_blocking();
        }
    }
    /// The managed unit.
    pub fn unit(&self) -> &Arc<Unit> {
        &self.unit
    }
    /// Physical memory.
    pub fn memory(&self) -> &Arc<PhysicalMemory> {
        &self.memory
    }
    /// Bounds as given at boot.
    pub fn config(&self) -> &KernelConfig {
        &self.config
    }
    /// Bytes of physical memory that nobody has.
    pub fn free_bytes(&self) -> u64 {
        self.frames.free_bytes()
    }
    /// Mapping records that no domain has taken.
    pub fn free_records(&self) -> u64 {
        self.records.free_count()
    }
    /// The account of an owner: made at the first call, with the limits that each owner has, and the same at every later one.
    pub fn account(&self, owner: Owner) -> Arc<OwnerAccount> {
        let mut accounts = self.accounts();
        if let Some(account) = accounts.by_owner.get(&owner) {
            return Arc::clone(account);
        }
        accounts.open(owner, self.config.owner).expect("owners without limits of their own are few")
    }
    /// Opens an account with limits of its own. The owner has none yet. Tags run out after 4 billion owners.
    pub fn account_with(&self, owner: Owner, limits: OwnerLimits) -> Result<Arc<OwnerAccount>, LimitReached> {
        let is_new = !self.accounts().by_owner.contains_key(&owner);
        assert!(is_new, "{owner} is forgotten before it gets another account");
        self.accounts().open(owner, limits)
    }
    /// Closes the account of an owner that is gone and holds nothing; `false`, and nothing is done, when it holds something still. Its tag is never
    /// used again.
    #[must_use = "an account that is not empty stays"]
    pub fn forget_account(&self, owner: Owner) -> bool {
        let account = self.accounts().by_owner.get(&owner).map(Arc::clone);
        let Some(account) = account else { return true };
        if !account.is_empty() {
            return false;
        }
        self.accounts().by_owner.remove(&owner);
        self.interrupts.forget(owner);
        true
    }
    fn accounts(&self) -> MutexGuard<'_, Accounts> {
        self.accounts.lock().expect("nothing panics while it holds the accounts")
    }
    /// An identifier that no domain has, in the owner's partition of the IOTLB.
    pub(crate) fn take_domain_id(&self, account: &OwnerAccount) -> Result<DomainId, LimitReached> {
        self.domain_ids().take(account.iotlb_partition())
    }
    /// Takes an identifier back. Everything cached under it must be flushed and drained.
    pub(crate) fn return_domain_id(&self, id: DomainId) {
        self.domain_ids().put(id);
    }
    fn domain_ids(&self) -> MutexGuard<'_, DomainIds> {
        self.domain_ids.lock().expect("nothing panics while it holds the identifiers")
    }
}

impl std::fmt::Debug for Kernel {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Kernel").field("free_bytes", &self.free_bytes()).finish_non_exhaustive()
    }
}

/// Where everything fixed lies.
struct Layout {
    records: Hpa,
    record_count: u32,
    root_table: Hpa,
    interrupt_table: Hpa,
    reserved: FrameRun,
}

impl Layout {
    fn of(memory: &PhysicalMemory) -> Result<Self, BootError> {
        let first = memory.ranges().first().copied().ok_or(BootError::MemoryTooSmall)?;
        assert!(first.base() == Hpa::new(0), "physical memory begins at address 0");
        // On a large host the records would outgrow the memory below 4 GiB: they get a quarter of it at most.
        let fitting = first.size_bytes() / 4 / MappingRecords::RECORD_BYTES;
        let record_count = (memory.size_bytes() / MEMORY_BYTES_PER_RECORD).min(fitting);
        let record_count = u32::try_from(record_count).unwrap_or(u32::MAX);
        let mut end = 0;
        let mut carve = |bytes: u64, alignment: u64| {
            let at = u64::next_multiple_of(end, alignment);
            end = at + bytes;
            Hpa::new(at)
        };
        carve(FrameArray::bytes_needed(memory), PAGE_SIZE_BYTES);
        let records = carve(u64::from(record_count) * MappingRecords::RECORD_BYTES, PAGE_SIZE_BYTES);
        let root_table = carve(PAGE_SIZE_BYTES, PAGE_SIZE_BYTES);
        let interrupt_table = carve(interrupts::TABLE_BYTES, interrupts::TABLE_BYTES);
        let frames = end.div_ceil(PAGE_SIZE_BYTES);
        if frames + FRAMES_LEFT_MIN > first.size_bytes() / PAGE_SIZE_BYTES {
            return Err(BootError::MemoryTooSmall);
        }
        let reserved = FrameRun { base: Hpa::new(0), frames };
        Ok(Self { records, record_count, root_table, interrupt_table, reserved })
    }
}
