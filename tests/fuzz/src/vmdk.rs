//! The VMDK format, fed with a file that is input, and with a second one that it may name as a part or as its parent.
//!
//! ```text
//!   input: spread │ length of the first file (2, little-endian) │ first file │ second file
//! ```

use blockhouse_plugin::Access;
use blockhouse_vmdk::Vmdk;

use crate::image::{IMAGE, spread, storage, walk};

/// Where the second file is.
const SECOND: [&str; 2] = ["/images/p", "/images/p-flat.vmdk"];

pub(crate) fn run(data: &[u8]) {
    let [how, low, high, rest @ ..] = data else { return };
    let (first, second) = rest.split_at(rest.len().min(usize::from(u16::from_le_bytes([*low, *high]))));
    let spread = |bytes: &[u8]| spread(&[&[*how], bytes].concat());
    let (first, second) = (spread(first), spread(second));
    let storage = storage(first.clone());
    for name in SECOND {
        storage.insert(name, second.clone());
    }
    if let Ok(mut disk) = storage.disk::<Vmdk>(IMAGE) {
        let size = disk.info.virtual_size;
        walk(&mut disk.format, size, Access::ReadOnly);
    }
    assert!(storage.bytes(IMAGE) == first && storage.bytes(SECOND[0]) == second, "a file was changed");
}
