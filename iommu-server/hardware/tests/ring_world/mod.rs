//! A device behind rings under test: tables in the memory of a bare machine, and a driver in miniature.
#![allow(dead_code, reason = "each test binary uses a part of it")]
#![allow(unreachable_pub, reason = "a module that several test binaries include")]

use iommu_hardware::dma::{Done, Run, Transfer};
use iommu_hardware::riommu::spec::{ENTRY_BYTES, RING_BYTES, Ring, RingDevice, RingIova, RingPte, RingRoot};
use iommu_hardware::vtd::{Port, Request, RingCounters, Unit};
use iommu_types::{
    Access, AddressType, Capabilities, DmaFault, FaultReason, Hpa, Iova, Permissions, TranslationFault,
};

use crate::machine::{DEVICE, Machine};

pub const RW: Permissions = Permissions::READ_WRITE;

/// [`DEVICE`] behind rings.
pub struct RingWorld {
    pub machine: Machine,
    pub root: Hpa,
    pub devices: Hpa,
    pub rings: Hpa,
    slots: Vec<Hpa>,
    sizes: Vec<u32>,
}

impl RingWorld {
    /// With rings of these sizes, all slots invalid.
    pub fn new(sizes: &[u32]) -> Self {
        let machine = Machine::new(Capabilities::FULL);
        let (root, devices, rings) = (machine.frame(), machine.frame(), machine.frame());
        let slots: Vec<Hpa> = sizes.iter().map(|_| machine.frame()).collect();
        let world = Self { machine, root, devices, rings, slots, sizes: sizes.to_vec() };
        world.store(world.root_entry_at(), RingRoot::present(devices).into_bits());
        let count = u16::try_from(sizes.len()).expect("few rings");
        world.store(world.device_entry_at(), RingDevice::with_rings_at(rings, count).into_bits());
        for (ring, (&slots, &size)) in (0u16..).zip(world.slots.iter().zip(sizes)) {
            assert!(u64::from(size) * ENTRY_BYTES <= 4096, "a ring of the tests is one frame");
            world.store(world.ring_at(ring), Ring::with_slots_at(slots, size).into_bits());
        }
        world.unit().set_ring_root(root);
        let _drained = world.unit().set_behind_rings(DEVICE, Some(count)).wait_blocking();
        world
    }
    pub fn unit(&self) -> &Unit {
        self.machine.bare.unit()
    }
    pub fn ring_counters(&self) -> RingCounters {
        self.unit().counters().ring
    }

    // === tables ===

    pub fn store(&self, at: Hpa, entry: u128) {
        self.machine.store_wide(at, entry);
    }
    pub fn root_entry_at(&self) -> Hpa {
        Hpa::new(self.root.get() + ENTRY_BYTES * u64::from(DEVICE.bus()))
    }
    pub fn device_entry_at(&self) -> Hpa {
        Hpa::new(self.devices.get() + ENTRY_BYTES * u64::from(DEVICE.devfn()))
    }
    pub fn ring_at(&self, ring: u16) -> Hpa {
        Hpa::new(self.rings.get() + RING_BYTES * u64::from(ring))
    }
    pub fn slot_at(&self, ring: u16, slot: u32) -> Hpa {
        Hpa::new(self.slots[usize::from(ring)].get() + ENTRY_BYTES * u64::from(slot))
    }
    pub fn size(&self, ring: u16) -> u32 {
        self.sizes[usize::from(ring)]
    }
    pub fn map(&self, ring: u16, slot: u32, pte: RingPte) {
        self.store(self.slot_at(ring, slot), pte.into_bits());
    }
    /// A fresh frame behind a slot, whole.
    pub fn map_new(&self, ring: u16, slot: u32, permissions: Permissions) -> Hpa {
        let frame = self.machine.frame();
        self.map(ring, slot, RingPte::valid(frame, 4096, permissions));
        frame
    }
    /// A fresh frame behind every slot of a ring.
    pub fn map_all(&self, ring: u16) -> Vec<Hpa> {
        (0..self.size(ring)).map(|slot| self.map_new(ring, slot, RW)).collect()
    }
    /// V=0, and nothing more: the ring is not invalidated.
    pub fn unmap(&self, ring: u16, slot: u32) {
        let at = self.slot_at(ring, slot);
        let entry = RingPte::from_bits(self.machine.bare.memory().load_u128(at).expect("inside memory"));
        self.store(at, entry.with_is_valid(false).into_bits());
    }
    /// The end of a burst of unmaps.
    pub fn end_burst(&self, ring: u16) {
        let _drained = self.unit().invalidate_ring(DEVICE, ring).wait_blocking();
    }

    // === the device ===

    pub fn port(&self) -> Port {
        self.machine.port(DEVICE)
    }
    pub fn execute(&self, iova: Iova, transfer: Transfer<'_>) -> Result<Done, DmaFault> {
        Run::new(&mut self.port()).execute(iova, None, transfer)
    }
}

pub fn iova(ring: u16, slot: u32, offset: u32) -> Iova {
    RingIova { ring, slot, offset }.pack()
}

pub fn request(ring: u16, slot: u32, offset: u32, size_bytes: u32, access: Access) -> Request {
    let iova = iova(ring, slot, offset);
    Request { iova, size_bytes, access, pasid: None, address_type: AddressType::Untranslated }
}

pub fn read(ring: u16, slot: u32) -> Request {
    request(ring, slot, 0, 8, Access::Read)
}

pub fn translate(port: &mut Port, request: Request) -> Result<Hpa, TranslationFault> {
    port.burst().translate(request, |lent| lent.hpa)
}

pub fn reach(port: &mut Port, request: Request) -> Result<Hpa, FaultReason> {
    translate(port, request).map_err(|fault| fault.reason)
}
