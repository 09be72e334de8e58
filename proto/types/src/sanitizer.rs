//! What the DMA sanitizer reports: misuse that hardware cannot see, with the life of the mapping and whom to blame.
//!
//! The classes are those of Linux's dma-debug that exist here, and those that only somebody who sees every DMA can tell.

use std::fmt;

use crate::{Access, DeviceAddress, Direction, DomainId, FaultReason, Gpa, Iova, Owner, RequestId};

/// What went wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum ReportClass {
    /// A device used a mapping after its unmap: through a stale translation, a shadow buffer or a direct map, or refused.
    UseAfterUnmap,
    /// A device used an address that no mapping covers.
    StrayAccess,
    /// A device's access left the mapping that it began in: on the same page, or into what lies behind it.
    Overrun,
    /// A device wrote what was mapped for reading only, or read what was mapped for writing only.
    WrongDirection,
    /// An unmap of something that was never mapped.
    FreeOfUnmapped,
    /// An unmap of what was unmapped already.
    DoubleUnmap,
    /// An unmap with another size than that of the mapping.
    SizeMismatch,
    /// An unmap with another direction than that of the mapping.
    DirectionMismatch,
    /// An unmap with the function for another kind of mapping (single, scatter-gather, coherent).
    WrongFree,
    /// A sync of something that is not mapped.
    SyncOfUnmapped,
    /// A sync that leaves the mapping.
    SyncOutside,
    /// A sync against the direction of the mapping.
    SyncDirection,
    /// A mapping that was still there when its device or driver let go.
    Leak,
    /// Memory mapped twice at once where one of the two lets the device write.
    Overlap,
    /// A segment longer than the device takes, or across its boundary.
    SegmentOverLimit,
    /// The error value of a failed map (all ones) was given to the device or used by it.
    ErrorNeverChecked,
    /// Memory was to be freed while it was mapped.
    ReleasedWhileMapped,
}

impl ReportClass {
    /// Every class, its stable name, and what it means.
    pub const ALL: &'static [(Self, &'static str, &'static str)] = &[
        (Self::UseAfterUnmap, "use-after-unmap", "the device used a mapping after its unmap"),
        (Self::StrayAccess, "stray-access", "the device used an address that no mapping covers"),
        (Self::Overrun, "overrun", "the device's access left the mapping that it began in"),
        (Self::WrongDirection, "wrong-direction", "the device went against the direction of the mapping"),
        (Self::FreeOfUnmapped, "free-of-unmapped", "the driver unmapped what was never mapped"),
        (Self::DoubleUnmap, "double-unmap", "the driver unmapped what was unmapped already"),
        (Self::SizeMismatch, "size-mismatch", "the driver unmapped with another size"),
        (Self::DirectionMismatch, "direction-mismatch", "the driver unmapped with another direction"),
        (Self::WrongFree, "wrong-free", "the driver unmapped with the function for another kind of mapping"),
        (Self::SyncOfUnmapped, "sync-of-unmapped", "the driver synced what is not mapped"),
        (Self::SyncOutside, "sync-outside", "the driver synced beyond the mapping"),
        (Self::SyncDirection, "sync-direction", "the driver synced against the direction of the mapping"),
        (Self::Leak, "leak", "the mapping was still there when its device or driver let go"),
        (Self::Overlap, "overlap", "memory is mapped twice at once and a device may write it"),
        (Self::SegmentOverLimit, "segment-over-limit", "a segment is longer than the device takes"),
        (
            Self::ErrorNeverChecked,
            "error-never-checked",
            "the error value of a failed map reached the device",
        ),
        (Self::ReleasedWhileMapped, "released-while-mapped", "memory was to be freed while it was mapped"),
    ];

    fn row(self) -> &'static (Self, &'static str, &'static str) {
        Self::ALL.iter().find(|(class, ..)| *class == self).expect("every class has a row")
    }
    /// Its stable name: `use-after-unmap`.
    pub fn name(self) -> &'static str {
        self.row().1
    }
    /// What it means, in words.
    pub fn meaning(self) -> &'static str {
        self.row().2
    }
    /// The class of that name.
    pub fn named(name: &str) -> Option<Self> {
        Self::ALL.iter().find(|(_, known, _)| *known == name).map(|(class, ..)| *class)
    }
}

impl fmt::Display for ReportClass {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// The kinds of fault of Willmann, Rixner and Cox (USENIX ATC 2008).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Violation {
    /// V1, bad-address fault: the driver gave a wrong address.
    BadAddress,
    /// V2, bad-device fault: the device made a wrong access by itself.
    BadDevice,
    /// V3, invalid-use fault: memory is used by a device after it was repurposed, or before.
    InvalidUse,
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::BadAddress => "V1",
            Self::BadDevice => "V2",
            Self::InvalidUse => "V3",
        })
    }
}

/// Who is to blame.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Blame {
    /// The driver: it asked for it, or gave the device the address.
    Driver,
    /// The device: the driver never gave it the address.
    Device,
    /// It cannot be told: the set of addresses given has lost entries, or what was given leaves it open.
    Unknown,
}

impl fmt::Display for Blame {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Driver => "driver",
            Self::Device => "device",
            Self::Unknown => "unknown",
        })
    }
}

/// A DMA as it was seen.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct SeenAccess {
    /// Its first address.
    pub iova: Iova,
    /// Bytes asked for.
    pub size_bytes: u32,
    /// Bytes done.
    pub done_bytes: u32,
    /// What was asked.
    pub access: Access,
    /// Why the hardware refused it; `None` when it let it through.
    pub refused: Option<FaultReason>,
}

/// Birth and death of a mapping. Times are in microseconds since the UNIX epoch.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct MappingLife {
    /// First address.
    pub iova: Iova,
    /// Bytes mapped.
    pub size_bytes: u64,
    /// Memory behind it.
    pub gpa: Gpa,
    /// Which way data was to flow.
    pub direction: Direction,
    /// Whether it is coherent memory.
    pub coherent: bool,
    /// When it was mapped.
    pub born_at_us: u64,
    /// By which request of its owner.
    pub born_by: RequestId,
    /// When it was unmapped, if it was, and by which request.
    pub death: Option<(u64, RequestId)>,
}

/// One report. Equal ones in a row are counted and not repeated.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct SanitizerReport {
    /// Its number in the log of its owner, from 1; also the resume token of a subscription.
    pub sequence: u64,
    /// When it was seen, in microseconds since the UNIX epoch.
    pub at_us: u64,
    /// Whose domain.
    pub owner: Owner,
    /// The domain.
    pub domain_id: DomainId,
    /// The device, where one is involved.
    pub device: Option<DeviceAddress>,
    /// What went wrong.
    pub class: ReportClass,
    /// V1, V2 or V3, where that can be known.
    pub violation: Option<Violation>,
    /// Who is to blame.
    pub blame: Blame,
    /// The DMA, for reports about one.
    pub access: Option<SeenAccess>,
    /// The mapping concerned, where there is one.
    pub mapping: Option<MappingLife>,
    /// The request concerned, for reports about one.
    pub request_id: Option<RequestId>,
    /// How long after the unmap, in microseconds, for a use after it.
    pub age_us: Option<u64>,
    /// Further equal reports that this one stands for.
    pub repeats: u32,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_classes_are_one_to_one() {
        for (class, name, meaning) in ReportClass::ALL {
            assert_eq!(ReportClass::named(name), Some(*class));
            assert_eq!((class.name(), class.meaning()), (*name, *meaning));
        }
        assert_eq!(ReportClass::named("nonsense"), None);
    }
}
