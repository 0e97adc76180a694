//! Linux guests for tests: a kernel, an initramfs with what the guest does, and QEMU where KVM is not enough.

pub mod fio;
pub mod initramfs;
pub mod pieces;
pub mod qemu;
