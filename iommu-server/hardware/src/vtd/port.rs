//! Ports: how a device gets in. One per device session, used by one thread at a time.
//!
//! **Architecture invariant (I1, I2):** a host-physical address exists only inside a burst, that is inside an epoch, and is
//! lent to a closure. The context is looked up once when the epoch begins and held to its end. On a hit nothing is
//! allocated, locked or written but the port's own cache line.

use std::sync::Arc;

use iommu_types::TranslationFault;
use iommu_types::{
    Access, AddressType, DomainId, Fault, FaultReason, Generation, Hpa, InterruptFault, Iova, Pasid, SourceId,
};

use super::counters::SlotTally;
use super::interrupt::{DeliveredInterrupt, remap};
use super::miss::{look_up_context, walk_and_fill, walk_tables, within_page};
use super::unit::{PortsExhausted, Unit};
use super::walk::{NoTrace, WalkFault, check_table_mode, is_interrupt_range};
use crate::cache::{CachedContext, ContextTranslation};
use crate::drain::SlotIndex;
use crate::memory::PhysicalMemory;
use crate::riommu::PortRings;

/// Operations that one burst covers at most, so that the wait for an epoch is bounded (ARCHITECTURE.md, "How an invalidation is done").
pub const BURST_OPERATIONS_MAX: u32 = 128;
/// Bytes that one burst moves at most, for the same reason.
pub const BURST_BYTES_MAX: u32 = 64 << 10;

/// A device's way in. Owns a drain slot, which it gives back when dropped.
pub struct Port {
    unit: Arc<Unit>,
    source_id: SourceId,
    slot: SlotIndex,
    /// The domain in whose list the slot stands. Private, so that the hot path compares without sharing.
    registered: Option<DomainId>,
    /// Whether the source is behind rings, as the last burst found it.
    rings: PortRings,
}

/// One request of a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Request {
    /// Where.
    pub iova: Iova,
    /// How many bytes; 0 is a zero-length read. Never crosses a 4 KiB page.
    pub size_bytes: u32,
    /// What is asked.
    pub access: Access,
    /// The PASID, when the request has one.
    pub pasid: Option<Pasid>,
    /// Whether the device claims that the address is translated already.
    pub address_type: AddressType,
}

impl Request {
    /// Whether the request is one that legacy mode translates: untranslated and without PASID.
    #[inline]
    pub(super) fn is_plain(&self) -> bool {
        self.pasid.is_none() && self.address_type == AddressType::Untranslated
    }
    /// Whether the request is an access to the interrupt range FEEx_xxxx, which is never remapped as DMA.
    #[inline]
    pub(super) fn is_in_interrupt_range(&self) -> bool {
        is_interrupt_range(self.iova.get()) && self.is_plain()
    }
    /// Whether the request is an interrupt: an aligned 4-byte write without PASID to FEEx_xxxx.
    pub(crate) fn is_interrupt(&self) -> bool {
        self.is_in_interrupt_range()
            && self.access == Access::Write
            && self.size_bytes == 4
            && self.iova.is_aligned(4)
    }
    /// Whether the request is a read of no bytes.
    pub(super) fn is_zero_length_read(&self) -> bool {
        self.size_bytes == 0 && self.access == Access::Read
    }
}

/// Where a request may go: lent to a closure, inside the epoch.
#[derive(Clone, Copy, Debug)]
pub struct Lent {
    /// The host-physical address of the first byte.
    pub hpa: Hpa,
}

impl Unit {
    /// A port for a device.
    pub fn port(self: &Arc<Self>, source: SourceId) -> Result<Port, PortsExhausted> {
        let slot = self.claim_slot(source)?;
        Ok(Port {
            unit: Arc::clone(self),
            source_id: source,
            slot,
            registered: None,
            rings: PortRings::default(),
        })
    }
}

impl Port {
    /// The requester ID with which the port's requests are made.
    pub fn source_id(&self) -> SourceId {
        self.source_id
    }
    /// The unit that the port belongs to.
    pub fn unit(&self) -> &Arc<Unit> {
        &self.unit
    }
    /// Enters an epoch: the context is looked up once and held to the end of the burst. Dropping the burst leaves the epoch.
    ///
    /// **Bound:** a burst covers at most [`BURST_OPERATIONS_MAX`] operations or [`BURST_BYTES_MAX`]; the caller keeps it
    /// ([`Run`](crate::dma::Run) does).
    pub fn burst(&mut self) -> Burst<'_> {
        let mut burst = self.burst_outside();
        burst.enter();
        burst
    }
    /// A burst that enters its epoch with its first operation.
    pub(crate) fn burst_outside(&mut self) -> Burst<'_> {
        Burst { port: self, place: Place::Outside, hit_count: 0 }
    }
    /// An interrupt request: a 4-byte write without PASID to FEEx_xxxx. A refusal is recorded before this returns (I6).
    pub fn interrupt(&mut self, address: u64, data: u32) -> Result<DeliveredInterrupt, InterruptFault> {
        self.unit.drains.enter(self.slot);
        let delivered = self.interrupt_inside(address, data);
        self.unit.drains.leave(self.slot);
        delivered
    }

    fn interrupt_inside(&self, address: u64, data: u32) -> Result<DeliveredInterrupt, InterruptFault> {
        let unit = &*self.unit;
        let state = unit.interrupt_state();
        match remap(&**unit.memory(), unit.capabilities(), state, self.source_id, address, data) {
            Ok(delivered) => {
                self.tally().interrupts.add(1);
                Ok(delivered)
            }
            Err((fault, suppressed)) => {
                unit.record(&Fault::Interrupt(fault), suppressed);
                Err(fault)
            }
        }
    }
    fn tally(&self) -> &SlotTally {
        self.unit.tally(self.slot)
    }
}

impl Drop for Port {
    fn drop(&mut self) {
        self.unit.release_slot(self.slot);
    }
}

/// A stay inside an epoch. Addresses are lent out only here.
pub struct Burst<'p> {
    port: &'p mut Port,
    place: Place,
    hit_count: u64,
}

/// Where a burst stands, decided when it enters its epoch.
#[derive(Clone, Copy)]
enum Place {
    /// Not in an epoch.
    Outside,
    /// The source is behind rings.
    Rings,
    /// TES=0: addresses are used as they are.
    Untranslated,
    /// The source has no usable context entry.
    Refused(WalkFault),
    /// Translated as the context says, which was looked up under a generation of contexts.
    Inside(CachedContext, Generation),
}

impl Burst<'_> {
    /// Translates a request and runs `op` on the address that it may use. A refusal is recorded before this returns (I6).
    ///
    /// Hit → permission → op. An insufficient hit is a miss: a permission fault always comes from the tables. A hit of a partial page is
    /// found on the way of a miss, so that whole pages do not pay for it.
    #[inline]
    pub fn translate<R>(
        &mut self,
        request: Request,
        op: impl FnOnce(Lent) -> R,
    ) -> Result<R, TranslationFault> {
        match self.resolve(&request) {
            Ok(hpa) => Ok(op(Lent { hpa })),
            Err(fault) => Err(self.refuse(&request, fault)),
        }
    }
    /// As [`translate`](Self::translate), with the memory that the address is in.
    #[inline]
    pub(crate) fn reach<R>(
        &mut self,
        request: Request,
        op: impl FnOnce(&PhysicalMemory, Hpa) -> R,
    ) -> Result<R, TranslationFault> {
        match self.resolve(&request) {
            Ok(hpa) => Ok(op(self.port.unit.memory(), hpa)),
            Err(fault) => Err(self.refuse(&request, fault)),
        }
    }
    /// An interrupt request in the course of a burst.
    pub(crate) fn interrupt(
        &mut self,
        address: u64,
        data: u32,
    ) -> Result<DeliveredInterrupt, InterruptFault> {
        match self.place {
            Place::Outside => self.port.interrupt(address, data),
            _ => self.port.interrupt_inside(address, data),
        }
    }
    /// Leaves the epoch; the next operation enters a new one. This is what keeps a run of operations within its bounds.
    pub(crate) fn leave(&mut self) {
        if matches!(self.place, Place::Outside) {
            return;
        }
        self.place = Place::Outside;
        self.port.tally().iotlb.hits.add(std::mem::take(&mut self.hit_count));
        self.port.unit.drains.leave(self.port.slot);
    }
    fn unit(&self) -> &Unit {
        &self.port.unit
    }

    /// Enters an epoch and looks the context up. A slot that is not yet in the list of the context's domain registers there
    /// and begins again: an invalidation of that domain either finds the slot in its list, or the lookups of the second
    /// round come after its clearing. Every round but the last needs somebody to change the context entry meanwhile.
    fn enter(&mut self) {
        loop {
            self.port.unit.drains.enter(self.port.slot);
            if self.port.rings.refresh(&self.port.unit.rings, self.port.source_id).is_some() {
                self.enter_rings();
                return;
            }
            if !self.port.unit.is_translating() {
                self.place = Place::Untranslated;
                return;
            }
            // The table mode is not part of a cached context, so it is asked before the cache is.
            if let Err(fault) = check_table_mode(self.unit().root_table(), None) {
                self.place = Place::Refused(fault);
                return;
            }
            let generation = self.port.unit.drains.context_generation();
            match look_up_context(&self.port.unit, self.port.tally(), self.port.source_id, generation) {
                Err(fault) => {
                    self.place = Place::Refused(fault);
                    return;
                }
                Ok(context) if self.port.registered == Some(context.domain_id) => {
                    self.place = Place::Inside(context, generation);
                    return;
                }
                Ok(context) => {
                    self.port.unit.drains.leave(self.port.slot);
                    self.port.unit.drains.register(self.port.slot, context.domain_id);
                    self.port.registered = Some(context.domain_id);
                }
            }
        }
    }
    /// The slot leaves the list of its last domain: nothing that the port does concerns that one now.
    fn enter_rings(&mut self) {
        if self.port.registered.take().is_some() {
            self.port.unit.drains.unregister(self.port.slot);
        }
        self.place = Place::Rings;
    }
    #[inline]
    fn resolve(&mut self, request: &Request) -> Result<Hpa, WalkFault> {
        assert!(
            request.iova.page_offset() + u64::from(request.size_bytes) <= iommu_types::PAGE_SIZE_BYTES,
            "a request is split at 4 KiB pages before it comes here"
        );
        if let Place::Inside(context, _) = self.place
            && let ContextTranslation::SecondStage { .. } = context.translation
            && request.is_plain()
            && !request.is_in_interrupt_range()
            && let Some(hpa) =
                self.port.unit.iotlb.hit_whole_page(context.domain_id, request.iova, request.access)
        {
            self.hit_count += 1;
            return Ok(hpa);
        }
        self.resolve_slowly(request)
    }
    #[inline(never)]
    fn resolve_slowly(&mut self, request: &Request) -> Result<Hpa, WalkFault> {
        if request.is_in_interrupt_range() {
            if request.is_zero_length_read() {
                return Ok(Hpa::new(request.iova.get()));
            }
            return Err(WalkFault { reason: FaultReason::IR_INVALID_ACCESS, suppressed: false });
        }
        match self.place {
            Place::Outside => {
                self.enter();
                self.resolve(request)
            }
            Place::Rings => self.resolve_in_ring(request),
            // TES=0: only untranslated requests pass (PCIe: Unsupported Request), and translation, being off, records nothing.
            Place::Untranslated if request.address_type != AddressType::Untranslated => {
                Err(WalkFault { reason: FaultReason::TRANSLATED_BLOCKED, suppressed: true })
            }
            Place::Untranslated => Ok(Hpa::new(request.iova.get())),
            // The table mode is checked first (30), then PASID (31), then everything that the context look-up found.
            _ if request.pasid.is_some() => {
                let fault = check_table_mode(self.unit().root_table(), request.pasid).err();
                Err(fault.expect("no table mode that is built takes a PASID"))
            }
            Place::Refused(fault) => Err(fault),
            // No context allows a device to have translated by itself: DT=0, so TT is 00 or 10.
            Place::Inside(context, _) if request.address_type != AddressType::Untranslated => {
                Err(WalkFault::qualified(FaultReason::TRANSLATED_BLOCKED, context.fault_processing_disable))
            }
            Place::Inside(context, generation) => match context.translation {
                ContextTranslation::PassThrough => {
                    let leaf = walk_tables(self.unit(), &context, None, request, &mut NoTrace, |_| {})?;
                    Ok(within_page(leaf.hpa, leaf.size.bytes(), request.iova))
                }
                ContextTranslation::SecondStage { .. } => self.miss(&context, generation, request),
            },
        }
    }
    fn resolve_in_ring(&self, request: &Request) -> Result<Hpa, WalkFault> {
        let cache = self.port.rings.cache().expect("the burst found its source behind rings");
        self.unit().rings_of(self.port.source_id, cache).translate(&self.port.tally().ring, request)
    }
    fn miss(
        &self,
        context: &CachedContext,
        generation: Generation,
        request: &Request,
    ) -> Result<Hpa, WalkFault> {
        walk_and_fill(self.unit(), self.port.tally(), context, generation, request, || ())
    }
    #[cold]
    fn refuse(&self, request: &Request, fault: WalkFault) -> TranslationFault {
        let refused = refusal(self.port.source_id, request, fault.reason);
        self.port.unit.record(&Fault::Dma(refused), fault.suppressed);
        refused
    }
}

impl Drop for Burst<'_> {
    fn drop(&mut self) {
        self.leave();
    }
}

/// The fault of a request: common facts and a reason, put together in this one place.
pub(crate) fn refusal(source_id: SourceId, request: &Request, reason: FaultReason) -> TranslationFault {
    let Request { iova, access, pasid, address_type, .. } = *request;
    TranslationFault { source_id, pasid, iova, access, address_type, reason }
}
