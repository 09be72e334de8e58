//! The driver process of the first protected DMA. It tells its parent, line by line, what it tries and what comes.

use std::path::PathBuf;

use anyhow::{Context, bail};
use dma_engine::pattern;
use dma_engine::registers::*;
use dma_engine::ring::Descriptor;
use guest_sdk::{
    Access, AccessQuestion, Connection, DeviceAddress, Direction, DomainOptions, Driver, Iova, Observer,
    Owner, Permissions, Protection,
};
use iommu_types::{Explanation, Fault, FaultReason, Outcome, Structure};
use sha2::{Digest, Sha256};

use crate::engine::{Ended, Engine};
use crate::records::{end_of_log, record_after, record_line};
use crate::report::{Step, Told};

/// The driver, as the server's embedded configuration knows it.
pub(crate) const NAME: &str = "driver0";
pub(crate) const OWNER: Owner = Owner::Driver(0);
/// The observer for whom the server makes a certificate by itself.
const OBSERVER: &str = "observer";
/// A file is held in memory and in two buffers of the server.
const FILE_BYTES_MAX: u64 = 64 << 20;
/// Bytes of the packet that the ring receives: an Ethernet frame.
const PACKET: u32 = 1500;
/// An address that nothing maps: the allocator hands out addresses from the top of the first 4 GiB down.
const NEVER_MAPPED: Iova = Iova::new(0x0dea_d000);

/// What the parent says on the command line.
#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// Where the server listens.
    #[arg(long)]
    server: String,
    /// The device.
    #[arg(long)]
    device: DeviceAddress,
    /// The file to copy.
    #[arg(long)]
    file: PathBuf,
}

/// Runs all steps.
pub(crate) async fn run(options: Options) -> anyhow::Result<()> {
    let driver =
        Connection::to(&options.server).driver(NAME, OWNER).await.context("open a session as driver")?;
    // Physical addresses and raw entries are for observers; a driver sees neither.
    let observer =
        Connection::to(&options.server).observer(OBSERVER).await.context("open a session as observer")?;
    let device = driver.device(options.device);
    let engine = Engine::start(&driver, device).await?;
    let mut play = Play { driver, observer, engine };
    play.copy_a_file(&options.file).await?;
    play.receive_through_the_ring().await?;
    play.never_mapped().await?;
    play.write_to_read_only().await?;
    play.after_unmap().await?;
    play.no_context_entry().await?;
    play.interrupt_through_remapping().await
}

struct Play {
    driver: Driver,
    observer: Observer,
    engine: Engine,
}

fn begin(name: &str, story: &str) -> anyhow::Result<()> {
    Told::Begin { name: name.to_owned(), story: story.to_owned() }.tell()
}

fn end(
    name: &str,
    expected: &str,
    observed: String,
    passed: bool,
    details: Vec<String>,
) -> anyhow::Result<()> {
    let (name, expected) = (name.to_owned(), expected.to_owned());
    Told::End(Box::new(Step { name, expected, observed, passed, details, attack: None })).tell()
}

fn sha256(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
}

impl Play {
    async fn copy_a_file(&mut self, path: &std::path::Path) -> anyhow::Result<()> {
        const NAME: &str = "copy a file";
        let length = std::fs::metadata(path).with_context(|| format!("FILE: {}", path.display()))?.len();
        if length == 0 || length > FILE_BYTES_MAX {
            bail!(
                "FILE: {} has {length} bytes; this demonstration takes 1 to {FILE_BYTES_MAX}",
                path.display()
            );
        }
        begin(
            NAME,
            &format!(
                "the device copies {length} bytes from one mapped buffer to another; the driver checks SHA-256"
            ),
        )?;
        let contents = std::fs::read(path).with_context(|| format!("FILE: {}", path.display()))?;
        let before = sha256(&contents);
        let source = self.driver.allocate(length).await?;
        let destination = self.driver.allocate(length).await?;
        source.write(0, contents).await?;
        let device = self.engine.device().clone();
        let from = self.driver.dma_map_single(&device, source.slice(0, length)?, Direction::ToDevice).await?;
        let to =
            self.driver.dma_map_single(&device, destination.slice(0, length)?, Direction::FromDevice).await?;
        let (from_iova, to_iova) = (from.iova(), to.iova());
        let ended = self.engine.copy(from_iova, to_iova, u32::try_from(length)?).await?;
        from.unmap().await?;
        to.unmap().await?;
        let after = sha256(&destination.read(0, length).await?);
        let passed = before == after && ended.reason == 0 && u64::from(ended.bytes_done) == length;
        let details = vec![
            format!(
                "mapped {} at {from_iova} for reading, {} at {to_iova} for writing",
                source.gpa(),
                destination.gpa()
            ),
            format!("SHA-256 before {before}"),
            format!("SHA-256 after  {after}"),
        ];
        let observed = format!(
            "{} bytes copied, checksums {}",
            ended.bytes_done,
            if passed { "agree" } else { "DIFFER" }
        );
        source.free().await.map_err(|(_, error)| error)?;
        destination.free().await.map_err(|(_, error)| error)?;
        end(NAME, "the copy arrives unchanged", observed, passed, details)
    }

    /// The lecture's receive flow: map → the device reads the descriptor head, then writes the content → interrupt → unmap.
    async fn receive_through_the_ring(&mut self) -> anyhow::Result<()> {
        const NAME: &str = "receive through the ring";
        begin(
            NAME,
            "map a buffer, post its descriptor, let the device receive a packet, unmap: two translations, and what the IOTLB made of them",
        )?;
        let device = self.engine.device().clone();
        let ring = self.driver.dma_alloc_coherent(&device, 4096).await?;
        let buffer = self.driver.allocate(u64::from(PACKET)).await?;
        device.write64(RING_BASE, ring.iova().get()).await?;
        device.write32(RING_SIZE, 8).await?;
        device.write32(PACKET_BYTES, PACKET).await?;
        // Completions are told by the interrupt and RING_HEAD alone, so that a packet is exactly two translations.
        device.write32(RING_CONTROL, RING_ENABLE | 1 << RING_BURST_SHIFT).await?;
        // The first packet brings the ring's page into the IOTLB, as in a driver that has been running.
        self.receive(&ring, &buffer, 0).await?;
        let before = self.observer.inspect().counters(None).await?;
        let (iova, content) = self.receive(&ring, &buffer, 1).await?;
        let after = self.observer.inspect().counters(None).await?;
        device.write32(RING_CONTROL, 0).await?;
        ring.free().await?;
        let hits = after.iotlb.hits - before.iotlb.hits;
        let misses = after.iotlb.misses - before.iotlb.misses;
        let right = content[..] == pattern::packet(1, PACKET as usize)[..];
        buffer.free().await.map_err(|(_, error)| error)?;
        let details = vec![
            format!("map      buffer mapped at {iova}, descriptor posted, doorbell rung"),
            "receive  1. the device reads the descriptor head: IOTLB hit (the ring's page stays mapped)"
                .to_owned(),
            "         2. the device writes the content: IOTLB miss, walk, fill (the buffer is mapped afresh)"
                .to_owned(),
            format!(
                "unmap    {} invalidations since the packet before was posted",
                after.invalidations - before.invalidations
            ),
            format!(
                "counters {} translations: {misses} miss, {hits} hit; {} table entries read",
                hits + misses,
                after.walk_reads - before.walk_reads
            ),
        ];
        end(
            NAME,
            "two translations, one IOTLB miss, one hit; the packet is right",
            format!(
                "{} translations, {misses} miss, {hits} hit, packet {}",
                hits + misses,
                if right { "right" } else { "WRONG" }
            ),
            hits == 1 && misses == 1 && right,
            details,
        )
    }

    /// One packet: map, post, wait, unmap. The address it was mapped at, and what it holds.
    async fn receive(
        &mut self,
        ring: &guest_sdk::Coherent,
        buffer: &guest_sdk::Buffer,
        index: u32,
    ) -> anyhow::Result<(Iova, bytes::Bytes)> {
        let device = self.engine.device().clone();
        let memory = buffer.slice(0, u64::from(PACKET))?;
        let mapping = self.driver.dma_map_single(&device, memory, Direction::FromDevice).await?;
        let iova = mapping.iova();
        let descriptor = Descriptor::for_buffer(iova, PACKET).to_bytes();
        let slot = ring
            .range()
            .base()
            .checked_add(u64::from(index) * descriptor.len() as u64)
            .context("the ring ends")?;
        ring.memory().write(slot, bytes::Bytes::copy_from_slice(&descriptor)).await?;
        device.write32(RING_TAIL, index + 1).await?;
        self.engine.interrupted().await?;
        mapping.unmap().await?;
        Ok((iova, buffer.read(0, u64::from(PACKET)).await?))
    }

    async fn never_mapped(&mut self) -> anyhow::Result<()> {
        const NAME: &str = "an address never mapped";
        begin(
            NAME,
            "a buggy driver gives the device an address that was never mapped (V1, bad-address fault)",
        )?;
        let token = end_of_log(&self.driver).await?;
        let ended = self.engine.read(NEVER_MAPPED, 64).await?;
        self.refused(NAME, &token, &ended, NEVER_MAPPED, Access::Read, FaultReason::READ_DENIED, Vec::new())
            .await
    }

    async fn write_to_read_only(&mut self) -> anyhow::Result<()> {
        const NAME: &str = "a write to a read-only mapping";
        begin(NAME, "the buffer is mapped to-device; the device writes to it all the same")?;
        let buffer = self.driver.allocate(4096).await?;
        buffer.write(0, vec![0x5a_u8; 4096]).await?;
        let device = self.engine.device().clone();
        let mapping = self.driver.dma_map_single(&device, buffer.range(), Direction::ToDevice).await?;
        let token = end_of_log(&self.driver).await?;
        let ended = self.engine.write(mapping.iova(), 64).await?;
        let intact = buffer.read(0, 4096).await?.iter().all(|&byte| byte == 0x5a);
        let details = vec![format!("the buffer is {}", if intact { "untouched" } else { "CHANGED" })];
        let iova = mapping.iova();
        self.refused(NAME, &token, &ended, iova, Access::Write, FaultReason::WRITE_DENIED, details).await?;
        mapping.unmap().await?;
        buffer.free().await.map_err(|(_, error)| error)?;
        if !intact {
            bail!("a write to a read-only mapping changed memory");
        }
        Ok(())
    }

    async fn after_unmap(&mut self) -> anyhow::Result<()> {
        const NAME: &str = "a DMA after unmap";
        begin(
            NAME,
            "the device writes, so that the IOTLB holds the translation; the driver unmaps; the device writes again (V3, invalid-use fault)",
        )?;
        let buffer = self.driver.allocate(4096).await?;
        let device = self.engine.device().clone();
        let mapping = self.driver.dma_map_single(&device, buffer.range(), Direction::FromDevice).await?;
        let iova = mapping.iova();
        let allowed = self.engine.write(iova, 64).await?;
        mapping.unmap().await?;
        buffer.write(0, vec![0_u8; 4096]).await?;
        let token = end_of_log(&self.driver).await?;
        let ended = self.engine.write(iova, 64).await?;
        let intact = buffer.read(0, 4096).await?.iter().all(|&byte| byte == 0);
        if allowed.reason != 0 || !intact {
            bail!(
                "before unmap: {allowed:?}; after unmap the buffer is {}",
                if intact { "untouched" } else { "CHANGED" }
            );
        }
        let details = vec!["before unmap the write landed; after unmap the buffer is untouched".to_owned()];
        self.refused(NAME, &token, &ended, iova, Access::Write, FaultReason::WRITE_DENIED, details).await?;
        buffer.free().await.map_err(|(_, error)| error).map_err(Into::into)
    }

    async fn no_context_entry(&mut self) -> anyhow::Result<()> {
        const NAME: &str = "a device with no context entry";
        begin(
            NAME,
            "the device is detached from its domain, so that its context entry is not present; it reads",
        )?;
        let device = self.engine.device().clone();
        let domain = self.driver.create_domain(DomainOptions::new(Protection::Strict)).await?;
        let buffer = self.driver.allocate(4096).await?;
        let iova = Iova::new(0x10_0000);
        domain.map(iova, buffer.gpa(), 4096, Permissions::READ_WRITE).await?;
        domain.attach(&device).await?;
        let allowed = self.engine.read(iova, 64).await?;
        device.detach().await?;
        let token = end_of_log(&self.driver).await?;
        let ended = self.engine.read(iova, 64).await?;
        if allowed.reason != 0 {
            bail!("the read of an attached device was refused: {allowed:?}");
        }
        let details = vec!["attached, the same read was allowed (domain API, fixed address)".to_owned()];
        self.refused(NAME, &token, &ended, iova, Access::Read, FaultReason::CONTEXT_NOT_PRESENT, details)
            .await?;
        device.attach_default().await?;
        domain.destroy().await?;
        buffer.free().await.map_err(|(_, error)| error).map_err(Into::into)
    }

    async fn interrupt_through_remapping(&mut self) -> anyhow::Result<()> {
        const NAME: &str = "an interrupt through remapping";
        begin(
            NAME,
            "the device writes its MSI; the remapping table turns the index into a vector. Then it forges the index of another",
        )?;
        let ended = self.engine.interrupt().await?;
        let vector = self.engine.vector;
        let device = self.engine.device().clone();
        // The remappable format has the index in bits 19:5; the next index is not this device's.
        let forged = vector.address.get() ^ (1 << 5);
        let token = end_of_log(&self.driver).await?;
        device.write32(MSI_ENABLE, 0).await?;
        device.write64(MSI_ADDRESS, forged).await?;
        device.write32(COMMAND, COMMAND_INTERRUPT).await?;
        let record = record_after(&self.driver, &token).await?;
        let refused = matches!(record.fault, Fault::Interrupt(fault) if fault.reason == FaultReason::IR_NOT_PRESENT
            || fault.reason == FaultReason::IR_SOURCE_DENIED);
        let details = vec![
            format!("address {} data {:#x} became vector {:#x}", vector.address, vector.data, vector.vector),
            format!("forged address {forged:#x}: {}", record_line(&record)),
        ];
        end(
            NAME,
            "delivered with its vector; the forged one refused",
            format!("delivered as vector {:#x}; forged: {}", vector.vector, record.fault.reason()),
            ended.reason == 0 && refused,
            details,
        )
    }

    /// Checks that an access was refused: in the device's registers, in the fault log, and by explanation.
    #[expect(clippy::too_many_arguments, reason = "the facts of one refusal, told once")]
    async fn refused(
        &self,
        name: &str,
        token: &str,
        ended: &Ended,
        iova: Iova,
        access: Access,
        reason: FaultReason,
        mut details: Vec<String>,
    ) -> anyhow::Result<()> {
        let record = record_after(&self.driver, token).await?;
        let question = AccessQuestion {
            device: self.engine.device().address(),
            pasid: None,
            iova,
            access,
            size_bytes: 64,
        };
        let explanation = self.observer.inspect().explain(question).await?;
        let recorded = match record.fault {
            Fault::Dma(fault) => {
                fault.reason == reason && fault.access == access && fault.iova.page_base() == iova.page_base()
            }
            Fault::Interrupt(_) => false,
        };
        let explained = matches!(explanation.outcome, Outcome::Refused(fault) if fault.reason == reason);
        let device_saw =
            ended.status & STATUS_ERROR != 0 && ended.reason == u32::from(reason.0) && ended.bytes_done == 0;
        details.push(format!(
            "device   ERROR, reason {:#x} at {:#x}, {} bytes done",
            ended.reason, ended.address, ended.bytes_done
        ));
        details.push(format!("recorded {}", record_line(&record)));
        details.extend(walk_lines(&explanation));
        end(
            name,
            &format!("refused with {reason}; recorded; explained"),
            format!(
                "{}, {}, {}",
                if device_saw { "refused" } else { "NOT REFUSED" },
                if recorded {
                    format!("recorded as {:#04x}", reason.0)
                } else {
                    format!("recorded as {:?}", record.fault)
                },
                if explained { "explained" } else { "explained OTHERWISE" }
            ),
            device_saw && recorded && explained,
            details,
        )
    }
}

/// The explained walk, entry by entry.
fn walk_lines(explanation: &Explanation) -> Vec<String> {
    let mut lines: Vec<String> = explanation.steps.iter().map(walk_line).collect();
    lines.push(format!("because  {}", explanation.conclusion));
    lines
}

fn walk_line(step: &iommu_types::Step) -> String {
    let structure = match step.structure {
        Structure::Root => "root".to_owned(),
        Structure::Context => "context".to_owned(),
        Structure::SecondStage { level } => format!("level {level}"),
        Structure::RingRoot => "rroot".to_owned(),
        Structure::RingDevice => "rdevice".to_owned(),
        Structure::Ring => "rring".to_owned(),
        Structure::RingSlot => "rpte".to_owned(),
    };
    let raw = match (step.low, step.high) {
        (Some(low), Some(high)) => format!("{high:016x}:{low:016x}"),
        (Some(low), None) => format!("{low:016x}"),
        (None, _) => "unreadable".to_owned(),
    };
    format!("walk     {structure:<8} entry {:>3}  {raw:<33}  {}", step.index, step.reading)
}
