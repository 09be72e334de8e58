//! The IOTLB itself: a lookup with its permission check, beside vm-memory's `Iotlb`.
//!
//! Random pages in a space of 2^36, so that neither side can merge neighbours; every key is there (checked before the clock
//! starts); room for twice as many entries, because a set-associative cache of random keys is never full evenly.

use std::hint::black_box;

use anyhow::ensure;
use iommu_hardware::cache::{CacheGeometry, Iotlb, IotlbEntry};
use iommu_hardware::drain::Drains;
use iommu_types::{Access, DomainId, Hpa, Iova, PageSize, Permissions};
use vm_memory::GuestAddress;
use vm_memory::iommu::Iotlb as ReferenceIotlb;

use crate::figure::{Figure, RatioOf, Target};
use crate::plot::{Chart, Line, Scale};
use crate::report::Report;
use crate::rounds::{Random, in_turn, nanoseconds_each};
use crate::samples::Samples;
use crate::stand::Bench;

const DOMAIN: DomainId = DomainId::new(1);
const PAGE: u64 = PageSize::Size4K.bytes();

/// Hits at growing numbers of mappings.
pub(crate) fn hits(bench: &mut Bench) -> anyhow::Result<Report> {
    let mut report = Report::default();
    let mut lines: [Vec<(f64, f64)>; 2] = Default::default();
    let counts: &[(usize, Option<f64>)] = bench.plan.pick(
        &[(1024, Some(5.0)), (16_384, Some(10.0))],
        &[(64, None), (256, None), (1024, Some(5.0)), (4096, None), (16_384, Some(10.0))],
    );
    for &(count, target) in counts {
        bench.progress.detail(&format!("{count} mappings"));
        let (ours, reference) = lookups(bench, count)?;
        lines[0].push((count as f64, ours.median()));
        lines[1].push((count as f64, reference.median()));
        let mut figure = Figure::alone(format!("iotlb-hit-{count}"), "ns", &ours).beside(
            "vm-memory Iotlb::lookup",
            &reference,
            RatioOf::ReferenceToValue,
        );
        if let Some(target) = target {
            figure = figure.judged(Target::ratio_at_least(target));
        }
        report.figures.push(figure);
    }
    let [ours, reference] = lines;
    report.charts.push(Chart {
        file: "iotlb-hit".into(),
        title: "IOTLB hit with permission check, random keys".into(),
        x: "mappings",
        y: "time per lookup (ns)",
        y_scale: Scale::Linear,
        lines: vec![
            Line { name: "ours".into(), points: ours, reference: false },
            Line { name: "vm-memory".into(), points: reference, reference: true },
        ],
    });
    Ok(report)
}

fn lookups(bench: &Bench, count: usize) -> anyhow::Result<(Samples, Samples)> {
    let mut random = Random::new(count as u64);
    let sets = u32::try_from(count * 2 / 4)?.next_power_of_two();
    let iotlb = Iotlb::new(CacheGeometry { sets, ways: 4 });
    let keys = filled(&iotlb, &mut random, count)?;
    let mut reference = ReferenceIotlb::new();
    for key in &keys {
        let to = GuestAddress(frame(*key).get());
        reference
            .set_mapping(GuestAddress(key.get()), to, PAGE as usize, vm_memory::Permissions::ReadWrite)
            .map_err(|error| anyhow::anyhow!("fill the reference: {error}"))?;
    }
    let order = random.draws(&keys, 1 << 15);
    let operations = bench.plan.operations();
    Ok(in_turn(
        bench.plan,
        || nanoseconds_each(operations, |n| look_up(&iotlb, &order, n)),
        || nanoseconds_each(operations, |n| look_up_reference(&reference, &order, n)),
    ))
}

/// Fills until `count` random pages are in the IOTLB together. A page that another one pushed out is replaced by a new one.
fn filled(iotlb: &Iotlb, random: &mut Random, count: usize) -> anyhow::Result<Vec<Iova>> {
    let drains: Drains = Drains::new(1);
    let generation = drains.generation(DOMAIN, drains.context_generation());
    let mut keys: Vec<Iova> = Vec::new();
    for _attempt in 0..100 {
        keys.retain(|&key| iotlb.lookup(DOMAIN, key).is_some());
        keys.sort_unstable();
        keys.dedup();
        if keys.len() == count {
            return Ok(keys);
        }
        while keys.len() < count {
            let key = Iova::new(random.below(1 << 36) * PAGE);
            let entry = IotlbEntry {
                domain_id: DOMAIN,
                iova: key,
                size: PageSize::Size4K,
                hpa: frame(key),
                permissions: Permissions::READ | Permissions::WRITE,
                extent: None,
            };
            iotlb.fill(&drains, generation, entry);
            keys.push(key);
        }
    }
    ensure!(false, "the IOTLB does not hold {count} random pages");
    Ok(keys)
}

/// Where a page leads to: anywhere, but not where a neighbour would be merged.
fn frame(key: Iova) -> Hpa {
    Hpa::new((key.get() / PAGE * 7919 % (1 << 30)) * PAGE)
}

fn look_up(iotlb: &Iotlb, order: &[Iova], operations: u32) {
    for &iova in order.iter().cycle().take(operations as usize) {
        let hit = iotlb.hit_whole_page(DOMAIN, black_box(iova), Access::Read);
        black_box(hit.expect("every key is there, and reading is allowed"));
    }
}

fn look_up_reference(iotlb: &ReferenceIotlb, order: &[Iova], operations: u32) {
    for &iova in order.iter().cycle().take(operations as usize) {
        let address = GuestAddress(black_box(iova).get());
        let found = ReferenceIotlb::lookup(iotlb, address, 64, vm_memory::Permissions::Read);
        let mut ranges = found.expect("every key is there");
        black_box(ranges.next().expect("a hit has a range").base);
    }
}
