//! Making new images.
