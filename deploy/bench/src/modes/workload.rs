//! The load: a receive ring and a transmit ring of a NIC, as the rIOMMU paper's two NICs use them.
//!
//! A descriptor is a packet of 1,500 bytes, in one buffer or in two. The receive ring is always full. Both rings complete packets in bursts;
//! an interrupt ends the burst of each ring. Receive buffers are halves of pages; transmit buffers lie end to end, as programs
//! leave them, so that some cross a page: the mix of sizes that the classic allocator is slow with comes from there.

/// How a driver lays a packet out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Profile {
    /// As the paper's 40 GbE NIC: headers in one buffer, the rest in another.
    Mlx,
    /// As its 10 GbE NIC: one buffer.
    Brcm,
}

impl Profile {
    /// As figures name it.
    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Mlx => "mlx",
            Self::Brcm => "brcm",
        }
    }
    /// Bytes in each buffer of a packet: 1,500 together.
    pub(crate) const fn buffers(self) -> &'static [u32] {
        match self {
            Self::Mlx => &[128, 1372],
            Self::Brcm => &[1500],
        }
    }
}

/// One load.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Workload {
    /// How a packet is laid out.
    pub(crate) profile: Profile,
    /// Descriptors of each ring.
    pub(crate) descriptors: u32,
    /// Packets that each ring completes per interrupt.
    pub(crate) burst: u32,
}

/// Sizes of rings.
const DESCRIPTORS: [u32; 4] = [256, 512, 1024, 4096];
/// Completions per interrupt.
const BURSTS: [u32; 4] = [1, 16, 64, 200];

impl Workload {
    /// What the paper's Table 1 was measured with, as far as a replay can be: two buffers a packet, bursts of 200.
    pub(crate) const PAPER: Self = Self { profile: Profile::Mlx, descriptors: 1024, burst: 200 };

    /// All of them.
    pub(crate) fn all() -> Vec<Self> {
        let mut all = Vec::new();
        for profile in [Profile::Mlx, Profile::Brcm] {
            for descriptors in DESCRIPTORS {
                all.extend(BURSTS.map(|burst| Self { profile, descriptors, burst }));
            }
        }
        all
    }
    /// Those of a quick run.
    pub(crate) fn few() -> Vec<Self> {
        vec![Self { burst: 1, ..Self::PAPER }, Self::PAPER, Self { profile: Profile::Brcm, ..Self::PAPER }]
    }
    /// As figures name it.
    pub(crate) fn name(self) -> String {
        format!("{}-{}-{}", self.profile.name(), self.descriptors, self.burst)
    }
    /// Buffers that a ring can hold: the slots of a ring of an rIOMMU.
    pub(crate) fn buffers_per_ring(self) -> u32 {
        self.descriptors * self.profile.buffers().len() as u32
    }
    /// Packets of an interrupt, of both rings.
    pub(crate) fn packets_per_interrupt(self) -> u32 {
        2 * self.burst
    }
    /// So many interrupts, or a few more: then the unmaps are whole batches of a deferred domain, and counts come out even.
    pub(crate) fn interrupts(self, wanted: u32) -> u32 {
        let unmaps = self.packets_per_interrupt() * self.profile.buffers().len() as u32;
        let even = (1..=256)
            .find(|n| (unmaps * n).is_multiple_of(256))
            .expect("256 of anything are whole batches of 256");
        wanted.next_multiple_of(even)
    }
}
