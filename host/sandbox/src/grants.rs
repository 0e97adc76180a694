//! What may be opened by reference: directories and single files, opened by the host when they are
//! granted, before any image is looked at.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Component as PathComponent, Path, PathBuf};
use std::sync::Arc;

use blockhouse_block::{Access, Error, ErrorKind, Result};
use wasmtime_wasi::filesystem::{Dir, FsPerms, OpenMode};

use crate::regular;

/// A set of grants. A clone shares the open files.
///
/// A grant is a right to *open*, by the name under which it was granted: an image that refers to
/// `/images/base.raw` can open it if `/images` or `/images/base.raw` was granted under that name.
#[derive(Clone, Debug, Default)]
pub struct Grants(Arc<GrantTree>);

/// Grants by the directory that components see.
#[derive(Clone, Debug, Default)]
pub(crate) struct GrantTree {
    pub(crate) directories: BTreeMap<String, Directory>,
}

/// A directory as components see it.
#[derive(Clone)]
pub(crate) struct Directory {
    /// Set if the whole directory is granted.
    pub(crate) whole: Option<(Dir, Access)>,
    /// Single files that are granted in it, by name.
    pub(crate) files: BTreeMap<String, (Arc<File>, Access)>,
}

impl std::fmt::Debug for Directory {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Directory")
            .field("whole", &self.whole.as_ref().map(|(_, access)| access))
            .field("files", &self.files.keys())
            .finish()
    }
}

impl Grants {
    /// Nothing is granted. Images without references need no grant.
    pub fn new() -> Self {
        Self::default()
    }

    /// Grants a directory (every regular file below it) or one regular file, read-only, under its own
    /// absolute path.
    ///
    /// The path is opened now: what a grant means does not change when names on the file system do.
    ///
    /// # Errors
    /// [`Invalid`](ErrorKind::Invalid) if the path is not UTF-8, or neither a directory nor a regular
    /// file; [`Storage`](ErrorKind::Storage) if it cannot be opened.
    pub fn allow(self, path: impl AsRef<Path>) -> Result<Self> {
        self.grant(path.as_ref(), Access::ReadOnly)
    }

    /// As [`allow`](Self::allow), and what is granted may be written by an image that is opened read-write:
    /// external data files. Backing files are read-only all the same.
    ///
    /// # Errors
    /// As [`allow`](Self::allow).
    pub fn allow_writing(self, path: impl AsRef<Path>) -> Result<Self> {
        self.grant(path.as_ref(), Access::ReadWrite)
    }

    fn grant(self, path: &Path, access: Access) -> Result<Self> {
        let name = absolute_name(path)?;
        let fail = |error: io::Error| {
            Error::new(ErrorKind::Storage, format!("cannot grant {}: {error}", path.display())).with_source(error)
        };
        // A directory cannot be opened for writing, and a file of which only the name is needed need not be:
        // it is opened again for each use.
        let file = File::options().read(true).custom_flags(regular::careful()).open(path).map_err(fail)?;
        let kind = file.metadata().map_err(fail)?.file_type();
        let mut tree = Arc::unwrap_or_clone(self.0);
        if kind.is_dir() {
            let (perms, mode) = match access {
                Access::ReadOnly => (FsPerms::ReadOnly, OpenMode::READ),
                Access::ReadWrite => (FsPerms::ReadWrite, OpenMode::READ | OpenMode::WRITE),
            };
            tree.directory(&name).whole = Some((Dir::new(file, perms, mode, true), access));
        } else if kind.is_file() {
            regular::usual_mode(&file).map_err(fail)?;
            let (parent, leaf) = name.rsplit_once('/').unwrap_or(("", &name));
            let parent = if parent.is_empty() { "/" } else { parent };
            tree.directory(parent).files.insert(leaf.to_owned(), (Arc::new(file), access));
        } else {
            return Err(Error::new(
                ErrorKind::Invalid,
                format!("cannot grant {}: it is neither a directory nor a regular file", path.display()),
            ));
        }
        Ok(Self(Arc::new(tree)))
    }

    /// The granted paths, sorted: what a program prints as "granted".
    pub fn paths(&self) -> Vec<String> {
        let mut paths = Vec::new();
        for (name, directory) in &self.0.directories {
            if directory.whole.is_some() {
                paths.push(name.clone());
            }
            paths.extend(directory.files.keys().map(|leaf| join(name, leaf)));
        }
        paths.sort();
        paths
    }

    pub(crate) fn tree(&self) -> &GrantTree {
        &self.0
    }
}

impl GrantTree {
    fn directory(&mut self, name: &str) -> &mut Directory {
        self.directories.entry(name.to_owned()).or_insert_with(|| Directory { whole: None, files: BTreeMap::new() })
    }
}

/// `directory/leaf`, for the root directory as well.
pub(crate) fn join(directory: &str, leaf: &str) -> String {
    if directory.ends_with('/') { format!("{directory}{leaf}") } else { format!("{directory}/{leaf}") }
}

/// The absolute name of a path that the operator gave, with `.` and `..` resolved as text. This is
/// the name under which components know it.
///
/// # Errors
/// [`Invalid`](ErrorKind::Invalid) if the path is empty or not UTF-8.
pub fn absolute_name(path: &Path) -> Result<String> {
    let invalid = |why: &str| Error::new(ErrorKind::Invalid, format!("the path {} {why}", path.display()));
    let absolute = std::path::absolute(path).map_err(|error| invalid("has no absolute form").with_source(error))?;
    let mut name = PathBuf::from("/");
    for part in absolute.components() {
        match part {
            PathComponent::Normal(part) => name.push(part),
            PathComponent::ParentDir => {
                name.pop();
            }
            PathComponent::RootDir | PathComponent::CurDir | PathComponent::Prefix(_) => {}
        }
    }
    name.into_os_string().into_string().map_err(|_| invalid("is not UTF-8; components name files in UTF-8"))
}
