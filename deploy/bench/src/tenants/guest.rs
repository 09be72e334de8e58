//! A guest: packets through a device of its own or through the hypervisor's, and what the measurement asks of its driver.

use std::collections::BTreeMap;
use std::time::Instant;

use anyhow::{Context, bail, ensure};
use bytes::BytesMut;
use dma_engine::registers::*;
use dma_engine::ring::{COMPLETION_DONE, COMPLETION_ERROR, DESCRIPTOR_BYTES, Descriptor};
use guest_sdk::multiplexer::{Ended, MultiplexedDevice};
use guest_sdk::{
    Buffer, Connection, DeviceHandle, Direction, DmaStream, Domain, Driver, FaultFilter, GpaRange,
    InterruptEvent, Iova, MapOptions, MsiVector, Never, Subscription,
};

use super::actor::Options;
use super::flood;
use super::words::{Ask, BATCH, Mode, Told, Work};

/// Each packet has a page to itself, whatever its size.
const STRIDE_BYTES: u64 = 4096;
/// Descriptors of the engine's ring: a batch fills one half.
const DESCRIPTORS: u32 = 2 * BATCH;
/// Where packets are mapped in a ring domain; the descriptors are on ring 0.
const PACKET_RING: u16 = 1;

/// A guest with its session, and its device if it has been asked to use it.
pub(super) struct Guest {
    server: String,
    name: String,
    driver: Driver,
    device: DeviceHandle,
    packets: Buffer,
    direct: Option<Direct>,
    multiplexed: MultiplexedDevice,
}

/// The engine's interrupt, and a domain for each mode.
struct Direct {
    interrupts: Subscription<InterruptEvent, Never>,
    vector: MsiVector,
    ring: Buffer,
    domains: BTreeMap<Mode, (Domain, Iova)>,
    stream: DmaStream,
}

impl Guest {
    pub(super) async fn start(options: &Options) -> anyhow::Result<Self> {
        let owner = options.owner.context("--owner says which machine it is")?;
        let driver = Connection::to(&options.server).driver(&options.name, owner).await;
        let driver = driver.context("open a session as driver")?;
        let device = driver.device(options.device.context("--device says which is its own")?);
        let packets = driver.allocate(u64::from(BATCH) * STRIDE_BYTES).await.context("allocate packets")?;
        let multiplexed = MultiplexedDevice::new(&driver);
        let (server, name) = (options.server.clone(), options.name.clone());
        Ok(Self { server, name, driver, device, packets, direct: None, multiplexed })
    }

    pub(super) async fn answer(&mut self, ask: Ask) -> anyhow::Result<Told> {
        match ask {
            Ask::Direct { mode, work } => self.receive_directly(mode, work).await,
            Ask::Multiplexed { work } => self.receive_multiplexed(work).await,
            Ask::Map { size_bytes } => {
                let buffer = self.driver.allocate(size_bytes).await.context("allocate a buffer")?;
                let direction = Direction::Bidirectional;
                let mapping = self.driver.dma_map_single(&self.device, buffer.range(), direction).await;
                Ok(Told::Mapped { iova: mapping.context("map a buffer")?.leave_mapped().get() })
            }
            Ask::Faults { after } => self.faults(after).await,
            Ask::Requests(asked) => {
                let Self { server, name, driver, device, packets, .. } = self;
                Ok(Told::Requests(flood::run(server, name, driver, device, packets, asked).await?))
            }
            other => bail!("a guest does not do {other:?}"),
        }
    }

    /// What was recorded after a place in its log, which is the beginning of it when nothing is told.
    async fn faults(&self, after: String) -> anyhow::Result<Told> {
        let filter = FaultFilter { owner: None, device: None };
        let list = self.driver.faults().list(filter, 0).await.context("list faults")?;
        let sequence: u64 = match after.as_str() {
            "" => 0,
            place => place.parse().with_context(|| format!("{place:?} is no place in a log"))?,
        };
        let new = list.records.iter().filter(|record| record.sequence > sequence);
        let recorded = new.map(|record| 1 + u64::from(record.collapsed_count)).sum();
        let end = list.records.last().map_or(sequence, |record| record.sequence);
        let first = list.records.first().map_or(sequence + 1, |record| record.sequence);
        Ok(Told::Faults { recorded, missed: first.saturating_sub(sequence + 1), end: end.to_string() })
    }

    fn slices(&self, packet_bytes: u32) -> anyhow::Result<Vec<GpaRange>> {
        let slice = |index| self.packets.slice(index * STRIDE_BYTES, packet_bytes.into());
        (0..u64::from(BATCH)).map(|index| slice(index).map_err(Into::into)).collect()
    }

    async fn receive_multiplexed(&self, work: Work) -> anyhow::Result<Told> {
        let buffers = self.slices(work.packet_bytes)?;
        let (mut packets, begun) = (0, Instant::now());
        while begun.elapsed() < work.duration() {
            let ended = self.multiplexed.receive(&buffers).await.context("receive a batch")?;
            let done = Ended::Done { bytes: work.packet_bytes };
            ensure!(ended.iter().all(|ended| *ended == done), "a packet ended so: {:?}", ended.first());
            packets += u64::from(BATCH);
        }
        // The multiplexer says what it copied.
        Ok(Told::Packets { packets, copied_bytes: 0, seconds: begun.elapsed().as_secs_f64() })
    }

    async fn receive_directly(&mut self, mode: Mode, work: Work) -> anyhow::Result<Told> {
        let buffers = self.slices(work.packet_bytes)?;
        if self.direct.is_none() {
            self.direct = Some(Direct::start(&self.driver, &self.device).await?);
        }
        let Some(direct) = &mut self.direct else { bail!("it was just made") };
        let domain = direct.enter(&self.driver, &self.device, mode).await?;
        direct.program(&self.device, domain, mode, work.packet_bytes).await?;
        let copied = copied_bytes(&self.driver).await?;
        let (mut packets, mut at, begun) = (0, 0, Instant::now());
        while begun.elapsed() < work.duration() {
            direct.batch(&self.device, mode, &buffers, at).await?;
            at = (at + BATCH) % DESCRIPTORS;
            packets += u64::from(BATCH);
        }
        let seconds = begun.elapsed().as_secs_f64();
        self.device.write32(RING_CONTROL, 0).await?;
        let copied_bytes = copied_bytes(&self.driver).await? - copied;
        Ok(Told::Packets { packets, copied_bytes, seconds })
    }
}

/// What the server has copied to and from shadows of this guest's domains.
async fn copied_bytes(driver: &Driver) -> anyhow::Result<u64> {
    let domains = driver.inspect().domains(Some(driver.owner())).await.context("list domains")?;
    Ok(domains.iter().map(|domain| domain.copied_bytes).sum())
}

impl Direct {
    async fn start(driver: &Driver, device: &DeviceHandle) -> anyhow::Result<Self> {
        let interrupts = driver.watch_interrupts().await.context("watch interrupts")?;
        let vector = device.allocate_interrupt().await.context("allocate an interrupt")?;
        let ring = driver.allocate(u64::from(DESCRIPTORS * DESCRIPTOR_BYTES)).await?;
        let stream = driver.dma_stream(device);
        Ok(Self { interrupts, vector, ring, domains: BTreeMap::new(), stream })
    }

    /// Attaches the device to the domain of a mode; gives the address of the descriptors there.
    async fn enter(&mut self, driver: &Driver, device: &DeviceHandle, mode: Mode) -> anyhow::Result<Iova> {
        if let Some((domain, ring)) = self.domains.get(&mode) {
            domain.attach(device).await.context("attach the device")?;
            return Ok(*ring);
        }
        let domain = driver.create_domain(mode.options()).await.context("create a domain")?;
        domain.attach(device).await.context("attach the device")?;
        let direction = Direction::Bidirectional;
        let mapping = driver.dma_map_single(device, self.ring.range(), direction).await;
        let ring = mapping.context("map the descriptors")?.leave_mapped();
        self.domains.insert(mode, (domain, ring));
        Ok(ring)
    }

    async fn program(
        &self,
        device: &DeviceHandle,
        ring: Iova,
        mode: Mode,
        packet_bytes: u32,
    ) -> anyhow::Result<()> {
        let programmed = async {
            device.write32(CONTROL, CONTROL_RESET).await?;
            device.write64(MSI_ADDRESS, self.vector.address.get()).await?;
            device.write32(MSI_DATA, self.vector.data).await?;
            device.write32(MSI_ENABLE, 1).await?;
            device.write64(RING_BASE, ring.get()).await?;
            device.write32(RING_SIZE, DESCRIPTORS).await?;
            device.write32(PACKET_BYTES, packet_bytes).await?;
            device.write32(RING_CONTROL, RING_ENABLE | RING_WRITE_BACK | BATCH << RING_BURST_SHIFT).await
        };
        programmed.await.with_context(|| format!("program the engine for {}", mode.name()))
    }

    /// One batch: map, post, ring the doorbell, wait, look at the completions, unmap.
    async fn batch(
        &mut self,
        device: &DeviceHandle,
        mode: Mode,
        buffers: &[GpaRange],
        at: u32,
    ) -> anyhow::Result<()> {
        let iovas = self.map(mode, buffers).await?;
        let mut descriptors = BytesMut::with_capacity((BATCH * DESCRIPTOR_BYTES) as usize);
        for (&iova, buffer) in iovas.iter().zip(buffers) {
            let length = u32::try_from(buffer.size_bytes())?;
            descriptors.extend_from_slice(&Descriptor::for_buffer(iova, length).to_bytes());
        }
        let offset = u64::from(at * DESCRIPTOR_BYTES);
        self.ring.write(offset, descriptors).await.context("post descriptors")?;
        device.write32(RING_TAIL, (at + BATCH) % DESCRIPTORS).await.context("ring the doorbell")?;
        self.completed(device, offset).await?;
        if mode == Mode::Passthrough {
            return Ok(());
        }
        let mappings: Vec<_> =
            iovas.into_iter().zip(buffers).map(|(iova, buffer)| (iova, buffer.size_bytes())).collect();
        let unmapped = self.stream.unmap(&mappings, Direction::FromDevice).await?.await?;
        unmapped.into_iter().collect::<Result<Vec<()>, _>>().context("unmap packets")?;
        Ok(())
    }

    /// With a direct map there is nothing to do: the device's addresses are the guest's.
    async fn map(&self, mode: Mode, buffers: &[GpaRange]) -> anyhow::Result<Vec<Iova>> {
        let ring = match mode {
            Mode::Passthrough => {
                return Ok(buffers.iter().map(|range| Iova::new(range.base().get())).collect());
            }
            Mode::Ring => PACKET_RING,
            Mode::Strict | Mode::Deferred => 0,
        };
        let options = MapOptions::on_ring(ring);
        let mapped = self.stream.map_with(buffers, Direction::FromDevice, options).await?.await?;
        mapped.into_iter().collect::<Result<_, _>>().context("map packets")
    }

    /// Waits for the interrupt of the batch and checks how each packet ended.
    async fn completed(&mut self, device: &DeviceHandle, offset: u64) -> anyhow::Result<()> {
        loop {
            match self.interrupts.next().await {
                Some(Ok(InterruptEvent::Raised(interrupt)))
                    if interrupt.device != device.address() || interrupt.vector != self.vector.vector =>
                {
                    continue;
                }
                Some(Ok(_)) => {}
                Some(Err(error)) => return Err(error).context("interrupts are not told"),
                None => bail!("interrupts are not told"),
            }
            let content = self.ring.read(offset, u64::from(BATCH * DESCRIPTOR_BYTES)).await?;
            let statuses = content.chunks_exact(DESCRIPTOR_BYTES as usize).map(|descriptor| {
                let bytes = descriptor.try_into().expect("a chunk has the size of a descriptor");
                Descriptor::from_bytes(bytes).status
            });
            let mut is_done = true;
            for status in statuses {
                ensure!(status & COMPLETION_ERROR == 0, "a packet was refused: {status:#x}");
                is_done &= status & COMPLETION_DONE != 0;
            }
            if is_done {
                return Ok(());
            }
        }
    }
}
