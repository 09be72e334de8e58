//! Creating a domain, emptying it, destroying it.

use std::collections::BTreeMap;
use std::sync::Arc;

use iommu_hardware::drain::{Drained, PendingDrain};
use iommu_types::errors::{CreateDomainError, InvalidField};
use iommu_types::{AddressWidths, Capabilities, Invalidation, Iova, IovaAllocation, IovaRange, Protection};

use super::table::Tables;
use super::undone::{PendingUnmap, Revoked, Undone, Unfinished};
use super::{Domain, DomainCounters, RangeMapping, Shortage};
use crate::account::OwnerAccount;
use crate::boot::Kernel;
use crate::iova::IovaAllocator;

impl Kernel {
    /// An empty domain. `width_bits` is 39, 48 or 57, as the unit supports it.
    pub fn create_domain(
        &self,
        account: &Arc<OwnerAccount>,
        protection: Protection,
        width_bits: u8,
    ) -> Result<Domain, CreateDomainError> {
        let levels = levels(self.unit().capabilities(), width_bits)?;
        account.domains.charge(1)?;
        let id = self.take_domain_id().inspect_err(|_| account.domains.refund(1))?;
        let tables = Tables::new(self, account, levels).map_err(|shortage| {
            self.return_domain_id(id);
            account.domains.refund(1);
            match shortage {
                Shortage::Limit(limit) => CreateDomainError::from(limit),
                Shortage::Memory(memory) => memory.into(),
            }
        })?;
        Ok(Domain {
            id,
            account: Arc::clone(account),
            protection,
            width_bits,
            tables,
            iovas: IovaAllocator::new(IovaAllocation::Cached, width_bits),
            ranges: BTreeMap::new(),
            unfinished: Unfinished::default(),
            kept_records: Vec::new(),
            counters: DomainCounters::default(),
            extents: Vec::new(),
            invalidated: Vec::new(),
        })
    }
    /// Destroys a domain that no source is attached to. Everything is unmapped and flushed; `finish` frees the rest after the drain, and
    /// only then may another domain get the identifier.
    pub fn destroy_domain(&self, domain: Domain) -> PendingDestroy {
        let mut domain = domain;
        let (drain, undone) = domain.unmap_all(self).split();
        let flush = self.unit().invalidate(Invalidation::IotlbDomain(domain.id));
        PendingDestroy { drain: drain.and(flush), domain, undone }
    }
}

fn levels(capabilities: &Capabilities, width_bits: u8) -> Result<u8, InvalidField> {
    let refuse = |why: &str| Err(InvalidField { field: "width_bits".to_owned(), why: why.to_owned() });
    let (width, levels) = match width_bits {
        39 => (AddressWidths::BITS_39, 3),
        48 => (AddressWidths::BITS_48, 4),
        57 => (AddressWidths::BITS_57, 5),
        _ => return refuse("must be 39, 48 or 57"),
    };
    if !capabilities.widths.contains(width) || width_bits > capabilities.max_guest_width_bits {
        return refuse("the unit does not support this width");
    }
    Ok(levels)
}

/// A domain that is empty and not yet quiet.
#[must_use = "tables and identifier stay taken until finish"]
#[derive(Debug)]
pub struct PendingDestroy {
    /// What has to be quiet first.
    pub drain: PendingDrain,
    domain: Domain,
    undone: Undone,
}

impl PendingDestroy {
    /// Takes the drain out, to be awaited; `finish` comes after.
    pub fn take_drain(&mut self) -> PendingDrain {
        std::mem::replace(&mut self.drain, PendingDrain::none())
    }
    /// Frees tables, records, pins and identifier, after the drain.
    pub fn finish(self, kernel: &Kernel, drained: Drained) {
        let Self { mut domain, undone, .. } = self;
        domain.finish_unmap(kernel, undone, drained);
        domain.tables.destroy(kernel, &domain.account);
        kernel.records.put_all(&mut domain.kept_records);
        domain.account.domains.refund(1);
        kernel.return_domain_id(domain.id);
    }
}

impl Domain {
    /// Removes every mapping, and takes over every unmap that was begun and not finished. Finishing one of those later does
    /// nothing.
    pub fn unmap_all(&mut self, kernel: &Kernel) -> PendingUnmap {
        let mut remains = self.unfinished.fresh();
        for (first, mapping) in std::mem::take(&mut self.ranges) {
            let RangeMapping { pages, record, is_fixed } = mapping;
            let size_bytes = kernel.records.records().get(record).1.size_bytes;
            self.revoke(kernel, Revoked { first, pages, record, size_bytes, is_fixed }, &mut remains);
        }
        for (first, record) in self.tables.slots_from(0, usize::MAX) {
            let (_, facts) = kernel.records.records().get(record);
            let size_bytes = facts.size_bytes;
            let range = IovaRange::new(Iova::new(facts.iova), size_bytes).expect("a record of ours");
            let pages = range.pages_touched();
            self.tables.clear_slot(first);
            self.revoke(kernel, Revoked { first, pages, record, size_bytes, is_fixed: false }, &mut remains);
        }
        self.unfinished.take_all(&mut remains);
        // Page by page would be longer than everything at once.
        self.invalidated.clear();
        self.settle_all(kernel, remains)
    }
}
