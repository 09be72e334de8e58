//! Two tenants on one server, each at work and each attacking the other for a while: whatever they do, no canary is touched, no legitimate DMA is
//! refused, and each has its own faults in its log. What they do follows from a seed, which is printed.

mod attack;
mod flood;
mod plan;
mod work;
mod world;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use guest_sdk::Direction;
use iommu_e2e::random::seed;
use iommu_e2e::stage::within;
use tokio::task::JoinSet;
use world::World;

/// How long they go on; this variable, in seconds, says otherwise.
const SECONDS: &str = "IOMMU_TENANTS_SECONDS";
const SECONDS_USUALLY: u64 = 10;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn i2_i6_i7_tenants_that_attack_each_other_at_work_reach_nothing_of_each_other() {
    let seed = seed("tenants");
    let seconds = std::env::var(SECONDS).ok().and_then(|text| text.parse().ok()).unwrap_or(SECONDS_USUALLY);
    within(60 + seconds, async {
        let world = Arc::new(World::begin().await);
        let stop = Arc::new(AtomicBool::new(false));
        let mut tasks = JoinSet::new();
        for tenant in 0..2 {
            let (of_work, of_attack) = (Arc::clone(&world), Arc::clone(&world));
            let (stop_work, stop_attack) = (Arc::clone(&stop), Arc::clone(&stop));
            tasks.spawn(work::work(of_work, tenant, seed, stop_work));
            tasks.spawn(attack::attack(of_attack, tenant, seed, stop_attack));
        }
        let started = Instant::now();
        while started.elapsed() < Duration::from_secs(seconds) {
            world.canaries_are_whole().await.unwrap_or_else(|why| panic!("seed {seed}: {why}"));
            let ended = tokio::time::timeout(Duration::from_millis(200), tasks.join_next()).await;
            if let Ok(Some(ended)) = ended {
                panic!("seed {seed}: {}", ended.expect_err("nobody ends by itself"));
            }
        }
        stop.store(true, Ordering::SeqCst);
        while let Some(ended) = tasks.join_next().await {
            ended.unwrap_or_else(|error| panic!("seed {seed}: {error}"));
        }
        world.canaries_are_whole().await.unwrap_or_else(|why| panic!("seed {seed}: {why}"));
        world.logs_are_their_owners().await;
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_watch_over_the_canaries_sees_a_single_byte() {
    within(60, async {
        let world = World::begin().await;
        assert_eq!(world.canaries_are_whole().await, Ok(()));
        let worker = &world.tenants[1].worker;
        let port = worker.guest.driver.device(worker.port);
        let place = worker.canary.buffer.slice(4096 + 7, 1).expect("inside the canary");
        let mapping = worker.guest.driver.dma_map_single(&port, place, Direction::FromDevice).await;
        let mapping = mapping.expect("its own memory");
        worker.port_agent.dma.write(mapping.iova(), vec![0x66]).await.expect("it is mapped");
        mapping.unmap().await.expect("an unmap");
        let seen = world.canaries_are_whole().await.expect_err("a byte was changed");
        assert!(seen.contains("tenant 1") && seen.contains("4103"), "{seen}");
    })
    .await;
}
