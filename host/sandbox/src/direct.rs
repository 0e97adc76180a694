//! What direct I/O asks of images that are written.

use blockhouse_block::{Error, ErrorKind, FileIndex, Layer, Result};

/// Bytes of a page of the page cache, on x86_64.
const PAGE: u64 = 4096;

/// Refuses direct I/O where a cluster shares a page with its neighbours. The component writes metadata through the page
/// cache: a page of it that is dirty when the neighbour is written past the cache is what the kernel writes later, with
/// the old neighbour in it. And a block of the file system that is larger than a cluster would have to be read and
/// written again.
pub(crate) fn refuse_shared_pages(layer: &dyn Layer) -> Result<()> {
    let info = layer.info();
    let Some(block) = direct_block(layer) else { return Ok(()) };
    let smallest = block.max(PAGE);
    let cluster = u64::from(info.cluster_size);
    if cluster >= smallest {
        return Ok(());
    }
    let why = format!(
        "has clusters of {cluster} bytes, and direct I/O needs {smallest} where an image is written: leave out direct \
         I/O, or convert the image to larger clusters"
    );
    Err(Error::new(ErrorKind::Unsupported, why).on_image(info.name.clone()))
}

/// Refuses direct I/O where the file of an image that is written in place ends inside of a block: a write to its end
/// would make it longer, and with it the disk.
pub(crate) fn refuse_odd_end(layer: &dyn Layer, size: u64) -> Result<()> {
    let Some(block) = direct_block(layer).filter(|block| !size.is_multiple_of(*block)) else { return Ok(()) };
    let why = format!(
        "is a disk of {size} bytes, and direct I/O needs a multiple of {block} where the file is written in place: \
         leave out direct I/O, or choose another size"
    );
    Err(Error::new(ErrorKind::Unsupported, why).on_image(layer.info().name.clone()))
}

/// What direct I/O writes at once to the files of a layer, if it uses that.
fn direct_block(layer: &dyn Layer) -> Option<u64> {
    (0..).map_while(|index| layer.file(FileIndex(index))).filter_map(|file| file.direct_alignment()).max()
}
