//! What a case does: a mode with small parameters, and steps that a driver, its devices and time take.

use iommu_types::{
    BouncePool, Deferral, Direction, DomainOptions, IovaAllocation, MappingGranularity, PersistentQuota,
    Protection, Rings, SyncFor, WalkCachePolicy,
};
use proptest::prelude::*;
use proptest::sample::Index;

/// A part of a buffer; now and then it runs over its end.
#[derive(Clone, Debug)]
pub(crate) struct Part {
    pub(crate) buffer: Index,
    pub(crate) offset: u64,
    pub(crate) size_bytes: u64,
}

/// How a buffer is mapped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Manner {
    Single,
    SkipCpuSync,
    Resource,
    Coherent,
}

/// What is wrong with an unmap or a sync.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Wrong {
    Nothing,
    Size,
    Direction,
    Base,
    Function,
    /// It is about a mapping that is gone.
    Gone,
}

/// Where a DMA goes.
#[derive(Clone, Debug)]
pub(crate) enum Target {
    /// Into a mapping that is there, or beside it.
    Live(Index, i64),
    /// Into one that is gone, or beside it.
    Gone(Index, i64),
    /// Where the device's last one ended.
    Onward,
    /// To memory by the address that its owner knows it by.
    Memory(Index, u64),
    Anywhere(u64),
}

#[derive(Clone, Debug)]
pub(crate) struct Unmap {
    pub(crate) which: Index,
    pub(crate) wrong: Wrong,
    pub(crate) skips_sync: bool,
    pub(crate) ends_burst: bool,
    pub(crate) client: u8,
}

#[derive(Clone, Debug)]
pub(crate) struct Dma {
    pub(crate) device: usize,
    pub(crate) target: Target,
    pub(crate) size_bytes: usize,
    pub(crate) is_write: bool,
    pub(crate) fill: u8,
    /// Whether it began when `Begin` came last.
    pub(crate) began_before: bool,
}

#[derive(Clone, Debug)]
pub(crate) enum Step {
    Map {
        part: Part,
        direction: Direction,
        manner: Manner,
        ring: u16,
        client: u8,
    },
    MapSg {
        parts: Vec<Part>,
        direction: Direction,
        skips_sync: bool,
        ring: u16,
        client: u8,
    },
    Unmap(Unmap),
    UnmapBatch(Vec<Unmap>),
    UnmapSg(Unmap),
    Sync {
        which: Index,
        offset: u64,
        size_bytes: u64,
        target: SyncFor,
        wrong: Wrong,
    },
    Limits {
        mask_bits: u8,
        segment_bytes_max: u64,
        boundary_pages: u64,
    },
    Pass {
        ms: u64,
    },
    Reclaim,
    Finish {
        which: Index,
    },
    Allocate {
        pages: u64,
    },
    Free {
        which: Index,
        lets_go: bool,
    },
    Begin,
    /// A device uses a mapping, the driver unmaps it, the device uses it again.
    Attack {
        which: Index,
        device: usize,
        fill: u8,
        ends_burst: bool,
    },
    Dma(Dma),
    Cpu {
        which: Index,
        offset: u64,
        size_bytes: usize,
        fill: u8,
    },
}

pub(crate) const BOTH: Direction = Direction::Bidirectional;
pub(crate) const TO: Direction = Direction::ToDevice;
pub(crate) const FROM: Direction = Direction::FromDevice;

/// Every mode with parameters that are reached soon, each granularity that it has, both allocators.
pub(crate) fn any_options() -> impl Strategy<Value = DomainOptions> {
    let protection = prop_oneof![
        Just(Protection::Passthrough),
        Just(Protection::Strict),
        (1u32..9, 1u32..20)
            .prop_map(|(batch, interval_ms)| Protection::Deferred(Deferral { batch, interval_ms })),
        Just(Protection::Shared),
        (1u32..7).prop_map(|pages_max| Protection::Persistent(PersistentQuota { pages_max })),
        Just(Protection::Bounce(BouncePool { bytes_max: 1 << 20 })),
        (4u32..9).prop_map(|slots| Protection::Ring(Rings { count: 2, slots })),
    ];
    (protection, any::<bool>(), any::<bool>(), any::<bool>()).prop_map(
        |(protection, byte, classic, every)| {
            let allocator = if classic { IovaAllocation::Classic } else { IovaAllocation::Cached };
            let policy = if every { WalkCachePolicy::OnEveryUnmap } else { WalkCachePolicy::OnReclaim };
            let usual = DomainOptions::new(protection)
                .with_sanitizer(true)
                .with_allocator(allocator)
                .with_walk_cache(policy);
            let other = usual.with_granularity(MappingGranularity::Byte);
            if byte && other.check().is_ok() { other } else { usual }
        },
    )
}

fn any_direction() -> impl Strategy<Value = Direction> {
    prop_oneof![Just(BOTH), Just(TO), Just(FROM)]
}

fn any_part() -> impl Strategy<Value = Part> {
    // Pages and half pages, so that mappings are equal, meet and overlap often.
    let offset = prop_oneof![4 => (0u64..8).prop_map(|n| n * 2048), 1 => 0u64..12_000];
    let size =
        prop_oneof![3 => (1u64..5).prop_map(|n| n * 2048), 2 => 1u64..300, 2 => Just(4096), 1 => 1u64..9000];
    let part = |(buffer, offset, size_bytes): (Index, u64, u64)| Part { buffer, offset, size_bytes };
    let whole = any::<Index>().prop_map(|buffer| Part { buffer, offset: 0, size_bytes: u64::MAX });
    // Whole pages, so that elements of scatter-gather meet.
    let aligned = (any::<Index>(), (0u64..3).prop_map(|n| n * 4096), (1u64..3).prop_map(|n| n * 4096));
    prop_oneof![9 => (any::<Index>(), offset, size).prop_map(part), 3 => aligned.prop_map(part), 1 => whole]
}

fn any_unmap() -> impl Strategy<Value = Unmap> {
    let wrong = prop_oneof![
        12 => Just(Wrong::Nothing),
        1 => Just(Wrong::Size),
        1 => Just(Wrong::Direction),
        1 => Just(Wrong::Base),
        1 => Just(Wrong::Function),
        1 => Just(Wrong::Gone),
    ];
    let flag = || prop::bool::weighted(0.3);
    (any::<Index>(), wrong, flag(), flag(), 0u8..3).prop_map(
        |(which, wrong, skips_sync, ends_burst, client)| Unmap {
            which,
            wrong,
            skips_sync,
            ends_burst,
            client,
        },
    )
}

fn any_dma() -> impl Strategy<Value = Dma> {
    let skew = || prop_oneof![4 => Just(0i64), 2 => -100i64..5000, 1 => (-3i64..4).prop_map(|n| n * 4096)];
    let target = prop_oneof![
        8 => (any::<Index>(), skew()).prop_map(|(which, skew)| Target::Live(which, skew)),
        6 => (any::<Index>(), skew()).prop_map(|(which, skew)| Target::Gone(which, skew)),
        3 => Just(Target::Onward),
        1 => (any::<Index>(), 0u64..9000).prop_map(|(which, offset)| Target::Memory(which, offset)),
        1 => prop::sample::select(vec![0, 8, 0x1000, 0x10_0000, 1 << 32, 1 << 47, 1 << 48, 3 << 48, u64::MAX])
            .prop_map(Target::Anywhere),
    ];
    let size = prop_oneof![4 => 1usize..64, 2 => 1usize..3000, 1 => 3000usize..14_000];
    (0usize..2, target, size, any::<bool>(), any::<u8>(), prop::bool::weighted(0.2)).prop_map(
        |(device, target, size_bytes, is_write, fill, began_before)| Dma {
            device,
            target,
            size_bytes,
            is_write,
            fill,
            began_before,
        },
    )
}

fn any_map() -> impl Strategy<Value = Step> {
    let manner = prop_oneof![
        6 => Just(Manner::Single),
        1 => Just(Manner::SkipCpuSync),
        1 => Just(Manner::Resource),
        2 => Just(Manner::Coherent),
    ];
    let ring = || prop_oneof![8 => 0u16..2, 1 => 2u16..4];
    let single = (any_part(), any_direction(), manner, ring(), 0u8..3).prop_map(
        |(part, direction, manner, ring, client)| Step::Map { part, direction, manner, ring, client },
    );
    let parts = prop::collection::vec(any_part(), 0..5);
    let sg = (parts, any_direction(), prop::bool::weighted(0.2), ring(), 0u8..3).prop_map(
        |(parts, direction, skips_sync, ring, client)| Step::MapSg {
            parts,
            direction,
            skips_sync,
            ring,
            client,
        },
    );
    prop_oneof![3 => single, 1 => sg]
}

fn any_limits() -> impl Strategy<Value = Step> {
    let mask = prop_oneof![3 => Just(64u8), 1 => Just(32u8), 1 => 14u8..19];
    let longest = prop_oneof![2 => Just(u64::MAX), 1 => Just(4096u64), 1 => Just(8192u64), 1 => Just(0u64)];
    let boundary = prop_oneof![3 => Just(0u64), 1 => prop::sample::select(vec![1u64, 2, 4])];
    (mask, longest, boundary).prop_map(|(mask_bits, segment_bytes_max, boundary_pages)| Step::Limits {
        mask_bits,
        segment_bytes_max,
        boundary_pages,
    })
}

pub(crate) fn any_step() -> impl Strategy<Value = Step> {
    let sync_for = prop_oneof![Just(SyncFor::Cpu), Just(SyncFor::Device)];
    let wrong = prop_oneof![6 => Just(Wrong::Nothing), 1 => Just(Wrong::Direction), 1 => Just(Wrong::Gone)];
    let index = any::<Index>;
    let batch = prop::collection::vec(any_unmap(), 1..4);
    prop_oneof![
        20 => any_map(),
        12 => any_unmap().prop_map(Step::Unmap),
        3 => batch.prop_map(Step::UnmapBatch),
        4 => any_unmap().prop_map(Step::UnmapSg),
        5 => (index(), 0u64..6000, 1u64..6000, sync_for, wrong).prop_map(
            |(which, offset, size_bytes, target, wrong)|
                Step::Sync { which, offset, size_bytes, target, wrong }),
        2 => any_limits(),
        2 => (0u64..12).prop_map(|ms| Step::Pass { ms }),
        1 => Just(Step::Reclaim),
        8 => index().prop_map(|which| Step::Finish { which }),
        2 => (1u64..5).prop_map(|pages| Step::Allocate { pages }),
        2 => (index(), any::<bool>()).prop_map(|(which, lets_go)| Step::Free { which, lets_go }),
        2 => Just(Step::Begin),
        8 => (index(), 0usize..2, any::<u8>(), prop::bool::weighted(0.3)).prop_map(
            |(which, device, fill, ends_burst)| Step::Attack { which, device, fill, ends_burst }),
        22 => any_dma().prop_map(Step::Dma),
        4 => (index(), 0u64..9000, 1usize..3000, any::<u8>()).prop_map(
            |(which, offset, size_bytes, fill)| Step::Cpu { which, offset, size_bytes, fill }),
    ]
}
