//! Which sources are behind the ring unit, and what a port keeps of that.
//!
//! A port looks its source up when the serial number has moved, which happens when any source changes sides; else a burst costs it
//! one relaxed load. That is enough: the change moves the number and then drains, and a burst that the drain did not see
//! busy passed its fence later, and reads the new number.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crossbeam_utils::CachePadded;
use iommu_types::SourceId;

use super::cache::RingCache;
use super::translate::RootLatch;

/// The state of the ring unit but for its tables, which are in memory.
#[derive(Default)]
pub(crate) struct RingUnit {
    /// Read by every burst and walk, so apart from what is written often.
    latches: CachePadded<Latches>,
    behind: Mutex<BTreeMap<SourceId, Arc<RingCache>>>,
    invalidations: AtomicU64,
}

#[derive(Default)]
struct Latches {
    root: RootLatch,
    /// Moved under the lock of `behind`. 0 while no source has ever been behind the unit.
    serial: AtomicU64,
}

impl RingUnit {
    pub(crate) fn root(&self) -> &RootLatch {
        &self.latches.root
    }
    /// Puts a source behind the unit with so many rings, or takes it away. Entries that it had are gone for every burst that
    /// begins from here on; the caller drains the others.
    pub(crate) fn put(&self, source: SourceId, rings: Option<u16>) {
        let mut behind = self.lock();
        match rings {
            Some(rings) => drop(behind.insert(source, Arc::new(RingCache::new(rings)))),
            None => drop(behind.remove(&source)),
        }
        self.latches.serial.fetch_add(1, Ordering::Release);
    }
    /// The entries of a source, when it is behind the unit.
    pub(crate) fn cache_of(&self, source: SourceId) -> Option<Arc<RingCache>> {
        self.lock().get(&source).map(Arc::clone)
    }
    /// Forgets a ring of a source, or all of them. The caller drains.
    pub(crate) fn forget(&self, source: SourceId, ring: Option<u16>) {
        self.invalidations.fetch_add(1, Ordering::Relaxed);
        match (self.cache_of(source), ring) {
            (Some(cache), Some(ring)) => cache.invalidate(ring),
            (Some(cache), None) => cache.invalidate_all(),
            (None, _) => {}
        }
    }
    pub(crate) fn invalidations(&self) -> u64 {
        self.invalidations.load(Ordering::Relaxed)
    }
    fn lock(&self) -> MutexGuard<'_, BTreeMap<SourceId, Arc<RingCache>>> {
        self.behind.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What a port knows of its source.
#[derive(Default)]
pub(crate) struct PortRings {
    serial: u64,
    cache: Option<Arc<RingCache>>,
}

impl PortRings {
    /// Asked inside an epoch, before anything else is: the entries of the source, when it is behind rings now.
    #[inline]
    pub(crate) fn refresh(&mut self, unit: &RingUnit, source: SourceId) -> Option<&RingCache> {
        if unit.latches.serial.load(Ordering::Relaxed) != self.serial {
            self.look_up(unit, source);
        }
        self.cache.as_deref()
    }
    /// As [`refresh`](Self::refresh) said when the epoch began.
    #[inline]
    pub(crate) fn cache(&self) -> Option<&RingCache> {
        self.cache.as_deref()
    }
    #[cold]
    fn look_up(&mut self, unit: &RingUnit, source: SourceId) {
        let behind = unit.lock();
        self.serial = unit.latches.serial.load(Ordering::Relaxed);
        self.cache = behind.get(&source).map(Arc::clone);
    }
}
