//! The DMA sanitizer: what hardware cannot see, by somebody who sees every map, unmap, sync and DMA of a domain.
//!
//! Hardware knows pages and what is in its tables and caches now. The sanitizer knows the bytes that were mapped, when and by which
//! request each mapping was born and died, and which addresses the driver gave to which device. So it tells a use after unmap that
//! a stale translation let through, an overrun inside a page, and whose fault it is; and it knows the misuse classes of Linux's
//! dma-debug that exist here.
//!
//! One [`Sanitizer`] per domain, plain data behind a lock of its own, below the domain's: the domain tells it of mappings, device
//! threads of DMA. Their calls come in any order; what counts is the [`Moment`] that each carries, from the domain's [`EventClock`].
//!
//! **It promises:** no report for a race (`judge` says how), no blame of a device whose driver gave the address in a way that is looked at
//! here (`supplied`, `observe`), no blame of a driver for a word that the device was seen to write itself, no panic for any input, and
//! bounds on all it keeps (I7). Where room ran out it says *unknown*, or nothing, and counts what it [could not
//! judge](Sanitizer::unjudged). It does not see addresses in streaming memory (indirect descriptors), nor page numbers in registers.
//!
//! **Memory**, with [`SanitizerBounds::USUAL`], at most: 300 bytes per live mapping (whose number the owner's limits bound); 1.5 MiB for dead
//! mappings; 0.3 MiB for reports; 0.2 MiB for what devices wrote; and for each device 1.7 MiB of addresses given and of transfers. An idle
//! domain has 5 KiB.

mod devices;
mod graveyard;
mod index;
mod judge;
mod live;
mod log;
mod mapping;
mod misuse;
mod observe;
mod supplied;
#[cfg(test)]
mod tests;
mod written;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use iommu_types::{
    Blame, DeviceAddress, Direction, DomainId, GpaRange, IovaRange, Owner, ReportClass, RequestId,
    SanitizerReport, Violation,
};

pub use mapping::{MappingKind, NewMapping};
pub use supplied::{GivenAddresses, RegisterWrite};

use devices::Devices;
use graveyard::Graveyard;
use live::Live;
use log::Log;
use mapping::Mapping;
use written::Written;

/// When something happened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Moment {
    /// In microseconds since the UNIX epoch; only shown.
    pub at_us: u64,
    /// Its place among the events of the domain, from its [`EventClock`].
    pub order: u64,
}

/// Orders the events of one domain; shared by the domain and the threads of its devices.
///
/// ```text
///   DMA: now() = 7     unmap: tick() = 7      DMA: now() = 8
///   began before or with the death            began after it (8 > 7)
/// ```
#[derive(Clone, Debug, Default)]
pub struct EventClock(Arc<AtomicU64>);

impl EventClock {
    /// The order of a DMA, taken before it begins; also that of a register write, before the device gets it. One load.
    pub fn now(&self) -> u64 {
        self.0.load(Ordering::Acquire)
    }
    /// The order of an unmap, taken when its entries are gone or later, and before it is answered; also that of any other call of the
    /// control plane. Whatever takes [`now`](Self::now) after this gets a larger number.
    pub fn tick(&self) -> u64 {
        self.0.fetch_add(1, Ordering::AcqRel)
    }
}

/// A call of the control plane.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DriverCall {
    /// When it was made.
    pub at: Moment,
    /// For which device, if for one.
    pub device: Option<DeviceAddress>,
    /// The client's number for it.
    pub request_id: RequestId,
}

/// What a sanitizer may keep.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SanitizerBounds {
    /// Dead mappings that are remembered. Those of the same addresses, direction and kind count once.
    pub dead_mappings: usize,
    /// Different addresses that a device was given.
    pub supplied_per_device: usize,
    /// Devices that are remembered.
    pub devices: usize,
    /// Reports in the log.
    pub reports: usize,
    /// Reports of mappings that leaked at once; the last of them counts the rest.
    pub leak_reports: usize,
}

impl SanitizerBounds {
    /// Dead mappings: the buffers of a ring of 4,096, so that each is known until it is used again. Addresses: those of two rings
    /// with two buffers a packet. Devices: an isolation group is rarely larger. Reports: what a person reads. Leaks: enough to see the pattern.
    pub const USUAL: Self = Self {
        dead_mappings: 4096,
        supplied_per_device: 16_384,
        devices: 16,
        reports: 1024,
        leak_reports: 64,
    };
}

/// The sanitizer of one domain.
#[derive(Debug)]
pub struct Sanitizer {
    owner: Owner,
    domain_id: DomainId,
    bounds: SanitizerBounds,
    births: u64,
    live: Live,
    dead: Graveyard,
    devices: Devices,
    written: Written,
    log: Log,
    /// A map that failed, until its error value is seen at a device.
    failed_map: Option<RequestId>,
    unjudged: u64,
}

impl Sanitizer {
    /// A sanitizer that has seen nothing.
    pub fn new(owner: Owner, domain_id: DomainId, bounds: SanitizerBounds) -> Self {
        Self {
            owner,
            domain_id,
            bounds,
            births: 0,
            live: Live::new(),
            dead: Graveyard::new(bounds.dead_mappings),
            devices: Devices::new(bounds.devices, bounds.supplied_per_device),
            written: Written::default(),
            log: Log::new(bounds.reports),
            failed_map: None,
            unjudged: 0,
        }
    }
    /// Something was mapped. To be told before the map is answered. Where streaming memory is mapped already, in the same cache lines, and
    /// either mapping lets the device write, that is reported.
    pub fn mapped(&mut self, call: DriverCall, new: NewMapping) {
        self.mapped_in_pieces(call, new, &[]);
    }
    /// As [`mapped`](Self::mapped), where the memory lies in these pieces, in their order: the segments of scatter-gather are merged by
    /// their addresses. Without any it is one piece.
    pub fn mapped_in_pieces(&mut self, call: DriverCall, new: NewMapping, pieces: &[GpaRange]) {
        self.births += 1;
        let memory_bytes = pieces.first().map_or(new.range.size_bytes(), |first| first.size_bytes());
        let mapping =
            Mapping::new(self.births, new, call.at.at_us, call.request_id).with_memory(memory_bytes);
        let further = pieces.get(1..).unwrap_or_default();
        if let Some(other) = self.overlapped(&mapping, further) {
            self.report_call(call, ReportClass::Overlap, None, Some(other));
        }
        self.live.insert(mapping, further);
    }
    fn overlapped(&self, mapping: &Mapping, further: &[GpaRange]) -> Option<Mapping> {
        if !mapping.kind.is_streaming() {
            return None;
        }
        let clashes = |other: &&Mapping| {
            other.kind.is_streaming() && (other.lets_device_write() || mapping.lets_device_write())
        };
        let mut pieces = live::pieces(mapping, further);
        pieces.find_map(|(first, last)| {
            self.live.in_lines(first, last).take(judge::LOOKED_AT_MAX).find(clashes).copied()
        })
    }
    /// A mapping was unmapped; `call.at` is its death. To be told before the unmap is answered. Does nothing when there is no such mapping. Where
    /// there are several, the one with the direction dies, and the oldest of equal ones.
    pub fn unmapped(&mut self, call: DriverCall, range: IovaRange, direction: Direction, kind: MappingKind) {
        let (first, last) = (range.base().get(), range.last().get());
        let meant = |mapping: &&Mapping| mapping.life.direction == direction && mapping.kind == kind;
        let found = self.live.exactly(first, last).filter(meant).min_by_key(|mapping| mapping.number);
        let Some(mapping) = found.copied() else { return };
        self.bury(mapping, call.at, call.request_id);
    }
    /// A mapping was revoked, because its memory was taken back; by nobody's request. As [`unmapped`](Self::unmapped), but that the driver may
    /// unmap it still, and that a DMA to it is nobody's fault.
    pub fn revoked(&mut self, at: Moment, range: IovaRange, direction: Direction, kind: MappingKind) {
        let (first, last) = (range.base().get(), range.last().get());
        let meant = |mapping: &&Mapping| mapping.life.direction == direction && mapping.kind == kind;
        let found = self.live.exactly(first, last).filter(meant).min_by_key(|mapping| mapping.number);
        let Some(mapping) = found.copied() else { return };
        self.bury(mapping.with_unmaps_owed(1), at, RequestId(0));
    }
    /// Every mapping was unmapped at once, by nobody's request.
    pub fn unmapped_all(&mut self, at: Moment) {
        let mut all: Vec<Mapping> = self.live.iter().copied().collect();
        all.sort_unstable_by_key(|mapping| mapping.number);
        all.into_iter().for_each(|mapping| self.bury(mapping, at, RequestId(0)));
    }
    fn bury(&mut self, mut mapping: Mapping, at: Moment, by: RequestId) {
        self.live.remove(&mapping);
        mapping.died = Some(at.order);
        mapping.life.death = Some((at.at_us, by));
        self.devices.mapping_died(&mapping);
        self.dead.bury(mapping);
    }
    /// Takes out the reports that were not taken, oldest first. The next report is a new one, even when it equals the last of these.
    pub fn drain_reports(&mut self) -> Vec<SanitizerReport> {
        self.log.drain()
    }
    /// Reports with a sequence number after `after`, oldest first and `limit` at most, with how many between were overwritten.
    pub fn reports(&self, after: u64, limit: usize) -> (Vec<SanitizerReport>, u64) {
        self.log.after(after, limit)
    }
    /// Sequence number of the latest report; 0 when there was none.
    pub fn latest(&self) -> u64 {
        self.log.latest()
    }
    /// How many reports were overwritten by later ones.
    pub fn overwritten(&self) -> u64 {
        self.log.overwritten()
    }
    /// How often each class was reported, repeats included.
    pub fn counts(&self) -> &BTreeMap<ReportClass, u64> {
        self.log.counts()
    }
    /// DMA of which nothing could be said, because too much was forgotten since it began, or too much is mapped at one address.
    pub fn unjudged(&self) -> u64 {
        self.unjudged
    }
    /// Mappings that are there.
    pub fn live_mappings(&self) -> usize {
        self.live.count()
    }
    /// A report about a call of the driver.
    fn report_call(
        &mut self,
        call: DriverCall,
        class: ReportClass,
        violation: Option<Violation>,
        mapping: Option<Mapping>,
    ) {
        self.report_calls(call, class, violation, mapping, 0);
    }
    fn report_calls(
        &mut self,
        call: DriverCall,
        class: ReportClass,
        violation: Option<Violation>,
        mapping: Option<Mapping>,
        repeats: u32,
    ) {
        self.log.append(SanitizerReport {
            sequence: 0,
            at_us: call.at.at_us,
            owner: self.owner,
            domain_id: self.domain_id,
            device: call.device,
            class,
            violation,
            blame: Blame::Driver,
            access: None,
            mapping: mapping.map(|mapping| mapping.life),
            request_id: Some(call.request_id),
            age_us: None,
            repeats,
        });
    }
}
