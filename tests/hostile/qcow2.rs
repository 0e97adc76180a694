//! qcow2 images written byte by byte, where qemu-img would refuse to, or would take too long.

use std::path::PathBuf;

use blockhouse_tests::qemu_img;

use crate::place::Place;

/// Header extension: the format of the backing file.
pub(crate) const BACKING_FORMAT: u32 = 0xe279_2aca;

/// A version 3 overlay of `size` bytes without any data of its own.
///
/// ```text
///   cluster 0            1          2
///   header, name  |  L1 table  |  refcount table (empty: enough for reading)
/// ```
pub(crate) fn overlay(cluster_bits: u32, size: u64, backing: &[u8], format: Option<&str>) -> Vec<u8> {
    let cluster = 1usize << cluster_bits;
    let entries = size.div_ceil(1 << (2 * cluster_bits - 3));
    assert!(entries * 8 <= cluster as u64, "the L1 table has one cluster");
    let mut bytes = vec![0; 3 * cluster];
    let mut put = |at: usize, value: &[u8]| bytes[at..at + value.len()].copy_from_slice(value);
    put(0, b"QFI\xfb");
    put(4, &3u32.to_be_bytes());
    put(20, &cluster_bits.to_be_bytes());
    put(24, &size.to_be_bytes());
    put(36, &u32::try_from(entries).unwrap().to_be_bytes());
    put(40, &(cluster as u64).to_be_bytes());
    put(48, &(2 * cluster as u64).to_be_bytes());
    put(56, &1u32.to_be_bytes());
    put(96, &4u32.to_be_bytes());
    put(100, &104u32.to_be_bytes());
    let mut at = 104;
    if let Some(format) = format {
        put(at, &BACKING_FORMAT.to_be_bytes());
        put(at + 4, &u32::try_from(format.len()).unwrap().to_be_bytes());
        put(at + 8, format.as_bytes());
        at += 8 + format.len().next_multiple_of(8);
    }
    // The end of extensions is 8 zero bytes.
    at += 8;
    put(8, &(at as u64).to_be_bytes());
    put(16, &u32::try_from(backing.len()).unwrap().to_be_bytes());
    put(at, backing);
    bytes
}

/// An image of 64 KiB whose data lies in the file at `name`, which need not be there and stays as it is. The name
/// has as many bytes as `images/vm/own`.
pub(crate) fn with_data_file(place: &Place, name: &str) -> PathBuf {
    let image = place.path("images/vm/data-file.qcow2");
    // qemu-img makes the data file, and empties one that is there.
    let own = place.text("images/vm/own");
    let options = format!("data_file={own},data_file_raw=on");
    qemu_img(["create", "-q", "-f", "qcow2", "-o", &options, image.to_str().unwrap(), "64K"]);
    std::fs::remove_file(&own).unwrap();
    let mut bytes = std::fs::read(&image).unwrap();
    let at = bytes.windows(own.len()).position(|window| window == own.as_bytes()).expect("the name is there");
    let other = place.text(name);
    assert_eq!(other.len(), own.len(), "the name has another length");
    poke(&mut bytes, at, other.as_bytes());
    std::fs::write(&image, bytes).unwrap();
    image
}

/// Overwrites bytes of an image that qemu-img made.
pub(crate) fn poke(bytes: &mut [u8], at: usize, value: &[u8]) {
    bytes[at..at + value.len()].copy_from_slice(value);
}

/// Where the header extension of that type starts.
pub(crate) fn find_extension(bytes: &[u8], kind: u32) -> usize {
    let kind = kind.to_be_bytes();
    (104..4096).step_by(8).find(|at| bytes[*at..*at + 4] == kind).expect("the extension is there")
}
