//! What a DMA was: the rules, as functions of what is known.
//!
//! **When.** A DMA takes its order before it begins, and may be looked at much later. It is judged by what was mapped when it began *or at
//! any time since*: by the live mappings, and by the dead ones whose death came after its beginning. So a DMA that races with an unmap
//! or with a map is never reported for the race, and a use after unmap is one that began after the death. Where a forgotten mapping may
//! have died since the DMA began, nothing is said.
//!
//! **Where.** The access is legitimate if one of these mappings covers all of it and its direction allows it. Otherwise, by where it
//! *begins*, the first that applies:
//!
//! 1. in one whose direction allows it: **overrun** of the newest such;
//! 2. in others only: **wrong direction** against the newest;
//! 3. at the all-ones address: **error never checked**;
//! 4. where the device's previous piece of a transfer ended, outside of the mapping which that transfer began in: **overrun** of that mapping,
//!    alive or dead. Not so if exactly this address was given, or if a dead mapping begins here: then it is a new transfer;
//! 5. in a mapping that was dead: **use after unmap** of the latest to die;
//! 6. anywhere else: **stray access**.
//!
//! **Who.** An address in a mapping counts as given when any address inside that mapping was. An address outside of all counts as given when
//! exactly it was, or the start of its transfer.
//!
//! | class | never given | given | perhaps given |
//! |---|---|---|---|
//! | overrun, wrong direction | device, V2 | unknown: length and direction may be of either's making | unknown |
//! | use after unmap | device, V3 | V3; driver if it was given *after* the death, else unknown: unmapped too early, or used too late | unknown, V3 |
//! | stray access | device, V2 | driver, V1 | unknown |
//! | error never checked | device, V2 | driver, V1 | unknown |
//!
//! Given *after* the death is what was written to a register while nothing was mapped at the address. A word in memory does not prove
//! it: the driver may have left it there since before. A stray access where a forgotten mapping may have been could be a use after
//! unmap, so of it neither kind nor culprit is told; nor of a further piece that leads there, nor of an access behind the end of a mapping when
//! the device is in more transfers than are followed.

use iommu_types::{Blame, ReportClass, Violation};

use super::devices::{Device, Origin, Run};
use super::graveyard::Graveyard;
use super::live::Live;
use super::mapping::{Asked, Mapping};
use super::supplied::Supply;

/// Mappings at one address that are looked at. A driver may map one page very often; that must not make each DMA slow.
pub(super) const LOOKED_AT_MAX: usize = 4096;

/// What a DMA was.
#[derive(Clone, Copy, Debug)]
pub(super) enum Place {
    Legitimate(Mapping),
    Overrun(Mapping),
    WrongDirection(Mapping),
    UseAfterUnmap(Mapping),
    /// As use after unmap, and perhaps a further piece of a transfer that is not known any more.
    DoubtfulUse(Mapping),
    ErrorNeverChecked,
    /// With the start of the transfer, where it is a further piece of one that began outside of all mappings.
    Stray {
        start: u64,
    },
    /// Outside of all known mappings, where a forgotten one may have been; or a further piece of a transfer that began in such a place.
    DoubtfulStray,
    /// It cannot be told, because something was forgotten or there was too much to look at.
    Unjudged,
}

impl Place {
    /// The mapping concerned.
    pub(super) fn mapping(&self) -> Option<&Mapping> {
        match self {
            Self::Legitimate(mapping)
            | Self::Overrun(mapping)
            | Self::WrongDirection(mapping)
            | Self::UseAfterUnmap(mapping)
            | Self::DoubtfulUse(mapping) => Some(mapping),
            Self::ErrorNeverChecked | Self::Stray { .. } | Self::DoubtfulStray | Self::Unjudged => None,
        }
    }
}

/// Whether an overrun is a further piece of a transfer, as far as is known, at a place where a forgotten mapping may have been.
fn is_doubtful_piece(mapping: &Mapping, dead: &Graveyard, asked: &Asked) -> bool {
    !mapping.contains(asked.first) && dead.may_have_covered(asked.first)
}

/// First address and origin of the transfer that the access is a piece of, for those that may follow.
pub(super) fn transfer(place: &Place, dead: &Graveyard, asked: &Asked) -> Option<(u64, Origin)> {
    match place {
        _ if !asked.moves_bytes => None,
        Place::ErrorNeverChecked => None,
        Place::Stray { start } => Some((*start, Origin::Outside)),
        Place::Unjudged | Place::DoubtfulStray | Place::DoubtfulUse(_) => {
            Some((asked.first, Origin::Doubtful))
        }
        Place::Overrun(mapping) if is_doubtful_piece(mapping, dead, asked) => {
            Some((asked.first, Origin::Doubtful))
        }
        Place::Legitimate(mapping)
        | Place::Overrun(mapping)
        | Place::WrongDirection(mapping)
        | Place::UseAfterUnmap(mapping) => Some((asked.first, Origin::Mapping(*mapping))),
    }
}

/// The newest mappings of each sort at the address where an access begins.
#[derive(Default)]
struct Sight {
    legitimate: Option<Mapping>,
    too_short: Option<Mapping>,
    other_direction: Option<Mapping>,
    looked_at: usize,
}

impl Sight {
    fn look<'m>(&mut self, asked: &Asked, mappings: impl Iterator<Item = &'m Mapping>) {
        for mapping in mappings.take(LOOKED_AT_MAX) {
            self.looked_at += 1;
            let sort = match (asked.goes_with(mapping), mapping.contains(asked.last)) {
                (true, true) => &mut self.legitimate,
                (true, false) => &mut self.too_short,
                (false, _) => &mut self.other_direction,
            };
            if sort.is_none_or(|known| known.number < mapping.number) {
                *sort = Some(*mapping);
            }
        }
    }
}

/// Which of the rules applies.
pub(super) fn place(live: &Live, dead: &Graveyard, device: &Device, begun: u64, asked: &Asked) -> Place {
    let first = asked.first;
    let mut sight = Sight::default();
    sight.look(asked, live.touching(first, first));
    if sight.legitimate.is_none() {
        sight.look(asked, dead.covering(first).filter(|mapping| mapping.lived_at(begun)));
    }
    if let Some(mapping) = sight.legitimate {
        return Place::Legitimate(mapping);
    }
    if sight.looked_at >= LOOKED_AT_MAX || dead.may_have_lived(begun) {
        return Place::Unjudged;
    }
    if let Some(mapping) = sight.too_short {
        return Place::Overrun(mapping);
    }
    if let Some(mapping) = sight.other_direction {
        return Place::WrongDirection(mapping);
    }
    if first == u64::MAX {
        return Place::ErrorNeverChecked;
    }
    outside(live, dead, device, begun, asked)
}

/// The rules for an access that begins in nothing that was mapped when it began, or since.
fn outside(live: &Live, dead: &Graveyard, device: &Device, begun: u64, asked: &Asked) -> Place {
    let first = asked.first;
    let is_given = device.supplied.holds(first);
    let run = device.continued(asked).filter(|_| !is_given);
    let begins_here = dead.covering(first).any(|mapping| mapping.first() == first);
    if let Some(Run { origin: Origin::Mapping(mapping), .. }) = run
        && !mapping.contains(first)
        && !begins_here
    {
        return Place::Overrun(*mapping);
    }
    let is_doubtful = match run {
        Some(run) => matches!(run.origin, Origin::Doubtful),
        None => !is_given && device.may_go_on_at(first, || may_end_before(live, dead, first)),
    };
    if let Some(mapping) = dead.latest_before(first, begun) {
        let is_doubtful = is_doubtful && !begins_here;
        return if is_doubtful { Place::DoubtfulUse(*mapping) } else { Place::UseAfterUnmap(*mapping) };
    }
    match run {
        _ if is_doubtful || dead.may_have_covered(first) => Place::DoubtfulStray,
        Some(Run { origin: Origin::Outside, start, .. }) => Place::Stray { start: *start },
        _ => Place::Stray { start: first },
    }
}

/// Class, violation and blame.
pub(super) fn verdict(
    place: &Place,
    dead: &Graveyard,
    device: &Device,
    asked: &Asked,
) -> Option<(ReportClass, Option<Violation>, Blame)> {
    let supplied = &device.supplied;
    let by_mapping = |mapping: &Mapping| supplied.within(mapping.first(), mapping.last());
    Some(match place {
        Place::Legitimate(_) | Place::Unjudged => return None,
        // Its memory was taken back, of which neither driver nor device knows.
        Place::UseAfterUnmap(mapping) | Place::DoubtfulUse(mapping) if mapping.is_revoked() => return None,
        // A mapping that was forgotten may have begun here, and then this is no further piece.
        Place::Overrun(mapping) if is_doubtful_piece(mapping, dead, asked) => {
            (ReportClass::Overrun, None, Blame::Unknown)
        }
        Place::Overrun(mapping) => shared_making(ReportClass::Overrun, by_mapping(mapping)),
        Place::WrongDirection(mapping) => shared_making(ReportClass::WrongDirection, by_mapping(mapping)),
        Place::UseAfterUnmap(mapping) => {
            let died = mapping.died.unwrap_or(u64::MAX);
            let blame = match by_mapping(mapping) {
                Supply::Never => Blame::Device,
                _ if supplied.dangled_after(mapping.first(), mapping.last(), died) => Blame::Driver,
                Supply::Given | Supply::Perhaps => Blame::Unknown,
            };
            (ReportClass::UseAfterUnmap, Some(Violation::InvalidUse), blame)
        }
        Place::ErrorNeverChecked => {
            address_making(ReportClass::ErrorNeverChecked, supplied.exactly(asked.first))
        }
        Place::DoubtfulUse(_) => (ReportClass::UseAfterUnmap, Some(Violation::InvalidUse), Blame::Unknown),
        Place::DoubtfulStray => (ReportClass::StrayAccess, None, Blame::Unknown),
        Place::Stray { start } => {
            let supply = match (supplied.exactly(asked.first), supplied.exactly(*start)) {
                (Supply::Given, _) | (_, Supply::Given) => Supply::Given,
                (Supply::Never, Supply::Never) => Supply::Never,
                _ => Supply::Perhaps,
            };
            address_making(ReportClass::StrayAccess, supply)
        }
    })
}

/// Whether a mapping, alive, dead or forgotten, may end right before the address.
fn may_end_before(live: &Live, dead: &Graveyard, address: u64) -> bool {
    let Some(before) = address.checked_sub(1) else { return false };
    let mut mappings = live.touching(before, before).chain(dead.covering(before));
    mappings.any(|mapping| mapping.last() == before) || dead.may_have_covered(before)
}

/// A given address leaves it open who made the rest of the access.
fn shared_making(class: ReportClass, supply: Supply) -> (ReportClass, Option<Violation>, Blame) {
    match supply {
        Supply::Never => (class, Some(Violation::BadDevice), Blame::Device),
        Supply::Given | Supply::Perhaps => (class, None, Blame::Unknown),
    }
}

/// The address itself is wrong: whoever made it is to blame.
fn address_making(class: ReportClass, supply: Supply) -> (ReportClass, Option<Violation>, Blame) {
    match supply {
        Supply::Given => (class, Some(Violation::BadAddress), Blame::Driver),
        Supply::Never => (class, Some(Violation::BadDevice), Blame::Device),
        Supply::Perhaps => (class, None, Blame::Unknown),
    }
}
