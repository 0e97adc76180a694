//! What changes a disk.

use vm_memory::VolatileSlice;

use crate::buffers::Buffers;
use crate::disk::Disk;
use crate::error::{Error, ErrorKind, Result};
use crate::file::ImageFile;
use crate::files::FileId;
use crate::flat::Target;

/// Zeroes are written from one buffer, this many bytes at a time.
const ZEROES: usize = 1 << 20;

impl Disk {
    /// The end of a range to be changed.
    pub(crate) fn change_end(&self, offset: u64, length: u64) -> Result<u64> {
        if !self.writable {
            return Err(Error::new(ErrorKind::Invalid, "the disk is read-only: open it writable to write"));
        }
        offset.checked_add(length).filter(|end| *end <= self.capacity).ok_or_else(|| {
            let capacity = self.capacity;
            Error::new(ErrorKind::Invalid, format!("a request at {offset} ends past the disk of {capacity} bytes"))
        })
    }

    /// Writes where all of the range may be overwritten. All of it is looked up before any of it is
    /// written: a refusal changes nothing.
    pub(crate) fn overwrite(&self, buffers: &[VolatileSlice<'_>], start: u64, end: u64) -> Result<()> {
        let extents = self.overwritable(start, end)?;
        let mut buffers = Buffers::new(buffers);
        for (file, offset, length) in extents {
            self.file(file)?.write(&buffers.take(length), offset)?;
        }
        Ok(())
    }

    fn overwritable(&self, start: u64, end: u64) -> Result<Vec<(FileId, u64, u64)>> {
        let mut extents = Vec::new();
        self.for_each_extent(start, end, |flat| match flat.target {
            Target::Data { file, offset, overwrite: true } => {
                extents.push((file, offset, flat.length));
                Ok(())
            }
            _ => Err(Error::new(
                ErrorKind::Invalid,
                format!(
                    "the bytes at {} cannot be overwritten in place: put an image that can grow on top",
                    flat.start
                ),
            )),
        })?;
        Ok(extents)
    }

    pub(crate) fn zero_in_place(&self, start: u64, end: u64, may_unmap: bool) -> Result<()> {
        for (file, offset, length) in self.overwritable(start, end)? {
            zero_file(self.file(file)?, offset, length, may_unmap)?;
        }
        Ok(())
    }

    pub(crate) fn punch(&self, start: u64, end: u64) -> Result<()> {
        for (file, offset, length) in self.overwritable(start, end)? {
            self.file(file)?.punch_hole(offset, length)?;
        }
        Ok(())
    }
}

/// Makes a range of a file read as zero.
fn zero_file(file: &ImageFile, offset: u64, length: u64, may_unmap: bool) -> Result<()> {
    if (may_unmap && file.punch_hole(offset, length)?) || file.zero_range(offset, length)? {
        return Ok(());
    }
    let mut zeroes = vec![0; usize::try_from(length).unwrap_or(ZEROES).min(ZEROES)];
    let zeroes = VolatileSlice::from(&mut zeroes[..]);
    let end = offset.saturating_add(length);
    let mut position = offset;
    while position < end {
        let part = usize::try_from(end.saturating_sub(position)).unwrap_or(ZEROES).min(ZEROES);
        let part = zeroes.subslice(0, part).map_err(|error| {
            Error::new(ErrorKind::Invalid, "a part of the zeroes is longer than the whole").with_source(error)
        })?;
        file.write(&[part], position)?;
        position = position.saturating_add(part.len() as u64);
    }
    Ok(())
}
