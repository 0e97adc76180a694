//! Reference counts inside the bytes of a refcount block.
//!
//! A count has `1 << order` bits. Counts of less than a byte start at its lowest bit; larger ones are
//! big-endian.

/// The count with index `index`, or 0 past the end.
pub(crate) fn get(bytes: &[u8], order: u32, index: usize) -> u64 {
    if order < 3 {
        let bit = index << order;
        let byte = bytes.get(bit / 8).copied().unwrap_or_default();
        (u64::from(byte) >> (bit % 8)) & max(order)
    } else {
        let length = 1usize << (order - 3);
        let start = index.saturating_mul(length);
        let used = bytes.get(start..start.saturating_add(length)).unwrap_or_default();
        used.iter().fold(0, |value, byte| value << 8 | u64::from(*byte))
    }
}

/// Sets the count with index `index`, if there is one. The value fits.
pub(crate) fn set(bytes: &mut [u8], order: u32, index: usize, value: u64) {
    let value = value.min(max(order));
    if order < 3 {
        let bit = index << order;
        if let Some(byte) = bytes.get_mut(bit / 8) {
            let mask = max(order) << (bit % 8);
            *byte = ((u64::from(*byte) & !mask) | value << (bit % 8)).to_le_bytes()[0];
        }
    } else {
        let length = 1usize << (order - 3);
        let start = index.saturating_mul(length);
        let value = value.to_be_bytes();
        if let (Some(to), Some(from)) =
            (bytes.get_mut(start..start.saturating_add(length)), value.get(8usize.saturating_sub(length)..))
        {
            to.copy_from_slice(from);
        }
    }
}

/// The largest count.
pub(crate) fn max(order: u32) -> u64 {
    if order >= 6 { u64::MAX } else { (1 << (1u32 << order)) - 1 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_of_every_width() {
        for order in 0..=6u32 {
            let mut bytes = [0u8; 64];
            let count = (64 * 8) >> order;
            for index in 0..count {
                set(&mut bytes, order, index, (index as u64).wrapping_mul(0x0123_4567_89ab_cdef) & max(order));
            }
            for index in 0..count {
                assert_eq!(
                    get(&bytes, order, index),
                    (index as u64).wrapping_mul(0x0123_4567_89ab_cdef) & max(order),
                    "{order}"
                );
            }
            assert_eq!(get(&bytes, order, count), 0);
            set(&mut bytes, order, count, 1);
        }
        let mut bytes = [0u8; 2];
        set(&mut bytes, 1, 5, 3);
        assert_eq!(bytes, [0, 0b1100]);
        set(&mut bytes, 4, 0, 0x0102);
        assert_eq!(bytes, [1, 2]);
    }
}
