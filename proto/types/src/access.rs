//! What a device asks for, what a mapping allows, and in which direction a driver says data will flow.

use std::fmt;

/// What a device asks of one address. Atomics need both permissions (VT-d 5.10 §3.6).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Access {
    /// A memory read. With a size of zero it is a zero-length read (CAP.ZLR).
    Read,
    /// A memory write.
    Write,
    /// A PCIe AtomicOp: FetchAdd, Swap or CAS.
    Atomic,
}

impl fmt::Display for Access {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Read => "read",
            Self::Write => "write",
            Self::Atomic => "atomic",
        })
    }
}

bitflags::bitflags! {
    /// What a mapping allows a device to do.
    #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
    pub struct Permissions: u8 {
        /// The device may read.
        const READ = 1;
        /// The device may write.
        const WRITE = 2;
    }
}

impl Permissions {
    /// Both permissions.
    pub const READ_WRITE: Self = Self::READ.union(Self::WRITE);

    /// Whether these permissions allow `access`.
    pub const fn allow(self, access: Access) -> bool {
        match access {
            Access::Read => self.contains(Self::READ),
            Access::Write => self.contains(Self::WRITE),
            Access::Atomic => self.contains(Self::READ_WRITE),
        }
    }
}

impl fmt::Display for Permissions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let letter = |bit, letter| if self.contains(bit) { letter } else { '-' };
        write!(f, "{}{}", letter(Self::READ, 'r'), letter(Self::WRITE, 'w'))
    }
}

/// Which way data flows, seen from the CPU (Linux `enum dma_data_direction`; NONE cannot be expressed).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Direction {
    /// The device reads and writes (`DMA_BIDIRECTIONAL`).
    Bidirectional,
    /// The device reads (`DMA_TO_DEVICE`).
    ToDevice,
    /// The device writes (`DMA_FROM_DEVICE`).
    FromDevice,
}

impl Direction {
    /// The permissions that a mapping of this direction grants to the device.
    pub const fn permissions(self) -> Permissions {
        match self {
            Self::Bidirectional => Permissions::READ_WRITE,
            Self::ToDevice => Permissions::READ,
            Self::FromDevice => Permissions::WRITE,
        }
    }
}

impl fmt::Display for Direction {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Bidirectional => "bidirectional",
            Self::ToDevice => "to-device",
            Self::FromDevice => "from-device",
        })
    }
}

/// Whether a device says that its address is translated already (the AT field of a PCIe request).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum AddressType {
    /// An ordinary request: the address is to be translated.
    #[default]
    Untranslated,
    /// A translation request (ATS): the device asks where an address leads.
    TranslationRequest,
    /// The device claims that it has translated the address itself (ATS).
    Translated,
}

impl AddressType {
    /// The two bits of the field.
    pub const fn bits(self) -> u8 {
        match self {
            Self::Untranslated => 0,
            Self::TranslationRequest => 1,
            Self::Translated => 2,
        }
    }
    /// The type with these bits; 3 is reserved.
    pub const fn from_bits(bits: u8) -> Option<Self> {
        match bits {
            0 => Some(Self::Untranslated),
            1 => Some(Self::TranslationRequest),
            2 => Some(Self::Translated),
            _ => None,
        }
    }
}

impl fmt::Display for AddressType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Untranslated => "untranslated",
            Self::TranslationRequest => "translation request",
            Self::Translated => "translated",
        })
    }
}
