//! Brings up a unit as an operating system does, and translates.
//!
//! ```text
//! cargo run -p iommu-hardware --example bring_up
//! ```
#![expect(clippy::print_stdout, reason = "an example talks to a person")]

use std::sync::Arc;

use iommu_hardware::bare::BareMachine;
use iommu_hardware::dma::{Run, Transfer};
use iommu_hardware::vtd::spec::pte::{SecondStageEntry, entry_address};
use iommu_hardware::vtd::spec::registers::{Gcmd, offset};
use iommu_hardware::vtd::spec::root_context::{self, ContextEntry, RootEntry};
use iommu_hardware::vtd::{EventMessage, EventSink, QueueProgress};
use iommu_types::{Access, AccessWidth, Capabilities, DomainId, Hpa, Iova, PageSize, Permissions, SourceId};

struct PrintEvents;

impl EventSink for PrintEvents {
    fn deliver(&self, message: EventMessage) {
        println!("event: {:#x} written to {:#x}", message.data, message.address);
    }
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let machine = BareMachine::new(4 << 20, Capabilities::FULL, 1, Arc::new(PrintEvents))?;
    let memory = machine.memory();
    let device = SourceId::at(0, 3, 0).ok_or("a device number")?;

    // Tables: root -> context -> three levels -> one read-only page at IOVA 0x7000.
    let [root, contexts, level_3, level_2, level_1, buffer] =
        [0x1000, 0x2000, 0x3000, 0x4000, 0x5000, 0x8000].map(Hpa::new);
    let iova = Iova::new(0x7000);
    let context = ContextEntry::second_stage(level_3, 3, DomainId::new(1));
    let page = SecondStageEntry::leaf(buffer, PageSize::Size4K, Permissions::READ);
    let beyond = "an address beyond 64 bits";
    memory.store_u128(
        root_context::entry_address(root, device.bus()).ok_or(beyond)?,
        RootEntry::present(contexts).into_bits(),
    )?;
    memory.store_u128(
        root_context::entry_address(contexts, device.devfn()).ok_or(beyond)?,
        context.into_bits(),
    )?;
    for (table, level, entry) in [
        (level_3, 3, SecondStageEntry::table(level_2)),
        (level_2, 2, SecondStageEntry::table(level_1)),
        (level_1, 1, page),
    ] {
        memory.store_u64(entry_address(table, iova, level).ok_or(beyond)?, entry.into_bits())?;
    }
    memory.write(buffer, b"hello, device")?;

    // Registers: unmask fault events, set the root table, turn translation on.
    let registers = machine.registers();
    let write = |at: u32, value: u32| registers.write(at.into(), AccessWidth::Bytes4, value.into());
    write(offset::FEDATA, 0x41)?;
    write(offset::FEADDR, 0xfee0_0000)?;
    write(offset::FECTL, 0)?;
    registers.write(offset::RTADDR.into(), AccessWidth::Bytes8, root.get())?;
    write(offset::GCMD, Gcmd::new().with_set_root_table(true).into_bits())?;
    write(offset::GCMD, Gcmd::new().with_translation(true).into_bits())?;
    while let QueueProgress::Draining(drain) = registers.run_queue() {
        drain.wait_blocking();
    }
    println!("GSTS = {:#010x}", registers.read(offset::GSTS.into(), AccessWidth::Bytes4)?);

    // The device reads the page, and may not write it.
    let mut port = machine.port(device)?;
    let mut text = [0; 13];
    let mut run = Run::new(&mut port);
    let done = run.execute(iova, None, Transfer::Read(&mut text));
    println!("read at {iova}: {done:?}, {:?}", String::from_utf8_lossy(&text));
    let refused = run.execute(iova, None, Transfer::Write(b"overwritten"));
    println!("write at {iova}: {refused:?}");
    drop(run);

    for taken in machine.unit().take_faults() {
        println!("recorded: {}", taken.fault);
    }
    let explanation = machine.unit().explain(device, None, iova, Access::Write, 11);
    for step in &explanation.steps {
        println!("  {:?}[{}] at {}: {}", step.structure, step.index, step.at, step.reading);
    }
    println!("{}", explanation.conclusion);
    Ok(())
}
