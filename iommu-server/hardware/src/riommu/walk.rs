//! The walk: root, rDEVICE, rRING, rPTE. Free functions over memory, without caches and without state.
//!
//! ```text
//! root ─► root[bus] ─► rDEVICE[devfn] ─► rRING[ring] ─► rPTE[slot] ─► bytes
//!            e0            e0 e1             e7 e2         e7 e3      e4 e5 e6 0e
//! ```
//!
//! The digits are the fault reasons, in the order in which they are looked for. What the tables say is believed only as far as it
//! was checked: nonsense in them ends in a fault, never in a panic, and never in more than four reads.

use iommu_types::{Access, FaultReason, Hpa, Permissions, SourceId, Structure};

use super::spec::{ENTRY_BYTES, Ring, RingDevice, RingIova, RingPte, RingRoot, entry_address, ring_address};
use crate::vtd::walk::{NoTrace, TableMemory, is_interrupt_range};

/// Sees every entry that a walk reads; `None` stands for one that could not be read.
pub trait RingTrace {
    /// An entry, by its index in its table.
    #[inline]
    fn read(&mut self, structure: Structure, index: u32, at: Hpa, raw: Option<u128>) {
        let _ = (structure, index, at, raw);
    }
}

impl RingTrace for NoTrace {}

/// The ring of an address: where its slots are, and how many.
pub fn walk_ring(
    memory: &impl TableMemory,
    root: Option<Hpa>,
    source: SourceId,
    ring: u16,
    trace: &mut impl RingTrace,
) -> Result<Ring, FaultReason> {
    let absent = FaultReason::RING_DEVICE_ABSENT;
    let at = root.and_then(|root| entry_address(root, source.bus().into()));
    let raw = load(memory, Structure::RingRoot, source.bus().into(), at, trace).ok_or(absent)?;
    let entry = RingRoot::from_bits(raw);
    if !entry.is_present() {
        return Err(absent);
    }
    let at = entry_address(entry.device_table(), source.devfn().into());
    let raw = load(memory, Structure::RingDevice, source.devfn().into(), at, trace).ok_or(absent)?;
    let device = RingDevice::from_bits(raw);
    if !device.is_present() {
        return Err(absent);
    }
    if ring >= device.count() {
        return Err(FaultReason::RING_BEYOND_DEVICE);
    }
    let at = ring_address(device.rings(), ring);
    load(memory, Structure::Ring, ring.into(), at, trace)
        .map(Ring::from_bits)
        .ok_or(FaultReason::RING_TABLE_ACCESS)
}

/// A valid slot of a ring.
pub fn walk_slot(
    memory: &impl TableMemory,
    ring: Ring,
    slot: u32,
    trace: &mut impl RingTrace,
) -> Result<RingPte, FaultReason> {
    if slot >= ring.reachable_slots() {
        return Err(FaultReason::RING_BEYOND_SIZE);
    }
    let at = entry_address(ring.slots(), slot);
    let raw = load(memory, Structure::RingSlot, slot, at, trace).ok_or(FaultReason::RING_TABLE_ACCESS)?;
    Some(RingPte::from_bits(raw)).filter(|pte| pte.is_valid()).ok_or(FaultReason::RING_SLOT_INVALID)
}

/// A pointer is a multiple of 16, or nothing can be read there.
fn load(
    memory: &impl TableMemory,
    structure: Structure,
    index: u32,
    at: Option<Hpa>,
    trace: &mut impl RingTrace,
) -> Option<u128> {
    let at = at?;
    let raw = if at.is_aligned(ENTRY_BYTES) { memory.load_u128(at).ok() } else { None };
    trace.read(structure, index, at, raw);
    raw
}

/// What is asked of a slot.
#[derive(Clone, Copy, Debug)]
pub struct Asked {
    /// From which byte of the slot.
    pub offset: u32,
    /// How many bytes; 0 is a zero-length read.
    pub size_bytes: u32,
    /// What for.
    pub access: Access,
    /// ZLR: whether a zero-length read passes where only writes may.
    pub zero_length_read: bool,
}

/// Where a request may go through a slot. The bounds hold for all of its bytes, and so does the direction, which is one for
/// the whole slot.
#[inline]
pub fn admit(pte: RingPte, asked: Asked) -> Result<Hpa, FaultReason> {
    let inside = asked.offset.checked_add(asked.size_bytes).is_some_and(|end| end <= pte.size_bytes());
    if !inside {
        return Err(FaultReason::RING_BEYOND_SLOT);
    }
    let permissions = pte.permissions();
    if !permissions.allow(asked.access) {
        let moves_nothing = asked.size_bytes == 0 && asked.access == Access::Read;
        if !(moves_nothing && asked.zero_length_read && !permissions.is_empty()) {
            return Err(denied(permissions, asked.access));
        }
    }
    // Bytes that wrap are no bytes of the slot.
    let beyond = FaultReason::RING_BEYOND_SLOT;
    let first = pte.address().checked_add(asked.offset.into()).ok_or(beyond)?;
    let last = first.checked_add(u64::from(asked.size_bytes).saturating_sub(1)).ok_or(beyond)?;
    if is_interrupt_range(first.get()) || is_interrupt_range(last.get()) {
        return Err(FaultReason::RESULT_IN_INTERRUPT_RANGE);
    }
    Ok(first)
}

impl Asked {
    /// An access of that kind to the byte that an address names, and what follows it.
    #[inline]
    pub(super) fn of(iova: RingIova, size_bytes: u32, access: Access, zero_length_read: bool) -> Self {
        Self { offset: iova.offset, size_bytes, access, zero_length_read }
    }
}

/// The reason that the first missing permission has. An atomic misses W first.
const fn denied(permissions: Permissions, access: Access) -> FaultReason {
    match access {
        Access::Read => FaultReason::RING_READ_DENIED,
        Access::Atomic if permissions.contains(Permissions::WRITE) => FaultReason::RING_READ_DENIED,
        Access::Write | Access::Atomic => FaultReason::RING_WRITE_DENIED,
    }
}
