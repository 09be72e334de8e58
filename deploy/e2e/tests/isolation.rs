//! Nobody reaches what is not theirs: not after an unmap (I1, over the wire), and not another driver's things.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use device_runtime::{Batch, Dma};
use guest_sdk::errors::{
    AttachError, DetachError, DmaMapError, DmaUnmapError, InterruptError, MmioError, NotYours,
};
use guest_sdk::{
    AccessQuestion, Buffer, Direction, DomainOptions, Driver, FaultFilter, InspectError, Protection, SdkError,
};
use iommu_e2e::device::fault;
use iommu_e2e::random::{Random, seed};
use iommu_e2e::raw::{self, ask, reason};
use iommu_e2e::stage::{Stage, address, owner, within};
use iommu_proto::pb;
use iommu_types::{Access, Fault, FaultReason, Gpa, GpaRange, Iova, Permissions};
use tokio::task::JoinHandle;

/// How long the device hammers.
const HAMMERING: Duration = Duration::from_secs(2);
/// Batches that it keeps in flight.
const IN_FLIGHT: usize = 4;
/// Writes in a batch.
const WRITES: usize = 32;
/// Bytes of a write.
const WRITE_BYTES: usize = 256;

/// Where the device hammers, and since when every write there must be refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Aim {
    Rest,
    Mapped(Iova),
    Dead(Iova),
    Stop,
}

/// A device that writes ever new values to wherever it is aimed.
struct Hammer {
    aim: Arc<Mutex<Aim>>,
    resting: Arc<AtomicU64>,
    written: Arc<AtomicU64>,
    refused: Arc<AtomicU64>,
    tasks: Vec<JoinHandle<()>>,
}

impl Hammer {
    fn start(dma: &Dma) -> Self {
        let mut hammer = Self {
            aim: Arc::new(Mutex::new(Aim::Rest)),
            resting: Arc::default(),
            written: Arc::default(),
            refused: Arc::default(),
            tasks: Vec::new(),
        };
        for lane in 0..IN_FLIGHT {
            let (dma, aim) = (dma.clone(), Arc::clone(&hammer.aim));
            let (resting, written, refused) =
                (Arc::clone(&hammer.resting), Arc::clone(&hammer.written), Arc::clone(&hammer.refused));
            hammer.tasks.push(tokio::spawn(async move {
                let mut value = lane as u64;
                loop {
                    let aimed = *aim.lock().expect("no panic under the lock");
                    let (iova, dead) = match aimed {
                        Aim::Mapped(iova) => (iova, false),
                        Aim::Dead(iova) => (iova, true),
                        Aim::Stop => return,
                        Aim::Rest => {
                            resting.fetch_add(1, Ordering::SeqCst);
                            tokio::time::sleep(Duration::from_micros(200)).await;
                            continue;
                        }
                    };
                    value += IN_FLIGHT as u64;
                    let mut batch = Batch::with_capacity(WRITES);
                    for _ in 0..WRITES {
                        batch.write(iova, [value.to_le_bytes(); WRITE_BYTES / 8].concat());
                    }
                    let completed = dma.execute(batch).await.expect("the session stands");
                    let faults = completed.faults().len() as u64;
                    if dead {
                        assert_eq!(
                            faults, WRITES as u64,
                            "I1: a write after the unmap was answered went through"
                        );
                    }
                    for (_, fault) in completed.faults() {
                        assert_eq!(fault.reason, Ok(FaultReason::WRITE_DENIED), "{fault:?}");
                    }
                    refused.fetch_add(faults, Ordering::SeqCst);
                    written.fetch_add(WRITES as u64 - faults, Ordering::SeqCst);
                }
            }));
        }
        hammer
    }

    fn aim(&self, aim: Aim) {
        *self.aim.lock().expect("no panic under the lock") = aim;
    }

    /// Returns when nothing is in flight any more.
    async fn rest(&self) {
        self.aim(Aim::Rest);
        let before = self.resting.load(Ordering::SeqCst);
        // Every lane passes through its rest twice before the count has grown so far.
        while self.resting.load(Ordering::SeqCst) < before + 20 * IN_FLIGHT as u64 {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }

    async fn stop(self) -> (u64, u64) {
        self.aim(Aim::Stop);
        for task in self.tasks {
            task.await.expect("the device saw nothing that must not be");
        }
        (self.written.load(Ordering::SeqCst), self.refused.load(Ordering::SeqCst))
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn i1_after_an_unmap_is_answered_the_memory_never_changes_again() {
    let seed = seed("isolation");
    within(60, async {
        let stage = Stage::start(&[]).await;
        let driver = stage.driver(0).await;
        let handle = driver.device(address(0));
        let device = stage.device(0).await;
        let hammer = Hammer::start(&device.dma);
        let mut random = Random::of(seed, &[]);
        let started = Instant::now();
        let mut rounds = 0u64;
        while started.elapsed() < HAMMERING {
            rounds += 1;
            let buffer = driver.allocate(4096).await.expect("memory");
            let mapping = driver
                .dma_map_single(&handle, buffer.range(), Direction::FromDevice)
                .await
                .expect("a mapping");
            let iova = mapping.iova();
            let before = hammer.written.load(Ordering::SeqCst);
            hammer.aim(Aim::Mapped(iova));
            while hammer.written.load(Ordering::SeqCst) == before {
                tokio::task::yield_now().await;
            }
            tokio::time::sleep(Duration::from_micros(random.below(3000))).await;
            mapping.unmap().await.expect("an unmap");
            hammer.aim(Aim::Dead(iova));
            let answered = buffer.read(0, WRITE_BYTES as u64).await.expect("a read");
            assert_ne!(answered[..8], [0; 8], "seed {seed}: the device was writing");
            let watched = Instant::now();
            while watched.elapsed() < Duration::from_micros(2000 + random.below(8000)) {
                let now = buffer.read(0, WRITE_BYTES as u64).await.expect("a read");
                assert_eq!(
                    now, answered,
                    "I1, seed {seed}, round {rounds}: the memory changed after the unmap"
                );
            }
            hammer.rest().await;
            buffer.free().await.map_err(|(_, error)| error).expect("a free");
        }
        let (written, refused) = hammer.stop().await;
        assert!(
            rounds >= 20 && written > 1000 && refused > 1000,
            "{rounds} rounds, {written} written, {refused} refused"
        );
        every_refusal_left_its_mark(&stage, refused).await;
    })
    .await;
}

/// I6: refused writes are counted, and recorded, collapsed, or marked as overflow.
async fn every_refusal_left_its_mark(stage: &Stage, refused: u64) {
    assert_eq!(stage.device_state(0).await.faults, refused, "every refusal was answered and counted");
    let counters = stage.inspect().counters(None).await.expect("counters");
    assert_eq!(counters.faults, refused);
    let accounted = counters.faults_recorded
        + counters.faults_collapsed
        + counters.faults_overflowed
        + counters.faults_suppressed;
    assert_eq!(accounted, refused, "I6: {counters:?}");
    let records = stage.faults_of(address(0)).await;
    assert!(!records.is_empty(), "the log of the owner has records");
    for record in records {
        assert_eq!(record.owner, Some(owner(0)));
        let Fault::Dma(fault) = record.fault else { panic!("a DMA fault was expected: {record:?}") };
        assert_eq!((fault.access, fault.reason), (Access::Write, FaultReason::WRITE_DENIED));
    }
}

/// Two drivers, each with a buffer and a domain of its own.
struct Neighbours {
    stage: Stage,
    ours: Driver,
    theirs: Driver,
    our_buffer: Buffer,
    their_buffer: Buffer,
}

impl Neighbours {
    async fn meet() -> Self {
        let stage = Stage::start(&[]).await;
        let (ours, theirs) = (stage.driver(0).await, stage.driver(1).await);
        let our_buffer = ours.allocate(4096).await.expect("memory");
        let their_buffer = theirs.allocate(64 << 10).await.expect("memory");
        our_buffer.write(0, &b"ours"[..]).await.expect("a write");
        their_buffer.write(0, &b"theirs"[..]).await.expect("a write");
        Self { stage, ours, theirs, our_buffer, their_buffer }
    }

    /// The last page of the neighbour's buffer: a guest-physical address that we do not have.
    fn their_last_page(&self) -> GpaRange {
        let last = self.their_buffer.size_bytes() - 4096;
        self.their_buffer.slice(last, 4096).expect("inside the buffer")
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn equal_guest_physical_addresses_of_two_drivers_are_different_memory() {
    within(60, async {
        let met = Neighbours::meet().await;
        assert_eq!(met.our_buffer.gpa(), met.their_buffer.gpa(), "the same number in two memory maps");
        assert_eq!(met.our_buffer.read(0, 4).await.expect("a read")[..], b"ours"[..]);
        assert_eq!(met.their_buffer.read(0, 6).await.expect("a read")[..], b"theirs"[..]);

        // The devices see it so too, be it at one and the same I/O virtual address.
        let (ours, theirs) = (met.stage.device(0).await, met.stage.device(1).await);
        let iova = Iova::new(0x40_0000);
        for (driver, number, gpa) in
            [(&met.ours, 0, met.our_buffer.gpa()), (&met.theirs, 1, met.their_buffer.gpa())]
        {
            let domain =
                driver.create_domain(DomainOptions::new(Protection::Strict)).await.expect("a domain");
            domain.map(iova, gpa, 4096, Permissions::READ_WRITE).await.expect("a mapping");
            domain.attach(&driver.device(address(number))).await.expect("attached");
        }
        ours.dma.write(iova, &b"OURS"[..]).await.expect("mapped");
        theirs.dma.write(iova, &b"THEIRS"[..]).await.expect("mapped");
        assert_eq!(ours.dma.read(iova, 6).await.expect("mapped")[..4], b"OURS"[..]);
        assert_eq!(theirs.dma.read(iova, 6).await.expect("mapped")[..], b"THEIRS"[..]);
        assert_eq!(met.our_buffer.read(0, 4).await.expect("a read")[..], b"OURS"[..]);
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn i2_a_driver_can_neither_map_nor_read_nor_unmap_what_is_anothers() {
    within(60, async {
        let met = Neighbours::meet().await;
        let (ours, theirs) = (&met.ours, &met.theirs);
        let our_device = ours.device(address(0));
        let before = met.stage.holdings().await;

        let mapped = ours.dma_map_single(&our_device, met.their_last_page(), Direction::Bidirectional).await;
        match mapped {
            Err(SdkError::Refused(DmaMapError::NotOwned(not))) => {
                assert_eq!(not.gpa, met.their_last_page().base())
            }
            other => panic!("NOT_OWNED was expected: {other:?}"),
        }
        let across = GpaRange::new(met.our_buffer.gpa(), 8192).expect("a range");
        let mapped = ours.dma_map_single(&our_device, across, Direction::Bidirectional).await;
        match mapped {
            Err(SdkError::Refused(DmaMapError::NotOwned(not))) => {
                assert_eq!(
                    not.gpa,
                    Gpa::new(met.our_buffer.gpa().get() + 4096),
                    "the first address that is not ours"
                );
            }
            other => panic!("NOT_OWNED was expected: {other:?}"),
        }
        let read = ours.memory().read(met.their_last_page().base(), 16).await;
        assert!(read.expect_err("not ours").to_string().contains("not memory of this owner"));

        // Naming the owner in the message changes nothing (I8): who we are comes from our session.
        let channel = raw::driver(&met.stage.server.unix_endpoint(), 2).await;
        for gpa in [met.their_buffer.gpa(), met.their_last_page().base()] {
            let read = pb::MemoryReadRequest { owner: Some(owner(1).into()), gpa: gpa.get(), size_bytes: 16 };
            let refused =
                ask::<pb::MemoryReadResponse>(&channel, "/iommu.v1.MemoryService/Read", &read).await;
            assert_eq!(reason(&refused.expect_err("not ours")), "NOT_YOURS");
        }

        let their_device = theirs.device(address(1));
        let mapping = theirs
            .dma_map_single(&their_device, met.their_last_page(), Direction::Bidirectional)
            .await
            .expect("it is theirs");
        let at = mapping.iova();
        let forged = pb::DmaUnmapRequest {
            header: Some(pb::RequestHeader { request_id: 1, acknowledged_through: 0 }),
            device: Some(address(1).into()),
            iova: at.get(),
            size_bytes: 4096,
            direction: pb::Direction::Bidirectional.into(),
            attributes: None,
            end_of_burst: None,
        };
        let refused =
            ask::<pb::DmaUnmapResponse>(&channel, "/iommu.v1.DriverService/DmaUnmap", &forged).await;
        assert_eq!(reason(&refused.expect_err("not ours")), "NOT_YOURS");
        let unmapped: Result<(), SdkError<DmaUnmapError>> = mapping.unmap().await;
        unmapped.expect("it was theirs all the time");
        assert_eq!(met.stage.holdings().await.at_rest(), before.at_rest(), "nothing changed");
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_driver_can_not_use_look_into_or_hear_from_anothers_device() {
    within(60, async {
        let met = Neighbours::meet().await;
        let (ours, theirs) = (&met.ours, &met.theirs);
        let device = met.stage.device(1).await;
        let foreign = ours.device(address(1));
        let before = met.stage.holdings().await;

        let named = |not: &NotYours| assert!(not.object.contains("00:02.0"), "the object is named: {not}");
        match ours.dma_map_single(&foreign, met.our_buffer.range(), Direction::Bidirectional).await {
            Err(SdkError::Refused(DmaMapError::NotYours(not))) => named(&not),
            other => panic!("NOT_YOURS was expected: {other:?}"),
        }
        match foreign.read32(0).await {
            Err(SdkError::Refused(MmioError::NotYours(not))) => named(&not),
            other => panic!("NOT_YOURS was expected: {other:?}"),
        }
        match foreign.write32(0, 1).await {
            Err(SdkError::Refused(MmioError::NotYours(not))) => named(&not),
            other => panic!("NOT_YOURS was expected: {other:?}"),
        }
        match foreign.attach_default().await {
            Err(SdkError::Refused(AttachError::NotYours(not))) => named(&not),
            other => panic!("NOT_YOURS was expected: {other:?}"),
        }
        match foreign.detach().await {
            Err(SdkError::Refused(DetachError::NotYours(not))) => named(&not),
            other => panic!("NOT_YOURS was expected: {other:?}"),
        }
        match foreign.allocate_interrupt().await {
            Err(SdkError::Refused(InterruptError::NotYours(not))) => named(&not),
            other => panic!("NOT_YOURS was expected: {other:?}"),
        }

        // Their device faults; they see it, and we do not.
        let refused = fault(device.dma.write(Iova::new(0xdead_0000), &b"x"[..]).await);
        assert_eq!(refused.reason, Ok(FaultReason::WRITE_DENIED));
        let all = FaultFilter { owner: None, device: None };
        let told = theirs.faults().list(all, 0).await.expect("their own log");
        assert_eq!(told.records.len(), 1);
        assert_eq!(told.records[0].device, address(1));
        assert!(ours.faults().list(all, 0).await.expect("our own log").records.is_empty());
        for filter in [
            FaultFilter { owner: Some(owner(1)), device: None },
            FaultFilter { owner: None, device: Some(address(1)) },
        ] {
            let refused = ours.faults().list(filter, 0).await;
            assert!(matches!(refused, Err(SdkError::Refused(NotYours { .. }))), "{filter:?}: {refused:?}");
        }

        let question = AccessQuestion {
            device: address(1),
            pasid: None,
            iova: Iova::new(0x1000),
            access: Access::Read,
            size_bytes: 4,
        };
        let explained = ours.inspect().explain(question).await;
        assert!(matches!(explained, Err(SdkError::Refused(InspectError::NotYours(_)))), "{explained:?}");
        let topology = ours.inspect().topology().await.expect("a driver sees its own");
        assert!(topology.owners.iter().all(|state| state.owner == owner(0)), "{:?}", topology.owners);
        assert!(topology.devices.iter().all(|state| state.owner == Some(owner(0))), "{:?}", topology.devices);
        let domains = ours.inspect().domains(None).await.expect("a driver sees its own");
        assert!(!domains.is_empty() && domains.iter().all(|domain| domain.owner == owner(0)), "{domains:?}");
        assert_eq!(met.stage.holdings().await.at_rest(), before.at_rest(), "nothing changed");
    })
    .await;
}
