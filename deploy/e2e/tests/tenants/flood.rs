//! While one tenant floods the server in every way that it has, the other does not notice, and is not lost sight of (I7). How fast things are is measured elsewhere.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use guest_sdk::errors::{CallError, DmaMapError, LimitReached};
use guest_sdk::{Direction, FaultFilter, Hypervisor, SdkError, TenantLimits};
use iommu_e2e::device::{Device, fault};
use iommu_e2e::guests::{Guest, declare, memory};
use iommu_e2e::raw_device::{OVER_BYTES, OVER_OPERATIONS, RawDevice, writes};
use iommu_e2e::stage::{Stage, within};
use iommu_types::{DeviceAddress, Fault, FaultReason, Iova, PciFunction};
use tokio::task::JoinSet;

/// Operations of the victim of each kind, and faults.
const OPERATIONS: u64 = 200;
const MEMORY_BYTES: u64 = 64 << 10;
const MAPPINGS: u64 = 16;
const REQUESTS: u32 = 200;
const DMA_OPERATIONS: u32 = 1000;
const DMA_BYTES: u64 = 1 << 20;

/// How often the flooder was refused, by the name of the limit or the code of the fault.
type Refusals = std::collections::BTreeMap<String, u64>;

async fn function(
    stage: &Stage,
    hypervisor: &Hypervisor,
    guest: &Guest,
    at: &str,
) -> (DeviceAddress, String) {
    let device: DeviceAddress = at.parse().expect("an address");
    let name = format!("flood-{}", at.replace([':', '.'], "-"));
    declare(hypervisor, device, &name, PciFunction::ISOLATED).await;
    guest.vm.assign(device).await.expect("it is assigned");
    assert!(!stage.device_state_at(device).await.connected);
    (device, name)
}

fn limit(refusals: &mut Refusals, reached: &LimitReached) {
    *refusals.entry(reached.limit.clone()).or_default() += 1;
}

/// Maps far beyond its limit, and asks far more often than it may.
async fn flood_with_requests(guest: Guest, device: DeviceAddress, stop: Arc<AtomicBool>) -> Refusals {
    let handle = guest.driver.device(device);
    let mut refusals = Refusals::new();
    let mut held = Vec::new();
    while !stop.load(Ordering::SeqCst) {
        let mut asking = JoinSet::new();
        for _ in 0..32 {
            let (driver, handle) = (guest.driver.clone(), handle.clone());
            asking.spawn(async move {
                driver.dma_map_single(&handle, memory(0, 4096), Direction::Bidirectional).await
            });
        }
        while let Some(mapped) = asking.join_next().await {
            match mapped.expect("no panic") {
                Ok(mapping) => held.push(mapping.leave_mapped()),
                Err(
                    SdkError::Refused(DmaMapError::LimitReached(reached))
                    | SdkError::Call(CallError::LimitReached(reached)),
                ) => limit(&mut refusals, &reached),
                Err(other) => panic!("LIMIT_REACHED was expected: {other:?}"),
            }
        }
        assert!(held.len() as u64 <= MAPPINGS, "{} mappings", held.len());
    }
    refusals
}

/// Does far more DMA than it may, all of it to nowhere: what is not refused by its rate is a fault, a storm of them.
async fn flood_with_dma(mut raw: RawDevice, data: Vec<u8>, stop: Arc<AtomicBool>) -> Refusals {
    let mut refusals = Refusals::new();
    let mut at = 0x6000_0000;
    while !stop.load(Ordering::SeqCst) {
        at += 4096;
        let answer = raw.batch(writes(&[at; 64], &data)).await.expect("the session stands");
        assert_eq!(answer.fault_reason.len(), 64, "{answer:x?}");
        for code in answer.fault_reason {
            *refusals.entry(format!("{code:#x}")).or_default() += 1;
        }
    }
    refusals
}

/// The victim does everything that a tenant does, and faults now and then; each fault must be in its log.
async fn goes_on(victim: &Guest, device: DeviceAddress, agent: &Device) {
    let driver = &victim.driver;
    let handle = driver.device(device);
    let buffer = driver.allocate(8192).await.expect("memory");
    for round in 0..OPERATIONS {
        let mapping = driver.dma_map_single(&handle, buffer.range(), Direction::Bidirectional).await;
        let mapping = mapping.unwrap_or_else(|error| panic!("round {round}: {error}"));
        let data = round.to_le_bytes().repeat(32);
        agent.dma.write(mapping.iova(), data.clone()).await.expect("a mapped write");
        let read = agent.dma.read(mapping.iova(), 256).await.expect("a mapped read");
        assert_eq!(read[..], data[..], "round {round}");
        mapping.unmap().await.expect("an unmap");
        assert_eq!(buffer.read(0, 256).await.expect("a read")[..], data[..], "round {round}");
        handle.read32(0).await.expect("a register");
        let refused = fault(agent.dma.write(nowhere(round), vec![1]).await);
        assert_eq!(refused.reason, Ok(FaultReason::WRITE_DENIED));
    }
}

fn nowhere(round: u64) -> Iova {
    Iova::new(0x7000_0000 + round * 4096)
}

async fn has_all_its_faults(victim: &Guest) {
    let all = FaultFilter { owner: None, device: None };
    let told = victim.driver.faults().list(all, 0).await.expect("its own log");
    assert_eq!(told.overwritten_count, 0, "none of its records was overwritten");
    let places: Vec<Iova> = told
        .records
        .iter()
        .map(|record| match record.fault {
            Fault::Dma(fault) => fault.iova,
            Fault::Interrupt(_) => panic!("it raised no interrupt: {record:?}"),
        })
        .collect();
    let expected: Vec<Iova> = (0..OPERATIONS).map(nowhere).collect();
    assert_eq!(places, expected, "every fault of it has its record, in order");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn i7_a_flood_is_refused_by_the_name_of_its_limit_and_its_neighbour_loses_nothing() {
    within(60, async {
        let stage = Stage::start(&[]).await;
        let hypervisor = stage.hypervisor("hv0").await;
        let victim = Guest::start(&stage, &hypervisor, "victim", MEMORY_BYTES).await;
        let (device, name) = function(&stage, &hypervisor, &victim, "00:08.0").await;
        let agent = Device::attach(&stage.server, stage.server.endpoint(), &name, device).await;
        let limits = TenantLimits {
            mappings: Some(MAPPINGS),
            requests_per_second: Some(REQUESTS),
            dma_operations_per_second: Some(DMA_OPERATIONS),
            ..TenantLimits::default()
        };
        let by_count =
            Guest::start_with(&stage, &hypervisor, "by-count", MEMORY_BYTES, |vm| vm.with_limits(limits))
                .await;
        let limits = TenantLimits { dma_bytes_per_second: Some(DMA_BYTES), ..TenantLimits::default() };
        let by_bytes =
            Guest::start_with(&stage, &hypervisor, "by-bytes", MEMORY_BYTES, |vm| vm.with_limits(limits))
                .await;
        let (counted, counted_name) = function(&stage, &hypervisor, &by_count, "00:09.0").await;
        let (heavy, heavy_name) = function(&stage, &hypervisor, &by_bytes, "00:0a.0").await;
        let counted_raw = RawDevice::attach(&stage.server, &counted_name, counted).await.expect("admitted");
        let heavy_raw = RawDevice::attach(&stage.server, &heavy_name, heavy).await.expect("admitted");

        let stop = Arc::new(AtomicBool::new(false));
        let requests = tokio::spawn(flood_with_requests(by_count.clone(), counted, Arc::clone(&stop)));
        let operations = tokio::spawn(flood_with_dma(counted_raw, vec![1; 8], Arc::clone(&stop)));
        let bytes = tokio::spawn(flood_with_dma(heavy_raw, vec![1; 4096], Arc::clone(&stop)));
        goes_on(&victim, device, &agent).await;
        stop.store(true, Ordering::SeqCst);
        has_all_its_faults(&victim).await;

        let requests = requests.await.expect("the flood was refused as it must be");
        let (operations, bytes) = (operations.await.expect("refused"), bytes.await.expect("refused"));
        for (refusals, name) in [
            (&requests, "mappings_per_owner".to_owned()),
            (&requests, "requests_per_second".to_owned()),
            (&operations, format!("{OVER_OPERATIONS:#x}")),
            (&operations, "0x5".to_owned()),
            (&bytes, format!("{OVER_BYTES:#x}")),
        ] {
            assert!(refusals.get(&name).is_some_and(|count| *count > 10), "{name}: {refusals:?}");
        }
        let rows = [
            (&by_count, "mappings_per_owner", MAPPINGS),
            (&by_count, "requests_per_second", REQUESTS.into()),
            (&by_count, "dma_operations_per_second", DMA_OPERATIONS.into()),
            (&by_bytes, "dma_bytes_per_second", DMA_BYTES),
        ];
        for (guest, name, allowed) in rows {
            let told = hypervisor.inspect().limits(Some(guest.driver.owner())).await.expect("its limits");
            let limit = told[0].limits.iter().find(|limit| limit.limit == name).expect("it is listed");
            assert_eq!(limit.allowed, allowed, "{name}");
            assert!(limit.refused_count > 10, "{name}: {limit:?}");
        }
        let told = hypervisor.inspect().limits(Some(victim.driver.owner())).await.expect("its limits");
        let refused: Vec<_> = told[0].limits.iter().filter(|limit| limit.refused_count > 0).collect();
        assert!(refused.is_empty(), "the neighbour was refused something: {refused:?}");
    })
    .await;
}
