//! QEMU as a machine monitor or as an emulator: where it is.

use std::path::{Path, PathBuf};
use std::process::Command;

use super::pieces;
use crate::on_path;

/// Where QEMU was unpacked, `None` when it is installed, or why there is none.
pub fn find_qemu() -> Result<Option<PathBuf>, String> {
    match pieces::cache("qemu") {
        Ok(directory) => Ok(Some(directory)),
        Err(_) if on_path("qemu-system-x86_64") => Ok(None),
        Err(reason) => Err(reason),
    }
}

/// QEMU, without arguments but for where its files are.
pub fn qemu(unpacked: Option<&Path>) -> Command {
    let Some(package) = unpacked else {
        return Command::new("qemu-system-x86_64");
    };
    let mut qemu = Command::new(package.join("usr/bin/qemu-system-x86_64"));
    let libraries = ["usr/lib/x86_64-linux-gnu", "lib/x86_64-linux-gnu"].map(|below| package.join(below));
    qemu.env("QEMU_MODULE_DIR", libraries[0].join("qemu"))
        .env("LD_LIBRARY_PATH", std::env::join_paths(&libraries).unwrap())
        .arg("-L")
        .arg(package.join("usr/share/qemu"))
        .arg("-L")
        .arg(package.join("usr/share/seabios"));
    qemu
}

/// What makes a kernel start fast and end for sure in a machine that is emulated, or inside of one. How it resets is
/// its own choice: one that does by a triple fault cannot be told from one that crashed.
pub const KERNEL_OPTIONS: &str = "panic=-1 nokaslr mitigations=off tsc=reliable no_timer_check random.trust_cpu=on";
