//! Sessions: handshake, reconnect, fencing, reset, stopping, and what happens when the server breaks the
//! rules.

mod support;

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use device_runtime::{
    Agent, AgentBuilder, Backoff, DeviceModel, Dma, DmaError, EndReason, LinkState, MmioRefusal, Reconnect,
    Register,
};
use iommu_proto::model::{FromDevice, ToDevice};
use iommu_proto::pb;
use iommu_types::errors::{IdentityRefused, SessionError, SessionFenced, ShuttingDown};
use iommu_types::{Generation, Iova};
use support::{FakeServer, address, soon};
use tokio_util::sync::CancellationToken;

/// Counts resets; reading a register reads memory, writing does nothing.
#[derive(Default)]
struct Counting {
    resets: Arc<AtomicU32>,
}

impl DeviceModel for Counting {
    async fn mmio_read(&self, register: Register, dma: &Dma) -> Result<u64, MmioRefusal> {
        let read = dma.read(Iova::new(register.offset), 8).await;
        read.map(|bytes| bytes[0].into()).map_err(|error| MmioRefusal::new(error.to_string()))
    }
    async fn mmio_write(&self, _: Register, _: u64, _: &Dma) -> Result<(), MmioRefusal> {
        Ok(())
    }
    async fn reset(&self) {
        self.resets.fetch_add(1, Ordering::SeqCst);
    }
}

/// Comes back at once, so that tests do not wait.
const AT_ONCE: Reconnect = Reconnect {
    first: Duration::from_millis(1),
    longest: Duration::from_millis(2),
    seed: Some(1),
    ..Reconnect::STANDARD
};

fn agent(server: &FakeServer) -> AgentBuilder {
    Agent::builder(server.endpoint(), "copy0", address()).reconnect(AT_ONCE)
}

#[tokio::test]
async fn the_handshake_says_who_the_device_is_and_takes_the_limits() {
    let server = FakeServer::start().await;
    let agent = agent(&server).build();
    let dma = agent.dma();
    let running = tokio::spawn(agent.run(Counting::default()));
    let attached = server.attached().await;
    assert_eq!((attached.hello.schema_version, attached.hello.name.as_str()), (1, "copy0"));
    assert_eq!(attached.hello.address, address());
    assert!(dma.limits().is_none(), "there is no session before Welcome");
    assert_eq!(dma.read(Iova::new(0), 1).await, Err(DmaError::SessionLost));
    attached.welcome(7, 3);
    let limits = soon("a session", dma.connected()).await.expect("the agent runs");
    assert_eq!((limits.dma_credits, limits.batch_operations_max, limits.batch_bytes_max), (3, 256, 1 << 20));
    assert!(matches!(&*dma.watch().borrow(), LinkState::Up { generation: Generation(7), .. }));
    running.abort();
}

#[tokio::test]
async fn a_lost_session_fails_what_is_in_flight_and_another_one_takes_its_place() {
    let server = FakeServer::start().await;
    let agent = agent(&server).build();
    let dma = agent.dma();
    let running = tokio::spawn(agent.run(Counting::default()));
    let mut first = server.welcomed(1, 4).await;
    soon("a session", dma.connected()).await;
    let read = tokio::spawn({
        let dma = dma.clone();
        async move { dma.read(Iova::new(0x1000), 8).await }
    });
    first.batch().await;
    first.end(ShuttingDown {});
    assert_eq!(soon("the end of the read", read).await.unwrap(), Err(DmaError::SessionLost));
    let mut second = server.welcomed(2, 4).await;
    let again = async {
        dma.connected().await;
        dma.read(Iova::new(0x2000), 2).await
    };
    let serve = async {
        let batch = second.batch().await;
        second.complete(&batch, vec![1, 2]);
    };
    let (read, ()) = soon("a read over the second session", async { tokio::join!(again, serve) }).await;
    assert_eq!(&read.unwrap()[..], [1, 2]);
    running.abort();
}

#[tokio::test(start_paused = true)]
async fn attempts_are_as_far_apart_as_the_seed_says_and_end_after_the_last_one() {
    let policy = Reconnect { attempts_max: Some(6), seed: Some(42), ..Reconnect::STANDARD };
    let mut expected = Backoff::new(&policy);
    let expected = (0..6).map(|_| expected.next_delay()).collect::<Vec<_>>();
    let agent =
        Agent::builder("unix:///nonexistent/iommu.sock", "copy0", address()).reconnect(policy).build();
    let mut state = agent.dma().watch();
    let begin = tokio::time::Instant::now();
    let running = tokio::spawn(agent.run(Counting::default()));
    let mut delays = Vec::new();
    loop {
        state.changed().await.unwrap();
        match &*state.borrow_and_update() {
            LinkState::Down { retry_in, .. } => delays.push(*retry_in),
            LinkState::Ended { .. } => break,
            LinkState::Up { .. } => panic!("nobody is there"),
        }
    }
    assert_eq!(delays, expected);
    let waited = begin.elapsed();
    let sum = expected.iter().sum::<Duration>();
    assert!(waited >= sum && waited < sum + Duration::from_secs(1), "{waited:?} for delays of {sum:?}");
    assert!(matches!(running.await.unwrap(), Err(EndReason::Lost(_))));
}

#[tokio::test]
async fn a_fenced_agent_does_not_come_back_unless_it_is_told_to() {
    for after_fenced in [false, true] {
        let server = FakeServer::start().await;
        let policy = Reconnect { after_fenced, ..AT_ONCE };
        let running = tokio::spawn(agent(&server).reconnect(policy).run(Counting::default()));
        server.welcomed(1, 1).await.end(SessionFenced { by_generation: 2 });
        if after_fenced {
            server.welcomed(3, 1).await;
            running.abort();
        } else {
            let ended = soon("the end", running).await.unwrap();
            assert_eq!(ended, Err(EndReason::Fenced(SessionFenced { by_generation: 2 })));
        }
    }
}

#[tokio::test]
async fn a_refused_identity_ends_the_agent_with_the_typed_error() {
    let server = FakeServer::start().await;
    let running = tokio::spawn(agent(&server).run(Counting::default()));
    let refused = IdentityRefused { name: "copy0".into(), why: "no such device".into() };
    server.attached().await.end(refused.clone());
    let ended = soon("the end", running).await.unwrap();
    assert_eq!(ended, Err(EndReason::Refused(SessionError::IdentityRefused(refused))));
}

#[tokio::test]
async fn a_server_that_breaks_the_rules_is_told_which_one() {
    let unasked = pb::DmaCompletions { first_tag: 9, ..Default::default() };
    let cases: Vec<(&str, pb::ServerToDevice, &str)> = vec![
        ("unknown oneof case", pb::ServerToDevice { message: None }, "message: is absent, or of a kind"),
        ("completions unasked", ToDevice::Dma(unasked).into(), "while no batch is in flight"),
        (
            "second Welcome",
            pb::ServerToDevice {
                message: Some(pb::server_to_device::Message::Welcome(pb::Welcome {
                    schema_version: 1,
                    ..Default::default()
                })),
            },
            "second Welcome",
        ),
        (
            "a bar that does not exist",
            pb::ServerToDevice {
                message: Some(pb::server_to_device::Message::Mmio(pb::MmioRequest {
                    bar: 6,
                    width_bytes: 4,
                    ..Default::default()
                })),
            },
            "bar",
        ),
    ];
    for (what, message, words) in cases {
        let server = FakeServer::start().await;
        let running = tokio::spawn(agent(&server).run(Counting::default()));
        let attached = server.welcomed(1, 1).await;
        attached.down.send(Ok(message)).unwrap();
        match soon(what, running).await.unwrap() {
            Err(EndReason::Protocol(told)) => assert!(told.contains(words), "{what}: {told}"),
            other => panic!("{what}: {other:?}"),
        }
    }
}

#[tokio::test]
async fn more_register_accesses_than_credits_end_the_session() {
    let server = FakeServer::start().await;
    let running = tokio::spawn(agent(&server).run(Counting::default()));
    let attached = server.welcomed(1, 1).await;
    // Reads wait for DMA that is never answered; one of them is being worked on, the others queue.
    for tag in 0..200 {
        attached.mmio_read(tag, 0x1000);
    }
    let ended = soon("the end", running).await.unwrap();
    assert!(
        matches!(&ended, Err(EndReason::Protocol(told)) if told.contains("register accesses")),
        "{ended:?}"
    );
}

#[tokio::test]
async fn a_reset_fails_what_is_in_flight_and_queued_before_the_model_is_reset() {
    let server = FakeServer::start().await;
    let agent = agent(&server).build();
    let dma = agent.dma();
    let resets = Arc::new(AtomicU32::new(0));
    let running = tokio::spawn(agent.run(Counting { resets: Arc::clone(&resets) }));
    let mut attached = server.welcomed(1, 4).await;
    soon("a session", dma.connected()).await;
    let read = tokio::spawn({
        let dma = dma.clone();
        async move { dma.read(Iova::new(0x1000), 8).await }
    });
    let batch = attached.batch().await;
    attached.mmio_read(1, 0x2000);
    let by_register = attached.batch().await;
    assert_eq!(by_register.assignment_generation, Some(1), "as welcomed");
    attached.mmio_write(2, 0, 0);
    attached.send(ToDevice::Reset { tag: 77, assignment_generation: Generation(2) });

    assert_eq!(soon("the end of the read", read).await.unwrap(), Err(DmaError::Reset));
    let in_work = attached.mmio_answer().await;
    assert_eq!((in_work.tag, in_work.outcome), (1, Err("the device is being reset".into())));
    let queued = attached.mmio_answer().await;
    assert_eq!((queued.tag, queued.outcome), (2, Err("the device is being reset".into())));
    assert_eq!(attached.next().await, Some(FromDevice::ResetDone { tag: 77 }));
    assert_eq!(resets.load(Ordering::SeqCst), 1);

    // The answers to the batches before the reset still come, and are checked off.
    attached.complete(&batch, vec![0; 8]);
    attached.complete(&by_register, vec![0; 8]);
    let after = async { dma.read(Iova::new(0x3000), 1).await };
    let serve = async {
        let batch = attached.batch().await;
        assert_eq!(batch.assignment_generation, Some(2), "as the reset said");
        attached.complete(&batch, vec![5]);
    };
    let (read, ()) = soon("a read after the reset", async { tokio::join!(after, serve) }).await;
    assert_eq!(&read.unwrap()[..], [5]);
    running.abort();
}

#[tokio::test]
async fn a_batch_that_waited_for_credit_through_a_reset_is_never_sent() {
    let server = FakeServer::start().await;
    let agent = agent(&server).build();
    let dma = agent.dma();
    let running = tokio::spawn(agent.run(Counting::default()));
    let mut attached = server.welcomed(1, 1).await;
    soon("a session", dma.connected()).await;
    let read = |iova| {
        let dma = dma.clone();
        tokio::spawn(async move { dma.read(Iova::new(iova), 1).await })
    };
    let in_flight = read(0x1000);
    let batch = attached.batch().await;
    let waiting = read(0x2000);
    tokio::task::yield_now().await;
    attached.send(ToDevice::Reset { tag: 1, assignment_generation: Generation(2) });
    assert_eq!(attached.next().await, Some(FromDevice::ResetDone { tag: 1 }));
    attached.complete(&batch, vec![0]);
    for read in [in_flight, waiting] {
        assert_eq!(soon("the end of a read", read).await.unwrap(), Err(DmaError::Reset));
    }
    assert!(attached.is_silent().await);
    running.abort();
}

#[tokio::test]
async fn a_stopped_agent_awaits_what_is_in_flight_and_admits_nothing_new() {
    let server = FakeServer::start().await;
    let stop = CancellationToken::new();
    let agent = agent(&server).stop_on(stop.clone()).build();
    let dma = agent.dma();
    let running = tokio::spawn(agent.run(Counting::default()));
    let mut attached = server.welcomed(1, 4).await;
    soon("a session", dma.connected()).await;
    let read = tokio::spawn({
        let dma = dma.clone();
        async move { dma.read(Iova::new(0x1000), 2).await }
    });
    let batch = attached.batch().await;
    stop.cancel();
    // One thread: the agent has seen the token when it had its turn.
    for _ in 0..10 {
        tokio::task::yield_now().await;
    }
    assert_eq!(dma.read(Iova::new(0), 0).await, Err(DmaError::SessionLost));
    attached.complete(&batch, vec![3, 4]);
    assert_eq!(&soon("the read", read).await.unwrap().unwrap()[..], [3, 4]);
    assert_eq!(soon("the end", running).await.unwrap(), Ok(()));
    assert_eq!(attached.next().await, None, "the stream upward has ended");
}

#[tokio::test]
async fn an_endpoint_without_a_scheme_is_refused_in_words() {
    let ended = Agent::builder("127.0.0.1:7450", "copy0", address()).run(Counting::default()).await;
    assert!(matches!(ended, Err(EndReason::BadEndpoint(_))), "{ended:?}");
}
