//! Builds the built-in guest (`host/guest`) and hands it to the crate as a file to embed.
//!
//! The guest is a program for a machine without an operating system, so it needs its own linker
//! script and its own panic strategy: that takes a cargo of its own. It uses a target directory
//! inside of `OUT_DIR`, so that it never waits for the lock that the cargo around it holds.

use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::{env, fs};

/// The guest's code is for this target whatever the machine is built for (with a musl libc, say).
const TARGET: &str = "x86_64-unknown-linux-gnu";

fn main() -> ExitCode {
    println!("cargo:rerun-if-changed=build.rs");
    match build() {
        Ok(()) => ExitCode::SUCCESS,
        Err(message) => {
            eprintln!("cannot build the built-in guest: {message}");
            ExitCode::FAILURE
        }
    }
}

fn build() -> Result<(), String> {
    if env::var("CARGO_CFG_TARGET_ARCH").as_deref() != Ok("x86_64") {
        return Err("blockhouse-vmm is for x86_64".to_owned());
    }
    let guest = directory("CARGO_MANIFEST_DIR")?.join("../guest");
    let guest = guest.canonicalize().map_err(|error| format!("{}: {error}", guest.display()))?;
    println!("cargo:rerun-if-changed={}", guest.display());
    let out = directory("OUT_DIR")?;
    let target_dir = out.join("guest");

    let status = cargo(&guest, &target_dir).status().map_err(|error| format!("cargo: {error}"))?;
    if !status.success() {
        return Err(format!("its build failed ({status}); the messages are above"));
    }
    let program = target_dir.join(TARGET).join("release/blockhouse-guest");
    fs::copy(&program, out.join("guest.elf")).map_err(|error| format!("{}: {error}", program.display()))?;
    Ok(())
}

fn cargo(guest: &Path, target_dir: &Path) -> Command {
    let script = guest.join("guest.ld");
    // A static program at a fixed address, with nothing of the C toolchain's start-up code in it.
    let flags = [
        "-Crelocation-model=static".to_owned(),
        "-Clink-arg=-static".to_owned(),
        "-Clink-arg=-no-pie".to_owned(),
        "-Clink-arg=-nostdlib".to_owned(),
        "-Clink-arg=-nostartfiles".to_owned(),
        "-Clink-arg=-Wl,--gc-sections,--build-id=none".to_owned(),
        format!("-Clink-arg=-T{}", script.display()),
    ];
    let mut cargo = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    cargo
        .args(["build", "--release", "--locked", "--package", "blockhouse-guest"])
        .args(["--bin", "blockhouse-guest", "--features", "freestanding", "--target", TARGET])
        .arg("--target-dir")
        .arg(target_dir)
        .current_dir(guest)
        .env("CARGO_ENCODED_RUSTFLAGS", flags.join("\u{1f}"))
        .env("CARGO_PROFILE_RELEASE_PANIC", "abort")
        .env("CARGO_PROFILE_RELEASE_LTO", "fat")
        .env("CARGO_PROFILE_RELEASE_CODEGEN_UNITS", "1")
        .env("CARGO_PROFILE_RELEASE_DEBUG", "false")
        .env("CARGO_PROFILE_RELEASE_STRIP", "symbols");
    // What the cargo around this one was told is not about the guest: clippy's wrapper, flags,
    // coverage, directories.
    for name in ["RUSTFLAGS", "RUSTC_WRAPPER", "RUSTC_WORKSPACE_WRAPPER", "CARGO_TARGET_DIR", "CARGO_BUILD_TARGET"] {
        cargo.env_remove(name);
    }
    cargo
}

fn directory(name: &str) -> Result<PathBuf, String> {
    env::var_os(name).map(PathBuf::from).ok_or_else(|| format!("cargo does not set {name}"))
}
