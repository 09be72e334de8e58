//! Mappings that are gone: as many as there is room for, the latest.
//!
//! A mapping that dies replaces an equal one that died before (same addresses, direction and kind): whatever could be said of the earlier
//! death can be said of the later one, so a driver that maps and unmaps the same buffers over and over fills one place per
//! buffer. When the room is used up, the earliest death is forgotten, and two things are kept of all that were: the latest order of a death,
//! because a DMA that began before it may have been legitimate; and the addresses between which they lay, because an access
//! there may have been a use after unmap.

use std::collections::BTreeMap;

use iommu_types::Direction;

use super::index::RangeIndex;
use super::mapping::{Mapping, MappingKind};

type Shape = (u64, u64, u8, MappingKind);

fn shape(mapping: &Mapping) -> Shape {
    let direction = match mapping.life.direction {
        Direction::Bidirectional => 0,
        Direction::ToDevice => 1,
        Direction::FromDevice => 2,
    };
    (mapping.first(), mapping.last(), direction, mapping.kind)
}

/// What is known of mappings that were forgotten.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Forgotten {
    latest_death: u64,
    first: u64,
    last: u64,
    /// Whether one of them was revoked and not unmapped by its driver.
    any_revoked: bool,
}

#[derive(Debug)]
pub(super) struct Graveyard {
    capacity: usize,
    /// Numbered by death.
    dead: RangeIndex<Mapping>,
    by_shape: BTreeMap<Shape, u64>,
    by_death: BTreeMap<u64, Shape>,
    deaths: u64,
    forgotten: Option<Forgotten>,
}

impl Graveyard {
    pub(super) fn new(capacity: usize) -> Self {
        Self {
            capacity: capacity.max(1),
            dead: RangeIndex::new(),
            by_shape: BTreeMap::new(),
            by_death: BTreeMap::new(),
            deaths: 0,
            forgotten: None,
        }
    }
    /// Takes a mapping that has died.
    pub(super) fn bury(&mut self, mapping: Mapping) {
        let (mut mapping, shape) = (mapping, shape(&mapping));
        if let Some(earlier) = self.by_shape.remove(&shape) {
            self.by_death.remove(&earlier);
            let replaced = self.dead.remove(shape.0, shape.1, earlier);
            let owed = replaced.map_or(0, |replaced| replaced.unmaps_owed);
            mapping.unmaps_owed = mapping.unmaps_owed.saturating_add(owed);
        } else if self.by_shape.len() >= self.capacity {
            self.forget_earliest();
        }
        self.deaths += 1;
        self.by_shape.insert(shape, self.deaths);
        self.by_death.insert(self.deaths, shape);
        self.dead.insert(shape.0, shape.1, self.deaths, mapping);
    }
    fn forget_earliest(&mut self) {
        let Some((number, shape)) = self.by_death.pop_first() else { return };
        self.by_shape.remove(&shape);
        let Some(mapping) = self.dead.remove(shape.0, shape.1, number) else { return };
        let died = mapping.died.unwrap_or(u64::MAX);
        let (first, last) = (mapping.first(), mapping.last());
        let any_revoked = mapping.is_revoked();
        let all = self.forgotten.unwrap_or(Forgotten { latest_death: died, first, last, any_revoked });
        self.forgotten = Some(Forgotten {
            latest_death: all.latest_death.max(died),
            first: all.first.min(first),
            last: all.last.max(last),
            any_revoked: all.any_revoked || any_revoked,
        });
    }
    /// The dead that cover the address.
    pub(super) fn covering(&self, address: u64) -> impl Iterator<Item = &Mapping> {
        self.dead.touching(address, address)
    }
    /// The latest to die of those that cover the address and died before that order.
    pub(super) fn latest_before(&self, address: u64, order: u64) -> Option<&Mapping> {
        self.covering(address).filter(|mapping| !mapping.lived_at(order)).max_by_key(|m| (m.died, m.number))
    }
    /// The latest to die of those that began at the address.
    pub(super) fn at_base(&self, base: u64) -> Option<&Mapping> {
        self.covering(base).filter(|mapping| mapping.first() == base).max_by_key(|m| (m.died, m.number))
    }
    /// The driver unmaps what begins at the address and is not there. Whether it may: a mapping was revoked there, and this is the first
    /// unmap of it; or perhaps one that was forgotten.
    pub(super) fn forgive_at(&mut self, base: u64) -> bool {
        let revoked = self.covering(base).filter(|mapping| mapping.first() == base && mapping.is_revoked());
        let Some(revoked) = revoked.max_by_key(|mapping| (mapping.died, mapping.number)).copied() else {
            let perhaps = self.forgotten.is_some_and(|all| all.any_revoked) && self.may_have_covered(base);
            return perhaps && self.at_base(base).is_none();
        };
        let number = self.by_shape[&shape(&revoked)];
        self.dead.remove(revoked.first(), revoked.last(), number);
        let forgiven = revoked.with_unmaps_owed(revoked.unmaps_owed - 1);
        self.dead.insert(revoked.first(), revoked.last(), number, forgiven);
        true
    }
    /// Whether a mapping that was forgotten may have been alive at that order or later.
    pub(super) fn may_have_lived(&self, order: u64) -> bool {
        self.forgotten.is_some_and(|forgotten| forgotten.latest_death >= order)
    }
    /// Whether a mapping that was forgotten may have covered the address.
    pub(super) fn may_have_covered(&self, address: u64) -> bool {
        self.forgotten.is_some_and(|all| (all.first..=all.last).contains(&address))
    }
}

#[cfg(test)]
mod tests {
    use iommu_types::{Gpa, Iova, IovaRange, RequestId};

    use super::*;
    use crate::sanitizer::NewMapping;

    fn dead(number: u64, base: u64, died: u64) -> Mapping {
        let range = IovaRange::new(Iova::new(base), 0x100).expect("a range");
        let (direction, kind) = (Direction::ToDevice, MappingKind::Single);
        let mut mapping = Mapping::new(
            number,
            NewMapping { range, gpa: Gpa::new(0), direction, kind },
            0,
            RequestId(number),
        );
        mapping.died = Some(died);
        mapping
    }

    #[test]
    fn i7_equal_ones_take_one_place_and_the_earliest_death_makes_place() {
        let mut graveyard = Graveyard::new(3);
        for n in 0..100 {
            graveyard.bury(dead(n, 0x1000, n));
            assert_eq!(graveyard.latest_before(0x1000, u64::MAX).map(|mapping| mapping.number), Some(n));
        }
        assert!(!graveyard.may_have_lived(0));
        for n in 100..104 {
            graveyard.bury(dead(n, n << 12, n));
        }
        let sizes = (graveyard.dead.iter().count(), graveyard.by_shape.len(), graveyard.by_death.len());
        assert_eq!(sizes, (3, 3, 3));
        let forgotten =
            Forgotten { latest_death: 100, first: 0x1000, last: (100 << 12) + 0xff, any_revoked: false };
        assert_eq!(graveyard.forgotten, Some(forgotten));
        assert!(graveyard.may_have_lived(100) && !graveyard.may_have_lived(101));
    }
}
