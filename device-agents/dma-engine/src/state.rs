//! The register file: what a driver's accesses read and change. No DMA here; writes say what is to be done.

use device_runtime::{DmaError, MmioRefusal, Register};
use iommu_types::{AccessWidth, DmaFault, Iova};

use crate::registers::*;

/// What a register write asks the engine to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Effect {
    /// Nothing beyond the register.
    None,
    /// There is work: a command, or descriptors.
    Work,
    /// Back to the state after power-on.
    Reset,
}

/// A command with its parameters, as they stood when it was written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Command {
    pub(crate) code: u32,
    pub(crate) source: u64,
    pub(crate) destination: u64,
    pub(crate) length: u32,
    pub(crate) data: u64,
}

/// Where an interrupt goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Msi {
    pub(crate) address: Iova,
    pub(crate) data: u32,
}

/// Why a command or packet did not succeed, as the fault registers show it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Failure {
    pub(crate) address: u64,
    pub(crate) reason: u32,
}

impl Failure {
    /// The failure of a DMA at `iova`.
    pub(crate) fn of(error: DmaError, iova: u64) -> Self {
        match error {
            DmaError::Fault(fault) => Self::of_fault(&fault),
            DmaError::SessionLost => Self { address: iova, reason: REASON_SESSION_LOST },
            DmaError::Reset => Self { address: iova, reason: REASON_RESET },
            DmaError::OverLimit { .. } => Self { address: iova, reason: REASON_OVER_LIMIT },
        }
    }

    pub(crate) fn of_fault(fault: &DmaFault) -> Self {
        Self { address: fault.iova.get(), reason: reason_code(fault) }
    }
}

/// The registers.
#[derive(Debug)]
pub(crate) struct State {
    pub(crate) status: u32,
    source: u64,
    destination: u64,
    length: u32,
    command: u32,
    /// A command that is not taken up yet.
    pub(crate) pending: Option<Command>,
    fault_address: u64,
    fault_reason: u32,
    pub(crate) bytes_done: u32,
    pub(crate) data: u64,
    msi_address: u64,
    msi_data: u32,
    msi_enable: u32,
    pub(crate) ring: Ring,
}

/// The registers of the ring.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Ring {
    pub(crate) base: u64,
    pub(crate) size: u32,
    pub(crate) control: u32,
    pub(crate) head: u32,
    pub(crate) tail: u32,
    pub(crate) packets: u32,
    /// Counts enablings: what a burst did under an earlier one is not accounted.
    pub(crate) enablings: u32,
    pub(crate) packet_bytes: u32,
}

impl Ring {
    pub(crate) fn is_enabled(&self) -> bool {
        self.control & RING_ENABLE != 0
    }

    pub(crate) fn has_work(&self) -> bool {
        self.is_enabled() && self.head != self.tail
    }

    pub(crate) fn burst(&self) -> u32 {
        ((self.control >> RING_BURST_SHIFT) & 0xff).max(1)
    }
}

impl State {
    pub(crate) fn at_power_on() -> Self {
        let ring = Ring {
            base: 0,
            size: 0,
            control: 0,
            head: 0,
            tail: 0,
            packets: 0,
            enablings: 0,
            packet_bytes: PACKET_BYTES_AT_POWER_ON,
        };
        Self {
            status: 0,
            source: 0,
            destination: 0,
            length: 0,
            command: 0,
            pending: None,
            fault_address: 0,
            fault_reason: 0,
            bytes_done: 0,
            data: 0,
            msi_address: 0,
            msi_data: 0,
            msi_enable: 0,
            ring,
        }
    }

    /// Where interrupts go, when they are enabled.
    pub(crate) fn msi_enabled(&self) -> Option<Msi> {
        (self.msi_enable & 1 != 0).then(|| self.msi())
    }

    pub(crate) fn msi(&self) -> Msi {
        Msi { address: Iova::new(self.msi_address), data: self.msi_data }
    }

    pub(crate) fn failed(&mut self, failure: Failure) {
        self.status |= STATUS_ERROR;
        self.fault_address = failure.address;
        self.fault_reason = failure.reason;
    }

    pub(crate) fn read(&self, register: Register) -> Result<u64, MmioRefusal> {
        let specification = find(register)?;
        let value = self.value(specification.offset);
        let shift = 8 * (register.offset - specification.offset);
        Ok((value >> shift) & register.width.mask())
    }

    pub(crate) fn write(&mut self, register: Register, value: u64) -> Result<Effect, MmioRefusal> {
        let specification = find(register)?;
        if !specification.writable {
            return Err(MmioRefusal::new(format!("register {} is read-only", specification.name)));
        }
        let shift = 8 * (register.offset - specification.offset);
        let mask = register.width.mask() << shift;
        let whole = (self.value(specification.offset) & !mask) | ((value << shift) & mask);
        self.set(specification.offset, whole)
    }

    fn value(&self, offset: u64) -> u64 {
        match offset {
            ID_VERSION => u64::from(ID << 16 | VERSION),
            STATUS => {
                let ring = if self.ring.has_work() { STATUS_RING } else { 0 };
                u64::from(self.status | ring)
            }
            SOURCE => self.source,
            DESTINATION => self.destination,
            LENGTH => self.length.into(),
            COMMAND => self.command.into(),
            FAULT_ADDRESS => self.fault_address,
            FAULT_REASON => self.fault_reason.into(),
            BYTES_DONE => self.bytes_done.into(),
            DATA => self.data,
            MSI_ADDRESS => self.msi_address,
            MSI_DATA => self.msi_data.into(),
            MSI_ENABLE => self.msi_enable.into(),
            RING_BASE => self.ring.base,
            RING_SIZE => self.ring.size.into(),
            RING_CONTROL => self.ring.control.into(),
            RING_HEAD => self.ring.head.into(),
            RING_TAIL => self.ring.tail.into(),
            RING_PACKETS => self.ring.packets.into(),
            PACKET_BYTES => self.ring.packet_bytes.into(),
            // CONTROL reads 0.
            _ => 0,
        }
    }

    fn set(&mut self, offset: u64, value: u64) -> Result<Effect, MmioRefusal> {
        // Registers of 4 bytes get no more than that: the access was checked.
        let low = value as u32;
        match offset {
            CONTROL if low & CONTROL_RESET != 0 => return Ok(Effect::Reset),
            STATUS => self.status &= !(low & (STATUS_DONE | STATUS_ERROR | STATUS_MSI_FAILED)),
            SOURCE => self.source = value,
            DESTINATION => self.destination = value,
            LENGTH => self.length = low,
            COMMAND => return self.start(low),
            DATA => self.data = value,
            MSI_ADDRESS => self.msi_address = value,
            MSI_DATA => self.msi_data = low,
            MSI_ENABLE => self.msi_enable = low & 1,
            RING_BASE => self.while_disabled("RING_BASE", |ring| ring.base = value)?,
            RING_SIZE if (2..=RING_SIZE_MAX).contains(&low) => {
                self.while_disabled("RING_SIZE", |ring| ring.size = low)?;
            }
            RING_SIZE => return Err(bounds("RING_SIZE", low, 2, RING_SIZE_MAX)),
            RING_CONTROL => return self.control_ring(low),
            RING_TAIL => return self.ring_doorbell(low),
            PACKET_BYTES if (1..=PACKET_BYTES_MAX).contains(&low) => self.ring.packet_bytes = low,
            PACKET_BYTES => return Err(bounds("PACKET_BYTES", low, 1, PACKET_BYTES_MAX)),
            _ => {}
        }
        Ok(Effect::None)
    }

    fn start(&mut self, code: u32) -> Result<Effect, MmioRefusal> {
        if self.status & STATUS_BUSY != 0 {
            return Err(MmioRefusal::new("a command is running; wait for STATUS.BUSY to clear"));
        }
        if !(COMMAND_COPY..=COMMAND_FETCH_ADD).contains(&code) {
            return Err(MmioRefusal::new(format!("there is no command {code}; commands are 1 to 6")));
        }
        if code == COMMAND_FETCH_ADD && !matches!(self.length, 4 | 8) {
            return Err(MmioRefusal::new(format!("FETCH_ADD needs a LENGTH of 4 or 8, not {}", self.length)));
        }
        self.command = code;
        self.status &= !(STATUS_DONE | STATUS_ERROR | STATUS_MSI_FAILED);
        self.status |= STATUS_BUSY;
        (self.fault_address, self.fault_reason, self.bytes_done) = (0, 0, 0);
        self.pending = Some(Command {
            code,
            source: self.source,
            destination: self.destination,
            length: self.length,
            data: self.data,
        });
        Ok(Effect::Work)
    }

    fn control_ring(&mut self, control: u32) -> Result<Effect, MmioRefusal> {
        let burst = control >> RING_BURST_SHIFT;
        if burst > RING_BURST_MAX {
            return Err(bounds("RING_CONTROL.BURST", burst, 0, RING_BURST_MAX));
        }
        let enables = control & RING_ENABLE != 0 && !self.ring.is_enabled();
        if enables && self.ring.size == 0 {
            return Err(MmioRefusal::new("set RING_SIZE before enabling the ring"));
        }
        if enables {
            (self.ring.head, self.ring.tail, self.ring.packets) = (0, 0, 0);
            self.ring.enablings = self.ring.enablings.wrapping_add(1);
        }
        self.ring.control = control;
        Ok(Effect::None)
    }

    fn ring_doorbell(&mut self, tail: u32) -> Result<Effect, MmioRefusal> {
        if !self.ring.is_enabled() {
            return Err(MmioRefusal::new("the ring is not enabled; set RING_CONTROL.ENABLE first"));
        }
        if tail >= self.ring.size {
            return Err(bounds("RING_TAIL", tail, 0, self.ring.size.saturating_sub(1)));
        }
        self.ring.tail = tail;
        Ok(Effect::Work)
    }

    fn while_disabled(&mut self, name: &str, set: impl FnOnce(&mut Ring)) -> Result<(), MmioRefusal> {
        if self.ring.is_enabled() {
            return Err(MmioRefusal::new(format!("{name} cannot change while the ring is enabled")));
        }
        set(&mut self.ring);
        Ok(())
    }
}

fn bounds(name: &str, value: u32, least: u32, most: u32) -> MmioRefusal {
    MmioRefusal::new(format!("{name}: {value} is not between {least} and {most}"))
}

/// The register that an access means, with a width that it can be accessed with.
fn find(register: Register) -> Result<&'static Specification, MmioRefusal> {
    if register.bar != 0 {
        return Err(MmioRefusal::new(format!("there is no BAR {}; registers are in BAR 0", register.bar)));
    }
    let found = ALL.iter().find(|known| {
        register.offset >= known.offset && register.offset - known.offset < u64::from(known.width.bytes())
    });
    let known =
        found.ok_or_else(|| MmioRefusal::new(format!("there is no register at {:#x}", register.offset)))?;
    let whole = register.width == known.width && register.offset == known.offset;
    let half = known.width == AccessWidth::Bytes8 && register.width == AccessWidth::Bytes4;
    if whole || half {
        return Ok(known);
    }
    let why = format!(
        "register {} at {:#x} is {} bytes wide; a {} access at {:#x} is not possible",
        known.name,
        known.offset,
        known.width.bytes(),
        register.width,
        register.offset
    );
    Err(MmioRefusal::new(why))
}
