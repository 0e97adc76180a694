//! Changing the backing file that an image names.
