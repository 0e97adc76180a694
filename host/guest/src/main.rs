//! The built-in guest: reads every virtio-blk disk whole and reports a digest of each.
//!
//! It runs in user mode on a bare virtual machine; `blockhouse_guest` (lib.rs) says what the machine
//! promises it. `host/vmm/build.rs` builds it as a static, freestanding program.
//!
//! ```text
//!  main ─▶ for each disk: disk::Disk::open ─▶ read whole, several requests in flight ─▶ SHA-256
//!              │ mmio: registers                │ ring: one virtqueue, polled
//!              ▼                                ▼
//!          console line + Record ─▶ exit code
//! ```

#![no_std]
#![no_main]

mod console;
mod disk;
mod mmio;
mod ring;
mod runtime;

use core::fmt::Write;

use blockhouse_guest::{
    CONTROL_BASE, CONTROL_DISKS, CONTROL_EXIT, CONTROL_REPORT, DISK_BASE, DISK_STRIDE, EXIT_DISK_ERROR, EXIT_OK,
    Finding, Record,
};

use crate::console::Console;
use crate::mmio::Registers;

/// Examines every disk. Called once, by `_start`.
extern "C" fn main() -> ! {
    let control = Registers::at(CONTROL_BASE);
    let mut code = EXIT_OK;
    for number in 0..control.read_u32(CONTROL_DISKS) {
        let base = DISK_BASE + DISK_STRIDE * u64::from(number);
        let record = disk::examine(number, Registers::at(base));
        if !matches!(record.finding, Finding::Digest(_)) {
            code = EXIT_DISK_ERROR;
        }
        print(&record);
        let bytes = record.encode();
        control.write_u64(CONTROL_REPORT, bytes.as_ptr().expose_provenance() as u64);
        core::hint::black_box(&bytes);
    }
    exit(code)
}

fn exit(code: u32) -> ! {
    loop {
        Registers::at(CONTROL_BASE).write_u32(CONTROL_EXIT, code);
    }
}

/// One line for people: `disk 0: 67108864 bytes sha256 <hex> read-only serial NAME`.
fn print(record: &Record) {
    let mut console = Console;
    // The console takes everything, so none of these can fail.
    let _ = write!(console, "disk {}: ", record.disk);
    let _ = match record.finding {
        Finding::Digest(digest) => {
            let _ = write!(console, "{} bytes sha256 ", record.bytes);
            digest.iter().try_for_each(|byte| write!(console, "{byte:02x}"))
        }
        Finding::ReadError { sector } => write!(console, "{} bytes I/O error at sector {sector}", record.bytes),
        Finding::Device(fault) => console.write_str(fault.as_str()),
    };
    if record.read_only {
        let _ = console.write_str(" read-only");
    }
    let serial = record.serial.split(|&byte| byte == 0).next().unwrap_or_default();
    if let Ok(serial @ [_, ..]) = core::str::from_utf8(serial).map(str::as_bytes) {
        let _ = write!(console, " serial {}", serial.escape_ascii());
    }
    let _ = console.write_str("\n");
}
