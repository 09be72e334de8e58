//! Direct maps and the memory that they show, while something is in flight: whose drain has to be waited for changes nothing.

mod support;

use std::time::Duration;

use iommu_hardware::vtd::Port;
use iommu_proto::pb::Protection::{Passthrough, Strict};
use iommu_server::server::Server;
use iommu_types::SourceId;
use support::*;

/// A port of engine 0, beside that of its agent. A burst of it is DMA in flight.
fn port(server: &Server) -> Port {
    let source = SourceId::new(u16::try_from(ENGINE0).unwrap());
    server.host.kernel.unit().port(source).unwrap()
}

/// Long enough for a call to get as far as it can.
async fn a_moment() {
    tokio::time::sleep(Duration::from_millis(100)).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn i9_a_buffer_that_is_mapped_while_it_is_freed_is_not_freed() {
    let server = server().await;
    let driver = Driver::open(&server, 0).await;
    let mut agent = Agent::attach(&server, ENGINE0).await;
    driver.domain(mode(Passthrough)).await;
    let gpa = driver.buffer(PAGE).await;
    let mut port = port(&server);
    let in_flight = port.burst();
    let (freed, iova) = tokio::join!(driver.free(gpa), async {
        a_moment().await;
        let iova = driver.map(ENGINE0, gpa, PAGE).await.unwrap();
        drop(in_flight);
        iova
    });
    assert_eq!(refused(freed), "STILL_MAPPED");
    agent.write(iova, b"mine").await.expect("it is open again");
    assert_eq!(driver.read(gpa, 4).await, "mine");
    driver.unmap(ENGINE0, iova, PAGE).await.unwrap();
    driver.free(gpa).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_refused_free_closes_nothing_for_a_moment() {
    let server = server().await;
    let driver = Driver::open(&server, 0).await;
    let gpa = driver.buffer(PAGE).await;
    // Pinned by a mapping in another domain.
    let iova = driver.map(ENGINE0, gpa, PAGE).await.unwrap();
    let direct = driver.domain(mode(Passthrough)).await;
    let before = driver.domain_state(direct).await;
    assert_eq!(refused(driver.free(gpa).await), "STILL_MAPPED");
    let after = driver.domain_state(direct).await;
    assert_eq!((after.maps, after.unmaps), (before.maps, before.unmaps), "it stayed open");
    driver.unmap(ENGINE0, iova, PAGE).await.unwrap();
    driver.free(gpa).await.unwrap();
    assert_eq!(driver.domain_state(direct).await.unmaps, before.unmaps + 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn of_two_frees_at_once_one_frees_and_both_are_answered_rightly() {
    let server = server().await;
    let driver = Driver::open(&server, 0).await;
    driver.domain(mode(Passthrough)).await;
    let gpa = driver.buffer(PAGE).await;
    let mut port = port(&server);
    let in_flight = port.burst();
    let (one, other, ()) = tokio::join!(driver.free(gpa), driver.free(gpa), async {
        a_moment().await;
        drop(in_flight);
    });
    let (freed, refusals): (Vec<_>, Vec<_>) = [one, other].into_iter().partition(Result::is_ok);
    assert_eq!((freed.len(), refusals.len()), (1, 1));
    assert_eq!(refusals.into_iter().map(refused).collect::<Vec<_>>(), ["NOT_ALLOCATED"]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_passthrough_domain_that_cannot_be_made_leaves_nothing_behind_whatever_is_in_flight() {
    let server = server_with(|args| args.memory = Some("16MiB".to_owned())).await;
    let driver = Driver::open(&server, 0).await;
    let operator = operator(&server).await;
    let held = async || topology(&operator).await.owners[0].clone();
    // Direct maps of all buffers, until one more would go beyond the owner's limit on mappings.
    let buffers = 1000;
    for _ in 0..buffers {
        driver.buffer(PAGE).await;
    }
    let limit = (16 << 20) / 2048;
    for _ in 0..limit / buffers {
        driver.create_domain(mode(Passthrough)).await.unwrap();
    }
    // The identifier that the next domain gets is one in which a port has been that is busy now, attached to nothing.
    let former = driver.domain(mode(Strict)).await;
    let mut port = port(&server);
    drop(port.burst());
    driver.detach(ENGINE0).await.unwrap();
    driver.destroy(former).await.unwrap();
    let in_use = held().await;
    let in_flight = port.burst();
    let (refusal, ()) = tokio::join!(driver.create_domain(mode(Passthrough)), async {
        a_moment().await;
        drop(in_flight);
    });
    assert_eq!(refused(refusal), "LIMIT_REACHED");
    let left = held().await;
    assert_eq!((left.mappings, left.domain_ids), (in_use.mappings, in_use.domain_ids));
    assert_eq!(driver.create_domain(mode(Strict)).await.unwrap(), former, "its identifier is free, too");
}
