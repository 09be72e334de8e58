//! Guests that share one engine without an IOMMU of their own, with real processes.

use engine_driver::{EngineBackend, PATTERN};
use guest_sdk::multiplexer::{Ended, Entry, MultiplexedDevice, Multiplexer};
use guest_sdk::{Driver, Gpa, GpaRange, Revocation, VmOptions};
use iommu_e2e::stage::{Stage, address, soon, within};

const GUEST_BYTES: u64 = 1 << 20;
const GUEST_BASE: Gpa = Gpa::new(0x10_0000);

fn all() -> GpaRange {
    GpaRange::new(GUEST_BASE, GUEST_BYTES).expect("a range")
}

/// What one guest does, and what it sees.
async fn use_device(driver: &Driver, byte: u8) {
    let device = MultiplexedDevice::new(driver);
    let (sent, received) =
        (driver.allocate(8192).await.expect("a buffer"), driver.allocate(8192).await.expect("one"));
    sent.write(0, vec![byte; 8192]).await.expect("written");
    for round in 0..10 {
        let entries = vec![
            Entry::transmit(sent.slice(round, 1500).expect("a slice")),
            Entry::receive(received.slice(8 * round, 64).expect("a slice")),
            Entry::receive(received.slice(4096 + 8 * round, 1024).expect("a slice")),
            // Just behind the guest's memory.
            Entry::receive(GpaRange::new(all().last(), 2).expect("a range")),
        ];
        let done = |bytes| Ended::Done { bytes };
        let ended = device.run(entries).await.expect("an answer");
        assert_eq!(ended, [done(1500), done(64), done(1024), Ended::NotYours]);
    }
    let pattern = PATTERN.to_le_bytes()[0];
    let seen = received.read(0, 8192).await.expect("read");
    assert!(seen[..9 * 8 + 64].iter().all(|byte| *byte == pattern), "what the device wrote");
    assert!(seen[9 * 8 + 64..4096].iter().all(|byte| *byte == 0), "and nothing else");
    assert_eq!(sent.read(0, 8192).await.expect("read"), vec![byte; 8192], "nobody else writes here");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn guests_share_an_engine_by_copying_and_none_sees_another() {
    within(60, async {
        let mut stage = Stage::start(&[]).await;
        let _engine = stage.engine(0).await;
        let host = stage.driver(0).await;
        let hypervisor = stage.hypervisor("hv0").await;
        let backend = EngineBackend::start(&host, address(0)).await.expect("the engine starts");
        let mut guests = Vec::new();
        for name in ["guest1", "guest2"] {
            let vm = hypervisor.create_vm(VmOptions::new(name)).await.expect("a machine");
            vm.add_memory(all()).await.expect("memory");
            guests.push((stage.guest(name, vm.number()).await, vm));
        }
        let multiplexer = Multiplexer::new(hypervisor.clone(), backend);
        let counters = multiplexer.counters();
        let listening = multiplexer.listen().await.expect("it serves");
        let running = tokio::spawn(listening.run());

        tokio::join!(use_device(&guests[0].0, 0x11), use_device(&guests[1].0, 0x22));
        let total = counters.total();
        assert_eq!((total.requests, total.packets, total.failed), (20, 60, 20));
        assert_eq!(total.bytes_copied, 20 * (1500 + 64 + 1024));
        assert_eq!(counters.guests()[&guests[0].1.number()], counters.guests()[&guests[1].1.number()]);
        running.abort();

        // No guest's memory was ever open to the device, so that it goes without revoking anything.
        for (driver, vm) in guests {
            assert_eq!(vm.remove_memory(all(), Revocation::Refuse).await, Ok(0));
            assert_eq!(driver.memory_regions().await.expect("a list"), []);
            vm.destroy().await.expect("it goes");
        }
        soon("the machines are gone", async || hypervisor.vms().await.ok().filter(Vec::is_empty)).await;
    })
    .await;
}
