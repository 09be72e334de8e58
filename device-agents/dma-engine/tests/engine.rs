//! The engine against a bus of its own: what each register does, and which operations that puts on the bus.

use std::sync::Mutex;

use bytes::Bytes;
use device_runtime::{AtomicValue, DmaError, Register};
use dma_engine::bus::Bus;
use dma_engine::registers::*;
use dma_engine::ring::{COMPLETION_DONE, COMPLETION_ERROR, DESCRIPTOR_BYTES, Descriptor};
use dma_engine::{Engine, pattern};
use iommu_types::{AccessWidth, DmaFault, FaultReason, Iova};

/// Memory from address 0, of which one page refuses everything, and a log of what happened.
struct FakeBus {
    memory: Mutex<Vec<u8>>,
    log: Mutex<Vec<String>>,
    refused_page: u64,
    operation_bytes_max: u32,
}

const MEMORY_BYTES: usize = 2 << 20;
const NOWHERE: u64 = 0xf000;

impl FakeBus {
    fn new() -> Self {
        let memory = Mutex::new(vec![0; MEMORY_BYTES]);
        Self { memory, log: Mutex::default(), refused_page: NOWHERE, operation_bytes_max: u32::MAX }
    }

    fn put(&self, at: u64, bytes: &[u8]) {
        self.memory.lock().unwrap()[at as usize..][..bytes.len()].copy_from_slice(bytes);
    }

    fn get(&self, at: u64, size: usize) -> Vec<u8> {
        self.memory.lock().unwrap()[at as usize..][..size].to_vec()
    }

    fn log(&self) -> Vec<String> {
        std::mem::take(&mut self.log.lock().unwrap())
    }

    /// Page by page up to the first that refuses, as the server does it.
    fn access(&self, what: &str, iova: Iova, size: usize, reason: FaultReason) -> Result<usize, DmaFault> {
        self.log.lock().unwrap().push(format!("{what} {:#x}+{size}", iova.get()));
        let last = iova.get() + (size as u64).max(1) - 1;
        let (begin, end) = (self.refused_page, self.refused_page + 0xfff);
        if iova.get() > end || last < begin {
            return Ok(size);
        }
        let done = begin.saturating_sub(iova.get());
        Err(DmaFault { done_bytes: done as u32, iova: Iova::new(iova.get() + done), reason: Ok(reason) })
    }

    fn read_now(&self, iova: Iova, size: u32) -> Result<Bytes, DmaFault> {
        self.access("read", iova, size as usize, FaultReason::READ_DENIED)?;
        Ok(self.get(iova.get(), size as usize).into())
    }

    fn write_now(&self, iova: Iova, data: &[u8]) -> Result<(), DmaFault> {
        let outcome = self.access("write", iova, data.len(), FaultReason::WRITE_DENIED);
        let done = outcome.as_ref().map_or_else(|fault| fault.done_bytes as usize, |&size| size);
        self.put(iova.get(), &data[..done]);
        outcome.map(drop)
    }
}

impl Bus for FakeBus {
    fn operation_bytes_max(&self) -> u32 {
        self.operation_bytes_max
    }
    async fn read(&self, iova: Iova, size_bytes: u32) -> Result<Bytes, DmaError> {
        self.read_now(iova, size_bytes).map_err(DmaError::Fault)
    }
    async fn write(&self, iova: Iova, data: Bytes) -> Result<(), DmaError> {
        self.write_now(iova, &data).map_err(DmaError::Fault)
    }
    async fn fetch_add(&self, iova: Iova, operand: AtomicValue) -> Result<AtomicValue, DmaError> {
        let size = operand.size_bytes() as usize;
        self.access("fetch-add", iova, size, FaultReason::WRITE_DENIED).map_err(DmaError::Fault)?;
        let old = self.get(iova.get(), size);
        let old = AtomicValue::from_le_bytes(&old).unwrap();
        match (old, operand) {
            (AtomicValue::U32(a), AtomicValue::U32(b)) => {
                self.put(iova.get(), &(a.wrapping_add(b)).to_le_bytes())
            }
            (AtomicValue::U64(a), AtomicValue::U64(b)) => {
                self.put(iova.get(), &(a.wrapping_add(b)).to_le_bytes())
            }
            other => panic!("{other:?}"),
        }
        Ok(old)
    }
    async fn msi(&self, address: Iova, data: u32) -> Result<(), DmaError> {
        self.log.lock().unwrap().push(format!("msi {:#x}={data:#x}", address.get()));
        if address.get() == NOWHERE {
            let reason = Ok(FaultReason::IR_NOT_PRESENT);
            return Err(DmaError::Fault(DmaFault { done_bytes: 0, iova: address, reason }));
        }
        Ok(())
    }
    async fn read_each(&self, pieces: Vec<(Iova, u32)>) -> Result<Vec<Result<Bytes, DmaFault>>, DmaError> {
        Ok(pieces.into_iter().map(|(iova, size)| self.read_now(iova, size)).collect())
    }
    async fn write_each(&self, pieces: Vec<(Iova, Bytes)>) -> Result<Vec<Result<(), DmaFault>>, DmaError> {
        Ok(pieces.into_iter().map(|(iova, data)| self.write_now(iova, &data)).collect())
    }
}

fn register(offset: u64) -> Register {
    let wide = [SOURCE, DESTINATION, FAULT_ADDRESS, DATA, MSI_ADDRESS, RING_BASE].contains(&offset);
    Register { bar: 0, offset, width: if wide { AccessWidth::Bytes8 } else { AccessWidth::Bytes4 } }
}

fn read(engine: &Engine, offset: u64) -> u64 {
    engine.read_register(register(offset)).unwrap()
}

async fn write(engine: &Engine, offset: u64, value: u64) {
    engine.write_register(register(offset), value).await.unwrap();
}

async fn write_all(engine: &Engine, writes: &[(u64, u64)]) {
    for &(offset, value) in writes {
        write(engine, offset, value).await;
    }
}

async fn work(engine: &Engine, bus: &FakeBus) {
    while engine.work_once(bus).await {}
}

/// Status, fault reason, fault address and bytes done.
fn end(engine: &Engine) -> (u64, u64, u64, u64) {
    (read(engine, STATUS), read(engine, FAULT_REASON), read(engine, FAULT_ADDRESS), read(engine, BYTES_DONE))
}

const DONE: u64 = STATUS_DONE as u64;
const ERROR: u64 = STATUS_ERROR as u64;
const READ_DENIED: u64 = 0x6;
const WRITE_DENIED: u64 = 0x5;

#[tokio::test]
async fn each_command_does_what_its_table_says_and_shows_how_it_ended() {
    type Case = (&'static str, &'static [(u64, u64)], (u64, u64, u64, u64), &'static [&'static str]);
    let cases: &[Case] = &[
        (
            "copy",
            &[(SOURCE, 0x1000), (DESTINATION, 0x3000), (LENGTH, 100), (COMMAND, COMMAND_COPY as u64)],
            (DONE, 0, 0, 100),
            &["read 0x1000+100", "write 0x3000+100"],
        ),
        ("copy of nothing", &[(COMMAND, COMMAND_COPY as u64)], (DONE, 0, 0, 0), &[]),
        (
            "copy of two chunks",
            &[
                (SOURCE, 0x10_0000),
                (DESTINATION, 0x4_0000),
                (LENGTH, 0x4_0001),
                (COMMAND, COMMAND_COPY as u64),
            ],
            (DONE, 0, 0, 0x4_0001),
            &["read 0x100000+262144", "write 0x40000+262144", "read 0x140000+1", "write 0x80000+1"],
        ),
        (
            "copy from nowhere",
            &[(SOURCE, NOWHERE), (DESTINATION, 0x3000), (LENGTH, 8), (COMMAND, COMMAND_COPY as u64)],
            (ERROR, READ_DENIED, NOWHERE, 0),
            &["read 0xf000+8"],
        ),
        (
            "copy that runs into a hole",
            &[(SOURCE, 0x1000), (DESTINATION, 0xeff0), (LENGTH, 0x40), (COMMAND, COMMAND_COPY as u64)],
            (ERROR, WRITE_DENIED, NOWHERE, 0x10),
            &["read 0x1000+64", "write 0xeff0+64"],
        ),
        (
            "copy around the end of the address space",
            &[
                (SOURCE, 0x10_0000),
                (DESTINATION, 0xffff_ffff_fffc_0000),
                (LENGTH, 0x8_0000),
                (COMMAND, COMMAND_COPY as u64),
            ],
            (ERROR, REASON_WRAPS as u64, 0xffff_ffff_fffc_0000, 0x4_0000),
            &["read 0x100000+262144", "write 0xfffffffffffc0000+262144", "read 0x140000+262144"],
        ),
        (
            "fill",
            &[(DATA, 0x1122), (DESTINATION, 0x2000), (LENGTH, 12), (COMMAND, COMMAND_FILL as u64)],
            (DONE, 0, 0, 12),
            &["write 0x2000+12"],
        ),
        (
            "read",
            &[(SOURCE, 0x1000), (LENGTH, 4), (COMMAND, COMMAND_READ as u64)],
            (DONE, 0, 0, 4),
            &["read 0x1000+4"],
        ),
        (
            "zero-length read that is refused",
            &[(SOURCE, NOWHERE), (LENGTH, 0), (COMMAND, COMMAND_READ as u64)],
            (ERROR, READ_DENIED, NOWHERE, 0),
            &["read 0xf000+0"],
        ),
        (
            "write that is refused",
            &[(DESTINATION, NOWHERE + 8), (LENGTH, 4), (COMMAND, COMMAND_WRITE as u64)],
            (ERROR, WRITE_DENIED, NOWHERE + 8, 0),
            &["write 0xf008+4"],
        ),
        (
            "fetch-add",
            &[(DATA, 5), (DESTINATION, 0x2000), (LENGTH, 8), (COMMAND, COMMAND_FETCH_ADD as u64)],
            (DONE, 0, 0, 8),
            &["fetch-add 0x2000+8"],
        ),
        (
            "interrupt",
            &[
                (MSI_ADDRESS, 0xfee0_0010),
                (MSI_DATA, 3),
                (MSI_ENABLE, 1),
                (COMMAND, COMMAND_INTERRUPT as u64),
            ],
            (DONE, 0, 0, 0),
            &["msi 0xfee00010=0x3"],
        ),
    ];
    for (what, writes, expected, operations) in cases {
        let (engine, bus) = (Engine::new(), WrapAware(FakeBus::new()));
        write_all(&engine, writes).await;
        assert_eq!(read(&engine, STATUS), u64::from(STATUS_BUSY), "{what}");
        while engine.work_once(&bus).await {}
        assert_eq!(end(&engine), *expected, "{what}");
        assert_eq!(bus.0.log(), *operations, "{what}");
    }
}

/// Takes writes above the memory and forgets them, so that addresses of any size can be tried.
struct WrapAware(FakeBus);

impl Bus for WrapAware {
    fn operation_bytes_max(&self) -> u32 {
        u32::MAX
    }
    async fn read(&self, iova: Iova, size_bytes: u32) -> Result<Bytes, DmaError> {
        Bus::read(&self.0, iova, size_bytes).await
    }
    async fn write(&self, iova: Iova, data: Bytes) -> Result<(), DmaError> {
        if iova.get() >= MEMORY_BYTES as u64 {
            self.0.log.lock().unwrap().push(format!("write {:#x}+{}", iova.get(), data.len()));
            return Ok(());
        }
        Bus::write(&self.0, iova, data).await
    }
    async fn fetch_add(&self, iova: Iova, operand: AtomicValue) -> Result<AtomicValue, DmaError> {
        self.0.fetch_add(iova, operand).await
    }
    async fn msi(&self, address: Iova, data: u32) -> Result<(), DmaError> {
        self.0.msi(address, data).await
    }
    async fn read_each(&self, pieces: Vec<(Iova, u32)>) -> Result<Vec<Result<Bytes, DmaFault>>, DmaError> {
        self.0.read_each(pieces).await
    }
    async fn write_each(&self, pieces: Vec<(Iova, Bytes)>) -> Result<Vec<Result<(), DmaFault>>, DmaError> {
        self.0.write_each(pieces).await
    }
}

#[tokio::test]
async fn a_copy_moves_the_bytes_and_interrupts_when_it_is_done() {
    let (engine, bus) = (Engine::new(), FakeBus::new());
    let content = pattern::packet(1, 0x5_0000);
    bus.put(0x10_0000, &content);
    write_all(&engine, &[(MSI_ADDRESS, 0xfee0_0010), (MSI_DATA, 0x41), (MSI_ENABLE, 1)]).await;
    write_all(&engine, &[(SOURCE, 0x10_0000), (DESTINATION, 0x2_0000), (LENGTH, 0x5_0000)]).await;
    write(&engine, COMMAND, COMMAND_COPY.into()).await;
    work(&engine, &bus).await;
    assert_eq!(bus.get(0x2_0000, content.len()), content);
    assert_eq!(bus.log().last().unwrap(), "msi 0xfee00010=0x41");
}

#[tokio::test]
async fn chunks_are_as_small_as_the_bus_needs_them() {
    let (engine, bus) = (Engine::new(), FakeBus { operation_bytes_max: 100, ..FakeBus::new() });
    write_all(&engine, &[(SOURCE, 0x1000), (DESTINATION, 0x3000), (LENGTH, 200)]).await;
    write(&engine, COMMAND, COMMAND_COPY.into()).await;
    work(&engine, &bus).await;
    let expected = ["read 0x1000+96", "write 0x3000+96", "read 0x1060+96", "write 0x3060+96"];
    assert_eq!(bus.log()[..4], expected);
    assert_eq!(end(&engine), (DONE, 0, 0, 200));
}

#[tokio::test]
async fn a_refused_interrupt_is_shown() {
    let (engine, bus) = (Engine::new(), FakeBus::new());
    write_all(&engine, &[(MSI_ADDRESS, NOWHERE), (MSI_ENABLE, 1), (COMMAND, COMMAND_COPY.into())]).await;
    work(&engine, &bus).await;
    let status = u64::from(STATUS_DONE | STATUS_ERROR | STATUS_MSI_FAILED);
    assert_eq!(end(&engine), (status, 0x22, NOWHERE, 0));
    write(&engine, STATUS, status).await;
    assert_eq!(read(&engine, STATUS), 0, "done, error and failed are cleared by writing them");
}

#[tokio::test]
async fn what_was_read_and_the_old_value_of_an_atomic_are_in_data() {
    let (engine, bus) = (Engine::new(), FakeBus::new());
    bus.put(0x1000, &[1, 2, 3, 4, 5, 6, 7, 8, 9]);
    write_all(&engine, &[(SOURCE, 0x1000), (LENGTH, 9), (COMMAND, COMMAND_READ.into())]).await;
    work(&engine, &bus).await;
    assert_eq!(read(&engine, DATA), 0x0807_0605_0403_0201);
    write_all(&engine, &[(DESTINATION, 0x1000), (LENGTH, 4), (DATA, 1), (COMMAND, COMMAND_FETCH_ADD.into())])
        .await;
    work(&engine, &bus).await;
    assert_eq!(read(&engine, DATA), 0x0403_0201);
    assert_eq!(bus.get(0x1000, 4), [2, 2, 3, 4]);
}

#[tokio::test]
async fn accesses_that_make_no_sense_are_refused_in_words() {
    let engine = Engine::new();
    let at = |offset, width| Register { bar: 0, offset, width };
    let reads = [
        (at(0x100, AccessWidth::Bytes4), "no register at 0x100"),
        (at(STATUS, AccessWidth::Bytes8), "STATUS at 0x8 is 4 bytes wide"),
        (at(SOURCE + 2, AccessWidth::Bytes2), "SOURCE at 0x10 is 8 bytes wide"),
        (Register { bar: 2, ..at(STATUS, AccessWidth::Bytes4) }, "no BAR 2"),
    ];
    for (register, words) in reads {
        let refusal = engine.read_register(register).unwrap_err();
        assert!(refusal.why().contains(words), "{words}: {refusal}");
    }
    let writes = [
        (ID_VERSION, 0, "ID_VERSION is read-only"),
        (RING_HEAD, 0, "RING_HEAD is read-only"),
        (COMMAND, 0, "no command 0"),
        (COMMAND, 7, "no command 7"),
        (COMMAND, u64::from(COMMAND_FETCH_ADD), "LENGTH of 4 or 8"),
        (RING_TAIL, 0, "not enabled"),
        (RING_SIZE, 1, "RING_SIZE: 1 is not between"),
        (RING_CONTROL, u64::from(RING_ENABLE), "set RING_SIZE"),
        (RING_CONTROL, 129 << RING_BURST_SHIFT, "BURST: 129"),
        (PACKET_BYTES, 0, "PACKET_BYTES: 0"),
    ];
    for (offset, value, words) in writes {
        let refusal = engine.write_register(register(offset), value).await.unwrap_err();
        assert!(refusal.why().contains(words), "{words}: {refusal}");
    }
    write(&engine, COMMAND, COMMAND_COPY.into()).await;
    let busy = engine.write_register(register(COMMAND), COMMAND_COPY.into()).await.unwrap_err();
    assert!(busy.why().contains("BUSY"), "{busy}");
}

#[tokio::test]
async fn registers_of_8_bytes_are_read_and_written_in_halves_as_well() {
    let engine = Engine::new();
    let half = |offset| Register { bar: 0, offset, width: AccessWidth::Bytes4 };
    engine.write_register(half(SOURCE + 4), 0x1111_2222).await.unwrap();
    engine.write_register(half(SOURCE), 0x3333_4444).await.unwrap();
    assert_eq!(read(&engine, SOURCE), 0x1111_2222_3333_4444);
    assert_eq!(engine.read_register(half(SOURCE + 4)), Ok(0x1111_2222));
    assert_eq!(read(&engine, ID_VERSION), u64::from(ID << 16 | VERSION));
}

#[tokio::test]
async fn a_reset_is_a_power_on() {
    let engine = Engine::new();
    write_all(&engine, &[(SOURCE, 9), (RING_SIZE, 8), (COMMAND, COMMAND_COPY.into())]).await;
    write(&engine, CONTROL, CONTROL_RESET.into()).await;
    for offset in [SOURCE, RING_SIZE, COMMAND, STATUS, CONTROL] {
        assert_eq!(read(&engine, offset), 0, "register {offset:#x}");
    }
    assert!(!engine.work_once(&FakeBus::new()).await, "the command is forgotten");
}

const RING: u64 = 0x2000;

fn put_descriptor(bus: &FakeBus, index: u64, descriptor: Descriptor) {
    bus.put(RING + index * u64::from(DESCRIPTOR_BYTES), &descriptor.to_bytes());
}

fn descriptor(bus: &FakeBus, index: u64) -> Descriptor {
    let bytes = bus.get(RING + index * u64::from(DESCRIPTOR_BYTES), DESCRIPTOR_BYTES as usize);
    Descriptor::from_bytes(bytes.try_into().unwrap())
}

async fn enable_ring(engine: &Engine, size: u64, burst: u64, flags: u32) {
    write_all(engine, &[(RING_BASE, RING), (RING_SIZE, size), (PACKET_BYTES, 64)]).await;
    write_all(engine, &[(MSI_ADDRESS, 0xfee0_0000), (MSI_ENABLE, 1)]).await;
    let control = u64::from(RING_ENABLE | flags) | burst << RING_BURST_SHIFT;
    write(engine, RING_CONTROL, control).await;
}

#[tokio::test]
async fn a_packet_is_one_descriptor_read_and_one_content_write() {
    let (engine, bus) = (Engine::new(), FakeBus::new());
    put_descriptor(&bus, 0, Descriptor::for_buffer(Iova::new(0x5000), 2048));
    enable_ring(&engine, 4, 1, 0).await;
    write(&engine, RING_TAIL, 1).await;
    assert_eq!(read(&engine, STATUS), u64::from(STATUS_RING));
    work(&engine, &bus).await;
    assert_eq!(bus.log(), ["read 0x2000+32", "write 0x5000+64", "msi 0xfee00000=0x0"]);
    assert_eq!(bus.get(0x5000, 64), pattern::packet(0, 64));
    assert_eq!((read(&engine, RING_HEAD), read(&engine, RING_PACKETS), read(&engine, STATUS)), (1, 1, 0));
}

#[tokio::test]
async fn bursts_end_with_one_interrupt_and_completions_go_into_the_descriptors() {
    let (engine, bus) = (Engine::new(), FakeBus::new());
    for index in 0..4 {
        put_descriptor(&bus, index, Descriptor::for_buffer(Iova::new(0x5000 + index * 0x100), 32));
    }
    enable_ring(&engine, 4, 2, RING_WRITE_BACK).await;
    write(&engine, RING_TAIL, 3).await;
    work(&engine, &bus).await;
    let log = bus.log();
    assert_eq!(log.iter().filter(|line| line.starts_with("msi")).count(), 2, "3 packets in bursts of 2");
    assert_eq!(log.len(), 3 * 3 + 2);
    for index in 0..3 {
        let done = descriptor(&bus, index);
        assert_eq!((done.status, done.received_bytes, done.sequence), (COMPLETION_DONE, 32, index));
        assert_eq!(bus.get(0x5000 + index * 0x100, 32), pattern::packet(index, 32));
    }
    // Around the end of the ring.
    write(&engine, RING_TAIL, 1).await;
    work(&engine, &bus).await;
    assert_eq!((read(&engine, RING_HEAD), read(&engine, RING_PACKETS)), (1, 5));
    assert_eq!(descriptor(&bus, 3).sequence, 3);
    assert_eq!(descriptor(&bus, 0).sequence, 4);
}

#[tokio::test]
async fn a_refused_packet_is_completed_with_its_reason_and_the_ring_goes_on() {
    let (engine, bus) = (Engine::new(), FakeBus::new());
    put_descriptor(&bus, 0, Descriptor::for_buffer(Iova::new(NOWHERE), 64));
    put_descriptor(&bus, 1, Descriptor::default());
    put_descriptor(&bus, 2, Descriptor::for_buffer(Iova::new(0x5000), 64));
    enable_ring(&engine, 4, 4, RING_WRITE_BACK).await;
    write(&engine, RING_TAIL, 3).await;
    work(&engine, &bus).await;
    let error = |reason: u32| COMPLETION_DONE | COMPLETION_ERROR | reason << 16;
    let statuses = [0, 1, 2].map(|index| descriptor(&bus, index).status);
    assert_eq!(statuses, [error(WRITE_DENIED as u32), error(REASON_BAD_DESCRIPTOR), COMPLETION_DONE]);
    assert_eq!(read(&engine, STATUS), ERROR);
    assert_eq!(read(&engine, RING_HEAD), 3);
    assert_eq!(bus.get(0x5000, 64), pattern::packet(1, 64), "the second packet that was made");
}

#[tokio::test]
async fn a_ring_whose_descriptors_cannot_be_read_stops() {
    let (engine, bus) = (Engine::new(), FakeBus::new());
    write_all(&engine, &[(RING_BASE, NOWHERE), (RING_SIZE, 4), (RING_CONTROL, RING_ENABLE.into())]).await;
    write(&engine, RING_TAIL, 2).await;
    work(&engine, &bus).await;
    assert_eq!(end(&engine), (ERROR, READ_DENIED, NOWHERE, 0));
    assert_eq!((read(&engine, RING_CONTROL), read(&engine, RING_HEAD)), (0, 0));
}

#[tokio::test]
async fn serve_takes_up_what_is_written_while_it_waits() {
    let (engine, bus) = (Engine::new(), FakeBus::new());
    let driver = async {
        for round in 0..3 {
            write_all(&engine, &[(DESTINATION, 0x1000), (LENGTH, 8), (DATA, round)]).await;
            write(&engine, COMMAND, COMMAND_FILL.into()).await;
            while read(&engine, STATUS) != DONE {
                tokio::task::yield_now().await;
            }
            assert_eq!(bus.get(0x1000, 8), round.to_le_bytes());
        }
    };
    tokio::select! {
        () = engine.serve(&bus) => unreachable!("serving never ends"),
        () = driver => {}
    }
}
