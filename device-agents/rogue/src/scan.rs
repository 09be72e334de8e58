//! One address after the other: memory, and interrupts.

use std::collections::{BTreeMap, HashSet};

use iommu_proto::pb;

use crate::bounds::{
    LISTED_MAX, SCAN_ADDRESSES_MAX, SCAN_BATCH_BYTES, SCAN_BATCH_OPERATIONS, SCAN_BYTES_MAX,
};
use crate::device::{Device, Stopped, wrong};
use crate::execute::count;
use crate::language::{Answer, Claim, End, GuessInterrupts, Kind, Scan};
use crate::load::batch;
use crate::text::Address;

/// FEEx_xxxx in remappable format (VT-d 5.10 §5.1.2.2): bit 4 is the format, bits 19:5 the handle, bit 2 its bit 15.
const REMAPPABLE: u64 = 0xfee0_0000 | 1 << 4;

/// Where an interrupt of this index is written to.
const fn interrupt_address(index: u16) -> u64 {
    REMAPPABLE | (index as u64 & 0x7fff) << 5 | (index as u64 >> 15) << 2
}

#[derive(Debug, Default)]
struct Found {
    tried: u64,
    answered: u64,
    answered_at: Vec<Address>,
    canary_at: Vec<Address>,
    refused: BTreeMap<String, u64>,
    ended: Option<End>,
}

impl Found {
    fn answer(self) -> Answer {
        let Self { tried, answered, answered_at, canary_at, refused, ended } = self;
        Answer::Scanned { tried, answered, answered_at, canary_at, refused, ended }
    }

    /// Takes the answer to one operation at each of `addresses`, which read `size` bytes each.
    fn take(
        &mut self,
        addresses: &[u64],
        size: usize,
        canary: Option<&[u8]>,
        completions: &pb::DmaCompletions,
    ) {
        self.tried += addresses.len() as u64;
        self.answered +=
            addresses.len() as u64 - count(completions, &mut self.refused).min(addresses.len() as u64);
        let failed: HashSet<usize> = completions.fault_index.iter().map(|index| *index as usize).collect();
        let mut rest = completions.payload.as_ref();
        let mut done = completions.fault_done_bytes.iter();
        for (n, address) in addresses.iter().enumerate() {
            if failed.contains(&n) {
                // A refused read gives the bytes done.
                let bytes = done.next().map_or(0, |bytes| *bytes as usize);
                rest = rest.get(bytes.min(rest.len())..).unwrap_or_default();
                continue;
            }
            list(&mut self.answered_at, *address);
            let (read, further) = rest.split_at(size.min(rest.len()));
            rest = further;
            if canary.is_some_and(|canary| read.windows(canary.len()).any(|window| window == canary)) {
                list(&mut self.canary_at, *address);
            }
        }
    }
}

fn list(listed: &mut Vec<Address>, address: u64) {
    if listed.len() < LISTED_MAX {
        listed.push(Address(address));
    }
}

impl Device {
    pub(crate) async fn scan(&mut self, scan: &Scan) -> Result<Answer, Stopped> {
        if scan.size == 0 || scan.size > SCAN_BYTES_MAX {
            return wrong(format!("size: 1 to {SCAN_BYTES_MAX} bytes"));
        }
        if scan.canary.as_ref().is_some_and(|canary| canary.0.is_empty()) {
            return wrong("canary: at least one byte, or none given");
        }
        let (from, to, stride) = (scan.from.0, scan.to.0, scan.stride.0);
        if stride == 0 || from > to || (to - from) / stride >= SCAN_ADDRESSES_MAX {
            return wrong(format!("from, to, stride: 1 to {SCAN_ADDRESSES_MAX} addresses, ascending"));
        }
        let all: Vec<u64> = (0..=(to - from) / stride).map(|n| from + n * stride).collect();
        let canary = scan.canary.as_ref().map(|canary| canary.0.as_slice());
        Ok(self.sweep(&all, scan.size, scan.write, canary).await?.answer())
    }

    pub(crate) async fn guess_interrupts(&mut self, guess: &GuessInterrupts) -> Result<Answer, Stopped> {
        if guess.from > guess.to {
            return wrong("from, to: ascending");
        }
        let all: Vec<u64> = (guess.from..=guess.to).map(interrupt_address).collect();
        Ok(self.sweep(&all, 4, Some(0), None).await?.answer())
    }

    /// Writes this byte to all addresses, or reads there and looks for the canary. The end of the session is one more thing that was found: what was read
    /// before it stays read.
    async fn sweep(
        &mut self,
        all: &[u64],
        size: u32,
        write: Option<u8>,
        canary: Option<&[u8]>,
    ) -> Result<Found, Stopped> {
        let per_batch = (SCAN_BATCH_BYTES / u64::from(size)).clamp(1, SCAN_BATCH_OPERATIONS) as usize;
        let generation = self.generation(Claim::Current)?;
        let (kind, bytes_read) = match write {
            Some(_) => (Kind::Write, 0),
            None => (Kind::Read, size as usize),
        };
        let mut found = Found::default();
        for addresses in all.chunks(per_batch) {
            let payload = write.map_or_else(Vec::new, |byte| vec![byte; size as usize * addresses.len()]);
            let batch = batch(kind, addresses.to_vec(), size, payload.into(), generation);
            match self.carry(batch).await {
                Ok(completions) => found.take(addresses, bytes_read, canary, &completions),
                Err(Stopped::Ended(end)) => {
                    found.ended = Some(end);
                    break;
                }
                Err(wrong) => return Err(wrong),
            }
        }
        Ok(found)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn interrupt_addresses_are_those_of_the_remappable_format() {
        for (index, address) in
            [(0, 0xfee0_0010), (1, 0xfee0_0030), (0x7fff, 0xfeef_fff0), (0x8000, 0xfee0_0014)]
        {
            assert_eq!(interrupt_address(index), address, "{index:#x}");
        }
    }

    #[test]
    fn a_canary_is_found_where_it_was_read_also_behind_what_was_refused_in_the_middle() {
        let completions = pb::DmaCompletions {
            // The first reads 4 bytes, the second is refused after 2, the third reads 4.
            payload: b"aaaabbKEYc".to_vec().into(),
            fault_index: vec![1],
            fault_reason: vec![6],
            fault_iova: vec![0x1ffe],
            fault_done_bytes: vec![2],
            ..pb::DmaCompletions::default()
        };
        let mut found = Found::default();
        found.take(&[0x0, 0x1000, 0x2000], 4, Some(b"KEY"), &completions);
        assert_eq!((found.tried, found.answered), (3, 2));
        assert_eq!(found.canary_at, [Address(0x2000)]);
        assert_eq!(found.answered_at, [Address(0x0), Address(0x2000)]);
        assert_eq!(found.refused, BTreeMap::from([("0x6".to_owned(), 1)]));
    }
}
