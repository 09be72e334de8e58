//! Where a replay runs: a host with a domain of the wanted mode and a device in it, or a bare machine with translation off.

use std::sync::Arc;

use anyhow::Context;
use iommu_hardware::bare::BareMachine;
use iommu_hardware::dma::{Run, Transfer};
use iommu_hardware::vtd::{EventMessage, EventSink, Port};
use iommu_kernel::{DmaMap, DmaUnmap, Domain, Tick};
use iommu_types::{
    Capabilities, Direction, DomainOptions, Gpa, GpaRange, Iova, IovaRange, PAGE_SIZE_BYTES, RequestId,
    SourceId,
};

use super::counts::Reading;
use crate::in_process::host::{Caches, Host};

/// A buffer that the device may use.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Buffer {
    /// Where it lies.
    pub(crate) memory: GpaRange,
    /// Where the device finds it.
    pub(crate) iova: Iova,
    /// Which way data flows.
    pub(crate) direction: Direction,
}

impl Buffer {
    /// Its addresses, as the device has them.
    pub(crate) fn range(&self) -> IovaRange {
        IovaRange::new(self.iova, self.memory.size_bytes()).expect("what was mapped does not wrap")
    }
}

/// Machine, driver and device.
pub(crate) enum Stage {
    /// Behind an IOMMU.
    Host(Box<HostStage>),
    /// Without.
    Bare {
        /// It owns the memory.
        _machine: Box<BareMachine>,
        /// The device.
        port: Port,
        /// The first free address of its memory.
        next: u64,
    },
}

/// A host, a domain, a device.
pub(crate) struct HostStage {
    pub(crate) host: Host,
    pub(crate) domain: Domain,
    pub(crate) port: Port,
    pub(crate) source: SourceId,
}

/// Nobody programs the bare machine's interrupts.
struct NoEvents;

impl EventSink for NoEvents {
    fn deliver(&self, _message: EventMessage) {}
}

impl HostStage {
    /// A host with this memory and these caches.
    pub(crate) fn new(memory_bytes: u64, caches: Caches, options: DomainOptions) -> anyhow::Result<Self> {
        let mut host = Host::boot(memory_bytes, caches)?;
        let mut domain = host.domain_of(options)?;
        let source = host.source(&mut domain)?;
        let mut port = host.kernel.unit().port(source).context("open a port")?;
        // The device has been at work in this domain: its slot stands in the list that every drain looks through.
        drop(port.burst());
        Ok(Self { host, domain, port, source })
    }
    /// Memory for buffers; passthrough domains get it into their direct map.
    pub(crate) fn allocate(&mut self, size_bytes: u64) -> anyhow::Result<GpaRange> {
        let memory = self.host.buffer(size_bytes)?;
        if self.domain.is_passthrough() {
            self.domain.open_direct(&self.host.kernel, &self.host.memory, memory).context("open a buffer")?;
        }
        Ok(memory)
    }
    /// Maps a buffer into a ring, and settles what the map evicted.
    pub(crate) fn map(&mut self, memory: GpaRange, direction: Direction, ring: u16, now: Tick) -> Buffer {
        let request = DmaMap { ring, client: ring as u8, ..DmaMap::single(memory, direction, RequestId(1)) };
        let Self { host, domain, .. } = self;
        let iova =
            domain.dma_map(&host.kernel, &host.memory, request, now).expect("there is room for the replay");
        for pending in domain.take_evicted() {
            host.finish(domain, pending);
        }
        Buffer { memory, iova, direction }
    }
    /// Unmaps a buffer and settles it as the mode does.
    pub(crate) fn unmap(&mut self, buffer: &Buffer, ring: u16, end_of_burst: bool, now: Tick) {
        let single = DmaUnmap::single(buffer.range(), buffer.direction, RequestId(2));
        let request = DmaUnmap { end_of_burst, client: ring as u8, ..single };
        let Self { host, domain, .. } = self;
        let pending = domain.dma_unmap(&host.kernel, request, now).expect("the buffer is mapped");
        host.finish(domain, pending);
    }
    /// The device uses buffers in turn, each whole, in its direction. `bytes` is what it writes, and where its reads go.
    pub(crate) fn use_all<'b>(&mut self, buffers: impl Iterator<Item = &'b Buffer>, bytes: &mut [u8]) {
        use_all(&mut self.port, buffers, bytes);
    }
    /// Flushes if it is time.
    pub(crate) fn flush_if_due(&mut self, now: Tick) {
        if self.domain.flush_at().is_some_and(|at| at <= now) {
            self.flush();
        }
    }
    /// Flushes what waits.
    pub(crate) fn flush(&mut self) {
        let pending = self.domain.flush(&self.host.kernel);
        self.host.finish(&mut self.domain, pending);
    }
    /// Every counter now.
    pub(crate) fn reading(&self) -> Reading {
        Reading {
            domain: self.domain.counters(),
            iovas: self.domain.iova_counters(),
            unit: self.host.kernel.unit().counters(),
        }
    }
}

impl Stage {
    /// For a configuration's options; a bare machine where there are none.
    pub(crate) fn new(
        memory_bytes: u64,
        caches: Caches,
        options: Option<DomainOptions>,
    ) -> anyhow::Result<Self> {
        if let Some(options) = options {
            return Ok(Self::Host(Box::new(HostStage::new(memory_bytes, caches, options)?)));
        }
        let machine = BareMachine::new(memory_bytes, Capabilities::FULL, 1, Arc::new(NoEvents))?;
        let port = machine.port(SourceId::new(8)).context("open a port")?;
        Ok(Self::Bare { _machine: Box::new(machine), port, next: PAGE_SIZE_BYTES })
    }
    /// Memory for buffers.
    pub(crate) fn allocate(&mut self, size_bytes: u64) -> anyhow::Result<GpaRange> {
        match self {
            Self::Host(stage) => stage.allocate(size_bytes),
            Self::Bare { next, .. } => {
                let memory = GpaRange::new(Gpa::new(*next), size_bytes)?;
                *next += size_bytes.next_multiple_of(PAGE_SIZE_BYTES);
                Ok(memory)
            }
        }
    }
    /// Makes a buffer the device's. Without an IOMMU it is told where the buffer is, and that is all.
    pub(crate) fn map(&mut self, memory: GpaRange, direction: Direction, ring: u16, now: Tick) -> Buffer {
        match self {
            Self::Host(stage) => stage.map(memory, direction, ring, now),
            Self::Bare { .. } => Buffer { memory, iova: Iova::new(memory.base().get()), direction },
        }
    }
    /// Makes it the driver's again.
    pub(crate) fn unmap(&mut self, buffer: &Buffer, ring: u16, end_of_burst: bool, now: Tick) {
        if let Self::Host(stage) = self {
            stage.unmap(buffer, ring, end_of_burst, now);
        }
    }
    /// Flushes if it is time.
    pub(crate) fn flush_if_due(&mut self, now: Tick) {
        if let Self::Host(stage) = self {
            stage.flush_if_due(now);
        }
    }
    /// Every counter now; a bare machine that translates nothing has none.
    pub(crate) fn reading(&self) -> Reading {
        match self {
            Self::Host(stage) => stage.reading(),
            Self::Bare { .. } => Reading::default(),
        }
    }
    /// What a replay behind an IOMMU runs on.
    pub(crate) fn host(&mut self) -> Option<&mut HostStage> {
        match self {
            Self::Host(stage) => Some(stage),
            Self::Bare { .. } => None,
        }
    }
    /// The device uses buffers in turn, each whole, in its direction. `bytes` is what it writes, and where its reads go.
    pub(crate) fn use_all<'b>(&mut self, buffers: impl Iterator<Item = &'b Buffer>, bytes: &mut [u8]) {
        match self {
            Self::Host(stage) => use_all(&mut stage.port, buffers, bytes),
            Self::Bare { port, .. } => use_all(port, buffers, bytes),
        }
    }
}

fn use_all<'b>(port: &mut Port, buffers: impl Iterator<Item = &'b Buffer>, bytes: &mut [u8]) {
    let mut run = Run::new(port);
    for buffer in buffers {
        let part = &mut bytes[..buffer.memory.size_bytes() as usize];
        let reads = buffer.direction == Direction::ToDevice;
        let transfer = if reads { Transfer::Read(part) } else { Transfer::Write(part) };
        run.execute(buffer.iova, None, transfer).expect("the buffer is the device's");
    }
}
