//! Writes an initramfs: a cpio archive of the kind "newc", as the kernel unpacks at boot.
//!
//! Format: `Documentation/driver-api/early-userspace/buffer-format.rst` of the kernel.
//! Each entry is a header of 110 ASCII bytes, the name with a zero byte, and the content;
//! name and content are padded to four bytes.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

/// The file types that are used, as in `st_mode`.
const DIRECTORY: u32 = 0o040_755;
const PROGRAM: u32 = 0o100_755;

/// An archive in the making. Parent directories are added by themselves.
#[derive(Default)]
pub struct Initramfs {
    bytes: Vec<u8>,
    directories: BTreeSet<PathBuf>,
    inode: u32,
}

impl Initramfs {
    /// Adds a directory, absolute as in the finished system.
    pub fn directory(&mut self, path: impl AsRef<Path>) -> &mut Self {
        let path = path.as_ref().strip_prefix("/").expect("an absolute path").to_owned();
        for parent in path.ancestors().collect::<Vec<_>>().into_iter().rev() {
            if parent != Path::new("") && self.directories.insert(parent.to_owned()) {
                self.entry(parent, DIRECTORY, b"");
            }
        }
        self
    }

    /// Adds a file that may be run.
    pub fn file(&mut self, path: impl AsRef<Path>, content: &[u8]) -> &mut Self {
        let path = path.as_ref();
        self.directory(path.parent().expect("a file lies in a directory"));
        self.entry(path.strip_prefix("/").expect("an absolute path"), PROGRAM, content);
        self
    }

    /// Adds a copy of a file of this machine.
    pub fn copy(&mut self, path: impl AsRef<Path>, from: impl AsRef<Path>) -> &mut Self {
        let from = from.as_ref();
        let content = std::fs::read(from).unwrap_or_else(|error| panic!("{}: {error}", from.display()));
        self.file(path, &content)
    }

    /// The finished archive.
    pub fn finish(mut self) -> Vec<u8> {
        self.entry(Path::new("TRAILER!!!"), 0, b"");
        self.bytes
    }

    fn entry(&mut self, name: &Path, mode: u32, content: &[u8]) {
        let name = name.to_str().expect("file names are UTF-8");
        let size = u32::try_from(content.len()).expect("a file below 4 GiB");
        let name_size = u32::try_from(name.len() + 1).expect("a short name");
        self.inode += 1;
        self.bytes.extend_from_slice(b"070701");
        // Inode, mode, user, group, links, time, size, device and special device (major,
        // minor), name with its zero byte, checksum (unused by this kind).
        for field in [self.inode, mode, 0, 0, 1, 0, size, 0, 0, 0, 0, name_size, 0] {
            self.bytes.extend_from_slice(format!("{field:08x}").as_bytes());
        }
        self.bytes.extend_from_slice(name.as_bytes());
        self.bytes.push(0);
        self.pad();
        self.bytes.extend_from_slice(content);
        self.pad();
    }

    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }
}

#[test]
fn entries_are_aligned_and_parents_come_first() {
    let mut archive = Initramfs::default();
    archive.file("/a/b/run", b"12345").file("/a/c", b"");
    let bytes = archive.finish();
    assert_eq!(bytes.len() % 4, 0);
    let text = String::from_utf8_lossy(&bytes);
    let at = |name: &str| text.find(&format!("{name}\0")).unwrap_or_else(|| panic!("no {name}"));
    assert!(at("a") < at("a/b") && at("a/b") < at("a/b/run") && at("a/b/run") < at("a/c"));
    assert_eq!(text.matches("070701").count(), 5, "each directory once, and the trailer");
}
