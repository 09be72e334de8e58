//! What DMA does: where it gets through, and why it is refused.

use iommu_types::{Access, FaultReason};

use super::super::fixture::PAGE;
use super::super::steps::FROM;
use super::*;

impl Twin {
    pub(crate) fn byte(&mut self, place: Place) -> &mut u8 {
        match place {
            Place::Memory(gpa) => {
                let buffer = self.buffers.iter_mut().find(|buffer| buffer.holds(gpa));
                let buffer = buffer.expect("what is open or may be cached is somebody's memory");
                &mut buffer.bytes[(gpa - buffer.base) as usize]
            }
            Place::Shadow(shadow, at) => &mut self.shadows[shadow].bytes[at as usize],
        }
    }
    pub(crate) fn bytes(&mut self, place: Place, count: u64) -> Vec<u8> {
        (0..count).map(|n| *self.byte(place.at(n))).collect()
    }
    pub(crate) fn fill(&mut self, place: Place, count: u64, fill: u8) {
        (0..count).for_each(|n| *self.byte(place.at(n)) = fill);
    }
    /// What becomes of an access that lies in one page.
    pub(crate) fn outcome(&self, device: usize, first: u64, size_bytes: u64, access: Access) -> Outcome {
        assert!(is_unit(access), "atomics are not driven here");
        let here = self.window(first);
        let refused = match here.map(|window| window.refuses(first, size_bytes, access)) {
            Some(None) => return Outcome::Moves(here.expect("just found").place(first)),
            Some(Some(refused)) => refused,
            None => self.nothing_at(first),
        };
        let is_cached = |window: &&Window| {
            window.holds(first)
                && window.refuses(first, size_bytes, access).is_none()
                && if self.is_ring() { window.cached_by[device] } else { window.cached_by != [false; 2] }
        };
        Outcome::Refused(refused, self.stale.iter().find(is_cached).map(|window| window.place(first)))
    }
    fn nothing_at(&self, address: u64) -> Refused {
        if !self.is_ring() {
            let is_beyond = address >> self.options.width_bits != 0;
            return if is_beyond { Refused::BeyondWidth } else { Refused::Absent };
        }
        let (ring, slot) = self.slot_at(address);
        match self.rings.get(ring) {
            None => Refused::BeyondRings,
            Some(ring) if slot >= ring.slots.len() => Refused::BeyondRing,
            Some(_) => Refused::Absent,
        }
    }
    /// A device got through at an address; whether that was by a stale slot of which there are too many.
    pub(crate) fn passed(&mut self, device: usize, address: u64, was_stale: bool) -> bool {
        if !self.is_ring() {
            self.windows
                .iter_mut()
                .filter(|window| window.holds(address))
                .for_each(|window| window.cached_by[device] = true);
            return false;
        }
        let (ring, slot) = self.slot_at(address);
        // The slot itself, and the one after it, which is prefetched.
        let next = (slot + 1) % self.rings[ring].slots.len();
        let bases = [slot, next].map(|slot| ring as u64 * RING_BYTES + slot as u64 * SLOT_BYTES);
        self.windows
            .iter_mut()
            .filter(|window| bases.contains(&window.base))
            .for_each(|window| window.cached_by[device] = true);
        let served = &mut self.rings[ring].served;
        if !was_stale {
            served.retain(|(by, _)| *by != device);
        } else if !served.contains(&(device, bases[0])) {
            served.push((device, bases[0]));
        }
        served.iter().filter(|(by, _)| *by == device).count() > 2
    }
    /// The reason that a refusal is given.
    pub(crate) fn reason(&self, refused: Refused, is_write: bool) -> FaultReason {
        match (refused, self.is_ring(), is_write) {
            (Refused::BeyondWidth, ..) => FaultReason::ADDRESS_BEYOND_WIDTH,
            (Refused::BeyondRings, ..) => FaultReason::RING_BEYOND_DEVICE,
            (Refused::BeyondRing, ..) => FaultReason::RING_BEYOND_SIZE,
            (Refused::Absent, true, _) => FaultReason::RING_SLOT_INVALID,
            (Refused::Bytes, true, _) => FaultReason::RING_BEYOND_SLOT,
            (Refused::Bytes, false, _) => FaultReason::BYTES_DENIED,
            (Refused::Permission, true, true) => FaultReason::RING_WRITE_DENIED,
            (Refused::Permission, true, false) => FaultReason::RING_READ_DENIED,
            (_, false, true) => FaultReason::WRITE_DENIED,
            (_, false, false) => FaultReason::READ_DENIED,
        }
    }
    /// An address that is said to be one of a shadow, for looking whether it still is: may it be written?
    pub(crate) fn first_byte(&self, shadow: usize) -> (u64, bool, u8) {
        let Shadow { first, permissions, bytes, .. } = &self.shadows[shadow];
        (first * PAGE, *permissions == FROM.permissions(), bytes[0])
    }
}
