//! The data plane: what the driver gives to devices, and what devices do.

use iommu_types::{
    Access, AccessWidth, Blame, DeviceAddress, PAGE_SIZE_BYTES, ReportClass, RequestId, SanitizerReport,
    SeenAccess, Violation,
};

use super::judge::{self, Place};
use super::mapping::{Asked, Mapping};
use super::supplied::{GivenAddresses, RegisterWrite, words};
use super::{DriverCall, Moment, Sanitizer};

/// Bytes of one read that are looked at for addresses: more than a device reads of descriptors at once.
const READ_BYTES_MAX: usize = 64 << 10;

/// What a device asked and when, as one report says it.
#[derive(Clone, Copy)]
struct Seen {
    at_us: u64,
    device: DeviceAddress,
    access: SeenAccess,
}

impl Sanitizer {
    /// The driver writes a register of a device. To be told before the device gets it; `now` is taken from
    /// [`EventClock::now`](super::EventClock::now).
    pub fn supplied(&mut self, now: Moment, device: DeviceAddress, write: RegisterWrite) {
        let addresses = self.devices.device(device).supplied.addresses_of(write);
        for value in addresses.into_iter().flatten() {
            if self.may_be_address(value) {
                self.give(now, device, value);
            }
        }
        if write.width == AccessWidth::Bytes8 {
            // Two registers at once: a half counts where it leads somewhere.
            for value in [write.value & u64::from(u32::MAX), write.value >> 32] {
                if self.leads_somewhere(value) {
                    self.give(now, device, value);
                }
            }
            // Only a whole one: two registers of 4 bytes with all bits set are usual masks.
            if write.value == u64::MAX
                && let Some(request_id) = self.failed_map.take()
            {
                self.report_error_value(now, device, request_id);
            }
        }
    }
    /// A device comes, and with it what it was given before.
    pub fn brings(&mut self, device: DeviceAddress, given: GivenAddresses) {
        self.devices.device(device).supplied = given.into_supplied();
    }
    /// A device goes, and takes with it what it was given.
    pub fn takes_away(&mut self, device: DeviceAddress) -> GivenAddresses {
        let supplied = &mut self.devices.device(device).supplied;
        let nothing = GivenAddresses::nothing().into_supplied();
        GivenAddresses::of(std::mem::replace(supplied, nothing))
    }
    fn give(&mut self, now: Moment, device: DeviceAddress, value: u64) {
        let dangling = self.nothing_mapped_at(value, now.order).then_some(now.order);
        self.devices.device(device).supplied.give(value, true, dangling);
    }
    fn report_error_value(&mut self, now: Moment, device: DeviceAddress, request_id: RequestId) {
        let call = DriverCall { at: now, device: Some(device), request_id };
        self.report_call(call, ReportClass::ErrorNeverChecked, Some(Violation::BadAddress), None);
    }
    fn leads_somewhere(&self, value: u64) -> bool {
        self.live.touching(value, value).next().is_some()
            || self.dead.covering(value).next().is_some()
            || self.dead.may_have_covered(value)
    }
    /// Numbers below a page are counts and flags, unless something is mapped there (as slot 0 of ring 0 is).
    fn may_be_address(&self, value: u64) -> bool {
        value >= PAGE_SIZE_BYTES || self.leads_somewhere(value)
    }
    /// Whether certainly nothing was mapped at the address, at that order or since.
    fn nothing_mapped_at(&self, address: u64, order: u64) -> bool {
        !self.dead.may_have_lived(order)
            && self.live.touching(address, address).next().is_none()
            && !self.dead.covering(address).any(|mapping| mapping.lived_at(order))
    }
    /// A device did a DMA, or was refused one by translation. `begun` is taken from [`EventClock::now`](super::EventClock::now) before the
    /// DMA began; `read_bytes` is what a read (or an atomic) returned. To be told in the order in which the device's DMAs were done,
    /// and before the device has the answer of a read: what it does with it may come right after.
    pub fn dma(
        &mut self,
        begun: Moment,
        seen_at_us: u64,
        device: DeviceAddress,
        access: SeenAccess,
        read_bytes: Option<&[u8]>,
    ) {
        let asked = Asked::new(access.iova.get(), access.size_bytes, access.access);
        let state = self.devices.device(device);
        let place = judge::place(&self.live, &self.dead, state, begun.order, &asked);
        let verdict = judge::verdict(&place, &self.dead, state, &asked);
        if let Some((start, origin)) = judge::transfer(&place, &self.dead, &asked) {
            state.follow(&asked, start, origin);
        }
        if let Some((class, violation, blame)) = verdict {
            let seen = Seen { at_us: seen_at_us, device, access };
            self.report_dma(seen, &place, class, violation, blame);
        }
        if matches!(place, Place::Unjudged) {
            self.unjudged = self.unjudged.saturating_add(1);
            if read_bytes.is_some() {
                // What it read may have been coherent memory.
                self.devices.device(device).supplied.lose();
            }
        }
        if let (Place::Legitimate(mapping), Some(bytes)) = (&place, read_bytes)
            && mapping.life.coherent
        {
            self.take_words(device, mapping, &asked, bytes);
        }
        self.note_write(&asked, access.done_bytes, &place);
    }
    fn report_dma(
        &mut self,
        seen: Seen,
        place: &Place,
        class: ReportClass,
        violation: Option<Violation>,
        blame: Blame,
    ) {
        let life = place.mapping().map(|mapping| mapping.life);
        let died_at_us = life.and_then(|life| life.death).map(|(at_us, _)| at_us);
        let age_us = died_at_us
            .filter(|_| class == ReportClass::UseAfterUnmap)
            .map(|died_at_us| seen.at_us.saturating_sub(died_at_us));
        self.log.append(SanitizerReport {
            sequence: 0,
            at_us: seen.at_us,
            owner: self.owner,
            domain_id: self.domain_id,
            device: Some(seen.device),
            class,
            violation,
            blame,
            access: Some(seen.access),
            mapping: life,
            request_id: None,
            age_us,
            repeats: 0,
        });
    }
    /// Words that a device read from coherent memory are addresses that the driver gave it, unless a device wrote them there.
    fn take_words(&mut self, device: DeviceAddress, mapping: &Mapping, asked: &Asked, bytes: &[u8]) {
        let looked_at = bytes.get(..READ_BYTES_MAX).unwrap_or(bytes);
        for word in words(asked.first, looked_at).filter(|word| mapping.contains(word.address)) {
            // Half a word is an address only where it leads somewhere: most are counts and flags.
            let is_address = match word.size_bytes {
                8 => self.may_be_address(word.value),
                _ => self.leads_somewhere(word.value),
            };
            if is_address {
                let last = word.address.saturating_add(word.size_bytes - 1);
                let (first, last) = mapping.memory(word.address, last);
                let is_certain = mapping.died.is_none() && !self.written.touches(first, last);
                self.devices.device(device).supplied.give(word.value, is_certain, None);
            }
        }
        if looked_at.len() < bytes.len() {
            self.devices.device(device).supplied.lose();
        }
    }
    /// Coherent memory that the device wrote: by its address there, or through another mapping of the same memory.
    fn note_write(&mut self, asked: &Asked, done_bytes: u32, place: &Place) {
        if asked.access == Access::Read || done_bytes == 0 || !self.live.holds_coherent() {
            return;
        }
        let last = asked.first.saturating_add(u64::from(done_bytes) - 1);
        for mapping in self.live.touching(asked.first, last).filter(|mapping| mapping.life.coherent) {
            let (first, last) = mapping.memory(asked.first.max(mapping.first()), last.min(mapping.last()));
            self.written.note(first, last);
        }
        if matches!(place, Place::Unjudged | Place::DoubtfulStray) {
            // Through a mapping that is forgotten, it may have reached any memory.
            self.written.note(0, u64::MAX);
        }
        if let Some(through) =
            place.mapping().filter(|mapping| !mapping.life.coherent && mapping.contains(asked.first))
        {
            let (first, last) = through.memory(asked.first, last);
            if self.live.of_memory(first, last).any(|mapping| mapping.life.coherent) {
                self.written.note(first, last);
            }
        }
    }
}
