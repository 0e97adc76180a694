//! Attacks that only ask: the host answers, and the answers are reported as an error text.

use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;

use blockhouse_plugin::{Access, Error, Result};

use crate::Hostile;

impl Hostile {
    /// What `connect` was told to ask, if anything; always ends in a report then.
    pub(crate) fn ask(&self) -> Result<()> {
        match self.behaviour.name.as_str() {
            "open" => Err(self.open_as_a_format_does(0)),
            "share-read-write" => Err(report([match self.image()?.share(Access::ReadWrite) {
                Ok(index) => format!("shared as {}", index.0),
                Err(why) => format!("refused: {why}"),
            }])),
            "open-raw" => Err(self.open_raw()?),
            "preopens" => Err(preopens()),
            "read" => Err(self.read()?),
            "change-far" => Err(self.change_far()?),
            "change-image" => Err(self.try_to_change(self.image()?)),
            "change-backing" => {
                Err(self.try_to_change(&self.context()?.open(self.behaviour.text(1)?, Access::ReadOnly)?))
            }
            _ => Ok(()),
        }
    }

    /// Opens the arguments from index `from` on as references.
    pub(crate) fn open_as_a_format_does(&self, from: usize) -> Error {
        let paths = self.behaviour.arguments.iter().skip(from);
        let open = |path: &str| self.context()?.open(path, Access::ReadOnly)?.size();
        report(paths.map(|path| match open(path) {
            Ok(size) => format!("opened {path:?}: {size} bytes"),
            Err(why) => format!("refused {path:?}: {why}"),
        }))
    }
}

pub(crate) fn report(lines: impl IntoIterator<Item = String>) -> Error {
    Error::Other(lines.into_iter().collect::<Vec<_>>().join("\n"))
}

/// Host calls that the tool kit has no use for, straight through the generated bindings.
#[cfg(target_family = "wasm")]
mod raw {
    use super::*;
    use blockhouse_plugin::wasm::bindings::wasi::filesystem::{preopens, types as fs};

    impl Hostile {
        pub(super) fn open_raw(&self) -> Result<Error> {
            let mut rights = fs::DescriptorFlags::empty();
            let mut open = fs::OpenFlags::empty();
            let mut path_flags = fs::PathFlags::empty();
            for flag in self.behaviour.text(0)?.split(',') {
                match flag {
                    "none" => {}
                    "read" => rights = rights | fs::DescriptorFlags::READ,
                    "write" => rights = rights | fs::DescriptorFlags::WRITE,
                    "mutate" => rights = rights | fs::DescriptorFlags::MUTATE_DIRECTORY,
                    "sync" => rights = rights | fs::DescriptorFlags::FILE_INTEGRITY_SYNC,
                    "create" => open = open | fs::OpenFlags::CREATE,
                    "directory" => open = open | fs::OpenFlags::DIRECTORY,
                    "exclusive" => open = open | fs::OpenFlags::EXCLUSIVE,
                    "truncate" => open = open | fs::OpenFlags::TRUNCATE,
                    "follow" => path_flags = path_flags | fs::PathFlags::SYMLINK_FOLLOW,
                    _ => return Err(Error::corrupt(format!("there is no flag {flag:?}"))),
                }
            }
            let directories = preopens::get_directories();
            let paths = || self.behaviour.arguments.iter().skip(1);
            Ok(report(directories.iter().flat_map(|(directory, name)| {
                paths().map(move |path| match directory.open_at(path_flags, path, open, rights) {
                    Ok(_) => format!("opened {path:?} in {name:?}"),
                    Err(code) => format!("refused {path:?} in {name:?}: {}", code.name()),
                })
            })))
        }

        pub(super) fn read(&self) -> Result<Error> {
            let (length, offset) = (self.behaviour.number(0, u64::MAX)?, self.behaviour.number(1, 0)?);
            Ok(report([match self.image()?.descriptor().read(length, offset) {
                Ok((bytes, end)) => format!("read {} bytes, end {end}", bytes.len()),
                Err(code) => format!("refused: {}", code.name()),
            }]))
        }
    }

    pub(super) fn preopens() -> Error {
        report(preopens::get_directories().into_iter().map(|(_, name)| name))
    }
}
#[cfg(target_family = "wasm")]
use raw::preopens;

/// Natively there is no host to ask.
#[cfg(not(target_family = "wasm"))]
impl Hostile {
    fn open_raw(&self) -> Result<Error> {
        Ok(self.open_as_a_format_does(1))
    }

    fn read(&self) -> Result<Error> {
        let size = self.image()?.size()?;
        Ok(report([format!("read {size} bytes, end true")]))
    }
}

#[cfg(not(target_family = "wasm"))]
fn preopens() -> Error {
    report([])
}
