//! Bare machines over gRPC: brought up through registers, as an operating system would, and side by side.

use dma_engine::registers;
use guest_sdk::errors::{MemoryError, RegisterError};
use guest_sdk::{AccessWidth, BareClient, MachineDevice, MachineInterrupt, SdkError};
use iommu_e2e::bare::{FEADDR, FECTL, FEDATA, FSTS, IQH, IQT, READ, System, WRITE, message_address};
use iommu_e2e::device::{Device, fault};
use iommu_e2e::raw::{self, ask, open_request, reason};
use iommu_e2e::stage::{SOON, Stage, soon, within};
use iommu_launch::AgentOptions;
use iommu_proto::pb;
use iommu_types::{FaultReason, Iova, Refusal, SourceId};

/// Memory of a machine.
const MEMORY_BYTES: u64 = 4 << 20;
/// Two frames, and what stands in them.
const OLD_FRAME: u64 = 0x10_0000;
const NEW_FRAME: u64 = 0x11_0000;
/// The page that is mapped, and one that is not.
const PAGE: u64 = 0x10;
const HOLE: u64 = 0x20;

fn source() -> SourceId {
    SourceId::at(0, 4, 0).expect("a source")
}

/// A machine with one device, and the agent of that device.
async fn machine(stage: &Stage, client: &BareClient, name: &str) -> (System, Device) {
    let devices = vec![MachineDevice { source_id: source(), name: name.to_owned() }];
    let machine = client.create(MEMORY_BYTES, None, devices).await.expect("a machine");
    let address = machine.device(source());
    let device = Device::attach(&stage.server, stage.server.endpoint(), name, address).await;
    (System::new(machine, source()), device)
}

fn page(number: u64) -> Iova {
    Iova::new(number << 12)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_machines_come_up_through_their_registers_and_do_not_reach_each_other() {
    within(60, async {
        let stage = Stage::start(&[]).await;
        let client = stage.bare("lab").await;
        let (mut left, left_device) = machine(&stage, &client, "left0").await;
        let (mut right, right_device) = machine(&stage, &client, "right0").await;
        assert_ne!(left.machine.segment(), right.machine.segment());
        assert_eq!(client.list().await.expect("machines").len(), 2);

        // While translation is off, DMA passes unremapped: the address is the physical one.
        left.poke(OLD_FRAME, &b"left, unremapped"[..]).await;
        right.poke(OLD_FRAME, &b"right, unremapped"[..]).await;
        assert_eq!(left_device.dma.read(Iova::new(OLD_FRAME), 4).await.expect("unremapped")[..], b"left"[..]);
        assert_eq!(
            right_device.dma.read(Iova::new(OLD_FRAME), 5).await.expect("unremapped")[..],
            b"right"[..]
        );
        let beyond = fault(left_device.dma.read(Iova::new(MEMORY_BYTES), 4).await);
        assert_eq!(beyond.reason, Err(Refusal::NoMemory), "there is nothing behind the machine's memory");

        for system in [&mut left, &mut right] {
            system.write_tables().await;
            system.map(PAGE, OLD_FRAME, READ | WRITE).await;
            system.start_translation().await;
        }
        assert_eq!(left_device.dma.read(page(PAGE), 4).await.expect("translated")[..], b"left"[..]);
        left_device.dma.write(page(PAGE), &b"LEFT"[..]).await.expect("translated");
        assert_eq!(left.peek(OLD_FRAME, 4).await[..], b"LEFT"[..]);
        assert_eq!(right.peek(OLD_FRAME, 5).await[..], b"right"[..], "the same address of another machine");

        // What one of them does to its tables is nothing to the other: nonsense everywhere.
        left.poke(0x1000, vec![0xff; 0x6000]).await;
        left.invalidate(&[[1 | (1 << 4), 0], [2 | (1 << 4), 0]]).await;
        let refused = fault(left_device.dma.read(page(PAGE), 4).await);
        assert_eq!(refused.reason, Ok(FaultReason::ROOT_RESERVED));
        assert_eq!(right_device.dma.read(page(PAGE), 5).await.expect("untouched")[..], b"right"[..]);
        left.machine.destroy().await.expect("destroyed");
        assert_eq!(right_device.dma.read(page(PAGE), 5).await.expect("untouched")[..], b"right"[..]);
        let ended = left_device.ended().await;
        assert!(ended.is_err(), "the session of a device ends with its machine: {ended:?}");
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn i3_i4_a_changed_entry_reaches_the_old_frame_until_it_is_invalidated() {
    within(60, async {
        let stage = Stage::start(&[]).await;
        let client = stage.bare("lab").await;
        let (mut system, device) = machine(&stage, &client, "bare0").await;
        system.poke(OLD_FRAME, &b"old"[..]).await;
        system.poke(NEW_FRAME, &b"new"[..]).await;
        system.write_tables().await;
        system.map(PAGE, OLD_FRAME, READ).await;
        system.start_translation().await;
        let read = async || device.dma.read(page(PAGE), 3).await.expect("translated");
        assert_eq!(read().await[..], b"old"[..]);
        system.map(PAGE, NEW_FRAME, READ).await;
        for _ in 0..10 {
            assert_eq!(
                read().await[..],
                b"old"[..],
                "the cached translation is used until software invalidates"
            );
        }
        system.invalidate_page(PAGE << 12).await;
        assert_eq!(read().await[..], b"new"[..]);

        // Absent is never cached (CM=0): a page that becomes present is seen at once.
        let refused = fault(device.dma.read(page(HOLE), 3).await);
        assert_eq!(refused.reason, Ok(FaultReason::READ_DENIED));
        system.map(HOLE, OLD_FRAME, READ).await;
        assert_eq!(device.dma.read(page(HOLE), 3).await.expect("present now")[..], b"old"[..]);

        // A hit without the permission walks again, and the fault comes from the tables.
        assert_eq!(
            fault(device.dma.write(page(PAGE), &b"x"[..]).await).reason,
            Ok(FaultReason::WRITE_DENIED)
        );
        system.map(PAGE, NEW_FRAME, READ | WRITE).await;
        device.dma.write(page(PAGE), &b"wet"[..]).await.expect("the tables say so");
        assert_eq!(system.peek(NEW_FRAME, 3).await[..], b"wet"[..]);
        let counters = client.inspect().counters(Some(system.machine.segment())).await.expect("counters");
        assert!(counters.iotlb.hits >= 10 && counters.faults == 2, "{counters:?}");
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn i6_a_refused_dma_stands_in_the_fault_recording_register_and_raises_the_event() {
    const EVENT_ADDRESS: u32 = 0xfee0_3000;
    const EVENT_DATA: u32 = 0x4041;
    within(60, async {
        let stage = Stage::start(&[]).await;
        let client = stage.bare("lab").await;
        let (mut system, device) = machine(&stage, &client, "bare0").await;
        system.write_tables().await;
        system.start_translation().await;
        let mut watch = system.machine.watch_interrupts().await.expect("a subscription");
        system.machine.write32(FEDATA, EVENT_DATA).await.expect("FEDATA");
        system.machine.write32(FEADDR, EVENT_ADDRESS).await.expect("FEADDR");
        system.machine.write32(FECTL, 0).await.expect("unmasked");

        let refused = fault(device.dma.write(Iova::new((HOLE << 12) + 0x10), &b"nowhere"[..]).await);
        assert_eq!(refused.reason, Ok(FaultReason::WRITE_DENIED));
        let status = system.machine.read32(FSTS).await.expect("FSTS");
        assert_eq!(status & 0b11, 0b10, "PPF, and no overflow");
        let index = (status >> 8) & 0xff;
        let [low, high] = system.fault_record(index).await;
        assert_eq!(low, HOLE << 12, "FI: the page address");
        assert_eq!(high & 0xffff, u64::from(source().get()), "SID");
        assert_eq!((high >> 32) & 0xff, 5, "FR: no write permission");
        assert_eq!(high >> 62, 0b10, "F is set, T1 is clear: a write");
        let event =
            tokio::time::timeout(SOON, watch.next()).await.expect("soon").expect("open").expect("an event");
        match event {
            MachineInterrupt::Event(event) => {
                assert_eq!((event.address, event.data), (u64::from(EVENT_ADDRESS), EVENT_DATA));
            }
            other => panic!("the fault event was expected: {other:?}"),
        }

        // Written as one, F is cleared, and with it PPF; the next fault is recorded in the next register.
        let cap = system.machine.read64(iommu_e2e::bare::CAP).await.expect("CAP");
        let record = u32::try_from((cap >> 24) & 0x3ff).expect("ten bits") * 16 + index * 16;
        system.machine.write64(record + 8, 1 << 63).await.expect("F is RW1C");
        assert_eq!(system.machine.read32(FSTS).await.expect("FSTS") & 0b11, 0);
        let again = fault(device.dma.read(page(HOLE + 1), 4).await);
        assert_eq!(again.reason, Ok(FaultReason::READ_DENIED));
        let [low, high] = system.fault_record(index + 1).await;
        assert_eq!((low, (high >> 32) & 0xff, high >> 62), ((HOLE + 1) << 12, 6, 0b11), "a read: T1 is set");
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_dma_engine_behind_a_bare_machine_is_translated_and_its_faults_are_recorded() {
    within(60, async {
        let mut stage = Stage::start(&[]).await;
        let client = stage.bare("lab").await;
        let devices = vec![MachineDevice { source_id: source(), name: "copy0".to_owned() }];
        let machine = client.create(MEMORY_BYTES, None, devices).await.expect("a machine");
        let address = machine.device(source());
        let options =
            AgentOptions { name: "copy0".to_owned(), address: address.to_string(), arguments: Vec::new() };
        let _agent = stage.server.start_dma_engine(&options).expect("the agent starts");
        let mut system = System::new(machine, source());
        let read = async |system: &System, offset| {
            system.machine.mmio_read(source(), offset, AccessWidth::Bytes4).await.expect("a register")
        };
        soon("the agent is connected", async || {
            system.machine.mmio_read(source(), registers::ID_VERSION, AccessWidth::Bytes4).await.ok()
        })
        .await;
        let copy = async |system: &System, from: u64, to: u64| {
            for (offset, width, value) in [
                (registers::SOURCE, AccessWidth::Bytes8, from),
                (registers::DESTINATION, AccessWidth::Bytes8, to),
                (registers::LENGTH, AccessWidth::Bytes4, 256),
                (registers::COMMAND, AccessWidth::Bytes4, registers::COMMAND_COPY.into()),
            ] {
                system.machine.mmio_write(source(), offset, width, value).await.expect("a register");
            }
            soon("the copy ends", async || {
                let status = read(system, registers::STATUS).await;
                (status & u64::from(registers::STATUS_BUSY) == 0).then_some(status)
            })
            .await
        };
        let (done, error) = (u64::from(registers::STATUS_DONE), u64::from(registers::STATUS_ERROR));

        // Without translation, then with it.
        system.poke(OLD_FRAME, vec![0xa5; 256]).await;
        assert_eq!(copy(&system, OLD_FRAME, NEW_FRAME).await & (done | error), done);
        assert_eq!(system.peek(NEW_FRAME, 256).await[..], [0xa5; 256]);
        system.write_tables().await;
        system.map(PAGE, OLD_FRAME, READ).await;
        system.map(PAGE + 1, NEW_FRAME, WRITE).await;
        system.start_translation().await;
        system.poke(OLD_FRAME, vec![0x5a; 256]).await;
        assert_eq!(copy(&system, PAGE << 12, (PAGE + 1) << 12).await & (done | error), done);
        assert_eq!(system.peek(NEW_FRAME, 256).await[..], [0x5a; 256]);

        // The other way round the first read is refused: the device says so, and the unit has recorded it.
        assert_eq!(copy(&system, (PAGE + 1) << 12, PAGE << 12).await & (done | error), error);
        assert_eq!(read(&system, registers::FAULT_REASON).await, 6);
        let [low, high] = system.fault_record(0).await;
        assert_eq!(
            (low, high & 0xffff, (high >> 32) & 0xff),
            ((PAGE + 1) << 12, u64::from(source().get()), 6)
        );
        assert_eq!(system.peek(OLD_FRAME, 256).await[..], [0x5a; 256], "nothing was written");
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn interrupts_are_remapped_once_remapping_is_on_and_refused_ones_are_recorded() {
    const INDEX: u64 = 3;
    const VECTOR: u8 = 0x51;
    const DESTINATION: u8 = 2;
    within(60, async {
        let stage = Stage::start(&[]).await;
        let client = stage.bare("lab").await;
        let (mut system, device) = machine(&stage, &client, "bare0").await;
        system.write_tables().await;
        system.start_translation().await;
        let mut watch = system.machine.watch_interrupts().await.expect("a subscription");
        let mut delivered = async || {
            let told = tokio::time::timeout(SOON, watch.next()).await.expect("soon").expect("open");
            match told.expect("an interrupt") {
                MachineInterrupt::Device(interrupt) => interrupt,
                other => panic!("an interrupt of the device was expected: {other:?}"),
            }
        };
        // Off: vector from the data, destination from the address, as without an IOMMU.
        device.dma.msi(Iova::new(0xfee0_5000), 0x33).await.expect("delivered");
        let plain = delivered().await;
        assert_eq!((plain.vector, plain.destination), (0x33, 5));
        system.start_interrupt_remapping(INDEX, VECTOR, DESTINATION).await;
        device.dma.msi(Iova::new(message_address(INDEX)), 0).await.expect("remapped");
        let remapped = delivered().await;
        assert_eq!((remapped.vector, remapped.destination), (VECTOR, u32::from(DESTINATION)));
        assert_eq!(remapped.device, system.machine.device(source()));

        let absent = fault(device.dma.msi(Iova::new(message_address(INDEX + 1)), 0).await);
        assert_eq!(absent.reason, Ok(FaultReason::IR_NOT_PRESENT));
        let beyond = fault(device.dma.msi(Iova::new(message_address(0x4000)), 0).await);
        assert_eq!(beyond.reason, Ok(FaultReason::IR_INDEX_BEYOND_TABLE));
        let [low, high] = system.fault_record(0).await;
        assert_eq!(
            (low >> 48, (high >> 32) & 0xff, high >> 63),
            (INDEX + 1, 0x22, 1),
            "the index and the reason"
        );
        let unremapped = fault(device.dma.msi(Iova::new(0xfee0_5000), 0x33).await);
        assert_eq!(unremapped.reason, Ok(FaultReason::IR_COMPATIBILITY_BLOCKED));
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_machine_is_its_creators_alone_and_the_host_is_out_of_its_reach() {
    within(60, async {
        let stage = Stage::start(&[]).await;
        let client = stage.bare("lab").await;
        let (system, device) = machine(&stage, &client, "bare0").await;
        let segment = u32::from(system.machine.segment());
        let before = stage.holdings().await;
        // The whole memory, unremapped, is the machine's own: zeroes, and then nothing.
        let all = device.dma.read(Iova::new(0), 1 << 20).await.expect("unremapped");
        assert!(all.iter().all(|byte| *byte == 0), "memory of a machine comes zeroed");
        for nowhere in [MEMORY_BYTES, 1 << 32, 1 << 45, u64::MAX - 0xfff] {
            let refused = fault(device.dma.write(Iova::new(nowhere), &b"x"[..]).await);
            assert!(refused.done_bytes == 0, "{nowhere:#x}: {refused:?}");
        }
        assert_eq!(stage.holdings().await, before, "the host is untouched");

        let other = raw::connect(&stage.server.unix_endpoint()).await;
        let open = open_request("somebody-else", pb::open_request::Role::Bare(pb::BareRole {}));
        let _: pb::OpenResponse =
            ask(&other, "/iommu.v1.SessionService/Open", &open).await.expect("admitted");
        let service = "/iommu.v1.BareMachineService/";
        let read = pb::ReadMachineMemoryRequest { segment, address: 0, size_bytes: 8 };
        let refused =
            ask::<pb::ReadMachineMemoryResponse>(&other, &format!("{service}ReadMemory"), &read).await;
        assert_eq!(reason(&refused.expect_err("not theirs")), "NOT_YOURS");
        let register = pb::WriteRegisterRequest { segment, offset: 0x18, width_bytes: 4, value: 0 };
        let refused =
            ask::<pb::WriteRegisterResponse>(&other, &format!("{service}WriteRegister"), &register).await;
        assert_eq!(reason(&refused.expect_err("not theirs")), "NOT_YOURS");
        let destroy = pb::DestroyMachineRequest { segment };
        let refused = ask::<pb::DestroyMachineResponse>(&other, &format!("{service}Destroy"), &destroy).await;
        assert_eq!(reason(&refused.expect_err("not theirs")), "NOT_YOURS");
        let destroy = pb::DestroyMachineRequest { segment: 0 };
        let refused = ask::<pb::DestroyMachineResponse>(&other, &format!("{service}Destroy"), &destroy).await;
        assert_eq!(reason(&refused.expect_err("the host is no machine")), "UNKNOWN_MACHINE");

        let beyond = system.machine.read_memory(MEMORY_BYTES - 4, 8).await;
        match beyond {
            Err(SdkError::Refused(MemoryError::NoMemory(none))) => assert!(none.address >= MEMORY_BYTES - 4),
            other => panic!("NO_MEMORY was expected: {other:?}"),
        }
        let crooked = system.machine.read32(0x2).await;
        assert!(
            matches!(crooked, Err(SdkError::Refused(RegisterError::BadRegisterAccess(_)))),
            "{crooked:?}"
        );
        let outside = system.machine.read64(0x1000).await;
        assert!(
            matches!(outside, Err(SdkError::Refused(RegisterError::BadRegisterAccess(_)))),
            "{outside:?}"
        );
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_bad_descriptor_stops_the_queue_at_it_and_every_client_has_its_bound_of_machines() {
    within(60, async {
        let stage = Stage::start(&[]).await;
        let client = stage.bare("lab").await;
        let (mut system, _device) = machine(&stage, &client, "bare0").await;
        system.write_tables().await;
        system.start_translation().await;
        let head = system.machine.read64(IQH).await.expect("IQH");
        assert_eq!(head, system.machine.read64(IQT).await.expect("IQT"), "all is done");
        // Type 15 does not exist.
        system.entry(0x8000 + head, &[0xf, 0]).await;
        system.machine.write64(IQT, head + 16).await.expect("IQT");
        soon("the queue stops", async || {
            (system.machine.read32(FSTS).await.expect("FSTS") & (1 << 4) != 0).then_some(())
        })
        .await;
        assert_eq!(
            system.machine.read64(IQH).await.expect("IQH"),
            head,
            "the head stays on the bad descriptor"
        );
        assert_eq!(system.machine.read64(0xb0).await.expect("IQERCD") & 0xf, 3, "IQEI 3: a bad type");

        let mut made = 1;
        let limit = loop {
            match client.create(MEMORY_BYTES, None, Vec::new()).await {
                Ok(_) => made += 1,
                Err(refused) => break refused,
            }
            assert!(made < 100, "there is a bound (I7)");
        };
        assert!(limit.to_string().contains("limit"), "{limit}");
        let neighbour = stage.bare("neighbour").await;
        neighbour
            .create(MEMORY_BYTES, None, Vec::new())
            .await
            .expect("one client does not use up another's share");
    })
    .await;
}
