//! An image becomes the disk that the device works on: imago's own way, and the sandboxed one.

use std::io;
use std::path::Path;
use std::sync::Arc;

use blockhouse_imago::DiskImage;
use blockhouse_sandbox::block::Access;
use blockhouse_sandbox::{OpenRequest, Opener};
use imago::file::File;
use imago::qcow2::Qcow2;
use imago::raw::Raw;
use imago::{DynStorage, FormatAccess, Storage, StorageOpenOptions, SyncFormatAccess};

/// What the device knows of a disk, whichever way it was opened.
pub(crate) type DiskAccess = SyncFormatAccess<Box<dyn DynStorage>>;

/// The image is parsed here, with the rights of this process, and whatever it names as its backing file is
/// opened.
pub(crate) fn native(image: &Path, format: &str, writable: bool) -> io::Result<DiskAccess> {
    let file = File::open_sync(StorageOpenOptions::new().write(writable).filename(image))?;
    match format {
        "qcow2" => {
            let mut qcow2 =
                Qcow2::<Box<dyn DynStorage>, Arc<FormatAccess<_>>>::open_image_sync(Box::new(file), writable)?;
            qcow2.open_implicit_dependencies_sync()?;
            SyncFormatAccess::new(qcow2)
        }
        "raw" => SyncFormatAccess::new(Raw::<Box<dyn DynStorage>>::open_image_sync(Box::new(file), writable)?),
        other => Err(io::Error::other(format!("this device has no format {other}"))),
    }
}

/// The image is parsed by a component that has nothing but the image and what was granted to it.
pub(crate) fn sandboxed(opener: &Opener, image: &Path, format: &str, writable: bool) -> anyhow::Result<DiskAccess> {
    let access = if writable { Access::ReadWrite } else { Access::ReadOnly };
    let opened = opener.open(&OpenRequest { access, ..OpenRequest::new(image, format) })?;
    Ok(SyncFormatAccess::new(DiskImage::new(opened.disk)?)?)
}
