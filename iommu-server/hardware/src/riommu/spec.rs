//! stub
use iommu_types::{Hpa, Iova, Permissions};
/// .
pub const RING_BYTES: u64 = 32;
/// .
pub const PTE_BYTES: u64 = 16;
/// .
#[derive(Clone, Copy, Debug)]
pub struct RingIova { /// .
 pub ring: u16, /// .
 pub slot: u32, /// .
 pub offset: u32 }
impl RingIova { /// .
 pub fn pack(self) -> Iova { Iova::new(u64::from(self.ring) << 48 | u64::from(self.slot) << 30 | u64::from(self.offset)) }
 /// .
 pub fn unpack(i: Iova) -> Self { let i = i.get(); Self { ring: (i >> 48) as u16, slot: (i >> 30 & 0x3ffff) as u32, offset: (i & 0x3fff_ffff) as u32 } } }
/// .
#[derive(Clone, Copy, Debug, Default)]
pub struct RingPte(u128);
impl RingPte {
 /// .
 pub fn mapped(a: Hpa, s: u32, p: Permissions) -> Self { Self(u128::from(a.get()) | u128::from(s) << 64 | u128::from(p.bits()) << 94 | 1 << 96) }
 /// .
 pub fn address(self) -> Hpa { Hpa::new(self.0 as u64) }
 /// .
 pub fn size_bytes(self) -> u32 { (self.0 >> 64) as u32 & 0x3fff_ffff }
 /// .
 pub fn from_bits(b: u128) -> Self { Self(b) }
 /// .
 pub fn into_bits(self) -> u128 { self.0 }
}
/// .
pub struct Ring { /// .
 pub base: Hpa, /// .
 pub size: u32, /// .
 pub tail: u32, /// .
 pub nmapped: u32 }
impl Ring { /// .
 pub fn into_words(self) -> [u64; 4] { [self.base.get(), u64::from(self.size) | u64::from(self.tail) << 32, self.nmapped.into(), 0] } }
/// .
pub fn ring_address(a: Hpa, n: u16) -> Option<Hpa> { a.checked_add(u64::from(n) * 32) }
/// .
pub fn pte_address(a: Hpa, n: u32) -> Option<Hpa> { a.checked_add(u64::from(n) * 16) }
