//! Where an image lies, and the way to what it refers to.

use alloc::format;
use alloc::string::{String, ToString};
use alloc::vec::Vec;

use crate::{Access, Error, File, Result};

/// Opens the references of one image, through what was granted and nothing else.
#[derive(Debug)]
pub struct Context {
    location: String,
    #[cfg(not(target_family = "wasm"))]
    storage: crate::testing::Storage,
}

impl Context {
    #[cfg(target_family = "wasm")]
    pub(crate) fn new(location: String) -> Self {
        Self { location }
    }

    #[cfg(not(target_family = "wasm"))]
    pub(crate) fn new(location: String, storage: crate::testing::Storage) -> Self {
        Self { location, storage }
    }

    /// The absolute path of the image.
    pub fn location(&self) -> &str {
        &self.location
    }

    /// The absolute path that `reference` means: relative references start from the directory of the
    /// image, and `.`, `..` and repeated slashes are resolved as text, before any file is looked at.
    ///
    /// # Errors
    /// [`Denied`](Error::Denied) for names that cannot be a path: empty, or with a NUL byte.
    pub fn resolve(&self, reference: &str) -> Result<String> {
        if reference.is_empty() {
            return Err(Error::Denied("the reference is empty".to_string()));
        }
        if reference.contains('\0') {
            return Err(Error::Denied(format!("the reference {reference:?} has a NUL byte")));
        }
        let directory = match self.location.rfind('/') {
            Some(slash) => self.location.get(..slash).unwrap_or_default(),
            None => "",
        };
        let mut parts: Vec<&str> = Vec::new();
        let start = if reference.starts_with('/') { "" } else { directory };
        for part in start.split('/').chain(reference.split('/')) {
            match part {
                "" | "." => {}
                ".." => {
                    parts.pop();
                }
                name => parts.push(name),
            }
        }
        Ok(format!("/{}", parts.join("/")))
    }

    /// Opens the file that `reference` means.
    ///
    /// # Errors
    /// [`Denied`](Error::Denied), naming the reference and the path that it means, if that path is not
    /// granted, does not exist, or is not a regular file.
    pub fn open(&self, reference: &str, access: Access) -> Result<File> {
        let path = self.resolve(reference)?;
        #[cfg(target_family = "wasm")]
        let opened = crate::wasm::open(&path, access);
        #[cfg(not(target_family = "wasm"))]
        let opened = self.storage.open(&path, access);
        opened.map_err(|why| Error::Denied(format!("cannot open {reference:?} (that is {path}): {why}")))
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn references_resolve_from_the_directory_of_the_image() {
        let context = Context::new("/images/vm/top.qcow2".to_string(), crate::testing::Storage::new());
        for (reference, path) in [
            ("base.raw", "/images/vm/base.raw"),
            ("./a//b/", "/images/vm/a/b"),
            ("../base.raw", "/images/base.raw"),
            ("../../../../etc/x", "/etc/x"),
            ("/abs/./x", "/abs/x"),
            ("json:{\"driver\":\"file\"}", "/images/vm/json:{\"driver\":\"file\"}"),
            ("nbd://host/x", "/images/vm/nbd:/host/x"),
        ] {
            assert_eq!(context.resolve(reference).unwrap(), path, "{reference}");
        }
        assert!(context.resolve("").is_err());
        assert!(context.resolve("a\0b").is_err());
    }
}
