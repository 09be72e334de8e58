//! The hits of a tenant beside a neighbour who thrashes the IOTLB, in the geometry and with the partitions that the server has.
//!
//! Each owner gets the partition with the fewest owners. The victim goes through a quarter of what its partition holds, which it can keep; the neighbour
//! reads random pages of four times as many as the whole IOTLB has entries.

use anyhow::ensure;
use iommu_hardware::cache::CacheGeometry;
use iommu_server::bounds;

use crate::figure::{Figure, RatioOf, Target};
use crate::in_process::host::{Caches, Host, LARGE};
use crate::in_process::tenant::Tenant;
use crate::report::Report;
use crate::rounds::Random;
use crate::samples::Samples;
use crate::stand::Bench;

const IOTLB: CacheGeometry = CacheGeometry { sets: bounds::IOTLB_SETS, ways: 4 };
const ENTRIES: u64 = bounds::IOTLB_SETS as u64 * 4;
const VICTIM_PAGES: u64 = ENTRIES / bounds::IOTLB_PARTITIONS as u64 / 4;
const NEIGHBOUR_PAGES: u64 = 4 * ENTRIES;

/// Percent of the victim's lookups that hit, by itself and beside a neighbour who thrashes.
fn hits(host: &Host, victim: &mut Tenant, neighbour: Option<&mut Tenant>, rounds: u64) -> f64 {
    let mut random = Random::new(43);
    let mut missed = 0;
    let mut neighbour = neighbour;
    // The first round fills.
    for round in 0..=rounds {
        let before = host.kernel.unit().counters().iotlb.misses;
        victim.read(0..VICTIM_PAGES);
        if round > 0 {
            missed += host.kernel.unit().counters().iotlb.misses - before;
        }
        if let Some(neighbour) = &mut neighbour {
            neighbour.read((0..ENTRIES).map(|_| random.below(NEIGHBOUR_PAGES)));
        }
    }
    100.0 * (1.0 - missed as f64 / (rounds * VICTIM_PAGES) as f64)
}

/// The victim's hits with 2 owners and with as many as there are partitions.
pub(crate) fn thrashed(bench: &mut Bench) -> anyhow::Result<Report> {
    let rounds = bench.plan.pick(2, 8);
    let mut report = Report::default();
    let counts: &[u16] = bench.plan.pick(&[2], &[2, bounds::IOTLB_PARTITIONS]);
    for &count in counts {
        let caches = Caches { iotlb: IOTLB, paging: LARGE };
        let mut host = Host::boot_partitioned(1 << 30, caches, bounds::IOTLB_PARTITIONS)?;
        let mut victim = Tenant::new(&mut host, 1, VICTIM_PAGES)?;
        let _others: Vec<Tenant> = (3..=u32::from(count))
            .map(|number| Tenant::new(&mut host, number, 1))
            .collect::<Result<_, _>>()?;
        let mut neighbour = Tenant::new(&mut host, 2, NEIGHBOUR_PAGES)?;
        let alone = hits(&host, &mut victim, None, rounds);
        let beside = hits(&host, &mut victim, Some(&mut neighbour), rounds);
        ensure!(alone > 50.0, "the victim by itself hits {alone:.1} % only");
        let name = format!("tenants-iotlb-{count}");
        let hits = Figure::alone(&name, "% hits, thrashed", &Samples::exactly(beside));
        let quiet = Samples::exactly(alone);
        report.figures.push(hits.beside("without the neighbour", &quiet, RatioOf::ValueToReference));
        let lost =
            Figure::alone(format!("{name}-lost"), "% points of hits", &Samples::exactly(alone - beside));
        report.figures.push(lost.judged(Target::value_at_most(1.0)));
    }
    Ok(report)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn i7_a_neighbour_that_thrashes_takes_no_hit_of_a_tenant_of_another_partition() {
        for (partitions, is_kept) in [(bounds::IOTLB_PARTITIONS, true), (1, false)] {
            let caches = Caches { iotlb: IOTLB, paging: LARGE };
            let mut host = Host::boot_partitioned(1 << 30, caches, partitions).expect("a host");
            let mut victim = Tenant::new(&mut host, 1, VICTIM_PAGES).expect("a tenant");
            let mut neighbour = Tenant::new(&mut host, 2, NEIGHBOUR_PAGES).expect("a tenant");
            let beside = hits(&host, &mut victim, Some(&mut neighbour), 2);
            assert_eq!(beside > 99.0, is_kept, "{partitions} partitions: {beside} % hits");
        }
    }
}
