//! What each owner holds, compared with what it may hold (I7).
//!
//! One account per owner, shared by its memory, its domains and its interrupts. Counters are atomics: the
//! owner's objects are locked one by one, the account is not locked at all. A charge that would go over its limit changes
//! nothing and names the limit.

use std::sync::atomic::{AtomicU64, Ordering};

use iommu_types::Owner;
use iommu_types::errors::LimitReached;

/// Limits of one owner.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OwnerLimits {
    /// `domains_per_owner`: domains at once.
    pub domains: u32,
    /// `mappings_per_owner`: mappings at once over all domains.
    pub mappings: u64,
    /// `mapped_bytes_per_owner`: bytes mapped at once; a byte mapped twice counts twice.
    pub mapped_bytes: u64,
    /// `memory_bytes_per_owner`: bytes of memory. Half of it bounds the page tables of the owner's domains
    /// (`table_bytes_per_owner`), so that sparse mappings cannot use up the memory of others.
    pub memory_bytes: u64,
    /// `interrupts_per_owner`: interrupt remapping entries.
    pub interrupts: u32,
}

/// A limit, and how it stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LimitUsage {
    /// Its name, as in [`LimitReached`].
    pub limit: &'static str,
    /// How much is used now.
    pub used: u64,
    /// How much is allowed.
    pub allowed: u64,
    /// How often it refused something.
    pub refused: u64,
}

/// A count with a limit.
#[derive(Debug)]
pub(crate) struct Counter {
    used: AtomicU64,
    refused: AtomicU64,
    allowed: u64,
    limit: &'static str,
}

impl Counter {
    fn new(limit: &'static str, allowed: u64) -> Self {
        Self { used: AtomicU64::new(0), refused: AtomicU64::new(0), allowed, limit }
    }
    /// Charges `amount`, or changes nothing and names the limit.
    pub(crate) fn charge(&self, amount: u64) -> Result<(), LimitReached> {
        let within = |used: u64| used.checked_add(amount).filter(|sum| *sum <= self.allowed);
        match self.used.fetch_update(Ordering::Relaxed, Ordering::Relaxed, within) {
            Ok(_) => Ok(()),
            Err(_) => {
                self.refused.fetch_add(1, Ordering::Relaxed);
                Err(LimitReached { limit: self.limit.to_owned(), allowed: self.allowed })
            }
        }
    }
    /// Takes back what was charged.
    pub(crate) fn refund(&self, amount: u64) {
        let before = self.used.fetch_sub(amount, Ordering::Relaxed);
        assert!(before >= amount, "{} was refunded more than was charged", self.limit);
    }
    fn usage(&self) -> LimitUsage {
        let refused = self.refused.load(Ordering::Relaxed);
        LimitUsage { limit: self.limit, used: self.used(), allowed: self.allowed, refused }
    }
    pub(crate) fn used(&self) -> u64 {
        self.used.load(Ordering::Relaxed)
    }
}

/// Counters of one owner, compared with its limits.
#[derive(Debug)]
pub struct OwnerAccount {
    owner: Owner,
    tag: u32,
    partition: u16,
    limits: OwnerLimits,
    pub(crate) domains: Counter,
    pub(crate) mappings: Counter,
    pub(crate) mapped: Counter,
    pub(crate) memory: Counter,
    pub(crate) tables: Counter,
    pub(crate) interrupts: Counter,
}

impl OwnerAccount {
    pub(crate) fn new(owner: Owner, tag: u32, partition: u16, limits: OwnerLimits) -> Self {
        Self {
            owner,
            tag,
            partition,
            limits,
            domains: Counter::new("domains_per_owner", limits.domains.into()),
            mappings: Counter::new("mappings_per_owner", limits.mappings),
            mapped: Counter::new("mapped_bytes_per_owner", limits.mapped_bytes),
            memory: Counter::new("memory_bytes_per_owner", limits.memory_bytes),
            tables: Counter::new("table_bytes_per_owner", limits.memory_bytes / 2),
            interrupts: Counter::new("interrupts_per_owner", limits.interrupts.into()),
        }
    }
    /// Every limit, with how it stands.
    pub fn usage(&self) -> Vec<LimitUsage> {
        let all = [&self.domains, &self.mappings, &self.mapped, &self.memory, &self.tables, &self.interrupts];
        all.into_iter().map(Counter::usage).collect()
    }
    /// Whose account it is.
    pub fn owner(&self) -> Owner {
        self.owner
    }
    /// The owner's number in the frame array, in mapping records and as the destination of its interrupts: 2 and up.
    pub fn tag(&self) -> u32 {
        self.tag
    }
    /// The partition of the IOTLB that its domains are in.
    pub fn iotlb_partition(&self) -> u16 {
        self.partition
    }
    /// What it may hold.
    pub fn limits(&self) -> OwnerLimits {
        self.limits
    }
    /// Whether it holds nothing at all, nothing included that is on its way out.
    pub fn is_empty(&self) -> bool {
        let Self { domains, mappings, mapped, memory, tables, interrupts, .. } = self;
        [domains, mappings, mapped, memory, tables, interrupts].iter().all(|counter| counter.used() == 0)
    }
    /// Domains that exist, those included whose destruction is not finished.
    pub fn domains(&self) -> u64 {
        self.domains.used()
    }
    /// Bytes of buffers.
    pub fn memory_bytes(&self) -> u64 {
        self.memory.used()
    }
    /// Mappings, those included whose unmap is not finished.
    pub fn mappings(&self) -> u64 {
        self.mappings.used()
    }
    /// Bytes mapped, those included whose unmap is not finished.
    pub fn mapped_bytes(&self) -> u64 {
        self.mapped.used()
    }
    /// Bytes of page tables of the owner's domains, spare ones included.
    pub fn table_bytes(&self) -> u64 {
        self.tables.used()
    }
    /// Interrupt remapping entries.
    pub fn interrupts(&self) -> u64 {
        self.interrupts.used()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn i7_a_charge_over_the_limit_changes_nothing_and_names_the_limit() {
        let counter = Counter::new("things", 10);
        counter.charge(7).expect("within");
        for amount in [4, u64::MAX] {
            assert_eq!(counter.charge(amount), Err(LimitReached { limit: "things".to_owned(), allowed: 10 }));
            assert_eq!(counter.used(), 7);
        }
        counter.charge(3).expect("exactly at the limit");
        counter.refund(10);
        assert_eq!(counter.used(), 0);
    }
}
