//! Components compiled ahead, in files of the operator: [`Sandbox::precompile`] makes one,
//! [`Sandbox::load_precompiled`] takes it.
//!
//! Such a file is not a component any more. Nothing confines it; it is trusted as a program is. So nobody gets
//! to run one by mistake: where a component is expected it is refused, whatever its name, and where it is asked
//! for it must be this user's own (`code.rs`), and made by this version for this machine.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;

use blockhouse_block::{Error, ErrorKind, Result};
use serde::{Deserialize, Serialize};
use wasmtime::Engine;
use wasmtime::component::Component;

use crate::code::{self, Whole};
use crate::regular;

/// What each file starts with: the version of this layout.
const MAGIC: &[u8; 8] = b"BHPLUG1\n";
/// Ends what is said about the code; JSON has none.
const END: u8 = b'\n';
/// Which program made it.
const VERSION: &str = env!("CARGO_PKG_VERSION");

/// What the code is of, and for.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct About {
    /// The version of Blockhouse.
    blockhouse: String,
    /// See [`code::engine_id`].
    engine: String,
    /// SHA-256 of the component.
    pub(crate) component_sha256: String,
    /// Size of the component.
    pub(crate) component_bytes: usize,
}

/// Whether the bytes are such a file, however damaged.
pub(crate) fn is_compiled(bytes: &[u8]) -> bool {
    bytes.starts_with(MAGIC)
}

/// The file for a component.
pub(crate) fn make(engine: &Engine, component: &Component, sha256: &str, bytes: usize) -> io::Result<Vec<u8>> {
    let code = component.serialize().map_err(|error| io::Error::other(error.to_string()))?;
    let about = About {
        blockhouse: VERSION.to_owned(),
        engine: code::engine_id(engine),
        component_sha256: sha256.to_owned(),
        component_bytes: bytes,
    };
    let mut file = Vec::with_capacity(code.len().saturating_add(1024));
    code::write(&mut file, MAGIC, &[&serde_json::to_vec(&about)?, &[END], &code])?;
    Ok(file)
}

/// Reads such a file.
pub(crate) fn open(engine: &Engine, path: &Path) -> Result<(About, Whole)> {
    let failed = |kind: ErrorKind, error: io::Error| {
        Error::new(kind, format!("the compiled component is not used: {error}"))
            .with_source(error)
            .on_image(path.display().to_string())
    };
    let file: File = regular::open(path, false)
        .and_then(|file| file.map_err(io::Error::other))
        .map_err(|error| failed(ErrorKind::Storage, error))?;
    let mut start = [0; 4];
    if file.read_exact_at(&mut start, 0).is_ok() && start == *b"\0asm" {
        let why =
            "it is a component, not yet compiled: it is given without `compiled:`, or to `blockhouse plugin compile`";
        return Err(failed(ErrorKind::Invalid, io::Error::other(why)));
    }
    // Any number of names: a package manager may link the file elsewhere.
    let whole = code::read(&file, MAGIC, u64::MAX).map_err(|error| match error.kind() {
        io::ErrorKind::PermissionDenied => failed(ErrorKind::Denied, error),
        io::ErrorKind::InvalidData => failed(ErrorKind::Corrupt, error),
        _ => failed(ErrorKind::Storage, error),
    })?;
    let about = whole.content().split(|byte| *byte == END).next().unwrap_or_default();
    let about: About = serde_json::from_slice(about).map_err(|error| failed(ErrorKind::Corrupt, error.into()))?;
    if about.blockhouse != VERSION || about.engine != code::engine_id(engine) {
        let made_for = if about.blockhouse == VERSION {
            "another processor, or for an engine with other settings".to_owned()
        } else {
            format!("Blockhouse {}, and this is {VERSION}", about.blockhouse)
        };
        let why = format!(
            "the compiled component is not used: it was made for {made_for}; \
             make it anew with `blockhouse plugin compile`"
        );
        return Err(Error::new(ErrorKind::Unsupported, why).on_image(path.display().to_string()));
    }
    Ok((about, whole))
}

/// The code becomes a component.
///
/// # Safety
/// The file must have been made by [`make`].
#[allow(unsafe_code)]
pub(crate) unsafe fn component(engine: &Engine, whole: &Whole) -> wasmtime::Result<Component> {
    let content = whole.content();
    let start = content.iter().position(|byte| *byte == END).map_or(content.len(), |end| end + 1);
    // SAFETY: what the caller promises.
    unsafe { code::deserialize(engine, content.get(start..).unwrap_or_default()) }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::indexing_slicing, unsafe_code)]
    use std::os::unix::fs::{PermissionsExt, symlink};
    use std::path::PathBuf;

    use super::*;

    /// The smallest component there is: the eight bytes that every one starts with.
    const EMPTY: &[u8] = b"\0asm\x0d\0\x01\0";

    fn made() -> (tempfile::TempDir, Engine, PathBuf) {
        let directory = tempfile::tempdir().unwrap();
        let engine = Engine::default();
        let component = Component::from_binary(&engine, EMPTY).unwrap();
        let path = directory.path().join("empty.compiled");
        std::fs::write(&path, make(&engine, &component, "0123", EMPTY.len()).unwrap()).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o644)).unwrap();
        (directory, engine, path)
    }

    fn refused(engine: &Engine, path: &Path) -> (ErrorKind, String) {
        let error = open(engine, path).unwrap_err();
        (error.kind(), error.to_string())
    }

    #[test]
    fn a_component_is_told_from_what_was_made_of_it() {
        let (_directory, engine, path) = made();
        std::fs::write(&path, EMPTY).unwrap();
        let (kind, why) = refused(&engine, &path);
        assert!(kind == ErrorKind::Invalid && why.contains("without `compiled:`"), "{why}");
    }

    #[test]
    fn what_was_made_is_taken() {
        let (directory, engine, path) = made();
        let (about, whole) = open(&engine, &path).unwrap();
        assert_eq!((about.component_sha256.as_str(), about.component_bytes), ("0123", EMPTY.len()));
        // SAFETY: made above.
        assert!(unsafe { component(&engine, &whole) }.is_ok());
        // By any name.
        let link = directory.path().join("link");
        symlink(&path, &link).unwrap();
        std::fs::hard_link(&path, directory.path().join("other")).unwrap();
        assert!(open(&engine, &link).is_ok());
    }

    #[test]
    fn what_others_can_have_written_is_not_taken() {
        let (directory, engine, path) = made();
        for mode in [0o664, 0o646, 0o666] {
            std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode)).unwrap();
            let (kind, why) = refused(&engine, &path);
            assert!(kind == ErrorKind::Denied && why.contains(&format!("{mode:o}")), "{mode:o}: {why}");
        }
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600)).unwrap();
        if rustix::process::geteuid().is_root() {
            std::os::unix::fs::chown(&path, Some(4711), None).unwrap();
            let (kind, why) = refused(&engine, &path);
            assert!(kind == ErrorKind::Denied && why.contains("user 4711"), "{why}");
        }
        assert_eq!(refused(&engine, directory.path()).0, ErrorKind::Storage);
    }

    #[test]
    fn what_is_damaged_is_not_taken() {
        let (_directory, engine, path) = made();
        let good = std::fs::read(&path).unwrap();
        for at in (0..good.len()).step_by(good.len() / 97 + 1) {
            let mut bad = good.clone();
            bad[at] ^= 0x10;
            std::fs::write(&path, &bad).unwrap();
            assert_eq!(refused(&engine, &path).0, ErrorKind::Corrupt, "byte {at} was changed");
            std::fs::write(&path, &good[..at]).unwrap();
            assert_eq!(refused(&engine, &path).0, ErrorKind::Corrupt, "cut off at {at}");
        }
        std::fs::write(&path, &good).unwrap();
        assert!(open(&engine, &path).is_ok());
    }

    #[test]
    fn what_was_made_for_something_else_is_not_taken() {
        let (_directory, engine, path) = made();
        let mut config = wasmtime::Config::new();
        config.epoch_interruption(true);
        let (kind, why) = refused(&Engine::new(&config).unwrap(), &path);
        assert!(kind == ErrorKind::Unsupported && why.contains("other settings"), "{why}");
        let about = About {
            blockhouse: "0.0.9".to_owned(),
            engine: code::engine_id(&engine),
            component_sha256: String::new(),
            component_bytes: 0,
        };
        let mut old = Vec::new();
        code::write(&mut old, MAGIC, &[&serde_json::to_vec(&about).unwrap(), b"\n", b"code"]).unwrap();
        std::fs::write(&path, &old).unwrap();
        let (kind, why) = refused(&engine, &path);
        assert!(kind == ErrorKind::Unsupported && why.contains("Blockhouse 0.0.9"), "{why}");
        assert!(why.contains("plugin compile"), "{why}");
    }
}
