//! What the program was started with, and cannot use: open files, and signals that do not arrive.

use std::ffi::OsString;
use std::os::unix::ffi::OsStrExt;

/// Closes open files, but for the first three and those that an argument names, as `fd:3`, `/dev/fd/3` or
/// `/proc/self/fd/3`: whoever starts the program may have left others open by mistake, and no wall keeps anybody from
/// what is open already. And has signals arrive. To be called before the program opens or starts anything.
pub(crate) fn put_in_order(arguments: impl Iterator<Item = OsString>) {
    let named: Vec<u32> = arguments.flat_map(|argument| named(argument.as_bytes())).collect();
    blockhouse_walls::close_inherited(named);
    blockhouse_walls::heed_signals();
}

/// The descriptors that an argument names.
fn named(argument: &[u8]) -> Vec<u32> {
    let rest = (0..argument.len()).filter_map(|at| argument.get(at..));
    let numbers = rest.filter_map(|rest| rest.strip_prefix(b"fd:").or_else(|| rest.strip_prefix(b"fd/")));
    let digits = numbers.map(|number| number.iter().take_while(|byte| byte.is_ascii_digit()).copied().collect());
    digits.filter_map(|digits: Vec<u8>| String::from_utf8(digits).ok()?.parse().ok()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_found_wherever_they_stand() {
        assert_eq!(named(b"fd:3"), [3]);
        assert_eq!(named(b"--control=fd:4"), [4]);
        assert_eq!(named(b"file=/dev/fd/63,format=raw,socket=fd:5,allow=/proc/self/fd/7"), [63, 5, 7]);
        assert_eq!(named(b"/proc/self/fd/12/base.raw"), [12]);
        assert!(named(b"fd:, fd/x, fd:99999999999, f, fd").is_empty());
    }
}
