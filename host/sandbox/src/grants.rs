//! What may be opened by reference: directories and single files, opened by the host when they are
//! granted, before any image is looked at.

use std::collections::BTreeMap;
use std::fmt;
use std::fs::{self, File};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use blockhouse_block::{Access, Error, ErrorKind, FileIdentity, Result};
use serde::Serialize;
use wasmtime_wasi::filesystem::{Dir, FsPerms, OpenMode};

pub use crate::grant::{Grant, Referrer, Sha256Digest, absolute_name};
use crate::pin::Pin;
use crate::regular;

/// A grant that is in force, for people and programs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct GrantReport {
    /// The absolute path.
    pub path: String,
    /// `read-only` or `read-write`.
    pub access: &'static str,
    /// The SHA-256 that the file has and keeps.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub sha256: Option<Sha256Digest>,
    /// Whose references it is for.
    #[serde(flatten)]
    pub referrer: Referrer,
}

impl fmt::Display for GrantReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.path)?;
        if self.access == "read-write" {
            f.write_str(", to be written")?;
        }
        if let Some(sha256) = &self.sha256 {
            write!(f, ", pinned by sha256 {sha256}")?;
        }
        if let Some(layer) = self.referrer.layer {
            write!(f, ", to layer {layer}")?;
        }
        if let Some(image) = &self.referrer.image {
            write!(f, ", to {image}")?;
        }
        Ok(())
    }
}

/// A set of grants. A clone shares the open files.
///
/// A grant is a right to *open*, by the name under which it was granted: an image that refers to
/// `/images/base.raw` can open it if `/images` or `/images/base.raw` was granted under that name. What a grant of a
/// single file demands is demanded of that file under all its names; and what is in a directory that was granted to be
/// read is written under none, unless a grant nearer to it says otherwise.
#[derive(Clone, Debug, Default)]
pub struct Grants(Arc<GrantTree>);

/// Grants by the directory that components see.
#[derive(Clone, Debug, Default)]
pub(crate) struct GrantTree {
    pub(crate) directories: BTreeMap<String, Directory>,
}

/// A directory as components see it.
#[derive(Clone, Debug, Default)]
pub(crate) struct Directory {
    /// The grants of the whole directory.
    pub(crate) whole: Vec<WholeGrant>,
    /// Single files that are granted in it, by name. Where there is any, no whole directory says anything about that
    /// name, nor about the file under another one ([`GrantTree::of_file`]).
    pub(crate) files: BTreeMap<String, Vec<FileGrant>>,
}

/// A directory that is granted as a whole.
#[derive(Clone)]
pub(crate) struct WholeGrant {
    pub(crate) dir: Dir,
    pub(crate) access: Access,
    pub(crate) referrer: Referrer,
}

/// A file that is granted by itself.
#[derive(Clone)]
pub(crate) struct FileGrant {
    /// The absolute path.
    pub(crate) name: String,
    pub(crate) file: Arc<File>,
    pub(crate) identity: FileIdentity,
    pub(crate) access: Access,
    pub(crate) referrer: Referrer,
    pub(crate) pin: Option<Arc<Pin>>,
}

impl WholeGrant {
    /// The directory with no more rights than these.
    pub(crate) fn dir_for(&self, access: Access) -> Dir {
        let mut dir = self.dir.clone();
        if access == Access::ReadOnly {
            (dir.perms, dir.open_mode) = (FsPerms::ReadOnly, OpenMode::READ);
        }
        dir
    }
}

impl fmt::Debug for WholeGrant {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("WholeGrant").field("access", &self.access).field("referrer", &self.referrer).finish()
    }
}

impl fmt::Debug for FileGrant {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let pin = self.pin.as_ref().map(|pin| pin.digest());
        f.debug_struct("FileGrant")
            .field("access", &self.access)
            .field("referrer", &self.referrer)
            .field("pin", &pin)
            .finish()
    }
}

impl GrantTree {
    /// The grants of this single file, under whatever name it was granted.
    pub(crate) fn of_file(&self, identity: FileIdentity) -> Vec<&FileGrant> {
        let grants = self.directories.values().flat_map(|directory| directory.files.values().flatten());
        grants.filter(|grant| grant.identity == identity).collect()
    }

    /// The nearest directory around an open file that was granted to the image `name` at `depth`, and what it was
    /// granted for: by where both are, links followed, whatever name led there.
    pub(crate) fn around(&self, file: &File, depth: u32, name: &str) -> io::Result<Option<(&str, Access)>> {
        let real = place(file)?;
        let mut nearest: Option<((usize, bool), &str, Access)> = None;
        for (granted, directory) in &self.directories {
            let Some(whole) = directory.whole_for(depth, name, Access::ReadWrite) else { continue };
            let at = place(&whole.dir.dir)?;
            // Of several names of one directory, one that is enough.
            let rank = (at.components().count(), whole.access.is_writable());
            if real.starts_with(&at) && nearest.is_none_or(|(other, ..)| rank > other) {
                nearest = Some((rank, granted.as_str(), whole.access));
            }
        }
        Ok(nearest.map(|(_, granted, access)| (granted, access)))
    }
}

/// Where an open file or directory is now, without links.
fn place(file: &File) -> io::Result<PathBuf> {
    fs::read_link(format!("/proc/self/fd/{}", file.as_raw_fd()))
}

impl Directory {
    /// The grant of the whole directory that the image `name` at `depth` may use for `access`, or else the one
    /// that it may use for less.
    pub(crate) fn whole_for(&self, depth: u32, name: &str, access: Access) -> Option<&WholeGrant> {
        let mine = || self.whole.iter().filter(|grant| grant.referrer.includes(depth, name));
        mine()
            .find(|grant| grant.access == access)
            .or_else(|| mine().find(|grant| grant.access.is_writable()))
            .or_else(|| mine().next())
    }

    /// Whether the image `name` at `depth` may use any of it.
    pub(crate) fn concerns(&self, depth: u32, name: &str) -> bool {
        self.whole.iter().any(|grant| grant.referrer.includes(depth, name))
            || self.files.values().flatten().any(|grant| grant.referrer.includes(depth, name))
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
        self.add(&Grant::read(path.as_ref()), &mut |_, _| {})
    }

    /// As [`allow`](Self::allow), and what is granted may be written by an image that is opened read-write:
    /// external data files. Backing files are read-only all the same.
    ///
    /// # Errors
    /// As [`allow`](Self::allow).
    pub fn allow_writing(self, path: impl AsRef<Path>) -> Result<Self> {
        self.add(&Grant { access: Access::ReadWrite, ..Grant::read(path.as_ref()) }, &mut |_, _| {})
    }

    /// Grants in detail. A grant of a single file decides alone about it, under its own name and under every other one
    /// that leads to it: a directory around it that is granted as well, before or after, is not asked. Where it is
    /// granted with a pin and without one, the pin counts. A later grant of the same path to the same images replaces
    /// an earlier one.
    ///
    /// A pinned file is hashed now, which may take long; `progress` is told how many bytes of how many are done.
    /// From then on it is held open, locked against writers that respect QEMU's locks, and watched. If its
    /// content may have changed, every read of it fails, also by disks that are open; `host/sandbox/src/pin.rs`
    /// says what is guaranteed on which file system.
    ///
    /// # Errors
    /// As [`allow`](Self::allow). [`Denied`](ErrorKind::Denied) if the content of a pinned file is another one,
    /// or somebody writes to it, or if the path leads elsewhere than when it was judged ([`Grant::found`]);
    /// [`Invalid`](ErrorKind::Invalid) if a directory is to be pinned, or a file that may be written, or a file that is
    /// granted to the same images with another pin, or if the path has a `..` after a link and so is not what it says.
    pub fn add(self, grant: &Grant, progress: &mut dyn FnMut(u64, u64)) -> Result<Self> {
        let path = grant.path.as_path();
        let name = absolute_name(path)?;
        let fail = |error: io::Error| {
            Error::new(ErrorKind::Storage, format!("cannot grant {}: {error}", path.display())).with_source(error)
        };
        let invalid =
            |why: &str| Err(Error::new(ErrorKind::Invalid, format!("cannot grant {}: {why}", path.display())));
        // A directory cannot be opened for writing, and a file of which only the name is needed need not be:
        // it is opened again for each use.
        let file = File::options().read(true).custom_flags(regular::careful()).open(path).map_err(fail)?;
        let kind = file.metadata().map_err(fail)?.file_type();
        let identity = regular::identity(&file).map_err(fail)?;
        if grant.found.is_some_and(|found| found != identity) {
            let why = "it is not what it was a moment ago: its name, or a link on the way, was changed. Try again";
            return Err(Error::new(ErrorKind::Denied, format!("cannot grant {}: {why}", path.display())));
        }
        if let Err(why) = regular::refuse_detour(path, &file) {
            return invalid(&why);
        }
        let (access, referrer) = (grant.access, grant.referrer.clone());
        let mut tree = Arc::unwrap_or_clone(self.0);
        if kind.is_dir() {
            if grant.sha256.is_some() {
                return invalid("it is a directory, and only a file can be pinned by sha256");
            }
            let (perms, mode) = match access {
                Access::ReadOnly => (FsPerms::ReadOnly, OpenMode::READ),
                Access::ReadWrite => (FsPerms::ReadWrite, OpenMode::READ | OpenMode::WRITE),
            };
            let whole = &mut tree.directories.entry(name).or_default().whole;
            whole.retain(|other| other.referrer != referrer);
            whole.push(WholeGrant { dir: Dir::new(file, perms, mode, true), access, referrer });
        } else if kind.is_file() {
            regular::usual_mode(&file).map_err(fail)?;
            let (parent, leaf) = name.rsplit_once('/').unwrap_or(("", &name));
            let parent = if parent.is_empty() { "/" } else { parent };
            let grants =
                tree.directories.entry(parent.to_owned()).or_default().files.entry(leaf.to_owned()).or_default();
            let before = grants.iter().find(|other| other.referrer == referrer);
            if before.is_some_and(|other| other.pin.as_ref().map(|pin| pin.digest()) != grant.sha256.as_ref()) {
                return invalid("it is granted twice, once with another sha256 or without one");
            }
            let file = Arc::new(file);
            let pin = match grant.sha256 {
                Some(_) if access.is_writable() => return invalid("what is pinned by sha256 cannot be written"),
                Some(sha256) => Some(Pin::new(Arc::clone(&file), &name, sha256, progress)?),
                None => None,
            };
            grants.retain(|other| other.referrer != referrer);
            grants.push(FileGrant { name, file, identity, access, referrer, pin });
        } else {
            return invalid("it is neither a directory nor a regular file");
        }
        Ok(Self(Arc::new(tree)))
    }

    /// The granted paths, sorted, each once.
    pub fn paths(&self) -> Vec<String> {
        let mut paths: Vec<String> = self.list().into_iter().map(|grant| grant.path).collect();
        paths.dedup();
        paths
    }

    /// The grants, sorted by path: what a program prints as "granted".
    pub fn list(&self) -> Vec<GrantReport> {
        let mut list = Vec::new();
        let text = |access: Access| if access.is_writable() { "read-write" } else { "read-only" };
        for (name, directory) in &self.0.directories {
            list.extend(directory.whole.iter().map(|grant| GrantReport {
                path: name.clone(),
                access: text(grant.access),
                sha256: None,
                referrer: grant.referrer.clone(),
            }));
            for (leaf, grants) in &directory.files {
                list.extend(grants.iter().map(|grant| GrantReport {
                    path: join(name, leaf),
                    access: text(grant.access),
                    sha256: grant.pin.as_ref().map(|pin| *pin.digest()),
                    referrer: grant.referrer.clone(),
                }));
            }
        }
        list.sort_by(|a, b| (&a.path, &a.referrer).cmp(&(&b.path, &b.referrer)));
        list
    }

    pub(crate) fn tree(&self) -> &GrantTree {
        &self.0
    }
}

/// `directory/leaf`, for the root directory as well.
pub(crate) fn join(directory: &str, leaf: &str) -> String {
    if directory.ends_with('/') { format!("{directory}{leaf}") } else { format!("{directory}/{leaf}") }
}
