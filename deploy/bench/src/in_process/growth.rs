//! What a strict map and unmap costs when there is more: domains, live mappings.

use std::collections::VecDeque;

use iommu_hardware::vtd::Port;
use iommu_kernel::Domain;
use iommu_types::IovaRange;

use super::host::{Caches, Host, LARGE, Pages, map, unmap};
use crate::figure::{Figure, RatioOf, Target};
use crate::plot::{Chart, Line, Points, Scale};
use crate::report::Report;
use crate::rounds::{in_turn, nanoseconds_each};
use crate::samples::Samples;
use crate::stand::Bench;

/// Pairs that a driver does in its domain before the next one has its turn: a batch of the stream.
pub(crate) const TURN: u32 = 64;
/// Live mappings of each domain.
pub(crate) const LIVE_PER_DOMAIN: usize = 64;

/// From 1 to 1,024 domains, each with a device and live mappings; each has its turn of 64 pairs.
pub(crate) fn domains(bench: &mut Bench) -> anyhow::Result<Report> {
    grow(
        bench,
        Growth {
            name: "growth-domains".into(),
            title: "Strict map and unmap, by number of domains",
            x: "domains",
            quick: &[1, 1024],
            full: &[1, 16, 128, 1024],
            target: 1.25,
            reference_is: "the same with 1 domain",
        },
        |count| World::new(count, LIVE_PER_DOMAIN, 1 << 30),
    )
}

/// From 1 k to 1 M live mappings of one domain; the oldest goes, a new one comes.
pub(crate) fn mappings(bench: &mut Bench) -> anyhow::Result<Report> {
    grow(
        bench,
        Growth {
            name: "growth-mappings".into(),
            title: "Strict map and unmap, first in first out, by number of live mappings",
            x: "live mappings",
            quick: &[1000, 1_000_000],
            full: &[1000, 10_000, 100_000, 1_000_000],
            target: 1.5,
            reference_is: "the same with 1,000 live mappings",
        },
        |count| World::new(1, count, 2 << 30),
    )
}

/// What grows.
pub(crate) struct Growth {
    pub(crate) name: String,
    pub(crate) title: &'static str,
    pub(crate) x: &'static str,
    pub(crate) quick: &'static [usize],
    pub(crate) full: &'static [usize],
    pub(crate) target: f64,
    pub(crate) reference_is: &'static str,
}

/// What does map-and-unmap pairs at some size.
pub(crate) trait Pairs {
    /// So many, in turns of 64.
    fn pairs(&mut self, operations: u32);
}

fn grow<W: Pairs>(
    bench: &mut Bench,
    growth: Growth,
    world: impl Fn(usize) -> anyhow::Result<W>,
) -> anyhow::Result<Report> {
    let (figures, points) = grown(bench, &growth, world)?;
    let chart = Chart {
        file: growth.name,
        title: growth.title.into(),
        x: growth.x,
        y: "time per map and unmap (ns)",
        y_scale: Scale::Linear,
        lines: vec![Line { name: "map + unmap".into(), points, reference: false }],
    };
    Ok(Report { figures, charts: vec![chart], ..Report::default() })
}

/// A figure for each size beside the smallest, and the times by size.
pub(crate) fn grown<W: Pairs>(
    bench: &Bench,
    growth: &Growth,
    world: impl Fn(usize) -> anyhow::Result<W>,
) -> anyhow::Result<(Vec<Figure>, Points)> {
    let counts = bench.plan.pick(growth.quick, growth.full);
    let operations = bench.plan.operations() / 4;
    let (&smallest, larger) = counts.split_first().expect("a growth begins somewhere");
    let mut base = world(smallest)?;
    let (mut figures, mut points) = (Vec::new(), Vec::new());
    for (index, &count) in larger.iter().enumerate() {
        bench.progress.detail(&format!("{}: {count} {}", growth.name, growth.x));
        let mut grown = world(count)?;
        let (value, reference) = in_turn(
            bench.plan,
            || nanoseconds_each(operations, |n| grown.pairs(n)),
            || nanoseconds_each(operations, |n| base.pairs(n)),
        );
        if index == 0 {
            points.push((smallest as f64, reference.median()));
        }
        points.push((count as f64, value.median()));
        figures.push(figure(growth, count, &value, &reference));
    }
    Ok((figures, points))
}

fn figure(growth: &Growth, count: usize, value: &Samples, reference: &Samples) -> Figure {
    Figure::alone(format!("{}-{count}", growth.name), "ns", value)
        .beside(growth.reference_is, reference, RatioOf::ValueToReference)
        .judged(Target::ratio_at_most(growth.target))
}

/// A host with domains, each with live mappings.
struct World {
    host: Host,
    tenants: Vec<Tenant>,
    turn: usize,
}

struct Tenant {
    domain: Domain,
    pages: Pages,
    live: VecDeque<IovaRange>,
    _port: Port,
}

impl World {
    fn new(domains: usize, live: usize, memory_bytes: u64) -> anyhow::Result<Self> {
        let mut host = Host::boot(memory_bytes, Caches { iotlb: LARGE, paging: LARGE })?;
        let mut tenants = Vec::new();
        for _ in 0..domains {
            let pages = Pages::of(host.buffer(256 << 10)?);
            let mut domain = host.domain()?;
            let mut port = host.device(&mut domain)?;
            drop(port.burst());
            tenants.push(Tenant { domain, pages, live: VecDeque::with_capacity(live + 1), _port: port });
        }
        for tenant in &mut tenants {
            for _ in 0..live {
                let mapped = map(&host, &mut tenant.domain, &mut tenant.pages);
                tenant.live.push_back(mapped);
            }
        }
        Ok(Self { host, tenants, turn: 0 })
    }
}

impl Pairs for World {
    /// In turns: the oldest mapping goes, a new one comes.
    fn pairs(&mut self, operations: u32) {
        for _ in 0..operations / TURN {
            self.turn = (self.turn + 1) % self.tenants.len();
            let tenant = &mut self.tenants[self.turn];
            for _ in 0..TURN {
                let oldest = tenant.live.pop_front().expect("there are live mappings");
                unmap(&self.host, &mut tenant.domain, oldest);
                let mapped = map(&self.host, &mut tenant.domain, &mut tenant.pages);
                tenant.live.push_back(mapped);
            }
        }
    }
}
