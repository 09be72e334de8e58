//! How devices, address spaces and domains are named on the bus.

use std::fmt;
use std::str::FromStr;

/// A PCIe requester ID: bus, device and function in 16 bits, printed `00:1f.2`.
#[derive(Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SourceId(u16);

impl SourceId {
    /// The source with this 16-bit requester ID.
    pub const fn new(raw: u16) -> Self {
        Self(raw)
    }
    /// The source at a bus, device (0–31) and function (0–7); `None` when one is out of bounds.
    pub const fn at(bus: u8, device: u8, function: u8) -> Option<Self> {
        if device > 31 || function > 7 {
            return None;
        }
        Some(Self((bus as u16) << 8 | (device as u16) << 3 | function as u16))
    }
    /// The 16-bit requester ID.
    pub const fn get(self) -> u16 {
        self.0
    }
    /// Bus number: the index into the root table.
    pub const fn bus(self) -> u8 {
        (self.0 >> 8) as u8
    }
    /// Device and function: the index into the context table.
    pub const fn devfn(self) -> u8 {
        self.0 as u8
    }
    /// Device number, 0–31.
    pub const fn device(self) -> u8 {
        self.devfn() >> 3
    }
    /// Function number, 0–7.
    pub const fn function(self) -> u8 {
        self.devfn() & 7
    }
}

impl fmt::Display for SourceId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:02x}:{:02x}.{}", self.bus(), self.device(), self.function())
    }
}

impl fmt::Debug for SourceId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// A text that is not an address of a PCI function.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "{text:?} is not a PCI address; write bus:device.function as in 00:1f.2, with a segment as in 0000:00:1f.2"
)]
pub struct ParseAddressError {
    /// The text as given.
    pub text: String,
}

fn hex<const DIGITS: usize>(text: &str) -> Option<u16> {
    (text.len() == DIGITS && text.bytes().all(|b| b.is_ascii_hexdigit()))
        .then(|| u16::from_str_radix(text, 16).ok())?
}

impl FromStr for SourceId {
    type Err = ParseAddressError;
    fn from_str(text: &str) -> Result<Self, ParseAddressError> {
        let parse = || {
            let (bus, rest) = text.split_once(':')?;
            let (device, function) = rest.split_once('.')?;
            Self::at(hex::<2>(bus)? as u8, hex::<2>(device)? as u8, hex::<1>(function)? as u8)
        };
        parse().ok_or_else(|| ParseAddressError { text: text.to_owned() })
    }
}

/// Where a PCI function sits in the whole system: segment and source, printed `0000:00:1f.2`.
#[derive(Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct DeviceAddress {
    /// PCI segment group. Segment 0 is the host; each bare machine has one of its own.
    pub segment: u16,
    /// Requester ID inside the segment.
    pub source_id: SourceId,
}

impl DeviceAddress {
    /// The function `source_id` of `segment`.
    pub const fn new(segment: u16, source_id: SourceId) -> Self {
        Self { segment, source_id }
    }
}

impl fmt::Display for DeviceAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:04x}:{}", self.segment, self.source_id)
    }
}

impl fmt::Debug for DeviceAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for DeviceAddress {
    type Err = ParseAddressError;
    /// Reads `0000:00:1f.2`, or `00:1f.2` for segment 0.
    fn from_str(text: &str) -> Result<Self, ParseAddressError> {
        let error = || ParseAddressError { text: text.to_owned() };
        let (segment, source) = match text.split_once(':') {
            Some((segment, rest)) if rest.contains(':') => (hex::<4>(segment).ok_or_else(error)?, rest),
            _ => (0, text),
        };
        Ok(Self { segment, source_id: source.parse().map_err(|_: ParseAddressError| error())? })
    }
}

/// A process address space ID: 20 bits (PCIe).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Pasid(u32);

impl Pasid {
    /// The PASID with this number, or `None` when it needs more than 20 bits.
    pub const fn new(raw: u32) -> Option<Self> {
        if raw < 1 << 20 { Some(Self(raw)) } else { None }
    }
    /// The number.
    pub const fn get(self) -> u32 {
        self.0
    }
}

impl fmt::Display for Pasid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}", self.0)
    }
}

/// A domain identifier, as context entries and cache tags carry it (VT-d 5.10 §9.3). Printed in decimal.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct DomainId(u16);

impl DomainId {
    /// The domain with this identifier.
    pub const fn new(raw: u16) -> Self {
        Self(raw)
    }
    /// The identifier.
    pub const fn get(self) -> u16 {
        self.0
    }
}

impl fmt::Display for DomainId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.0, f)
    }
}
