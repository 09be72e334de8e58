//! What the sanitizer has to say, judged by reading a list of everything that ever was mapped from end to end.

use std::collections::BTreeSet;

use iommu_kernel::MappingKind;
use iommu_types::errors::{DmaSyncError, DmaUnmapError};
use iommu_types::{Access, Direction, Gpa, Iova, MappingLife, ReportClass, RequestId, SyncFor};

/// A mapping as the sanitizer is told of it: a buffer, or a segment of scatter-gather with the memory of its elements.
#[derive(Clone, Debug)]
pub(crate) struct Known {
    pub(crate) life: MappingLife,
    pub(crate) kind: MappingKind,
    /// Order of its death.
    died: Option<u64>,
    /// Memory behind it, as (address, size).
    memory: Vec<(u64, u64)>,
}

impl Known {
    fn base(&self) -> u64 {
        self.life.iova.get()
    }
    fn covers(&self, address: u64) -> bool {
        address.checked_sub(self.base()).is_some_and(|offset| offset < self.life.size_bytes)
    }
    fn is_streaming(&self) -> bool {
        self.kind != MappingKind::Coherent
    }
    fn lines(&self) -> BTreeSet<u64> {
        self.memory.iter().flat_map(|(at, size_bytes)| at / 64..=(at + size_bytes - 1) / 64).collect()
    }
}

/// A report, as far as it is compared.
pub(crate) type Said = (ReportClass, Option<MappingLife>);

#[derive(Clone, Copy, Debug)]
struct Transfer {
    end: u64,
    access: Access,
    origin: Option<usize>,
}

/// Where an access was.
#[derive(Clone, Copy, Debug)]
enum Spot {
    Fine(usize),
    Bad(ReportClass, usize),
    Error,
    Stray,
}

#[derive(Debug, Default)]
pub(crate) struct Judge {
    known: Vec<Known>,
    transfers: [Vec<Transfer>; 2],
}

impl Judge {
    pub(crate) fn live(&self) -> impl DoubleEndedIterator<Item = &Known> {
        self.known.iter().filter(|known| known.died.is_none())
    }
    /// The lives of what was mapped and is not any more.
    pub(crate) fn dead(&self) -> impl Iterator<Item = &Known> {
        self.known.iter().filter(|known| known.died.is_some())
    }
    /// A birth. Whether memory is mapped twice now, of which one lets the device write.
    pub(crate) fn mapped(
        &mut self,
        (iova, size_bytes): (u64, u64),
        memory: Vec<(u64, u64)>,
        direction: Direction,
        kind: MappingKind,
        (born_at_us, born_by): (u64, RequestId),
    ) -> Option<ReportClass> {
        let life = MappingLife {
            iova: Iova::new(iova),
            size_bytes,
            gpa: Gpa::new(memory[0].0),
            direction,
            coherent: kind == MappingKind::Coherent,
            born_at_us,
            born_by,
            death: None,
        };
        let known = Known { life, kind, died: None, memory };
        let writes = |known: &Known| known.life.direction != Direction::ToDevice;
        let clashes = |other: &Known| {
            other.is_streaming()
                && (writes(other) || writes(&known))
                && !other.lines().is_disjoint(&known.lines())
        };
        let is_twice = known.is_streaming() && self.live().any(clashes);
        self.known.push(known);
        is_twice.then_some(ReportClass::Overlap)
    }
    /// A death: that of the oldest of equal ones.
    pub(crate) fn unmapped(
        &mut self,
        (iova, size_bytes): (u64, u64),
        direction: Direction,
        kind: MappingKind,
        order: u64,
        death: (u64, RequestId),
    ) {
        let dying = self.known.iter_mut().find(|known| {
            known.died.is_none()
                && (known.base(), known.life.size_bytes, known.life.direction, known.kind)
                    == (iova, size_bytes, direction, kind)
        });
        let dying = dying.expect("what the driver unmapped was mapped");
        dying.died = Some(order);
        dying.life.death = Some(death);
    }
    /// The newest mapping that begins at an address, or else the newest that covers it.
    fn here(&self, iova: u64) -> Option<MappingLife> {
        let begins = self.live().rfind(|known| known.base() == iova);
        begins.or_else(|| self.live().rfind(|known| known.covers(iova))).map(|known| known.life)
    }
    fn latest_dead(&self, wanted: impl Fn(&Known) -> bool) -> Option<MappingLife> {
        let dead = self.dead().filter(|known| wanted(known));
        dead.max_by_key(|known| known.died).map(|known| known.life)
    }
    pub(crate) fn refused_unmap(&self, iova: u64, error: &DmaUnmapError) -> Option<Said> {
        let dead = || self.latest_dead(|known| known.base() == iova);
        match error {
            DmaUnmapError::NotMapped(_) => Some(match dead() {
                Some(dead) => (ReportClass::DoubleUnmap, Some(dead)),
                None => (ReportClass::FreeOfUnmapped, self.here(iova)),
            }),
            DmaUnmapError::SizeMismatch(_) => Some((ReportClass::SizeMismatch, self.here(iova))),
            DmaUnmapError::DirectionMismatch(_) => Some((ReportClass::DirectionMismatch, self.here(iova))),
            DmaUnmapError::WrongFunction(_) => Some((ReportClass::WrongFree, self.here(iova))),
            _ => None,
        }
    }
    pub(crate) fn refused_sync(&self, iova: u64, error: &DmaSyncError) -> Option<Said> {
        let here = self.here(iova);
        match error {
            DmaSyncError::NotMapped(_) | DmaSyncError::WrongFunction(_) => {
                let dead = self.latest_dead(|known| known.covers(iova));
                Some((ReportClass::SyncOfUnmapped, here.or(dead)))
            }
            DmaSyncError::OutsideMapping(_) => Some((ReportClass::SyncOutside, here)),
            DmaSyncError::DirectionMismatch(_) => Some((ReportClass::SyncDirection, here)),
            _ => None,
        }
    }
    /// A sync that succeeded, against the direction of all that it can have meant.
    pub(crate) fn synced(&self, iova: u64, last: u64, target: SyncFor) -> Option<Said> {
        let wrong = match target {
            SyncFor::Cpu => Direction::ToDevice,
            SyncFor::Device => Direction::FromDevice,
        };
        let meant: Vec<_> = self.live().filter(|known| known.covers(iova) && known.covers(last)).collect();
        let is_misuse = meant.iter().all(|known| known.life.direction == wrong);
        let newest = meant.last().filter(|_| is_misuse)?;
        Some((ReportClass::SyncDirection, Some(newest.life)))
    }
    /// Memory that was not freed because it is mapped.
    pub(crate) fn released(&self, first: u64, last: u64) -> Option<Said> {
        let lies_in = |(at, size_bytes): &(u64, u64)| *at <= last && at + size_bytes > first;
        let newest = self.live().rfind(|known| known.memory.iter().any(lies_in))?;
        Some((ReportClass::ReleasedWhileMapped, Some(newest.life)))
    }
    pub(crate) fn leaked(&self) -> Vec<Said> {
        self.live().map(|known| (ReportClass::Leak, Some(known.life))).collect()
    }
    /// A DMA that began after `begun`, refused or not.
    pub(crate) fn dma(
        &mut self,
        device: usize,
        begun: u64,
        first: u64,
        size_bytes: usize,
        access: Access,
    ) -> Option<Said> {
        let spot = self.spot(device, begun, first, size_bytes, access);
        let origin = match spot {
            Spot::Fine(at) | Spot::Bad(_, at) => Some(at),
            Spot::Error | Spot::Stray => None,
        };
        let end = first.checked_add(size_bytes as u64);
        if let Some(end) = end.filter(|_| !matches!(spot, Spot::Error)) {
            let transfers = &mut self.transfers[device];
            transfers.retain(|known| known.access != access || (known.end != first && known.end != end));
            transfers.push(Transfer { end, access, origin });
            assert!(transfers.len() <= 64, "cases are short enough that no transfer is forgotten");
        }
        match spot {
            Spot::Fine(_) => None,
            Spot::Bad(class, at) => Some((class, Some(self.known[at].life))),
            Spot::Error => Some((ReportClass::ErrorNeverChecked, None)),
            Spot::Stray => Some((ReportClass::StrayAccess, None)),
        }
    }
    fn spot(&self, device: usize, begun: u64, first: u64, size_bytes: usize, access: Access) -> Spot {
        let known = || self.known.iter().enumerate();
        let was_there =
            |known: &(usize, &Known)| known.1.covers(first) && known.1.died.is_none_or(|died| died >= begun);
        let here: Vec<_> = known().filter(was_there).collect();
        let allows = |known: &Known| known.life.direction.permissions().allow(access);
        let holds_all = |known: &Known| known.covers(first + (size_bytes as u64 - 1));
        let fine = here.iter().rfind(|(_, known)| allows(known) && holds_all(known));
        let too_short = here.iter().rfind(|(_, known)| allows(known));
        match (fine, too_short, here.last()) {
            (Some((at, _)), ..) => return Spot::Fine(*at),
            (_, Some((at, _)), _) => return Spot::Bad(ReportClass::Overrun, *at),
            (.., Some((at, _))) => return Spot::Bad(ReportClass::WrongDirection, *at),
            _ if first == u64::MAX => return Spot::Error,
            _ => {}
        }
        let is_onward = |transfer: &&Transfer| transfer.end == first && transfer.access == access;
        if let Some(Transfer { origin: Some(origin), .. }) = self.transfers[device].iter().find(is_onward)
            && !self.known[*origin].covers(first)
            && !known().any(|(_, known)| known.died.is_some() && known.base() == first)
        {
            return Spot::Bad(ReportClass::Overrun, *origin);
        }
        let late = known().filter(|(_, known)| known.covers(first));
        match late.max_by_key(|(at, known)| (known.died, *at)) {
            Some((at, _)) => Spot::Bad(ReportClass::UseAfterUnmap, at),
            None => Spot::Stray,
        }
    }
}
