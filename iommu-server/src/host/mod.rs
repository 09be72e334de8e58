//! The host: the kernel floor, and the registries around it.
//!
//! **Lock order:** topology, owner memory, domain, the watched domain of a device, sanitizer, logs of faults and reports. No lock is held across an await; what has to be quiet is awaited
//! in between. Registries hand out `Arc`s and keep their guards to themselves.

pub mod assignment;
pub mod devices;
pub mod dma;
pub mod domains;
pub mod faults;
pub mod hypercalls;
pub mod hypervisors;
mod limits;
pub mod memory;
pub mod owners;
pub mod placement;
pub mod rates;
pub mod reclaim;
pub mod sanitizer;
pub mod trim;
pub mod vm_memory;
pub mod vms;
mod wiping;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use iommu_hardware::cache::CacheGeometry;
use iommu_hardware::memory::{Backing, MemoryConfig, PhysicalMemory};
use iommu_hardware::vtd::UnitConfig;
use iommu_kernel::{DeviceEntry, Kernel, KernelConfig, OwnerEntry, OwnerLimits, Topology};
use iommu_proto::model::TenantLimits;
use iommu_types::errors::{DeclareError, InvalidField, LimitReached, UnknownOwner};
use iommu_types::{Capabilities, Identity, Owner, Role};
use parking_lot::{Mutex, RwLock};
use tokio::sync::Semaphore;
use tonic::Status;

use self::devices::{DeviceState, Devices, Home};
use self::domains::Domains;
use self::faults::FaultHub;
use self::hypervisors::Hypervisors;
use self::owners::{OwnerState, Owners};
use self::sanitizer::SanitizerHub;
use crate::bounds;
use crate::config::Config;
use crate::connection::{ConnectionHandle, Connections};
use crate::ending::{EndSignal, Ending};
use crate::machine::Machines;
use crate::metrics::Metrics;
use crate::session::watchdog::Watchdog;
use crate::tls::bootstrap::certificates;
use crate::tls::{Tls, TlsError};

/// Everything that the services share.
#[derive(Debug)]
pub struct Host {
    /// As configured.
    pub config: Config,
    /// Turns of those who wipe memory.
    wiping: Semaphore,
    /// Memory, unit, frames.
    pub kernel: Arc<Kernel>,
    /// Devices, owners, assignments.
    pub topology: RwLock<Topology>,
    /// Owners.
    pub owners: Owners,
    /// Hypervisors.
    pub hypervisors: Hypervisors,
    /// Devices.
    pub devices: Devices,
    /// Domains.
    pub domains: Domains,
    /// Number of the latest virtual machine. Locked inside of the topology.
    last_vm: Mutex<u32>,
    /// Bare machines and their clients.
    pub machines: Machines,
    /// Fault logs.
    pub faults: FaultHub,
    /// What sanitizers report.
    pub reports: Arc<SanitizerHub>,
    /// Looks after device streams.
    pub watchdog: Arc<Watchdog>,
    /// What is counted about the service itself.
    pub metrics: Arc<Metrics>,
    /// Certificates; none for a server that listens in plaintext, or on UNIX sockets alone.
    pub tls: Option<Arc<Tls>>,
    /// Connections.
    pub connections: Arc<Connections>,
    /// Ends when the server goes down.
    pub shutdown: EndSignal,
    /// When it started.
    pub started: Instant,
    /// Tells this run of the server from others, in resume tokens of fault logs.
    pub run_id: u64,
    anonymous_generation: AtomicU64,
}

/// Why the host did not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// Physical memory.
    #[error("physical memory: {0}")]
    Memory(#[from] iommu_hardware::memory::MemoryError),
    /// The kernel floor.
    #[error("boot: {0}")]
    Boot(#[from] iommu_kernel::BootError),
    /// Certificates.
    #[error(transparent)]
    Tls(#[from] TlsError),
    /// A declaration of the configuration.
    #[error("declaration: {0}")]
    Declare(#[from] DeclareError),
}

fn geometry(sets: u32) -> CacheGeometry {
    CacheGeometry { sets, ways: 4 }
}

fn kernel_config(config: &Config) -> KernelConfig {
    let unit = UnitConfig {
        capabilities: Capabilities::FULL,
        iotlb: geometry(bounds::IOTLB_SETS),
        context_cache: geometry(bounds::OTHER_CACHE_SETS),
        paging_structure_cache: geometry(bounds::OTHER_CACHE_SETS),
        iotlb_partitions: bounds::IOTLB_PARTITIONS,
        ports_max: bounds::DEVICE_PORTS_MAX,
        byte_extents: true,
    };
    KernelConfig {
        unit,
        domains_max: bounds::DOMAINS_MAX,
        owner: OwnerLimits {
            domains: bounds::DOMAINS_PER_OWNER_MAX,
            // Half of the mapping records, of which there is one per KiB, so that one owner cannot take them all (I7).
            mappings: bounds::MAPPINGS_PER_OWNER_MAX.min(config.memory_bytes / 2048),
            // An owner may map its memory many times over; what it costs is tables, and those are bounded by mappings.
            mapped_bytes: config.memory_bytes.saturating_mul(16),
            // Half of the host, so that one owner cannot take it all (I7).
            memory_bytes: config.memory_bytes / 2,
            interrupts: bounds::INTERRUPTS_PER_OWNER_MAX,
        },
        fault_records_per_owner: bounds::FAULT_RECORDS_PER_OWNER,
    }
}

impl Host {
    /// Makes memory, boots the kernel floor, and declares what the configuration says.
    pub async fn start(config: Config) -> Result<Arc<Self>, StartError> {
        let tls = config.pki.clone().map(|path| certificates(path, &config).map(Arc::new)).transpose()?;
        let backing = config.memory_file.clone().map_or(Backing::Memfd, Backing::File);
        let memory = PhysicalMemory::new(&MemoryConfig { size_bytes: config.memory_bytes, backing })?;
        let kernel = Kernel::boot(Arc::new(memory), kernel_config(&config))?;
        let (devices, drivers) = (config.devices.clone(), config.drivers.clone());
        let watchdog = Arc::new(Watchdog::new(config.stream_stalled));
        let reports = Arc::<SanitizerHub>::default();
        let host = Arc::new(Self {
            config,
            wiping: Semaphore::new(bounds::WIPING_MAX),
            kernel,
            topology: RwLock::new(Topology::new(bounds::DEVICES_MAX, bounds::OWNERS_MAX)),
            owners: Owners::default(),
            hypervisors: Hypervisors::default(),
            devices: Devices::default(),
            domains: Domains::new(Arc::clone(&reports)),
            last_vm: Mutex::default(),
            machines: Machines::default(),
            faults: FaultHub::default(),
            reports,
            watchdog,
            metrics: Arc::default(),
            tls,
            connections: Arc::default(),
            shutdown: EndSignal::new(),
            started: Instant::now(),
            run_id: crate::telemetry::now_unix_ms(),
            anonymous_generation: AtomicU64::new(0),
        });
        for driver in drivers {
            host.declare_owner(driver.owner, driver.name)?;
        }
        for device in devices {
            host.declare_device(DeviceEntry::new(device.address, device.name, device.owner)).await?;
        }
        Ok(host)
    }

    /// Declares an owner.
    pub fn declare_owner(&self, owner: Owner, name: String) -> Result<(), DeclareError> {
        {
            let mut topology = self.topology.write();
            topology.declare_owner(OwnerEntry { owner, name: name.clone() })?;
        }
        let account = self.kernel.account(owner);
        self.owners.insert(Arc::new(OwnerState::new(&self.kernel, account, name, TenantLimits::default())));
        Ok(())
    }

    /// Declares a device and, when it has an owner, attaches it to that owner's default domain.
    pub async fn declare_device(self: &Arc<Self>, entry: DeviceEntry) -> Result<(), DeclareError> {
        let (address, owner) = (entry.address, entry.owner);
        let owner_state = owner.map(|owner| self.owners.get(owner)).transpose()?;
        let device = Arc::new(DeviceState::new(address, entry.name.clone(), Home::Host));
        {
            let mut topology = self.topology.write();
            topology.declare_device(entry)?;
        }
        self.devices.insert(Arc::clone(&device));
        let Some(owner_state) = owner_state else { return Ok(()) };
        let attached = self.give(&device, &owner_state, None, placement::OPERATOR).await;
        if let Err(error) = attached {
            // Nothing is left of a declaration that failed.
            self.devices.remove(address);
            let _entry = self.topology.write().remove_device(address);
            return Err(declare_error(error, owner_state.owner));
        }
        Ok(())
    }

    /// Refuses a connection whose certificate has expired or was revoked since it was accepted, and that has not been ended yet.
    pub(crate) fn certificate_holds(&self, connection: &ConnectionHandle) -> Result<(), Status> {
        let now_unix_s = crate::telemetry::now_unix_ms() / 1000;
        let verdict = self.tls.as_ref().zip(connection.certificate());
        match verdict.and_then(|(tls, certificate)| tls.verdict(certificate, now_unix_s)) {
            Some(why) => Err(why.into_status()),
            None => Ok(()),
        }
    }

    /// A peer was declared: it gets a certificate, where the server can issue one.
    pub(crate) async fn peer_comes(&self, name: &str, role: Role) {
        if let Some(tls) = &self.tls {
            tls.comes(Identity { name: name.to_owned(), role }).await;
        }
    }

    /// A peer is no more: its certificates are revoked, where the server can.
    pub(crate) async fn peer_goes(&self, name: &str, role: Role) {
        if let Some(tls) = &self.tls {
            tls.goes(Identity { name: name.to_owned(), role }).await;
        }
    }

    /// Ends everything that has a stream: the server goes down.
    pub fn shut_down(&self) {
        self.shutdown.end(Ending::ShuttingDown);
        for owner in self.owners.list() {
            if let Some(session) = owner.seat.connected() {
                session.end.end(Ending::ShuttingDown);
            }
        }
        for hypervisor in self.hypervisors.list() {
            if let Some(session) = hypervisor.seat.connected() {
                session.end.end(Ending::ShuttingDown);
            }
        }
        for client in self.machines.clients() {
            if let Some(session) = client.seat.connected() {
                session.end.end(Ending::ShuttingDown);
            }
        }
        self.end_device_sessions();
    }

    /// Ends every session of a device.
    pub(crate) fn end_device_sessions(&self) {
        for session in self.watchdog.sessions() {
            session.end(Ending::ShuttingDown);
        }
    }

    /// Cuts every connection of a device session that is still there.
    pub(crate) fn cut_device_sessions(&self) {
        for session in self.watchdog.sessions() {
            session.cut();
        }
    }

    /// Counts sessions of those who hold nothing.
    pub(crate) fn next_anonymous_generation(&self) -> u64 {
        self.anonymous_generation.fetch_add(1, Ordering::Relaxed) + 1
    }
}

fn declare_error(error: iommu_types::errors::AttachError, owner: Owner) -> DeclareError {
    use iommu_types::errors::AttachError;
    match error {
        AttachError::LimitReached(limit) => limit.into(),
        AttachError::UnknownOwner(unknown) => unknown.into(),
        AttachError::OutOfMemory(_) => {
            LimitReached { limit: "physical_memory".to_owned(), allowed: 0 }.into()
        }
        AttachError::NotAssignable(_) | AttachError::GroupInUse(_) => {
            InvalidField { field: "owner".to_owned(), why: error.to_string() }.into()
        }
        AttachError::UnknownDevice(_) | AttachError::UnknownDomain(_) | AttachError::NotYours(_) => {
            UnknownOwner { owner }.into()
        }
    }
}
