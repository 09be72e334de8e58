//! `sanitizer.proto`: misuse that hardware cannot see.

use iommu_types::errors::InvalidField;
use iommu_types::{
    Blame, DeviceAddress, DomainId, MappingLife, Owner, ReportClass, RequestId, SanitizerReport, SeenAccess,
    Violation,
};

use super::{Field, choices, convert, message_field, messages, parse};
use crate::pb;

choices! {
    ReportClass as ReportClass {
        UseAfterUnmap, StrayAccess, Overrun, WrongDirection, FreeOfUnmapped, DoubleUnmap, SizeMismatch, DirectionMismatch, WrongFree,
        SyncOfUnmapped, SyncOutside, SyncDirection, Leak, Overlap, SegmentOverLimit, ErrorNeverChecked, ReleasedWhileMapped,
    }
    Violation as Violation { BadAddress, BadDevice, InvalidUse }
    Blame as Blame { Driver, Device, Unknown }
}

// Zero is a choice here: it cannot be told.
impl Field<i32> for Option<Violation> {
    fn parse(wire: i32) -> Result<Self, InvalidField> {
        if wire == 0 { Ok(None) } else { Violation::parse(wire).map(Some) }
    }
    fn write(self) -> i32 {
        self.map_or(0, Field::write)
    }
}

convert!(SeenAccess as SeenAccess { iova, size_bytes, done_bytes, access, refused });

impl TryFrom<pb::MappingLife> for MappingLife {
    type Error = InvalidField;
    fn try_from(wire: pb::MappingLife) -> Result<Self, InvalidField> {
        Ok(Self {
            iova: parse("iova", wire.iova)?,
            size_bytes: wire.size_bytes,
            gpa: parse("gpa", wire.gpa)?,
            direction: parse("direction", wire.direction)?,
            coherent: wire.coherent,
            born_at_us: wire.born_at_us,
            born_by: RequestId(wire.born_by),
            death: wire.death.map(|death| (death.at_us, RequestId(death.by))),
        })
    }
}
impl From<MappingLife> for pb::MappingLife {
    fn from(life: MappingLife) -> Self {
        Self {
            iova: life.iova.write(),
            size_bytes: life.size_bytes,
            gpa: life.gpa.write(),
            direction: life.direction.write(),
            coherent: life.coherent,
            born_at_us: life.born_at_us,
            born_by: life.born_by.0,
            death: life.death.map(|(at_us, by)| pb::mapping_life::Death { at_us, by: by.0 }),
        }
    }
}
message_field!(MappingLife, pb::MappingLife);

convert!(SanitizerReport as SanitizerReport {
    sequence, at_us, owner, domain_id, device, class, violation, blame, access, mapping, request_id, age_us, repeats
});

messages! {
    /// Which reports; nothing set means all that the caller may see.
    #[derive(Copy, Default)]
    SanitizerFilter as SanitizerFilter {
        /// On this owner's domains.
        owner: Option<Owner>,
        /// On this domain.
        domain_id: Option<DomainId>,
        /// About this device.
        device: Option<DeviceAddress>,
    };
    /// Reports to list.
    #[derive(Copy, Default)]
    ListReports as ListReportsRequest {
        /// Which; `None` for all.
        filter: Option<SanitizerFilter>,
        /// Only those with a larger sequence, and of them the oldest; `None` for all, and of them the newest.
        after_sequence: Option<u64>,
        /// At most so many; 0 for as many as fit one message.
        limit: u32,
    };
    /// Reports that are kept.
    ReportList as ListReportsResponse {
        /// Oldest first.
        reports: Vec<SanitizerReport>,
        /// Reports that these logs lost to overflow.
        overwritten_count: u64,
        /// Where to go on after all reports that were there.
        resume_token: String,
    };
    /// A subscription.
    WatchReports as WatchReportsRequest {
        /// Which; `None` for all.
        filter: Option<SanitizerFilter>,
        /// Where to go on; empty to start with what comes from now on.
        resume_token: String,
    };
    /// New reports.
    NewReports as WatchReportsResponse {
        /// Oldest first; empty in the first message.
        reports: Vec<SanitizerReport>,
        /// Reports lost between the last message and this one.
        missed_count: u64,
        /// Where to go on after these reports.
        resume_token: String,
    };
}
