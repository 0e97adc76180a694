//! The raw format: the file is the disk, byte for byte.
//!
//! Nothing in the file is looked at, so nothing in it can mean anything: a raw disk onto which a guest
//! writes a qcow2 header stays a raw disk.

#![cfg_attr(target_family = "wasm", no_std)]
#![forbid(unsafe_code)]

extern crate alloc;

use alloc::format;
use alloc::vec::Vec;

use blockhouse_plugin::{
    Access, Context, Creator, Error, Extent, File, FileIndex, Format, ImageInfo, Located, NewImage, OptionHelp,
    Placement, Resizer, Result,
};

/// An opened raw image.
#[derive(Debug)]
pub struct Raw {
    image: File,
    access: Access,
    virtual_size: u64,
    file: Option<FileIndex>,
}

impl Format for Raw {
    fn open(image: File, _context: Context, access: Access) -> Result<(Self, ImageInfo)> {
        let size = image.size()?;
        // A file that ends inside a sector reads as zero up to the end of that sector.
        let virtual_size = size
            .checked_next_multiple_of(512)
            .filter(|size| i64::try_from(*size).is_ok())
            .ok_or_else(|| Error::unsupported(format!("the file is too large for a disk: {size} bytes")))?;
        let info = ImageInfo { virtual_size, overwritable: access == Access::ReadWrite, ..ImageInfo::default() };
        Ok((Self { image, access, virtual_size, file: None }, info))
    }

    fn connect(&mut self) -> Result<Option<File>> {
        self.file = Some(self.image.share(self.access)?);
        Ok(None)
    }

    fn locate(&mut self, offset: u64, _length: u64, _max_extents: u32) -> Result<Located> {
        let file = self.file.ok_or_else(|| Error::Other("locate was called before connect".into()))?;
        if offset >= self.virtual_size {
            return Err(Error::Other(format!("offset {offset} is past the end of the disk")));
        }
        let placement = Placement::Data { file, offset: 0, overwrite: self.access == Access::ReadWrite };
        Ok(Located { start: 0, extents: alloc::vec![Extent { length: self.virtual_size, placement }] })
    }
}

impl Creator for Raw {
    fn create_options() -> Vec<OptionHelp> {
        Vec::new()
    }

    fn create(image: File, new: NewImage) -> Result<()> {
        if let Some(backing) = &new.backing {
            return Err(Error::unsupported(format!(
                "a raw image has no backing file, and {:?} was given",
                backing.name
            )));
        }
        if let Some((name, _)) = new.options.first() {
            return Err(Error::Other(format!("raw images have no options; {name:?} was given")));
        }
        image.set_size(new.virtual_size)?;
        image.sync_data()
    }
}

impl Resizer for Raw {
    fn resize(&mut self, virtual_size: u64, _hide_backing: bool) -> Result<()> {
        self.image.set_size(virtual_size)?;
        self.image.sync_data()
    }
}

blockhouse_plugin::export!(Raw: creator, resizer);

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use blockhouse_plugin::testing::{Change, Storage};

    #[test]
    fn the_file_is_the_disk_and_its_last_sector_is_filled_up() {
        let storage = Storage::new();
        storage.insert("/a.raw", (0..1000u32).map(|i| u8::try_from(i % 251).unwrap()).collect::<Vec<_>>());
        let mut disk = storage.disk::<Raw>("/a.raw").unwrap();
        assert_eq!(disk.info.virtual_size, 1024);
        assert!(!disk.info.overwritable);
        let all = disk.read(0, 1024).unwrap();
        assert_eq!(all.get(999).copied(), Some(u8::try_from(999 % 251).unwrap()));
        assert!(all.iter().skip(1000).all(|byte| *byte == 0));
    }

    #[test]
    fn a_header_in_a_raw_disk_means_nothing() {
        let storage = Storage::new();
        let mut bytes = vec![0u8; 4096];
        bytes.splice(0..4, *b"QFI\xfb");
        storage.insert("/a.raw", bytes.clone());
        let mut disk = storage.disk::<Raw>("/a.raw").unwrap();
        assert_eq!(disk.read(0, 4096).unwrap(), bytes);
        assert!(storage.opened().iter().all(|path| path == "/a.raw"));
    }

    #[test]
    fn an_empty_file_is_an_empty_disk() {
        let storage = Storage::new();
        storage.insert("/a.raw", Vec::new());
        let mut disk = storage.disk::<Raw>("/a.raw").unwrap();
        assert_eq!(disk.info.virtual_size, 0);
        assert!(disk.format.locate(0, 1, 1).is_err());
    }

    #[test]
    fn new_images_and_new_sizes() {
        let storage = Storage::new();
        storage.insert("/a.raw", Vec::new());
        let file = || storage.file("/a.raw", Access::ReadWrite);
        // Whoever hears of a size has it durably.
        let is_synced = || matches!(storage.take_changes("/a.raw").last(), Some(Change::Sync));
        Raw::create(file(), NewImage { virtual_size: 4096, ..NewImage::default() }).unwrap();
        assert_eq!(storage.bytes("/a.raw"), vec![0; 4096]);
        assert!(is_synced());
        let options = vec![("cluster-size".to_owned(), "4096".to_owned())];
        assert!(Raw::create(file(), NewImage { options, ..NewImage::default() }).is_err());
        for size in [8192, 512] {
            storage.opened_image::<Raw>("/a.raw", Access::ReadWrite).unwrap().resize(size, false).unwrap();
            assert_eq!(storage.bytes("/a.raw").len() as u64, size);
            assert!(is_synced(), "{size}");
        }
    }

    #[test]
    fn writable_images_may_be_overwritten_in_place() {
        let storage = Storage::new();
        storage.insert("/a.raw", vec![0; 512]);
        let mut disk = storage.disk_with::<Raw>("/a.raw", Access::ReadWrite, |_| Ok(())).unwrap();
        assert!(disk.info.overwritable);
        let located = disk.format.locate(0, 512, 1).unwrap();
        assert!(matches!(located.extents.first().unwrap().placement, Placement::Data { overwrite: true, .. }));
    }
}
