//! What a map and unmap costs in every mode when there is more: domains, live mappings.
//!
//! Strict has its rows among the general ones; here stand the modes beside it, with the cached allocator. A pair is the oldest
//! mapping going and a new one coming, 64 in a domain before the next one has its turn.

use std::collections::VecDeque;

use anyhow::Context;
use iommu_hardware::vtd::Port;
use iommu_kernel::{DmaMap, DmaUnmap, Domain, Tick};
use iommu_types::{
    BouncePool, Direction, DomainOptions, Gpa, GpaRange, IovaRange, PAGE_SIZE_BYTES, PersistentQuota,
    Protection, RequestId, Rings,
};

use crate::in_process::growth::{Growth, LIVE_PER_DOMAIN, Pairs, TURN, grown};
use crate::in_process::host::{Caches, Host, LARGE};
use crate::plot::{Chart, Line, Scale};
use crate::report::Report;
use crate::stand::Bench;

/// 1 k: whole turns of every ring.
const THOUSAND: usize = 1 << 10;
/// 1 M, less the room that a ring of 65,536 slots keeps for what is unmapped and not yet invalidated.
const MILLION: usize = 976 << 10;
/// Bounce takes a page of shadow for the smallest mapping: a million would be 4 GiB.
const BOUNCE_LIVE_MAX: usize = 48 << 10;
/// Slots that a ring keeps for what waits for the end of a burst, and what is mapped meanwhile.
const SLOTS_APART: usize = TURN as usize;
/// Mappings that a ring holds at most; more take more rings.
const LIVE_PER_RING: usize = 61 << 10;
const NOW: Tick = Tick(0);

/// A mode that has rows here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mode {
    Deferred,
    Shared,
    Persistent,
    Bounce,
    Ring,
    Passthrough,
}

impl Mode {
    const ALL: [Self; 6] =
        [Self::Deferred, Self::Shared, Self::Persistent, Self::Bounce, Self::Ring, Self::Passthrough];

    const fn name(self) -> &'static str {
        match self {
            Self::Deferred => "deferred",
            Self::Shared => "shared",
            Self::Persistent => "persistent",
            Self::Bounce => "bounce",
            Self::Ring => "ring",
            Self::Passthrough => "passthrough",
        }
    }

    /// With room for so many live mappings, and the rings that they take.
    fn protection(self, live: usize) -> (Protection, u16) {
        let protection = match self {
            Self::Deferred => Protection::DEFERRED,
            Self::Shared => Protection::Shared,
            // Pages are kept that nobody uses, so that there is something to be reused; the quota is never reached.
            Self::Persistent => Protection::Persistent(PersistentQuota { pages_max: 1 << 20 }),
            Self::Bounce => Protection::Bounce(BouncePool { bytes_max: 1 << 30 }),
            Self::Ring => {
                let count = live.div_ceil(LIVE_PER_RING) as u16;
                let slots = (live / usize::from(count) + SLOTS_APART) as u32;
                return (Protection::Ring(Rings { count, slots }), count);
            }
            Self::Passthrough => Protection::Passthrough,
        };
        (protection, 1)
    }
}

/// A host with domains, each with live mappings.
struct World {
    host: Host,
    tenants: Vec<Tenant>,
    turn: usize,
}

struct Tenant {
    domain: Domain,
    rings: u16,
    /// Where buffers begin, how many there are, and the number of the next one.
    memory: (Gpa, u64, u64),
    stride_bytes: u64,
    turns: u64,
    live: VecDeque<GpaAndIova>,
    _port: Port,
}

type GpaAndIova = (GpaRange, IovaRange);

/// How large everything is.
#[derive(Clone, Copy, Debug)]
struct Extent {
    domains: usize,
    live: usize,
    stride_bytes: u64,
    memory_bytes: u64,
}

impl World {
    fn new(mode: Mode, extent: Extent) -> anyhow::Result<Self> {
        let mut host = Host::boot(extent.memory_bytes, Caches { iotlb: LARGE, paging: LARGE })?;
        let mut tenants = Vec::new();
        for _ in 0..extent.domains {
            tenants.push(Tenant::new(&mut host, mode, extent)?);
        }
        // Whole turns of every domain and every ring, so that what is live is spread evenly.
        for tenant in &mut tenants {
            while tenant.live.len() < extent.live {
                tenant.map_some(&host, TURN as usize);
            }
        }
        Ok(Self { host, tenants, turn: 0 })
    }
}

impl Pairs for World {
    fn pairs(&mut self, operations: u32) {
        for _ in 0..operations / TURN {
            self.turn = (self.turn + 1) % self.tenants.len();
            let tenant = &mut self.tenants[self.turn];
            tenant.unmap_some(&self.host, TURN as usize);
            tenant.map_some(&self.host, TURN as usize);
        }
    }
}

impl Tenant {
    fn new(host: &mut Host, mode: Mode, extent: Extent) -> anyhow::Result<Self> {
        let (protection, rings) = mode.protection(extent.live);
        let count = (extent.live + SLOTS_APART) as u64;
        let buffer = host.buffer(count * extent.stride_bytes)?;
        let mut domain = host.domain_of(DomainOptions::new(protection))?;
        if domain.is_passthrough() {
            domain.open_direct(&host.kernel, &host.memory, buffer).context("open a buffer")?;
        }
        let mut port = host.device(&mut domain)?;
        drop(port.burst());
        let memory = (buffer.base(), count, 0);
        let stride_bytes = extent.stride_bytes;
        Ok(Self { domain, rings, memory, stride_bytes, turns: 0, live: VecDeque::new(), _port: port })
    }
    /// Maps the next buffers, all into one ring; the next call takes the next ring.
    fn map_some(&mut self, host: &Host, many: usize) {
        let ring = (self.turns % u64::from(self.rings)) as u16;
        self.turns += 1;
        for _ in 0..many {
            let (base, count, next) = &mut self.memory;
            let at = base.checked_add(*next % *count * self.stride_bytes).expect("it lies in the buffer");
            *next += 1;
            let range = GpaRange::new(at, self.stride_bytes).expect("a buffer does not wrap");
            let request = DmaMap { ring, ..DmaMap::single(range, Direction::Bidirectional, RequestId(1)) };
            let mapped = self.domain.dma_map(&host.kernel, &host.memory, request, NOW);
            let iova = mapped.expect("there is room for what is measured");
            let iova = IovaRange::new(iova, self.stride_bytes).expect("what was mapped does not wrap");
            self.live.push_back((range, iova));
            assert!(
                self.domain.take_evicted().is_empty(),
                "the quota is larger than all that is ever mapped"
            );
        }
    }
    /// Unmaps the oldest, one by one, the last one as the end of the burst.
    fn unmap_some(&mut self, host: &Host, many: usize) {
        for left in (0..many).rev() {
            let (_, range) = self.live.pop_front().expect("something is live");
            let single = DmaUnmap::single(range, Direction::Bidirectional, RequestId(2));
            let request = DmaUnmap { end_of_burst: left == 0, ..single };
            let pending = self.domain.dma_unmap(&host.kernel, request, NOW).expect("the mapping is there");
            host.finish(&mut self.domain, pending);
        }
    }
}

/// From 1 to 1,024 domains.
pub(crate) fn domains(bench: &mut Bench) -> anyhow::Result<Report> {
    let growth = |mode: Mode| Growth {
        name: format!("modes-growth-domains-{}", mode.name()),
        title: "Map and unmap, by number of domains",
        x: "domains",
        quick: &[1, 1024],
        full: &[1, 16, 128, 1024],
        target: 1.25,
        reference_is: "the same with 1 domain",
    };
    each_mode(bench, "modes-growth-domains", growth, |mode, domains| {
        let (live, stride_bytes) = (LIVE_PER_DOMAIN, PAGE_SIZE_BYTES / 2);
        World::new(mode, Extent { domains, live, stride_bytes, memory_bytes: 3 << 30 })
    })
}

/// From 1 k to 1 M live mappings of one domain; of bounce to 48 k, of which each has a page of shadow.
pub(crate) fn mappings(bench: &mut Bench) -> anyhow::Result<Report> {
    let growth = |mode: Mode| {
        let (quick, full): (&'static [usize], &'static [usize]) = if mode == Mode::Bounce {
            (&[THOUSAND, BOUNCE_LIVE_MAX], &[THOUSAND, BOUNCE_LIVE_MAX])
        } else {
            (&[THOUSAND, MILLION], &[THOUSAND, 10 << 10, 100 << 10, MILLION])
        };
        Growth {
            name: format!("modes-growth-mappings-{}", mode.name()),
            title: "Map and unmap, first in first out, by live mappings",
            x: "live mappings",
            quick,
            full,
            target: 1.5,
            reference_is: "the same with 1,024 live mappings",
        }
    };
    each_mode(bench, "modes-growth-mappings", growth, |mode, live| {
        // Sixteen to a page, each at an address of its own: where addresses are the memory's, a million need no more than 256 MiB.
        World::new(mode, Extent { domains: 1, live, stride_bytes: 256, memory_bytes: 2 << 30 })
    })
}

fn each_mode(
    bench: &Bench,
    file: &str,
    growth: impl Fn(Mode) -> Growth,
    world: impl Fn(Mode, usize) -> anyhow::Result<World>,
) -> anyhow::Result<Report> {
    let mut report = Report::default();
    let mut lines = Vec::new();
    let (mut title, mut x) = ("", "");
    for mode in Mode::ALL {
        let growth = growth(mode);
        (title, x) = (growth.title, growth.x);
        if !bench.wanted.any_of(&growth.name) {
            continue;
        }
        let (figures, points) = grown(bench, &growth, |count| world(mode, count))?;
        report.figures.extend(figures);
        lines.push(Line { name: mode.name().into(), points, reference: false });
    }
    let y = "time per map and unmap (ns)";
    report.charts.push(Chart { file: file.into(), title: title.into(), x, y, y_scale: Scale::Linear, lines });
    Ok(report)
}

#[cfg(test)]
mod tests {
    use iommu_types::{DomainOptions, PAGE_SIZE_BYTES};

    use super::{BOUNCE_LIVE_MAX, Extent, MILLION, Mode, Pairs, THOUSAND, World};

    #[test]
    fn every_mode_takes_what_its_rows_ask_of_it() {
        for mode in Mode::ALL {
            let name = mode.name();
            let most = if mode == Mode::Bounce { BOUNCE_LIVE_MAX } else { MILLION };
            for live in [THOUSAND, most] {
                DomainOptions::new(mode.protection(live).0).check().expect(name);
            }
            let (domains, live) = (3, 256);
            let extent = Extent { domains, live, stride_bytes: PAGE_SIZE_BYTES / 2, memory_bytes: 32 << 20 };
            let mut world = World::new(mode, extent).expect(name);
            world.pairs(12 * 64);
            assert!(world.tenants.iter().all(|tenant| tenant.live.len() == live), "{name}");
        }
    }
}
