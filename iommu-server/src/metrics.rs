//! What is counted, and how Prometheus reads it.
//!
//! The service counts its calls here; everything that the floors below count already is read from them at the moment of a scrape
//! (`HostCollector`), so that the hot path pays nothing for being observed.

use std::fmt::Write as _;
use std::sync::{Arc, Weak};
use std::time::Duration;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{
    DescriptorEncoder, EncodeLabelSet, EncodeLabelValue, EncodeMetric, LabelValueEncoder,
};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::{ConstCounter, Counter};
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::ConstGauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::{Registry, Unit};

use crate::host::Host;
use crate::host::domains::ModeCount;
use crate::host::reclaim::Reclaimed;
use crate::server::SERVICES;

/// Longest method name that is told apart.
const METHOD_BYTES_MAX: usize = 64;

/// The method of a call, as a label. Names that the schema cannot know are one label, so that a peer cannot make labels up.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Method(Option<String>);

impl Method {
    /// Of a request's path.
    pub fn of(path: &str) -> Self {
        let named = path.strip_prefix('/').and_then(|path| path.split_once('/'));
        let known = named.filter(|(service, method)| {
            (SERVICES.contains(service) || service.starts_with("grpc."))
                && method.len() <= METHOD_BYTES_MAX
                && iommu_proto_methods().any(|(of, name)| of == *service && name == *method)
        });
        Self(known.map(|(service, method)| format!("{service}/{method}")))
    }
    /// For people.
    pub fn name(&self) -> &str {
        self.0.as_deref().unwrap_or("unknown")
    }
}

impl EncodeLabelValue for Method {
    fn encode(&self, encoder: &mut LabelValueEncoder<'_>) -> Result<(), std::fmt::Error> {
        encoder.write_str(self.name())
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct CallLabels {
    method: Method,
    code: i32,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct MethodLabels {
    method: Method,
}

/// 50 microseconds to 6 seconds, each bucket three times the one before.
fn latency() -> Histogram {
    Histogram::new(prometheus_client::metrics::histogram::exponential_buckets(50e-6, 3.0, 12))
}

/// What the service counts itself.
#[derive(Debug)]
pub struct Metrics {
    calls: Family<CallLabels, Counter>,
    latencies: Family<MethodLabels, Histogram, fn() -> Histogram>,
    reclaims: Counter,
    reclaimed_mappings: Counter,
    reclaimed_domains: Counter,
    reclaimed_bytes: Counter,
    unix_peers_refused: Counter,
}

impl Default for Metrics {
    fn default() -> Self {
        Self {
            calls: Family::default(),
            latencies: Family::new_with_constructor(latency),
            reclaims: Counter::default(),
            reclaimed_mappings: Counter::default(),
            reclaimed_domains: Counter::default(),
            reclaimed_bytes: Counter::default(),
            unix_peers_refused: Counter::default(),
        }
    }
}

impl Metrics {
    /// A call ended.
    pub fn called(&self, method: &Method, code: i32, took: Duration) {
        self.calls.get_or_create(&CallLabels { method: method.clone(), code }).inc();
        self.latencies.get_or_create(&MethodLabels { method: method.clone() }).observe(took.as_secs_f64());
    }
    /// A peer on a UNIX socket was not let in.
    pub fn unix_peer_refused(&self) {
        self.unix_peers_refused.inc();
    }
    /// Something was taken back.
    pub fn reclaimed(&self, reclaimed: Reclaimed) {
        self.reclaims.inc();
        self.reclaimed_mappings.inc_by(reclaimed.mappings);
        self.reclaimed_domains.inc_by(reclaimed.domains);
        self.reclaimed_bytes.inc_by(reclaimed.memory_bytes);
    }
}

/// Everything that a scrape shows.
pub fn registry(host: &Arc<Host>) -> Registry {
    let mut registry = Registry::with_prefix("iommu");
    let metrics = &host.metrics;
    registry.register("calls", "Calls that ended, by method and gRPC code", metrics.calls.clone());
    registry.register_with_unit(
        "call_duration",
        "How long calls took, streams included",
        Unit::Seconds,
        metrics.latencies.clone(),
    );
    registry.register("reclaims", "Owners whose things were taken back", metrics.reclaims.clone());
    registry.register("reclaimed_mappings", "Mappings taken back", metrics.reclaimed_mappings.clone());
    registry.register("reclaimed_domains", "Domains taken back", metrics.reclaimed_domains.clone());
    registry.register_with_unit(
        "reclaimed_memory",
        "Memory taken back",
        Unit::Bytes,
        metrics.reclaimed_bytes.clone(),
    );
    let help = "Peers on UNIX sockets whose user may not connect";
    registry.register("unix_peers_refused", help, metrics.unix_peers_refused.clone());
    if let Some(tls) = &host.tls {
        tls.metrics.register(&mut registry);
    }
    registry.register_collector(Box::new(HostCollector { host: Arc::downgrade(host) }));
    registry
}

/// Reads the counters of the floors below when it is asked.
#[derive(Debug)]
struct HostCollector {
    /// Weak, because the registry outlives nothing but the admin port.
    host: Weak<Host>,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct CacheLabels {
    cache: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct DeviceLabels {
    device: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ModeLabels {
    mode: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ClassLabels {
    class: &'static str,
}

type Encoded = Result<(), std::fmt::Error>;

fn counter(encoder: &mut DescriptorEncoder<'_>, name: &str, help: &str, value: u64) -> Encoded {
    let encoder = encoder.encode_descriptor(name, help, None, MetricType::Counter)?;
    ConstCounter::new(value).encode(encoder)
}

fn gauge(encoder: &mut DescriptorEncoder<'_>, name: &str, help: &str, value: u64) -> Encoded {
    let encoder = encoder.encode_descriptor(name, help, None, MetricType::Gauge)?;
    ConstGauge::new(i64::try_from(value).unwrap_or(i64::MAX)).encode(encoder)
}

/// One counter with a value for each of `rows`.
fn counters<L: EncodeLabelSet>(
    encoder: &mut DescriptorEncoder<'_>,
    name: &str,
    help: &str,
    rows: impl IntoIterator<Item = (L, u64)>,
) -> Encoded {
    let mut encoder = encoder.encode_descriptor(name, help, None, MetricType::Counter)?;
    for (labels, value) in rows {
        ConstCounter::new(value).encode(encoder.encode_family(&labels)?)?;
    }
    Ok(())
}

impl HostCollector {
    fn unit(host: &Host, encoder: &mut DescriptorEncoder<'_>) -> Encoded {
        let unit = host.kernel.unit().counters();
        let caches = [
            ("iotlb", unit.iotlb),
            ("context", unit.context_cache),
            ("paging_structure", unit.paging_structure_cache),
        ];
        let of = |pick: fn(&iommu_hardware::vtd::CacheCounters) -> u64| {
            caches.map(|(cache, counters)| (CacheLabels { cache }, pick(&counters)))
        };
        counters(encoder, "cache_hits", "Lookups that found a usable entry", of(|c| c.hits))?;
        counters(encoder, "cache_misses", "Lookups that found none", of(|c| c.misses))?;
        counters(encoder, "cache_fills", "Entries filled", of(|c| c.fills))?;
        counters(encoder, "cache_evictions", "Entries displaced", of(|c| c.evictions))?;
        counters(
            encoder,
            "cache_outdated_fills",
            "Fills that an invalidation overtook",
            of(|c| c.outdated_fills),
        )?;
        counter(encoder, "walks", "Table walks begun", unit.walks)?;
        counter(encoder, "walk_reads", "Table entries read by walks", unit.walk_reads)?;
        counter(encoder, "invalidations", "Invalidations carried out", unit.invalidations)?;
        counter(encoder, "drains_waited", "Invalidations that waited for DMA in flight", unit.drains_waited)?;
        counter(encoder, "faults", "DMA refused by translation", unit.faults)?;
        counter(encoder, "faults_recorded", "Faults recorded", unit.faults_recorded)?;
        counter(
            encoder,
            "faults_collapsed",
            "Faults collapsed into a pending record",
            unit.faults_collapsed,
        )?;
        counter(encoder, "faults_overflowed", "Faults dropped by the full unit", unit.faults_overflowed)?;
        counter(encoder, "faults_suppressed", "Faults suppressed by FPD", unit.faults_suppressed)?;
        counter(encoder, "interrupts", "Interrupts remapped", unit.interrupts)?;
        let ring = unit.ring;
        counter(encoder, "ring_hits", "Ring translations answered by the entry of their ring", ring.hits)?;
        counter(
            encoder,
            "ring_promotions",
            "Ring translations answered by a prefetched entry",
            ring.promotions,
        )?;
        counter(encoder, "ring_walks", "Ring table walks begun", ring.walks)?;
        counter(encoder, "ring_walk_reads", "Ring table entries read by walks", ring.walk_reads)?;
        counter(encoder, "ring_prefetch_reads", "Ring table entries read ahead", ring.prefetch_reads)?;
        counter(encoder, "ring_invalidations", "Invalidations of a ring's entry", ring.invalidations)
    }
    /// What domains do, by protection mode: seven of them.
    fn modes(host: &Host, encoder: &mut DescriptorEncoder<'_>) -> Encoded {
        let counts = host.domains.mode_counts();
        let of = |pick: fn(&ModeCount) -> u64| -> Vec<_> {
            counts.iter().map(|(mode, count)| (ModeLabels { mode }, pick(count))).collect()
        };
        counters(
            encoder,
            "domain_invalidations",
            "Invalidations that domains asked for",
            of(|c| c.invalidations),
        )?;
        counters(encoder, "domain_flushes", "Of them flushes of deferred unmaps", of(|c| c.flushes))?;
        counters(encoder, "domain_evictions", "Kept pages that domains gave up", of(|c| c.evictions))?;
        counters(encoder, "domain_copied_bytes", "Bytes to and from shadow buffers", of(|c| c.copied_bytes))?;
        let reports = host.reports.counts();
        let rows = reports.iter().map(|(class, count)| (ClassLabels { class: class.name() }, *count));
        counters(encoder, "sanitizer_reports", "Reports of sanitizers, repeats included", rows)
    }
    fn devices(host: &Host, encoder: &mut DescriptorEncoder<'_>) -> Encoded {
        // Devices are bounded by the configuration and an operator, so their labels are too; machines' devices are left out.
        let devices: Vec<_> =
            host.devices.list().into_iter().filter(|device| device.address.segment == 0).collect();
        let of = |pick: fn(&crate::host::devices::BatchCount) -> u64| -> Vec<_> {
            devices
                .iter()
                .map(|device| {
                    (DeviceLabels { device: device.address.to_string() }, pick(&device.counters.read()))
                })
                .collect()
        };
        counters(encoder, "device_operations", "DMA operations that succeeded", of(|c| c.operations))?;
        counters(encoder, "device_transferred_bytes", "Bytes read and written", of(|c| c.bytes))?;
        counters(encoder, "device_faults", "DMA refused by translation", of(|c| c.faults))?;
        counters(encoder, "device_refusals", "DMA refused outside translation", of(|c| c.refusals))
    }
}

impl Collector for HostCollector {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Encoded {
        let Some(host) = self.host.upgrade() else { return Ok(()) };
        let encoder = &mut encoder;
        Self::unit(&host, encoder)?;
        Self::devices(&host, encoder)?;
        Self::modes(&host, encoder)?;
        gauge(encoder, "connections", "Connections", host.connections.open() as u64)?;
        gauge(
            encoder,
            "connections_anonymous",
            "Connections without identity",
            host.connections.anonymous() as u64,
        )?;
        if let Some(tls) = &host.tls {
            let left_s = tls.own_not_after_unix_s().saturating_sub(crate::telemetry::now_unix_ms() / 1000);
            gauge(
                encoder,
                "tls_certificate_left_seconds",
                "Until the server's own certificate expires",
                left_s,
            )?;
        }
        let sessions = host.watchdog.sessions().len() as u64;
        gauge(encoder, "device_sessions", "Device streams, ended ones included", sessions)?;
        gauge(encoder, "domains", "Domains", host.domains.count() as u64)?;
        gauge(encoder, "bare_machines", "Bare machines", host.machines.count() as u64)?;
        gauge(encoder, "memory_size_bytes", "Physical memory", host.kernel.memory().size_bytes())?;
        gauge(encoder, "memory_free_bytes", "Physical memory that is free", host.kernel.free_bytes())
    }
}

/// Every method of the schema, read from its descriptor.
fn iommu_proto_methods() -> impl Iterator<Item = (&'static str, &'static str)> {
    crate::server::methods().iter().map(|(service, method)| (service.as_str(), method.as_str()))
}
