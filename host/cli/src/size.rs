//! Sizes as the operator writes them.

/// What is said of text that is no size, and how to write one.
pub(crate) const NOT_A_SIZE: &str = "is not a size; write bytes, or a number with K, M, G or T: 512M";

/// Parses a size: a number of bytes with an optional suffix K, M, G, T (powers of 1024), or a hexadecimal one as `map`
/// prints it.
pub(crate) fn parse_size(text: &str) -> Result<u64, String> {
    if let Some(digits) = text.strip_prefix("0x") {
        let digits = Some(digits).filter(|digits| digits.bytes().all(|digit| digit.is_ascii_hexdigit()));
        let number = digits.and_then(|digits| u64::from_str_radix(digits, 16).ok());
        return number.ok_or_else(|| format!("{text:?} {NOT_A_SIZE}"));
    }
    let (digits, shift) = match text.char_indices().next_back() {
        Some((at, suffix)) => match suffix.to_ascii_uppercase() {
            'K' => (text.get(..at), 10),
            'M' => (text.get(..at), 20),
            'G' => (text.get(..at), 30),
            'T' => (text.get(..at), 40),
            _ => (Some(text), 0),
        },
        None => (None, 0),
    };
    digits
        .filter(|digits| digits.bytes().all(|digit| digit.is_ascii_digit()))
        .and_then(|digits| digits.parse::<u64>().ok())
        .and_then(|number| number.checked_mul(1 << shift))
        .ok_or_else(|| format!("{text:?} {NOT_A_SIZE}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_from_people() {
        assert_eq!(parse_size("512m"), Ok(512 << 20));
        assert_eq!(parse_size("0"), Ok(0));
        assert_eq!(parse_size("0x1f0000"), Ok(0x1f_0000));
        assert_eq!(parse_size("0xffffffffffffffff"), Ok(u64::MAX));
        for bad in ["", "x", "0x", "0x+1", "0x1K", "0x10000000000000000", "12Q", "-1", "+1", "99999999999T", "M"] {
            assert!(parse_size(bad).is_err(), "{bad}");
        }
    }
}
