//! A shared device against a scripted server: copies both ways, whose memory, whose turn, and what guests are told.

mod support;

use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use guest_sdk::multiplexer::{
    Backend, BadBatch, Batch, DeviceFailure, Ended, Entry, MultiplexError, MultiplexedDevice, Multiplexer,
    MultiplexerCounters, Reply, WAITING_PER_GUEST_MAX,
};
use guest_sdk::{Connection, Gpa, GpaRange, Owner, SdkError, errors};
use iommu_proto::errors::WireError;
use iommu_proto::pb;
use support::{Fake, soon};
use tokio::sync::Semaphore;
use tonic::Status;

fn range(gpa: u64, size_bytes: u64) -> GpaRange {
    GpaRange::new(Gpa::new(gpa), size_bytes).expect("a range")
}

/// What a device was asked, and what it does: it gives out what it took, and fails what begins with 0xee.
#[derive(Clone, Default)]
struct Loopback {
    taken: Arc<Mutex<Vec<Bytes>>>,
    /// Batches may begin when there is a permit, where that is said.
    gate: Option<Arc<Semaphore>>,
    receive_gate: Option<Arc<Semaphore>>,
    /// It tells nothing of the last packet of a batch.
    forgetful: bool,
    /// It does not answer in time.
    silent: bool,
    /// How many commands it was given.
    commands: Arc<Mutex<u32>>,
}

impl Backend for Loopback {
    async fn transmit(&mut self, packets: &[Bytes]) -> Vec<Result<(), DeviceFailure>> {
        *self.commands.lock().expect("no panic") += 1;
        if let Some(gate) = &self.gate {
            gate.acquire().await.expect("open").forget();
        }
        if self.silent {
            return vec![Err(DeviceFailure::timeout("no interrupt")); packets.len()];
        }
        self.taken.lock().expect("no panic").extend(packets.iter().cloned());
        let told = packets.len() - usize::from(self.forgetful);
        let failed = |packet: &Bytes| packet.first() == Some(&0xee);
        let outcome = |packet| if failed(packet) { Err(DeviceFailure::new("0xee")) } else { Ok(()) };
        packets[..told].iter().map(outcome).collect()
    }

    async fn receive(&mut self, sizes: &[u32]) -> Vec<Result<Bytes, DeviceFailure>> {
        *self.commands.lock().expect("no panic") += 1;
        if let Some(gate) = &self.receive_gate {
            gate.acquire().await.expect("open").forget();
        }
        // More than was asked for, as a broken driver would.
        let packet = |size: &u32| Ok(Bytes::from(vec![0x5a; *size as usize + 7]));
        sizes.iter().map(packet).collect()
    }
}

fn vm(number: u32, memory: &[(u64, u64)]) -> pb::VmState {
    let region = |&(gpa, size_bytes): &(u64, u64)| pb::MemoryRegion { gpa, size_bytes };
    pb::VmState {
        number,
        name: format!("guest{number}"),
        memory: memory.iter().map(region).collect(),
        ..Default::default()
    }
}

fn call(tag: u64, vm: u32, payload: Bytes) -> Result<pb::ServeHypercallsResponse, Status> {
    Ok(pb::ServeHypercallsResponse { tag, vm, payload })
}

fn batch(entries: &[Entry]) -> Bytes {
    Batch::new(entries.to_vec()).expect("a batch").encode()
}

/// Runs a multiplexer for these calls; gives its counters.
async fn multiplex(fake: &Fake, calls: Vec<(u64, u32, Bytes)>, backend: Loopback) -> MultiplexerCounters {
    let hypervisor = fake.hypervisor().await;
    fake.state().hypercalls =
        [calls.into_iter().map(|(tag, vm, payload)| call(tag, vm, payload)).collect()].into();
    let multiplexer = Multiplexer::new(hypervisor, backend);
    let counters = multiplexer.counters();
    tokio::spawn(multiplexer.run());
    counters
}

/// The reply to a call, once it is there.
async fn reply(fake: &Fake, tag: u64) -> Reply {
    let found = async {
        loop {
            let answer = fake.state().hypercall_answers.iter().find(|answer| answer.tag == tag).cloned();
            match answer {
                Some(answer) => return answer.payload.expect("a multiplexer refuses in its own words"),
                None => tokio::time::sleep(Duration::from_millis(1)).await,
            }
        }
    };
    Reply::decode(&soon("the reply", found).await).expect("a reply")
}

#[tokio::test]
async fn packets_are_copied_both_ways_and_each_is_answered_for() {
    let fake = Fake::default();
    fake.state().memory = (0..0x8000_u32).map(|index| index as u8).collect();
    fake.state().memory[0x2800] = 0xee;
    fake.answer("list_vms", pb::ListVmsResponse { vms: vec![vm(1, &[(0x1000, 0x1000), (0x2000, 0x1000)])] });
    let backend = Loopback::default();
    let entries = [
        Entry::transmit(range(0x1ffe, 5)),
        Entry::transmit(range(0x2800, 10)),
        Entry::receive(range(0x1100, 300)),
        Entry::transmit(range(0x1100, 2)),
    ];
    let counters = multiplex(&fake, vec![(1, 1, batch(&entries))], backend.clone()).await;
    let done = |bytes| Ended::Done { bytes };
    let expected = vec![done(5), Ended::DeviceFailed, done(300), done(2)];
    assert_eq!(reply(&fake, 1).await, Reply::Ended(expected));
    let taken = backend.taken.lock().expect("no panic").clone();
    assert_eq!(taken[0], [0xfe, 0xff, 0, 1, 2][..], "across two regions that touch");
    assert_eq!(taken[2], [0x5a, 0x5a][..], "in order: what was received before");
    let memory = fake.state().memory.clone();
    assert!(memory[0x1100..0x1100 + 300].iter().all(|byte| *byte == 0x5a));
    assert_eq!(memory[0x1100 + 300], (0x1100 + 300) as u8, "no byte more than there was room for");
    let total = counters.total();
    assert_eq!((total.requests, total.packets, total.bytes_copied, total.failed), (1, 3, 307, 1));
    assert_eq!(counters.guests()[&1], total);
}

#[tokio::test]
async fn i2_memory_that_is_not_the_guests_own_is_not_touched() {
    let fake = Fake::default();
    fake.state().memory = vec![7; 0x8000];
    // Asked for anew for each guest that names what it does not have, and not again at once: in the end there is more.
    for more in [None, Some((0x6000, 0x1000))] {
        let first: Vec<(u64, u64)> = [(0x1000, 0x1000)].into_iter().chain(more).collect();
        fake.answer("list_vms", pb::ListVmsResponse { vms: vec![vm(1, &first), vm(2, &[(0x4000, 0x1000)])] });
    }
    let backend = Loopback::default();
    let of_another = [
        Entry::transmit(range(0x4000, 8)),
        Entry::transmit(range(0x1000, 8)),
        Entry::receive(range(0x1ff8, 9)),
    ];
    let later = [Entry::receive(range(0x6000, 8))];
    let calls =
        vec![(1, 1, batch(&of_another)), (2, 1, batch(&later)), (3, 1, batch(&later)), (4, 3, batch(&later))];
    let counters = multiplex(&fake, calls, backend.clone()).await;
    let done = Ended::Done { bytes: 8 };
    assert_eq!(reply(&fake, 1).await, Reply::Ended(vec![Ended::NotYours, done, Ended::NotYours]));
    // The guests take turns, so that the machine that is not there comes second.
    assert_eq!(reply(&fake, 4).await, Reply::Ended(vec![Ended::NotYours]));
    assert_eq!(reply(&fake, 2).await, Reply::Ended(vec![done]));
    assert_eq!(backend.taken.lock().expect("no panic").len(), 1);
    assert_eq!(counters.guests()[&3].failed, 1);
}

#[tokio::test]
async fn the_server_has_the_last_word_on_whose_memory_it_is() {
    let fake = Fake::default();
    fake.state().memory = vec![7; 0x8000];
    fake.answer("list_vms", pb::ListVmsResponse { vms: vec![vm(1, &[(0x1000, 0x1000)])] });
    let not_owned = errors::MemoryError::from(errors::NotOwned { gpa: Gpa::new(0x1000) });
    fake.state().write_failures.push_back(not_owned.into_status());
    multiplex(&fake, vec![(1, 1, batch(&[Entry::receive(range(0x1000, 8))]))], Loopback::default()).await;
    assert_eq!(reply(&fake, 1).await, Reply::Ended(vec![Ended::NotYours]));
    assert_eq!(fake.state().memory[0x1000], 7);
}

#[tokio::test]
async fn i7_a_guest_that_floods_is_told_to_wait_and_others_have_their_turn() {
    let fake = Fake::default();
    fake.state().memory = vec![0; 0x8000];
    for (index, byte) in (0..8_u8).enumerate() {
        fake.state().memory[0x1000 + index] = byte;
    }
    fake.answer(
        "list_vms",
        pb::ListVmsResponse { vms: vec![vm(1, &[(0x1000, 0x1000)]), vm(2, &[(0x1000, 0x1000)])] },
    );
    let gate = Arc::new(Semaphore::new(0));
    let backend = Loopback { gate: Some(Arc::clone(&gate)), ..Loopback::default() };
    let one = |index| batch(&[Entry::transmit(range(0x1000 + index, 1))]);
    // The first is taken at once, as many as may wait behind it, and one too many; then the other guest.
    let flood = WAITING_PER_GUEST_MAX as u64 + 2;
    let mut calls: Vec<_> = (0..flood).map(|tag| (tag + 1, 1, one(tag))).collect();
    calls.push((50, 1, Bytes::from_static(b"no batch at all")));
    calls.push((60, 2, one(7)));
    let counters = multiplex(&fake, calls, backend.clone()).await;
    assert_eq!(reply(&fake, 50).await, Reply::Malformed);
    gate.add_permits(2);
    assert_eq!(reply(&fake, 60).await, Reply::Ended(vec![Ended::Done { bytes: 1 }]), "it comes second");
    gate.add_permits(10);
    let busy = (1..=flood).collect::<Vec<_>>();
    let mut refused = 0;
    for tag in busy {
        refused += u64::from(reply(&fake, tag).await == Reply::Busy);
    }
    // Whether the first was taken before the others came is the scheduler's.
    assert!((1..=2).contains(&refused), "{refused}");
    let order: Vec<u8> = backend.taken.lock().expect("no panic").iter().map(|packet| packet[0]).collect();
    assert_eq!(order[..3], [0, 7, 1], "the guests take turns");
    assert_eq!(counters.guests()[&1].refused, refused + 1);
    assert_eq!(counters.guests()[&2].refused, 0);
}

#[tokio::test]
async fn a_packet_of_which_the_device_tells_nothing_has_failed() {
    let fake = Fake::default();
    fake.state().memory = vec![7; 0x8000];
    fake.answer("list_vms", pb::ListVmsResponse { vms: vec![vm(1, &[(0x1000, 0x1000)])] });
    let entries = [Entry::transmit(range(0x1000, 8)), Entry::transmit(range(0x1008, 8))];
    let backend = Loopback { forgetful: true, ..Loopback::default() };
    multiplex(&fake, vec![(1, 1, batch(&entries))], backend).await;
    assert_eq!(reply(&fake, 1).await, Reply::Ended(vec![Ended::Done { bytes: 8 }, Ended::DeviceFailed]));
}

#[tokio::test]
async fn i7_a_batch_of_many_commands_lets_others_in_between() {
    let fake = Fake::default();
    fake.state().memory = (0..0x8000_u32).map(|index| index as u8).collect();
    fake.answer(
        "list_vms",
        pb::ListVmsResponse { vms: vec![vm(1, &[(0x1000, 0x1000)]), vm(2, &[(0x1000, 0x1000)])] },
    );
    let gate = Arc::new(Semaphore::new(0));
    let backend = Loopback { gate: Some(Arc::clone(&gate)), ..Loopback::default() };
    let alternating: Vec<Entry> = (0..4)
        .flat_map(|index| [Entry::transmit(range(0x1000 + index, 1)), Entry::receive(range(0x1800, 1))])
        .collect();
    let calls = vec![(1, 1, batch(&alternating)), (2, 2, batch(&[Entry::transmit(range(0x1080, 1))]))];
    multiplex(&fake, calls, backend.clone()).await;
    gate.add_permits(2);
    assert_eq!(
        reply(&fake, 2).await,
        Reply::Ended(vec![Ended::Done { bytes: 1 }]),
        "it need not wait for all"
    );
    gate.add_permits(10);
    assert_eq!(reply(&fake, 1).await, Reply::Ended(vec![Ended::Done { bytes: 1 }; 8]));
    let order: Vec<u8> = backend.taken.lock().expect("no panic").iter().map(|packet| packet[0]).collect();
    assert_eq!(order, [0, 0x80, 1, 2, 3], "and each batch is in its order");
}

#[tokio::test]
async fn i7_a_device_that_does_not_answer_is_waited_for_once_in_a_batch() {
    let fake = Fake::default();
    fake.state().memory = vec![0; 0x8000];
    fake.answer("list_vms", pb::ListVmsResponse { vms: vec![vm(1, &[(0x1000, 0x1000)])] });
    let backend = Loopback { silent: true, ..Loopback::default() };
    let entries = [
        Entry::transmit(range(0x1000, 1)),
        Entry::receive(range(0x1800, 1)),
        Entry::transmit(range(0x1000, 1)),
    ];
    multiplex(&fake, vec![(1, 1, batch(&entries))], backend.clone()).await;
    assert_eq!(reply(&fake, 1).await, Reply::Ended(vec![Ended::DeviceFailed; 3]));
    assert_eq!(*backend.commands.lock().expect("no panic"), 1);
}

#[tokio::test]
async fn i2_a_batch_that_waited_for_too_long_is_not_carried_out_late() {
    let fake = Fake::default();
    fake.state().memory = vec![7; 0x8000];
    fake.answer("list_vms", pb::ListVmsResponse { vms: vec![vm(1, &[(0x1000, 0x1000)])] });
    let hypervisor = fake.hypervisor().await;
    // Longer than the first needs to begin: the memory of guests is asked for, and then read.
    let (gate, late) = (Arc::new(Semaphore::new(0)), Duration::from_millis(500));
    let backend = Loopback { gate: Some(Arc::clone(&gate)), ..Loopback::default() };
    let payload = |entry| batch(&[entry]);
    fake.state().hypercalls = [vec![
        call(1, 1, payload(Entry::transmit(range(0x1000, 1)))),
        call(2, 1, payload(Entry::receive(range(0x1100, 8)))),
    ]]
    .into();
    let multiplexer = Multiplexer::new(hypervisor, backend.clone()).longest_wait(late);
    let counters = multiplexer.counters();
    tokio::spawn(multiplexer.run());
    let begun = async {
        while *backend.commands.lock().expect("no panic") == 0 {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    };
    soon("the first command", begun).await;
    // The second waits behind it.
    tokio::time::sleep(late * 2).await;
    gate.add_permits(1);
    assert_eq!(reply(&fake, 1).await, Reply::Ended(vec![Ended::Done { bytes: 1 }]));
    let refused = async {
        loop {
            let answer = fake.state().hypercall_answers.iter().find(|answer| answer.tag == 2).cloned();
            match answer {
                Some(answer) => return answer.refused,
                None => tokio::time::sleep(Duration::from_millis(1)).await,
            }
        }
    };
    assert!(soon("the refusal", refused).await.contains("too long"));
    assert_eq!(counters.total().refused, 1);
    assert!(
        fake.state().memory[0x1100..0x1108].iter().all(|byte| *byte == 7),
        "the guest's memory is as it was"
    );
}

/// Loses the stream while the device has the first command of `calls`; then another call comes, and the device goes on.
async fn lose_the_stream(calls: &[(u64, Vec<Entry>)]) -> (Fake, Loopback) {
    let fake = Fake::default();
    fake.state().memory = vec![7; 0x8000];
    fake.answer("list_vms", pb::ListVmsResponse { vms: vec![vm(1, &[(0x1000, 0x1000)])] });
    let hypervisor = fake.hypervisor().await;
    let (gate, receive_gate) = (Arc::new(Semaphore::new(0)), Arc::new(Semaphore::new(0)));
    let backend = Loopback {
        gate: Some(Arc::clone(&gate)),
        receive_gate: Some(Arc::clone(&receive_gate)),
        ..Loopback::default()
    };
    let lost: Vec<_> = calls.iter().map(|(tag, entries)| call(*tag, 1, batch(entries))).collect();
    let after = vec![call(9, 1, batch(&[Entry::transmit(range(0x1800, 9))]))];
    fake.state().hypercalls = [lost, after].into();
    tokio::spawn(Multiplexer::new(hypervisor, backend.clone()).run());
    let again = async {
        while *backend.commands.lock().expect("no panic") == 0 {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        fake.state().hypercalls_end.notify_one();
        while fake.calls("serve_hypercalls").len() < 2 {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    };
    soon("the second stream", again).await;
    gate.add_permits(10);
    receive_gate.add_permits(10);
    assert_eq!(reply(&fake, 9).await, Reply::Ended(vec![Ended::Done { bytes: 9 }]));
    (fake, backend)
}

#[tokio::test]
async fn i2_what_is_left_of_batches_whose_stream_was_lost_is_not_carried_out() {
    let first = vec![Entry::transmit(range(0x1000, 1)), Entry::transmit(range(0x1000, 2))];
    let second = vec![Entry::receive(range(0x1100, 8))];
    let alternating = [first, second.clone()].concat();
    let (fake, backend) = lose_the_stream(&[(1, alternating), (2, second)]).await;
    assert_eq!(
        *backend.commands.lock().expect("no panic"),
        2,
        "the one that it had, and that of the new stream"
    );
    let sizes: Vec<usize> = backend.taken.lock().expect("no panic").iter().map(Bytes::len).collect();
    assert_eq!(sizes, [1, 2, 9]);
    assert!(fake.state().memory.iter().all(|byte| *byte == 7), "the guest's memory is as it was");
}

#[tokio::test]
async fn i2_what_the_device_gives_after_the_stream_was_lost_is_not_written() {
    let (fake, backend) = lose_the_stream(&[(1, vec![Entry::receive(range(0x1100, 8))])]).await;
    assert_eq!(*backend.commands.lock().expect("no panic"), 2);
    assert_eq!(fake.calls("write"), []);
}

#[tokio::test]
async fn i2_a_device_receives_nothing_for_a_batch_whose_stream_was_lost_while_its_memory_was_asked_for() {
    let fake = Fake::default();
    fake.state().memory = vec![7; 0x8000];
    fake.answer("list_vms", pb::ListVmsResponse { vms: vec![vm(1, &[(0x1000, 0x1000)])] });
    let hypervisor = fake.hypervisor().await;
    let gate = Arc::new(Semaphore::new(0));
    fake.state().gates.insert("list_vms", Arc::clone(&gate));
    fake.state().hypercalls = [
        vec![call(1, 1, batch(&[Entry::receive(range(0x1100, 8))]))],
        vec![call(9, 1, batch(&[Entry::transmit(range(0x1800, 9))]))],
    ]
    .into();
    let backend = Loopback::default();
    tokio::spawn(Multiplexer::new(hypervisor, backend.clone()).run());
    let again = async {
        while fake.calls("list_vms").is_empty() {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        fake.state().hypercalls_end.notify_one();
        while fake.calls("serve_hypercalls").len() < 2 {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    };
    soon("the second stream", again).await;
    gate.add_permits(10);
    assert_eq!(reply(&fake, 9).await, Reply::Ended(vec![Ended::Done { bytes: 9 }]));
    assert_eq!(*backend.commands.lock().expect("no panic"), 1, "that of the new stream");
    assert_eq!(fake.calls("write"), []);
}

#[tokio::test]
async fn i2_a_packet_is_written_once() {
    let fake = Fake::default();
    fake.state().memory = vec![7; 0x8000];
    fake.answer("list_vms", pb::ListVmsResponse { vms: vec![vm(1, &[(0x1000, 0x1000)])] });
    // Whether it was written before the connection was lost is not known; a retry would write what may be something else by then.
    fake.state().write_failures.push_back(Status::unavailable("the connection breaks"));
    let entries = [Entry::receive(range(0x1000, 8)), Entry::receive(range(0x1100, 8))];
    multiplex(&fake, vec![(1, 1, batch(&entries[..1])), (2, 1, batch(&entries[1..]))], Loopback::default())
        .await;
    assert_eq!(reply(&fake, 1).await, Reply::Ended(vec![Ended::MemoryFailed]));
    assert_eq!(reply(&fake, 2).await, Reply::Ended(vec![Ended::Done { bytes: 8 }]));
    assert_eq!(fake.calls("write").len(), 2);
}

#[tokio::test]
async fn what_is_known_of_memory_serves_while_the_server_tells_no_more() {
    let fake = Fake::default();
    fake.state().memory = vec![7; 0x8000];
    let known = vec![vm(1, &[(0x1000, 0x1000)]), vm(2, &[(0x1000, 0x1000)])];
    fake.answer("list_vms", pb::ListVmsResponse { vms: known });
    fake.fail("list_vms", Status::permission_denied("not now"));
    let entries = [Entry::transmit(range(0x1000, 8)), Entry::transmit(range(0x4000, 8))];
    let calls = vec![(1, 1, batch(&entries[..1])), (2, 2, batch(&entries))];
    multiplex(&fake, calls, Loopback::default()).await;
    let done = Ended::Done { bytes: 8 };
    assert_eq!(reply(&fake, 1).await, Reply::Ended(vec![done]));
    assert_eq!(reply(&fake, 2).await, Reply::Ended(vec![done, Ended::MemoryFailed]));
}

#[tokio::test]
async fn a_guest_is_told_how_its_packets_ended_or_why_not() {
    let fake = Fake::default();
    fake.answer("list_memory", pb::ListMemoryResponse::default());
    let connection = Connection::to(fake.start().await).deadline(Duration::from_secs(5));
    let driver = connection.driver("guest1", Owner::Vm(1)).await.expect("a session");
    let device = MultiplexedDevice::new(&driver);
    let packets = [range(0x1000, 8), range(0x2000, 8)];
    let ended = vec![Ended::Done { bytes: 8 }, Ended::NotYours];
    for (reply, expected) in [
        (Reply::Ended(ended.clone()), Ok(ended.clone())),
        (Reply::Busy, Err(MultiplexError::Busy)),
        (Reply::Malformed, Err(MultiplexError::NotAMultiplexer)),
        (Reply::Ended(vec![]), Err(MultiplexError::NotAMultiplexer)),
    ] {
        fake.answer("hypercall", pb::HypercallResponse { payload: reply.encode() });
        assert_eq!(device.transmit(&packets).await, expected);
    }
    fake.answer("hypercall", pb::HypercallResponse { payload: "hello".into() });
    assert_eq!(device.receive(&packets).await, Err(MultiplexError::NotAMultiplexer));
    fake.refuse("hypercall", errors::NoHypervisor {});
    let refused = SdkError::Refused(errors::NoHypervisor {}.into());
    assert_eq!(device.receive(&packets).await, Err(MultiplexError::Hypercall(refused)));
    let asked: Vec<pb::HypercallRequest> = fake.sent();
    let entries = packets.map(Entry::receive);
    assert_eq!(Batch::decode(&asked[4].payload).expect("a batch").entries(), entries);
    // What is no batch is not even asked.
    assert_eq!(device.transmit(&[]).await, Err(MultiplexError::Batch(BadBatch::Count { count: 0 })));
    assert_eq!(fake.sent::<pb::HypercallRequest>().len(), asked.len());
}
