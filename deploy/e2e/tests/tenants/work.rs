//! A tenant's legitimate work: none of it is ever refused, and all data arrives.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use dma_engine::registers as engine;
use guest_sdk::{Buffer, Direction, DomainOptions, InterruptEvent, MsiVector, Protection};
use iommu_e2e::device::{REGISTER_VALUE, fault};
use iommu_e2e::stage::SOON;
use iommu_types::DeviceAddress;

use super::plan::{History, Piece, STEPS_MIN, Work};
use super::world::{Worker, World};

/// Bytes of the buffer of one piece.
const PIECE_BYTES: u64 = 4 * 4096;
/// Pieces at once.
const PIECES: usize = 3;
/// Bytes that the engine copies at most.
const COPY_BYTES: u64 = 5 * 4096;

/// Interrupts that came, by device and vector.
type Interrupts = Arc<Mutex<BTreeMap<(DeviceAddress, u8), u64>>>;

/// What the work is done with.
struct Desk<'a> {
    worker: &'a Worker,
    pieces: Vec<Buffer>,
    from: Buffer,
    to: Buffer,
    engine_vector: MsiVector,
    port_vector: MsiVector,
    interrupts: Interrupts,
}

/// Works until it is told to stop, and [`STEPS_MIN`] steps at least.
pub(crate) async fn work(world: Arc<World>, tenant: usize, seed: u64, stop: Arc<AtomicBool>) {
    let worker = &world.tenants[tenant].worker;
    let interrupts = Interrupts::default();
    let listening = listen(worker, Arc::clone(&interrupts)).await;
    let desk = Desk::of(worker, interrupts).await;
    let mut history = History::of(format!("work of tenant {tenant}"), seed);
    let mut step = 0;
    while step < STEPS_MIN || !stop.load(Ordering::SeqCst) {
        let what = Work::of(seed, tenant as u64, step);
        history.begins(step, &what);
        desk.does(what, step).await;
        assert!(!listening.is_finished(), "an interrupt came that is not this tenant's");
        step += 1;
    }
    listening.abort();
}

/// Counts interrupts, all of which must be of the worker's own devices.
async fn listen(worker: &Worker, interrupts: Interrupts) -> tokio::task::JoinHandle<()> {
    let mut told = worker.guest.driver.watch_interrupts().await.expect("a subscription");
    let own = [worker.engine, worker.port];
    tokio::spawn(async move {
        while let Some(event) = told.next().await {
            let InterruptEvent::Raised(interrupt) = event.expect("the subscription stands") else { continue };
            assert!(own.contains(&interrupt.device), "an interrupt of another: {interrupt:?}");
            let mut counts = interrupts.lock().expect("no panic under the lock");
            *counts.entry((interrupt.device, interrupt.vector)).or_default() += u64::from(interrupt.count);
        }
    })
}

fn data(step: u64, size_bytes: u64) -> Vec<u8> {
    (0..size_bytes).map(|at| (at ^ (at >> 8) ^ step.wrapping_mul(7)) as u8).collect()
}

impl<'a> Desk<'a> {
    async fn of(worker: &'a Worker, interrupts: Interrupts) -> Self {
        let driver = &worker.guest.driver;
        let mut pieces = Vec::new();
        for _ in 0..PIECES {
            pieces.push(driver.allocate(PIECE_BYTES).await.expect("memory"));
        }
        let from = driver.allocate(COPY_BYTES).await.expect("memory");
        let to = driver.allocate(COPY_BYTES).await.expect("memory");
        let engine_vector = driver.device(worker.engine).allocate_interrupt().await.expect("a vector");
        let port_vector = driver.device(worker.port).allocate_interrupt().await.expect("a vector");
        let device = driver.device(worker.engine);
        device.write64(engine::MSI_ADDRESS, engine_vector.address.get()).await.expect("MSI_ADDRESS");
        device.write32(engine::MSI_DATA, engine_vector.data).await.expect("MSI_DATA");
        device.write32(engine::MSI_ENABLE, 1).await.expect("MSI_ENABLE");
        Self { worker, pieces, from, to, engine_vector, port_vector, interrupts }
    }

    fn raised(&self, device: DeviceAddress, vector: MsiVector) -> u64 {
        let counts = self.interrupts.lock().expect("no panic under the lock");
        counts.get(&(device, vector.vector)).copied().unwrap_or_default()
    }

    async fn is_raised(&self, device: DeviceAddress, vector: MsiVector, before: u64) {
        let started = Instant::now();
        while self.raised(device, vector) == before {
            assert!(started.elapsed() < SOON, "the interrupt of {device} is not delivered");
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }

    async fn does(&self, what: Work, step: u64) {
        match what {
            Work::Domain { options, pieces } => self.uses_domain(options, &pieces, step).await,
            Work::Copy { size_bytes } => self.copies(size_bytes, step).await,
            Work::Interrupt => {
                let before = self.raised(self.worker.port, self.port_vector);
                let MsiVector { address, data, .. } = self.port_vector;
                self.worker.port_agent.dma.msi(address, data).await.expect("its own interrupt");
                self.is_raised(self.worker.port, self.port_vector, before).await;
            }
            Work::Registers => {
                let driver = &self.worker.guest.driver;
                let id = driver.device(self.worker.engine).read32(engine::ID_VERSION).await;
                assert_eq!(id.expect("its register"), engine::ID << 16 | engine::VERSION);
                let value = driver.device(self.worker.port).read32(0).await.expect("its register");
                assert_eq!(u64::from(value), REGISTER_VALUE);
            }
            Work::Hypercall { size_bytes } => {
                let payload = data(step, size_bytes as u64);
                let answer = self.worker.guest.driver.hypercall(payload.clone()).await.expect("an answer");
                let vm = self.worker.guest.vm.number().to_le_bytes();
                assert_eq!(answer[..4], vm, "the hypervisor knows who asks");
                assert_eq!(answer[4..], payload[..payload.len().min(64)]);
            }
        }
    }

    /// The engine copies, and the copy is the original.
    async fn copies(&self, size_bytes: u32, step: u64) {
        let driver = &self.worker.guest.driver;
        let device = driver.device(self.worker.engine);
        let original = data(step, size_bytes.into());
        self.from.write(0, original.clone()).await.expect("a write");
        let range = |buffer: &Buffer| buffer.slice(0, size_bytes.into()).expect("inside the buffer");
        let source = driver.dma_map_single(&device, range(&self.from), Direction::ToDevice).await;
        let source = source.expect("a mapping");
        let target = driver.dma_map_single(&device, range(&self.to), Direction::FromDevice).await;
        let target = target.expect("a mapping");
        let before = self.raised(self.worker.engine, self.engine_vector);
        device.write64(engine::SOURCE, source.iova().get()).await.expect("SOURCE");
        device.write64(engine::DESTINATION, target.iova().get()).await.expect("DESTINATION");
        device.write32(engine::LENGTH, size_bytes).await.expect("LENGTH");
        device.write32(engine::COMMAND, engine::COMMAND_COPY).await.expect("COMMAND");
        self.is_raised(self.worker.engine, self.engine_vector, before).await;
        let status = device.read32(engine::STATUS).await.expect("STATUS");
        let reason = device.read32(engine::FAULT_REASON).await.expect("FAULT_REASON");
        assert_eq!((status & engine::STATUS_ERROR, reason), (0, 0), "its DMA was refused");
        source.unmap().await.expect("an unmap");
        target.unmap().await.expect("an unmap");
        let copy = self.to.read(0, size_bytes.into()).await.expect("a read");
        assert!(copy[..] == original[..], "the copy is another");
    }

    /// Makes a domain, moves data through it both ways, and destroys it.
    async fn uses_domain(&self, options: DomainOptions, pieces: &[Piece], step: u64) {
        let (driver, dma) = (&self.worker.guest.driver, &self.worker.port_agent.dma);
        let handle = driver.device(self.worker.port);
        let domain = driver.create_domain(options).await.expect("a domain");
        domain.attach(&handle).await.expect("attached");
        let mut mapped = Vec::new();
        for (index, (piece, buffer)) in pieces.iter().zip(&self.pieces).enumerate() {
            let there = data(step + index as u64, piece.size_bytes);
            buffer.write(0, vec![0xbb; PIECE_BYTES as usize]).await.expect("a write");
            buffer.write(piece.offset, there.clone()).await.expect("a write");
            let range = buffer.slice(piece.offset, piece.size_bytes).expect("inside the buffer");
            let mapping = driver.dma_map_single(&handle, range, piece.direction).await.expect("a mapping");
            mapped.push((mapping, there));
        }
        for (mapping, there) in &mut mapped {
            let size = u32::try_from(mapping.size_bytes()).expect("small");
            if mapping.direction() != Direction::FromDevice {
                let read = dma.read(mapping.iova(), size).await.expect("a mapped read");
                assert!(read[..] == there[..], "the device reads something else");
            }
            if mapping.direction() != Direction::ToDevice {
                there.iter_mut().for_each(|byte| *byte = !*byte);
                dma.write(mapping.iova(), there.clone()).await.expect("a mapped write");
            }
        }
        for ((mapping, there), (piece, buffer)) in mapped.into_iter().zip(pieces.iter().zip(&self.pieces)) {
            let iova = mapping.iova();
            mapping.unmap().await.expect("an unmap");
            let whole = buffer.read(0, PIECE_BYTES).await.expect("a read");
            let (begin, end) = (piece.offset as usize, (piece.offset + piece.size_bytes) as usize);
            assert!(whole[begin..end] == there[..], "what the device wrote is not there");
            let beside = whole[..begin].iter().chain(&whole[end..]);
            assert!(beside.into_iter().all(|byte| *byte == 0xbb), "bytes beside the buffer were changed");
            if matches!(options.protection, Protection::Strict | Protection::Ring(_)) {
                fault(dma.write(iova, vec![1]).await);
            }
        }
        handle.attach_default().await.expect("attached");
        domain.destroy().await.expect("nothing is attached to it");
    }
}
