//! What the targets of formats share: images made of the input, and a host that believes nothing.

use blockhouse_plugin::testing::Storage;
use blockhouse_plugin::{Access, Format, Placement};

/// Where images are.
pub(crate) const IMAGE: &str = "/images/disk";

/// The largest file that a format may make of an input.
pub(crate) const MAX_FILE: u64 = 2 << 20;

/// The most that one packed extent may hold (`wit/reader.wit`, `extent`).
const MAX_PACKED: u64 = 16 << 20;

/// The bytes of an image with large clusters out of a small input: the first byte says how far 512 bytes of the
/// input are apart in the image. Tables stand at starts of clusters, so most of them can be had like this.
pub(crate) fn spread(data: &[u8]) -> Vec<u8> {
    let Some((first, rest)) = data.split_first() else { return Vec::new() };
    let apart = 512usize << (first % 7);
    let pieces: Vec<&[u8]> = rest.chunks(512).take(40).collect();
    let mut image = vec![0; pieces.len() * apart];
    for (place, piece) in image.chunks_mut(apart).zip(&pieces) {
        place[..piece.len()].copy_from_slice(piece);
    }
    if apart == 512 {
        // Then the image can end anywhere.
        image.truncate(rest.len());
    }
    image
}

/// A storage in which nothing grows without bound, with the image.
pub(crate) fn storage(image: Vec<u8>) -> Storage {
    let storage = Storage::new();
    storage.limit_sizes(MAX_FILE);
    storage.insert(IMAGE, image);
    storage
}

/// Asks a format where the bytes of its disk are, from the start and then near the end, as a host does.
///
/// # Panics
/// If an answer is one that the host would call a lie: no image may make an honest component lie.
pub(crate) fn walk<F: Format>(format: &mut F, virtual_size: u64, access: Access) {
    let possible = virtual_size.is_multiple_of(512) && i64::try_from(virtual_size).is_ok();
    assert!(possible, "a disk of {virtual_size} bytes");
    let mut unpacked = 0;
    for (from, budget) in [(0, 64), (0, 1), (virtual_size / 2, 3), (virtual_size.saturating_sub(512), 2)] {
        let mut at = from;
        for _ in 0..12 {
            if at >= virtual_size {
                break;
            }
            let Ok(located) = format.locate(at, virtual_size - at, budget) else {
                at = at.saturating_add(512).next_multiple_of(4096);
                continue;
            };
            assert!((1..=budget as usize).contains(&located.extents.len()), "{} extents", located.extents.len());
            assert!(located.start <= at, "starts at {}, after {at}", located.start);
            let mut end = located.start;
            for extent in &located.extents {
                assert!(extent.length > 0, "an empty extent at {end}");
                end = end.checked_add(extent.length).expect("extents that do not wrap");
                assert!(end <= virtual_size, "an extent ends at {end} of {virtual_size}");
                match extent.placement {
                    Placement::Data { offset, overwrite, .. } => {
                        let stop = offset.checked_add(extent.length).expect("a range of a file that does not wrap");
                        assert!(i64::try_from(stop).is_ok(), "a range of a file ends at {stop}");
                        assert!(!overwrite || access == Access::ReadWrite, "overwrite in a read-only image");
                    }
                    Placement::Packed { token } => {
                        assert!(extent.length <= MAX_PACKED, "a packed unit of {} bytes", extent.length);
                        // Few, because a unit may have 2 MiB.
                        if unpacked < 6 {
                            unpacked += 1;
                            if let Ok(bytes) = format.unpack(token, extent.length) {
                                assert_eq!(bytes.len() as u64, extent.length, "a unit of another length");
                            }
                        }
                    }
                    Placement::Zero | Placement::Unallocated => {}
                }
            }
            assert!(end > at, "the answer ends at {end}, before {at}");
            at = end;
        }
    }
}
