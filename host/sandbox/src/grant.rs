//! A grant as the operator writes it: a path, and whose references may use it for what. Plain values; nothing is
//! opened (`grants.rs` does that).
//!
//! The module stands for itself: a fuzz target includes it.

use std::fmt;
use std::path::{Component as PathComponent, Path, PathBuf};
use std::str::FromStr;

use blockhouse_block::{Access, Error, ErrorKind, FileIdentity, Result};
use serde::{Serialize, Serializer};
use sha2::{Digest, Sha256};

/// A SHA-256, written as 64 hexadecimal digits.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Sha256Digest([u8; 32]);

impl Sha256Digest {
    /// A digest of these bytes.
    pub const fn new(bytes: [u8; 32]) -> Self {
        Self(bytes)
    }

    /// The digest of some content.
    pub fn of(content: &[u8]) -> Self {
        Self(Sha256::digest(content).into())
    }
}

impl FromStr for Sha256Digest {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let digit = |byte: u8| char::from(byte).to_digit(16).and_then(|digit| u8::try_from(digit).ok());
        let mut bytes = [0; 32];
        let (pairs, rest) = text.as_bytes().as_chunks::<2>();
        let complete = rest.is_empty() && pairs.len() == bytes.len();
        let digits = bytes.iter_mut().zip(pairs).try_for_each(|(byte, [high, low])| {
            *byte = digit(*high)? << 4 | digit(*low)?;
            Some(())
        });
        match digits {
            Some(()) if complete => Ok(Self(bytes)),
            _ => Err(Error::new(ErrorKind::Invalid, format!("{text:?} is no SHA-256: 64 hexadecimal digits"))),
        }
    }
}

impl fmt::Display for Sha256Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for Sha256Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl Serialize for Sha256Digest {
    fn serialize<S: Serializer>(&self, serializer: S) -> std::result::Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

/// Whose references a grant is for. By default: those of every image of the chain.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub struct Referrer {
    /// Only the image at this depth of the chain: 0 is the image that the operator named, 1 its backing file.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub layer: Option<u32>,
    /// Only the image of this absolute name.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub image: Option<String>,
}

impl Referrer {
    /// Whether the image `name` at `depth` may use the grant.
    pub(crate) fn includes(&self, depth: u32, name: &str) -> bool {
        self.layer.is_none_or(|layer| layer == depth) && self.image.as_ref().is_none_or(|image| image == name)
    }
}

/// One thing that is granted. See [`Grants::allow`](crate::Grants::allow) for what it means.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Grant {
    /// A directory (every regular file below it) or one regular file.
    pub path: PathBuf,
    /// Read-write is for external data files of images that are opened read-write.
    pub access: Access,
    /// The file must have this SHA-256, and keep it: see [`Grants::add`](crate::Grants::add).
    pub sha256: Option<Sha256Digest>,
    /// Whose references it is for.
    pub referrer: Referrer,
    /// What the path led to when it was judged. If it leads elsewhere when it is granted, that is refused.
    pub found: Option<FileIdentity>,
}

impl Grant {
    /// A grant to read `path`, for every image of a chain.
    pub fn read(path: impl Into<PathBuf>) -> Self {
        Self { path: path.into(), access: Access::ReadOnly, sha256: None, referrer: Referrer::default(), found: None }
    }
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
