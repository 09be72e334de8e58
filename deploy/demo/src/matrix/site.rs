//! One side of an attack: a driver (or the operating system of a bare machine), its device, and the memory of both. It is used alike in every
//! column, so that an attack is written once.

use std::time::Duration;

use anyhow::{Context, ensure};
use rogue::language::{Connect, Dma};
use rogue::text::{Address, Hex};

use super::act::language::{Ask, Refused, Way};
use super::actor::Actor;
use super::column::Column;

/// Bytes of a page.
pub(crate) const PAGE: u64 = 4096;
/// What lies in memory that nobody may reach.
pub(crate) const CANARY: &[u8; 16] = b"canary:untouched";
/// The byte that attackers write.
pub(crate) const FILL: u8 = 0x66;
/// Bytes of one blow.
pub(crate) const BLOW: u32 = 64;

/// A driver and its device.
#[derive(Clone)]
pub(crate) struct Site {
    /// Who drives.
    pub(crate) actor: Actor,
    /// The device, which is hostile.
    pub(crate) rogue: Actor,
    /// Who the device is.
    pub(crate) connect: Connect,
    /// How it is kept from memory.
    pub(crate) column: Column,
    /// Where memory is handed out from, in a bare machine.
    pub(crate) next: u64,
    domain: Option<u64>,
    /// Occupies slot 0 of ring 0: its address is 0, and then small numbers pass for addresses.
    neighbour: Option<Mapping>,
    buffers: Vec<u64>,
}

/// What a driver mapped.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Mapping {
    pub(crate) iova: u64,
    pub(crate) gpa: u64,
    pub(crate) bytes: u64,
    pub(crate) way: Way,
}

impl Site {
    pub(crate) fn new(actor: Actor, rogue: Actor, connect: Connect, column: Column, next: u64) -> Self {
        Self { actor, rogue, connect, column, next, domain: None, neighbour: None, buffers: Vec::new() }
    }

    pub(crate) fn device(&self) -> String {
        self.connect.address.to_string()
    }

    pub(crate) fn is_bare(&self) -> bool {
        self.column == Column::None
    }

    /// A domain of the column's mode, with the device in it. Gives its number.
    pub(crate) async fn begin(&mut self) -> anyhow::Result<u64> {
        self.begin_with(Ask::Domain { column: self.column, device: self.device() }).await
    }

    /// The same with room for many pages.
    pub(crate) async fn begin_roomy(&mut self) -> anyhow::Result<u64> {
        self.begin_with(Ask::RoomyDomain { column: self.column, device: self.device() }).await
    }

    async fn begin_with(&mut self, ask: Ask) -> anyhow::Result<u64> {
        if self.is_bare() {
            return Ok(0);
        }
        let domain = self.actor.request(ask).await?.value;
        self.domain = Some(domain);
        if self.column == Column::Ring {
            let gpa = self.allocate(1).await?;
            self.neighbour = Some(self.map(gpa, PAGE, Way::FromDevice).await?);
        }
        Ok(domain)
    }

    /// Gives everything back: mappings go with the domain, and buffers after it.
    pub(crate) async fn end(&mut self) -> anyhow::Result<()> {
        self.leave().await?;
        for gpa in std::mem::take(&mut self.buffers) {
            // A buffer whose memory has gone is gone with it.
            let _ = self.actor.attempt(Ask::Free { gpa: Address(gpa) }).await?;
        }
        Ok(())
    }

    /// Leaves the domain and destroys it; the buffers stay.
    pub(crate) async fn leave(&mut self) -> anyhow::Result<()> {
        self.neighbour = None;
        if let Some(domain) = self.domain.take() {
            self.actor.request(Ask::Leave { device: self.device(), domain }).await?;
        }
        Ok(())
    }

    /// A buffer of so many pages.
    pub(crate) async fn allocate(&mut self, pages: u64) -> anyhow::Result<u64> {
        if self.is_bare() {
            let gpa = self.next;
            self.next += pages * PAGE;
            return Ok(gpa);
        }
        let gpa = self.actor.request(Ask::Allocate { bytes: pages * PAGE }).await?.value;
        self.buffers.push(gpa);
        Ok(gpa)
    }

    /// Maps, where there is anything to map.
    pub(crate) async fn try_map(
        &self,
        gpa: u64,
        bytes: u64,
        way: Way,
    ) -> anyhow::Result<Result<Mapping, Refused>> {
        if self.is_bare() {
            return Ok(Ok(Mapping { iova: gpa, gpa, bytes, way }));
        }
        let ask = Ask::Map { device: self.device(), gpa: Address(gpa), bytes, way };
        let mapped = self.actor.attempt(ask).await?;
        Ok(mapped.map(|reply| Mapping { iova: reply.value, gpa, bytes, way }))
    }

    pub(crate) async fn map(&self, gpa: u64, bytes: u64, way: Way) -> anyhow::Result<Mapping> {
        let mapped = self.try_map(gpa, bytes, way).await?;
        mapped.map_err(|refused| anyhow::anyhow!("map {bytes} bytes at {gpa:#x}: {refused:?}"))
    }

    /// Unmaps so many bytes at the mapping's address, which may be wrong.
    pub(crate) async fn try_unmap(
        &self,
        mapping: &Mapping,
        bytes: u64,
        end_of_burst: bool,
    ) -> anyhow::Result<Result<(), Refused>> {
        if self.is_bare() {
            return Ok(Ok(()));
        }
        let (iova, way) = (Address(mapping.iova), mapping.way);
        let ask = Ask::Unmap { device: self.device(), iova, bytes, way, end_of_burst };
        Ok(self.actor.attempt(ask).await?.map(drop))
    }

    pub(crate) async fn unmap(&self, mapping: &Mapping, end_of_burst: bool) -> anyhow::Result<()> {
        let unmapped = self.try_unmap(mapping, mapping.bytes, end_of_burst).await?;
        unmapped.map_err(|refused| anyhow::anyhow!("unmap {mapping:?}: {refused:?}"))
    }

    /// Ends a burst of unmaps, where there are bursts.
    pub(crate) async fn end_burst(&mut self) -> anyhow::Result<()> {
        match self.neighbour.take() {
            Some(neighbour) => self.unmap(&neighbour, true).await,
            None => Ok(()),
        }
    }

    /// Reads memory, as the CPU.
    pub(crate) async fn read(&self, gpa: u64, bytes: u64) -> anyhow::Result<Vec<u8>> {
        Ok(self.actor.request(Ask::Read { gpa: Address(gpa), bytes }).await?.bytes.0)
    }

    /// Writes memory, as the CPU.
    pub(crate) async fn write(&self, gpa: u64, bytes: &[u8]) -> anyhow::Result<()> {
        self.actor.request(Ask::Write { gpa: Address(gpa), data: Hex(bytes.to_vec()) }).await.map(drop)
    }

    /// Puts the canary everywhere into a range.
    pub(crate) async fn seed(&self, gpa: u64, bytes: u64) -> anyhow::Result<()> {
        self.write(gpa, &CANARY.repeat((bytes as usize).div_ceil(CANARY.len()))[..bytes as usize]).await
    }

    /// Whether the canary is everywhere in a range.
    pub(crate) async fn is_intact(&self, gpa: u64, bytes: u64) -> anyhow::Result<bool> {
        let expected = &CANARY.repeat((bytes as usize).div_ceil(CANARY.len()))[..bytes as usize];
        Ok(self.read(gpa, bytes).await? == expected)
    }

    /// One write of the device: why it was refused, when it was.
    pub(crate) async fn strike(&self, iova: u64) -> anyhow::Result<Option<String>> {
        Ok(self.rogue.dma(Dma::write(iova, vec![FILL; BLOW as usize])).await?.err())
    }

    /// One write of the device that must be let through.
    pub(crate) async fn allowed(&self, iova: u64) -> anyhow::Result<()> {
        let refused = self.strike(iova).await?;
        ensure!(refused.is_none(), "a write to what is mapped at {iova:#x} was refused with {refused:?}");
        Ok(())
    }

    /// Waits until the device has been told so many resets.
    pub(crate) async fn reset_told(&self, before: u64) -> anyhow::Result<()> {
        let wait = async {
            while self.rogue.status().await?.resets_told <= before {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
            anyhow::Ok(())
        };
        tokio::time::timeout(Duration::from_secs(10), wait).await.context("no reset came within 10 s")?
    }
}
