//! Root and context tables: which source translates through which domain.
//!
//! **Architecture invariant (I5):** a source has one context entry and so at most one domain. `attach` asserts that the entry is not
//! present; changing a domain is detach, drain, attach. A context table is made at the first attach on its
//! bus and stays.

use std::sync::{Mutex, MutexGuard};

use iommu_hardware::drain::PendingDrain;
use iommu_hardware::memory::PhysicalMemory;
use iommu_hardware::riommu;
use iommu_hardware::riommu::spec::{RingDevice, RingRoot};
use iommu_hardware::vtd::spec::root_context::{self, ContextEntry, RootEntry};
use iommu_types::errors::OutOfMemory;
use iommu_types::{FunctionMask, Hpa, Invalidation, SourceId};

use crate::boot::Kernel;
use crate::domain::Domain;

/// The root table. The lock orders writers; the hardware walks without it.
pub(crate) struct ContextTables {
    root: Mutex<Hpa>,
    /// The root of the ring unit, once a source is behind it.
    ring_root: Mutex<Option<Hpa>>,
}

impl ContextTables {
    pub(crate) fn new(root: Hpa) -> Self {
        Self { root: Mutex::new(root), ring_root: Mutex::new(None) }
    }
}

impl ContextTables {
    fn lock_ring_root(&self) -> MutexGuard<'_, Option<Hpa>> {
        self.ring_root.lock().expect("nothing panics while it holds the ring unit's root")
    }
}

impl Kernel {
    /// Writes the context entry (I5). A source that is attached elsewhere must be detached and drained first. Nothing is invalidated:
    /// what was not present was not cached (I3).
    pub fn attach(&self, source: SourceId, domain: &mut Domain) -> Result<(), OutOfMemory> {
        if let Some((rings, count)) = domain.ring_array() {
            self.attach_rings(source, rings, count)?;
            domain.add_ring_source(source);
            return Ok(());
        }
        let root = self.contexts.root.lock().expect("nothing panics while it holds the root table");
        let root_entry = entry_at(root_context::entry_address(*root, source.bus()));
        let mut table = RootEntry::from_bits(load(self.memory(), root_entry));
        if !table.is_present() {
            table = RootEntry::present(self.frames.allocate_table()?);
            store(self.memory(), root_entry, table.into_bits());
        }
        let at = entry_at(root_context::entry_address(table.context_table(), source.devfn()));
        let before = ContextEntry::from_bits(load(self.memory(), at));
        assert!(!before.is_present(), "I5: {source} is attached to {} already", before.domain_id());
        let (top, levels) = domain.top_table();
        store(self.memory(), at, ContextEntry::second_stage(top, levels, domain.id()).into_bits());
        Ok(())
    }
    /// Detaches a source from the domain that it is attached to; after the drain, [`Domain::forget_source`] ends it. Until then, the domain's own
    /// drains wait for the source as well.
    ///
    /// Clears the context entry; invalidates the context device-selective and the IOTLB domain-selective (VT-d 5.10 §6.5).
    pub fn detach(&self, source: SourceId, domain: &mut Domain) -> PendingDrain {
        if domain.ring_array().is_some() {
            return self.detach_rings(source);
        }
        let domain_id = domain.id();
        {
            let root = self.contexts.root.lock().expect("nothing panics while it holds the root table");
            let root_entry = entry_at(root_context::entry_address(*root, source.bus()));
            let table = RootEntry::from_bits(load(self.memory(), root_entry));
            assert!(table.is_present(), "{source} was attached before it is detached");
            let at = entry_at(root_context::entry_address(table.context_table(), source.devfn()));
            let entry = ContextEntry::from_bits(load(self.memory(), at));
            assert!(
                entry.is_present() && entry.domain_id() == domain_id,
                "{source} is detached from the domain it is attached to"
            );
            store(self.memory(), at, 0);
        }
        let function_mask = FunctionMask::Exact;
        let context = Invalidation::ContextDevice { domain_id, source_id: source, function_mask };
        self.unit().invalidate(context).and(self.unit().invalidate(Invalidation::IotlbDomain(domain_id)))
    }
}

impl Kernel {
    /// Puts a source behind the ring unit, with these rings. A device table is made at the first attach on its bus, the root at the first
    /// of all, and they stay.
    fn attach_rings(&self, source: SourceId, rings: Hpa, count: u16) -> Result<(), OutOfMemory> {
        let mut ring_root = self.contexts.lock_ring_root();
        let root = match *ring_root {
            Some(root) => root,
            None => {
                let root = self.frames.allocate_table()?;
                self.unit().set_ring_root(root);
                *ring_root.insert(root)
            }
        };
        let root_entry = ring_entry_at(root, source.bus());
        let mut table = RingRoot::from_bits(load(self.memory(), root_entry));
        if !table.is_present() {
            table = RingRoot::present(self.frames.allocate_table()?);
            store(self.memory(), root_entry, table.into_bits());
        }
        let at = ring_entry_at(table.device_table(), source.devfn());
        let before = RingDevice::from_bits(load(self.memory(), at));
        assert!(!before.is_present(), "I5: {source} has rings already");
        store(self.memory(), at, RingDevice::with_rings_at(rings, count).into_bits());
        // It is attached to nothing until now, and what it is refused meanwhile is not cached: there is nothing to wait for.
        let _drain = self.unit().set_behind_rings(source, Some(count));
        Ok(())
    }
    /// Puts a source behind the VT-d unit again, where it is attached to nothing.
    fn detach_rings(&self, source: SourceId) -> PendingDrain {
        let ring_root = self.contexts.lock_ring_root();
        let root = ring_root.expect("a source behind the ring unit was attached there");
        let table = RingRoot::from_bits(load(self.memory(), ring_entry_at(root, source.bus())));
        assert!(table.is_present(), "{source} was attached before it is detached");
        store(self.memory(), ring_entry_at(table.device_table(), source.devfn()), 0);
        self.unit().set_behind_rings(source, None)
    }
}

fn ring_entry_at(table: Hpa, index: u8) -> Hpa {
    riommu::spec::entry_address(table, index.into()).expect("tables of ours lie in memory")
}

fn entry_at(address: Option<Hpa>) -> Hpa {
    address.expect("tables of ours lie in memory")
}

fn load(memory: &PhysicalMemory, at: Hpa) -> u128 {
    memory.load_u128(at).expect("tables of ours lie in memory")
}

fn store(memory: &PhysicalMemory, at: Hpa, bits: u128) {
    memory.store_u128(at, bits).expect("tables of ours lie in memory");
}
