//! Event messages: how a unit interrupts its software (VT-d 5.10 §7.2).
//!
//! A cause sets IP; while IM is clear the message goes out and IP is clear again. So a masked event is not lost: it is sent
//! when IM is cleared, unless software has dealt with every cause before. Fault events and invalidation completion events
//! have four registers each of the same shape, which is [`EventRegisters`].

/// An event message: a write of data to an address, never remapped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EventMessage {
    /// Where the message is written.
    pub address: u64,
    /// What is written.
    pub data: u32,
}

/// Where event messages go. Called under a lock of the unit, so that a message is out before the status that caused it can
/// be read: it must not block and must not call back into the unit or its registers.
pub trait EventSink: Send + Sync {
    /// Takes one message.
    fn deliver(&self, message: EventMessage);
}

const MASK: u32 = 1 << 31;
const PENDING: u32 = 1 << 30;

/// Control, data, address and upper address of one kind of event.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct EventRegisters {
    control: u32,
    data: u32,
    address: u32,
    upper_address: u32,
}

impl EventRegisters {
    /// As after a reset: masked, nothing pending.
    pub(super) const RESET: Self = Self { control: MASK, data: 0, address: 0, upper_address: 0 };

    /// A new cause, where none was set before.
    pub(super) fn raise(&mut self, sink: &dyn EventSink) {
        self.control |= PENDING;
        self.send_if_unmasked(sink);
    }
    /// Every cause was cleared by software.
    pub(super) fn withdraw(&mut self) {
        self.control &= !PENDING;
    }
    /// Reads dword 0 to 3 of the block.
    pub(super) fn read(&self, dword: u32) -> u32 {
        match dword {
            0 => self.control,
            1 => self.data,
            2 => self.address,
            _ => self.upper_address,
        }
    }
    /// Writes dword 0 to 3 of the block. Of the control register only IM is software's.
    pub(super) fn write(&mut self, dword: u32, value: u32, sink: &dyn EventSink) {
        match dword {
            0 => {
                self.control = (self.control & PENDING) | (value & MASK);
                self.send_if_unmasked(sink);
            }
            1 => self.data = value,
            2 => self.address = value & !3,
            _ => self.upper_address = value,
        }
    }
    fn send_if_unmasked(&mut self, sink: &dyn EventSink) {
        if self.control & (MASK | PENDING) == PENDING {
            self.control &= !PENDING;
            let address = u64::from(self.upper_address) << 32 | u64::from(self.address);
            sink.deliver(EventMessage { address, data: self.data });
        }
    }
}
