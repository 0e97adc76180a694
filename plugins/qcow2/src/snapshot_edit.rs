//! Making, applying and deleting internal snapshots.
