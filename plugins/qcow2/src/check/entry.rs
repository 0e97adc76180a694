//! One entry of an L1 or an L2 table: what it refers to, and what is wrong with it.
//!
//! What can be kept is kept: flags that may not be set are cleared. An entry whose place cannot be is
//! replaced by zeroes, where the format can say so: the data is lost either way, and old data of a backing
//! file would look as if it were right.

use crate::compressed::Descriptor;
use crate::tables::{COMPRESSED, COPIED, OFFSET, ZERO};

use super::Image;

/// Why an entry cannot be right, and what it becomes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Fault {
    pub(super) why: &'static str,
    /// The entry, and its bitmap with extended L2.
    pub(super) new: (u64, u64),
    pub(super) remedy: &'static str,
}

/// What an L2 entry refers to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Target {
    Nothing,
    /// A cluster at this offset, in the external data file if there is one.
    Cluster(u64),
    /// Compressed data: first and last cluster.
    Packed(u64, u64),
}

const CLEARED: &str = "it is cleared";

/// What an L1 entry says: the L2 table, and what is wrong.
pub(super) fn l1(image: &Image<'_>, entry: u64) -> (Option<u64>, Option<Fault>) {
    let offset = entry & OFFSET;
    let gone = |why| (None, Some(Fault { why, new: (0, 0), remedy: "it is cleared: what it described is lost" }));
    if entry == 0 {
        return (None, None);
    }
    if offset == 0 {
        return (None, Some(Fault { why: "it has flags and no offset", new: (0, 0), remedy: CLEARED }));
    }
    if !offset.is_multiple_of(image.cluster_size) {
        return gone("the offset is not a multiple of the cluster size");
    }
    if image.is_outside(offset, image.cluster_size) {
        return gone("the table is past the end of the file");
    }
    let fault = (entry & !(OFFSET | COPIED) != 0).then_some(Fault {
        why: "reserved bits are set",
        new: (entry & (OFFSET | COPIED), 0),
        remedy: "they are cleared",
    });
    (Some(offset), fault)
}

/// What an L2 entry says, and what is wrong. `guest` is the disk offset, if there is but one.
pub(super) fn l2(image: &Image<'_>, entry: u64, bitmap: u64, guest: Option<u64>) -> (Target, Option<Fault>) {
    if entry & COMPRESSED != 0 { packed(image, entry, bitmap) } else { standard(image, entry, bitmap, guest) }
}

fn packed(image: &Image<'_>, entry: u64, bitmap: u64) -> (Target, Option<Fault>) {
    let gone = |why| (Target::Nothing, Some(lost(image, why, u64::from(u32::MAX))));
    if image.external {
        return gone("it is compressed, in an image with an external data file");
    }
    let Ok(descriptor) = Descriptor::from_entry(entry, image.header.cluster_bits) else {
        return gone("the offset of the compressed data has reserved bits");
    };
    let (first, last) = descriptor.clusters().into_inner();
    // Down to the sector in which the data ends.
    let sectors = ((entry & (COMPRESSED - 1)) >> (70 - image.header.cluster_bits)) + 1;
    if image.is_outside(descriptor.offset(), sectors * 512 - descriptor.offset() % 512) {
        return gone("the compressed data is past the end of the file");
    }
    let fault = if entry & COPIED != 0 {
        Some(("the flag COPIED is set, and it is compressed", "the flag is cleared"))
    } else if bitmap != 0 {
        Some(("it is compressed, with subclusters", "the subclusters are cleared"))
    } else {
        None
    };
    let fault = fault.map(|(why, remedy)| Fault { why, new: (entry & !COPIED, 0), remedy });
    (Target::Packed(first, last), fault)
}

fn standard(image: &Image<'_>, entry: u64, bitmap: u64, guest: Option<u64>) -> (Target, Option<Fault>) {
    let (zeroes, data) = (bitmap >> 32, bitmap & u64::from(u32::MAX));
    let offset = entry & OFFSET;
    // With an external data file, 0 is a place like any other: the flag tells. And what is data has one place alone.
    let is_placed = entry & COPIED != 0 || (image.extended && data != 0 && guest.is_some());
    let allocated = offset != 0 || (image.external && is_placed);
    let flags = if image.extended || image.header.version < 3 { COPIED } else { COPIED | ZERO };
    let mut new = (entry & (OFFSET | flags), bitmap);
    let mut fault = (new.0 != entry).then_some(("reserved bits are set", "they are cleared"));
    if !allocated {
        if image.extended && data != 0 {
            return (Target::Nothing, Some(lost(image, "subclusters are data, and the cluster has no offset", bitmap)));
        }
        return (Target::Nothing, fault.map(|(why, remedy)| Fault { why, new, remedy }));
    }
    let holds_data = if image.extended { data != 0 } else { new.0 & ZERO == 0 };
    let gone = |why| {
        let mut fault = lost(image, why, bitmap);
        if !holds_data {
            fault.remedy = "it has no data, and reads as before without the place";
        }
        (Target::Nothing, Some(fault))
    };
    let is_there = |guest| guest == offset && (offset != 0 || entry & COPIED != 0);
    if let Some(guest) = guest.filter(|guest| image.external && !is_there(*guest)) {
        fault = Some((
            "the offset in the external data file is not the offset in the disk",
            "it becomes the offset in the disk",
        ));
        new.0 = guest | COPIED | (new.0 & ZERO);
    } else if !offset.is_multiple_of(image.cluster_size) {
        return gone("the offset is not a multiple of the cluster size");
    } else if !image.external && image.is_outside(offset, image.cluster_size) {
        return gone("the cluster is past the end of the file");
    }
    if image.extended && zeroes & data != 0 {
        fault = Some(("subclusters are both data and zero", "they are data"));
        new.1 &= !((zeroes & data) << 32);
    }
    (Target::Cluster(new.0 & OFFSET), fault.map(|(why, remedy)| Fault { why, new, remedy }))
}

/// The place of the data cannot be.
fn lost(image: &Image<'_>, why: &'static str, bitmap: u64) -> Fault {
    if image.extended {
        // What was data is zero now; what was in the backing file is there still.
        let zeroes = (bitmap >> 32 | bitmap) & u64::from(u32::MAX);
        Fault { why, new: (0, zeroes << 32), remedy: "the data is lost, and reads as zero" }
    } else if image.header.version < 3 {
        Fault { why, new: (0, 0), remedy: "the data is lost, and the cluster is not allocated any more" }
    } else {
        Fault { why, new: (ZERO, 0), remedy: "the data is lost, and reads as zero" }
    }
}
