//! The frames of tables: got before a map that needs them begins, kept for the next, given back when they are too many.

use iommu_types::PAGE_SIZE_BYTES;

use super::super::Shortage;
use super::{Missing, SPARE_TABLES_MAX, Spares, Tables, Unhooked, level_of};
use crate::account::OwnerAccount;
use crate::boot::Kernel;
use crate::frames::frame_at;

impl Tables {
    pub(super) fn stock_up(
        &mut self,
        kernel: &Kernel,
        account: &OwnerAccount,
        wanted: Missing,
    ) -> Result<(), Shortage> {
        let before = Missing { single: self.spare.single.len(), pairs: self.spare.pairs.len() };
        let taken = self.take_frames(kernel, account, wanted);
        if taken.is_err() {
            self.give_back(kernel, account, before);
        }
        taken
    }
    fn take_frames(
        &mut self,
        kernel: &Kernel,
        account: &OwnerAccount,
        wanted: Missing,
    ) -> Result<(), Shortage> {
        while self.spare.single.len() < wanted.single {
            account.tables.charge(PAGE_SIZE_BYTES)?;
            let table = kernel.frames.allocate_table();
            self.spare.single.push(table.inspect_err(|_| account.tables.refund(PAGE_SIZE_BYTES))?);
        }
        while self.spare.pairs.len() < wanted.pairs {
            account.tables.charge(2 * PAGE_SIZE_BYTES)?;
            let pair = kernel.frames.allocate_table_pair();
            self.spare.pairs.push(pair.inspect_err(|_| account.tables.refund(2 * PAGE_SIZE_BYTES))?);
        }
        Ok(())
    }
    /// Returns spare frames until only `keep` are left. They are zeroed.
    fn give_back(&mut self, kernel: &Kernel, account: &OwnerAccount, keep: Missing) {
        let Spares { single, pairs } = &mut self.spare;
        for table in single.drain(keep.single.min(single.len())..) {
            kernel.frames.free_table(table);
            account.tables.refund(PAGE_SIZE_BYTES);
        }
        for pair in pairs.drain(keep.pairs.min(pairs.len())..) {
            kernel.frames.free_table(pair);
            kernel.frames.free_table(frame_at(pair, 1));
            account.tables.refund(2 * PAGE_SIZE_BYTES);
        }
    }
    /// Returns spare frames beyond those that are always kept.
    pub(in super::super) fn trim(&mut self, kernel: &Kernel, account: &OwnerAccount) {
        self.give_back(kernel, account, Missing { single: SPARE_TABLES_MAX, pairs: SPARE_TABLES_MAX });
    }
    /// Takes back frames of unhooked tables, after the drain. Their entries were all cleared.
    pub(in super::super) fn recycle(
        &mut self,
        kernel: &Kernel,
        account: &OwnerAccount,
        tables: &mut Vec<Unhooked>,
    ) {
        if tables.is_empty() {
            return;
        }
        for Unhooked { base, is_pair } in tables.drain(..) {
            if is_pair { self.spare.pairs.push(base) } else { self.spare.single.push(base) }
        }
        self.trim(kernel, account);
    }
    /// Returns every frame. Nothing may be cached any more.
    pub(in super::super) fn destroy(&mut self, kernel: &Kernel, account: &OwnerAccount) {
        for (key, node) in self.nodes.drain() {
            if self.has_extents && level_of(key) == 1 {
                self.spare.pairs.push(node.table);
            } else {
                self.spare.single.push(node.table);
            }
        }
        self.give_back(kernel, account, Missing::default());
    }
}
