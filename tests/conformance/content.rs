//! What a disk holds, as a file: compared and looked at in pieces, so that size costs no memory.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use rustix::fs::{SeekFrom, seek};
use rustix::io::Errno;

const PIECE: usize = 1 << 20;

/// A file whose bytes past its end are zero.
pub(crate) struct Content {
    file: File,
    size: u64,
}

impl Content {
    pub(crate) fn open(path: &Path) -> Self {
        let file = File::open(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        let size = file.metadata().unwrap().len();
        Self { file, size }
    }

    pub(crate) fn size(&self) -> u64 {
        self.size
    }

    /// Fills `buffer` from `offset` on.
    pub(crate) fn read(&self, offset: u64, buffer: &mut [u8]) {
        // Reading a hole makes the kernel allocate memory for it: seconds, on disks of gigabytes.
        let end = offset.saturating_add(u64::try_from(buffer.len()).unwrap());
        match seek(&self.file, SeekFrom::Data(offset)) {
            Ok(data) if data >= end => return buffer.fill(0),
            // No data from there on.
            Err(Errno::NXIO) => return buffer.fill(0),
            _ => {}
        }
        let mut filled = 0;
        while filled < buffer.len() {
            let at = offset + u64::try_from(filled).unwrap();
            match self.file.read_at(&mut buffer[filled..], at).unwrap() {
                0 => break,
                read => filled += read,
            }
        }
        buffer[filled..].fill(0);
    }

    /// Calls `look` with one piece of the range after the other, until it returns something.
    fn pieces<T>(&self, offset: u64, length: u64, mut look: impl FnMut(u64, &[u8]) -> Option<T>) -> Option<T> {
        let mut buffer = vec![0; PIECE];
        let mut done = 0;
        while done < length {
            let take = usize::try_from(length - done).unwrap_or(PIECE).min(PIECE);
            self.read(offset + done, &mut buffer[..take]);
            if let Some(found) = look(done, &buffer[..take]) {
                return Some(found);
            }
            done += u64::try_from(take).unwrap();
        }
        None
    }

    /// The first byte in a range that is not zero, relative to its start.
    pub(crate) fn first_nonzero(&self, offset: u64, length: u64) -> Option<u64> {
        let zeroes = vec![0; PIECE];
        self.pieces(offset, length, |done, piece| {
            // Most pieces are all zero, and comparing slices is fast even without optimisation.
            if *piece == zeroes[..piece.len()] {
                return None;
            }
            let at = piece.iter().position(|byte| *byte != 0)?;
            Some(done + u64::try_from(at).unwrap())
        })
    }

    /// The first difference between `length` bytes at `offset` here and what `other` fills in for the
    /// same relative range, relative to the start, with both bytes.
    pub(crate) fn first_difference(
        &self,
        offset: u64,
        length: u64,
        mut other: impl FnMut(u64, &mut [u8]),
    ) -> Option<Difference> {
        let mut theirs = vec![0; PIECE];
        self.pieces(offset, length, |done, piece| {
            let theirs = &mut theirs[..piece.len()];
            other(done, theirs);
            if piece == theirs {
                return None;
            }
            let at = piece.iter().zip(theirs.iter()).position(|(a, b)| a != b)?;
            Some(Difference { at: done + u64::try_from(at).unwrap(), expected: piece[at], found: theirs[at] })
        })
    }
}

/// Where two contents differ first.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Difference {
    pub(crate) at: u64,
    pub(crate) expected: u8,
    pub(crate) found: u8,
}

impl std::fmt::Display for Difference {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "byte {:#x} is {:#04x}, expected {:#04x}", self.at, self.found, self.expected)
    }
}
