//! What the demo and the tests need beside Rust, fetched where that is possible.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use clap::ValueEnum;

use crate::packages::{self, Depth};
use crate::tools::{self, Workspace, style};

/// Check for other programs that are needed, and fetch those that are missing.
///
/// On Debian as root, programs are installed with apt-get. What only the guest test
/// needs is unpacked below the target directory and not installed.
#[derive(clap::Args)]
pub(crate) struct Arguments {
    /// What to prepare for.
    #[arg(long = "for", value_name = "TASK", default_value = "test")]
    purpose: Purpose,
}

/// Who asks.
#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Purpose {
    /// `cargo xtask demo`.
    Demo,
    /// `cargo xtask test --quick`: everything but Linux guests.
    QuickTest,
    /// `cargo xtask test`.
    Test,
    /// `cargo xtask fuzz`.
    Fuzz,
}

pub(crate) fn run(workspace: &Workspace, arguments: &Arguments) -> Result<()> {
    let all = prepare(workspace, arguments.purpose);
    for needed in &all {
        needed.print();
    }
    require(&all)
}

/// Prepares, prints only what is missing, and fails if something is that nothing works without.
pub(crate) fn ensure(workspace: &Workspace, purpose: Purpose) -> Result<()> {
    let all = prepare(workspace, purpose);
    for needed in all.iter().filter(|needed| needed.found.is_err()) {
        needed.print();
    }
    require(&all)
}

/// One thing that is needed.
struct Needed {
    name: &'static str,
    why: &'static str,
    /// Whether nothing works without it; if not, the tests that need it are skipped and say so.
    essential: bool,
    found: Result<PathBuf>,
}

impl Needed {
    fn print(&self) {
        let Self { name, why, found, .. } = self;
        match found {
            Ok(place) => eprintln!("{} {name:<12} {}", style("32", "✓"), place.display()),
            Err(error) => eprintln!("{} {name:<12} {error:#} (needed for {why})", style("31", "✗")),
        }
    }
}

fn require(all: &[Needed]) -> Result<()> {
    let missing: Vec<&str> =
        all.iter().filter(|needed| needed.essential && needed.found.is_err()).map(|needed| needed.name).collect();
    if !missing.is_empty() {
        bail!("not ready: {} (what to do about it is said above)", missing.join(", "));
    }
    Ok(())
}

fn prepare(workspace: &Workspace, purpose: Purpose) -> Vec<Needed> {
    let fuzzer = || Needed {
        name: "c++",
        why: "building the fuzzer",
        essential: purpose == Purpose::Fuzz,
        found: program("c++", "g++"),
    };
    if purpose == Purpose::Fuzz {
        return vec![fuzzer()];
    }
    let mut all = vec![
        Needed {
            name: "qemu-img",
            why: "making images, and as the second opinion on their content",
            essential: true,
            found: program("qemu-img", "qemu-utils"),
        },
        Needed {
            name: "/dev/kvm",
            why: "everything that runs a guest",
            essential: purpose == Purpose::Demo,
            found: kvm(),
        },
    ];
    if purpose != Purpose::Demo {
        all.extend([
            Needed {
                name: "strace",
                why: "recording and failing system calls, in the tests of power cuts and of attacks",
                essential: false,
                found: program("strace", "strace"),
            },
            Needed {
                name: "valgrind",
                why: "counting what a request costs",
                essential: false,
                found: program("valgrind", "valgrind"),
            },
        ]);
    }
    if purpose == Purpose::Test {
        all.push(fuzzer());
        all.extend(guest(&workspace.target.join("cache")));
    }
    all
}

/// Pieces of the Linux guest test.
fn guest(cache: &Path) -> Vec<Needed> {
    let why = "the Linux guest test";
    let unpack = |package, depth, name| packages::unpack(package, depth, cache, name);
    let mut all = vec![
        Needed { name: "mke2fs", why, essential: false, found: program("mke2fs", "e2fsprogs") },
        Needed {
            name: "linux",
            why,
            essential: false,
            found: unpack("linux-image-cloud-amd64", Depth::Behind, "linux"),
        },
        Needed { name: "busybox", why, essential: false, found: unpack("busybox-static", Depth::Package, "busybox") },
        Needed { name: "fio", why, essential: false, found: unpack("fio", Depth::Dependencies, "fio") },
    ];
    if !kvm_boots_linux() {
        // The emulator that gives Linux guests a KVM with hardware semantics.
        let found = match tools::find("qemu-system-x86_64") {
            Some(place) => Ok(place),
            None => unpack("qemu-system-x86", Depth::Dependencies, "qemu"),
        };
        all.push(Needed { name: "qemu", why, essential: false, found });
    }
    all
}

fn program(name: &str, package: &str) -> Result<PathBuf> {
    if let Some(place) = tools::find(name) {
        return Ok(place);
    }
    packages::install(&[package]).with_context(|| format!("missing; it comes with the package {package}"))?;
    tools::find(name).with_context(|| format!("missing, although the package {package} is installed"))
}

fn kvm() -> Result<PathBuf> {
    let device = PathBuf::from("/dev/kvm");
    std::fs::File::options().read(true).write(true).open(&device).with_context(|| {
        if device.exists() {
            "it cannot be opened; add yourself to the group kvm (`usermod -aG kvm $USER`, then log in again)"
        } else {
            "there is none; switch on virtualization in the firmware and load kvm-intel or kvm-amd, \
             or allow nested virtualization if this is a virtual machine itself"
        }
    })?;
    Ok(device)
}

/// Whether KVM here is the hardware's own. Kernels that provide it in software, for
/// guests that keep to certain rules, do not boot a stock Linux.
fn kvm_boots_linux() -> bool {
    let flags = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    kvm().is_ok() && flags.split_whitespace().any(|flag| flag == "svm" || flag == "vmx")
}
