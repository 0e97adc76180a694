//! Disks made of layers: checked extents, the extent map and native I/O.
pub mod backend;
pub mod error;
pub use backend::{BlockBackend, SECTOR_SIZE, Topology};
pub use error::{Error, ErrorKind, Result};
