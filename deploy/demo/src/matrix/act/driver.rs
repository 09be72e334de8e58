//! A driver, of the host or of a virtual machine: right or wrong, as it is told.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use anyhow::Context;
use guest_sdk::{
    Buffer, Connection, DeviceAddress, DeviceHandle, Direction, DmaMapping, DmaStream, Domain, Gpa, GpaRange,
    InterruptEvent, Iova, Owner, UnmapOptions,
};
use rogue::text::Hex;

use super::language::{Ask, Refused, Reply, Way};
use super::nonsense;

/// A session, and what was made in it.
pub(super) struct Driver {
    driver: guest_sdk::Driver,
    buffers: HashMap<u64, Buffer>,
    domains: HashMap<u64, Domain>,
    mappings: HashMap<u64, DmaMapping>,
    streams: HashMap<DeviceAddress, DmaStream>,
    interrupts: Arc<AtomicU64>,
}

fn direction(way: Way) -> Direction {
    match way {
        Way::ToDevice => Direction::ToDevice,
        Way::FromDevice => Direction::FromDevice,
        Way::Both => Direction::Bidirectional,
    }
}

fn range(gpa: u64, bytes: u64) -> Result<GpaRange, Refused> {
    GpaRange::new(Gpa::new(gpa), bytes).map_err(nonsense)
}

impl Driver {
    pub(super) async fn open(connection: Connection, name: &str, owner: Owner) -> anyhow::Result<Self> {
        let driver = connection.driver(name, owner).await.context("open a session as driver")?;
        let mut watch = driver.watch_interrupts().await.context("watch interrupts")?;
        let interrupts = Arc::new(AtomicU64::new(0));
        let counted = Arc::clone(&interrupts);
        tokio::spawn(async move {
            while let Some(Ok(event)) = watch.next().await {
                if let InterruptEvent::Raised(interrupt) = event {
                    counted.fetch_add(interrupt.count.into(), Ordering::Relaxed);
                }
            }
        });
        Ok(Self {
            driver,
            buffers: HashMap::new(),
            domains: HashMap::new(),
            mappings: HashMap::new(),
            streams: HashMap::new(),
            interrupts,
        })
    }

    fn device(&self, address: &str) -> Result<DeviceHandle, Refused> {
        Ok(self.driver.device(address.parse::<DeviceAddress>().map_err(nonsense)?))
    }

    pub(super) async fn obey(&mut self, ask: Ask) -> Result<Reply, Refused> {
        match ask {
            Ask::Allocate { bytes } => {
                let buffer = self.driver.allocate(bytes).await?;
                let gpa = buffer.gpa().get();
                self.buffers.insert(gpa, buffer);
                Ok(Reply::value(gpa))
            }
            Ask::Free { gpa } => {
                let buffer = self.buffers.remove(&gpa.0).ok_or_else(|| nonsense(gpa))?;
                if let Err((buffer, refused)) = buffer.free().await {
                    self.buffers.insert(gpa.0, buffer);
                    return Err(refused.into());
                }
                Ok(Reply::default())
            }
            Ask::Read { gpa, bytes } => {
                let read = self.driver.memory().read(Gpa::new(gpa.0), bytes).await?;
                Ok(Reply { bytes: Hex(read.to_vec()), ..Reply::default() })
            }
            Ask::Write { gpa, data } => {
                self.driver.memory().write(Gpa::new(gpa.0), data.0).await?;
                Ok(Reply::default())
            }
            Ask::Map { device, gpa, bytes, way } => {
                let device = self.device(&device)?;
                let mapping =
                    self.driver.dma_map_single(&device, range(gpa.0, bytes)?, direction(way)).await?;
                let iova = mapping.iova().get();
                self.remember(mapping);
                Ok(Reply::value(iova))
            }
            Ask::Unmap { device, iova, bytes, way, end_of_burst } => {
                self.unmap(&device, iova.0, bytes, way, end_of_burst).await
            }
            Ask::SyncForCpu { iova } => {
                self.mappings.get(&iova.0).ok_or_else(|| nonsense(iova))?.sync_for_cpu().await?;
                Ok(Reply::default())
            }
            Ask::Interrupts => Ok(Reply::value(self.interrupts.load(Ordering::Relaxed))),
            Ask::Interrupt { device } => {
                let vector = self.device(&device)?.allocate_interrupt().await?;
                Ok(Reply { value: vector.address.get(), further: vector.data.into(), ..Reply::default() })
            }
            Ask::Domain { column, device } => {
                self.domain(column.options().ok_or_else(|| nonsense(column))?, &device).await
            }
            Ask::RoomyDomain { column, device } => {
                self.domain(column.roomy().ok_or_else(|| nonsense(column))?, &device).await
            }
            Ask::Detach { device } => {
                self.device(&device)?.detach().await?;
                Ok(Reply::default())
            }
            Ask::Leave { device, domain } => {
                self.device(&device)?.attach_default().await?;
                self.destroy(domain).await
            }
            Ask::ExhaustMappings { device, gpa, at_most } => {
                let device = self.device(&device)?;
                for _ in 0..at_most {
                    let page = range(gpa.0, 4096)?;
                    let mapping = self.driver.dma_map_single(&device, page, Direction::FromDevice).await?;
                    mapping.leave_mapped();
                }
                Ok(Reply::value(at_most))
            }
            Ask::ExhaustDomains { column, at_most } => {
                let options = column.options().ok_or_else(|| nonsense(column))?;
                for _ in 0..at_most {
                    let domain = self.driver.create_domain(options).await?;
                    self.domains.insert(domain.id().get().into(), domain);
                }
                Ok(Reply::value(at_most))
            }
            other => Err(nonsense(other)),
        }
    }

    /// A mapping with the address of an earlier one takes its place: that one was unmapped behind its back, or is in another domain.
    fn remember(&mut self, mapping: DmaMapping) {
        if let Some(before) = self.mappings.insert(mapping.iova().get(), mapping) {
            before.leave_mapped();
        }
    }

    async fn domain(&mut self, options: guest_sdk::DomainOptions, device: &str) -> Result<Reply, Refused> {
        let domain = self.driver.create_domain(options).await?;
        let id = u64::from(domain.id().get());
        domain.attach(&self.device(device)?).await?;
        self.domains.insert(id, domain);
        Ok(Reply::value(id))
    }

    /// Destroys a domain. The mappings of all of them are forgotten with it: an attack has one that it maps in.
    async fn destroy(&mut self, domain: u64) -> Result<Reply, Refused> {
        let domain = self.domains.remove(&domain).ok_or_else(|| nonsense(domain))?;
        domain.destroy().await?;
        for (_, mapping) in self.mappings.drain() {
            mapping.leave_mapped();
        }
        Ok(Reply::default())
    }

    /// As a driver without types does it: by number, right or wrong.
    async fn unmap(
        &mut self,
        device: &str,
        iova: u64,
        bytes: u64,
        way: Way,
        end_of_burst: bool,
    ) -> Result<Reply, Refused> {
        let device = self.device(device)?;
        let driver = &self.driver;
        let stream = self.streams.entry(device.address()).or_insert_with(|| driver.dma_stream(&device));
        let options = if end_of_burst { UnmapOptions::default() } else { UnmapOptions::WITHIN_BURST };
        let ticket = stream.unmap_with(&[(Iova::new(iova), bytes)], direction(way), options).await?;
        for unmapped in ticket.await? {
            unmapped.map_err(guest_sdk::SdkError::Refused)?;
        }
        if let Some(mapping) = self.mappings.remove(&iova) {
            mapping.leave_mapped();
        }
        Ok(Reply::default())
    }
}
