//! Whom to blame: the same strict domain, and an address that came to the device in different ways.
//!
//! The sanitizer remembers what the driver gave the device: values that it wrote to registers, and words that the device read from
//! coherent memory. What it cannot tell it calls unknown.

use anyhow::ensure;
use bytes::Bytes;
use dma_engine::ring::Descriptor;
use guest_sdk::{Blame, Direction, DomainOptions, Iova, Protection, ReportClass, Violation};

use super::driver::{BUFFER_BYTES, Before, Mapped, Play, Target, WRITE_BYTES, begin, end};
use super::expected::{Attack, Expected, Report};
use crate::engine::Ended;

/// What the names of these steps begin with.
pub(super) const PREFIX: &str = "blame: ";
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
    name: "blame: given, and never mapped",
    story: "the driver writes an address into the device's register that it never mapped",
    class: ReportClass::StrayAccess,
    violation: Violation::BadAddress,
    blame: Blame::Driver,
    why: "No mapping was ever there, and the driver gave exactly this address.",
};
const OWN: Way = Way {
    name: "blame: made by the device itself",
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
    play.given_after_unmap().await?;
    play.left_in_a_descriptor().await?;
    play.never_mapped().await?;
    play.of_its_own_making().await
}

impl Way {
    async fn prepare(&self, play: &mut Play) -> anyhow::Result<Mapped> {
        begin(self.name, self.story)?;
        play.map(DomainOptions::new(Protection::Strict).with_sanitizer(true)).await
    }
}

impl Play {
    async fn given_after_unmap(&mut self) -> anyhow::Result<()> {
        let mapped = GIVEN_AFTER.prepare(self).await?;
        let target = self.unmap(mapped, true).await?;
        let before = self.arm(&target).await?;
        let ended = self.engine.write(target.iova, WRITE_BYTES).await?;
        self.tell(&GIVEN_AFTER, &target, before, ended).await?;
        self.leave(target).await
    }

    async fn left_in_a_descriptor(&mut self) -> anyhow::Result<()> {
        let mapped = IN_DESCRIPTOR.prepare(self).await?;
        let device = self.engine.device().clone();
        let ring = self.driver.dma_alloc_coherent(&device, BUFFER_BYTES).await?;
        ring.memory().write(ring.range().base(), descriptor(mapped.iova())).await?;
        let target = self.unmap(mapped, true).await?;
        let before = self.arm(&target).await?;
        let ended = self.engine.receive_one(ring.iova(), WRITE_BYTES).await?;
        self.tell(&IN_DESCRIPTOR, &target, before, ended).await?;
        ring.free().await?;
        self.leave(target).await
    }

    async fn never_mapped(&mut self) -> anyhow::Result<()> {
        let mapped = NEVER.prepare(self).await?;
        let target = self.unmap(mapped, true).await?;
        let before = self.arm(&target).await?;
        let ended = self.engine.write(NEVER_MAPPED, WRITE_BYTES).await?;
        self.tell(&NEVER, &target, before, ended).await?;
        self.leave(target).await
    }

    async fn of_its_own_making(&mut self) -> anyhow::Result<()> {
        let mapped = OWN.prepare(self).await?;
        let device = self.engine.device().clone();
        let page = self.driver.allocate(BUFFER_BYTES).await?;
        page.write(0, descriptor(mapped.iova())).await?;
        let ring = self.driver.dma_map_single(&device, page.range(), Direction::Bidirectional).await?;
        let target = self.unmap(mapped, true).await?;
        let before = self.arm(&target).await?;
        let flipped = self.engine.add(ring.iova(), FLIPPED).await?;
        ensure!(!flipped.is_error(), "the descriptor could not be changed: {flipped}");
        let ended = self.engine.receive_one(ring.iova(), WRITE_BYTES).await?;
        self.tell(&OWN, &target, before, ended).await?;
        ring.unmap().await?;
        page.free().await.map_err(|(_, error)| error)?;
        self.leave(target).await
    }

    async fn tell(&self, way: &Way, target: &Target, before: Before, ended: Ended) -> anyhow::Result<()> {
        let expected = way.expected();
        let seen = self.look(target, before, ended, &expected).await?;
        end(way.name, &expected, seen)
    }
}

/// A descriptor that gives a buffer to the device.
fn descriptor(buffer: Iova) -> Bytes {
    Bytes::copy_from_slice(&Descriptor::for_buffer(buffer, WRITE_BYTES).to_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_verdict_occurs_and_every_way_is_refused_by_a_strict_domain() {
        let ways = [GIVEN_AFTER, IN_DESCRIPTOR, NEVER, OWN];
        assert!(ways.iter().all(|way| way.name.starts_with(PREFIX)));
        for blame in [Blame::Driver, Blame::Device, Blame::Unknown] {
            assert!(ways.iter().any(|way| way.blame == blame), "{blame}");
        }
        for way in ways {
            assert_eq!(way.expected().fate, Attack::Strict.expected().fate, "{}", way.name);
            assert_eq!(way.expected().report.map(|report| report.blame), Some(way.blame), "{}", way.name);
        }
    }
}
