//! Interrupt remapping entries: one per interrupt of a device, admitting that device alone (SVT=1).

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard};

use iommu_hardware::drain::PendingDrain;
use iommu_hardware::vtd::spec::irte::{self, InterruptAddress, Irte};
use iommu_types::errors::LimitReached;
use iommu_types::{Hpa, Invalidation, Owner, SourceId};

use crate::account::OwnerAccount;
use crate::boot::Kernel;

/// The table has 4,096 entries: 64 KiB, enough for hundreds of devices with a vector per queue.
pub(crate) const ENTRIES_LOG2: u8 = 12;
/// Bytes of the table.
pub(crate) const TABLE_BYTES: u64 = irte::ENTRY_BYTES << ENTRIES_LOG2;
/// Vectors below belong to exceptions (Intel SDM 3A §6.2).
const FIRST_VECTOR: u8 = 0x20;

/// What a device is programmed with to raise an interrupt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MsiMessage {
    /// Where the device writes: FEEx_xxxx, in remappable format.
    pub address: u64,
    /// What it writes.
    pub data: u32,
    /// The vector that the owner sees.
    pub vector: u8,
}

/// The table and who has which entry.
pub(crate) struct InterruptEntries {
    table: Hpa,
    extended_mode: bool,
    taken: Mutex<Taken>,
}

#[derive(Default)]
struct Taken {
    entries: BTreeMap<u16, Entry>,
    vectors: BTreeMap<Owner, [u64; 4]>,
    /// Entries that were given back. Those from `untouched` on were never used.
    returned: Vec<u16>,
    untouched: u16,
}

#[derive(Clone, Copy)]
struct Entry {
    source: SourceId,
    owner: Owner,
    vector: u8,
}

impl InterruptEntries {
    pub(crate) fn new(table: Hpa, extended_mode: bool) -> Self {
        Self { table, extended_mode, taken: Mutex::default() }
    }
    fn lock(&self) -> MutexGuard<'_, Taken> {
        self.taken.lock().expect("nothing panics while it holds the interrupt table")
    }
    /// Forgets an owner that is gone and has no entries.
    pub(crate) fn forget(&self, owner: Owner) {
        self.lock().forget(owner);
    }
}

impl Taken {
    fn take(&mut self, source: SourceId, owner: Owner) -> Result<(u16, u8), LimitReached> {
        let reached = |limit: &str, allowed| LimitReached { limit: limit.to_owned(), allowed };
        let used = self.vectors.get(&owner).copied().unwrap_or_default();
        let is_free = |vector: &u8| used[usize::from(vector / 64)] & 1 << (vector % 64) == 0;
        let vectors = u64::from(u8::MAX - FIRST_VECTOR) + 1;
        let vector =
            (FIRST_VECTOR..=u8::MAX).find(is_free).ok_or_else(|| reached("vectors_per_owner", vectors))?;
        let index = match self.returned.pop() {
            Some(index) => index,
            None if self.untouched < 1 << ENTRIES_LOG2 => {
                self.untouched += 1;
                self.untouched - 1
            }
            None => return Err(reached("interrupts", 1 << ENTRIES_LOG2)),
        };
        self.vectors.entry(owner).or_default()[usize::from(vector / 64)] |= 1 << (vector % 64);
        self.entries.insert(index, Entry { source, owner, vector });
        Ok((index, vector))
    }
    /// Forgets the vectors of an owner that has no entries.
    fn forget(&mut self, owner: Owner) {
        self.vectors.remove(&owner);
    }
    fn give_back(&mut self, index: u16) -> Entry {
        let entry = self.entries.remove(&index).expect("an entry is given back once");
        let vectors = self.vectors.get_mut(&entry.owner).expect("the owner has a vector");
        vectors[usize::from(entry.vector / 64)] &= !(1 << (entry.vector % 64));
        self.returned.push(index);
        entry
    }
}

impl Kernel {
    /// Allocates an interrupt remapping entry for the source (SVT=1, SID=source). Its destination is the owner's tag
    /// (without extended interrupt mode the low 8 bits of it), its vector one that the owner does not use yet.
    pub fn allocate_interrupt(
        &self,
        account: &OwnerAccount,
        source: SourceId,
    ) -> Result<MsiMessage, LimitReached> {
        account.interrupts.charge(1)?;
        let mut taken = self.interrupts.lock();
        let (index, vector) =
            taken.take(source, account.owner()).inspect_err(|_| account.interrupts.refund(1))?;
        let entry = Irte::remapped(vector, account.tag(), Some(source));
        let entry = match self.interrupts.extended_mode {
            true => entry,
            false => entry.with_xapic_destination(account.tag() as u8),
        };
        self.store_interrupt_entry(index, entry);
        let address = InterruptAddress::remappable_request(index, false).into_bits();
        Ok(MsiMessage { address: address.into(), data: 0, vector })
    }
    /// Frees all entries of a source and invalidates them in the interrupt entry cache.
    pub fn free_interrupts(&self, source: SourceId) -> PendingDrain {
        let mut pending = PendingDrain::none();
        let mut freed = Vec::new();
        {
            let mut taken = self.interrupts.lock();
            let of_source = |(index, entry): (&u16, &Entry)| (entry.source == source).then_some(*index);
            let indexes: Vec<u16> = taken.entries.iter().filter_map(of_source).collect();
            for index in indexes {
                self.store_interrupt_entry(index, Irte::new());
                let what = Invalidation::InterruptIndex { index, mask: 0 };
                pending = pending.and(self.unit().invalidate(what));
                freed.push(taken.give_back(index));
            }
        }
        for entry in freed {
            self.account(entry.owner).interrupts.refund(1);
        }
        pending
    }
    fn store_interrupt_entry(&self, index: u16, entry: Irte) {
        let at = irte::entry_address(self.interrupts.table, index).expect("the table lies in memory");
        self.memory().store_u128(at, entry.into_bits()).expect("the table lies in memory");
    }
}
