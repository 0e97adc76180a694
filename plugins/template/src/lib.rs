//! The template format: one line of text says how large the disk is, and the data follows.
//!
//! ```text
//! byte 0    "template disk 1 SIZE\n"    SIZE in bytes, decimal, a multiple of 512
//! byte 512  the data; where the file ends before the disk does, the rest is zeroes
//! ```
//!
//! Copy this directory to start a format of your own; `plugins/README.md` goes through it line by line.

// A component has no operating system below it. `alloc` gives String, Vec and format!.
#![cfg_attr(target_family = "wasm", no_std)]
// Parsers of strangers' bytes need no unsafe code.
#![forbid(unsafe_code)]

extern crate alloc;

use alloc::format;

use blockhouse_plugin::{
    Access, Context, Error, ExtentList, Fact, File, FileIndex, Format, ImageInfo, Located, Placement, Result,
};

/// Where the data starts in the file.
const DATA: u64 = 512;

/// An opened image: what `locate` needs to answer without looking again.
#[derive(Debug)]
pub struct Template {
    image: File,
    virtual_size: u64,
    /// How much of the disk the file holds.
    data_size: u64,
    /// The image, as the host knows it, once `connect` has shared it.
    file: Option<FileIndex>,
}

impl Format for Template {
    /// Reads the header. Everything that the file says is checked here, once.
    fn open(image: File, _context: Context, access: Access) -> Result<(Self, ImageInfo)> {
        if access == Access::ReadWrite {
            return Err(Error::unsupported("template images are read-only"));
        }
        // A file that is too short is an error with a text; nothing here can panic.
        let header = image.read_exact_at("the header", 0, DATA)?;
        let line = header.split(|byte| *byte == b'\n').next().unwrap_or_default();
        let line = core::str::from_utf8(line).map_err(|_| Error::corrupt("the first line is not text"))?;
        let size = line
            .strip_prefix("template disk 1 ")
            .ok_or_else(|| Error::corrupt(format!("the first line is {line:?}, not `template disk 1 SIZE`")))?;
        let virtual_size = size
            .parse()
            .ok()
            // A disk is whole sectors, and its size fits into a signed 64-bit number.
            .filter(|size: &u64| size.is_multiple_of(512) && i64::try_from(*size).is_ok())
            .ok_or_else(|| Error::corrupt(format!("the size {size:?} is no multiple of 512, or too large")))?;
        let data_size = image.size()?.saturating_sub(DATA).min(virtual_size);
        let info = ImageInfo {
            virtual_size,
            facts: alloc::vec![Fact::new("data-bytes", format!("{data_size}"))],
            ..ImageInfo::default()
        };
        Ok((Self { image, virtual_size, data_size, file: None }, info))
    }

    /// Shares the image, so that the host can read it by itself. There is no backing file.
    fn connect(&mut self) -> Result<Option<File>> {
        self.file = Some(self.image.share(Access::ReadOnly)?);
        Ok(None)
    }

    /// Answers for the whole disk at once, whatever was asked: first the data, then zeroes.
    fn locate(&mut self, offset: u64, _length: u64, max_extents: u32) -> Result<Located> {
        let file = self.file.ok_or_else(|| Error::Other("locate was called before connect".into()))?;
        // The answer has to contain `offset`, so it starts there if one extent is not enough to reach it.
        let start = if max_extents == 1 { offset } else { 0 };
        let mut list = ExtentList::new(start, max_extents);
        let data = self.data_size.saturating_sub(start);
        let placement = Placement::Data { file, offset: DATA.saturating_add(start), overwrite: false };
        if list.push(data, placement) {
            let _fits = list.push(self.virtual_size.saturating_sub(list.end()), Placement::Zero);
        }
        Ok(list.finish())
    }
}

// In a component: the exports that the host looks for. Natively: nothing.
blockhouse_plugin::export!(Template);

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::indexing_slicing)]
    use super::*;
    use blockhouse_plugin::testing::Storage;

    /// An image in memory; `Storage` plays the host, and fails the test if an answer breaks the contract.
    fn image(line: &str, data: &[u8]) -> Storage {
        let mut bytes = line.as_bytes().to_vec();
        bytes.resize(512, 0);
        bytes.extend_from_slice(data);
        let storage = Storage::new();
        storage.insert("/images/a.disk", bytes);
        storage
    }

    #[test]
    fn data_and_then_zeroes() {
        let mut disk = image("template disk 1 2048\n", &[7; 700]).disk::<Template>("/images/a.disk").unwrap();
        assert_eq!(disk.info.virtual_size, 2048);
        let all = disk.read(0, 2048).unwrap();
        assert!(all[..700].iter().all(|byte| *byte == 7));
        assert!(all[700..].iter().all(|byte| *byte == 0));
        for (offset, start) in [(0, 0), (699, 699), (700, 700), (2047, 2047)] {
            let located = disk.format.locate(offset, 1, 1).unwrap();
            assert_eq!((located.start, located.extents.len()), (start, 1));
        }
    }

    #[test]
    fn bytes_after_the_disk_are_not_in_it() {
        let mut disk = image("template disk 1 512\n", &[7; 2000]).disk::<Template>("/images/a.disk").unwrap();
        assert_eq!(disk.format.locate(0, 512, 8).unwrap().extents[0].length, 512);
        assert_eq!(disk.read(0, 512).unwrap(), [7; 512]);
    }

    #[test]
    fn hostile_headers_are_errors() {
        for line in
            ["", "template disk 2 512\n", "template disk 1 \n", "template disk 1 511\n", "template disk 1 -512\n"]
                .into_iter()
                .chain(["template disk 1 9223372036854775808\n", "template disk 1 99999999999999999999\n", "\u{7f}\n"])
        {
            let result = image(line, &[]).disk::<Template>("/images/a.disk");
            assert!(matches!(result, Err(Error::Corrupt(_))), "{line:?}");
        }
        let short = Storage::new();
        short.insert("/a", "template disk 1 512\n");
        assert!(matches!(short.disk::<Template>("/a"), Err(Error::Corrupt(_))));
    }
}
