//! Changing the size of a disk.
