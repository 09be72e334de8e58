//! Strict map and unmap in process: one pair, batches, and growth with live mappings and domains.

use std::hint::black_box;
use std::sync::Arc;
use std::time::{Duration, Instant};

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use iommu_hardware::cache::CacheGeometry;
use iommu_hardware::dma::{Run, Transfer};
use iommu_hardware::memory::{Backing, MemoryConfig, PhysicalMemory};
use iommu_hardware::vtd::{Port, UnitConfig};
use iommu_kernel::{
    DmaMap, DmaUnmap, Domain, Kernel, KernelConfig, OwnerAccount, OwnerLimits, OwnerMemory, PendingUnmap,
    Tick,
};
use iommu_types::{
    Capabilities, Direction, DomainOptions, GpaRange, IovaRange, Owner, Protection, RequestId, SourceId,
};

const PAGE: u64 = 4096;

struct Host {
    kernel: Arc<Kernel>,
    account: Arc<OwnerAccount>,
    memory: OwnerMemory,
    buffer: GpaRange,
}

impl Host {
    fn new() -> Self {
        let memory = MemoryConfig { size_bytes: 1 << 30, backing: Backing::Memfd };
        let memory = Arc::new(PhysicalMemory::new(&memory).expect("memory"));
        let geometry = |sets| CacheGeometry { sets, ways: 4 };
        let unit = UnitConfig {
            capabilities: Capabilities::FULL,
            iotlb: geometry(4096),
            context_cache: geometry(256),
            paging_structure_cache: geometry(256),
            iotlb_partitions: 1,
            ports_max: 1024,
            byte_extents: true,
        };
        let owner = OwnerLimits {
            domains: 1024,
            mappings: 1 << 21,
            mapped_bytes: 1 << 40,
            memory_bytes: 1 << 29,
            interrupts: 0,
        };
        let config = KernelConfig { unit, domains_max: 1024, owner, fault_records_per_owner: 16 };
        let kernel = Kernel::boot(memory, config).expect("boot");
        let account = kernel.account(Owner::Driver(0));
        let mut memory = OwnerMemory::new(&kernel, Arc::clone(&account));
        let buffer = memory.allocate(&kernel, 64 * PAGE).expect("memory");
        Self { kernel, account, memory, buffer }
    }
    /// A domain with a device that has used it, so that every drain looks at a slot.
    fn domain(&self, source: u16) -> (Domain, Port) {
        self.domain_with(source, DomainOptions::new(Protection::Strict))
    }
    fn domain_with(&self, source: u16, options: DomainOptions) -> (Domain, Port) {
        let mut domain = self.kernel.create_domain(&self.account, options).expect("domain");
        if domain.is_passthrough() {
            domain.open_direct(&self.kernel, &self.memory, self.buffer).expect("open");
        }
        let source = SourceId::new(source);
        self.kernel.attach(source, &mut domain).expect("attach");
        let mut port = self.kernel.unit().port(source).expect("port");
        let range = self.map(&mut domain, 0, PAGE);
        device_reads(&mut port, range);
        self.unmap(&mut domain, range);
        (domain, port)
    }
    fn map(&self, domain: &mut Domain, page: u64, size_bytes: u64) -> IovaRange {
        let gpa = self.buffer.base().checked_add(page * PAGE).expect("inside");
        let range = GpaRange::new(gpa, size_bytes).expect("range");
        let request = DmaMap::single(range, Direction::ToDevice, RequestId(1));
        let iova = domain.dma_map(&self.kernel, &self.memory, request, Tick(0)).expect("mapped");
        IovaRange::new(iova, size_bytes).expect("range")
    }
    fn unmap(&self, domain: &mut Domain, range: IovaRange) {
        let request = DmaUnmap::single(range, Direction::ToDevice, RequestId(2));
        let pending = domain.dma_unmap(&self.kernel, request, Tick(0)).expect("unmapped");
        self.finish(domain, pending);
    }
    fn finish(&self, domain: &mut Domain, pending: PendingUnmap) {
        let (drain, undone) = pending.split();
        let drained = drain.try_complete().expect("nothing is in flight");
        domain.finish_unmap(&self.kernel, undone, drained);
    }
}

fn device_reads(port: &mut Port, range: IovaRange) {
    let mut bytes = [0; 64];
    let done = Run::new(port).execute(range.base(), None, Transfer::Read(&mut bytes));
    black_box(done).expect("mapped");
}

/// A pair in each mode, as a driver with bursts of 200 does them: what waits for a flush or the end of a burst is paid for here too.
fn every_mode(c: &mut Criterion) {
    const BURST: u64 = 200;
    let host = Host::new();
    let mut group = c.benchmark_group("pair by mode");
    group.throughput(Throughput::Elements(BURST));
    for (source, protection) in (8..).zip(Protection::ALL) {
        let (mut domain, _port) = host.domain_with(source, DomainOptions::new(protection));
        let mut mapped = Vec::new();
        group.bench_function(BenchmarkId::from_parameter(protection.name()), |b| {
            b.iter(|| {
                mapped.extend((0..BURST).map(|n| host.map(&mut domain, n % 64, PAGE)));
                for (n, range) in (1..).zip(mapped.drain(..)) {
                    let single = DmaUnmap::single(range, Direction::ToDevice, RequestId(2));
                    let request = DmaUnmap { end_of_burst: n == BURST, ..single };
                    let pending = domain.dma_unmap(&host.kernel, request, Tick(0)).expect("unmapped");
                    host.finish(&mut domain, pending);
                }
            });
        });
        let mut requests = Vec::new();
        group.bench_function(BenchmarkId::new("batched", protection.name()), |b| {
            b.iter(|| {
                let unmap = |range| DmaUnmap::single(range, Direction::ToDevice, RequestId(2));
                requests.extend((0..BURST).map(|n| unmap(host.map(&mut domain, n % 64, PAGE))));
                let (results, pending) = domain.dma_unmap_batch(&host.kernel, &requests, Tick(0));
                assert!(results.iter().all(Result::is_ok), "the mappings are there");
                host.finish(&mut domain, pending);
                requests.clear();
            });
        });
    }
    group.finish();
}

fn one_pair(c: &mut Criterion) {
    let host = Host::new();
    let (mut domain, mut port) = host.domain(8);
    let mut group = c.benchmark_group("strict pair");
    for size_bytes in [64, 1500, PAGE, 16 * PAGE] {
        group.bench_function(BenchmarkId::from_parameter(size_bytes), |b| {
            b.iter(|| {
                let range = host.map(&mut domain, 0, size_bytes);
                host.unmap(&mut domain, black_box(range));
            });
        });
    }
    // As a device uses it: the translation is in the IOTLB when it is removed.
    group.bench_function("4096 with a DMA between", |b| {
        b.iter(|| {
            let range = host.map(&mut domain, 0, PAGE);
            device_reads(&mut port, range);
            host.unmap(&mut domain, range);
        });
    });
    group.finish();
}

fn batches(c: &mut Criterion) {
    let host = Host::new();
    let (mut domain, _port) = host.domain(8);
    let mut group = c.benchmark_group("batch");
    group.throughput(Throughput::Elements(64));
    group.bench_function("64 pairs", |b| {
        let mut requests = Vec::with_capacity(64);
        b.iter(|| {
            requests.clear();
            requests.extend((0..64).map(|page| {
                let range = host.map(&mut domain, page, PAGE);
                DmaUnmap::single(range, Direction::ToDevice, RequestId(2))
            }));
            let (results, pending) = domain.dma_unmap_batch(&host.kernel, &requests, Tick(0));
            assert!(results.iter().all(Result::is_ok));
            host.finish(&mut domain, pending);
        });
    });
    group.finish();
}

/// The oldest mapping goes and a new one comes, with so many live.
fn live_mappings(c: &mut Criterion) {
    let mut group = c.benchmark_group("live mappings");
    for live in [1_000, 100_000, 1_000_000] {
        let host = Host::new();
        let (mut domain, _port) = host.domain(8);
        let mut fifo: std::collections::VecDeque<IovaRange> =
            (0..live).map(|n| host.map(&mut domain, n % 64, PAGE)).collect();
        group.bench_function(BenchmarkId::from_parameter(live), |b| {
            b.iter(|| {
                let oldest = fifo.pop_front().expect("live");
                host.unmap(&mut domain, oldest);
                fifo.push_back(host.map(&mut domain, 0, PAGE));
            });
        });
    }
    group.finish();
}

fn domains(c: &mut Criterion) {
    let mut group = c.benchmark_group("domains");
    for count in [1u16, 1024] {
        let host = Host::new();
        let mut domains: Vec<_> = (0..count).map(|n| host.domain(n + 8)).collect();
        let mut next = 0;
        group.bench_function(BenchmarkId::from_parameter(count), |b| {
            b.iter(|| {
                let (domain, _port) = &mut domains[next];
                next = (next + 1) % usize::from(count);
                let range = host.map(domain, 0, PAGE);
                host.unmap(domain, range);
            });
        });
        // Runs of 64 pairs in one domain, as a stream of one tenant brings them.
        group.bench_function(BenchmarkId::new("runs of 64", count), |b| {
            b.iter_custom(|rounds| {
                let start = Instant::now();
                for round in 0..rounds {
                    if round.is_multiple_of(64) {
                        next = (next + 1) % usize::from(count);
                    }
                    let (domain, _port) = &mut domains[next];
                    let range = host.map(domain, 0, PAGE);
                    host.unmap(domain, range);
                }
                start.elapsed()
            });
        });
    }
    group.finish();
}

fn creation(c: &mut Criterion) {
    let mut group = c.benchmark_group("create and destroy");
    for existing in [1u16, 1000] {
        let host = Host::new();
        let _others: Vec<_> = (0..existing).map(|n| host.domain(n + 8)).collect();
        group.bench_function(BenchmarkId::from_parameter(existing), |b| {
            b.iter(|| {
                let created =
                    host.kernel.create_domain(&host.account, DomainOptions::new(Protection::Strict));
                let mut pending = host.kernel.destroy_domain(created.expect("domain"));
                let drained = pending.take_drain().wait_blocking();
                pending.finish(&host.kernel, drained);
            });
        });
    }
    group.finish();
}

fn settings() -> Criterion {
    Criterion::default()
        .warm_up_time(Duration::from_millis(500))
        .measurement_time(Duration::from_secs(2))
        .sample_size(20)
}

criterion_group! {
    name = benches;
    config = settings();
    targets = every_mode, one_pair, batches, live_mappings, domains, creation
}
criterion_main!(benches);
