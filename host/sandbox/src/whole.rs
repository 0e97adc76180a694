//! Files that are whole: what was written is what is read, or nothing is.
//!
//! ```text
//!   magic (8) │ SHA-256 of all that follows (32) │ content
//! ```
//!
//! The module stands for itself: a fuzz target includes it.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::unix::fs::MetadataExt;

use sha2::{Digest, Sha256};

/// Bytes of the magic, which is the version of a layout.
const MAGIC: usize = 8;
/// Bytes of the SHA-256.
const DIGEST: usize = 32;
/// The largest file that is read: far above what the largest component compiles to.
const MAX_BYTES: u64 = 1 << 30;

/// A file of compiled code, in memory, whole.
#[derive(Debug)]
pub(crate) struct Whole(Vec<u8>);

impl Whole {
    /// What follows the digest.
    pub(crate) fn content(&self) -> &[u8] {
        self.0.get(MAGIC + DIGEST..).unwrap_or_default()
    }
}

/// Reads a file of this layout. `names` is how many names it may have.
pub(crate) fn read(file: &File, magic: &[u8; MAGIC], names: u64) -> io::Result<Whole> {
    let metadata = file.metadata()?;
    if !metadata.is_file() {
        return Err(io::Error::other("it is not a regular file"));
    }
    let own = metadata.uid() == rustix::process::geteuid().as_raw() && metadata.mode() & 0o022 == 0;
    if !own || metadata.nlink() > names {
        let why = format!(
            "somebody else can have written it: it belongs to user {} with mode {:o}",
            metadata.uid(),
            metadata.mode() & 0o7777
        );
        return Err(io::Error::new(io::ErrorKind::PermissionDenied, why));
    }
    let damaged = || io::Error::new(io::ErrorKind::InvalidData, "it is damaged");
    let size = metadata.len().min(MAX_BYTES);
    // Room for all of it at once: memory that is touched for the first time is what costs.
    let mut bytes = Vec::with_capacity(usize::try_from(size).unwrap_or(0).saturating_add(1));
    file.take(size.saturating_add(1)).read_to_end(&mut bytes)?;
    let rest = bytes.strip_prefix(magic.as_slice()).ok_or_else(damaged)?;
    let (digest, content) = rest.split_at_checked(DIGEST).ok_or_else(damaged)?;
    if Sha256::digest(content).as_slice() != digest {
        return Err(damaged());
    }
    Ok(Whole(bytes))
}

/// Writes a file of this layout.
pub(crate) fn write(file: &mut impl Write, magic: &[u8; MAGIC], content: &[&[u8]]) -> io::Result<()> {
    let mut digest = Sha256::new();
    content.iter().for_each(|part| digest.update(part));
    file.write_all(magic)?;
    file.write_all(&digest.finalize())?;
    content.iter().try_for_each(|part| file.write_all(part))
}
