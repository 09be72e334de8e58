//! What the agent's own side may do wrong: drop its future, panic, build an operation that makes no sense.

mod support;

use device_runtime::{
    Agent, AtomicValue, Batch, DeviceModel, Dma, DmaError, LinkState, MmioRefusal, Register,
};
use iommu_proto::dma::{Action, BatchLimits, BatchView};
use iommu_types::Iova;
use support::{FakeServer, address, soon};

/// Panics when a register is read.
struct Broken;

impl DeviceModel for Broken {
    async fn mmio_read(&self, _: Register, _: &Dma) -> Result<u64, MmioRefusal> {
        panic!("the model is broken")
    }
    async fn mmio_write(&self, _: Register, _: u64, _: &Dma) -> Result<(), MmioRefusal> {
        Ok(())
    }
    async fn reset(&self) {}
}

#[tokio::test]
async fn dropping_the_agent_ends_every_operation() {
    let server = FakeServer::start().await;
    let agent = Agent::builder(server.endpoint(), "copy0", address()).build();
    let dma = agent.dma();
    let running = tokio::spawn(agent.run(Broken));
    let mut attached = server.welcomed(1, 2).await;
    soon("a session", dma.connected()).await.expect("the agent runs");
    let mut batch = Batch::new();
    batch.read(Iova::new(0), 8);
    let ticket = dma.submit(batch).await.expect("a credit");
    attached.batch().await;
    running.abort();
    assert!(matches!(soon("the end of the batch", ticket).await, Err(DmaError::SessionLost)));
    assert_eq!(soon("the end of the agent", dma.connected()).await, None);
    assert!(matches!(&*dma.watch().borrow(), LinkState::Ended { .. }));
}

#[tokio::test]
async fn a_panic_of_a_register_access_ends_the_agent_and_is_not_blamed_on_the_server() {
    let server = FakeServer::start().await;
    let agent = Agent::builder(server.endpoint(), "copy0", address()).build();
    let running = tokio::spawn(agent.run(Broken));
    let attached = server.welcomed(1, 2).await;
    attached.mmio_read(1, 0);
    let ended = soon("the end of the agent", running).await;
    assert!(ended.is_err_and(|ended| ended.is_panic()));
}

#[tokio::test]
async fn a_cas_of_two_widths_is_malformed_and_does_not_break_the_stream() {
    let server = FakeServer::start().await;
    let agent = Agent::builder(server.endpoint(), "copy0", address()).build();
    let dma = agent.dma();
    let _running = tokio::spawn(agent.run(Broken));
    let mut attached = server.welcomed(1, 2).await;
    soon("a session", dma.connected()).await.expect("the agent runs");
    for (expected, new) in [
        (AtomicValue::U32(1), AtomicValue::U64(2)),
        (AtomicValue::U64(1), AtomicValue::U128(2)),
        (AtomicValue::U128(1), AtomicValue::U32(2)),
    ] {
        let mut batch = Batch::new();
        batch.compare_and_swap(Iova::new(0), expected, new);
        let ticket = dma.submit(batch).await.expect("a credit");
        let sent = attached.batch().await;
        let view = BatchView::parse(&sent, BatchLimits::CONTRACT).expect("the columns add up");
        let actions: Vec<_> = view.operations().map(|operation| operation.action).collect();
        assert_eq!(actions, [Action::Malformed], "{expected:?} {new:?}");
        attached.complete(&sent, vec![0; sent.size_bytes[0] as usize]);
        soon("the answer", ticket).await.expect("the answer fits the batch");
    }
}
