//! What a live mapping takes: the resident memory of this process before and after making many.

use iommu_types::PAGE_SIZE_BYTES;
use vm_memory::GuestAddress;
use vm_memory::iommu::Iotlb as ReferenceIotlb;

use super::host::{Caches, Host, LARGE, Pages, map};
use crate::figure::{Figure, RatioOf};
use crate::report::Report;
use crate::resident::Resident;
use crate::samples::Samples;
use crate::stand::Bench;

/// So many that the rounding to pages does not show.
const MAPPINGS: u64 = 200_000;

/// Bytes per live mapping of 4 KiB, and their parts.
pub(crate) fn per_mapping(_bench: &mut Bench) -> anyhow::Result<Report> {
    let mut host = Host::boot(1 << 30, Caches { iotlb: LARGE, paging: LARGE })?;
    let mut pages = Pages::of(host.buffer(4 << 20)?);
    let mut domain = host.domain()?;
    map(&host, &mut domain, &mut pages);
    let before = Resident::of_this_process()?;
    for _ in 0..MAPPINGS {
        map(&host, &mut domain, &mut pages);
    }
    let ours = Resident::of_this_process()?.since(before);
    let before = Resident::of_this_process()?;
    let mut reference = ReferenceIotlb::new();
    for mapping in 0..MAPPINGS {
        // Frames in an order in which no two neighbours merge.
        let to = GuestAddress((mapping * 7919 % (1 << 24)) * PAGE_SIZE_BYTES);
        let from = GuestAddress(mapping * PAGE_SIZE_BYTES);
        reference
            .set_mapping(from, to, PAGE_SIZE_BYTES as usize, vm_memory::Permissions::ReadWrite)
            .map_err(|error| anyhow::anyhow!("fill the reference: {error}"))?;
    }
    let theirs = Resident::of_this_process()?.since(before);
    drop((domain, host, reference));
    let each = |bytes: u64| Samples::exactly(bytes as f64 / MAPPINGS as f64);
    Ok(Report {
        figures: vec![
            Figure::alone("memory-mapping", "bytes", &each(ours.all())).beside(
                "vm-memory Iotlb, per entry",
                &each(theirs.all()),
                RatioOf::ValueToReference,
            ),
            Figure::alone("memory-mapping-heap", "bytes", &each(ours.anonymous)),
            Figure::alone("memory-mapping-record-and-tables", "bytes", &each(ours.shared)),
        ],
        ..Report::default()
    })
}
