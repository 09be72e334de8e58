//! Addresses that the driver gave one device: values written to its registers, and words that it read from coherent memory.
//!
//! The set has room for so many different values; the one that was not given for the longest time makes place, and from then on the set
//! *has lost* something, for good: what is not found may have been given. Three answers follow, and *never* is only given by a
//! set that has lost nothing.

use std::collections::BTreeMap;

use iommu_types::{AccessWidth, PAGE_SIZE_BYTES};

/// Different addresses that are remembered of a device that no sanitizer looks at.
const CARRIED_MAX: usize = super::SanitizerBounds::USUAL.supplied_per_device;

/// Halves of addresses that are remembered: the 4-byte registers of 16 KiB of registers.
const HALVES_MAX: usize = 4096;

/// A value written to a register of a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RegisterWrite {
    /// Where among the device's registers, in bytes.
    pub offset: u64,
    /// Width of the write. Those of one and two bytes give no address.
    pub width: AccessWidth,
    /// What was written.
    pub value: u64,
}

/// Whether the driver gave an address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Supply {
    Given,
    /// The set has lost entries, or the value came from memory that a device had written.
    Perhaps,
    Never,
}

#[derive(Clone, Copy, Debug)]
struct Given {
    /// When it was given last, among all that were.
    stamp: u64,
    /// Whether only the driver can have made it.
    is_certain: bool,
    /// Order of the latest time that it is known to have been given while no mapping covered it.
    dangling: Option<u64>,
}

/// What one device was given.
#[derive(Debug)]
pub(super) struct Supplied {
    capacity: usize,
    values: BTreeMap<u64, Given>,
    by_stamp: BTreeMap<u64, u64>,
    stamps: u64,
    has_lost: bool,
    /// Offset of a 4-byte register → what it was set to.
    halves: BTreeMap<u64, u32>,
}

impl Supplied {
    pub(super) fn new(capacity: usize, has_lost: bool) -> Self {
        Self {
            capacity: capacity.max(1),
            values: BTreeMap::new(),
            by_stamp: BTreeMap::new(),
            stamps: 0,
            has_lost,
            halves: BTreeMap::new(),
        }
    }
    /// Remembers a value.
    pub(super) fn give(&mut self, value: u64, is_certain: bool, dangling: Option<u64>) {
        self.stamps += 1;
        let stamp = self.stamps;
        if let Some(given) = self.values.get_mut(&value) {
            self.by_stamp.remove(&given.stamp);
            given.stamp = stamp;
            given.is_certain |= is_certain;
            given.dangling = given.dangling.max(dangling);
        } else {
            if self.values.len() >= self.capacity
                && let Some((_, oldest)) = self.by_stamp.pop_first()
            {
                self.values.remove(&oldest);
                self.has_lost = true;
            }
            self.values.insert(value, Given { stamp, is_certain, dangling });
        }
        self.by_stamp.insert(stamp, value);
    }
    /// The same for another domain: what mappings there were when it was given says nothing there, and the driver may be as right to have
    /// given it as the device is wrong to use it there. So it is open who is to blame for it.
    fn carried(mut self) -> Self {
        for given in self.values.values_mut() {
            (given.is_certain, given.dangling) = (false, None);
        }
        self
    }
    /// Something was given that was not looked at.
    pub(super) fn lose(&mut self) {
        self.has_lost = true;
    }
    /// The addresses that a register write may give: the value; and with 4 bytes, the value with what the registers beside it hold
    /// as the other half. Drivers write either half first, and not every device has its pairs at multiples of 8.
    pub(super) fn addresses_of(&mut self, write: RegisterWrite) -> [Option<u64>; 3] {
        let half = |value: u64| u32::try_from(value & u64::from(u32::MAX)).expect("masked to 32 bits");
        let pair = |low: u32, high: u32| u64::from(high) << 32 | u64::from(low);
        match write.width {
            AccessWidth::Bytes1 | AccessWidth::Bytes2 => [None; 3],
            AccessWidth::Bytes8 => {
                let (low, high) = (half(write.value), half(write.value >> 32));
                self.keep_half(write.offset, low);
                self.keep_half(write.offset.saturating_add(4), high);
                [Some(write.value), None, None]
            }
            AccessWidth::Bytes4 => {
                let value = half(write.value);
                self.keep_half(write.offset, value);
                let beside = |offset: Option<u64>| self.halves.get(&offset?).copied();
                let above = beside(write.offset.checked_add(4)).filter(|high| *high != 0);
                let below = beside(write.offset.checked_sub(4)).filter(|_| value != 0);
                [Some(value.into()), above.map(|high| pair(value, high)), below.map(|low| pair(low, value))]
            }
        }
    }
    fn keep_half(&mut self, offset: u64, value: u32) {
        if self.halves.len() >= HALVES_MAX && !self.halves.contains_key(&offset) {
            // A register that is not remembered may get the other half of an address later.
            self.has_lost = true;
            return;
        }
        self.halves.insert(offset, value);
    }
    /// Whether an address in `first..=last` was given.
    pub(super) fn within(&self, first: u64, last: u64) -> Supply {
        let mut inside = self.values.range(first..=last).map(|(_, given)| given.is_certain);
        match inside.next() {
            Some(true) => Supply::Given,
            Some(false) if inside.any(|is_certain| is_certain) => Supply::Given,
            Some(false) => Supply::Perhaps,
            None if self.has_lost => Supply::Perhaps,
            None => Supply::Never,
        }
    }
    /// Whether exactly this address was given. Numbers below a page are not remembered as addresses, so of those nobody can tell.
    pub(super) fn exactly(&self, address: u64) -> Supply {
        match self.within(address, address) {
            Supply::Never if address < PAGE_SIZE_BYTES => Supply::Perhaps,
            supply => supply,
        }
    }
    /// Whether the set holds exactly this address.
    pub(super) fn holds(&self, address: u64) -> bool {
        self.values.contains_key(&address)
    }
    /// Whether an address in `first..=last` is known to have been given after `order`, when nothing was mapped there.
    pub(super) fn dangled_after(&self, first: u64, last: u64, order: u64) -> bool {
        self.values.range(first..=last).any(|(_, given)| given.dangling.is_some_and(|at| at > order))
    }
}

/// What a device was given, wherever it is attached: it goes with the device from the sanitizer of one domain to that of the next, and
/// register writes in between are added.
#[derive(Debug)]
pub struct GivenAddresses(Supplied);

impl Default for GivenAddresses {
    fn default() -> Self {
        Self::nothing()
    }
}

impl GivenAddresses {
    /// Nothing, as after a reset that the device said that it did.
    pub fn nothing() -> Self {
        Self(Supplied::new(CARRIED_MAX, false))
    }
    /// Nobody knows what.
    pub fn unknown() -> Self {
        Self(Supplied::new(CARRIED_MAX, true))
    }
    pub(super) fn of(supplied: Supplied) -> Self {
        Self(supplied.carried())
    }
    pub(super) fn into_supplied(self) -> Supplied {
        self.0
    }
    /// Whether it is certain that nothing was given.
    pub fn is_nothing(&self) -> bool {
        !self.0.has_lost && self.0.values.is_empty()
    }
    /// A register was written while no sanitizer looked. Without mappings to compare with, each half counts as an address.
    pub fn written(&mut self, write: RegisterWrite) {
        let halves = [write.value & u64::from(u32::MAX), write.value >> 32];
        let halves = halves.into_iter().filter(|_| write.width == AccessWidth::Bytes8);
        let whole = self.0.addresses_of(write).into_iter().flatten();
        for value in whole.chain(halves) {
            self.0.give(value, false, None);
        }
    }
    /// Something was given that nobody looked at.
    pub fn lose(&mut self) {
        self.0.lose();
    }
}

/// A word that may be an address, as a device finds it in memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Word {
    /// Where it stands.
    pub(super) address: u64,
    pub(super) value: u64,
    pub(super) size_bytes: u64,
}

/// The aligned little-endian words of 8 and of 4 bytes that lie wholly in what was read at `first`.
pub(super) fn words(first: u64, bytes: &[u8]) -> impl Iterator<Item = Word> {
    let of_size = move |size_bytes: u64| {
        let skip = usize::try_from(first.wrapping_neg() % size_bytes).unwrap_or(usize::MAX);
        let aligned = bytes.get(skip..).unwrap_or_default();
        let start = first.saturating_add(skip as u64);
        let size = size_bytes as usize;
        aligned.chunks_exact(size).enumerate().map(move |(n, chunk)| {
            let mut padded = [0; 8];
            padded[..size].copy_from_slice(chunk);
            Word {
                address: start.saturating_add(n as u64 * size_bytes),
                value: u64::from_le_bytes(padded),
                size_bytes,
            }
        })
    };
    of_size(8).chain(of_size(4))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_set_that_has_lost_nothing_says_never() {
        let mut supplied = Supplied::new(2, false);
        supplied.give(0x5000, true, None);
        supplied.give(0x6010, false, None);
        let answers = |supplied: &Supplied| {
            [(0x5000, 0x5fff), (0x6000, 0x6fff), (0x5000, 0x6fff), (0x7000, 0x7fff)]
                .map(|(first, last)| supplied.within(first, last))
        };
        assert_eq!(answers(&supplied), [Supply::Given, Supply::Perhaps, Supply::Given, Supply::Never]);
        assert_eq!(
            [0x5000, 0x5001, 0, 0xfff].map(|address| supplied.exactly(address)),
            [Supply::Given, Supply::Never, Supply::Perhaps, Supply::Perhaps]
        );
        // Given again, 0x5000 stays, and 0x6010 makes place.
        supplied.give(0x5000, false, None);
        supplied.give(0x8000, true, None);
        assert_eq!(answers(&supplied), [Supply::Given, Supply::Perhaps, Supply::Given, Supply::Perhaps]);
        assert!(!supplied.holds(0x6010) && supplied.holds(0x5000));
        assert_eq!(supplied.values.len(), supplied.by_stamp.len());
    }

    #[test]
    fn what_is_carried_leaves_it_open_who_is_to_blame() {
        let mut supplied = Supplied::new(8, false);
        supplied.give(0x5000, true, Some(7));
        let mut given = GivenAddresses::of(supplied);
        assert!(!given.is_nothing() && GivenAddresses::nothing().is_nothing());
        let wide = RegisterWrite { offset: 0x10, width: AccessWidth::Bytes8, value: 0x7000_0000_8000 };
        given.written(wide);
        let supplied = given.into_supplied();
        assert!(!supplied.dangled_after(0x5000, 0x5000, 6), "orders of another domain mean nothing");
        for (address, expected) in [
            (0x5000, Supply::Perhaps),
            (0x7000_0000_8000, Supply::Perhaps),
            (0x8000, Supply::Perhaps),
            (0x7000, Supply::Perhaps),
            (0x9000, Supply::Never),
        ] {
            assert_eq!(supplied.exactly(address), expected, "{address:#x}");
        }
        let mut lost = GivenAddresses::nothing();
        lost.lose();
        for given in [lost, GivenAddresses::unknown()] {
            assert!(!given.is_nothing());
            assert_eq!(given.into_supplied().exactly(0x9000), Supply::Perhaps);
        }
    }

    #[test]
    fn two_halves_make_an_address_in_either_order() {
        use AccessWidth::{Bytes1, Bytes2, Bytes4, Bytes8};
        let mut supplied = Supplied::new(8, false);
        for (offset, width, value, expected) in [
            (0x10, Bytes4, 0x5000, vec![0x5000]),
            (0x14, Bytes4, 0x1, vec![0x1, 0x1_0000_5000]),
            (0x10, Bytes4, 0x6000, vec![0x6000, 0x1_0000_6000]),
            (0x24, Bytes4, 0x2, vec![0x2]),
            (0x20, Bytes4, 0x7000, vec![0x7000, 0x2_0000_7000]),
            (0x30, Bytes8, 0x3_0000_8000, vec![0x3_0000_8000]),
            (0x30, Bytes4, 0x9000, vec![0x9000, 0x3_0000_9000]),
            (0x40, Bytes1, 0xff, vec![]),
            (0x40, Bytes2, 0xffff, vec![]),
            (u64::MAX, Bytes8, 1, vec![1]),
            (0, Bytes4, 0x1_0000_0009, vec![9]),
        ] {
            let addresses = supplied.addresses_of(RegisterWrite { offset, width, value });
            assert_eq!(addresses.into_iter().flatten().collect::<Vec<_>>(), expected, "{offset:#x}");
        }
    }

    #[test]
    fn registers_beyond_those_remembered_count_as_lost() {
        let mut supplied = Supplied::new(8, false);
        for n in 0..=HALVES_MAX as u64 {
            assert_eq!(supplied.within(1, 1), Supply::Never, "{n}");
            supplied.addresses_of(RegisterWrite { offset: n * 8, width: AccessWidth::Bytes4, value: 1 });
        }
        assert_eq!(supplied.within(1, 1), Supply::Perhaps);
    }

    #[test]
    fn words_are_aligned_and_whole() {
        let bytes: Vec<u8> = (1..=15).collect();
        let found: Vec<_> = words(0x1006, &bytes).map(|word| (word.address, word.value)).collect();
        assert_eq!(
            found,
            [
                (0x1008, 0x0a09_0807_0605_0403),
                (0x1008, 0x0605_0403),
                (0x100c, 0x0a09_0807),
                (0x1010, 0x0e0d_0c0b)
            ]
        );
        assert_eq!(words(0x1001, &bytes[..2]).count(), 0);
        assert_eq!(words(u64::MAX, &bytes).count(), 1 + 3);
    }
}
