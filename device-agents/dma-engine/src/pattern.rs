//! What the engine writes when it makes up content: patterns that a driver can check.

use bytes::{Bytes, BytesMut};

/// `size_bytes` bytes of `data` (little endian), repeated and cut off.
pub fn fill(data: u64, size_bytes: usize) -> Bytes {
    repeat(size_bytes, |_| data)
}

/// The packet with this sequence number: the same number gives the same bytes, other numbers give others. A
/// shorter packet is the beginning of a longer one.
pub fn packet(sequence: u64, size_bytes: usize) -> Bytes {
    repeat(size_bytes, |word| mix(sequence.wrapping_mul(0x1_0000_0001).wrapping_add(word)))
}

fn repeat(size_bytes: usize, word: impl Fn(u64) -> u64) -> Bytes {
    let mut content = BytesMut::with_capacity(size_bytes);
    let mut number = 0;
    while content.len() < size_bytes {
        let rest = size_bytes - content.len();
        let bytes = word(number).to_le_bytes();
        content.extend_from_slice(&bytes[..rest.min(8)]);
        number += 1;
    }
    content.freeze()
}

/// splitmix64.
fn mix(word: u64) -> u64 {
    let mut mixed = word.wrapping_add(0x9e37_79b9_7f4a_7c15);
    mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    mixed ^ (mixed >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_packet_is_the_same_for_the_same_number_and_begins_alike_at_any_size() {
        assert_eq!(packet(7, 100), packet(7, 100));
        assert_ne!(packet(7, 100), packet(8, 100));
        assert_eq!(packet(7, 13), packet(7, 100).slice(..13));
        assert_eq!(packet(7, 0).len(), 0);
    }

    #[test]
    fn a_fill_repeats_and_is_cut_off() {
        assert_eq!(&fill(0x0807_0605_0403_0201, 11)[..], [1, 2, 3, 4, 5, 6, 7, 8, 1, 2, 3]);
    }
}
