//! Creating a domain, emptying it, destroying it.

use std::collections::BTreeMap;
use std::sync::Arc;

use iommu_hardware::drain::{Drained, PendingDrain};
use iommu_types::errors::{CreateDomainError, InvalidField};
use iommu_types::{
    AddressWidths, Capabilities, DmaLimits, DomainOptions, Invalidation, Iova, IovaRange, MappingGranularity,
    Protection,
};

use super::bounce::Shadows;
use super::flush::FlushQueue;
use super::identity::IdentityPages;
use super::ledger::Ledger;
use super::request::Tick;
use super::ring::RingTables;
use super::scatter::Groups;
use super::table::Tables;
use super::undone::{IovaUse, PendingUnmap, Remains, Revoked, Undone, Unfinished};
use super::{Domain, DomainCounters, Mode, RangeMapping, Shortage};
use crate::account::OwnerAccount;
use crate::boot::Kernel;
use crate::iova::IovaAllocator;

impl Kernel {
    /// An empty domain. The choices must [make sense](DomainOptions::check), and the unit must support the width.
    pub fn create_domain(
        &self,
        account: &Arc<OwnerAccount>,
        options: DomainOptions,
    ) -> Result<Domain, CreateDomainError> {
        options.check()?;
        let levels = levels(self.unit().capabilities(), options.width_bits)?;
        account.domains.charge(1)?;
        let id = self.take_domain_id(account).inspect_err(|_| account.domains.refund(1))?;
        let (tables, mode) = self.make_mode(account, options, levels).map_err(|shortage| {
            self.return_domain_id(id);
            account.domains.refund(1);
            match shortage {
                Shortage::Limit(limit) => CreateDomainError::from(limit),
                Shortage::Memory(memory) => memory.into(),
            }
        })?;
        let mut domain = Domain {
            id,
            account: Arc::clone(account),
            options,
            limits: DmaLimits::default(),
            mode,
            tables,
            iovas: IovaAllocator::new(options.allocator, options.width_bits),
            ranges: BTreeMap::new(),
            ledger: Ledger::default(),
            groups: Groups::default(),
            unfinished: Unfinished::default(),
            evicted: Vec::new(),
            kept_records: Vec::new(),
            counters: DomainCounters::default(),
            extents: Vec::new(),
            invalidated: Vec::new(),
            sanitizer: None,
            ring_sources: Vec::new(),
        };
        if options.sanitizer {
            domain.make_sanitizer();
        }
        Ok(domain)
    }
    fn make_mode(
        &self,
        account: &OwnerAccount,
        options: DomainOptions,
        levels: u8,
    ) -> Result<(Tables, Mode), Shortage> {
        if let Protection::Ring(rings) = options.protection {
            return Ok((Tables::none(), Mode::Ring(RingTables::new(self, account, rings)?)));
        }
        let has_extents = options.granularity == MappingGranularity::Byte;
        let tables = Tables::new(self, account, levels, has_extents)?;
        let mode = match options.protection {
            Protection::Strict | Protection::Ring(_) => Mode::Strict,
            Protection::Passthrough => Mode::Passthrough,
            Protection::Deferred(deferral) => Mode::Deferred(FlushQueue::new(deferral)),
            Protection::Shared => Mode::Identity(IdentityPages::new(None)),
            Protection::Persistent(quota) => Mode::Identity(IdentityPages::new(Some(quota))),
            Protection::Bounce(pool) => Mode::Bounce(Shadows::new(pool)),
        };
        Ok((tables, mode))
    }
    /// Destroys a domain that no source is attached to. Everything is unmapped and flushed; `finish` frees the rest after the drain, and
    /// only then may another domain get the identifier.
    pub fn destroy_domain(&self, domain: Domain) -> PendingDestroy {
        let mut domain = domain;
        let (drain, undone) = domain.revoke_all(self).split();
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
        if let Mode::Ring(rings) = &mut domain.mode {
            rings.destroy(kernel, &domain.account);
        }
        kernel.records.put_all(&mut domain.kept_records);
        domain.account.domains.refund(1);
        kernel.return_domain_id(domain.id);
    }
}

impl Domain {
    /// Removes every mapping, and takes over every unmap that was begun and not finished. Finishing one of those later does
    /// nothing.
    pub fn unmap_all(&mut self, kernel: &Kernel, now: Tick) -> PendingUnmap {
        let pending = self.revoke_all(kernel);
        self.tell_all_unmapped(now);
        pending
    }
    fn revoke_all(&mut self, kernel: &Kernel) -> PendingUnmap {
        let mut remains = self.unfinished.fresh();
        self.revoke_groups(kernel, &mut remains);
        for (first, mapping) in std::mem::take(&mut self.ranges) {
            let RangeMapping { pages, record, is_fixed } = mapping;
            let size_bytes = kernel.records.records().get(record).1.size_bytes;
            let iova = match is_fixed {
                true if self.is_passthrough() => IovaUse::Own,
                true => IovaUse::Fixed,
                false => IovaUse::Allocated(0),
            };
            self.revoke(kernel, Revoked { first, pages, record, size_bytes, iova }, &mut remains);
        }
        for (first, record) in self.tables.slots_from(0, usize::MAX) {
            let (_, facts) = kernel.records.records().get(record);
            let size_bytes = facts.size_bytes;
            let range = IovaRange::new(Iova::new(facts.iova), size_bytes).expect("a record of ours");
            let (pages, iova) = (range.pages_touched(), IovaUse::Allocated(0));
            self.tables.clear_slot(first);
            self.revoke(kernel, Revoked { first, pages, record, size_bytes, iova }, &mut remains);
        }
        self.revoke_open(kernel, &mut remains);
        self.unfinished.take_all(&mut remains);
        // Page by page would be longer than everything at once.
        self.invalidated.clear();
        if let Mode::Ring(_) = self.mode {
            return self.invalidate_rings(kernel, remains);
        }
        self.invalidate_domain(kernel, remains)
    }
    /// Revokes what the mode has opened by its own rules.
    fn revoke_open(&mut self, kernel: &Kernel, remains: &mut Remains) {
        for record in self.ledger.take_all() {
            let size_bytes = kernel.records.records().get(record).1.size_bytes;
            self.revoke_record(kernel, record, size_bytes, remains);
        }
        match &mut self.mode {
            Mode::Strict | Mode::Passthrough => {}
            Mode::Deferred(queue) => remains.append(&mut queue.take()),
            Mode::Identity(pages) => {
                for page in pages.take_all() {
                    self.close_page(kernel, page, remains);
                }
            }
            Mode::Bounce(_) => self.revoke_shadows(kernel, remains),
            Mode::Ring(_) => self.revoke_slots(kernel, remains),
        }
    }
}
