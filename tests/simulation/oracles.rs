//! Who else reads and writes the images: QEMU's tools, and imago.

use std::os::fd::AsRawFd;
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::time::Duration;

use imago::file::File;
use imago::qcow2::Qcow2;
use imago::{FormatDriverBuilder, PermissiveImplicitOpenGate, SyncFormatAccess};

/// Returns when nobody holds a lock on an image. One that was dropped is still open in children of other
/// threads that have not become their program yet.
pub(crate) fn wait_for_locks(image: &Path) -> Result<(), String> {
    let file = std::fs::File::options().read(true).write(true).open(image).map_err(|error| error.to_string())?;
    for _ in 0..2000 {
        // SAFETY: `flock` is plain numbers, all of which may be zero.
        let mut lock: libc::flock = unsafe { std::mem::zeroed() };
        lock.l_type = libc::F_WRLCK as libc::c_short;
        // SAFETY: the descriptor is open, and the call writes to nothing but `lock`.
        if unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_GETLK, &raw mut lock) } != 0 {
            return Err(std::io::Error::last_os_error().to_string());
        }
        if lock.l_type == libc::F_UNLCK as libc::c_short {
            return Ok(());
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    Err("the image is still locked".to_owned())
}

fn run(command: &mut Command) -> Result<Output, String> {
    command.stdin(Stdio::null()).output().map_err(|error| format!("{command:?}: {error}"))
}

fn succeeded(command: &mut Command) -> Result<String, String> {
    let output = run(command)?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let complaints = String::from_utf8_lossy(&output.stderr);
    if output.status.success() { Ok(text) } else { Err(format!("{command:?}: {}{text}{complaints}", output.status)) }
}

/// Runs `qemu-img`.
pub(crate) fn qemu_img(arguments: &[&str]) -> Result<String, String> {
    succeeded(Command::new("qemu-img").args(arguments))
}

/// Runs commands of `qemu-io` on a qcow2 image.
pub(crate) fn qemu_io(image: &str, commands: &[String]) -> Result<(), String> {
    let mut qemu_io = Command::new("qemu-io");
    qemu_io.args(["-t", "unsafe", "-d", "unmap", "-f", "qcow2"]);
    for command in commands {
        qemu_io.args(["-c", command]);
    }
    let text = succeeded(qemu_io.arg(image))?;
    // With -q there is nothing to say unless something is wrong; the status is that of the last command.
    if text.is_empty() { Ok(()) } else { Err(format!("qemu-io: {text}")) }
}

/// Nothing is wrong with an image, and nothing in it is wasted.
pub(crate) fn check(image: &Path) -> Result<(), String> {
    let mut command = Command::new("qemu-img");
    let output = run(command.args(["check", "-f", "qcow2", "--output=json"]).arg(image))?;
    let text = String::from_utf8_lossy(&output.stdout);
    let failed = || format!("qemu-img check: {text}{}", String::from_utf8_lossy(&output.stderr));
    let found: serde_json::Value = serde_json::from_slice(&output.stdout).map_err(|_| failed())?;
    let clean = ["corruptions", "leaks", "check-errors"].iter().all(|key| found[key].as_u64().unwrap_or(0) == 0);
    if clean && output.status.success() { Ok(()) } else { Err(failed()) }
}

/// The disk, or a snapshot of it, as `qemu-img convert` reads it.
pub(crate) fn content(image: &Path, snapshot: Option<&str>) -> Result<Vec<u8>, String> {
    let raw = image.with_extension("raw");
    let mut command = Command::new("qemu-img");
    command.args(["convert", "-f", "qcow2", "-O", "raw"]);
    if let Some(snapshot) = snapshot {
        command.args(["-l", snapshot]);
    }
    succeeded(command.arg(image).arg(&raw))?;
    std::fs::read(raw).map_err(|error| error.to_string())
}

/// The disk as imago reads it.
pub(crate) fn imago(image: &Path) -> Result<Vec<u8>, String> {
    let failed = |error: std::io::Error| format!("imago: {error}");
    // The images are our own: what they refer to may be opened.
    let gate = PermissiveImplicitOpenGate::default();
    let format = Qcow2::<File>::builder_path(image).open_sync(gate).map_err(failed)?;
    let disk = SyncFormatAccess::new(format).map_err(failed)?;
    let mut bytes = vec![0; disk.size() as usize];
    disk.read(bytes.as_mut_slice(), 0).map_err(failed)?;
    Ok(bytes)
}
