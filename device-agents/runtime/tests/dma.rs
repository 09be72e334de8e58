//! DMA: what travels, what comes back, credits, and register accesses that do DMA.

mod support;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use device_runtime::{
    Agent, AtomicValue, Batch, DeviceModel, Dma, DmaError, EndReason, MmioRefusal, Reconnect, Register,
};
use iommu_proto::model::{FromDevice, ToDevice};
use iommu_proto::pb;
use iommu_types::{DmaFault, FaultReason, Iova, Refusal};
use support::{Attached, FakeServer, address, soon};

/// Writing a register reads memory at the value and keeps its sum; reading gives the sum.
#[derive(Default)]
struct Summing {
    sum: AtomicU64,
}

impl DeviceModel for Summing {
    async fn mmio_read(&self, _: Register, _: &Dma) -> Result<u64, MmioRefusal> {
        Ok(self.sum.load(Ordering::SeqCst))
    }
    async fn mmio_write(&self, _: Register, value: u64, dma: &Dma) -> Result<(), MmioRefusal> {
        let read =
            dma.read(Iova::new(value), 4).await.map_err(|error| MmioRefusal::new(error.to_string()))?;
        let sum = read.iter().map(|&byte| u64::from(byte)).sum();
        self.sum.fetch_add(sum, Ordering::SeqCst);
        Ok(())
    }
    async fn reset(&self) {}
}

struct Running {
    dma: Dma,
    attached: Attached,
    ended: tokio::task::JoinHandle<Result<(), EndReason>>,
    _server: FakeServer,
}

async fn running(dma_credits: u32) -> Running {
    let server = FakeServer::start().await;
    let agent = Agent::builder(server.endpoint(), "copy0", address()).reconnect(Reconnect::NEVER).build();
    let dma = agent.dma();
    let ended = tokio::spawn(agent.run(Summing::default()));
    let attached = server.welcomed(1, dma_credits).await;
    soon("a session", dma.connected()).await;
    Running { dma, attached, ended, _server: server }
}

fn at(raw: u64) -> Iova {
    Iova::new(raw)
}

fn fault(done_bytes: u32, iova: u64, reason: Result<FaultReason, Refusal>) -> DmaFault {
    DmaFault { done_bytes, iova: at(iova), reason }
}

#[tokio::test]
async fn faults_in_the_middle_of_a_batch_leave_the_operations_around_them_whole() {
    let mut running = running(4).await;
    let mut batch = Batch::new();
    batch
        .read(at(0x1000), 4)
        .read(at(0x1ffe), 8)
        .write_slice(at(0x3000), b"abc")
        .fetch_add(at(0x4000), AtomicValue::U64(1))
        .swap(at(0x5000), AtomicValue::U32(9))
        .read(at(0x6000), 3);
    let ticket = running.dma.submit(batch).await.unwrap();
    let sent = running.attached.batch().await;
    assert_eq!(sent.size_bytes, [4, 8, 3, 8, 4, 3]);
    assert_eq!(&sent.kind[..], [0, 0, 1, 3, 4, 0]);
    assert_eq!(&sent.payload[..], b"abc\x01\0\0\0\0\0\0\0\x09\0\0\0");
    running.attached.send(ToDevice::Dma(pb::DmaCompletions {
        first_tag: sent.first_tag,
        payload: [&[1, 2, 3, 4][..], &[5, 6], &[7, 0, 0, 0], &[8, 9, 10]].concat().into(),
        fault_index: vec![1, 2, 3],
        fault_reason: vec![0x6, 0x5, 0x1003],
        fault_iova: vec![0x2000, 0x3000, 0x4000],
        fault_done_bytes: vec![2, 0, 0],
    }));
    let completed = soon("completions", ticket).await.unwrap();
    let results = completed.results().map(|result| (result.bytes.to_vec(), result.fault)).collect::<Vec<_>>();
    assert_eq!(
        results,
        [
            (vec![1, 2, 3, 4], None),
            (vec![5, 6], Some(fault(2, 0x2000, Ok(FaultReason::READ_DENIED)))),
            (vec![], Some(fault(0, 0x3000, Ok(FaultReason::WRITE_DENIED)))),
            (vec![], Some(fault(0, 0x4000, Err(Refusal::Malformed)))),
            (vec![7, 0, 0, 0], None),
            (vec![8, 9, 10], None),
        ]
    );
}

/// Kinds, sizes and payload of a batch as it comes, and the payload that answers it.
type Exchange = (&'static [u8], &'static [u32], Vec<u8>, Vec<u8>);

#[tokio::test]
async fn every_call_travels_as_the_schema_says() {
    let running = running(1).await;
    let (dma, mut attached) = (running.dma, running.attached);
    let eight = |value: u64| value.to_le_bytes().to_vec();
    let serve = tokio::spawn(async move {
        let script: Vec<Exchange> = vec![
            (&[], &[3], vec![], vec![1, 2, 3]),
            (&[], &[0], vec![], vec![]),
            (&[1], &[2], vec![4, 5], vec![]),
            (&[2], &[2], vec![6, 7], vec![]),
            (&[], &[2, 1], vec![], vec![8, 9, 10]),
            (&[1], &[1, 2], vec![1, 2, 3], vec![]),
            (&[3], &[8], eight(5), eight(100)),
            (&[4], &[4], vec![1, 0, 0, 0], vec![2, 0, 0, 0]),
            (&[5], &[16], [vec![0; 16], vec![1; 16]].concat(), vec![7; 16]),
            (&[2], &[4], vec![0x42, 0, 0, 0], vec![]),
        ];
        for (number, (kind, sizes, payload, answer)) in script.into_iter().enumerate() {
            let batch = attached.batch().await;
            assert_eq!((&batch.kind[..], &batch.size_bytes[..]), (kind, sizes), "batch {number}");
            assert_eq!(batch.payload, payload, "batch {number}");
            attached.complete(&batch, answer);
        }
    });
    assert_eq!(&dma.read(at(0x1000), 3).await.unwrap()[..], [1, 2, 3]);
    assert_eq!(dma.read(at(0x1000), 0).await.unwrap().len(), 0);
    dma.write(at(0x1000), vec![4, 5]).await.unwrap();
    dma.posted_write(at(0x1000), vec![6, 7]).await.unwrap().await.unwrap();
    assert_eq!(&dma.read_sg(&[(at(1), 2), (at(9), 1)]).await.unwrap()[..], [8, 9, 10]);
    dma.write_sg(&[(at(1), &[1]), (at(9), &[2, 3])]).await.unwrap();
    assert_eq!(dma.fetch_add(at(8), AtomicValue::U64(5)).await, Ok(AtomicValue::U64(100)));
    assert_eq!(dma.swap(at(8), AtomicValue::U32(1)).await, Ok(AtomicValue::U32(2)));
    let (old, new) = (AtomicValue::U128(0), AtomicValue::U128(u128::from_le_bytes([1; 16])));
    let before = AtomicValue::U128(u128::from_le_bytes([7; 16]));
    assert_eq!(dma.compare_and_swap(at(16), old, new).await, Ok(before));
    dma.msi(at(0xfee0_0000), 0x42).await.unwrap();
    soon("the script", serve).await.unwrap();
}

#[tokio::test]
async fn equal_columns_travel_as_one_element_and_one_answer_serves_128_reads() {
    let mut running = running(1).await;
    let mut batch = Batch::with_capacity(128);
    for index in 0..128 {
        batch.read(at(index * 64), 64);
    }
    let ticket = running.dma.submit(batch).await.unwrap();
    let sent = running.attached.batch().await;
    assert_eq!((sent.iova.len(), &sent.size_bytes[..], sent.kind.len()), (128, &[64][..], 0));
    let payload = (0..128u8).flat_map(|index| [index; 64]).collect::<Vec<_>>();
    running.attached.complete(&sent, payload);
    let completed = soon("completions", ticket).await.unwrap();
    assert!(completed.results().enumerate().all(|(index, result)| result.bytes == [index as u8; 64]));
    assert_eq!(completed.results().count(), 128);
}

#[tokio::test]
async fn without_credit_a_batch_waits_and_register_answers_do_not() {
    let mut running = running(2).await;
    let mut reads = Vec::new();
    for index in 0..3 {
        let dma = running.dma.clone();
        reads.push(tokio::spawn(async move { dma.read(at(0x1000 * index), 1).await }));
    }
    let first = running.attached.batch().await;
    let second = running.attached.batch().await;
    assert!(running.attached.is_silent().await, "two credits, two batches");
    running.attached.mmio_read(5, 0);
    assert_eq!(running.attached.mmio_answer().await.tag, 5);
    running.attached.complete(&first, vec![1]);
    let third = running.attached.batch().await;
    running.attached.complete(&second, vec![2]);
    running.attached.complete(&third, vec![3]);
    for read in reads {
        soon("a read", read).await.unwrap().unwrap();
    }
}

#[tokio::test]
async fn a_batch_that_nobody_awaits_gives_its_credit_back() {
    let mut running = running(1).await;
    let mut batch = Batch::new();
    batch.read(at(0), 1);
    drop(running.dma.submit(batch).await.unwrap());
    let forgotten = running.attached.batch().await;
    running.attached.complete(&forgotten, vec![1]);
    let dma = running.dma.clone();
    let read = tokio::spawn(async move { dma.read(at(1), 1).await });
    let next = running.attached.batch().await;
    running.attached.complete(&next, vec![2]);
    assert_eq!(&soon("the read", read).await.unwrap().unwrap()[..], [2]);
}

#[tokio::test]
async fn a_register_access_may_do_dma_of_its_own() {
    let mut running = running(1).await;
    running.attached.mmio_write(1, 0, 0x8000);
    let batch = running.attached.batch().await;
    assert_eq!(batch.iova, [0x8000]);
    running.attached.complete(&batch, vec![1, 2, 3, 4]);
    assert_eq!(running.attached.mmio_answer().await.outcome, Ok(0));
    running.attached.mmio_read(2, 0);
    assert_eq!(running.attached.mmio_answer().await.outcome, Ok(10));
}

#[tokio::test]
async fn floods_that_cross_do_not_block_each_other() {
    const OPERATIONS: u64 = 500;
    let Running { dma, mut attached, ended: _ended, _server } = running(4).await;
    let done = Arc::new(AtomicU64::new(0));
    let workers = (0..8).map(|_| {
        let (dma, done) = (dma.clone(), Arc::clone(&done));
        tokio::spawn(async move {
            while done.fetch_add(1, Ordering::SeqCst) < OPERATIONS {
                dma.read(at(0x1000), 4).await.unwrap();
            }
        })
    });
    let workers = workers.collect::<Vec<_>>();
    // Register writes that do DMA cross the flood of reads; 64 of them are always unanswered.
    let mut asked = 0;
    let mut answered = 0;
    while asked < 64 {
        attached.mmio_write(asked, 0, 0x2000);
        asked += 1;
    }
    while answered < OPERATIONS {
        match attached.next().await.expect("the device goes on") {
            FromDevice::Dma(batch) => attached.complete(&batch, vec![1; 4]),
            FromDevice::Mmio(completion) => {
                assert_eq!(completion.outcome, Ok(0));
                answered += 1;
                attached.mmio_write(asked, 0, 0x2000);
                asked += 1;
            }
            other => panic!("{other:?}"),
        }
    }
    let drain = async {
        loop {
            if let Some(FromDevice::Dma(batch)) = attached.next().await {
                attached.complete(&batch, vec![1; 4]);
            }
        }
    };
    let workers = async {
        for worker in workers {
            worker.await.unwrap();
        }
    };
    tokio::select! {
        () = soon("the workers", workers) => {}
        () = drain => {}
    }
}

#[tokio::test]
async fn what_is_over_a_limit_is_refused_before_it_is_sent() {
    let mut running = running(1).await;
    let too_long = running.dma.read(at(0), (1 << 20) + 1).await;
    let bytes_limit =
        DmaError::OverLimit { limit: "batch_bytes_max", asked: (1 << 20) + 1, allowed: 1 << 20 };
    assert_eq!(too_long, Err(bytes_limit));
    let mut batch = Batch::new();
    for _ in 0..257 {
        batch.read(at(0), 1);
    }
    let operations_limit = DmaError::OverLimit { limit: "batch_operations_max", asked: 257, allowed: 256 };
    assert_eq!(running.dma.execute(batch).await.unwrap_err(), operations_limit);
    assert!(running.dma.execute(Batch::new()).await.unwrap().is_empty(), "an empty batch is nothing to send");
    assert!(running.attached.is_silent().await);
}

#[tokio::test]
async fn an_answer_that_does_not_fit_its_batch_ends_the_session() {
    let ok = || pb::DmaCompletions { payload: vec![1, 2].into(), ..Default::default() };
    let faults = |index, reason, done| pb::DmaCompletions {
        fault_index: vec![index],
        fault_reason: vec![reason],
        fault_iova: vec![0],
        fault_done_bytes: vec![done],
        ..Default::default()
    };
    let cases = [
        (pb::DmaCompletions { first_tag: 1, ..ok() }, "tag 1 where 0 is next"),
        (pb::DmaCompletions { payload: vec![1].into(), ..ok() }, "payload of 1 bytes where 2 belong"),
        (pb::DmaCompletions { fault_index: vec![0], ..ok() }, "fault columns"),
        (faults(1, 6, 0), "fault_index 1"),
        (faults(0, 6, 3), "fault_done_bytes 3"),
        (faults(0, 0x1fff, 0), "fault_reason 0x1fff"),
    ];
    for (answer, words) in cases {
        let mut running = running(1).await;
        let dma = running.dma.clone();
        let read = tokio::spawn(async move { dma.read(at(0), 2).await });
        running.attached.batch().await;
        running.attached.send(ToDevice::Dma(answer));
        match soon(words, running.ended).await.unwrap() {
            Err(EndReason::Protocol(told)) => assert!(told.contains(words), "{words}: {told}"),
            other => panic!("{words}: {other:?}"),
        }
        assert_eq!(soon("the read", read).await.unwrap(), Err(DmaError::SessionLost), "{words}");
    }
}
