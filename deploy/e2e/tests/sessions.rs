//! What happens to the others when a peer dies, stops, or is there twice.

use std::time::{Duration, Instant};

use device_runtime::{EndReason, Reconnect};
use dma_engine::registers;
use guest_sdk::errors::MmioError;
use guest_sdk::{AccessWidth, Direction, SdkError};
use iommu_e2e::device::{Device, REGISTER_VALUE, fault};
use iommu_e2e::link::Link;
use iommu_e2e::raw::{self, RawStream, hello};
use iommu_e2e::stage::{Actor, SOON, Stage, address, eventually, soon, within};
use iommu_proto::pb;
use iommu_proto::pb::device_to_server::Message;
use iommu_types::{Access, FaultReason, Iova, Outcome};
use rustix::process::Signal;

const ACTOR: &str = env!("CARGO_BIN_EXE_e2e-driver");

/// A device process that hammers a mapping of driver 0 until it is stopped.
async fn hammer(stage: &Stage, iova: Iova) -> Actor {
    let before = stage.device_state(0).await;
    let actor = stage.actor(ACTOR, &["device", "0", &iova.get().to_string(), "4096"]);
    soon("the device hammers", async || {
        let now = stage.device_state(0).await;
        (now.generation > before.generation && now.operations > before.operations + 1000).then_some(())
    })
    .await;
    actor
}

/// Whether the device of driver 1 moves data while something else goes on.
async fn the_other_pair_works(stage: &Stage, device: &Device) {
    let driver = stage.driver(1).await;
    let buffer = driver.allocate(4096).await.expect("memory");
    let handle = driver.device(address(1));
    let mapping =
        driver.dma_map_single(&handle, buffer.range(), Direction::Bidirectional).await.expect("a mapping");
    device.dma.write(mapping.iova(), &b"still here"[..]).await.expect("a mapped write");
    assert_eq!(buffer.read(0, 10).await.expect("a read")[..], b"still here"[..]);
    assert_eq!(device.dma.read(mapping.iova(), 10).await.expect("a mapped read")[..], b"still here"[..]);
    mapping.unmap().await.expect("an unmap");
    buffer.free().await.map_err(|(_, error)| error).expect("a free");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_agent_killed_in_the_middle_of_a_batch_leaves_the_server_and_its_driver_well() {
    within(60, async {
        let mut stage = Stage::start(&[]).await;
        let driver = stage.driver(0).await;
        let buffer = driver.allocate(4096).await.expect("memory");
        let handle = driver.device(address(0));
        let mapping = driver
            .dma_map_single(&handle, buffer.range(), Direction::Bidirectional)
            .await
            .expect("a mapping");
        let other = stage.device(1).await;

        let mut actor = hammer(&stage, mapping.iova()).await;
        assert_eq!(
            handle.read32(0).await.expect("its register"),
            u32::try_from(mapping.iova().get()).expect("low")
        );
        actor.process.kill().await.expect("the agent is killed");

        stage.device_gone(0, SOON).await;
        stage.log_says(&["device session left", "00:01.0"]).await;
        match handle.read32(0).await {
            Err(SdkError::Refused(MmioError::DeviceAbsent(absent))) => assert_eq!(absent.device, address(0)),
            other => panic!("DEVICE_ABSENT was expected: {other:?}"),
        }
        the_other_pair_works(&stage, &other).await;

        // The mapping is the driver's and stays; a new agent of the same address uses it.
        let _engine = stage.engine(0).await;
        assert!(handle.read32(0).await.is_ok(), "the new agent answers for its registers");
        mapping.unmap().await.expect("the driver still holds its mapping");
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_dma_engine_killed_in_the_middle_of_a_copy_is_replaced_by_another() {
    const BYTES: u64 = 12 << 20;
    within(60, async {
        let mut stage = Stage::start(&[]).await;
        let driver = stage.driver(0).await;
        let handle = driver.device(address(0));
        let data: Vec<u8> = (0..BYTES).map(|byte| (byte % 251) as u8).collect();
        let (from, to) =
            (driver.allocate(BYTES).await.expect("memory"), driver.allocate(BYTES).await.expect("memory"));
        from.write(0, data.clone()).await.expect("a write");
        let source =
            driver.dma_map_single(&handle, from.range(), Direction::ToDevice).await.expect("a mapping");
        let target =
            driver.dma_map_single(&handle, to.range(), Direction::FromDevice).await.expect("a mapping");
        let copy = async || {
            handle.write64(registers::SOURCE, source.iova().get()).await.expect("SOURCE");
            handle.write64(registers::DESTINATION, target.iova().get()).await.expect("DESTINATION");
            handle.write32(registers::LENGTH, BYTES as u32).await.expect("LENGTH");
            handle.write32(registers::COMMAND, registers::COMMAND_COPY).await.expect("COMMAND");
        };

        let mut engine = stage.engine(0).await;
        copy().await;
        // Not a moment is lost between the first byte and the kill.
        while to.read(1, 1).await.expect("a read")[..] == [0] {}
        engine.kill().await.expect("the agent is killed");
        stage.device_gone(0, SOON).await;
        assert!(matches!(handle.read32(0).await, Err(SdkError::Refused(MmioError::DeviceAbsent(_)))));
        let left = to.read(0, BYTES).await.expect("a read");
        let length = left.iter().rposition(|byte| *byte != 0).map_or(0, |last| last + 1);
        assert!(length > 1 && length < data.len(), "the copy was in the middle: {length} bytes are there");
        assert_eq!(left[..length], data[..length], "what was done is done");

        let _engine = stage.engine(0).await;
        copy().await;
        soon("the copy of the new agent is done", async || {
            let status = handle.read32(registers::STATUS).await.expect("STATUS");
            assert_eq!(status & registers::STATUS_ERROR, 0);
            (status & registers::STATUS_DONE != 0).then_some(())
        })
        .await;
        assert!(to.read(0, BYTES).await.expect("a read")[..] == data[..], "all of it");
        source.unmap().await.expect("an unmap");
        target.unmap().await.expect("an unmap");
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_driver_killed_with_mappings_live_leaves_nothing_behind_after_the_grace() {
    within(60, async {
        let stage = Stage::start(&["--grace", "2s"]).await;
        let device = stage.device(0).await;
        let empty = stage.holdings().await;
        let mut actor = stage.actor(ACTOR, &["driver", "0"]);
        let told = actor.says().await;
        let number = |key: &str| told[key].as_u64().expect("a number");
        let (iova, coherent) = (Iova::new(number("iova")), Iova::new(number("coherent")));
        device.dma.write(iova, &b"alive"[..]).await.expect("the mapping is there");
        let held = stage.owner_state(0).await;
        assert!(held.mappings >= 2 && held.memory_bytes > 0, "{held:?}");

        actor.process.kill().await.expect("the driver is killed");
        let killed = Instant::now();
        soon("the server sees the connection go", async || {
            (!stage.owner_state(0).await.connected).then_some(())
        })
        .await;
        if killed.elapsed() < Duration::from_millis(1500) {
            device.dma.write(iova, &b"grace"[..]).await.expect("within the grace the mapping stays");
        }

        eventually(Duration::from_secs(8), "what the dead driver held is reclaimed", async || {
            let state = stage.owner_state(0).await;
            (state.mappings == 0 && state.memory_bytes == 0).then_some(())
        })
        .await;
        assert!(killed.elapsed() >= Duration::from_millis(1900), "not before the grace is over");
        for gone in [iova, coherent] {
            let refused = fault(device.dma.write(gone, &b"dead"[..]).await);
            assert_eq!((refused.done_bytes, refused.iova), (0, gone));
            assert!(refused.reason.is_ok(), "refused by translation: {refused:?}");
            let explained = stage.explain(address(0), gone, Access::Write).await;
            assert!(matches!(explained.outcome, Outcome::Refused(_)), "{}", explained.conclusion);
        }
        let cached = stage.inspect().iotlb(None, 0).await.expect("the IOTLB");
        assert_eq!(cached.total, 0, "no translation is left in the IOTLB: {:?}", cached.entries);
        assert_eq!(stage.holdings().await.at_rest(), empty.at_rest(), "all is as before the driver came");
        stage.log_says(&["driver:0", "grace is over"]).await;
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_driver_that_comes_back_within_the_grace_has_its_mappings_again() {
    within(60, async {
        let stage = Stage::start(&["--grace", "1500ms"]).await;
        let device = stage.device(0).await;
        let link = Link::to(stage.server.endpoint()).await;
        let driver = stage.driver_over(&link.endpoint(), 0).await;
        let buffer = driver.allocate(8192).await.expect("memory");
        let handle = driver.device(address(0));
        let mapping = driver
            .dma_map_single(&handle, buffer.range(), Direction::Bidirectional)
            .await
            .expect("a mapping");
        let before = driver.generation();
        link.cut();
        // The next call finds the connection lost, comes back with its token, and goes on.
        device
            .dma
            .write(mapping.iova(), &b"meanwhile"[..])
            .await
            .expect("the mapping outlives the connection");
        assert_eq!(buffer.read(0, 9).await.expect("the session goes on")[..], b"meanwhile"[..]);
        assert!(driver.generation() > before, "it is a later session of the same identity");
        // Beyond the grace that began with the cut, everything is still there: somebody came back for it.
        tokio::time::sleep(Duration::from_millis(2000)).await;
        device.dma.write(mapping.iova(), &b"later"[..]).await.expect("what was resumed is not reclaimed");
        assert_eq!(stage.owner_state(0).await.mappings, 1);
        mapping.unmap().await.expect("the resumed session owns the mapping");
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stopped_agent_loses_its_session_and_the_others_go_on() {
    within(90, async {
        let stage = Stage::start(&["--keepalive", "2s"]).await;
        let driver = stage.driver(0).await;
        let buffer = driver.allocate(4096).await.expect("memory");
        let handle = driver.device(address(0));
        let mapping = driver
            .dma_map_single(&handle, buffer.range(), Direction::Bidirectional)
            .await
            .expect("a mapping");
        let other = stage.device(1).await;
        let actor = hammer(&stage, mapping.iova()).await;
        let session = stage.device_state(0).await.generation;

        actor.process.signal(Signal::STOP).expect("the agent stops");
        let stopped = Instant::now();
        let mut slowest = Duration::ZERO;
        eventually(Duration::from_secs(30), "the stopped agent loses its session", async || {
            let began = Instant::now();
            the_other_pair_works(&stage, &other).await;
            slowest = slowest.max(began.elapsed());
            tokio::time::sleep(Duration::from_millis(100)).await;
            (!stage.device_state(0).await.connected).then_some(())
        })
        .await;
        assert!(slowest < Duration::from_secs(2), "the others took up to {slowest:?}");
        assert!(stopped.elapsed() > Duration::from_secs(2), "a short pause ends no session");
        stage.log_says(&["00:01.0", "device session", "reason="]).await;
        // The driver is not held up by its device, and its unmap is answered.
        assert!(matches!(handle.read32(0).await, Err(SdkError::Refused(MmioError::DeviceAbsent(_)))));
        actor.process.signal(Signal::CONT).expect("the agent goes on");
        stage.device_connected(0, session.0 + 1).await;
        mapping.unmap().await.expect("an unmap while the device hammers");
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_device_that_never_reads_its_stream_is_stalled_out() {
    within(90, async {
        let stage = Stage::start(&[]).await;
        let driver = stage.driver(0).await;
        let buffer = driver.allocate(64 << 10).await.expect("memory");
        let handle = driver.device(address(0));
        let mapping = driver
            .dma_map_single(&handle, buffer.range(), Direction::Bidirectional)
            .await
            .expect("a mapping");
        let other = stage.device(1).await;

        let mut stream =
            RawStream::attach(&stage.server.unix_endpoint(), raw::envelope(Message::Hello(hello(0))))
                .await
                .expect("the stream opens");
        assert!(matches!(stream.hear_device().await, Ok(pb::server_to_device::Message::Welcome(_))));
        for tag in 0..32 {
            let batch = pb::DmaBatch {
                first_tag: tag,
                iova: vec![mapping.iova().get()],
                size_bytes: vec![64 << 10],
                ..pb::DmaBatch::default()
            };
            assert!(stream.say(raw::envelope(Message::Dma(batch))).await, "the stream takes what it may");
        }
        // Nothing is read. The kernel's and the server's buffers fill up, and then the server waits for us.
        let mut slowest = Duration::ZERO;
        eventually(Duration::from_secs(30), "the session is ended", async || {
            let began = Instant::now();
            the_other_pair_works(&stage, &other).await;
            slowest = slowest.max(began.elapsed());
            tokio::time::sleep(Duration::from_millis(100)).await;
            (!stage.device_state(0).await.connected).then_some(())
        })
        .await;
        assert!(slowest < Duration::from_secs(2), "the others took up to {slowest:?}");
        stage.log_says(&["00:01.0", "session ended", "stalled"]).await;
        // The driver never waits for such a device.
        mapping.unmap().await.expect("an unmap is answered");
        let _again = stage.device(0).await;
        assert_eq!(handle.read32(0).await.expect("the new agent answers"), REGISTER_VALUE as u32);
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_second_agent_of_an_address_fences_the_first() {
    within(60, async {
        let mut stage = Stage::start(&[]).await;
        let driver = stage.driver(0).await;
        let buffer = driver.allocate(4096).await.expect("memory");
        let handle = driver.device(address(0));
        let mapping = driver
            .dma_map_single(&handle, buffer.range(), Direction::Bidirectional)
            .await
            .expect("a mapping");

        let first = stage.device(0).await;
        first.dma.write(mapping.iova(), &b"first"[..]).await.expect("the first one is the device");
        let dma = first.dma.clone();
        let second = Device::attach_with(
            &stage.server,
            stage.server.endpoint(),
            "engine0",
            address(0),
            Reconnect::STANDARD,
        )
        .await;
        match first.ended().await {
            Err(EndReason::Fenced(fenced)) => assert_eq!(fenced.by_generation, 2),
            other => panic!("SESSION_FENCED was expected: {other:?}"),
        }
        assert!(
            dma.write(mapping.iova(), &b"ghost"[..]).await.is_err(),
            "the first one does no DMA any more"
        );
        second.dma.write(mapping.iova(), &b"second"[..]).await.expect("the second one is the device");
        assert_eq!(buffer.read(0, 6).await.expect("a read")[..], b"second"[..]);
        stage.log_says(&["00:01.0", "fenced"]).await;
        assert_eq!(stage.device_state(0).await.generation.0, 2);

        // The same between two processes: the older one gives up by itself.
        second.leave().await;
        let mut third = stage.engine(0).await;
        let _fourth = stage.engine(0).await;
        let ended = third.wait(SOON).await.expect("a fenced agent ends");
        assert!(!ended.success(), "and says so by its exit code");
        assert!(third.log().contains("fenced"), "and in words: {}", third.log());
        assert!(handle.read(0, 0, AccessWidth::Bytes4).await.is_ok(), "the newer one is the device");
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_second_driver_of_an_owner_fences_the_first_and_starts_afresh() {
    within(60, async {
        let stage = Stage::start(&[]).await;
        let device = stage.device(0).await;
        let first = stage.driver(0).await;
        let buffer = first.allocate(4096).await.expect("memory");
        let handle = first.device(address(0));
        let mapping =
            first.dma_map_single(&handle, buffer.range(), Direction::FromDevice).await.expect("a mapping");
        let iova = mapping.leave_mapped();
        device.dma.write(iova, &b"mine"[..]).await.expect("mapped");
        let second = stage.driver(0).await;
        let refused = fault(device.dma.write(iova, &b"gone"[..]).await);
        assert_eq!(refused.reason, Ok(FaultReason::WRITE_DENIED), "the first one's mapping was reclaimed");
        assert!(buffer.read(0, 4).await.is_err(), "the first session is over");
        let fresh = second.allocate(4096).await.expect("memory");
        assert_eq!(fresh.read(0, 4096).await.expect("a read")[..], [0; 4096], "memory comes zeroed");
        assert_eq!(stage.owner_state(0).await.memory_bytes, 4096);
    })
    .await;
}
