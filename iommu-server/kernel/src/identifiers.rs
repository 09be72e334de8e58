//! Numbers that are handed out: domain identifiers, and the tags of owners.
//!
//! The IOTLB is cut into partitions, and the number of a domain, modulo the partitions, says in which its translations stand. So an owner is
//! given a partition, and its domains numbers of that partition: domains of owners in different partitions displace nothing of each
//! other (I7). When the numbers of its partition are used up, because other owners have it too and many domains, it gets some of another: a share of the cache is
//! worth less than a domain.

use iommu_types::DomainId;
use iommu_types::errors::LimitReached;

/// Domain identifiers from 1 to `domains_max`, by partition. 0 is never used (VT-d 5.10 §9.3 reserves it when CM=1).
#[derive(Debug)]
pub(crate) struct DomainIds {
    domains_max: u16,
    partitions: Vec<Numbers>,
}

/// The identifiers of one partition.
#[derive(Debug)]
struct Numbers {
    /// The least that was never handed out.
    next: u32,
    returned: Vec<DomainId>,
}

impl Numbers {
    /// How many nobody has.
    fn left(&self, step: u32, last: u32) -> u32 {
        let fresh = if self.next > last { 0 } else { (last - self.next) / step + 1 };
        self.returned.len() as u32 + fresh
    }
    /// One that nobody has.
    fn take(&mut self, step: u32, last: u32) -> Option<DomainId> {
        if let Some(id) = self.returned.pop() {
            return Some(id);
        }
        let id = u16::try_from(self.next).ok().filter(|_| self.next <= last)?;
        self.next += step;
        Some(DomainId::new(id))
    }
}

impl DomainIds {
    /// All are free. There is an identifier for each partition.
    pub(crate) fn new(domains_max: u16, partitions: u16) -> Self {
        assert!(
            (1..=domains_max).contains(&partitions),
            "{domains_max} domains are too few for {partitions} partitions"
        );
        let first = |partition: u16| if partition == 0 { partitions } else { partition };
        let numbers = |partition| Numbers { next: first(partition).into(), returned: Vec::new() };
        Self { domains_max, partitions: (0..partitions).map(numbers).collect() }
    }
    /// How many partitions there are.
    pub(crate) fn partitions(&self) -> u16 {
        self.partitions.len() as u16
    }
    /// An identifier that no domain has: of this partition, or of the one that has most left.
    pub(crate) fn take(&mut self, partition: u16) -> Result<DomainId, LimitReached> {
        let (step, last) = (u32::from(self.partitions()), u32::from(self.domains_max));
        let own = &mut self.partitions[usize::from(partition)];
        let numbers = match own.left(step, last) {
            0 => self.partitions.iter_mut().max_by_key(|numbers| numbers.left(step, last)),
            _ => Some(own),
        };
        let reached = || LimitReached { limit: "domains".to_owned(), allowed: last.into() };
        numbers.and_then(|numbers| numbers.take(step, last)).ok_or_else(reached)
    }
    /// Takes an identifier back. Everything cached under it must be flushed and drained.
    pub(crate) fn put(&mut self, id: DomainId) {
        let partition = id.get() % self.partitions();
        self.partitions[usize::from(partition)].returned.push(id);
    }
}

/// Tags of owners, each handed out once for ever: a frame that still carries the tag of an owner that is gone is nobody's.
#[derive(Debug)]
pub(crate) struct OwnerTags {
    next: u32,
}

impl OwnerTags {
    /// Tags from `first` on.
    pub(crate) fn new(first: u32) -> Self {
        Self { next: first }
    }
    /// A tag that nobody ever had.
    pub(crate) fn take(&mut self) -> Result<u32, LimitReached> {
        let reached = || LimitReached { limit: "owner_tags".to_owned(), allowed: u32::MAX.into() };
        let tag = self.next;
        self.next = tag.checked_add(1).ok_or_else(reached)?;
        Ok(tag)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn identifiers_are_of_their_partition_as_long_as_it_has_some_and_run_out_by_name() {
        for (domains_max, partitions) in [(1, 1), (7, 1), (8, 4), (11, 4), (u16::MAX, 128), (4, 4)] {
            let mut ids = DomainIds::new(domains_max, partitions);
            let expected: Vec<DomainId> = (1..=domains_max).map(DomainId::new).collect();
            for partition in 0..partitions {
                let is_own = |id: &DomainId| id.get() % partitions == partition;
                let own = expected.iter().filter(|id| is_own(id)).count();
                let mut all: Vec<DomainId> = std::iter::from_fn(|| ids.take(partition).ok()).collect();
                assert!(all[..own].iter().all(is_own), "{domains_max} in {partitions}: its own first");
                let refused = ids.take(partition).expect_err("all are taken");
                assert_eq!((refused.limit.as_str(), refused.allowed), ("domains", domains_max.into()));
                // What is given back is in its own partition again.
                for id in &all {
                    ids.put(*id);
                }
                all.sort_unstable();
                assert_eq!(all, expected, "{domains_max} in {partitions}");
            }
        }
    }

    #[test]
    fn tags_run_out_by_name_and_none_comes_twice() {
        let mut tags = OwnerTags::new(u32::MAX - 2);
        assert_eq!((tags.take(), tags.take()), (Ok(u32::MAX - 2), Ok(u32::MAX - 1)));
        for _ in 0..3 {
            assert_eq!(tags.take().map_err(|error| error.limit), Err("owner_tags".to_owned()));
        }
    }
}
