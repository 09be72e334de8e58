//! Random maps, unmaps, syncs, register writes and DMA against a flat twin: lists that are read from end to end, and addresses that are
//! looked at one byte after the other.
//!
//! A sanitizer with room reports exactly what the twin says: no false report and none missed, with the same class, violation, blame and
//! mapping. One with hardly any room may say less, and never anything worse.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use iommu_kernel::{
    DriverCall, EventClock, MappingKind, Moment, NewMapping, RegisterWrite, Sanitizer, SanitizerBounds,
};
use iommu_types::errors::{DirectionMismatch, DmaUnmapError, NotMapped, SizeMismatch};
use iommu_types::{
    Access, AccessWidth, Blame, DeviceAddress, Direction, DomainId, FaultReason, Gpa, GpaRange, Iova,
    IovaRange, MappingLife, Owner, ReportClass, RequestId, SanitizerReport, SeenAccess, SourceId, SyncFor,
    Violation,
};
use proptest::prelude::*;
use proptest::sample::Index;

/// All mappings lie in these bytes, so that they touch and overlap.
const FIRST: u64 = 0x5000;
const SPAN: u64 = 0x200;
/// And their memory in these.
const MEMORY: u64 = 0x9_0000;
const MEMORY_SPAN: u64 = 0x800;
/// Transfers that are followed.
const RUNS_MAX: usize = 64;

const SMALL: SanitizerBounds =
    SanitizerBounds { dead_mappings: 3, supplied_per_device: 4, devices: 2, ..SanitizerBounds::USUAL };
/// Room for addresses and none for the dead, so that blame is still told.
const FEW_DEAD: SanitizerBounds = SanitizerBounds { dead_mappings: 2, ..SanitizerBounds::USUAL };

/// Where an access or a value points.
#[derive(Clone, Debug)]
enum Target {
    /// Into a mapping that is or was, or beside it.
    Mapping(Index, i64),
    /// Where the device's last access ended.
    Onward,
    Anywhere(u64),
    /// The error value.
    AllOnes,
}

#[derive(Clone, Debug)]
enum Step {
    Map {
        offset: u64,
        size_bytes: u64,
        memory: u64,
        direction: Direction,
        kind: MappingKind,
    },
    Unmap {
        which: Index,
    },
    RefusedUnmap {
        which: Index,
        wrong: u8,
    },
    Sync {
        which: Index,
        synced_for: SyncFor,
    },
    Release {
        offset: u64,
        size_bytes: u64,
    },
    Give {
        device: u8,
        target: Target,
        in_halves: bool,
    },
    /// And may have written there before, and may use what it read.
    ReadCoherent {
        device: u8,
        which: Index,
        at: u64,
        targets: Vec<Target>,
        plants: bool,
        uses: bool,
    },
    /// Takes the order for a DMA that is done later.
    Begin,
    Dma {
        device: u8,
        target: Target,
        size_bytes: u32,
        access: Access,
        is_refused: bool,
        begun: Option<Index>,
    },
}

fn any_step() -> impl Strategy<Value = Step> {
    let index = any::<Index>;
    let direction =
        prop_oneof![Just(Direction::Bidirectional), Just(Direction::ToDevice), Just(Direction::FromDevice)];
    let kind = prop_oneof![
        4 => Just(MappingKind::Single),
        1 => Just(MappingKind::ScatterGather),
        2 => Just(MappingKind::Coherent),
        1 => Just(MappingKind::Fixed),
    ];
    let access = prop_oneof![4 => Just(Access::Read), 4 => Just(Access::Write), 1 => Just(Access::Atomic)];
    let synced_for = prop_oneof![Just(SyncFor::Cpu), Just(SyncFor::Device)];
    // Multiples of 16, so that what is mapped again is often equal to what was.
    let aligned = |max: u64| (0..max / 16).prop_map(|n| n * 16);
    let size = prop_oneof![6 => (1u64..8).prop_map(|n| n * 16), 2 => 1u64..64, 1 => 128u64..SPAN];
    let target = prop_oneof![
        6 => (index(), prop_oneof![4 => Just(0i64), 3 => -20i64..140]).prop_map(|(which, skew)| Target::Mapping(which, skew)),
        3 => Just(Target::Onward),
        2 => (0..SPAN + 0x100).prop_map(|offset| Target::Anywhere(FIRST - 0x80 + offset)),
        2 => (0u64..4).prop_map(|n| Target::Anywhere(0x7_0000 + n * 0x40)),
        1 => Just(Target::AllOnes),
    ];
    let targets = prop::collection::vec(target.clone(), 1..4);
    let size_of_dma = prop_oneof![1 => Just(0u32), 6 => (1u32..5).prop_map(|n| n * 16), 3 => 1u32..80];
    let begun = prop_oneof![2 => Just(None), 1 => index().prop_map(Some)];
    let device = 0u8..3;
    prop_oneof![
        6 => (aligned(SPAN), size.clone(), 0..MEMORY_SPAN, direction, kind).prop_map(
            |(offset, size_bytes, memory, direction, kind)| Step::Map { offset, size_bytes, memory, direction, kind }),
        5 => index().prop_map(|which| Step::Unmap { which }),
        1 => (index(), 0u8..4).prop_map(|(which, wrong)| Step::RefusedUnmap { which, wrong }),
        1 => (index(), synced_for).prop_map(|(which, synced_for)| Step::Sync { which, synced_for }),
        1 => (0..MEMORY_SPAN, 1u64..100).prop_map(|(offset, size_bytes)| Step::Release { offset, size_bytes }),
        3 => (device.clone(), target.clone(), any::<bool>())
            .prop_map(|(device, target, in_halves)| Step::Give { device, target, in_halves }),
        2 => (device.clone(), index(), 0u64..80, targets, any::<bool>(), any::<bool>()).prop_map(
            |(device, which, at, targets, plants, uses)|
                Step::ReadCoherent { device, which, at, targets, plants, uses }),
        3 => Just(Step::Begin),
        14 => (device, target, size_of_dma, access, prop::bool::weighted(0.2), begun).prop_map(
            |(device, target, size_bytes, access, is_refused, begun)|
                Step::Dma { device, target, size_bytes, access, is_refused, begun }),
    ]
}

#[derive(Clone, Copy, Debug)]
struct Known {
    life: MappingLife,
    kind: MappingKind,
    died: Option<u64>,
}

impl Known {
    fn base(&self) -> u64 {
        self.life.iova.get()
    }
    fn covers(&self, address: u64) -> bool {
        address.checked_sub(self.base()).is_some_and(|offset| offset < self.life.size_bytes)
    }
    fn ends_at(&self) -> u64 {
        self.base() + self.life.size_bytes
    }
    fn allows(&self, access: Access) -> bool {
        self.life.direction.permissions().allow(access)
    }
    fn memory_of(&self, address: u64) -> u64 {
        self.life.gpa.get() + (address - self.base())
    }
    fn is_streaming(&self) -> bool {
        matches!(self.kind, MappingKind::Single | MappingKind::ScatterGather)
    }
}

#[derive(Clone, Copy, Debug)]
struct Gift {
    device: u8,
    value: u64,
    is_certain: bool,
    /// When, if nothing was mapped at the address then.
    dangling: Option<u64>,
}

#[derive(Clone, Copy, Debug)]
struct Transfer {
    end: u64,
    access: Access,
    start: u64,
    /// Index of the mapping.
    origin: Option<usize>,
}

type Said = (ReportClass, Option<Violation>, Blame, Option<MappingLife>);

/// Where an access was, by the index of the mapping.
#[derive(Clone, Copy, Debug)]
enum Spot {
    Fine(usize),
    Overrun(usize),
    Direction(usize),
    Late(usize),
    Error,
    Stray(u64),
}

/// The flat twin: everything that ever was, in order of birth.
#[derive(Default)]
struct Twin {
    mappings: Vec<Known>,
    gifts: Vec<Gift>,
    halves: BTreeMap<(u8, u64), u64>,
    transfers: BTreeMap<u8, VecDeque<Transfer>>,
    /// Bytes of memory that devices wrote while they were coherent.
    planted: BTreeSet<u64>,
}

#[derive(PartialEq)]
enum Given {
    Yes,
    Perhaps,
    No,
}

impl Twin {
    fn live(&self) -> impl Iterator<Item = (usize, &Known)> {
        self.mappings.iter().enumerate().filter(|(_, known)| known.died.is_none())
    }
    fn lived_since(&self, order: u64) -> impl DoubleEndedIterator<Item = (usize, &Known)> {
        self.mappings.iter().enumerate().filter(move |(_, known)| known.died.is_none_or(|died| died >= order))
    }
    fn map(&mut self, known: Known) -> Option<Said> {
        let lines = |known: &Known| {
            let first = known.life.gpa.get();
            (first..first + known.life.size_bytes).map(|byte| byte / 64).collect::<BTreeSet<u64>>()
        };
        let writes = |known: &Known| known.life.direction != Direction::ToDevice;
        let clash = known.is_streaming()
            && self.live().any(|(_, other)| {
                other.is_streaming()
                    && (writes(other) || writes(&known))
                    && !lines(other).is_disjoint(&lines(&known))
            });
        self.mappings.push(known);
        clash.then_some((ReportClass::Overlap, None, Blame::Driver, None))
    }
    fn give(&mut self, device: u8, value: u64, order: u64, is_register: bool, is_certain: bool) {
        let is_mapped = self.lived_since(order).any(|(_, known)| known.covers(value));
        let dangling = (is_register && !is_mapped).then_some(order);
        self.gifts.push(Gift { device, value, is_certain, dangling });
    }
    fn leads_somewhere(&self, value: u64) -> bool {
        self.mappings.iter().any(|known| known.covers(value))
    }
    fn given(&self, device: u8, wanted: impl Fn(u64) -> bool) -> Given {
        let found: Vec<_> =
            self.gifts.iter().filter(|gift| gift.device == device && wanted(gift.value)).collect();
        match (found.is_empty(), found.iter().any(|gift| gift.is_certain)) {
            (true, _) => Given::No,
            (false, true) => Given::Yes,
            (false, false) => Given::Perhaps,
        }
    }
    fn spot(&self, device: u8, begun: u64, first: u64, size_bytes: u32, access: Access) -> Spot {
        let bytes = || (0..u64::from(size_bytes.max(1))).map(|n| first.saturating_add(n));
        let allowed = |known: &Known| (access == Access::Read && size_bytes == 0) || known.allows(access);
        let fine = |(_, known): &(usize, &Known)| allowed(known) && bytes().all(|byte| known.covers(byte));
        if let Some((at, _)) = self.live().filter(fine).last() {
            return Spot::Fine(at);
        }
        if let Some((at, _)) = self.lived_since(begun).rfind(fine) {
            return Spot::Fine(at);
        }
        if let Some((at, _)) =
            self.lived_since(begun).rfind(|(_, known)| known.covers(first) && allowed(known))
        {
            return Spot::Overrun(at);
        }
        if let Some((at, _)) = self.lived_since(begun).rfind(|(_, known)| known.covers(first)) {
            return Spot::Direction(at);
        }
        if first == u64::MAX {
            return Spot::Error;
        }
        let begins_here = self.mappings.iter().any(|known| known.base() == first);
        let is_given = self.given(device, |value| value == first) != Given::No;
        let transfer = self.transfer(device, first, access).filter(|_| !is_given);
        if let Some(Transfer { origin: Some(origin), .. }) = transfer
            && !self.mappings[origin].covers(first)
            && !begins_here
        {
            return Spot::Overrun(origin);
        }
        let late = self.mappings.iter().enumerate().filter(|(_, known)| known.covers(first));
        match late.max_by_key(|(at, known)| (known.died, *at)) {
            Some((at, _)) => Spot::Late(at),
            None => match transfer {
                Some(Transfer { origin: None, start, .. }) => Spot::Stray(start),
                _ => Spot::Stray(first),
            },
        }
    }
    fn transfer(&self, device: u8, first: u64, access: Access) -> Option<Transfer> {
        let transfers = self.transfers.get(&device)?;
        transfers.iter().find(|transfer| transfer.end == first && transfer.access == access).copied()
    }
    fn says(&self, spot: Spot, device: u8, first: u64) -> Option<Said> {
        let inside = |at: usize| self.given(device, |value| self.mappings[at].covers(value));
        let life = |at: usize| Some(self.mappings[at].life);
        let of_either = |class, at| match inside(at) {
            Given::No => (class, Some(Violation::BadDevice), Blame::Device, life(at)),
            _ => (class, None, Blame::Unknown, life(at)),
        };
        let of_address = |class, given| match given {
            Given::Yes => (class, Some(Violation::BadAddress), Blame::Driver, None),
            Given::No => (class, Some(Violation::BadDevice), Blame::Device, None),
            Given::Perhaps => (class, None, Blame::Unknown, None),
        };
        Some(match spot {
            Spot::Fine(_) => return None,
            Spot::Overrun(at) => of_either(ReportClass::Overrun, at),
            Spot::Direction(at) => of_either(ReportClass::WrongDirection, at),
            Spot::Late(at) => {
                let known = &self.mappings[at];
                let is_after = |gift: &Gift| {
                    gift.device == device
                        && known.covers(gift.value)
                        && gift.dangling.is_some_and(|order| Some(order) > known.died)
                };
                let blame = match inside(at) {
                    Given::No => Blame::Device,
                    _ if self.gifts.iter().any(is_after) => Blame::Driver,
                    _ => Blame::Unknown,
                };
                (ReportClass::UseAfterUnmap, Some(Violation::InvalidUse), blame, life(at))
            }
            Spot::Error => {
                of_address(ReportClass::ErrorNeverChecked, self.given(device, |value| value == u64::MAX))
            }
            Spot::Stray(start) => of_address(
                ReportClass::StrayAccess,
                self.given(device, |value| value == first || value == start),
            ),
        })
    }
    fn follow(&mut self, device: u8, spot: Spot, first: u64, size_bytes: u32, access: Access) {
        let (start, origin) = match spot {
            Spot::Error => return,
            Spot::Fine(at) | Spot::Overrun(at) | Spot::Direction(at) | Spot::Late(at) => (first, Some(at)),
            Spot::Stray(start) => (start, None),
        };
        let Some(end) = first.checked_add(u64::from(size_bytes)).filter(|_| size_bytes != 0) else { return };
        let transfers = self.transfers.entry(device).or_default();
        transfers.retain(|known| known.access != access || (known.end != first && known.end != end));
        transfers.push_back(Transfer { end, access, start, origin });
        assert!(transfers.len() <= RUNS_MAX, "the run is short enough that none is forgotten");
    }
    fn note_write(&mut self, spot: Spot, first: u64, done_bytes: u32) {
        let through = match spot {
            Spot::Fine(at) | Spot::Overrun(at) | Spot::Direction(at) | Spot::Late(at) => Some(at),
            Spot::Error | Spot::Stray(_) => None,
        };
        let mut written = BTreeSet::new();
        let addresses = (0..u64::from(done_bytes)).map_while(|n| first.checked_add(n));
        for address in addresses {
            let coherent = self.live().filter(|(_, known)| known.life.coherent && known.covers(address));
            written.extend(coherent.map(|(_, known)| known.memory_of(address)));
        }
        if let Some(through) = through.map(|at| &self.mappings[at]) {
            // All that was written through the other mapping counts, if any of it is coherent memory.
            let bytes: BTreeSet<u64> =
                (0..u64::from(done_bytes)).map(|n| through.memory_of(first) + n).collect();
            let is_coherent = |known: &Known| {
                let memory = known.life.gpa.get()..known.life.gpa.get() + known.life.size_bytes;
                known.life.coherent && bytes.iter().any(|byte| memory.contains(byte))
            };
            if !through.life.coherent && self.live().any(|(_, known)| is_coherent(known)) {
                written.extend(bytes);
            }
        }
        self.planted.extend(written);
    }
}

fn device(number: u8) -> DeviceAddress {
    DeviceAddress { segment: 0, source_id: SourceId::new(8 * (u16::from(number) + 1)) }
}

/// The twin and the sanitizers, in step.
struct Run {
    twin: Twin,
    full: Sanitizer,
    limited: [Sanitizer; 2],
    clock: EventClock,
    at_us: u64,
    requests: u64,
    begun: Vec<u64>,
    last_end: u64,
}

fn total(sanitizer: &Sanitizer) -> u64 {
    sanitizer.counts().values().sum()
}

/// The report that was made since there were so many, if there was one.
fn newest(sanitizer: &Sanitizer, before: u64) -> Option<SanitizerReport> {
    let made = total(sanitizer) - before;
    assert!(made <= 1, "one event, one report at most");
    (made == 1).then(|| sanitizer.reports(sanitizer.latest() - 1, 1).0[0])
}

impl Run {
    fn new() -> Self {
        let sanitizer = |bounds| Sanitizer::new(Owner::Driver(1), DomainId::new(2), bounds);
        Self {
            twin: Twin::default(),
            full: sanitizer(SanitizerBounds::USUAL),
            limited: [sanitizer(SMALL), sanitizer(FEW_DEAD)],
            clock: EventClock::default(),
            at_us: 1 << 20,
            requests: 0,
            begun: vec![0],
            last_end: FIRST,
        }
    }
    fn call(&mut self) -> DriverCall {
        self.requests += 1;
        let at = Moment { at_us: self.at_us, order: self.clock.tick() };
        DriverCall { at, device: None, request_id: RequestId(self.requests) }
    }
    fn address(&self, target: &Target) -> u64 {
        match target {
            Target::Mapping(which, skew) if !self.twin.mappings.is_empty() => {
                which.get(&self.twin.mappings).base().saturating_add_signed(*skew)
            }
            Target::Mapping(..) => FIRST,
            Target::Onward => self.last_end,
            Target::Anywhere(address) => *address,
            Target::AllOnes => u64::MAX,
        }
    }
    /// Tells all sanitizers, and compares with what the twin says.
    fn check(
        &mut self,
        said: Option<Said>,
        is_dma: bool,
        mut tell: impl FnMut(&mut Sanitizer),
    ) -> Result<(), TestCaseError> {
        let before = total(&self.full);
        tell(&mut self.full);
        let report = newest(&self.full, before);
        let shown = report.map(|report| (report.class, report.violation, report.blame, report.mapping));
        let expected = said.map(|said| match said.0 {
            // Which of several is of no account.
            ReportClass::Overlap => (said.0, said.1, said.2, shown.and_then(|shown| shown.3)),
            _ => said,
        });
        prop_assert_eq!(shown, expected);
        for limited in &mut self.limited {
            let before = total(limited);
            tell(limited);
            if let Some(report) = newest(limited, before).filter(|_| is_dma) {
                let full = said.map(|(class, _, blame, _)| (class, blame));
                prop_assert!(full.is_some(), "a false report: {report:?}");
                let (class, blame) = full.expect("just seen");
                prop_assert!(
                    report.blame == Blame::Unknown || report.blame == blame,
                    "{report:?} instead of {said:?}"
                );
                prop_assert!(
                    report.class == class || report.blame == Blame::Unknown,
                    "{report:?} instead of {said:?}"
                );
            }
        }
        Ok(())
    }
    fn step(&mut self, step: Step) -> Result<(), TestCaseError> {
        self.at_us += 3;
        match step {
            Step::Map { offset, size_bytes, memory, direction, kind } => {
                let range = IovaRange::new(Iova::new(FIRST + offset), size_bytes).expect("a range");
                self.map(NewMapping { range, gpa: Gpa::new(MEMORY + memory), direction, kind })
            }
            Step::Unmap { which } => self.unmap(which),
            Step::RefusedUnmap { which, wrong } => self.refused_unmap(which, wrong),
            Step::Sync { which, synced_for } => self.sync(which, synced_for),
            Step::Release { offset, size_bytes } => self.release(MEMORY + offset, size_bytes),
            Step::Give { device, target, in_halves } => self.give(device, self.address(&target), in_halves),
            Step::ReadCoherent { device, which, at, targets, plants, uses } => {
                let values: Vec<u64> = targets.iter().map(|target| self.address(target)).collect();
                let Some(first) = self.coherent_base(which).map(|base| base + at) else { return Ok(()) };
                if plants {
                    self.write(device, first + 8, 4)?;
                }
                self.read_coherent(device, first, &values)?;
                if uses {
                    self.write(device, values[0], 4)?;
                }
                Ok(())
            }
            Step::Begin => {
                self.begun.push(self.clock.now());
                Ok(())
            }
            Step::Dma { device, target, size_bytes, access, is_refused, begun } => {
                let begun = begun.map_or_else(|| self.clock.now(), |begun| *begun.get(&self.begun));
                let done_bytes = if is_refused { size_bytes / 2 } else { size_bytes };
                let refused = is_refused.then_some(FaultReason::READ_DENIED);
                let iova = Iova::new(self.address(&target));
                let seen = SeenAccess { iova, size_bytes, done_bytes, access, refused };
                self.dma(device, begun, seen, None).map(|_| ())
            }
        }
    }
    fn map(&mut self, new: NewMapping) -> Result<(), TestCaseError> {
        let call = self.call();
        let life = MappingLife {
            iova: new.range.base(),
            size_bytes: new.range.size_bytes(),
            gpa: new.gpa,
            direction: new.direction,
            coherent: new.kind == MappingKind::Coherent,
            born_at_us: call.at.at_us,
            born_by: call.request_id,
            death: None,
        };
        let said = self.twin.map(Known { life, kind: new.kind, died: None });
        self.check(said, false, |sanitizer| sanitizer.mapped(call, new))
    }
    fn live_one(&self, which: Index) -> Option<Known> {
        let live: Vec<Known> = self.twin.live().map(|(_, known)| *known).collect();
        (!live.is_empty()).then(|| *which.get(&live))
    }
    fn unmap(&mut self, which: Index) -> Result<(), TestCaseError> {
        let Some(known) = self.live_one(which) else { return Ok(()) };
        let call = self.call();
        let is_equal = |other: &Known| {
            (other.life.iova, other.life.size_bytes, other.life.direction, other.kind)
                == (known.life.iova, known.life.size_bytes, known.life.direction, known.kind)
        };
        let oldest = self.twin.live().find(|(_, other)| is_equal(other)).map(|(at, _)| at);
        let oldest = &mut self.twin.mappings[oldest.expect("itself at least")];
        oldest.died = Some(call.at.order);
        oldest.life.death = Some((call.at.at_us, call.request_id));
        let range = IovaRange::new(known.life.iova, known.life.size_bytes).expect("a range");
        self.check(None, false, |sanitizer| {
            sanitizer.unmapped(call, range, known.life.direction, known.kind);
        })
    }
    fn refused_unmap(&mut self, which: Index, wrong: u8) -> Result<(), TestCaseError> {
        if self.twin.mappings.is_empty() {
            return Ok(());
        }
        let base = which.get(&self.twin.mappings).life.iova;
        let (asked, error) = match wrong {
            0 => (base, SizeMismatch { iova: base, mapped_bytes: 1, asked_bytes: 2 }.into()),
            1 => {
                let (mapped, asked) = (Direction::ToDevice, Direction::FromDevice);
                (base, DirectionMismatch { iova: base, mapped, asked }.into())
            }
            2 => (base, NotMapped { iova: base }.into()),
            _ => {
                let inside = Iova::new(base.get() + 3);
                (inside, DmaUnmapError::from(NotMapped { iova: inside }))
            }
        };
        let here = |known: &&Known| known.covers(asked.get());
        let live = || self.twin.live().map(|(_, known)| known);
        let begins = live().filter(|known| known.life.iova == asked).last();
        let mapping = begins.or_else(|| live().filter(here).last()).map(|known| known.life);
        let dead = self.twin.mappings.iter().filter(|known| known.died.is_some() && known.life.iova == asked);
        let dead = dead.max_by_key(|known| known.died).map(|known| known.life);
        let (class, mapping) = match (wrong, dead) {
            (0, _) => (ReportClass::SizeMismatch, mapping),
            (1, _) => (ReportClass::DirectionMismatch, mapping),
            (_, Some(dead)) => (ReportClass::DoubleUnmap, Some(dead)),
            (_, None) => (ReportClass::FreeOfUnmapped, mapping),
        };
        let call = self.call();
        let said = Some((class, None, Blame::Driver, mapping));
        self.check(said, false, |sanitizer| sanitizer.refused_unmap(call, asked, &error))
    }
    fn sync(&mut self, which: Index, synced_for: SyncFor) -> Result<(), TestCaseError> {
        let Some(known) = self.live_one(which) else { return Ok(()) };
        let wrong = match synced_for {
            SyncFor::Cpu => Direction::ToDevice,
            SyncFor::Device => Direction::FromDevice,
        };
        let covers = |other: &Known| other.base() <= known.base() && other.ends_at() >= known.ends_at();
        let covering: Vec<_> =
            self.twin.live().map(|(_, other)| other).filter(|other| covers(other)).collect();
        let is_misuse = covering.iter().all(|other| other.life.direction == wrong);
        let life = covering.last().map(|other| other.life);
        let said = is_misuse.then_some((ReportClass::SyncDirection, None, Blame::Driver, life));
        let call = self.call();
        let range = IovaRange::new(known.life.iova, known.life.size_bytes).expect("a range");
        self.check(said, false, |sanitizer| sanitizer.synced(call, range, synced_for))
    }
    fn release(&mut self, first: u64, size_bytes: u64) -> Result<(), TestCaseError> {
        let held = |known: &Known| {
            let memory = known.life.gpa.get()..known.life.gpa.get() + known.life.size_bytes;
            (first..first + size_bytes).any(|byte| memory.contains(&byte))
        };
        let life = self.twin.live().map(|(_, known)| known).filter(|known| held(known)).last();
        let said = life.map(|known| {
            let violation = Some(Violation::InvalidUse);
            (ReportClass::ReleasedWhileMapped, violation, Blame::Driver, Some(known.life))
        });
        let call = self.call();
        let memory = GpaRange::new(Gpa::new(first), size_bytes).expect("a range");
        self.check(said, false, |sanitizer| {
            assert_eq!(sanitizer.released_while_mapped(call, memory), said.is_some());
        })
    }
    fn give(&mut self, number: u8, value: u64, in_halves: bool) -> Result<(), TestCaseError> {
        let now = Moment { at_us: self.at_us, order: self.clock.now() };
        let writes: &[(u64, AccessWidth, u64)] = if in_halves {
            &[(0x10, AccessWidth::Bytes4, value & 0xffff_ffff), (0x14, AccessWidth::Bytes4, value >> 32)]
        } else {
            &[(0x20, AccessWidth::Bytes8, value)]
        };
        for &(offset, width, written) in writes {
            let mut values = vec![written];
            if width == AccessWidth::Bytes4 {
                self.twin.halves.insert((number, offset), written);
                let half = |at| self.twin.halves.get(&(number, at)).copied().unwrap_or(0);
                values.push(half(0x14) << 32 | half(0x10));
            } else {
                values.extend([written & 0xffff_ffff, written >> 32].map(|half| {
                    // Half of a value counts where it leads to a mapping.
                    if self.twin.leads_somewhere(half) { half } else { written }
                }));
            }
            for value in values.into_iter().filter(|value| *value >= 0x1000) {
                self.twin.give(number, value, now.order, true, true);
            }
            let write = RegisterWrite { offset, width, value: written };
            self.check(None, false, |sanitizer| sanitizer.supplied(now, device(number), write))?;
        }
        Ok(())
    }
    fn coherent_base(&self, which: Index) -> Option<u64> {
        let coherent: Vec<u64> = self
            .twin
            .live()
            .filter(|(_, known)| known.life.coherent)
            .map(|(_, known)| known.base())
            .collect();
        (!coherent.is_empty()).then(|| *which.get(&coherent))
    }
    fn write(&mut self, number: u8, first: u64, size_bytes: u32) -> Result<(), TestCaseError> {
        let (iova, access) = (Iova::new(first), Access::Write);
        let seen = SeenAccess { iova, size_bytes, done_bytes: size_bytes, access, refused: None };
        let begun = self.clock.now();
        self.dma(number, begun, seen, None).map(|_| ())
    }
    /// A device reads words of 8 bytes from coherent memory, at any alignment.
    fn read_coherent(&mut self, number: u8, first: u64, values: &[u64]) -> Result<(), TestCaseError> {
        let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        let size_bytes = u32::try_from(bytes.len()).expect("few");
        let (iova, access) = (Iova::new(first), Access::Read);
        let seen = SeenAccess { iova, size_bytes, done_bytes: size_bytes, access, refused: None };
        let begun = self.clock.now();
        let Spot::Fine(through) = self.dma(number, begun, seen, Some(&bytes))? else { return Ok(()) };
        let mapping = self.twin.mappings[through];
        if !mapping.life.coherent {
            return Ok(());
        }
        for size in [8, 4] {
            for address in (first..first + bytes.len() as u64).filter(|address| address % size == 0) {
                let offset = usize::try_from(address - first).expect("small");
                let Some(word) = bytes.get(offset..offset + usize::try_from(size).expect("small")) else {
                    break;
                };
                let value = word.iter().rev().fold(0, |value, byte| value << 8 | u64::from(*byte));
                if (size == 8 && value >= 0x1000) || self.twin.leads_somewhere(value) {
                    let memory = mapping.memory_of(address);
                    let is_planted = (memory..memory + size).any(|byte| self.twin.planted.contains(&byte));
                    self.twin.give(number, value, begun, false, !is_planted);
                }
            }
        }
        Ok(())
    }
    fn dma(
        &mut self,
        number: u8,
        begun: u64,
        seen: SeenAccess,
        bytes: Option<&[u8]>,
    ) -> Result<Spot, TestCaseError> {
        let (first, size_bytes) = (seen.iova.get(), seen.size_bytes);
        let spot = self.twin.spot(number, begun, first, size_bytes, seen.access);
        let said = self.twin.says(spot, number, first);
        self.twin.follow(number, spot, first, size_bytes, seen.access);
        if seen.access != Access::Read {
            self.twin.note_write(spot, first, seen.done_bytes);
        }
        self.last_end = first.saturating_add(size_bytes.into());
        let (begun, at_us) = (Moment { at_us: self.at_us, order: begun }, self.at_us);
        self.check(said, true, |sanitizer| sanitizer.dma(begun, at_us, device(number), seen, bytes))?;
        prop_assert_eq!(self.full.unjudged(), 0);
        Ok(spot)
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, max_shrink_iters: 20_000, ..ProptestConfig::default() })]

    #[test]
    fn reports_are_those_of_the_twin_and_no_others(steps in prop::collection::vec(any_step(), 1..120)) {
        let mut run = Run::new();
        for step in steps {
            run.step(step)?;
        }
        let live = run.twin.live().count();
        prop_assert_eq!(run.full.live_mappings(), live);
        let call = run.call();
        run.full.leaked(call);
        let leaked = run.full.counts().get(&ReportClass::Leak).copied().unwrap_or_default();
        // Those at fixed addresses go with the domain.
        let lost = run.twin.live().filter(|(_, known)| known.kind != MappingKind::Fixed).count();
        prop_assert_eq!(leaked, lost as u64);
    }
}
