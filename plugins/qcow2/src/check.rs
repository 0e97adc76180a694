//! Checking an image against itself, and repairing it.
//!
//! ```text
//!   scan.rs     every table is walked, and each reference to a cluster of the file counted
//!   entry.rs      what an entry refers to, and what is wrong with it
//!   stored.rs   the reference counts that the image holds
//!   counts.rs     bits and bytes of a count
//!   repair.rs   makes the counts what the references are, and the entries what they can be
//! ```
//!
//! A count that is too low is a corruption: the cluster will be given to somebody else. One that is too high
//! is a leak. A flag COPIED that contradicts the count in the image is a corruption too, and so is an entry
//! that cannot be right. This is what `qemu-img check` finds, in nearly all images with the same numbers.
//!
//! The references are counted for a bounded number of clusters at a time ([`scan::Counts`]); the metadata of
//! an image with more of them is read several times. A table that is named many times is read once per time,
//! and counts as often as it is named.

pub(crate) mod counts;
mod entry;
mod repair;
mod scan;
mod stored;

use alloc::string::String;
use alloc::vec::Vec;

use blockhouse_plugin::{Access, CheckReport, Checker, Error, File, Level, Repair, Result, log};

use crate::Qcow2;
use crate::header::{CORRUPT, DIRTY, EXTENDED_L2, EXTERNAL_DATA, Header};

/// So many lines say what was found.
const MAX_LINES: usize = 100;
/// So many of them are logged where nobody asked for a check.
const LOGGED_LINES: usize = 10;

impl Checker for Qcow2 {
    fn check(image: File, repair: Option<Repair>) -> Result<CheckReport> {
        check(&image, repair)
    }
}

fn check(file: &File, repair: Option<Repair>) -> Result<CheckReport> {
    let image = Image::open(file)?;
    let found = scan::check(&image)?;
    let mut report = CheckReport {
        corruptions: found.corruptions(),
        leaks: found.leaks,
        corruptions_repaired: 0,
        leaks_repaired: 0,
        findings: found.lines.0.clone(),
        total_clusters: image.header.virtual_size.div_ceil(image.cluster_size),
        allocated_clusters: found.allocated,
        compressed_clusters: found.packed,
        image_end: found.end,
    };
    let Some(repair) = repair else { return Ok(report) };
    let mut said = Lines::default();
    if !found.is_clean() {
        repair::run(file, &found, repair, &mut said)?;
    }
    // What was repaired is what is not found any more.
    let mut image = Image::open(file)?;
    let left = if found.is_clean() { found } else { scan::check(&image)? };
    report.corruptions_repaired = report.corruptions.saturating_sub(left.corruptions());
    report.leaks_repaired = report.leaks.saturating_sub(left.leaks);
    report.image_end = left.end;
    if left.is_clean() {
        image.header.mark_clean(file)?;
    } else if image.header.has(DIRTY | CORRUPT) {
        said.add(|| "the image stays marked dirty or corrupt, because not all was repaired".into());
    }
    // What the repair decided matters more than the last of what it found.
    report.findings.truncate(MAX_LINES.saturating_sub(said.0.len()));
    report.findings.extend(said.0);
    Ok(report)
}

/// Repairs an image that is marked dirty, before it is written: the counts are made what the references are,
/// and the mark is taken away. Durable when it returns. The header as it is now; every table may have
/// changed.
pub(crate) fn repair_dirty(file: &File) -> Result<Header> {
    let report = check(file, Some(Repair::All))?;
    log(
        Level::Warn,
        &alloc::format!(
            "the image was marked dirty, and was checked: {} of {} corruptions and {} of {} leaks were repaired",
            report.corruptions_repaired,
            report.corruptions,
            report.leaks_repaired,
            report.leaks
        ),
    );
    for line in report.findings.iter().take(LOGGED_LINES) {
        log(Level::Info, line);
    }
    let left = report.corruptions.saturating_sub(report.corruptions_repaired);
    if left > 0 || report.leaks > report.leaks_repaired {
        return Err(Error::corrupt(alloc::format!(
            "the image is marked dirty, and {left} corruptions in it cannot be repaired: {}",
            report.findings.first().map(String::as_str).unwrap_or_default()
        )));
    }
    Header::read(file, file.size()?, Access::ReadWrite)
}

/// Lines for people, up to a limit.
#[derive(Debug, Default)]
pub(crate) struct Lines(Vec<String>);

impl Lines {
    fn add(&mut self, line: impl FnOnce() -> String) {
        if self.0.len() < MAX_LINES {
            self.0.push(line());
        }
    }
}

/// An image that is checked.
struct Image<'a> {
    file: &'a File,
    /// Of the file, in bytes.
    size: u64,
    header: Header,
    cluster_size: u64,
    extended: bool,
    external: bool,
}

impl<'a> Image<'a> {
    /// Nothing but the header is read.
    fn open(file: &'a File) -> Result<Self> {
        let size = file.size()?;
        // Also of an image that is not fit to be written.
        let header = Header::read(file, size, Access::ReadOnly)?;
        Ok(Self {
            file,
            size,
            cluster_size: u64::from(header.cluster_size()),
            extended: header.has(EXTENDED_L2),
            external: header.has(EXTERNAL_DATA),
            header,
        })
    }

    /// Clusters of the file; the last one may be cut off.
    fn clusters(&self) -> u64 {
        self.size.div_ceil(self.cluster_size)
    }

    /// Whether a range is past the end of the file. The last cluster of a file may be cut off, and what is
    /// missing reads as zero: as QEMU sees it, that is by a cluster or more.
    fn is_outside(&self, offset: u64, length: u64) -> bool {
        offset >= self.size
            || offset.checked_add(length).is_none_or(|end| end.saturating_sub(self.size) >= self.cluster_size)
    }

    /// The bytes at `offset`; what is past the end of the file reads as zero.
    fn read(&self, offset: u64, length: u64) -> Result<Vec<u8>> {
        let mut bytes = alloc::vec![0; usize::try_from(length).unwrap_or_default()];
        self.file.read_at(offset, &mut bytes)?;
        Ok(bytes)
    }

    /// Bytes of one L2 entry.
    fn entry_bytes(&self) -> usize {
        if self.extended { 16 } else { 8 }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::indexing_slicing, clippy::cast_possible_truncation)]
mod tests {
    use blockhouse_plugin::testing::Storage;
    use blockhouse_plugin::{Creator, NewImage, Writer};

    use super::*;

    const IMAGE: &str = "/image";
    const SIZE: u64 = 6 << 20;

    fn content() -> Vec<u8> {
        (0..SIZE as u32 / 4).flat_map(|number| (number.wrapping_mul(0x9e37_79b9)).to_be_bytes()).collect()
    }

    /// 12000 clusters of data in 190 tables: of both, several times more than is looked at at a time.
    fn image() -> Vec<u8> {
        let storage = Storage::new();
        storage.insert(IMAGE, Vec::new());
        let options = Vec::from([("cluster-size".into(), "512".into())]);
        let new = NewImage { virtual_size: SIZE, backing: None, options };
        Qcow2::create(storage.file(IMAGE, Access::ReadWrite), new).unwrap();
        let mut disk = storage.disk_with::<Qcow2>(IMAGE, Access::ReadWrite, |_| Ok(())).unwrap();
        disk.format.begin().unwrap();
        for (number, bytes) in (0..).zip(content().chunks(1 << 20)) {
            disk.write_over(number << 20, bytes, &mut |_, to| to.fill(0)).unwrap();
        }
        disk.flush().unwrap();
        disk.format.finish().unwrap();
        storage.bytes(IMAGE)
    }

    fn repaired(bytes: Vec<u8>, words: &[&str]) {
        let storage = Storage::new();
        storage.insert(IMAGE, bytes);
        let found = check(&storage.file(IMAGE, Access::ReadOnly), None).unwrap();
        let report = check(&storage.file(IMAGE, Access::ReadWrite), Some(Repair::All)).unwrap();
        assert_eq!((report.corruptions, report.leaks), (found.corruptions, found.leaks));
        assert_eq!(
            (report.corruptions, report.leaks),
            (report.corruptions_repaired, report.leaks_repaired),
            "{report:#?}"
        );
        for word in words {
            assert!(report.findings.iter().any(|line| line.contains(word)), "{word} in {report:#?}");
        }
        let again = check(&storage.file(IMAGE, Access::ReadOnly), None).unwrap();
        assert_eq!((again.corruptions, again.leaks), (0, 0), "{again:#?}");
        assert_eq!(again.allocated_clusters, SIZE / 512);
        let mut disk = storage.disk::<Qcow2>(IMAGE).unwrap();
        assert!(disk.read(0, SIZE as usize).unwrap() == content());
    }

    fn long(bytes: &[u8], at: usize) -> usize {
        u64::from_be_bytes(bytes[at..at + 8].try_into().unwrap()) as usize
    }

    #[test]
    fn large_images_are_looked_at_in_parts() {
        let whole = image();
        assert!(whole.len() / 512 > 4 * 3 * 1024 - 1024);
        repaired(whole.clone(), &[]);

        let table = long(&whole, 48);
        // Counts that are wrong from the first block to the last: 0, 2 and a free cluster that is counted.
        let mut bytes = whole.clone();
        bytes.resize(whole.len() + 512, 0);
        for index in (0..40).step_by(3) {
            let block = long(&bytes, table + 8 * index);
            bytes[block + 33] = 0;
            bytes[block + 35] = 2;
        }
        repaired(bytes, &["the count is 0, references are 1", "the count is 2, references are 1"]);

        // No block at all.
        let mut bytes = whole;
        bytes[table..table + 512].fill(0);
        repaired(bytes, &["a new refcount structure"]);
    }
}
