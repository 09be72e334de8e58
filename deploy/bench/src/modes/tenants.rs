//! Many tenants and one IOTLB, shared or cut into shares, with one tenant that thrashes it.
//!
//! As in HyperTRIO (ISCA'20) a packet takes three translations of pages that hardly change: a descriptor, a buffer, a completion. The aggressor
//! reads random pages, twice as many in a round as the IOTLB has entries. A tenant that is cut off from it keeps its hits (I7).

use std::collections::BTreeMap;

use anyhow::Context;
use iommu_hardware::cache::CacheGeometry;

use super::costs::Costs;
use crate::figure::{Figure, RatioOf, Target};
use crate::in_process::host::{Caches, Host, LARGE};
use crate::in_process::tenant::Tenant;
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

/// What the tenants had.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Outcome {
    /// IOTLB misses per packet, of each victim.
    misses: Vec<f64>,
    /// Of the aggressor; none while it is idle.
    aggressor_misses: Option<f64>,
}

impl Outcome {
    /// The part of the victims' translations that hit.
    pub(crate) fn hit_rate(&self) -> f64 {
        1.0 - self.misses.iter().sum::<f64>() / (self.misses.len() as u64 * PAGES_PER_PACKET) as f64
    }
    /// Jain's index of what is left to each tenant of the rate that it has by itself, the aggressor included: 1 is fair. The aggressor by
    /// itself has what `by_itself` says.
    pub(crate) fn fairness(&self, by_itself: f64, costs: &Costs) -> f64 {
        let victims =
            self.misses.iter().map(|misses| packet_cycles(0.0, costs) / packet_cycles(*misses, costs));
        let aggressor = self.aggressor_misses.iter();
        let aggressor =
            aggressor.map(|misses| packet_cycles(by_itself, costs) / packet_cycles(*misses, costs));
        let left: Vec<f64> = victims.chain(aggressor).collect();
        let (sum, squares) = (left.iter().sum::<f64>(), left.iter().map(|part| part * part).sum::<f64>());
        sum * sum / (left.len() as f64 * squares)
    }
    /// How many times longer a packet of the worst one takes than one without a miss.
    pub(crate) fn worst_slowdown(&self, costs: &Costs) -> f64 {
        let worst = self.misses.iter().copied().fold(0.0, f64::max);
        packet_cycles(worst, costs) / packet_cycles(0.0, costs)
    }
}

/// What a packet takes, modelled.
fn packet_cycles(misses: f64, costs: &Costs) -> f64 {
    costs.of("machine.base") + misses * costs.of("machine.iotlb_miss")
}

/// Tenants with a device each; the last one is the aggressor.
pub(crate) struct Tenants {
    host: Host,
    victims: Vec<Tenant>,
    aggressor: Tenant,
    random: Random,
}

impl Tenants {
    /// So many, the aggressor included: a power of two.
    pub(crate) fn new(tenants: u16, sharing: Sharing) -> anyhow::Result<Self> {
        let partitions = if sharing == Sharing::Partitioned { tenants } else { 1 };
        let caches = Caches { iotlb: IOTLB, paging: LARGE };
        let mut host = Host::boot_partitioned(256 << 20, caches, partitions)?;
        // Each owner gets the share with the fewest owners, so that each has one to itself.
        let mut all = Vec::new();
        for number in 0..tenants {
            let pages = if number + 1 == tenants { AGGRESSOR_PAGES } else { PAGES_PER_PACKET };
            all.push(Tenant::new(&mut host, number.into(), pages)?);
        }
        let aggressor = all.pop().context("there is a tenant")?;
        Ok(Self { host, victims: all, aggressor, random: Random::new(41) })
    }
    /// What the victims have in so many rounds: each a packet, and then the aggressor's turn if there is one.
    pub(crate) fn run(&mut self, rounds: u32, thrashes: bool) -> Outcome {
        let (mut misses, mut aggressor) = (vec![0; self.victims.len()], None);
        for round in 0..=rounds {
            for (victim, sum) in self.victims.iter_mut().zip(&mut misses) {
                let before = self.host.kernel.unit().counters().iotlb.misses;
                victim.read(0..PAGES_PER_PACKET);
                // The first round fills.
                if round > 0 {
                    *sum += self.host.kernel.unit().counters().iotlb.misses - before;
                }
            }
            if thrashes {
                let missed = self.thrash();
                aggressor = Some(aggressor.unwrap_or(0.0) + if round > 0 { missed } else { 0.0 });
            }
        }
        let each = |sum: u64| sum as f64 / f64::from(rounds);
        Outcome {
            misses: misses.into_iter().map(each).collect(),
            aggressor_misses: aggressor.map(|sum| sum / f64::from(rounds)),
        }
    }
    /// The aggressor's misses per packet when it has the whole IOTLB to itself.
    pub(crate) fn aggressor_by_itself(&mut self) -> f64 {
        self.thrash();
        self.thrash()
    }
    /// A turn of the aggressor; its misses per packet.
    fn thrash(&mut self) -> f64 {
        let before = self.host.kernel.unit().counters().iotlb.misses;
        let random = &mut self.random;
        self.aggressor.read((0..2 * ENTRIES).map(|_| random.below(AGGRESSOR_PAGES)));
        let missed = self.host.kernel.unit().counters().iotlb.misses - before;
        (missed * PAGES_PER_PACKET) as f64 / (2 * ENTRIES) as f64
    }
}

/// From few tenants to many.
pub(crate) fn tenants(bench: &mut Bench) -> anyhow::Result<Report> {
    let counts: &[u16] = bench.plan.pick(&[4, 64, 1024], &[4, 16, 64, 256, 1024]);
    let rounds = bench.plan.pick(4, 16);
    let by_itself = Tenants::new(4, Sharing::Shared)?.aggressor_by_itself();
    let mut report = Report::default();
    let mut lines = Vec::new();
    for sharing in [Sharing::Shared, Sharing::Partitioned] {
        let mut points = Vec::new();
        for &count in counts {
            bench.progress.detail(&format!("{count} tenants, {}", sharing.name()));
            let mut tenants = Tenants::new(count, sharing)?;
            let (alone, thrashed) = (tenants.run(rounds, false), tenants.run(rounds, true));
            points.push((f64::from(count), thrashed.hit_rate() * 100.0));
            let name = format!("modes-tenants-{}-{count}", sharing.name());
            report.figures.extend(figures(&bench.costs, &name, by_itself, &alone, &thrashed));
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

fn figures(costs: &Costs, name: &str, by_itself: f64, alone: &Outcome, thrashed: &Outcome) -> Vec<Figure> {
    let percent = |outcome: &Outcome| outcome.hit_rate() * 100.0;
    let fairness = thrashed.fairness(by_itself, costs);
    let counts = BTreeMap::from([("worst_slowdown", thrashed.worst_slowdown(costs))]);
    let hits = Figure::alone(name, "% hits, thrashed", &Samples::exactly(percent(thrashed)));
    let quiet = Samples::exactly(percent(alone));
    let hits = hits.beside("without the aggressor", &quiet, RatioOf::ValueToReference);
    let lost = Samples::exactly(percent(alone) - percent(thrashed));
    let lost = Figure::alone(format!("{name}-lost"), "% points of hits", &lost);
    let is_apart = name.contains(Sharing::Partitioned.name());
    vec![
        Figure { counts: Some(counts), ..hits },
        if is_apart { lost.judged(Target::value_at_most(1.0)) } else { lost },
        Figure::alone(format!("{name}-fairness"), "Jain's index", &Samples::exactly(fairness)),
    ]
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
    fn fairness_is_one_when_all_keep_the_same_part() {
        let costs = Costs::of_riommu_paper();
        let outcome = |misses: &[f64], aggressor_misses| Outcome { misses: misses.into(), aggressor_misses };
        let same = outcome(&[1.5; 7], None);
        assert!((same.fairness(2.0, &costs) - 1.0).abs() < 1e-12);
        let skewed = outcome(&[0.0, 0.0, 0.0, 3.0], None);
        assert!(skewed.fairness(2.0, &costs) < 0.95);
        assert!((skewed.worst_slowdown(&costs) - (1816.0 + 3.0 * 1532.0) / 1816.0).abs() < 1e-9);
        assert_eq!(skewed.hit_rate(), 0.75);
        // An aggressor that loses nothing while the others do.
        assert!(outcome(&[3.0; 3], Some(2.0)).fairness(2.0, &costs) < 0.8);
        assert!(outcome(&[0.0; 3], Some(2.0)).fairness(2.0, &costs) > 0.999);
    }
}
