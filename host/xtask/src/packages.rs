//! Debian packages: installed where the whole machine may have them, unpacked privately where it may not.
//!
//! The kernel, busybox and the QEMU emulator that the guest test needs are only unpacked,
//! below `<target>/cache`. Installing them would do more than a test may: a kernel package
//! changes how the machine boots, busybox-static replaces busybox, and the emulator of one
//! release removes the `qemu-utils` of another.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};

use crate::tools;

/// Whether this is a machine with Debian's package tools.
pub(crate) fn available() -> bool {
    ["apt-get", "apt-cache", "dpkg"].iter().all(|program| tools::find(program).is_some())
}

/// Installs packages for the whole machine; needs root.
pub(crate) fn install(packages: &[&str]) -> Result<()> {
    ensure!(available(), "this machine has no apt-get to install {} with", packages.join(" "));
    ensure!(tools::is_root(), "only root can do it: apt-get install {}", packages.join(" "));
    tools::say(format!("apt-get install {}", packages.join(" ")));
    let install = || {
        let mut command = apt_get();
        command.args(["--yes", "install", "--no-install-recommends"]).args(packages);
        tools::output(&mut command).map(drop)
    };
    with_fresh_lists(&install).with_context(|| format!("apt-get cannot install {}", packages.join(" ")))
}

/// How much of what a package depends on is unpacked with it.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Depth {
    /// The package alone.
    Package,
    /// The package that this one, which is empty, stands for: its first dependency.
    Behind,
    /// Everything it needs that the machine does not have.
    Dependencies,
}

/// Unpacks a package into `<cache>/<name>`, unless that was done before, and returns the directory.
///
/// Nothing on the machine changes, and no root is needed where the package lists are there.
pub(crate) fn unpack(package: &str, depth: Depth, cache: &Path, name: &str) -> Result<PathBuf> {
    let directory = cache.join(name);
    if directory.is_dir() {
        return Ok(directory);
    }
    ensure!(available(), "this machine has no apt-get to fetch the package {package} with");
    tools::say(format!("fetching Debian's {package} into {}", directory.display()));
    std::fs::create_dir_all(cache)?;
    let work = tempfile::Builder::new().prefix(".new-").tempdir_in(cache)?;
    let fetch = || {
        if depth == Depth::Dependencies {
            fetch_with_dependencies(package, work.path())
        } else {
            fetch_alone(package, depth, work.path())
        }
    };
    with_fresh_lists(&fetch).with_context(|| format!("cannot fetch the package {package}"))?;

    let tree = work.path().join("tree");
    std::fs::create_dir(&tree)?;
    for entry in std::fs::read_dir(work.path())? {
        let file = entry?.path();
        if file.extension().is_some_and(|extension| extension == "deb") {
            tools::output(Command::new("dpkg").arg("-x").arg(&file).arg(&tree))?;
        }
    }
    // One step, so that an interrupted run leaves nothing that looks complete.
    std::fs::rename(&tree, &directory).with_context(|| format!("cannot create {}", directory.display()))?;
    Ok(directory)
}

fn fetch_alone(package: &str, depth: Depth, into: &Path) -> Result<()> {
    let package = if depth == Depth::Behind { behind(package)? } else { package.to_owned() };
    tools::output(apt_get().current_dir(into).args(["download", &package])).map(drop)
}

/// The package that a metapackage stands for: `linux-image-cloud-amd64` is empty and depends on one version.
fn behind(package: &str) -> Result<String> {
    let listed = tools::text(Command::new("apt-cache").args(["depends", "--important", package]))?;
    listed
        .lines()
        .find_map(|line| line.trim().strip_prefix("Depends: "))
        .map(str::to_owned)
        .with_context(|| format!("the package lists know nothing behind {package}"))
}

/// Asks apt to download for a machine like this one, but without its QEMU: whatever
/// version that is, apt must not try to make the two agree.
fn fetch_with_dependencies(package: &str, into: &Path) -> Result<()> {
    let installed = std::fs::read_to_string("/var/lib/dpkg/status").context("dpkg keeps no /var/lib/dpkg/status")?;
    let without_qemu: Vec<&str> =
        installed.split("\n\n").filter(|paragraph| !paragraph.trim_start().starts_with("Package: qemu-")).collect();
    let status = into.join("status");
    std::fs::write(&status, without_qemu.join("\n\n"))?;
    std::fs::create_dir_all(into.join("partial"))?;
    let option = |name: &str, path: &Path| format!("{name}={}", path.display());
    tools::output(
        apt_get()
            .args(["--yes", "--download-only", "--no-install-recommends"])
            .args(["-o", &option("Dir::State::status", &status)])
            .args(["-o", &option("Dir::Cache::archives", into)])
            .args(["-o", "Dir::Cache::pkgcache=", "-o", "Dir::Cache::srcpkgcache="])
            .args(["-o", "Debug::NoLocking=1"])
            .args(["install", package]),
    )
    .map(drop)
}

/// Runs `attempt`; if it fails, fetches the package lists and runs it again. A new machine
/// has none, and an old list names versions that are gone.
fn with_fresh_lists(attempt: &dyn Fn() -> Result<()>) -> Result<()> {
    let Err(first) = attempt() else {
        return Ok(());
    };
    if !tools::is_root() {
        return Err(first.context("(as root, `apt-get update` may help)"));
    }
    tools::output(apt_get().arg("update")).context("the package lists cannot be fetched")?;
    attempt()
}

fn apt_get() -> Command {
    let mut command = Command::new("apt-get");
    command
        .args(["--quiet", "-o", "DPkg::Lock::Timeout=300"])
        // Downloads go to directories that apt's own user may not enter.
        .args(["-o", "APT::Sandbox::User=root"])
        .env("DEBIAN_FRONTEND", "noninteractive")
        .stdin(Stdio::null());
    command
}
