//! What devices do, page by page, in step with the twin.

use iommu_hardware::dma::{Run as DmaRun, Transfer};
use iommu_kernel::{DmaUnmap, Moment};
use iommu_types::{Access, DeviceAddress, Direction, FaultReason, Iova, ReportClass, SeenAccess};
use proptest::prelude::*;
use proptest::sample::Index;

use super::fixture::{PAGE, iova_range};
use super::run::{Checked, Run};
use super::steps::{Dma, Target};
use super::twin::Outcome;

impl Run {
    fn target(&self, device: usize, target: &Target) -> u64 {
        let beside = |bases: Vec<u64>, which: &Index, skew: i64| {
            let base = if bases.is_empty() { PAGE } else { *which.get(&bases) };
            base.saturating_add_signed(skew)
        };
        match target {
            Target::Live(which, skew) => {
                beside(self.twin.mappings().map(|mapping| mapping.iova).collect(), which, *skew)
            }
            Target::Gone(which, skew) => {
                beside(self.judge.dead().map(|known| known.life.iova.get()).collect(), which, *skew)
            }
            Target::Onward => self.last_end[device],
            Target::Memory(which, offset) => {
                let bases = self.twin.buffers.iter().map(|buffer| buffer.base).collect();
                beside(bases, which, offset.cast_signed())
            }
            Target::Anywhere(address) => *address,
        }
    }
    pub(crate) fn attack(&mut self, which: Index, device: usize, fill: u8, ends_burst: bool) -> Checked {
        if self.twin.live.is_empty() {
            return Ok(());
        }
        let mapping = *which.get(&self.twin.live);
        let is_write = mapping.request.direction != Direction::ToDevice;
        let size_bytes = mapping.size_bytes().min(16) as usize;
        let target = Target::Anywhere(mapping.iova);
        let dma = Dma { device, target, size_bytes, is_write, fill, began_before: false };
        self.dma(&dma)?;
        let range = iova_range(Iova::new(mapping.iova), mapping.size_bytes());
        let request_id = self.next_request();
        let unmap = DmaUnmap::single(range, mapping.request.direction, request_id);
        let function = mapping.request.function;
        self.unmap_as(DmaUnmap { function, end_of_burst: ends_burst, ..unmap })?;
        self.check()?;
        self.dma(&Dma { fill: fill ^ 0xff, ..dma })
    }
    pub(crate) fn dma(&mut self, dma: &Dma) -> Checked {
        let device = dma.device;
        let first = self.target(device, &dma.target);
        // An access that would wrap is no access.
        let size = (u64::MAX - first).saturating_add(1).min(dma.size_bytes as u64);
        let begun = if dma.began_before { self.begun } else { self.order() };
        let port = if device == 0 { &mut self.tenant.port } else { &mut self.second.1 };
        let mut bytes = vec![dma.fill; size as usize];
        let transfer = if dma.is_write { Transfer::Write(&bytes) } else { Transfer::Read(&mut bytes) };
        let result = DmaRun::new(port).execute(Iova::new(first), None, transfer);
        let done = result.as_ref().err().map_or(size, |fault| u64::from(fault.done_bytes));
        let reason = result.as_ref().err().map(|fault| fault.reason.expect("refused by translation"));
        let at_fault = result.as_ref().err().map(|fault| fault.iova.get());
        self.follow(dma, first, size, done, &bytes, reason.zip(at_fault))?;
        let access = if dma.is_write { Access::Write } else { Access::Read };
        let seen = SeenAccess {
            iova: Iova::new(first),
            size_bytes: size as u32,
            done_bytes: done as u32,
            access,
            refused: reason,
        };
        let source = if device == 0 { self.tenant.source } else { self.second.0 };
        let address = DeviceAddress { segment: 0, source_id: source };
        let moment = Moment { at_us: self.now.0, order: begun };
        let read = (!dma.is_write && reason.is_none()).then_some(bytes.as_slice());
        let sanitizer = self.tenant.domain.sanitizer().expect("it has one");
        sanitizer.with(|sanitizer| sanitizer.dma(moment, self.now.0, address, seen, read));
        self.said.extend(self.judge.dma(device, begun, first, size as usize, access));
        self.last_end[device] = first.saturating_add(size);
        let reports = self.check_reports()?;
        for report in reports {
            prop_assert_eq!((report.device, report.access), (Some(address), Some(seen)));
            let death = report.mapping.and_then(|life| life.death);
            let age = death
                .filter(|_| report.class == ReportClass::UseAfterUnmap)
                .map(|death| self.now.0 - death.0);
            prop_assert_eq!(report.age_us, age);
        }
        Ok(())
    }
    /// Goes through a DMA page by page, as the unit did, and sees whether each piece ended as it may.
    fn follow(
        &mut self,
        dma: &Dma,
        first: u64,
        size: u64,
        done: u64,
        bytes: &[u8],
        refused: Option<(FaultReason, u64)>,
    ) -> Checked {
        let access = if dma.is_write { Access::Write } else { Access::Read };
        let mut at = 0;
        while at < size {
            let address = first + at;
            let piece = (PAGE - address % PAGE).min(size - at);
            let outcome = self.twin.outcome(dma.device, address, piece, access);
            let (place, was_stale) = match outcome {
                Outcome::Moves(place) => (place, false),
                Outcome::Refused(_, Some(place)) if done > at => (place, true),
                Outcome::Refused(why, _) => {
                    let expected = Some((self.twin.reason(why, dma.is_write), address));
                    prop_assert_eq!((done, refused), (at, expected), "{:?} at {:#x}", dma, address);
                    return Ok(());
                }
            };
            prop_assert!(done >= at + piece, "{:?} at {:#x} is refused for {:?}", dma, address, refused);
            if dma.is_write {
                self.twin.fill(place, piece, dma.fill);
            } else {
                let expected = self.twin.bytes(place, piece);
                prop_assert!(
                    bytes[at as usize..][..piece as usize] == expected,
                    "{:?} read something else",
                    dma
                );
            }
            let too_many = self.twin.passed(dma.device, address, was_stale);
            prop_assert!(!too_many, "more than two stale slots of a ring are served");
            at += piece;
        }
        prop_assert_eq!((done, refused), (size, None));
        Ok(())
    }
}
