//! The catalogue of attacks: who misbehaves, how, and what kind of violation it is.

/// A row of the matrix.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Row {
    /// Its number.
    pub(crate) number: u8,
    /// Who misbehaves.
    pub(crate) who: &'static str,
    /// What they do.
    pub(crate) what: &'static str,
    /// V1 bad address, V2 bad device, V3 invalid use (Willmann, Rixner, Cox, USENIX ATC 2008).
    pub(crate) violation: &'static str,
    /// R1 within an operating system, R2 between virtual machines or tenants.
    pub(crate) usage: &'static str,
    /// What is lost when the cell comes out otherwise.
    pub(crate) stake: &'static str,
}

const fn row(
    number: u8,
    who: &'static str,
    what: &'static str,
    violation: &'static str,
    usage: &'static str,
    stake: &'static str,
) -> Row {
    Row { number, who, what, violation, usage, stake }
}

/// All rows, in order.
pub(crate) const ROWS: [Row; 31] = [
    row(1, "buggy driver", "programs a raw memory address", "V1", "R1", "a wrong pointer in a driver overwrites the kernel"),
    row(2, "buggy driver", "length runs into the next page", "V1", "R1", "a wrong length overwrites the page behind a buffer"),
    row(3, "buggy driver", "length runs on within the last page", "V1", "R1", "a wrong length overwrites what shares the page"),
    row(4, "buggy driver", "device writes a buffer it may only read", "V1", "R1", "data on its way out are forged"),
    row(5, "buggy driver", "uses an address of another device", "V1", "R1", "one device writes into another one's buffers"),
    row(6, "buggy driver", "unmaps wrongly and twice, then DMA", "V1, V3", "R1", "bookkeeping errors become memory errors"),
    row(7, "buggy driver", "frees a page while DMA is outstanding", "V3", "R1", "the next user of the page is overwritten"),
    row(8, "buggy driver", "unmaps while the device still writes", "V3", "R1", "what the page holds next is overwritten"),
    row(9, "failing device", "flips a bit of the address", "V2", "R1", "a broken device overwrites memory at random"),
    row(10, "failing device", "repeats a completed descriptor", "V2, V3", "R1", "a late duplicate overwrites the next user of the page"),
    row(11, "malicious firmware", "scans all addresses for secrets", "V2", "R1", "secrets are read"),
    row(12, "malicious device", "writes between unmap and flush", "V3", "R1", "data are changed after they were checked"),
    row(13, "malicious device", "changes the header after the check", "V2", "R1", "a check is passed by what is not used"),
    row(14, "malicious device", "overwrites the neighbour on the page", "V2", "R1", "unrelated kernel objects are overwritten"),
    row(15, "malicious device", "overwrites a pointer behind the payload", "V2", "R1", "the kernel jumps where the device says"),
    row(16, "malicious device", "overwrites the driver's data before the buffer", "V2", "R1", "the driver's own pointers are overwritten"),
    row(17, "malicious device", "reaches an unmapped buffer by a second address", "V3", "R1", "an unmapped buffer is still written"),
    row(18, "malicious device", "forges ring and slot numbers", "V2", "R1", "buffers that were not posted are written"),
    row(19, "malicious device", "claims to be another device", "V2", "R2", "every rule is applied to the wrong device"),
    row(20, "malicious device", "claims that an address is translated", "V2", "R1, R2", "translation is skipped"),
    row(21, "malicious device", "goes to another device directly", "V2", "R2", "translation is gone around"),
    row(22, "malicious device", "forges interrupts", "V2", "R2", "another tenant's processor is interrupted at will"),
    row(23, "hostile guest", "maps memory that it does not own", "V1", "R2", "a guest reads and writes another guest"),
    row(24, "hypervisor, guest", "memory moves to another guest while mapped", "V3", "R2", "the next owner of memory is overwritten"),
    row(25, "hostile guest", "queues DMA until the device has a new owner", "V2, V3", "R2", "the next owner of a device is overwritten"),
    row(26, "the server", "uses a domain's number again", "V3", "R2", "the next domain inherits stale translations"),
    row(27, "the server", "reclaims a table page that is cached", "V3", "R2", "memory is walked as if it were a table"),
    row(28, "the server", "acknowledges before writes have landed", "V3", "R1, R2", "what was promised to be over is not"),
    row(29, "hostile tenant", "uses up maps and domains, floods, storms of faults", "V2", "R2", "one tenant stops the others, or hides their evidence"),
    row(30, "hostile tenant", "listens at the IOTLB (prime and probe)", "V2", "R2", "one tenant learns what another does"),
    row(31, "anybody", "DMA before attachment and after a restart", "V2", "R1, R2", "a machine is taken over before it is protected"),
];
