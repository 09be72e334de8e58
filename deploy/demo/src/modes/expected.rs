//! What must come of a write after unmap, mode by mode, and why. Argued from what the modes promise, not copied from a run.

use std::fmt;
use std::time::Duration;

use guest_sdk::{Blame, Deferral, DomainOptions, MappingGranularity, Protection, ReportClass, Violation};
use iommu_types::FaultReason;

/// The stale window of the deferred domain. Linux has 10 ms; this is long enough to attack inside of it on a machine under load too.
pub(crate) const WINDOW: Duration = Duration::from_millis(DEFERRAL.interval_ms as u64);
/// The usual batch with that window.
const DEFERRAL: Deferral = Deferral { batch: 256, interval_ms: 2000 };

/// Where and when the device attacks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Attack {
    NoProtection,
    Passthrough,
    Strict,
    StrictByte,
    DeferredWithin,
    DeferredAfter,
    Shared,
    Persistent,
    Bounce,
    RingWithin,
    RingAfter,
}

/// What becomes of the write.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fate {
    /// It reaches the buffer.
    Lands,
    /// The unit refuses and records it.
    Refused(FaultReason),
    /// It goes somewhere harmless, and no hardware minds.
    Deflected,
}

/// What the sanitizer must report.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Report {
    pub(crate) class: ReportClass,
    pub(crate) violation: Option<Violation>,
    pub(crate) blame: Blame,
    /// Bounds of the age, beside what the driver's own clock says.
    pub(crate) age_min: Duration,
    pub(crate) age_max: Duration,
}

/// The device still had the address from before, so it cannot be told whether the driver unmapped too early or the device used it too
/// late.
const USE_AFTER_UNMAP: Report = Report {
    class: ReportClass::UseAfterUnmap,
    violation: Some(Violation::InvalidUse),
    blame: Blame::Unknown,
    age_min: Duration::ZERO,
    age_max: Duration::MAX,
};

/// What must come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Expected {
    pub(crate) fate: Fate,
    /// `None` where no sanitizer can look.
    pub(crate) report: Option<Report>,
    /// Invalidations that were asked for between the unmap and the attack, and for what: an unmap, a flush, a burst.
    pub(crate) invalidations: (u64, &'static str),
    /// Why, in a sentence or two.
    pub(crate) why: &'static str,
}

impl Attack {
    /// Every attack, in the order in which they are shown.
    pub(crate) const ALL: [Self; 11] = [
        Self::NoProtection,
        Self::Passthrough,
        Self::Strict,
        Self::StrictByte,
        Self::DeferredWithin,
        Self::DeferredAfter,
        Self::Shared,
        Self::Persistent,
        Self::Bounce,
        Self::RingWithin,
        Self::RingAfter,
    ];

    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::NoProtection => "no protection at all",
            Self::Passthrough => "passthrough",
            Self::Strict => "strict",
            Self::StrictByte => "strict, by the byte",
            Self::DeferredWithin => "deferred, in the window",
            Self::DeferredAfter => "deferred, after the flush",
            Self::Shared => "shared",
            Self::Persistent => "persistent",
            Self::Bounce => "bounce",
            Self::RingWithin => "ring, inside a burst",
            Self::RingAfter => "ring, after the burst",
        }
    }

    /// The domain that is attacked; `None` where translation is off.
    pub(crate) fn options(self) -> Option<DomainOptions> {
        let options = DomainOptions::new(match self {
            Self::NoProtection => return None,
            Self::Passthrough => Protection::Passthrough,
            Self::Strict | Self::StrictByte => Protection::Strict,
            Self::DeferredWithin | Self::DeferredAfter => Protection::Deferred(DEFERRAL),
            Self::Shared => Protection::Shared,
            Self::Persistent => Protection::PERSISTENT,
            Self::Bounce => Protection::BOUNCE,
            Self::RingWithin | Self::RingAfter => Protection::RING,
        })
        .with_sanitizer(true);
        Some(if self == Self::StrictByte {
            options.with_granularity(MappingGranularity::Byte)
        } else {
            options
        })
    }

    /// What is tried, as it begins.
    pub(crate) fn story(self) -> String {
        let particulars = match self {
            Self::NoProtection => {
                return "a bare machine whose operating system never turned translation on: the device is given an address and keeps it"
                    .to_owned();
            }
            Self::Passthrough => {
                return "map a buffer; the device writes, so that its translation is cached; unmap; the CPU puts a canary into the \
                    buffer; and the device writes once more, to the address that its register still holds. The same in every mode \
                    from here on; this one maps all memory of the owner once and for all"
                    .to_owned();
            }
            Self::DeferredAfter => {
                return "the same buffer, once the window is closed; the canary is put back first".to_owned();
            }
            Self::RingAfter => {
                return "the same buffer, once another unmap has ended the burst; the canary is put back first".to_owned();
            }
            Self::DeferredWithin => {
                return format!(
                    "the same attack; an unmap is answered at once, and {} of them or those of {} ms are invalidated together (Linux: \
                     10 ms; longer here, so that one can look inside)",
                    DEFERRAL.batch, DEFERRAL.interval_ms
                );
            }
            Self::Strict => "an unmap is answered after invalidation and drain",
            Self::StrictByte => "a mapping opens its bytes, and not its pages",
            Self::Shared => "one mapping per page, and its users are counted",
            Self::Persistent => "one mapping per page, kept after its last user for the next",
            Self::Bounce => "the device sees permanent shadow buffers only, from and to which data is copied",
            Self::RingWithin => {
                "a mapping is a slot of a flat ring, which is invalidated once a burst; this unmap does not end the burst"
            }
        };
        format!("the same attack; {particulars}")
    }

    /// What must come.
    pub(crate) fn expected(self) -> Expected {
        let lands = |count, per, why| Expected {
            fate: Fate::Lands,
            report: Some(USE_AFTER_UNMAP),
            invalidations: (count, per),
            why,
        };
        let refused = |reason, per, why| Expected {
            fate: Fate::Refused(reason),
            report: Some(USE_AFTER_UNMAP),
            invalidations: (1, per),
            why,
        };
        let aged = |expected: Expected, age_min, age_max| Expected {
            report: expected.report.map(|report| Report { age_min, age_max, ..report }),
            ..expected
        };
        match self {
            Self::NoProtection => {
                let why = "The device's addresses are physical ones: nothing stands between it and memory, and nobody watches.";
                Expected { report: None, ..lands(0, "unmap", why) }
            }
            Self::Passthrough => lands(0, "unmap", PASSTHROUGH),
            Self::Strict => refused(FaultReason::WRITE_DENIED, "unmap", STRICT),
            Self::StrictByte => refused(FaultReason::WRITE_DENIED, "unmap", STRICT_BYTE),
            Self::DeferredWithin => aged(lands(0, "unmap", DEFERRED_WITHIN), Duration::ZERO, WINDOW),
            Self::DeferredAfter => {
                aged(refused(FaultReason::WRITE_DENIED, "flush", DEFERRED_AFTER), WINDOW, Duration::MAX)
            }
            Self::Shared => refused(FaultReason::WRITE_DENIED, "unmap", SHARED),
            Self::Persistent => lands(0, "unmap", PERSISTENT),
            Self::Bounce => Expected { fate: Fate::Deflected, ..lands(0, "unmap", BOUNCE) },
            Self::RingWithin => lands(0, "unmap", RING_WITHIN),
            Self::RingAfter => refused(FaultReason::RING_SLOT_INVALID, "burst", RING_AFTER),
        }
    }
}

const PASSTHROUGH: &str = "All memory of the owner stays mapped whatever it maps and unmaps, so the unit has nothing to refuse. \
    What belongs to others was never mapped: this is protection between owners, and none inside of one.";
const STRICT: &str = "The entry was cleared, the cached translation invalidated and DMA in flight drained before the unmap was \
    answered (I1).";
const STRICT_BYTE: &str = "As strict. Byte granularity narrows what is open while a buffer is mapped: its bytes, and not the rest \
    of its page.";
const DEFERRED_WITHIN: &str = "The unmap was answered before its invalidation: the entry is gone from the tables, and the IOTLB \
    still holds the translation. Nothing of it is used again before the flush, so what is hit is this buffer and no other.";
const DEFERRED_AFTER: &str = "One flush invalidated everything that had waited: 256 unmaps at most, for the price of one \
    invalidation.";
const SHARED: &str = "The last user of the page left, so it was closed and invalidated as in strict. While another mapping uses \
    the page it stays open.";
const PERSISTENT: &str = "The page stays mapped for the next map of it, which then costs nothing: what was once used for DMA is \
    open until the quota evicts it.";
const BOUNCE: &str = "The device only ever reaches a shadow buffer, which stays mapped. The unmap copied what was written out of \
    it; what comes later stays there and is overwritten or zeroed by the next map.";
const RING_WITHIN: &str = "The slot is not valid any more, and the ring's one IOTLB entry still holds it. No more than two slots of \
    a ring can be stale so, the current one and the prefetched next; any other translation replaces them.";
const RING_AFTER: &str = "The end of the burst invalidated the ring's entry, once for all unmaps of the burst (here two); the walk \
    finds a slot that is not valid.";

/// So many invalidations, in words.
pub(crate) fn invalidations(count: u64) -> String {
    let plural = if count == 1 { "" } else { "s" };
    format!("{count} invalidation{plural}")
}

impl fmt::Display for Fate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Lands => f.write_str("lands, and nothing is recorded"),
            Self::Refused(reason) => write!(f, "refused and recorded as {:#04x}", reason.0),
            Self::Deflected => f.write_str("deflected, and nothing is recorded"),
        }
    }
}

impl fmt::Display for Expected {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.fate)?;
        if let Some(Report { class, violation, blame, .. }) = self.report {
            write!(f, "; reported as {class}")?;
            if let Some(violation) = violation {
                write!(f, ", {violation}")?;
            }
            write!(f, ", blame {blame}")?;
        }
        let (count, per) = self.invalidations;
        write!(f, "; {} per {per}", invalidations(count))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_mode_is_attacked() {
        let attacked: Vec<_> = Attack::ALL
            .into_iter()
            .filter_map(Attack::options)
            .map(|options| options.protection.name())
            .collect();
        for protection in Protection::ALL {
            assert!(attacked.contains(&protection.name()), "{protection}");
        }
    }

    #[test]
    fn attacked_domains_make_sense_and_are_watched() {
        for attack in Attack::ALL {
            let Some(options) = attack.options() else { continue };
            options.check().unwrap_or_else(|error| panic!("{}: {error}", attack.name()));
            assert!(options.sanitizer && attack.expected().report.is_some(), "{}", attack.name());
        }
    }

    #[test]
    fn strict_bounce_and_ring_after_a_burst_let_nothing_through() {
        for attack in [Attack::Strict, Attack::StrictByte, Attack::Bounce, Attack::RingAfter] {
            assert_ne!(attack.expected().fate, Fate::Lands, "{}", attack.name());
        }
        let deferred = Attack::DeferredWithin.expected();
        assert_eq!(
            (deferred.fate, deferred.report.map(|report| report.age_max)),
            (Fate::Lands, Some(WINDOW))
        );
    }

    #[test]
    fn a_refusal_was_paid_for_with_an_invalidation_and_nothing_else_was() {
        for attack in Attack::ALL {
            let Expected { fate, invalidations: (count, _), .. } = attack.expected();
            assert_eq!(count, u64::from(matches!(fate, Fate::Refused(_))), "{}", attack.name());
        }
    }
}
