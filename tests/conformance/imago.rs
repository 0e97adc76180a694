//! The second oracle: imago, linked natively, for what it reads.

use std::io;
use std::path::Path;

use imago::file::File;
use imago::qcow2::Qcow2;
use imago::raw::Raw;
use imago::vmdk::Vmdk;
use imago::{FormatDriverBuilder, PermissiveImplicitOpenGate, SyncFormatAccess};

use crate::content::Content;

/// Opens an image with all that it refers to. The images are our own, so everything is allowed.
pub(crate) fn open(image: &Path, format: &str) -> io::Result<SyncFormatAccess<File>> {
    let gate = PermissiveImplicitOpenGate::default;
    match format {
        "qcow2" => SyncFormatAccess::new(Qcow2::<File>::builder_path(image).open_sync(gate())?),
        "vmdk" => SyncFormatAccess::new(Vmdk::<File>::builder_path(image).open_sync(gate())?),
        "raw" => SyncFormatAccess::new(Raw::<File>::builder_path(image).open_sync(gate())?),
        other => Err(io::Error::other(format!("imago has no format {other}"))),
    }
}

/// Whether it reads the expected bytes. Its raw disks need not end with a sector.
pub(crate) fn compare(disk: &SyncFormatAccess<File>, expected: &Content) -> Result<(), String> {
    if disk.size().next_multiple_of(512) != expected.size() {
        return Err(format!("imago sees {} bytes, QEMU {}", disk.size(), expected.size()));
    }
    let mut failed = None;
    let difference = expected.first_difference(0, expected.size(), |done, to| {
        failed = failed.take().or(disk.read(to, done).err());
    });
    match (failed, difference) {
        (Some(error), _) => Err(format!("imago fails: {error}")),
        (None, Some(difference)) => Err(format!("imago and QEMU read other bytes: {difference}")),
        (None, None) => Ok(()),
    }
}
