//! The driver of a virtual machine against a scripted server: its own memory, hypercalls, pools.

mod support;

use std::time::Duration;

use guest_sdk::{
    Connection, DeviceAddress, DmaPool, DomainId, DomainOptions, Driver, Gpa, GpaRange, Owner, Protection,
    SdkError, TransportError, errors,
};
use iommu_proto::errors::WireError;
use iommu_proto::pb;
use support::{Fake, soon};
use tonic::Status;

const VM: Owner = Owner::Vm(3);

fn device() -> DeviceAddress {
    "0000:00:05.0".parse().expect("an address")
}

fn listed(regions: &[(u64, u64)]) -> pb::ListMemoryResponse {
    pb::ListMemoryResponse {
        gpa: regions.iter().map(|region| region.0).collect(),
        size_bytes: regions.iter().map(|region| region.1).collect(),
    }
}

/// A guest whose memory is these regions, all of it full of ones.
async fn guest(fake: &Fake, regions: &[(u64, u64)]) -> Driver {
    fake.state().memory = vec![0xff; 0x10_0000];
    fake.answer("list_memory", listed(regions));
    let connection = Connection::to(fake.start().await).deadline(Duration::from_secs(5));
    connection.driver("guest3", VM).await.expect("the fake opens sessions")
}

#[tokio::test]
async fn buffers_of_a_guest_are_zeroed_pages_of_its_own_memory() {
    let fake = Fake::default();
    let driver = guest(&fake, &[(0x1_0000, 0x1000), (0x4_0000, 0x4000)]).await;
    let (large, small) =
        (driver.allocate(0x1001).await.expect("two"), driver.allocate(1).await.expect("one"));
    assert_eq!(large.range(), GpaRange::new(Gpa::new(0x4_0000), 0x2000).expect("a range"));
    assert_eq!(small.range(), GpaRange::new(Gpa::new(0x1_0000), 0x1000).expect("a range"));
    let memory = fake.state().memory.clone();
    assert!(memory[0x4_0000..0x4_2000].iter().chain(&memory[0x1_0000..0x1_1000]).all(|byte| *byte == 0));
    assert_eq!(memory[0x4_2000], 0xff, "what is behind it is left alone");
    // It is zeroed each time, and freed without asking anybody.
    large.write(0, vec![7; 100]).await.expect("written");
    large.free().await.expect("freed");
    let again = driver.allocate(0x2000).await.expect("two");
    assert_eq!(again.gpa(), Gpa::new(0x4_0000));
    assert_eq!(again.read(0, 100).await.expect("read"), vec![0; 100]);
    for method in ["allocate_buffer", "free_buffer"] {
        assert!(fake.calls(method).is_empty(), "{method}");
    }
}

#[tokio::test]
async fn memory_is_learnt_anew_when_it_runs_out_and_when_asked() {
    let fake = Fake::default();
    let driver = guest(&fake, &[(0x1_0000, 0x1000)]).await;
    let first = driver.allocate(1).await.expect("one");
    fake.answer("list_memory", listed(&[(0x1_0000, 0x1000), (0x2_0000, 0x1000)]));
    assert_eq!(driver.allocate(1).await.expect("one more").gpa(), Gpa::new(0x2_0000));
    fake.answer("list_memory", listed(&[(0x1_0000, 0x1000), (0x2_0000, 0x1000)]));
    let out = errors::OutOfMemory { size_bytes: 5000 };
    assert_eq!(driver.allocate(5000).await.map(|_| ()), Err(SdkError::Refused(out.into())));
    // The first region goes, another comes: what is freed of the first is not used again.
    fake.answer("list_memory", listed(&[(0x2_0000, 0x1000), (0x3_0000, 0x1000)]));
    let regions = driver.memory_regions().await.expect("a list");
    assert_eq!(regions[1], GpaRange::new(Gpa::new(0x3_0000), 0x1000).expect("a range"));
    first.free().await.expect("freed");
    assert_eq!(driver.allocate(1).await.expect("of the new one").gpa(), Gpa::new(0x3_0000));
    assert_eq!(fake.calls("list_memory").len(), 4);
    let none = driver.allocate(0).await.expect_err("nothing was asked for");
    assert!(matches!(none, SdkError::Refused(errors::AllocateError::InvalidField(_))), "{none:?}");
}

#[tokio::test]
async fn memory_that_went_away_before_it_was_zeroed_is_looked_for_elsewhere() {
    let fake = Fake::default();
    let driver = guest(&fake, &[(0x1_0000, 0x1000)]).await;
    let not_owned = errors::MemoryError::from(errors::NotOwned { gpa: Gpa::new(0x1_0000) });
    fake.state().write_failures.push_back(not_owned.into_status());
    fake.answer("list_memory", listed(&[(0x2_0000, 0x1000)]));
    assert_eq!(driver.allocate(1).await.expect("elsewhere").gpa(), Gpa::new(0x2_0000));
}

#[tokio::test]
async fn a_list_of_memory_that_makes_no_sense_is_not_believed() {
    let fake = Fake::default();
    fake.answer("list_memory", listed(&[(0x123, 0x1000)]));
    let opened = Connection::to(fake.start().await).driver("guest3", VM).await;
    assert!(matches!(opened, Err(SdkError::Transport(TransportError::BadAnswer(_)))), "{opened:?}");
}

#[tokio::test]
async fn a_hypercall_has_its_answer_or_a_typed_refusal_and_is_made_once() {
    let fake = Fake::default();
    let driver = guest(&fake, &[]).await;
    fake.answer("hypercall", pb::HypercallResponse { payload: "yes".into() });
    assert_eq!(driver.hypercall("may I?").await.expect("an answer"), "yes");
    assert_eq!(fake.sent::<pb::HypercallRequest>()[0].payload, "may I?");
    for refused in [
        errors::HypercallError::from(errors::NoHypervisor {}),
        errors::HypercallRefused { why: "no".into() }.into(),
        errors::HypercallTimeout { waited_ms: 7 }.into(),
    ] {
        fake.refuse("hypercall", refused.clone());
        assert_eq!(driver.hypercall("may I?").await, Err(SdkError::Refused(refused)));
    }
    fake.fail("hypercall", Status::unavailable("the connection is lost"));
    let lost = soon("an end", driver.hypercall("may I?")).await.expect_err("no answer");
    assert!(matches!(lost, SdkError::Transport(_)), "{lost:?}");
    assert_eq!(fake.calls("hypercall").len(), 5);
}

/// What a pool asks before it takes pages: where the device is, and in which mode.
fn attached(fake: &Fake, protection: Protection) {
    let domain_id = Some(4);
    let state = pb::DeviceState {
        device: Some(device().into()),
        name: "net0".into(),
        domain_id,
        ..Default::default()
    };
    fake.answer("get_topology", pb::GetTopologyResponse { devices: vec![state], ..Default::default() });
    let options = DomainOptions::new(protection);
    let state = pb::DomainState {
        domain_id: DomainId::new(4).get().into(),
        owner: Some(VM.into()),
        options: Some(options.into()),
        ..Default::default()
    };
    fake.answer("list_domains", pb::ListDomainsResponse { domains: vec![state] });
}

#[tokio::test]
async fn a_pool_of_a_guest_is_made_of_its_own_pages_that_stay_mapped() {
    let fake = Fake::default();
    let driver = guest(&fake, &[(0x1_0000, 0x1000)]).await;
    let pool = DmaPool::new(&driver, &driver.device(device()), 1024, 64, 0).expect("a pool");
    attached(&fake, Protection::Strict);
    fake.answer("dma_map", pb::DmaMapResponse { iova: 0x9000 });
    let (first, second) = (pool.alloc().await.expect("a block"), pool.alloc().await.expect("a block"));
    assert_eq!((first.iova().get(), first.range().base().get()), (0x9000, 0x1_0000));
    assert_eq!((second.iova().get(), second.range().base().get()), (0x9400, 0x1_0400));
    let mapped = fake.sent::<pb::DmaMapRequest>();
    assert_eq!(
        (mapped.len(), mapped[0].size_bytes, mapped[0].direction()),
        (1, 4096, pb::Direction::Bidirectional)
    );
    first.free();
    second.free();
    fake.answer("dma_unmap", pb::DmaUnmapResponse {});
    pool.destroy().await.expect("it goes");
    assert_eq!((fake.calls("dma_unmap").len(), driver.leaked_mappings()), (1, 0));
    assert_eq!(driver.allocate(1).await.expect("the same page").gpa(), Gpa::new(0x1_0000));
    assert!(fake.calls("allocate_coherent").is_empty());
}

#[tokio::test]
async fn a_pool_of_a_guest_is_refused_where_its_pages_would_not_be_coherent() {
    let fake = Fake::default();
    let driver = guest(&fake, &[(0x1_0000, 0x1000)]).await;
    let pool = DmaPool::new(&driver, &driver.device(device()), 1024, 64, 0).expect("a pool");
    attached(&fake, Protection::BOUNCE);
    let refused = pool.alloc().await.expect_err("copies are not coherent");
    let SdkError::Refused(errors::DmaMapError::ModeRefuses(mode)) = refused else { panic!("{refused:?}") };
    assert_eq!(mode.mode, "bounce");
    // Nor does a map that is refused keep the page.
    attached(&fake, Protection::Strict);
    fake.refuse("dma_map", errors::NotAttached { device: device() });
    pool.alloc().await.expect_err("not attached");
    assert_eq!(driver.allocate(1).await.expect("the page").gpa(), Gpa::new(0x1_0000));
}
