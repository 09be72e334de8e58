//! Many tenants and one IOTLB, shared or cut into shares, with one tenant that thrashes it.
//!
//! As in HyperTRIO (ISCA'20) a packet takes three translations of pages that hardly change: a descriptor, a buffer, a completion. The aggressor
//! reads random pages, twice as many in a round as the IOTLB has entries. A tenant that is cut off from it keeps its hits (I7).

use std::collections::BTreeMap;

use anyhow::Context;
use iommu_hardware::cache::CacheGeometry;
use iommu_hardware::dma::{Run, Transfer};
use iommu_hardware::vtd::Port;
use iommu_kernel::{DmaMap, Domain, Tick};
use iommu_types::{Direction, DomainOptions, GpaRange, Iova, PAGE_SIZE_BYTES, Protection, RequestId};

use super::costs::Costs;
use crate::figure::{Figure, RatioOf, Target};
use crate::in_process::host::{Caches, Host, LARGE};
use crate::plot::{Chart, Line, Scale};
use crate::report::Report;
use crate::rounds::Random;
use crate::samples::Samples;
use crate::stand::Bench;

/// The IOTLB: 4,096 entries, of which 1,024 tenants have a set of four each.
const IOTLB: CacheGeometry = CacheGeometry { sets: 1024, ways: 4 };
const ENTRIES: u64 = 4096;
/// Translations of a packet.
const PAGES_PER_PACKET: u64 = 3;
/// Pages that the aggressor goes through.
const AGGRESSOR_PAGES: u64 = 4 * ENTRIES;

/// Whether each tenant has a share of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Sharing {
    /// All share everything.
    Shared,
    /// As many shares as tenants.
    Partitioned,
}

impl Sharing {
    const fn name(self) -> &'static str {
        match self {
            Self::Shared => "shared",
            Self::Partitioned => "partitioned",
        }
    }
}

/// What the victims had.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Outcome {
    /// IOTLB misses per packet, of each victim.
    misses: Vec<f64>,
}

impl Outcome {
    /// The part of the victims' translations that hit.
    pub(crate) fn hit_rate(&self) -> f64 {
        1.0 - self.misses.iter().sum::<f64>() / (self.misses.len() as u64 * PAGES_PER_PACKET) as f64
    }
    /// Packets per cycle of each, modelled.
    fn rates(&self, costs: &Costs) -> Vec<f64> {
        let cycles = |misses: &f64| costs.of("machine.base") + misses * costs.of("machine.iotlb_miss");
        self.misses.iter().map(|misses| 1.0 / cycles(misses)).collect()
    }
    /// Jain's index of their rates: 1 is fair.
    pub(crate) fn fairness(&self, costs: &Costs) -> f64 {
        let rates = self.rates(costs);
        let (sum, squares) = (rates.iter().sum::<f64>(), rates.iter().map(|rate| rate * rate).sum::<f64>());
        sum * sum / (rates.len() as f64 * squares)
    }
    /// How many times longer a packet of the worst one takes than one without a miss.
    pub(crate) fn worst_slowdown(&self, costs: &Costs) -> f64 {
        let worst = self.rates(costs).into_iter().fold(f64::INFINITY, f64::min);
        1.0 / worst / costs.of("machine.base")
    }
}

/// Tenants with a device each; the last one is the aggressor.
pub(crate) struct Tenants {
    host: Host,
    victims: Vec<Tenant>,
    aggressor: Tenant,
    random: Random,
}

struct Tenant {
    pages: Vec<Iova>,
    port: Port,
    _domain: Domain,
}

impl Tenants {
    /// So many, the aggressor included: a power of two.
    pub(crate) fn new(tenants: u16, sharing: Sharing) -> anyhow::Result<Self> {
        let partitions = if sharing == Sharing::Partitioned { tenants } else { 1 };
        let caches = Caches { iotlb: IOTLB, paging: LARGE };
        let mut host = Host::boot_partitioned(256 << 20, caches, partitions)?;
        let buffer = host.buffer(AGGRESSOR_PAGES * PAGE_SIZE_BYTES)?;
        // Numbers of domains are handed out in order, so that each has a share to itself.
        let mut all = Vec::new();
        for number in 0..tenants {
            let pages = if number + 1 == tenants { AGGRESSOR_PAGES } else { PAGES_PER_PACKET };
            all.push(Tenant::new(&mut host, buffer, pages)?);
        }
        let aggressor = all.pop().context("there is a tenant")?;
        Ok(Self { host, victims: all, aggressor, random: Random::new(41) })
    }
    /// What the victims have in so many rounds: each a packet, and then the aggressor's turn if there is one.
    pub(crate) fn run(&mut self, rounds: u32, thrashes: bool) -> Outcome {
        let mut misses = vec![0; self.victims.len()];
        for round in 0..=rounds {
            for (victim, sum) in self.victims.iter_mut().zip(&mut misses) {
                let before = self.host.kernel.unit().counters().iotlb.misses;
                victim.read((0..victim.pages.len()).map(|page| page as u64));
                // The first round fills.
                if round > 0 {
                    *sum += self.host.kernel.unit().counters().iotlb.misses - before;
                }
            }
            if thrashes {
                let random = &mut self.random;
                self.aggressor.read((0..2 * ENTRIES).map(|_| random.below(AGGRESSOR_PAGES)));
            }
        }
        Outcome { misses: misses.into_iter().map(|sum| sum as f64 / f64::from(rounds)).collect() }
    }
}

impl Tenant {
    fn new(host: &mut Host, buffer: GpaRange, pages: u64) -> anyhow::Result<Self> {
        let mut domain = host.domain_of(DomainOptions::new(Protection::Strict))?;
        let mut iovas = Vec::new();
        for page in 0..pages {
            let base = buffer.base().checked_add(page * PAGE_SIZE_BYTES).context("it lies in the buffer")?;
            let range = GpaRange::new(base, PAGE_SIZE_BYTES)?;
            let request = DmaMap::single(range, Direction::ToDevice, RequestId(1));
            iovas.push(domain.dma_map(&host.kernel, &host.memory, request, Tick(0))?);
        }
        let port = host.device(&mut domain)?;
        Ok(Self { pages: iovas, port, _domain: domain })
    }
    fn read(&mut self, pages: impl Iterator<Item = u64>) {
        let mut run = Run::new(&mut self.port);
        let mut word = [0; 8];
        for page in pages {
            let iova = self.pages[page as usize];
            run.execute(iova, None, Transfer::Read(&mut word)).expect("every page is mapped");
        }
    }
}

/// From few tenants to many.
pub(crate) fn tenants(bench: &mut Bench) -> anyhow::Result<Report> {
    let counts: &[u16] = bench.plan.pick(&[4, 64, 1024], &[4, 16, 64, 256, 1024]);
    let rounds = bench.plan.pick(4, 16);
    let mut report = Report::default();
    let mut lines = Vec::new();
    for sharing in [Sharing::Shared, Sharing::Partitioned] {
        let mut points = Vec::new();
        for &count in counts {
            bench.progress.detail(&format!("{count} tenants, {}", sharing.name()));
            let mut tenants = Tenants::new(count, sharing)?;
            let (alone, thrashed) = (tenants.run(rounds, false), tenants.run(rounds, true));
            points.push((f64::from(count), thrashed.hit_rate() * 100.0));
            report.figures.extend(figures(bench, sharing, count, &alone, &thrashed));
        }
        lines.push(Line { name: sharing.name().into(), points, reference: false });
    }
    report.charts.push(Chart {
        file: "modes-tenants".into(),
        title: "Hit rate of the victims while one tenant thrashes, 4,096 entries".into(),
        x: "tenants",
        y: "hits (%)",
        y_scale: Scale::Linear,
        lines,
    });
    Ok(report)
}

fn figures(bench: &Bench, sharing: Sharing, count: u16, alone: &Outcome, thrashed: &Outcome) -> Vec<Figure> {
    let percent = |outcome: &Outcome| outcome.hit_rate() * 100.0;
    let name = format!("modes-tenants-{}-{count}", sharing.name());
    let hits = Figure::alone(&name, "% hits, thrashed", &Samples::exactly(percent(thrashed)));
    let quiet = Samples::exactly(percent(alone));
    let hits = hits.beside("without the aggressor", &quiet, RatioOf::ValueToReference);
    let costs = &bench.costs;
    let counts = BTreeMap::from([
        ("fairness", thrashed.fairness(costs)),
        ("fairness_without_aggressor", alone.fairness(costs)),
        ("worst_slowdown", thrashed.worst_slowdown(costs)),
    ]);
    let hits = Figure { counts: Some(counts), ..hits };
    let fairness = Figure::alone(
        format!("{name}-fairness"),
        "Jain's index, modelled",
        &Samples::exactly(thrashed.fairness(costs)),
    );
    let lost = Samples::exactly(percent(alone) - percent(thrashed));
    let lost = Figure::alone(format!("{name}-lost"), "% points of hits", &lost);
    let lost = if sharing == Sharing::Partitioned { lost.judged(Target::value_at_most(1.0)) } else { lost };
    vec![hits, lost, fairness]
}

#[cfg(test)]
mod tests {
    use super::{Outcome, Sharing, Tenants};
    use crate::modes::costs::Costs;

    #[test]
    fn i7_a_share_of_its_own_keeps_a_tenants_hits() {
        for count in [4, 32] {
            let mut shared = Tenants::new(count, Sharing::Shared).expect("tenants");
            let mut apart = Tenants::new(count, Sharing::Partitioned).expect("tenants");
            assert_eq!(shared.run(2, false).hit_rate(), 1.0, "{count}: nobody disturbs");
            assert!(
                shared.run(3, true).hit_rate() < 0.5,
                "{count}: the aggressor pushes out the others' pages"
            );
            let (alone, thrashed) = (apart.run(3, false).hit_rate(), apart.run(3, true).hit_rate());
            assert!(alone - thrashed <= 0.01 && thrashed > 0.99, "{count}: {alone} {thrashed}");
        }
    }

    #[test]
    fn fairness_is_one_when_all_have_the_same() {
        let costs = Costs::of_riommu_paper();
        let same = Outcome { misses: vec![1.5; 7] };
        assert!((same.fairness(&costs) - 1.0).abs() < 1e-12);
        let skewed = Outcome { misses: vec![0.0, 0.0, 0.0, 3.0] };
        assert!(skewed.fairness(&costs) < 0.95);
        assert!((skewed.worst_slowdown(&costs) - (1816.0 + 3.0 * 1532.0) / 1816.0).abs() < 1e-9);
        assert_eq!(skewed.hit_rate(), 0.75);
    }
}
