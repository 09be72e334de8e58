//! Addresses that are the memory's own: passthrough, shared and persistent domains.
//!
//! A page is open or it is not, whoever uses it. In a *shared* domain it is counted: the first user opens it, the last one closes
//! it. In a *persistent* domain the last user leaves it open for the next, and the least recently used page is closed when the quota
//! is reached. A page that is open for more than one user allows what any of them asked for: permissions, and with byte granularity the
//! span of bytes, only grow until it is closed. Growing needs no invalidation: what is cached allows too little, and then the tables are
//! walked again.
//!
//! In a *passthrough* domain all pages are open all the time ([`direct`](super::direct)).

use std::collections::{BTreeMap, HashMap};

use iommu_hardware::memory::{MappingRecord, RecordIndex};
use iommu_hardware::vtd::spec::extent::ByteExtent;
use iommu_types::errors::{BeyondWidth, DmaMapError, LimitReached};
use iommu_types::{GpaRange, Iova, IovaRange, PAGE_SIZE_BYTES, PageSize, Permissions, PersistentQuota};

use super::dma_api::pages_of;
use super::ledger::PER_ADDRESS_MAX;
use super::request::DmaMap;
use super::table::Extent;
use super::undone::Remains;
use super::{Domain, Mode};
use crate::boot::Kernel;
use crate::frames::frame_at;
use crate::owner_memory::OwnerMemory;

/// The pages that are open.
#[derive(Debug)]
pub(super) struct IdentityPages {
    /// `None`: a page is closed when its last user leaves.
    quota: Option<PersistentQuota>,
    pages: HashMap<u64, Page>,
    /// Pages without a user, the one longest without first.
    idle: BTreeMap<u64, u64>,
    /// Counts the pages that became idle.
    clock: u64,
}

#[derive(Clone, Copy, Debug)]
struct Page {
    users: u32,
    permissions: Permissions,
    extent: ByteExtent,
    /// Its key among the idle ones, while it has no user.
    idle_since: u64,
}

impl IdentityPages {
    pub(super) fn new(quota: Option<PersistentQuota>) -> Self {
        Self { quota, pages: HashMap::new(), idle: BTreeMap::new(), clock: 0 }
    }
    pub(super) fn idle_count(&self) -> u64 {
        self.idle.len() as u64
    }
    /// Takes all pages out.
    pub(super) fn take_all(&mut self) -> Vec<u64> {
        self.idle.clear();
        let mut pages: Vec<u64> = std::mem::take(&mut self.pages).into_keys().collect();
        pages.sort_unstable();
        pages
    }
    /// How many idle pages must go before `missing` more can be opened; `None` when there are not so many.
    fn excess(&self, missing: u64, reused_idle: u64) -> Option<u64> {
        let Some(PersistentQuota { pages_max }) = self.quota else { return Some(0) };
        let excess = (self.pages.len() as u64 + missing).saturating_sub(pages_max.into());
        (excess + reused_idle <= self.idle_count()).then_some(excess)
    }
    /// One more user of a page. Whether its entry has to be written again: it allows more than before.
    fn enter(&mut self, page: u64, permissions: Permissions, extent: ByteExtent) -> Option<Page> {
        let known = self.pages.get_mut(&page)?;
        if known.users == 0 {
            self.idle.remove(&known.idle_since);
        }
        known.users += 1;
        let before = (known.permissions, known.extent);
        known.permissions |= permissions;
        known.extent = known.extent.hull(extent);
        ((known.permissions, known.extent) != before).then_some(*known)
    }
    fn open(&mut self, page: u64, permissions: Permissions, extent: ByteExtent) {
        let fresh = Page { users: 1, permissions, extent, idle_since: 0 };
        let before = self.pages.insert(page, fresh);
        assert!(before.is_none(), "a page is opened once");
    }
    /// One user less. Whether the page is to be closed.
    fn leave(&mut self, page: u64) -> bool {
        let known = self.pages.get_mut(&page).expect("a page that is left is open");
        known.users -= 1;
        if known.users > 0 {
            return false;
        }
        if self.quota.is_none() {
            self.pages.remove(&page);
            return true;
        }
        self.clock += 1;
        known.idle_since = self.clock;
        self.idle.insert(self.clock, page);
        false
    }
    /// Takes out idle pages: those of which `is_meant`, the one longest idle first, so many at most.
    fn evict(&mut self, limit: usize, is_meant: impl Fn(u64) -> bool) -> Vec<u64> {
        let meant = |(_, page): &(&u64, &u64)| is_meant(**page);
        let chosen: Vec<(u64, u64)> =
            self.idle.iter().filter(meant).take(limit).map(|(since, page)| (*since, *page)).collect();
        for (since, page) in &chosen {
            self.idle.remove(since);
            self.pages.remove(page);
        }
        chosen.into_iter().map(|(_, page)| page).collect()
    }
}

impl Domain {
    /// Maps a buffer at its own address.
    pub(super) fn map_identity(
        &mut self,
        kernel: &Kernel,
        memory: &OwnerMemory,
        request: &DmaMap,
    ) -> Result<(Iova, RecordIndex), DmaMapError> {
        let range = request.range;
        let iova = Iova::new(range.base().get());
        let last = range.last().get();
        self.check_mask(last)?;
        if last >> self.options.width_bits != 0 {
            let width_bits = self.options.width_bits;
            return Err(BeyondWidth { iova: Iova::new(last), width_bits }.into());
        }
        if self.ledger.is_full_at(iova) {
            let (limit, allowed) = ("mappings_per_address".to_owned(), PER_ADDRESS_MAX as u64);
            return Err(LimitReached { limit, allowed }.into());
        }
        self.resolve(memory, range)?;
        self.place_extents(range.base().page_number());
        let record = self.record_of(request, iova);
        let index = if self.is_passthrough() {
            self.note(kernel, &record, |_| {})?
        } else {
            let reused = self.prepare_pages(kernel)?;
            let noted = self.note(kernel, &record, |domain| domain.open_pages(kernel, &record, &reused));
            noted.inspect_err(|_| self.unprepare_pages(kernel))?
        };
        self.ledger.add(iova, index);
        Ok((iova, index))
    }
    /// Leaves in `self.extents` the pages that have to be opened, with tables reserved and frames pinned, and evicts what is over the
    /// quota. Returns the pages that are open already.
    fn prepare_pages(&mut self, kernel: &Kernel) -> Result<Vec<u64>, DmaMapError> {
        let Mode::Identity(pages) = &self.mode else { unreachable!("only identity domains open pages") };
        let wanted = self.pages_at_work();
        let mut reused = Vec::new();
        let mut missing: Vec<Extent> = Vec::new();
        let mut reused_idle = 0;
        for extent in &self.extents {
            for n in 0..extent.pages {
                let page = extent.iova.page_number() + n;
                if let Some(known) = pages.pages.get(&page) {
                    reused_idle += u64::from(known.users == 0);
                    reused.push(page);
                } else {
                    let iova = Iova::new(page * PAGE_SIZE_BYTES);
                    push_page(&mut missing, iova, Extent { iova, hpa: frame_at(extent.hpa, n), ..*extent });
                }
            }
        }
        let missing_count = missing.iter().map(|extent| extent.pages).sum();
        let Some(excess) = pages.excess(missing_count, reused_idle) else {
            let allowed = pages.quota.map_or(0, |quota| quota.pages_max.into());
            return Err(LimitReached { limit: "persistent_pages".to_owned(), allowed }.into());
        };
        self.extents = missing;
        // Before tables are reserved, because an eviction may take some away.
        if excess > 0 {
            let mut remains = self.unfinished.fresh();
            self.evict_pages(kernel, excess as usize, |page| !wanted.contains(&page), &mut remains);
            let pending = self.invalidate_now(kernel, remains);
            self.evicted.push(pending);
        }
        self.tables.reserve(kernel, &self.account, &self.extents)?;
        if let Err(limit) = self.pin_frames(kernel) {
            self.tables.trim(kernel, &self.account);
            return Err(limit.into());
        }
        Ok(reused)
    }
    /// The pages of `self.extents`, which follow each other.
    fn pages_at_work(&self) -> std::ops::Range<u64> {
        let first = self.extents.first().map_or(0, |extent| extent.iova.page_number());
        first..first + self.extents.iter().map(|extent| extent.pages).sum::<u64>()
    }
    fn unprepare_pages(&mut self, kernel: &Kernel) {
        self.unpin_frames(kernel);
        self.tables.trim(kernel, &self.account);
    }
    /// Opens the pages in `self.extents`, and lets the others allow what this mapping asks for.
    fn open_pages(&mut self, kernel: &Kernel, record: &MappingRecord, reused: &[u64]) {
        let permissions = Permissions::from_bits_truncate(record.permissions);
        let bytes = IovaRange::new(Iova::new(record.iova), record.size_bytes).expect("a mapping is a range");
        self.counters.reused_pages += reused.len() as u64;
        self.tables.map(kernel.memory(), &self.extents, permissions, bytes);
        let Mode::Identity(pages) = &mut self.mode else { unreachable!("only identity domains open pages") };
        for extent in &self.extents {
            for page in extent.iova.page_number()..extent.iova.page_number() + extent.pages {
                pages.open(page, permissions, ByteExtent::of_page(bytes, page));
            }
        }
        for &page in reused {
            if let Some(grown) = pages.enter(page, permissions, ByteExtent::of_page(bytes, page)) {
                let iova = Iova::new(page * PAGE_SIZE_BYTES);
                self.tables.reopen(kernel.memory(), iova, grown.extent, grown.permissions);
            }
        }
    }
    /// A mapping leaves its pages.
    pub(super) fn leave_pages(&mut self, kernel: &Kernel, record: &MappingRecord, remains: &mut Remains) {
        let first = record.iova / PAGE_SIZE_BYTES;
        for page in first..first + pages_of(record) {
            let Mode::Identity(pages) = &mut self.mode else {
                unreachable!("only identity domains open pages")
            };
            if pages.leave(page) {
                self.close_page(kernel, page, remains);
            }
        }
    }
    /// Closes idle pages of a buffer that its owner takes back.
    pub(super) fn evict_within(&mut self, kernel: &Kernel, buffer: GpaRange, remains: &mut Remains) {
        let (first, last) = (buffer.base().page_number(), buffer.last().page_number());
        self.evict_pages(kernel, usize::MAX, |page| (first..=last).contains(&page), remains);
    }
    /// Closes every idle page.
    pub(super) fn evict_idle(&mut self, kernel: &Kernel, remains: &mut Remains) {
        self.evict_pages(kernel, usize::MAX, |_| true, remains);
    }
    fn evict_pages(
        &mut self,
        kernel: &Kernel,
        limit: usize,
        is_meant: impl Fn(u64) -> bool,
        remains: &mut Remains,
    ) {
        let Mode::Identity(pages) = &mut self.mode else { unreachable!("only identity domains open pages") };
        let mut evicted = pages.evict(limit, is_meant);
        self.counters.evictions += evicted.len() as u64;
        // In order, so that neighbours are invalidated together.
        evicted.sort_unstable();
        for page in evicted {
            self.close_page(kernel, page, remains);
        }
    }
}

/// Adds a page to extents, joined with the one before when addresses and frames go on.
fn push_page(extents: &mut Vec<Extent>, iova: Iova, page: Extent) {
    let goes_on = |last: &&mut Extent| {
        last.iova.page_number() + last.pages == iova.page_number()
            && frame_at(last.hpa, last.pages) == page.hpa
    };
    match extents.last_mut().filter(|last| goes_on(last)) {
        Some(last) => last.pages += 1,
        None => extents.push(Extent { size: PageSize::Size4K, pages: 1, ..page }),
    }
}
