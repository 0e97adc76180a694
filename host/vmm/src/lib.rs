//! A small KVM machine: it boots a Linux kernel, or the built-in guest, with virtio-blk disks.
//!
//! ```text
//!  Machine ── new: memory, devices, vCPUs, payload ── run ──▶ Exit
//!     │
//!     ├─ vcpu     one thread each: KVM_RUN, exits ──▶ devices
//!     ├─ devices  what an address or a port means
//!     │     ├─ serial   16550 at port 0x3f8, interrupt 4 ──▶ console
//!     │     ├─ power    reset and shutdown (ACPI, i8042)
//!     │     ├─ control  registers of the built-in guest ──▶ reports
//!     │     └─ mmio     virtio-mmio, one per disk ── BlockDevice (blockhouse-virtio)
//!     │           └─ worker  one thread per queue: ioeventfd ▸ BlockQueue ▸ irqfd
//!     └─ payload: linux (bzImage or ELF, initramfs, acpi tables) or builtin (embedded ELF)
//! ```
//! A notification of a queue wakes the worker from inside the kernel (ioeventfd), and the interrupt
//! goes back the same way (irqfd): no vCPU leaves guest mode for either.
//!
//! [`layout`] says what lies where in guest physical memory.
//!
//! ```no_run
//! use std::sync::Arc;
//!
//! use blockhouse_block::BlockBackend;
//! use blockhouse_vmm::{DiskConfig, Error, Machine, MachineConfig, Payload};
//!
//! fn show_digests(disk: Arc<dyn BlockBackend>) -> Result<(), Error> {
//!     let machine = Machine::new(MachineConfig {
//!         memory_bytes: 64 << 20,
//!         vcpus: 1,
//!         payload: Payload::BuiltinGuest,
//!         disks: vec![DiskConfig::new(disk, "golden")],
//!         console: Box::new(std::io::stdout()),
//!     })?;
//!     for disk in machine.run()?.disks {
//!         println!("disk {} of {} bytes: {:?}", disk.disk, disk.bytes, disk.result);
//!     }
//!     Ok(())
//! }
//! ```
//!
//! The guest is hostile: nothing that it writes, to memory or to a register, may panic, block or
//! grow the host. The kernel and the initramfs are files of the user's choice.

#![deny(unsafe_code)]

#[cfg(not(all(target_arch = "x86_64", target_os = "linux")))]
compile_error!("blockhouse-vmm needs Linux on x86_64");

mod acpi;
mod builtin;
mod console;
mod control;
mod cpu;
mod devices;
mod error;
mod interrupt;
pub mod layout;
mod linux;
mod machine;
mod memory;
mod mmio;
mod power;
mod serial;
mod vcpu;

pub use blockhouse_virtio::{Beginning, CacheMode, DeviceStats, Rate, RateLimits};
pub use builtin::{DiskReport, DiskResult};
pub use error::{Error, ErrorKind, Result};
pub use machine::{
    ConsoleInput, DiskConfig, DiskHandle, Exit, ExitReason, Machine, MachineConfig, Payload, StopHandle,
};
