//! Device sessions: Hello, DMA, MMIO, interrupts, fencing, limits, and peers that break the rules.

mod support;

use std::time::{Duration, Instant};

use bytes::Bytes;
use iommu_proto::pb;
use support::*;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn dma_reaches_exactly_what_is_mapped() {
    let server = server().await;
    let (driver, mut agent, gpa, iova) = mapped(&server, 2).await;
    driver.write(gpa, b"from the cpu").await;
    assert_eq!(agent.read(iova, 12).await.unwrap(), "from the cpu");
    agent.write(iova + PAGE - 3, b"across").await.unwrap();
    assert_eq!(driver.read(gpa + PAGE - 3, 6).await, "across");
    // One page beyond: refused there, and the bytes before are given.
    let answer = agent.batch(read_batch(&[iova + 2 * PAGE - 8], 16)).await;
    assert_eq!(answer.fault_iova, [iova + 2 * PAGE]);
    assert_eq!(answer.fault_done_bytes, [8]);
    assert_eq!(answer.payload.len(), 8);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_batch_goes_on_after_a_fault_and_keeps_its_order() {
    let server = server().await;
    let (driver, mut agent, gpa, iova) = mapped(&server, 1).await;
    driver.write(gpa, &[7; 64]).await;
    let batch = pb::DmaBatch {
        first_tag: 9,
        iova: vec![iova, 0x10_0000_0000, iova + 8, iova + 16, iova + 8],
        size_bytes: vec![8, 8, 4, 8, 4],
        kind: Bytes::from_static(&[0, 0, 3, 1, 77]),
        payload: Bytes::from_static(&[1, 0, 0, 0, 9, 9, 9, 9, 9, 9, 9, 9]),
        ..Default::default()
    };
    let answer = agent.batch(batch).await;
    assert_eq!(answer.first_tag, 9);
    assert_eq!(answer.fault_index, [1, 4]);
    assert_eq!(answer.fault_reason[1], 0x1003, "an unknown kind is malformed");
    assert_eq!(&answer.payload[..], [7; 12], "the read, then the old value of the atomic");
    assert_eq!(&driver.read(gpa + 8, 16).await[..], [8, 7, 7, 7, 7, 7, 7, 7, 9, 9, 9, 9, 9, 9, 9, 9]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn i1_after_an_unmap_is_answered_no_dma_uses_it() {
    let server = server().await;
    let (driver, mut agent, _, iova) = mapped(&server, 1).await;
    assert!(agent.read(iova, 64).await.is_ok());
    driver.unmap(ENGINE0, iova, PAGE).await.unwrap();
    assert!(agent.read(iova, 64).await.is_err());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_device_that_claims_to_have_translated_by_itself_is_refused() {
    let server = server().await;
    let (_driver, mut agent, _, iova) = mapped(&server, 1).await;
    for address_type in [1, 2] {
        let answer = agent.batch(pb::DmaBatch { address_type, ..read_batch(&[iova], 8) }).await;
        assert_eq!((&answer.fault_index[..], &answer.fault_reason[..]), (&[0][..], &[0xd][..]));
    }
    assert!(agent.read(iova, 8).await.is_ok(), "the same address, untranslated");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn i6_a_refused_dma_is_answered_counted_and_recorded() {
    let server = server().await;
    let operator = operator(&server).await;
    let mut agent = Agent::attach(&server, ENGINE2).await;
    assert_eq!(agent.read(0x1000, 4).await, Err(0x2), "the context entry is not present");
    let state = device_state(&operator, ENGINE2).await;
    assert_eq!((state.faults, state.operations, state.connected), (1, 0, true));
    let listed = faults(&operator).list(pb::ListFaultsRequest::default()).await.unwrap().into_inner();
    let record = listed.records.iter().find(|record| record.device == Some(device(ENGINE2))).unwrap();
    assert_eq!(record.owner, None);
    assert!(matches!(&record.fault, Some(pb::fault_record::Fault::Dma(fault)) if fault.reason == 2));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn i8_a_device_is_only_who_the_configuration_knows() {
    let server = server().await;
    let cases = [
        (pb::Hello { schema_version: 2, ..hello(device(ENGINE0), "engine0") }, "VERSION_MISMATCH"),
        (hello(device(ENGINE0), "engine1"), "IDENTITY_REFUSED"),
        (hello(device(0x99), "engine0"), "IDENTITY_REFUSED"),
        (pb::Hello { mmio_credits: 0, ..hello(device(ENGINE0), "engine0") }, "INVALID_FIELD"),
        (pb::Hello { mmio_credits: 257, ..hello(device(ENGINE0), "engine0") }, "INVALID_FIELD"),
        (pb::Hello { address: None, ..hello(device(ENGINE0), "engine0") }, "INVALID_FIELD"),
        (hello(pb::DeviceAddress { segment: 1 << 16, source_id: 8 }, "engine0"), "INVALID_FIELD"),
        (hello(device(ENGINE0), ""), "INVALID_FIELD"),
    ];
    for (hello, expected) in cases {
        let mut agent = Agent::silent(&server).await;
        assert_eq!(refused(agent.greet(hello.clone()).await), expected, "{hello:?}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn i8_a_connection_is_one_peer_for_ever() {
    let server = server().await;
    let channel = connect(&server).await;
    let mut first = Agent::silent_on(channel.clone()).await;
    first.greet(hello(device(ENGINE0), "engine0")).await.unwrap();
    let mut other = Agent::silent_on(channel.clone()).await;
    assert_eq!(refused(other.greet(hello(device(ENGINE1), "engine1")).await), "SESSION_EXISTS");
    assert_eq!(refused(open(&channel, open_request("driver0", driver_role(0))).await), "SESSION_EXISTS");
    let driver = Driver::open(&server, 0).await;
    let mut agent = Agent::silent_on(driver.channel.clone()).await;
    assert_eq!(refused(agent.greet(hello(device(ENGINE0), "engine0")).await), "SESSION_EXISTS");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_second_session_of_a_device_fences_the_first() {
    let server = server().await;
    let operator = operator(&server).await;
    let (_driver, mut first, _, iova) = mapped(&server, 1).await;
    let mut second = Agent::silent(&server).await;
    let welcome = second.greet(hello(device(ENGINE0), "engine0")).await.unwrap();
    assert_eq!(welcome.generation, 2);
    assert_eq!(first.ending().await, "SESSION_FENCED");
    assert!(second.read(iova, 8).await.is_ok());
    assert_eq!(device_state(&operator, ENGINE0).await.generation, 2);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_breaks_the_rules_of_the_stream_is_told_which() {
    let server = server().await;
    let bad: Vec<(&str, Option<Up>)> = vec![
        ("a second Hello", Some(Up::Hello(hello(device(ENGINE0), "engine0")))),
        ("no message", None),
        (
            "an answer to nothing",
            Some(Up::Mmio(pb::MmioCompletion {
                tag: 99,
                outcome: Some(pb::mmio_completion::Outcome::Value(1)),
            })),
        ),
        (
            "columns that do not add up",
            Some(Up::Dma(pb::DmaBatch { iova: vec![1, 2, 3], size_bytes: vec![1, 2], ..Default::default() })),
        ),
        ("a reset that nobody asked for", Some(Up::ResetDone(pb::ResetDone { tag: 1 }))),
        ("too many operations", Some(Up::Dma(read_batch(&vec![0; 2000], 1)))),
    ];
    for (what, message) in bad {
        let mut agent = Agent::attach(&server, ENGINE0).await;
        agent.up.send(pb::DeviceToServer { message }).await.unwrap();
        assert_eq!(agent.ending().await, "PROTOCOL_VIOLATION", "{what}");
    }
    let mut agent = Agent::silent(&server).await;
    agent.send(Up::ResetDone(pb::ResetDone { tag: 1 })).await;
    assert_eq!(agent.ending().await, "PROTOCOL_VIOLATION", "something before Hello");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_batch_over_the_byte_limit_is_refused_and_nothing_changes() {
    let server = server().await;
    let (_driver, mut agent, _, iova) = mapped(&server, 1).await;
    let answer = agent.batch(read_batch(&[iova; 3], 1 << 20)).await;
    assert_eq!(answer.fault_reason, [0x1002; 3]);
    assert!(answer.payload.is_empty());
    assert!(agent.read(iova, 8).await.is_ok(), "the session goes on");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_oversized_message_has_a_typed_error() {
    let server = server().await;
    let mut agent = Agent::attach(&server, ENGINE0).await;
    agent.send(Up::Dma(write_batch(0x1000, &vec![0; 5 << 20]))).await;
    assert_eq!(agent.ending().await, "MESSAGE_TOO_LARGE");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn mmio_reaches_the_device_and_comes_back() {
    let server = server().await;
    let driver = Driver::open(&server, 0).await;
    let mut agent = Agent::attach(&server, ENGINE0).await;
    let serve = tokio::spawn(async move {
        for outcome in [
            pb::mmio_completion::Outcome::Value(0x1234_5678_9abc),
            pb::mmio_completion::Outcome::Value(0),
            pb::mmio_completion::Outcome::Refused("no such register".to_owned()),
        ] {
            let Down::Mmio(request) = agent.receive().await.unwrap() else { panic!("no MMIO") };
            let outcome = Some(outcome);
            agent.send(Up::Mmio(pb::MmioCompletion { tag: request.tag, outcome })).await;
        }
        agent
    });
    let read =
        |width_bytes| pb::MmioReadRequest { device: Some(device(ENGINE0)), bar: 0, offset: 8, width_bytes };
    let write =
        pb::MmioWriteRequest { device: Some(device(ENGINE0)), bar: 0, offset: 8, width_bytes: 4, value: 1 };
    let value = driver.client().mmio_read(read(4)).await.unwrap().into_inner().value;
    assert_eq!(value, 0x5678_9abc, "what does not fit the width is cut off");
    driver.client().mmio_write(write).await.unwrap();
    assert_eq!(refused(driver.client().mmio_read(read(8)).await), "MMIO_REFUSED");
    drop(serve.await.unwrap());
    assert_eq!(refused(driver.client().mmio_read(read(3)).await), "INVALID_FIELD");
    eventually("the device is gone", async || {
        driver.client().mmio_read(read(4)).await.is_err_and(|status| reason(&status) == "DEVICE_ABSENT")
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn mmio_that_waits_ends_when_its_device_goes() {
    let server = server().await;
    let driver = Driver::open(&server, 0).await;
    let mut agent = Agent::attach(&server, ENGINE0).await;
    let mut client = driver.client();
    let call = tokio::spawn(async move {
        let device = Some(device(ENGINE0));
        client.mmio_read(pb::MmioReadRequest { device, bar: 0, offset: 0, width_bytes: 4 }).await
    });
    assert!(matches!(agent.receive().await.unwrap(), Down::Mmio(_)));
    drop(agent);
    assert_eq!(refused(call.await.unwrap()), "DEVICE_ABSENT");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn i7_mmio_to_a_device_that_does_not_answer_is_bounded() {
    let server = server().await;
    let driver = Driver::open(&server, 0).await;
    let agent = Agent::attach(&server, ENGINE0).await;
    let others = Driver::open(&server, 1).await;
    let mut calls = tokio::task::JoinSet::new();
    // More than one connection may have streams: spread over several of the same identity is not possible, so stay below.
    for _ in 0..200 {
        let mut client = driver.client();
        calls.spawn(async move {
            let device = Some(device(ENGINE0));
            client.mmio_read(pb::MmioReadRequest { device, bar: 0, offset: 0, width_bytes: 4 }).await
        });
    }
    // Another tenant goes on meanwhile.
    let gpa = others.buffer(PAGE).await;
    assert!(others.map(ENGINE1, gpa, PAGE).await.is_ok());
    drop(agent);
    while let Some(call) = calls.join_next().await {
        assert_eq!(refused(call.unwrap()), "DEVICE_ABSENT");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_interrupt_reaches_its_owner_and_nobody_else() {
    let server = server().await;
    let driver = Driver::open(&server, 0).await;
    let mut agent = Agent::attach(&server, ENGINE0).await;
    let other = Driver::open(&server, 1).await;
    let mut watch =
        driver.client().watch_interrupts(pb::WatchInterruptsRequest {}).await.unwrap().into_inner();
    let mut other_watch =
        other.client().watch_interrupts(pb::WatchInterruptsRequest {}).await.unwrap().into_inner();
    assert!(watch.message().await.unwrap().unwrap().interrupts.is_empty());
    assert!(other_watch.message().await.unwrap().unwrap().interrupts.is_empty());
    let request = pb::AllocateInterruptRequest { header: driver.header(), device: Some(device(ENGINE0)) };
    let interrupt = driver.client().allocate_interrupt(request).await.unwrap().into_inner();
    agent.write(interrupt.address, &interrupt.data.to_le_bytes()).await.unwrap();
    let told = watch.message().await.unwrap().unwrap().interrupts;
    assert_eq!((told[0].vector, told[0].device), (interrupt.vector, Some(device(ENGINE0))));
    // The same message by another device is refused: the entry admits its source only.
    let mut stranger = Agent::attach(&server, ENGINE1).await;
    assert_eq!(stranger.write(interrupt.address, &interrupt.data.to_le_bytes()).await, Err(0x26));
    let nothing = tokio::time::timeout(Duration::from_millis(50), other_watch.message()).await;
    assert!(nothing.is_err(), "{nothing:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn mmio_dma_and_interrupts_that_cross_do_not_deadlock() {
    const CALLS: usize = 400;
    let server = server().await;
    let (driver, mut agent, _, iova) = mapped(&server, 16).await;
    let request = pb::AllocateInterruptRequest { header: driver.header(), device: Some(device(ENGINE0)) };
    let interrupt = driver.client().allocate_interrupt(request).await.unwrap().into_inner();
    let mut watch =
        driver.client().watch_interrupts(pb::WatchInterruptsRequest {}).await.unwrap().into_inner();
    let watching = tokio::spawn(async move {
        let mut seen = 0;
        while seen < CALLS as u32 {
            let told = watch.message().await.unwrap().unwrap().interrupts;
            seen += told.iter().map(|interrupt| interrupt.count).sum::<u32>();
        }
    });
    let mut calls = tokio::task::JoinSet::new();
    let gate = std::sync::Arc::new(tokio::sync::Semaphore::new(100));
    for _ in 0..CALLS {
        let (mut client, gate) = (driver.client(), gate.clone());
        calls.spawn(async move {
            let _place = gate.acquire_owned().await;
            let device = Some(device(ENGINE0));
            client
                .mmio_read(pb::MmioReadRequest { device, bar: 0, offset: 0, width_bytes: 4 })
                .await
                .unwrap();
        });
    }
    // For each register access a large read and an interrupt, with many batches in flight.
    let up = agent.up.clone();
    let flood = tokio::spawn(async move {
        for _ in 0..CALLS {
            let messages = [
                Up::Dma(read_batch(&[iova], 65_536)),
                Up::Dma(write_batch(interrupt.address, &interrupt.data.to_le_bytes())),
            ];
            for message in messages {
                up.send(pb::DeviceToServer { message: Some(message) }).await.unwrap();
            }
        }
    });
    let mut completions = 0;
    let mut answered = 0;
    while completions < 2 * CALLS || answered < CALLS {
        match agent.receive().await.unwrap() {
            Down::Dma(answer) => {
                assert!(answer.fault_index.is_empty());
                completions += 1;
            }
            Down::Mmio(request) => {
                answered += 1;
                let outcome = Some(pb::mmio_completion::Outcome::Value(0));
                // Answers go the same way as the flood: an agent that cannot write still reads.
                let (up, message) = (agent.up.clone(), pb::MmioCompletion { tag: request.tag, outcome });
                tokio::spawn(async move {
                    up.send(pb::DeviceToServer { message: Some(Up::Mmio(message)) }).await.unwrap();
                });
            }
            other => panic!("{other:?}"),
        }
    }
    flood.await.unwrap();
    while let Some(call) = calls.join_next().await {
        call.unwrap();
    }
    tokio::time::timeout(SOON, watching).await.expect("all interrupts are told").unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nagle_is_off_a_large_read_alone_takes_no_40_ms() {
    let server = server().await;
    let (_driver, mut agent, _, iova) = mapped(&server, 16).await;
    let mut took = Vec::new();
    for _ in 0..25 {
        let began = Instant::now();
        assert_eq!(agent.read(iova, 65_536).await.unwrap().len(), 65_536);
        took.push(began.elapsed());
    }
    took.sort_unstable();
    assert!(took[12] < Duration::from_millis(20), "median {:?}", took[12]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_reset_reaches_the_device_when_its_driver_is_reclaimed() {
    let server = server().await;
    let (driver, mut agent, _, iova) = mapped(&server, 1).await;
    drop(driver);
    let Down::Reset(reset) = agent.receive().await.unwrap() else { panic!("no reset") };
    agent.send(Up::Dma(read_batch(&[iova], 8))).await;
    let Down::Dma(answer) = agent.receive().await.unwrap() else { panic!("no completions") };
    assert_eq!(answer.fault_reason, [0x1001], "what it had queued is stale until it says that it was reset");
    agent.send(Up::ResetDone(pb::ResetDone { tag: reset.tag })).await;
    eventually("nothing is mapped any more", async || agent.read(iova, 8).await.is_err()).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_register_access_that_waited_does_not_reach_a_device_that_changed_hands() {
    let server = server().await;
    let driver = Driver::open(&server, 0).await;
    let operator = operator(&server).await;
    let mut agent = Agent::silent(&server).await;
    agent.greet(pb::Hello { mmio_credits: 1, ..hello(device(ENGINE0), "engine0") }).await.unwrap();
    let write = |value| {
        let mut client = driver.client();
        let device = Some(device(ENGINE0));
        let request = pb::MmioWriteRequest { device, bar: 0, offset: 0, width_bytes: 4, value };
        tokio::spawn(async move { client.mmio_write(request).await })
    };
    let first = write(1);
    let Down::Mmio(taken) = agent.receive().await.unwrap() else { panic!("no MMIO") };
    let waiting = write(2);
    tokio::time::sleep(Duration::from_millis(50)).await;
    let give =
        pb::AttachToOwnerRequest { device: Some(device(ENGINE0)), owner: Some(owner(1)), domain_id: None };
    let given = tokio::spawn(async move { admin(&operator).attach_to_owner(give).await });
    let Down::Reset(reset) = agent.receive().await.unwrap() else { panic!("no reset") };
    agent.send(Up::ResetDone(pb::ResetDone { tag: reset.tag })).await;
    given.await.unwrap().unwrap();
    let outcome = Some(pb::mmio_completion::Outcome::Value(0));
    agent.send(Up::Mmio(pb::MmioCompletion { tag: taken.tag, outcome })).await;
    first.await.unwrap().unwrap();
    let nothing = tokio::time::timeout(Duration::from_millis(100), agent.receive()).await;
    assert!(nothing.is_err(), "{nothing:?}");
    assert_eq!(refused(waiting.await.unwrap()), "DEVICE_ABSENT");
}
