//! What tenants do, step by step: it follows from the seed, the tenant and the number of the step, and from nothing that happens.

use guest_sdk::{Direction, DomainOptions, IovaAllocation, MappingGranularity, Protection};
use iommu_e2e::random::Random;

/// Steps that everybody does at least, however slow the machine is.
pub(crate) const STEPS_MIN: u64 = 21;

/// Legitimate work.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Work {
    /// A domain with these options is made, used and destroyed: buffers of these offsets and sizes go there and back.
    Domain { options: DomainOptions, pieces: Vec<Piece> },
    /// The engine copies so many bytes, and says so by its interrupt.
    Copy { size_bytes: u32 },
    /// The other device raises its interrupt.
    Interrupt,
    /// Registers are read.
    Registers,
    /// The hypervisor is asked.
    Hypercall { size_bytes: usize },
}

/// One DMA mapping and the transfer through it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Piece {
    pub(crate) offset: u64,
    pub(crate) size_bytes: u64,
    pub(crate) direction: Direction,
}

/// What must come to nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Attack {
    /// Reads and writes all over the address space, from this seed on.
    Scan { at: u64 },
    /// A batch as large as they come, of nothing but faults.
    Storm { at: u64 },
    /// Where the others' memory is: as their devices see it, as they see it, and as the host sees it.
    OthersAddresses,
    /// Addresses that the device claims to have translated.
    Translated { address_type: u32 },
    /// Interrupts of others, or of nobody.
    ForgedMsi { at: u64 },
    /// Operations that make no sense.
    Malformed { kind: u8 },
    /// A batch whose columns do not fit, which costs the session.
    Broken { how: u8 },
    /// What was mapped, after it was unmapped.
    Stale,
    /// A device stream as a device of the other tenant.
    OthersDevice,
    /// A session as the other tenant's driver.
    OthersSession,
    /// Requests about the other tenant's memory, devices and faults.
    OthersThings,
    /// More mappings than the limit.
    OverLimit,
    /// More hypercalls at once than there are places.
    Hypercalls { count: usize },
}

const WORK: u64 = 0;
const ATTACK: u64 = 1;

impl Work {
    pub(crate) fn of(seed: u64, tenant: u64, step: u64) -> Self {
        let mut random = Random::of(seed, &[tenant, WORK, step]);
        match random.below(10) {
            0..=4 => {
                let options = options(&mut random);
                let pieces = (0..1 + random.below(3)).map(|_| piece(&mut random, options)).collect();
                Self::Domain { options, pieces }
            }
            5 | 6 => Self::Copy { size_bytes: u32::try_from(1 + random.below(20_000)).expect("small") },
            7 => Self::Interrupt,
            8 => Self::Registers,
            _ => Self::Hypercall { size_bytes: usize::try_from(random.below(4096)).expect("small") },
        }
    }
}

fn options(random: &mut Random) -> DomainOptions {
    let options = DomainOptions::new(random.one_of(&Protection::ALL))
        .with_allocator(random.one_of(&[IovaAllocation::Cached, IovaAllocation::Classic]))
        .with_sanitizer(random.below(4) == 0);
    let bytes = options.with_granularity(MappingGranularity::Byte);
    if random.below(2) == 0 && bytes.check().is_ok() { bytes } else { options }
}

fn piece(random: &mut Random, options: DomainOptions) -> Piece {
    // A slot of a ring holds one run of physical memory, which is surely so within a page.
    let most = if matches!(options.protection, Protection::Ring(_)) { 4096 } else { 3 * 4096 };
    let size_bytes = 1 + random.below(most);
    let offset = if size_bytes > 4096 { random.below(4096) } else { random.below(4097 - size_bytes) };
    let direction = random.one_of(&[Direction::ToDevice, Direction::FromDevice, Direction::Bidirectional]);
    Piece { offset, size_bytes, direction }
}

impl Attack {
    pub(crate) fn of(seed: u64, tenant: u64, step: u64) -> Self {
        let mut random = Random::of(seed, &[tenant, ATTACK, step]);
        match random.below(13) {
            0 => Self::Scan { at: random.draw() },
            1 => Self::Storm { at: random.draw() },
            2 => Self::OthersAddresses,
            3 => Self::Translated { address_type: random.one_of(&[1, 2]) },
            4 => Self::ForgedMsi { at: random.draw() },
            5 => Self::Malformed { kind: random.one_of(&[3, 4, 5, 6, 77, 255]) },
            6 => Self::Broken { how: random.one_of(&[0, 1, 2, 3]) },
            7 => Self::Stale,
            8 => Self::OthersDevice,
            9 => Self::OthersSession,
            10 => Self::OthersThings,
            11 => Self::OverLimit,
            _ => Self::Hypercalls { count: usize::try_from(65 + random.below(60)).expect("small") },
        }
    }
}

/// What a tenant did last; told when its task panics.
#[derive(Debug)]
pub(crate) struct History {
    what: String,
    seed: u64,
    steps: std::collections::VecDeque<String>,
}

/// Steps that are kept.
const KEPT: usize = 16;

impl History {
    pub(crate) fn of(what: String, seed: u64) -> Self {
        Self { what, seed, steps: std::collections::VecDeque::new() }
    }
    pub(crate) fn begins(&mut self, step: u64, what: &impl std::fmt::Debug) {
        if self.steps.len() == KEPT {
            self.steps.pop_front();
        }
        self.steps.push_back(format!("{step}: {what:?}"));
    }
}

impl Drop for History {
    #[expect(clippy::print_stderr, reason = "the history is what explains a failure")]
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("seed {}, {}, the last of these failed: {:#?}", self.seed, self.what, self.steps);
        }
    }
}

#[test]
fn what_tenants_do_follows_from_the_seed() {
    let plan = |seed| {
        let steps = (0..2).flat_map(|tenant| (0..50).map(move |step| (tenant, step)));
        steps
            .map(|(tenant, step)| (Work::of(seed, tenant, step), Attack::of(seed, tenant, step)))
            .collect::<Vec<_>>()
    };
    assert_eq!(plan(1), plan(1));
    assert_ne!(plan(1), plan(2));
}
