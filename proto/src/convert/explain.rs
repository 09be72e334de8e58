//! `inspect.proto`, the part that says what a walk reads: dumped entries and explained accesses.

use iommu_types::errors::InvalidField;
use iommu_types::{
    Access, CacheState, DeviceAddress, Explanation, Hpa, Iova, Outcome, PAGE_SIZE_BYTES, Pasid, Step,
    Structure, Translation,
};

use super::{Field, absent, known, message_field, messages, parse, within, wrong_at};
use crate::pb;

fn check_explain(explain: &Explain) -> Result<(), InvalidField> {
    if u64::from(explain.size_bytes) > PAGE_SIZE_BYTES {
        let why = format!("{} is more than {PAGE_SIZE_BYTES}", explain.size_bytes);
        return Err(wrong_at("size_bytes", why));
    }
    if explain.size_bytes == 0 && explain.access != Access::Read {
        return Err(wrong_at("size_bytes", "is 0; only reads may have no size"));
    }
    Ok(())
}

messages! {
    /// An access to explain.
    #[derive(Copy)]
    Explain as ExplainRequest {
        /// By which device.
        device: DeviceAddress,
        /// With which PASID.
        pasid: Option<Pasid>,
        /// At which address.
        iova: Iova,
        /// What is asked.
        access: Access,
        /// Size in bytes; 0 is a zero-length read, at most 4096.
        size_bytes: u32,
    } check check_explain;
}

impl Field<i32> for pb::Structure {
    fn parse(wire: i32) -> Result<Self, InvalidField> {
        known(wire, Self::try_from(wire), |value| (value != Self::Unspecified).then_some(value))
    }
    fn write(self) -> i32 {
        self.into()
    }
}

/// A table entry, of an explained walk or of a dump.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WalkStep {
    /// The entry.
    pub step: Step,
    /// First address that it translates; for dumps of page-table entries.
    pub iova: Option<Iova>,
}

/// Levels of second-stage tables.
const LEVEL_MAX: u8 = 5;

impl TryFrom<pb::WalkStep> for WalkStep {
    type Error = InvalidField;
    fn try_from(wire: pb::WalkStep) -> Result<Self, InvalidField> {
        let level: u8 = parse("level", wire.level)?;
        let structure = match parse("structure", wire.structure)? {
            pb::Structure::Unspecified => return Err(within("structure", absent())),
            pb::Structure::Root => Structure::Root,
            pb::Structure::Context => Structure::Context,
            pb::Structure::RingRoot => Structure::RingRoot,
            pb::Structure::RingDevice => Structure::RingDevice,
            pb::Structure::Ring => Structure::Ring,
            pb::Structure::RingSlot => Structure::RingSlot,
            pb::Structure::SecondStage if (1..=LEVEL_MAX).contains(&level) => {
                Structure::SecondStage { level }
            }
            pb::Structure::SecondStage => {
                return Err(wrong_at("level", format!("{level} is not between 1 and {LEVEL_MAX}")));
            }
        };
        let step = Step {
            structure,
            index: parse("index", wire.index)?,
            at: parse("hpa", wire.hpa)?,
            low: wire.low,
            high: wire.high,
            permissions: parse("permissions", wire.permissions)?,
            reading: wire.reading,
        };
        Ok(Self { step, iova: parse("iova", wire.iova)? })
    }
}
impl From<WalkStep> for pb::WalkStep {
    fn from(WalkStep { step, iova }: WalkStep) -> Self {
        let (structure, level) = match step.structure {
            Structure::Root => (pb::Structure::Root, 0),
            Structure::Context => (pb::Structure::Context, 0),
            Structure::SecondStage { level } => (pb::Structure::SecondStage, level),
            Structure::RingRoot => (pb::Structure::RingRoot, 0),
            Structure::RingDevice => (pb::Structure::RingDevice, 0),
            Structure::Ring => (pb::Structure::Ring, 0),
            Structure::RingSlot => (pb::Structure::RingSlot, 0),
        };
        Self {
            structure: structure.into(),
            level: level.write(),
            index: step.index.write(),
            hpa: step.at.write(),
            low: step.low,
            high: step.high,
            permissions: step.permissions.write(),
            reading: step.reading,
            iova: iova.write(),
        }
    }
}
message_field!(WalkStep, pb::WalkStep);

impl TryFrom<pb::CacheState> for CacheState {
    type Error = InvalidField;
    fn try_from(wire: pb::CacheState) -> Result<Self, InvalidField> {
        use pb::cache_state::State;
        Ok(match wire.state.ok_or_else(|| within("state", absent()))? {
            State::Hit(entry) => Self::Hit { entry },
            State::Miss(_) => Self::Miss,
            State::Insufficient(entry) => Self::Insufficient { entry },
            State::NotAsked(_) => Self::NotAsked,
        })
    }
}
impl From<CacheState> for pb::CacheState {
    fn from(state: CacheState) -> Self {
        use pb::cache_state::{Miss, NotAsked, State};
        let state = match state {
            CacheState::Hit { entry } => State::Hit(entry),
            CacheState::Miss => State::Miss(Miss {}),
            CacheState::Insufficient { entry } => State::Insufficient(entry),
            CacheState::NotAsked => State::NotAsked(NotAsked {}),
        };
        Self { state: Some(state) }
    }
}
message_field!(CacheState, pb::CacheState);

impl TryFrom<pb::Translation> for Translation {
    type Error = InvalidField;
    fn try_from(wire: pb::Translation) -> Result<Self, InvalidField> {
        Ok(Self {
            hpa: parse("hpa", wire.hpa)?,
            page_size: parse("page_bytes", wire.page_bytes)?,
            permissions: parse("permissions", wire.permissions)?,
            domain_id: parse("domain_id", wire.domain_id)?,
        })
    }
}
impl From<Translation> for pb::Translation {
    fn from(translation: Translation) -> Self {
        Self {
            hpa: translation.hpa.write(),
            page_bytes: translation.page_size.write(),
            permissions: translation.permissions.write(),
            domain_id: translation.domain_id.write(),
        }
    }
}
message_field!(Translation, pb::Translation);

impl Field<Option<pb::explain_response::Outcome>> for Outcome {
    fn parse(wire: Option<pb::explain_response::Outcome>) -> Result<Self, InvalidField> {
        use pb::explain_response::Outcome as Wire;
        match wire.ok_or_else(absent)? {
            Wire::Translated(translation) => parse("translated", translation).map(Self::Translated),
            Wire::UntranslatedHpa(hpa) => Ok(Self::Untranslated(Hpa::new(hpa))),
            Wire::Interrupt(_) => Ok(Self::Interrupt),
            Wire::Refused(fault) => parse("refused", fault).map(Self::Refused),
        }
    }
    fn write(self) -> Option<pb::explain_response::Outcome> {
        use pb::explain_response::{Outcome as Wire, ToInterruptRemapping};
        Some(match self {
            Self::Translated(translation) => Wire::Translated(translation.into()),
            Self::Untranslated(hpa) => Wire::UntranslatedHpa(hpa.get()),
            Self::Interrupt => Wire::Interrupt(ToInterruptRemapping {}),
            Self::Refused(fault) => Wire::Refused(fault.into()),
        })
    }
}

/// An explanation, with the segment of the device that it is about.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Explained {
    /// Segment of the device.
    pub segment: u16,
    /// The explanation.
    pub explanation: Explanation,
}

impl TryFrom<pb::ExplainResponse> for Explained {
    type Error = InvalidField;
    fn try_from(wire: pb::ExplainResponse) -> Result<Self, InvalidField> {
        let request: Explain = parse("request", wire.request)?;
        let steps: Vec<WalkStep> = parse("steps", wire.steps)?;
        let explanation = Explanation {
            source_id: request.device.source_id,
            pasid: request.pasid,
            iova: request.iova,
            access: request.access,
            size_bytes: request.size_bytes,
            context_cache: parse("context_cache", wire.context_cache)?,
            iotlb: parse("iotlb", wire.iotlb)?,
            paging_structure_cache: parse("paging_structure_cache", wire.paging_structure_cache)?,
            steps: steps.into_iter().map(|step| step.step).collect(),
            outcome: parse("outcome", wire.outcome)?,
            fault_suppressed: wire.fault_suppressed,
            stale: parse("stale", wire.stale)?,
            conclusion: wire.conclusion,
        };
        Ok(Self { segment: request.device.segment, explanation })
    }
}
impl From<Explained> for pb::ExplainResponse {
    fn from(Explained { segment, explanation }: Explained) -> Self {
        let request = Explain {
            device: DeviceAddress::new(segment, explanation.source_id),
            pasid: explanation.pasid,
            iova: explanation.iova,
            access: explanation.access,
            size_bytes: explanation.size_bytes,
        };
        let steps = explanation.steps.into_iter().map(|step| WalkStep { step, iova: None });
        Self {
            request: request.write(),
            context_cache: explanation.context_cache.write(),
            iotlb: explanation.iotlb.write(),
            paging_structure_cache: explanation.paging_structure_cache.write(),
            steps: steps.map(Into::into).collect(),
            outcome: explanation.outcome.write(),
            fault_suppressed: explanation.fault_suppressed,
            stale: explanation.stale.write(),
            conclusion: explanation.conclusion,
        }
    }
}
