//! One table per class of report; every case is told as it would happen.

use iommu_types::errors::{
    DirectionMismatch, DmaMapError, DmaSyncError, DmaUnmapError, IovaExhausted, NotAttached, NotMapped,
    OutsideMapping, SegmentOverLimit, SizeMismatch, WrongFunction,
};
use iommu_types::{
    Access, AccessWidth, DeviceAddress, Direction, DomainId, FaultReason, Gpa, GpaRange, Iova, IovaRange,
    MappingLife, Owner, ReportClass, RequestId, SanitizerReport, SeenAccess, SourceId, SyncFor,
};

use Access::{Atomic, Read, Write};
use AccessWidth::{Bytes4, Bytes8};
use Direction::{Bidirectional, FromDevice, ToDevice};
use MappingKind::{Coherent, Fixed, ScatterGather, Single};

use super::*;

const NIC: DeviceAddress = DeviceAddress { segment: 0, source_id: SourceId::new(8) };
const DISK: DeviceAddress = DeviceAddress { segment: 0, source_id: SourceId::new(16) };

/// A domain whose clock moves with every event. Memory lies 1 GiB above the device addresses.
struct Scene {
    sanitizer: Sanitizer,
    clock: EventClock,
    at_us: u64,
    requests: u64,
    taken: u64,
}

fn range(first: u64, size_bytes: u64) -> IovaRange {
    IovaRange::new(Iova::new(first), size_bytes).expect("a range")
}

impl Scene {
    fn new() -> Self {
        Self::with(SanitizerBounds::USUAL)
    }
    fn with(bounds: SanitizerBounds) -> Self {
        let sanitizer = Sanitizer::new(Owner::Vm(3), DomainId::new(7), bounds);
        Self { sanitizer, clock: EventClock::default(), at_us: 1000, requests: 0, taken: 0 }
    }
    fn call(&mut self) -> DriverCall {
        self.at_us += 10;
        self.requests += 1;
        let at = Moment { at_us: self.at_us, order: self.clock.tick() };
        DriverCall { at, device: Some(NIC), request_id: RequestId(self.requests) }
    }
    fn map(&mut self, first: u64, size_bytes: u64, direction: Direction, kind: MappingKind) -> &mut Self {
        self.map_memory(first, size_bytes, first.wrapping_add(1 << 30), direction, kind)
    }
    fn map_memory(
        &mut self,
        first: u64,
        size: u64,
        gpa: u64,
        direction: Direction,
        kind: MappingKind,
    ) -> &mut Self {
        let call = self.call();
        let new = NewMapping { range: range(first, size), gpa: Gpa::new(gpa), direction, kind };
        self.sanitizer.mapped(call, new);
        self
    }
    fn unmap(&mut self, first: u64, size_bytes: u64, direction: Direction, kind: MappingKind) -> &mut Self {
        let call = self.call();
        self.sanitizer.unmapped(call, range(first, size_bytes), direction, kind);
        self
    }
    fn now(&self) -> Moment {
        Moment { at_us: self.at_us, order: self.clock.now() }
    }
    fn give(&mut self, value: u64) -> &mut Self {
        self.write_register(NIC, 0x10, Bytes8, value)
    }
    fn write_register(
        &mut self,
        device: DeviceAddress,
        offset: u64,
        width: AccessWidth,
        value: u64,
    ) -> &mut Self {
        let now = self.now();
        self.sanitizer.supplied(now, device, RegisterWrite { offset, width, value });
        self
    }
    fn dma(&mut self, access: Access, first: u64, size_bytes: u32) -> &mut Self {
        let now = self.now();
        self.dma_of(NIC, now, access, first, size_bytes, None, None)
    }
    fn refused_dma(&mut self, access: Access, first: u64, size_bytes: u32) -> &mut Self {
        let now = self.now();
        self.dma_of(NIC, now, access, first, size_bytes, Some(FaultReason::WRITE_DENIED), None)
    }
    fn read_words(&mut self, first: u64, words: &[u64]) -> &mut Self {
        let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
        let now = self.now();
        self.dma_of(NIC, now, Read, first, u32::try_from(bytes.len()).expect("few"), None, Some(&bytes))
    }
    #[expect(clippy::too_many_arguments, reason = "all that can be said of a DMA")]
    fn dma_of(
        &mut self,
        device: DeviceAddress,
        begun: Moment,
        access: Access,
        first: u64,
        size_bytes: u32,
        refused: Option<FaultReason>,
        read_bytes: Option<&[u8]>,
    ) -> &mut Self {
        self.at_us += 1;
        let done_bytes = if refused.is_some() { 0 } else { size_bytes };
        let seen = SeenAccess { iova: Iova::new(first), size_bytes, done_bytes, access, refused };
        self.sanitizer.dma(begun, self.at_us, device, seen, read_bytes);
        self
    }
    /// Reports that were not taken yet.
    fn take(&mut self) -> Vec<SanitizerReport> {
        let (reports, _) = self.sanitizer.reports(self.taken, usize::MAX);
        self.taken = self.sanitizer.latest();
        reports
    }
    /// What is new, in short: class, violation, blame, first address of the mapping.
    fn check(&mut self, expected: &[&str]) -> &mut Self {
        let shown: Vec<String> = self.take().iter().map(shown).collect();
        assert_eq!(shown, expected);
        self
    }
}

fn shown(report: &SanitizerReport) -> String {
    let violation = report.violation.map_or("--".to_owned(), |violation| violation.to_string());
    let mapping = report.mapping.map_or("-".to_owned(), |life| format!("{:#x}", life.iova.get()));
    format!("{} {violation} {} {mapping}", report.class, report.blame)
}

#[test]
fn legitimate_dma_is_not_reported() {
    let mut scene = Scene::new();
    scene.map(0x1000, 0x100, ToDevice, Single).map(0x1100, 0x100, FromDevice, Single);
    scene.map(0x5_0000, 1 << 30, Bidirectional, Fixed).map(0x2000, 16, Bidirectional, Coherent);
    scene.dma(Read, 0x1000, 0x100).dma(Write, 0x1100, 0x100).dma(Write, 0x11ff, 1);
    scene.dma(Atomic, 0x2000, 16).dma(Write, 0x5_0000 + (1 << 29), 4096).dma(Read, 0x5_0000, 8);
    // A zero-length read needs no right to read.
    scene.dma(Read, 0x1100, 0);
    // The next buffer begins where the last transfer ended.
    scene.map(0x3000, 64, FromDevice, Single).map(0x3040, 64, FromDevice, Single);
    scene.dma(Write, 0x3000, 64).dma(Write, 0x3040, 64);
    scene.check(&[]);
    assert!(scene.sanitizer.counts().is_empty());
    assert_eq!(scene.sanitizer.live_mappings(), 6);
}

#[test]
fn any_one_of_overlapping_mappings_makes_it_legitimate() {
    let mut scene = Scene::new();
    scene.map(0x1000, 0x100, ToDevice, Single).map(0x1000, 0x1000, ToDevice, Coherent);
    scene.map(0x1080, 0x100, FromDevice, Fixed).map(0x1000, 0x100, ToDevice, Fixed);
    scene.dma(Read, 0x1000, 0x1000).dma(Read, 0x1090, 0x80).dma(Write, 0x1090, 0x80).check(&[]);
    // One of two equal ones dies, and the other is still there.
    scene.map(0x9000, 8, ToDevice, Single).map(0x9000, 8, ToDevice, Single);
    scene.unmap(0x9000, 8, ToDevice, Single).dma(Read, 0x9000, 8).check(&[]);
    scene.unmap(0x9000, 8, ToDevice, Single).dma(Read, 0x9000, 8);
    scene.check(&["use-after-unmap V3 device 0x9000"]);
}

#[test]
fn a_use_after_unmap_tells_how_long_after_and_what_it_was() {
    let mut scene = Scene::new();
    scene.map(0x1000, 0x100, FromDevice, Single).give(0x1000).dma(Write, 0x1000, 0x100);
    scene.unmap(0x1000, 0x100, FromDevice, Single);
    let died_at = scene.at_us;
    scene.at_us += 500;
    scene.dma(Write, 0x1020, 16).refused_dma(Write, 0x1020, 16);
    let reports = scene.take();
    let life = MappingLife {
        iova: Iova::new(0x1000),
        size_bytes: 0x100,
        gpa: Gpa::new(0x1000 + (1 << 30)),
        direction: FromDevice,
        coherent: false,
        born_at_us: 1010,
        born_by: RequestId(1),
        death: Some((died_at, RequestId(2))),
    };
    assert_eq!(reports.len(), 2);
    for (report, refused) in reports.iter().zip([None, Some(FaultReason::WRITE_DENIED)]) {
        assert_eq!(
            (report.owner, report.domain_id, report.device),
            (Owner::Vm(3), DomainId::new(7), Some(NIC))
        );
        assert_eq!((report.class, report.mapping), (ReportClass::UseAfterUnmap, Some(life)));
        assert_eq!(report.access.expect("a DMA").refused, refused);
        assert_eq!(report.age_us, Some(report.at_us - died_at));
    }
    assert_eq!((reports[0].age_us, reports[0].sequence, reports[1].sequence), (Some(501), 1, 2));
}

#[test]
fn blame_for_a_use_after_unmap_depends_on_when_the_address_was_given() {
    // Never.
    let mut scene = Scene::new();
    scene.map(0x1000, 0x100, FromDevice, Single).unmap(0x1000, 0x100, FromDevice, Single);
    scene.dma(Write, 0x1010, 4).check(&["use-after-unmap V3 device 0x1000"]);
    // Before the death: unmapped too early or used too late.
    let mut scene = Scene::new();
    scene.map(0x1000, 0x100, FromDevice, Single).give(0x1080).unmap(0x1000, 0x100, FromDevice, Single);
    scene.dma(Write, 0x1010, 4).check(&["use-after-unmap V3 unknown 0x1000"]);
    // After it.
    scene.give(0x1000).dma(Write, 0x1010, 4).check(&["use-after-unmap V3 driver 0x1000"]);
    // The latest to die counts, and what was given before that says nothing.
    scene.map(0x1000, 0x80, FromDevice, Single).unmap(0x1000, 0x80, FromDevice, Single);
    scene.dma(Write, 0x1010, 4).check(&["use-after-unmap V3 unknown 0x1000"]);
    // Given while something else was mapped there: it was meant for that.
    let mut scene = Scene::new();
    scene.map(0x1000, 0x100, FromDevice, Single).unmap(0x1000, 0x100, FromDevice, Single);
    scene.map(0x1000, 0x80, FromDevice, Single).give(0x1000);
    scene.dma(Write, 0x10c0, 4).check(&["use-after-unmap V3 unknown 0x1000"]);
    // A word in memory may have been there since before the death.
    let mut scene = Scene::new();
    scene.map(0x8000, 0x100, ToDevice, Coherent).map(0x1000, 0x100, FromDevice, Single);
    scene.unmap(0x1000, 0x100, FromDevice, Single).read_words(0x8000, &[0x1000]);
    scene.dma(Write, 0x1010, 4).check(&["use-after-unmap V3 unknown 0x1000"]);
}

#[test]
fn i1_a_dma_that_races_with_an_unmap_is_not_reported() {
    let mut scene = Scene::new();
    scene.map(0x1000, 0x100, FromDevice, Single).map(0x1f00, 0x10, FromDevice, Single);
    let before = scene.now();
    scene.unmap(0x1000, 0x100, FromDevice, Single);
    let after = scene.now();
    assert_eq!(after.order, before.order + 1);
    scene.dma_of(NIC, before, Write, 0x1000, 0x100, None, None).check(&[]);
    // What was wrong with it when it was live is still wrong.
    scene.dma_of(NIC, before, Read, 0x1000, 0x100, None, None);
    scene.dma_of(NIC, before, Write, 0x1080, 0x100, None, None);
    scene.check(&["wrong-direction V2 device 0x1000", "overrun V2 device 0x1000"]);
    scene.dma_of(NIC, after, Write, 0x1000, 0x100, None, None).check(&["use-after-unmap V3 device 0x1000"]);
    // Nor is one that races with a map.
    scene.map(0x1000, 0x100, FromDevice, Single);
    scene.dma_of(NIC, after, Write, 0x1000, 0x100, None, None).check(&[]);
}

#[test]
fn an_overrun_leaves_the_mapping_that_it_began_in() {
    let mut scene = Scene::new();
    scene.map(0x1000, 0x100, FromDevice, Single).map(0x1100, 0x100, FromDevice, Single);
    scene.dma(Write, 0x10ff, 2).check(&["overrun V2 device 0x1000"]);
    scene.refused_dma(Write, 0x11ff, 2).check(&["overrun V2 device 0x1100"]);
    // The address was given, the length is of either's making.
    scene.give(0x1000).dma(Write, 0x1000, 0x101).check(&["overrun -- unknown 0x1000"]);
    // The end of the address space.
    scene.map(u64::MAX - 15, 8, FromDevice, Single);
    scene.dma(Write, u64::MAX - 15, u32::MAX).check(&["overrun V2 device 0xfffffffffffffff0"]);
}

#[test]
fn pieces_of_one_transfer_overrun_together() {
    let mut scene = Scene::new();
    scene.map(0x1000, 0x100, FromDevice, Single).give(0x1000).map(0x7000, 64, ToDevice, Coherent);
    scene.dma(Write, 0x1000, 0x80).dma(Read, 0x7000, 16).dma(Write, 0x1080, 0x80).dma(Read, 0x7010, 16);
    scene.check(&[]);
    scene.dma(Write, 0x1100, 0x80).dma(Write, 0x1180, 0x80);
    let report = scene.take()[0];
    assert_eq!((shown(&report).as_str(), report.repeats), ("overrun -- unknown 0x1000", 1));
    // A read is no piece of a write, and another device's write none of this one's.
    scene.map(0x2000, 0x100, Bidirectional, Single).give(0x2000).dma(Write, 0x2000, 0x100);
    let now = scene.now();
    scene.dma(Read, 0x2100, 4).dma_of(DISK, now, Write, 0x2100, 4, None, None);
    scene.check(&["stray-access V2 device -", "stray-access V2 device -"]);
    scene.dma(Write, 0x2100, 4).check(&["overrun -- unknown 0x2000"]);
    // The mapping may have died meanwhile.
    scene.map(0x3000, 0x100, FromDevice, Single).dma(Write, 0x3000, 0x100);
    scene.unmap(0x3000, 0x100, FromDevice, Single).dma(Write, 0x3100, 4);
    let report = scene.take()[0];
    assert_eq!(shown(&report), "overrun V2 device 0x3000");
    assert!(report.mapping.expect("the mapping").death.is_some());
}

#[test]
fn a_piece_that_begins_a_buffer_is_a_transfer_of_its_own() {
    let mut scene = Scene::new();
    scene.map(0x1000, 0x100, FromDevice, Single).map(0x1100, 0x100, FromDevice, Single);
    scene.unmap(0x1100, 0x100, FromDevice, Single).dma(Write, 0x1000, 0x100);
    scene.dma(Write, 0x1100, 0x80).check(&["use-after-unmap V3 device 0x1100"]);
    // So is one whose address was given.
    scene.map(0x2000, 0x100, FromDevice, Single).dma(Write, 0x2000, 0x100);
    scene.give(0x2100).dma(Write, 0x2100, 0x80).check(&["stray-access V1 driver -"]);
    // Further pieces of a stray transfer are its starter's.
    scene.dma(Write, 0x2180, 0x80).check(&["stray-access V1 driver -"]);
    scene.dma(Write, 0x2208, 0x80).check(&["stray-access V2 device -"]);
    // A late piece inside the mapping is a use after unmap and no overrun.
    scene.map(0x3000, 0x100, FromDevice, Single).dma(Write, 0x3000, 0x80);
    scene.unmap(0x3000, 0x100, FromDevice, Single).dma(Write, 0x3080, 0x80);
    scene.check(&["use-after-unmap V3 device 0x3000"]);
}

#[test]
fn directions_hold_for_reads_writes_and_atomics() {
    for (direction, access, expected) in [
        (ToDevice, Read, None),
        (ToDevice, Write, Some("wrong-direction V2 device 0x1000")),
        (ToDevice, Atomic, Some("wrong-direction V2 device 0x1000")),
        (FromDevice, Read, Some("wrong-direction V2 device 0x1000")),
        (FromDevice, Write, None),
        (FromDevice, Atomic, Some("wrong-direction V2 device 0x1000")),
        (Bidirectional, Read, None),
        (Bidirectional, Write, None),
        (Bidirectional, Atomic, None),
    ] {
        let mut scene = Scene::new();
        scene.map(0x1000, 8, direction, Single).dma(access, 0x1000, 8).check(expected.as_slice());
    }
    let mut scene = Scene::new();
    scene.map(0x1000, 8, ToDevice, Single).give(0x1000).dma(Write, 0x1000, 8);
    scene.check(&["wrong-direction -- unknown 0x1000"]);
}

#[test]
fn a_stray_access_is_of_whoever_made_the_address() {
    let mut scene = Scene::new();
    scene.dma(Write, 0xdead_0000, 8).check(&["stray-access V2 device -"]);
    scene.give(0xdead_0000).dma(Write, 0xdead_0000, 8).check(&["stray-access V1 driver -"]);
    scene.dma(Write, 0xdead_0004, 8).check(&["stray-access V2 device -"]);
    scene.write_register(NIC, 0x20, Bytes4, 0xbeef_0000).write_register(NIC, 0x24, Bytes4, 0x12);
    scene.dma(Read, 0x12_beef_0000, 8).check(&["stray-access V1 driver -"]);
    // Of addresses in page 0 nobody keeps a record.
    scene.dma(Read, 0x10, 8).check(&["stray-access -- unknown -"]);
    // What one device was given, another was not.
    let now = scene.now();
    scene.dma_of(DISK, now, Write, 0xdead_0000, 8, None, None).check(&["stray-access V2 device -"]);
}

#[test]
fn words_that_a_device_read_from_coherent_memory_were_given() {
    let mut scene = Scene::new();
    scene.map(0x8000, 0x1000, Bidirectional, Coherent).map(0x9000, 0x100, ToDevice, Single);
    scene.map(0x5000, 0x100, ToDevice, Single).map(0x6000, 0x100, ToDevice, Single);
    // A descriptor: address, length and flags; and two of 32 bits in one word.
    scene.read_words(0x8010, &[0x5000, 0x3_0000_0100, 0x40_0000_6000]);
    for at in [0x5000, 0x6000] {
        scene.dma(Write, at, 8);
    }
    scene.check(&["wrong-direction -- unknown 0x5000", "wrong-direction -- unknown 0x6000"]);
    scene.map(0x7000, 8, ToDevice, Single).read_words(0x9000, &[0x7000]).dma(Write, 0x7000, 8);
    scene.check(&["wrong-direction V2 device 0x7000"]);
    scene.read_words(0x8100, &[0xabcd_0000]).dma(Write, 0xabcd_0000, 8).check(&["stray-access V1 driver -"]);
}

#[test]
fn a_device_that_plants_an_address_does_not_get_the_driver_blamed() {
    let mut scene = Scene::new();
    scene.map(0x8000, 0x1000, Bidirectional, Coherent).dma(Write, 0x8ffc, 4).check(&[]);
    scene.read_words(0x8ff0, &[0xabc_0000, 0xdef_0000]);
    scene.dma(Write, 0xabc_0000, 8).check(&["stray-access V1 driver -"]);
    scene.dma(Write, 0xdef_0000, 8).check(&["stray-access -- unknown -"]);
    // Through another mapping of the same memory.
    scene.map_memory(0x5000, 0x100, 0x8000 + (1 << 30), FromDevice, Single).dma(Write, 0x5000, 8);
    scene.read_words(0x8000, &[0x123_0000]).dma(Write, 0x123_0000, 8).check(&["stray-access -- unknown -"]);
    // Through an access that began outside.
    scene.dma(Write, 0x7ff8, 32).check(&["stray-access V2 device -"]);
    scene.read_words(0x8010, &[0x456_0000]).dma(Write, 0x456_0000, 8).check(&["stray-access -- unknown -"]);
}

#[test]
fn the_error_value_is_seen_where_it_is_given_and_where_it_is_used() {
    let error = DmaMapError::IovaExhausted(IovaExhausted { size_bytes: 1 });
    let mut scene = Scene::new();
    scene.give(u64::MAX).check(&[]);
    let call = scene.call();
    scene.sanitizer.refused_map(call, &error);
    // Two masks of 4 bytes are not an address.
    scene.write_register(NIC, 0x40, Bytes4, u64::MAX).write_register(NIC, 0x44, Bytes4, u64::MAX).check(&[]);
    scene.give(u64::MAX);
    let report = scene.take()[0];
    assert_eq!(shown(&report), "error-never-checked V1 driver -");
    assert_eq!((report.device, report.request_id), (Some(NIC), Some(call.request_id)));
    scene.give(u64::MAX).check(&[]);
    scene.refused_dma(Write, u64::MAX, 64).check(&["error-never-checked V1 driver -"]);
    let now = scene.now();
    scene.dma_of(DISK, now, Write, u64::MAX, 64, None, None).check(&["error-never-checked V2 device -"]);
}

#[test]
fn refused_unmaps_are_told_apart() {
    let iova = Iova::new(0x1000);
    let (made_as, asked_as) = ("single".to_owned(), "coherent".to_owned());
    let size = || SizeMismatch { iova, mapped_bytes: 8, asked_bytes: 9 };
    let direction = || DirectionMismatch { iova, mapped: ToDevice, asked: FromDevice };
    let function = WrongFunction { iova, made_as, asked_as };
    let not_mapped = |at| DmaUnmapError::NotMapped(NotMapped { iova: Iova::new(at) });
    for (at, error, expected) in [
        (0x1000, DmaUnmapError::SizeMismatch(size()), Some("size-mismatch -- driver 0x1000")),
        (0x1000, DmaUnmapError::DirectionMismatch(direction()), Some("direction-mismatch -- driver 0x1000")),
        (0x1000, DmaUnmapError::WrongFunction(function), Some("wrong-free -- driver 0x1000")),
        (0x1004, not_mapped(0x1004), Some("free-of-unmapped -- driver 0x1000")),
        (0x9000, not_mapped(0x9000), Some("free-of-unmapped -- driver -")),
        (0x2000, not_mapped(0x2000), Some("double-unmap -- driver 0x2000")),
        (0x2004, not_mapped(0x2004), Some("free-of-unmapped -- driver -")),
        (0x1000, DmaUnmapError::NotAttached(NotAttached { device: NIC }), None),
    ] {
        let mut scene = Scene::new();
        scene.map(0x1000, 8, ToDevice, Single).map(0x2000, 8, ToDevice, Single);
        scene.unmap(0x2000, 8, ToDevice, Single);
        let call = scene.call();
        scene.sanitizer.refused_unmap(call, Iova::new(at), &error);
        scene.check(expected.as_slice());
    }
}

#[test]
fn syncs_that_cannot_move_anything_are_misuse() {
    for (direction, synced_for, is_misuse) in [
        (ToDevice, SyncFor::Cpu, true),
        (ToDevice, SyncFor::Device, false),
        (FromDevice, SyncFor::Cpu, false),
        (FromDevice, SyncFor::Device, true),
        (Bidirectional, SyncFor::Cpu, false),
        (Bidirectional, SyncFor::Device, false),
    ] {
        let mut scene = Scene::new();
        scene.map(0x1000, 64, direction, Single);
        let call = scene.call();
        scene.sanitizer.synced(call, range(0x1010, 8), synced_for);
        scene.check(if is_misuse { &["sync-direction -- driver 0x1000"] } else { &[] });
        // Another mapping of these bytes may have been meant.
        scene.map(0x1000, 128, Bidirectional, Fixed);
        let call = scene.call();
        scene.sanitizer.synced(call, range(0x1010, 8), synced_for);
        scene.check(&[]);
    }
}

#[test]
fn refused_syncs_are_told_apart() {
    let at = |iova| Iova::new(iova);
    let not_mapped = |iova| DmaSyncError::NotMapped(NotMapped { iova: at(iova) });
    let outside = OutsideMapping { iova: at(0x1004), size_bytes: 8 };
    let direction = DirectionMismatch { iova: at(0x1000), mapped: ToDevice, asked: FromDevice };
    for (iova, error, expected) in [
        (0x9000, not_mapped(0x9000), Some("sync-of-unmapped -- driver -")),
        (0x2004, not_mapped(0x2004), Some("sync-of-unmapped -- driver 0x2000")),
        (0x1004, DmaSyncError::OutsideMapping(outside), Some("sync-outside -- driver 0x1000")),
        (0x1000, DmaSyncError::DirectionMismatch(direction), Some("sync-direction -- driver 0x1000")),
        (0x1000, DmaSyncError::NotAttached(NotAttached { device: NIC }), None),
    ] {
        let mut scene = Scene::new();
        scene.map(0x1000, 8, ToDevice, Single).map(0x2000, 8, ToDevice, Single);
        scene.unmap(0x2000, 8, ToDevice, Single);
        let call = scene.call();
        scene.sanitizer.refused_sync(call, at(iova), &error);
        scene.check(expected.as_slice());
    }
}

#[test]
fn a_segment_over_the_limit_is_reported_and_other_refusals_are_not() {
    let over = SegmentOverLimit { size_bytes: 70_000, allowed_bytes: 65_536 };
    for (error, expected) in [
        (DmaMapError::SegmentOverLimit(over), Some("segment-over-limit -- driver -")),
        (DmaMapError::IovaExhausted(IovaExhausted { size_bytes: 1 }), None),
    ] {
        let mut scene = Scene::new();
        let call = scene.call();
        scene.sanitizer.refused_map(call, &error);
        scene.check(expected.as_slice());
    }
}

#[test]
fn memory_mapped_twice_is_an_overlap_where_a_device_may_write() {
    let first = 0x10_0000;
    for (one, two, at, kind, is_overlap) in [
        (FromDevice, FromDevice, first, Single, true),
        (ToDevice, FromDevice, first + 0xff, ScatterGather, true),
        (ToDevice, ToDevice, first, Single, false),
        (ToDevice, Bidirectional, first + 0x100, Single, true), // the same cache line
        (ToDevice, Bidirectional, first + 0x140, Single, false),
        (Bidirectional, ToDevice, first - 0x7, Single, false),
        (Bidirectional, ToDevice, first, Coherent, false),
        (Bidirectional, ToDevice, first, Fixed, false),
    ] {
        let mut scene = Scene::new();
        scene.map_memory(0x1000, 0x105, first, one, Single).map_memory(0x9000, 7, at, two, kind);
        scene.check(if is_overlap { &["overlap -- driver 0x1000"] } else { &[] });
        scene.unmap(0x9000, 7, two, kind).unmap(0x1000, 0x105, one, Single);
        scene.map_memory(0x9000, 7, at, two, kind).check(&[]);
    }
}

#[test]
fn memory_released_while_mapped_names_its_mapping() {
    let mut scene = Scene::new();
    scene.map_memory(0x1000, 0x100, 0x10_0080, FromDevice, Single);
    for (first, size_bytes, found) in
        [(0x10_0000, 0x1000, true), (0x10_0000, 0x80, false), (0x10_017f, 1, true), (0x10_0180, 16, false)]
    {
        let memory = GpaRange::new(Gpa::new(first), size_bytes).expect("a range");
        let call = scene.call();
        assert_eq!(scene.sanitizer.released_while_mapped(call, memory), found, "{memory}");
        scene.check(if found { &["released-while-mapped V3 driver 0x1000"] } else { &[] });
    }
}

#[test]
fn leaks_are_told_one_by_one_and_the_rest_is_counted() {
    let mut scene = Scene::with(SanitizerBounds { leak_reports: 3, ..SanitizerBounds::USUAL });
    let call = scene.call();
    scene.sanitizer.leaked(call);
    scene.check(&[]);
    for n in (1..=10).rev() {
        scene.map(n * 0x1000, 16, ToDevice, Single);
    }
    let call = scene.call();
    scene.sanitizer.leaked(call);
    let reports = scene.take();
    let told: Vec<_> = reports.iter().map(|report| (shown(report), report.repeats)).collect();
    let expected = [("0xa000", 0), ("0x9000", 0), ("0x8000", 7)];
    assert_eq!(told, expected.map(|(at, repeats)| (format!("leak -- driver {at}"), repeats)));
    assert_eq!(scene.sanitizer.counts()[&ReportClass::Leak], 10);
}

#[test]
fn what_is_forgotten_is_never_held_against_a_device() {
    let bounds =
        SanitizerBounds { dead_mappings: 2, supplied_per_device: 2, devices: 1, ..SanitizerBounds::USUAL };
    let mut scene = Scene::with(bounds);
    let before = scene.now();
    for n in 1..=4 {
        scene.map(n * 0x1000, 0x100, FromDevice, Single).unmap(n * 0x1000, 0x100, FromDevice, Single);
    }
    // One dead mapping that is known, one that is not, and addresses beyond all that were.
    scene.dma(Write, 0x4000, 8).dma(Write, 0x1000, 8).dma(Write, 0x6000, 8);
    scene.check(&[
        "use-after-unmap V3 device 0x4000",
        "stray-access -- unknown -",
        "stray-access V2 device -",
    ]);
    // It may have been legitimate when it began.
    scene.dma_of(NIC, before, Write, 0x1000, 8, None, None).check(&[]);
    assert_eq!(scene.sanitizer.unjudged(), 1);
    // The same buffer again and again takes one place.
    for _ in 0..10 {
        scene.map(0x4000, 0x100, FromDevice, Single).unmap(0x4000, 0x100, FromDevice, Single);
    }
    scene.dma(Write, 0x3000, 8).check(&["use-after-unmap V3 device 0x3000"]);
    // Addresses given.
    scene.give(0x7000).give(0x8000).dma(Write, 0x9000, 8).check(&["stray-access V2 device -"]);
    scene.give(0xa000).dma(Write, 0x9000, 8).check(&["stray-access -- unknown -"]);
    scene.dma(Write, 0x3000, 8).check(&["use-after-unmap V3 unknown 0x3000"]);
    scene.dma(Write, 0x8000, 8).check(&["stray-access V1 driver -"]);
    // A device that was forgotten may have been given anything.
    let now = scene.now();
    scene.dma_of(DISK, now, Write, 0x9000, 8, None, None).check(&["stray-access -- unknown -"]);
}

#[test]
fn transfers_that_were_forgotten_are_not_held_against_a_device() {
    let mut scene = Scene::new();
    scene.map(0x1000, 0x100, FromDevice, Single).give(0x1000).dma(Write, 0x1000, 0x100);
    scene.map(0x10_0000, 0x10_0000, FromDevice, Single);
    for n in 0..64 {
        scene.dma(Write, 0x10_0000 + n * 0x100, 16);
    }
    // The transfer into the first buffer may go on here, and cannot at another place.
    scene.dma(Write, 0x1100, 16).dma(Write, 0x1200, 16);
    scene.check(&["stray-access -- unknown -", "stray-access V2 device -"]);
    // A device that scans does not make its own traces doubtful.
    for n in 0..200 {
        scene.dma(Write, 0x50_0000 + n * 0x100, 16);
    }
    scene.take();
    scene.dma(Write, 0x60_0000, 16).check(&["stray-access V2 device -"]);
    // A transfer that the driver began outside, and that is forgotten, may go on anywhere.
    scene.give(0x70_0000).dma(Write, 0x70_0000, 16).check(&["stray-access V1 driver -"]);
    for n in 0..64 {
        scene.dma(Write, 0x10_0000 + n * 0x100, 16);
    }
    scene.dma(Write, 0x70_0010, 16).check(&["stray-access -- unknown -"]);
}

#[test]
fn i7_the_log_counts_equal_reports_and_what_it_overwrote() {
    let mut scene = Scene::with(SanitizerBounds { reports: 3, ..SanitizerBounds::USUAL });
    scene.map(0x1000, 0x100, ToDevice, Single);
    for n in 0..5 {
        scene.dma(Write, 0x1000 + n * 8, 8);
    }
    scene.refused_dma(Write, 0x1000, 8);
    let reports = scene.take();
    assert_eq!(reports.iter().map(|report| report.repeats).collect::<Vec<_>>(), [4, 0]);
    for n in 0..5 {
        scene.dma(Write, 0x10_0000 + n * 0x100, 8).dma(Write, 0x10_0000 + n * 0x100, 8);
    }
    let sequences = |after, limit| {
        let (reports, overwritten) = scene.sanitizer.reports(after, limit);
        (reports.iter().map(|report| report.sequence).collect::<Vec<_>>(), overwritten)
    };
    assert_eq!(sequences(0, 10), (vec![5, 6, 7], 4));
    assert_eq!(sequences(3, 10), (vec![5, 6, 7], 1));
    assert_eq!(sequences(5, 1), (vec![6], 0));
    assert_eq!(sequences(u64::MAX, 10), (vec![], 0));
    assert_eq!((scene.sanitizer.latest(), scene.sanitizer.overwritten()), (7, 4));
    let counts = scene.sanitizer.counts();
    assert_eq!((counts[&ReportClass::WrongDirection], counts[&ReportClass::StrayAccess]), (6, 10));
}

#[test]
fn i7_what_was_unmapped_leaves_no_trace_among_the_living() {
    let mut scene = Scene::new();
    for n in 0..100 {
        scene.map(0x1000 * n, 0x1800, ToDevice, Coherent);
    }
    for n in 0..100 {
        scene.unmap(0x1000 * n, 0x1800, ToDevice, Coherent);
    }
    assert_eq!(scene.sanitizer.live.sizes(), (0, 0));
    assert!(!scene.sanitizer.live.holds_coherent());
}

#[test]
fn a_value_that_a_device_planted_counts_once_the_driver_gives_it() {
    let mut scene = Scene::new();
    scene.map(0x8000, 0x1000, Bidirectional, Coherent).dma(Write, 0x8000, 8);
    scene.read_words(0x8000, &[0xabc_0000]).dma(Write, 0xabc_0000, 8).check(&["stray-access -- unknown -"]);
    scene.give(0xabc_0000).dma(Write, 0xabc_0000, 8).check(&["stray-access V1 driver -"]);
}

#[test]
fn what_is_written_through_a_forgotten_mapping_may_be_anywhere() {
    let mut scene = Scene::with(SanitizerBounds { dead_mappings: 1, ..SanitizerBounds::USUAL });
    scene.map(0x8000, 0x1000, Bidirectional, Coherent);
    scene.map_memory(0x1000, 64, 0x8000 + (1 << 30), FromDevice, Fixed).unmap(0x1000, 64, FromDevice, Fixed);
    scene.map(0x2000, 64, FromDevice, Single).unmap(0x2000, 64, FromDevice, Single);
    scene.read_words(0x8000, &[0xabc_0000]).dma(Write, 0xabc_0000, 8).check(&["stray-access V1 driver -"]);
    scene.refused_dma(Write, 0x1000, 8).dma(Write, 0x1000, 8).take();
    scene.read_words(0x8000, &[0xdef_0000]).dma(Write, 0xdef_0000, 8).check(&["stray-access -- unknown -"]);
}

#[test]
fn nonsense_changes_nothing() {
    let mut scene = Scene::new();
    scene.unmap(0x1000, 8, ToDevice, Single).map(0x1000, 8, ToDevice, Single);
    scene.unmap(0x1000, 9, ToDevice, Single).unmap(0x1000, 8, FromDevice, Single);
    scene.unmap(0x1000, 8, ToDevice, Coherent).dma(Read, 0x1000, 8).check(&[]);
    // The whole space, memory that would wrap, and reads that say more than they may.
    scene.map_memory(1, u64::MAX, u64::MAX - 3, Bidirectional, Coherent);
    let now = scene.now();
    scene.dma_of(NIC, now, Read, u64::MAX - 2, 64, None, Some(&[0xff; 100]));
    scene.dma_of(NIC, now, Write, u64::MAX, u32::MAX, None, None);
    scene.dma_of(NIC, now, Atomic, 3, 8, None, Some(&vec![1; READ_TOO_MUCH]));
    scene.check(&[]);
    assert_eq!(scene.sanitizer.live_mappings(), 2);
}

/// More than is looked at of one read.
const READ_TOO_MUCH: usize = (64 << 10) + 1;
