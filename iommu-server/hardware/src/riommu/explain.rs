//! Explain for a source behind rings: the shipping walk with a tracer, and the lookup that ships.
//!
//! Nothing is filled, counted or recorded. Where the entry of the ring and the tables disagree the entry is stale, and both ends are
//! told. Rings have no pages and no domains: a translation is told as one of the smallest page and of domain 0, and what it opens stands
//! in the conclusion.

use iommu_types::{
    CacheState, DomainId, Explanation, FaultReason, Hpa, Outcome, PageSize, Step, Structure, Translation,
};

use super::cache::Cached;
use super::spec::{ENTRY_BYTES, Ring, RingDevice, RingIova, RingPte, RingRoot};
use super::translate::{Rings, check_kind};
use super::walk::{Asked, RingTrace, admit};
use crate::vtd::walk::{TableMemory, reading};
use crate::vtd::{Request, refusal};

/// Where an access goes, and through what.
type End = Result<(Hpa, RingPte), FaultReason>;

/// What would happen to an access now, and why.
pub(crate) fn explain(rings: &Rings<'_, impl TableMemory>, request: &Request) -> Explanation {
    let (at, asked) = rings.asked(request);
    let mut steps = Steps(Vec::new());
    let kind = check_kind(request).map_err(|fault| fault.reason);
    let by_tables: End = kind.and_then(|()| {
        let (_, pte) = rings.walk(at, &mut steps)?;
        admit(pte, asked).map(|hpa| (hpa, pte))
    });
    let (iotlb, by_cache) = match kind {
        Ok(()) => look_at_cache(rings.cache.lookup(at), at, asked),
        Err(_) => (CacheState::NotAsked, None),
    };
    let stale = by_cache.filter(|cached| !matches!(by_tables, Ok(tables) if leads_alike(tables, *cached)));
    Explanation {
        source_id: rings.source,
        pasid: request.pasid,
        iova: request.iova,
        access: request.access,
        size_bytes: request.size_bytes,
        context_cache: CacheState::NotAsked,
        iotlb,
        paging_structure_cache: CacheState::NotAsked,
        steps: steps.0,
        outcome: match by_tables {
            Ok(end) => Outcome::Translated(translation(end)),
            Err(reason) => Outcome::Refused(refusal(rings.source, request, reason)),
        },
        fault_suppressed: false,
        stale: stale.map(translation),
        conclusion: conclude(rings, request, at, by_tables, stale),
    }
}

/// The state of the ring's entry, and where it leads the access if it does.
fn look_at_cache(cached: Cached, at: RingIova, asked: Asked) -> (CacheState, Option<(Hpa, RingPte)>) {
    let (how, pte) = match cached {
        Cached::Absent => return (CacheState::Miss, None),
        Cached::Current(pte) => ("", pte),
        Cached::Next(pte) => ("prefetched ", pte),
    };
    let entry = format!("ring {}, {how}slot {} -> {}", at.ring, at.slot, opens_in_words(pte));
    match admit(pte, asked) {
        Ok(hpa) => (CacheState::Hit { entry }, Some((hpa, pte))),
        Err(_) => (CacheState::Insufficient { entry }, None),
    }
}

fn leads_alike((tables, by_tables): (Hpa, RingPte), (cached, by_cache): (Hpa, RingPte)) -> bool {
    tables == cached && by_tables.permissions() == by_cache.permissions()
}

fn translation((hpa, pte): (Hpa, RingPte)) -> Translation {
    Translation {
        hpa,
        page_size: PageSize::Size4K,
        permissions: pte.permissions(),
        domain_id: DomainId::new(0),
    }
}

fn conclude<M>(
    rings: &Rings<'_, M>,
    request: &Request,
    RingIova { ring, slot, .. }: RingIova,
    by_tables: End,
    stale: Option<(Hpa, RingPte)>,
) -> String {
    let Request { iova, access, .. } = request;
    let asked = format!("The {access} at {iova} by {}", rings.source);
    let by_tables = match by_tables {
        Ok((hpa, pte)) => {
            format!("{asked} reaches {hpa} through slot {slot} of ring {ring} ({})", opens_in_words(pte))
        }
        Err(reason) if !is_of_rings(reason) => format!("{asked} is refused: {reason}"),
        Err(reason) => format!("{asked} is refused: {reason} (slot {slot} of ring {ring})"),
    };
    match stale {
        Some((hpa, _)) => {
            format!("{by_tables} by the tables, but a stale cached entry still leads it to {hpa}.")
        }
        None => format!("{by_tables}."),
    }
}

/// Whether the slot had a part in a refusal.
fn is_of_rings(reason: FaultReason) -> bool {
    !matches!(reason, FaultReason::PASID_IN_LEGACY_MODE | FaultReason::TRANSLATED_BLOCKED)
}

fn opens_in_words(pte: RingPte) -> String {
    format!("{} bytes at {}, {}", pte.size_bytes(), pte.address(), pte.permissions())
}

/// Collects the steps of a walk.
struct Steps(Vec<Step>);

impl RingTrace for Steps {
    fn read(&mut self, structure: Structure, index: u32, at: Hpa, raw: Option<u128>) {
        let reading = match raw {
            None if !at.is_aligned(ENTRY_BYTES) => format!("not a multiple of {ENTRY_BYTES}"),
            None => reading::UNREADABLE.to_owned(),
            Some(raw) => in_words(structure, index, raw),
        };
        let slot = raw.map(RingPte::from_bits).filter(|_| structure == Structure::RingSlot);
        self.0.push(Step {
            structure,
            index: u16::try_from(index).unwrap_or(u16::MAX),
            at,
            low: raw.map(|raw| raw as u64),
            high: raw.map(|raw| (raw >> 64) as u64),
            permissions: slot.map(RingPte::permissions),
            reading,
        });
    }
}

/// As every reading, this begins with `present` or `not present`.
fn in_words(structure: Structure, index: u32, raw: u128) -> String {
    let words = match structure {
        Structure::RingRoot => {
            let entry = RingRoot::from_bits(raw);
            entry.is_present().then(|| format!("device table {}", entry.device_table()))
        }
        Structure::RingDevice => {
            let entry = RingDevice::from_bits(raw);
            entry.is_present().then(|| format!("rings {}, at {}", entry.count(), entry.rings()))
        }
        Structure::Ring => {
            let entry = Ring::from_bits(raw);
            (entry.size() != 0).then(|| format!("slots {}, at {}", entry.size(), entry.slots()))
        }
        _ => {
            let entry = RingPte::from_bits(raw);
            entry.is_valid().then(|| format!("slot {index}, {}", opens_in_words(entry)))
        }
    };
    words.map_or_else(|| "not present".to_owned(), |words| format!("present, {words}"))
}
