//! Integers out of byte slices, without a panic: every access is checked.

macro_rules! getters {
    ($($(#[$doc:meta])* $name:ident: $type:ty = $from:ident;)*) => {$(
        $(#[$doc])*
        pub fn $name(bytes: &[u8], at: usize) -> Option<$type> {
            let end = at.checked_add(size_of::<$type>())?;
            Some(<$type>::$from(bytes.get(at..end)?.try_into().ok()?))
        }
    )*};
}

getters! {
    /// The big-endian 16-bit integer at byte `at`, or `None` if the slice ends before.
    be_u16: u16 = from_be_bytes;
    /// The big-endian 32-bit integer at byte `at`, or `None` if the slice ends before.
    be_u32: u32 = from_be_bytes;
    /// The big-endian 64-bit integer at byte `at`, or `None` if the slice ends before.
    be_u64: u64 = from_be_bytes;
    /// The little-endian 16-bit integer at byte `at`, or `None` if the slice ends before.
    le_u16: u16 = from_le_bytes;
    /// The little-endian 32-bit integer at byte `at`, or `None` if the slice ends before.
    le_u32: u32 = from_le_bytes;
    /// The little-endian 64-bit integer at byte `at`, or `None` if the slice ends before.
    le_u64: u64 = from_le_bytes;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_inside_and_refuses_outside() {
        let bytes = [1, 2, 3, 4];
        assert_eq!(be_u16(&bytes, 1), Some(0x0203));
        assert_eq!(le_u32(&bytes, 0), Some(0x0403_0201));
        assert_eq!(be_u32(&bytes, 1), None);
        assert_eq!(be_u64(&bytes, usize::MAX), None);
    }
}
