//! A tenant in this process: an owner with a device that reads its pages. Shares of the IOTLB are given to owners.

use std::sync::Arc;

use anyhow::Context;
use iommu_hardware::dma::{Run, Transfer};
use iommu_hardware::vtd::Port;
use iommu_kernel::{DmaMap, Domain, OwnerMemory, Tick};
use iommu_types::{Direction, DomainOptions, GpaRange, Iova, Owner, PAGE_SIZE_BYTES, Protection, RequestId};

use super::host::Host;

/// A tenant: an owner of its own, a domain, a device, and pages that it reads.
pub(crate) struct Tenant {
    port: Port,
    pages: Vec<Iova>,
    _domain: Domain,
    _memory: OwnerMemory,
}

impl Tenant {
    /// With so many pages mapped, as virtual machine `number`.
    pub(crate) fn new(host: &mut Host, number: u32, pages: u64) -> anyhow::Result<Self> {
        let account = host.kernel.account(Owner::Vm(number));
        let mut memory = OwnerMemory::new(&host.kernel, Arc::clone(&account));
        // One frame is enough: what is looked up is the page, not what is behind it.
        let frame = memory.allocate(&host.kernel, PAGE_SIZE_BYTES).context("allocate a page")?;
        let options = DomainOptions::new(Protection::Strict);
        let mut domain = host.kernel.create_domain(&account, options).context("create a domain")?;
        let port = host.device(&mut domain)?;
        let map = |domain: &mut Domain| -> anyhow::Result<Iova> {
            let range = GpaRange::new(frame.base(), PAGE_SIZE_BYTES)?;
            let request = DmaMap::single(range, Direction::ToDevice, RequestId(1));
            domain.dma_map(&host.kernel, &memory, request, Tick(0)).context("map a page")
        };
        let pages = (0..pages).map(|_| map(&mut domain)).collect::<Result<_, _>>()?;
        Ok(Self { port, pages, _domain: domain, _memory: memory })
    }
    /// Reads eight bytes of each of these pages.
    pub(crate) fn read(&mut self, pages: impl Iterator<Item = u64>) {
        let mut run = Run::new(&mut self.port);
        let mut word = [0; 8];
        for page in pages {
            let iova = self.pages[page as usize];
            run.execute(iova, None, Transfer::Read(&mut word)).expect("every page is mapped");
        }
    }
}
