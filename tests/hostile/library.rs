//! The library under attack: one process, several disks, small limits.

use std::path::Path;
use std::sync::OnceLock;

use blockhouse_sandbox::block::{BlockBackend, Disk, Error, VolatileSlice};
use blockhouse_sandbox::{Formats, Grants, Limits, OpenRequest, OpenedDisk, Opener, Restart, Sandbox};
use blockhouse_tests::component;

/// A sandbox and the formats that it serves.
pub(crate) struct Library {
    pub(crate) sandbox: Sandbox,
    pub(crate) formats: Formats,
}

impl Library {
    pub(crate) fn new(limits: Limits) -> Self {
        Self::with(limits, &Self::components())
    }

    /// The components, by the formats that they serve.
    pub(crate) fn components() -> Vec<(&'static str, Vec<u8>)> {
        ["raw", "qcow2", "vmdk", "hostile"].map(|format| (format, std::fs::read(component(format)).unwrap())).into()
    }

    /// With components that were read before.
    pub(crate) fn with(limits: Limits, components: &[(&'static str, Vec<u8>)]) -> Self {
        let sandbox = Sandbox::new(limits).unwrap();
        let mut formats = Formats::new();
        for (format, bytes) in components {
            formats.add_bytes(*format, *format, bytes.clone());
        }
        Self { sandbox, formats }
    }

    pub(crate) fn open(&self, format: &str, image: &Path, grants: &[&Path]) -> Result<OpenedDisk, Error> {
        let grants = grants.iter().fold(Grants::new(), |grants, path| grants.allow(path).unwrap());
        let opener = Opener::new(&self.sandbox, self.formats.clone()).grants(grants).restart(Restart::never());
        opener.open(&OpenRequest::new(image, format))
    }

    /// What `blockhouse info` does: the error that it ends with, if any.
    pub(crate) fn describe(&self, format: &str, image: &Path) -> Option<Error> {
        Opener::new(&self.sandbox, self.formats.clone()).describe(&OpenRequest::new(image, format)).1
    }
}

/// With the default limits; components are compiled once for all tests.
pub(crate) fn shared() -> &'static Library {
    static SHARED: OnceLock<Library> = OnceLock::new();
    SHARED.get_or_init(|| Library::new(Limits::default()))
}

/// Reads a range of a disk.
pub(crate) fn read(disk: &Disk, offset: u64, length: usize) -> Result<Vec<u8>, Error> {
    let mut bytes = vec![0xee; length];
    disk.read(&[VolatileSlice::from(&mut bytes[..])], offset)?;
    Ok(bytes)
}
