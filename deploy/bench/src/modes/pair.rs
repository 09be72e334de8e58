//! What a map and unmap costs in every mode by itself: 200 maps, then one batch of 200 unmaps, which ends the burst.
//!
//! As among the general figures, 1,024 mappings stay while the pairs come and go; in a ring domain they have a ring of their own.

use anyhow::Context;
use iommu_hardware::vtd::Port;
use iommu_kernel::{DmaMap, DmaUnmap, Domain, Tick};
use iommu_types::{
    Direction, DomainOptions, GpaRange, IovaRange, PAGE_SIZE_BYTES, Protection, RequestId, Rings,
};

use crate::figure::{Figure, Target};
use crate::in_process::host::{Caches, Host, LARGE};
use crate::report::Report;
use crate::rounds::{all_in_turn, nanoseconds_each};
use crate::stand::Bench;

/// Mappings that stay.
const LIVE: u32 = 1024;
/// Pairs of a burst.
const BURST: u32 = 200;
const NOW: Tick = Tick(0);

/// The modes and the names of their figures.
const MODES: [(&str, Protection); 7] = [
    ("strict", Protection::Strict),
    ("deferred", Protection::DEFERRED),
    ("shared", Protection::Shared),
    ("persistent", Protection::PERSISTENT),
    ("bounce", Protection::BOUNCE),
    ("ring", Protection::Ring(Rings { count: 2, slots: LIVE })),
    ("passthrough", Protection::Passthrough),
];

/// A domain, what stays in it, and what comes and goes.
struct Pairs {
    host: Host,
    domain: Domain,
    _port: Port,
    pages: Vec<GpaRange>,
    /// Kept for its memory.
    requests: Vec<DmaUnmap>,
}

impl Pairs {
    fn new(protection: Protection) -> anyhow::Result<Self> {
        let mut host = Host::boot(256 << 20, Caches { iotlb: LARGE, paging: LARGE })?;
        let buffer = host.buffer(u64::from(LIVE + BURST) * PAGE_SIZE_BYTES)?;
        let mut domain = host.domain_of(DomainOptions::new(protection))?;
        if domain.is_passthrough() {
            domain.open_direct(&host.kernel, &host.memory, buffer).context("open a buffer")?;
        }
        let mut port = host.device(&mut domain)?;
        drop(port.burst());
        let page = |number: u32| {
            let base = buffer.base().checked_add(u64::from(number) * PAGE_SIZE_BYTES);
            GpaRange::new(base.expect("it lies in the buffer"), PAGE_SIZE_BYTES)
        };
        let staying = u16::from(matches!(protection, Protection::Ring(_)));
        for number in 0..LIVE {
            let single = DmaMap::single(page(number)?, Direction::FromDevice, RequestId(1));
            domain.dma_map(&host.kernel, &host.memory, DmaMap { ring: staying, ..single }, NOW)?;
        }
        let pages = (LIVE..LIVE + BURST).map(page).collect::<Result<_, _>>()?;
        Ok(Self { host, domain, _port: port, pages, requests: Vec::new() })
    }
    fn burst(&mut self) {
        let Self { host, domain, pages, requests, .. } = self;
        requests.clear();
        for &page in pages.iter() {
            let request = DmaMap::single(page, Direction::FromDevice, RequestId(1));
            let iova = domain.dma_map(&host.kernel, &host.memory, request, NOW).expect("there is room");
            let range = IovaRange::new(iova, PAGE_SIZE_BYTES).expect("what was mapped does not wrap");
            requests.push(DmaUnmap::single(range, Direction::FromDevice, RequestId(2)));
        }
        let (results, pending) = domain.dma_unmap_batch(&host.kernel, requests, NOW);
        assert!(results.iter().all(Result::is_ok), "the mappings are there");
        host.finish(domain, pending);
    }
}

/// A pair of each mode.
pub(crate) fn pair(bench: &mut Bench) -> anyhow::Result<Report> {
    let pairs = MODES.iter().map(|(_, protection)| Pairs::new(*protection));
    let mut pairs = pairs.collect::<Result<Vec<_>, _>>()?;
    let bursts = bench.plan.operations() / 8 / BURST;
    let times = all_in_turn(bench.plan.rounds_in_process(), &mut pairs, |pairs| {
        nanoseconds_each(bursts * BURST, |_| (0..bursts).for_each(|_| pairs.burst()))
    });
    let figure = |((name, _), time): (&(&str, _), _)| {
        let figure = Figure::alone(format!("modes-pair-{name}"), "ns", time);
        if *name == "ring" { figure.judged(Target::value_at_most(80.0)) } else { figure }
    };
    Ok(Report { figures: MODES.iter().zip(&times).map(figure).collect(), ..Report::default() })
}

#[cfg(test)]
mod tests {
    use super::{BURST, LIVE, MODES, Pairs};

    #[test]
    fn a_burst_of_pairs_leaves_what_stays() {
        for (name, protection) in MODES {
            let mut pairs = Pairs::new(protection).expect(name);
            (0..12).for_each(|_| pairs.burst());
            let counters = pairs.domain.counters();
            assert_eq!(counters.maps - counters.unmaps, expected_live(name, &counters), "{name}");
            assert_eq!(pairs.requests.len(), BURST as usize, "{name}");
        }
    }

    /// What stays, the direct map and the shadows included.
    fn expected_live(name: &str, counters: &iommu_kernel::DomainCounters) -> u64 {
        let open = match name {
            "passthrough" => 1,
            "bounce" => counters.shadow_bytes / iommu_types::PAGE_SIZE_BYTES,
            _ => 0,
        };
        u64::from(LIVE) + open
    }
}
