//! Disks made of layers: checked extents, the extent map and native I/O.
#![deny(unsafe_code)]
pub mod backend;
pub mod error;
mod file;
mod layer;

pub use backend::{BlockBackend, SECTOR_SIZE, Topology};
pub use error::{Error, ErrorKind, Result};
pub use file::{Access, FileIdentity, ImageFile, MAX_FILE_OFFSET};
pub use layer::{Extent, FileIndex, Layer, LayerInfo, Located, Placement};
