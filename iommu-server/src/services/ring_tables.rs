//! Dumps the tables of a device behind rings: root, device, each ring, and its valid slots.
//!
//! Which slots are valid is read here; every entry is then told by Explain, so there is no second way to put one into words.
//!
//! **Promise:** as for [`Dump`](super::tables::Dump): a table that is gone is not read. A step is taken only while the domain whose rings these
//! are cannot let go of the device.

use iommu_hardware::riommu::RingIova;
use iommu_hardware::riommu::spec::{Ring, RingDevice, RingPte, entry_address};
use iommu_hardware::vtd::Unit;
use iommu_proto::model::WalkStep;
use iommu_types::{Access, Iova, SourceId, Step, Structure};

/// Where the dump of a device's rings stands.
#[derive(Debug, Default)]
pub(super) struct RingDump {
    ring: u16,
    /// The slots of the ring, when it was told.
    begun: Option<Ring>,
    slot: u32,
}

/// The steps on the way to an address.
fn steps(unit: &Unit, source: SourceId, at: Iova) -> Vec<Step> {
    unit.explain(source, None, at, Access::Read, 1).steps
}

/// The entry of one sort on the way to an address.
fn step(unit: &Unit, source: SourceId, at: Iova, structure: Structure) -> Option<Step> {
    steps(unit, source, at).into_iter().find(|step| step.structure == structure)
}

fn bits(step: &Step) -> Option<u128> {
    Some(u128::from(step.high?) << 64 | u128::from(step.low?))
}

/// How many rings the device entry among these steps names.
fn count(steps: &[Step]) -> u16 {
    let device = steps.iter().find(|step| step.structure == Structure::RingDevice);
    device.and_then(bits).map_or(0, |bits| RingDevice::from_bits(bits).count())
}

impl RingDump {
    /// The next entry, if there is one.
    pub(super) fn next(&mut self, unit: &Unit, source: SourceId) -> Option<WalkStep> {
        loop {
            let at = RingIova { ring: self.ring, slot: 0, offset: 0 }.pack();
            let Some(ring) = self.begun else {
                let steps = steps(unit, source, at);
                if self.ring >= count(&steps) {
                    return None;
                }
                let step = steps.into_iter().find(|step| step.structure == Structure::Ring)?;
                // One that cannot be read has no slots.
                self.begun = Some(bits(&step).map_or(Ring::new(), Ring::from_bits));
                self.slot = 0;
                return Some(WalkStep { step, iova: Some(at) });
            };
            if let Some(found) = self.next_slot(unit, source, ring) {
                return Some(found);
            }
            self.begun = None;
            self.ring = self.ring.checked_add(1)?;
        }
    }

    fn next_slot(&mut self, unit: &Unit, source: SourceId, ring: Ring) -> Option<WalkStep> {
        while self.slot < ring.reachable_slots() {
            let slot = self.slot;
            self.slot += 1;
            let entry = entry_address(ring.slots(), slot).and_then(|at| unit.memory().load_u128(at).ok());
            if entry.is_some_and(|entry| RingPte::from_bits(entry).is_valid()) {
                let at = RingIova { ring: self.ring, slot, offset: 0 }.pack();
                let found = step(unit, source, at, Structure::RingSlot);
                if let Some(step) = found {
                    return Some(WalkStep { step, iova: Some(at) });
                }
            }
        }
        None
    }
}
