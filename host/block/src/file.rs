//! A granted file, ready for the host's own I/O: [`imago::file::File`] with the rights that were granted.

use std::fs;

use imago::storage::ext::StorageExt;
use imago::{Storage, StorageOpenOptions};
